"""Inspect a source of questions.

    python -m data show SOURCE       print a few rows, as training would see them
    python -m data check SOURCE      grade golds (must get full marks), wrong answers and junk (must get nothing)

check exits with status 1 if a gold fails or a wrong answer passes.
"""

import argparse
import json
import signal
import sys

from data import DataError, load, parse_columns
from grading import RewardError
from tools.data_check import print_report

SOURCES = (
    "sums, words, functions, countdown, reasoning_gym:NAME, a .jsonl, .json, .csv or .parquet file, or a dataset on "
    "the Hub: OWNER/NAME, OWNER/NAME:CONFIG[SPLIT]"
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data", description="Inspect a source of questions.")
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="print a few rows")
    show.add_argument("-n", type=int, default=3, help="number of rows (default 3)")
    check = commands.add_parser("check", help="grade golds, wrong answers and junk with the graders of their rows")
    check.add_argument("-n", type=int, help="number of rows (default: all; 100 for generated questions)")
    for command in (show, check):
        command.add_argument("source", help=SOURCES)
        command.add_argument(
            "--split", choices=["train", "eval", "pretrain"], default="train", help="split to read (default train)"
        )
        command.add_argument("--seed", type=int, default=0, help="seed of generated questions (default 0)")
        command.add_argument(
            "--columns", nargs="*", default=[], metavar="OURS=THEIRS", help="column names, such as prompt=question"
        )
    args = parser.parse_args()
    if args.n is not None and args.n < 1:
        parser.error("-n must be at least 1")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # the console's encoding may lack characters
    try:
        rows = load(args.source, args.n, args.split, parse_columns(args.columns), args.seed)
        if args.command == "check":
            sys.exit(0 if print_report(args.source, rows) else 1)
    except (DataError, RewardError) as error:
        sys.exit(f"error: {error}")
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # exit silently if `| head` closes the pipe
    for row in rows:
        print(json.dumps(row, indent=2, ensure_ascii=False, default=str))


if __name__ == "__main__":
    main()
