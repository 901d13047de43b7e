"""Try the graders from the command line.

    python -m grading self-test REWARDS.py    what a reward file gives to good and bad completions (tools/self_test.py)
    python -m grading math-table FILE.tsv     grade a table of answers and compare with the verdicts that it expects

The table is tab-separated, without quoting, with the columns kind, gold, answer, expected (accept or reject) in its
first line; others, such as a note, are left aside. An answer that starts with @ is a whole completion, any other is put
in a box.
"""

import argparse
import csv
import sys
import time
from pathlib import Path

from grading.answers.math_grader import grade_math
from grading.base import Completion
from tools.self_test import self_test

COLUMNS = ("kind", "gold", "answer", "expected")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m grading", description="Try the graders.")
    commands = parser.add_subparsers(dest="command", required=True)
    table = commands.add_parser("math-table", help="grade a table of answers with expected verdicts")
    table.add_argument("file", metavar="FILE.tsv", help="columns kind, gold, answer, expected (accept or reject)")
    test = commands.add_parser("self-test", help="try a reward file; its name followed by --help tells more")
    test.add_argument("file", metavar="REWARDS.py")
    test.add_argument("options", nargs=argparse.REMAINDER, help="such as --data SOURCE, --watch, --rescore RUN")
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="replace")  # a console may not know every character
    try:
        if args.command == "math-table":
            grade_table(args.file)
        else:
            self_test(args.file, args.options)
    except ValueError as error:
        sys.exit(f"error: {error}")


def grade_table(path: str) -> None:
    """Print each row that is not graded as expected, and then the counts. Raises ValueError for a bad table."""
    start = time.perf_counter()
    rows = read_table(path)
    counts = {"accept": 0, "reject": 0}  # false ones
    for row in rows:
        is_right, reason = grade_cell(row["answer"], row["gold"])
        graded = "accept" if is_right else "reject"
        if graded != row["expected"]:
            counts[graded] += 1
            why = "" if is_right else f": {reason}"
            print(f"false {graded}: {row['kind']}: {row['answer']} for {row['gold']}{why}")
    print(
        f"right {len(rows) - sum(counts.values())} of {len(rows)}, false accepts {counts['accept']}, "
        f"false rejects {counts['reject']}, seconds {time.perf_counter() - start:.1f}"
    )


def read_table(path: str) -> list[dict]:
    """The rows of a table as dicts. Raises ValueError that names the file and what is wrong with it."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text") from None
    reader = csv.DictReader(text.split("\n"), delimiter="\t", quoting=csv.QUOTE_NONE)
    if missing := [column for column in COLUMNS if column not in (reader.fieldnames or [])]:
        raise ValueError(
            f"{path}:1: no column {', '.join(missing)}: the first line names the columns, separated by tabs"
        )
    rows = []
    for row in reader:
        if row["expected"] not in ("accept", "reject"):
            raise ValueError(
                f"{path}:{reader.line_num}: expected is {row['expected']!r}, and should be accept or reject"
            )
        if not row["gold"].strip():
            raise ValueError(f"{path}:{reader.line_num}: the gold is empty")
        rows.append(row)
    return rows


def grade_cell(answer: str, gold: str) -> tuple[bool, str]:
    """Whether an answer of a table is right, and why not."""
    if answer.startswith("@"):
        answer = Completion("", answer[1:], {}).answer
    else:
        answer = f"\\boxed{{{answer}}}"
    score, reason = grade_math(answer, gold)
    return score == 1.0, reason


if __name__ == "__main__":
    main()
