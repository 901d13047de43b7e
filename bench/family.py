"""Every algorithm on the bundled tiny model: one short run each, and what it gained.

    python bench/family.py                          about half an hour on two cores
    python bench/family.py --only ppo gspo --seeds 0 1 2 --steps 30

Each run is `python train.py` with the settings of configs/tiny.yaml and those below; two runs go side by side, on one
thread each. Prints a line for each run as it ends, then a table in Markdown.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ON_POLICY = "--num-mini-batches 1 --learning-rate 3e-3"  # one update a roll-out, so a larger one
FAMILY = {
    "reinforce, no baseline": f"--algorithm reinforce --baseline none {ON_POLICY}",
    "reinforce, group mean": f"--algorithm reinforce --baseline group {ON_POLICY}",
    "reinforce, running mean": f"--algorithm reinforce --baseline running {ON_POLICY}",
    "rloo": "--algorithm rloo",
    "reinforce++": "--algorithm reinforce_plus_plus",
    "grpo": "--loss-type grpo",
    "grpo, token mean": "--loss-type dapo",
    "dr_grpo": "--loss-type dr_grpo --scale-rewards none",
    "dapo": "--loss-type dapo --epsilon-high 0.28 --dynamic-sampling 2 --soft-punish-cache 16",
    "gspo": "--loss-type grpo --importance-sampling-level sequence --epsilon 3e-4 --epsilon-high 4e-4",
    "cispo": "--loss-type cispo --epsilon-high 5",
    "sapo": "--loss-type sapo",
    "a2c": f"--algorithm a2c {ON_POLICY}",
    "ppo": "--config configs/tiny_ppo.yaml",
    "ppo, critic head": "--config configs/tiny_ppo.yaml --critic head",
    "dpo": "--algorithm dpo --beta 0.1",
}


def train(name: str, seed: int, steps: int, questions: int) -> dict:
    """One run; its summary. Raises RuntimeError with what it printed last."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "train.py", *FAMILY[name].split(), "--seed", str(seed), "--max-steps", str(steps),
            "--eval-steps", "0", "--save-steps", "0", "--eval-questions", str(questions), "--output-dir", f"{folder}/run",
        ]  # fmt: skip
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{name}, seed {seed}: {done.stderr.strip()[-500:]}")
        return json.loads(Path(folder, "run/summary.json").read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=FAMILY, default=list(FAMILY))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--questions", type=int, default=402, help="held-out questions")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    args = parser.parse_args()

    def one(job):
        name, seed = job
        try:
            summary = train(name, seed, args.steps, args.questions)
        except RuntimeError as error:
            print(error, flush=True)
            return name, None
        before, after = summary["eval"]["before"], summary["eval"]["after"]
        gain = 100 * (after["accuracy_sampled"] - before["accuracy_sampled"])
        print(f"{name:<26} seed {seed}  sampled {gain:+.1f} points, {summary['seconds']['total']:.0f} s", flush=True)
        return name, summary

    with ThreadPoolExecutor(args.jobs) as pool:
        runs = list(pool.map(one, [(name, seed) for name in args.only for seed in args.seeds]))

    print("\n| algorithm | sampled before | after | greedy after | thinks after | seconds |\n" + "|---" * 6 + "|")
    for name in args.only:
        summaries = [summary for of, summary in runs if of == name and summary]
        if not summaries:
            print(f"| {name} | failed |" + " |" * 4)
            continue
        cells = []
        for when, rate in (
            ("before", "accuracy_sampled"),
            ("after", "accuracy_sampled"),
            ("after", "accuracy"),
            ("after", "thinking_sampled"),
        ):
            cells.append(" / ".join(f"{100 * summary['eval'][when][rate]:.1f}" for summary in summaries))
        seconds = statistics.median(summary["seconds"]["total"] for summary in summaries)
        print(f"| {name} | {' | '.join(cells)} | {seconds:.0f} |")


if __name__ == "__main__":
    main()
