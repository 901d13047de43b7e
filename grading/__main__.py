"""Test graders and reward files from the command line.

    python -m grading self-test REWARDS.py    score good and bad completions with a reward file (tools/self_test.py)
    python -m grading math-table FILE.tsv     grade a table of answers and compare with the expected verdicts

The table is tab-separated without quoting. Its first line names the columns: kind, gold, answer and expected (accept or
reject) are required, question is optional, others, such as a note, are ignored. An answer that starts with @, or that
contains a final answer (\\boxed{}, #### and the like), is a whole completion, in which \\n is a line break; any other
answer is put into \\boxed{}.
"""

import argparse
import csv
import re
import sys
import time
from pathlib import Path

from grading.answers.extraction import extract_answer
from grading.answers.math_grader import grade_math
from grading.base import Completion
from tools.self_test import self_test

COLUMNS = ("kind", "gold", "answer", "expected")
_LINE_BREAK = re.compile(r"\\n(?![A-Za-z])")  # not the start of \\ne


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m grading", description="Test graders and reward files.")
    commands = parser.add_subparsers(dest="command", required=True)
    table = commands.add_parser("math-table", help="grade a table of answers with expected verdicts")
    table.add_argument("file", metavar="FILE.tsv", help="columns kind, gold, answer, expected (accept or reject)")
    test = commands.add_parser("self-test", help="test a reward file; self-test REWARDS.py --help lists its options")
    test.add_argument("file", metavar="REWARDS.py")
    test.add_argument("options", nargs=argparse.REMAINDER, help="such as --data SOURCE, --watch, --rescore RUN")
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="replace")  # the console may not support all characters
    try:
        if args.command == "math-table":
            grade_table(args.file)
        else:
            self_test(args.file, args.options)
    except ValueError as error:
        sys.exit(f"error: {error}")


def grade_table(path: str) -> None:
    """Print each row with an unexpected verdict, then the counts. Raises ValueError if the table is malformed."""
    start = time.perf_counter()
    rows = read_table(path)
    counts = {"accept": 0, "reject": 0}  # false accepts and false rejects
    for row in rows:
        is_right, reason = grade_cell(row["answer"], row["gold"], row.get("question"))
        verdict = "accept" if is_right else "reject"
        if verdict != row["expected"]:
            counts[verdict] += 1
            suffix = "" if is_right else f": {reason}"
            print(f"false {verdict}: {row['kind']}: {row['answer']} for {row['gold']}{suffix}")
    print(
        f"right {len(rows) - sum(counts.values())} of {len(rows)}, false accepts {counts['accept']}, "
        f"false rejects {counts['reject']}, seconds {time.perf_counter() - start:.1f}"
    )


def read_table(path: str) -> list[dict]:
    """Return the rows of a table as dicts. Raises ValueError with the file and line if the table is malformed."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text") from None
    reader = csv.DictReader(text.split("\n"), delimiter="\t", quoting=csv.QUOTE_NONE)
    if missing := [column for column in COLUMNS if column not in (reader.fieldnames or [])]:
        raise ValueError(
            f"{path}:1: no column {', '.join(missing)}: the first line must name the columns, separated by tabs"
        )
    rows = []
    for row in reader:
        if row["expected"] not in ("accept", "reject"):
            raise ValueError(f"{path}:{reader.line_num}: expected is {row['expected']!r}, must be accept or reject")
        if not row["gold"].strip():
            raise ValueError(f"{path}:{reader.line_num}: the gold answer is empty")
        rows.append(row)
    return rows


def grade_cell(answer: str, gold: str, question: str | None = None) -> tuple[bool, str]:
    """Grade an answer of a table. Returns whether it is right, and the reason."""
    if answer.startswith("@"):
        answer = Completion("", answer[1:], {}).answer
    elif extract_answer(answer) is None:
        answer = f"\\boxed{{{answer}}}"
    score, reason = grade_math(_LINE_BREAK.sub("\n", answer), gold, question)
    return score == 1.0, reason


if __name__ == "__main__":
    main()
