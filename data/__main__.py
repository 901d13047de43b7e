"""Look at a source of questions.

    python -m data show SOURCE       print a few rows, as training would see them
    python -m data check SOURCE      grade each gold (must be full marks), wrong answers and junk (must be nothing)

check exits with 1 where a gold fails or a wrong answer passes.
"""

import argparse
import json
import signal
import sys

from data import DataError, load

SOURCES = (
    "sums, words, functions, countdown, reasoning_gym:NAME, a .jsonl, .json, .csv or .parquet file, or a set of the "
    "Hub: OWNER/NAME, OWNER/NAME:CONFIG[SPLIT]"
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data", description="Look at a source of questions.")
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="print a few rows")
    check = commands.add_parser("check", help="grade golds, wrong answers and junk by the graders of their rows")
    for command, n in ((show, "3"), (check, "all of a file or set, 100 of what is made from a seed")):
        command.add_argument("source", help=SOURCES)
        command.add_argument(
            "-n", type=int, default=3 if command is show else None, help=f"how many rows (default {n})"
        )
        command.add_argument("--split", choices=["train", "eval", "pretrain"], default="train", help="(default train)")
        command.add_argument("--seed", type=int, default=0, help="of what is made from a seed (default 0)")
        command.add_argument("--columns", nargs="*", default=[], metavar="OURS=THEIRS", help="such as prompt=question")
    args = parser.parse_args()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a console may not know every character
    if args.command == "show" and hasattr(signal, "SIGPIPE"):  # not in check, which writes to the sandbox's sockets
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` may close the pipe
    pairs = [pair.split("=", 1) for pair in args.columns]
    if any(len(pair) != 2 for pair in pairs) or (args.n is not None and args.n < 1):
        parser.error("--columns takes pairs such as prompt=question, -n a number from 1")
    try:
        rows = load(args.source, args.n, args.split, dict(pairs), args.seed)
    except DataError as error:
        sys.exit(f"error: {error}")
    if args.command == "check":
        sys.exit(check_rows(args.source, rows))
    for row in rows:
        print(json.dumps(row, indent=2, ensure_ascii=False, default=str))


def check_rows(source: str, rows: list[dict]) -> int:
    """Print the report on a source; the exit status."""
    from grading import RewardError, check_tests
    from tools.data_check import check

    try:
        notes = check_tests(rows)
    except RewardError as error:
        sys.exit(f"error: {source}: {error}")
    report = check(rows)
    print("\n".join([f"{source}: {len(rows)} questions", *(f"  note     {note}" for note in notes), *report.lines()]))
    return 1 if report.failures else 0


if __name__ == "__main__":
    main()
