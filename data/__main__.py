"""`python -m data show SOURCE`: print a few rows of a source, as training would see them."""

import argparse
import json
import signal
import sys

from data import DataError, load


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data", description="Look at a source of questions.")
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="print a few rows")
    show.add_argument("source", help="sums, words, functions, or a .jsonl, .json, .csv or .parquet file")
    show.add_argument("-n", type=int, default=3, help="how many rows (default 3)")
    show.add_argument("--split", choices=["train", "eval", "pretrain"], default="train", help="of a built-in family")
    show.add_argument("--seed", type=int, default=0, help="of a built-in family")
    show.add_argument("--columns", nargs="*", default=[], metavar="OURS=THEIRS", help="such as prompt=question")
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="replace")  # a console may not know every character
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` may close the pipe
    pairs = [pair.split("=", 1) for pair in args.columns]
    if any(len(pair) != 2 for pair in pairs) or args.n < 1:
        parser.error("--columns takes pairs such as prompt=question, -n a number from 1")
    try:
        rows = load(args.source, args.n, args.split, dict(pairs), args.seed)
    except DataError as error:
        sys.exit(f"error: {error}")
    for row in rows:
        print(json.dumps(row, indent=2, ensure_ascii=False, default=str))


if __name__ == "__main__":
    main()
