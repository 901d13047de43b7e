"""Compare the algorithms on the bundled tiny model: train with each method and seed, then write a table and a plot.

    make compare                                          24 steps, three seeds; about an hour on two cores
    python bench/compare.py --only ppo gspo --seeds 0     two methods, one seed

The run folders are runs/compare/METHOD-STEPS-SEED. Finished runs are not repeated, so an interrupted comparison can be
resumed; delete the folders after changing the code. Writes the table in docs/compare.md and docs/compare.png.
"""

import argparse
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ON_POLICY = "--num-mini-batches 1 --learning-rate 3e-3"  # larger, since there is one update per roll-out
METHODS = {  # name: arguments of train.py
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
GOAL = 0.8  # greedy accuracy on held-out questions
LAST_STEPS = 6  # number of steps at the end over which the KL is averaged
COLUMNS = {  # key in the figures of a run: heading, number format
    "greedy": ("accuracy, greedy", ".1%"),
    "sampled": ("accuracy, sampled", ".1%"),
    "to_goal": (f"completions to {GOAL:.0%} greedy", ",.0f"),
    "kl": ("KL, nats per token", ".3f"),
    "completions": ("completions", ",.0f"),
    "seconds": ("seconds", ".0f"),
}
TABLE = re.compile(r"(?<=<!-- table -->\n).*(?=<!-- end of table -->)", re.DOTALL)  # the table in docs/compare.md


def train(steps: int, job: tuple[str, int]) -> dict:
    """Train with the (method, seed) of a job unless that run has finished. Returns its figures; exits if it fails."""
    method, seed = job
    folder = Path("runs/compare", re.sub("[^a-z0-9+_]+", "-", f"{method}-{steps}-{seed}"))
    summary = folder / "summary.json"
    if not (summary.is_file() and json.loads(summary.read_text(encoding="utf-8")).get("finished")):
        shutil.rmtree(folder, ignore_errors=True)
        settings = f"{METHODS[method]} --seed {seed} --max-steps {steps} --eval-questions 201 --eval-steps 4"
        command = [sys.executable, "train.py", *settings.split(), "--save-steps", "0", "--output-dir", str(folder)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            sys.exit(f"error: {method}, seed {seed}: {result.stderr.strip() or result.returncode}")
    figures = read_figures(folder)
    print(f"{method}, seed {seed}: {figures['greedy']:.1%}", flush=True)
    return figures


def read_figures(folder: Path) -> dict:
    """Return the figures of a run. `points`: (completions, greedy accuracy) of each evaluation, from step 0 on."""
    evaluations = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["eval"]
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rollouts = sorted((folder / "rollouts").glob("*.jsonl"))  # one file per step, one line per completion
    completions = list(accumulate(path.read_bytes().count(b"\n") for path in rollouts))
    points = [(count, m["eval/accuracy"]) for count, m in zip(completions, metrics) if "eval/accuracy" in m]
    points = [(0, evaluations["before"]["accuracy"]), *points, (completions[-1], evaluations["after"]["accuracy"])]
    return {
        "before": evaluations["before"],
        "greedy": evaluations["after"]["accuracy"],
        "sampled": evaluations["after"]["accuracy_sampled"],
        "points": points,
        "to_goal": completions_to_goal(points),
        "kl": statistics.fmean(m["kl"] for m in metrics[-LAST_STEPS:]),
        "completions": completions[-1],
        "seconds": sum(m[f"time/{part}"] for m in metrics for part in ("rollout", "update")),
    }


def completions_to_goal(points: list[tuple[int, float]], goal: float = GOAL) -> float:
    """Return the number of completions at which the accuracy first reaches the goal; infinity if it never does.

    The accuracy is interpolated linearly between evaluations.
    """
    if points[0][1] >= goal:
        return float(points[0][0])
    for (start, low), (end, high) in pairwise(points):
        if high >= goal:
            return start + (goal - low) / (high - low) * (end - start)
    return math.inf


def spread(values: list[float], number_format: str) -> str:
    """Format the median of all seeds, followed by the minimum and maximum in brackets."""
    numbers = statistics.median(values), min(values), max(values)
    median, low, high = (format(n, number_format) if math.isfinite(n) else "not reached" for n in numbers)
    return median if low == high else f"{median} ({low} to {high})"


def table(runs: dict[str, list[dict]]) -> str:
    """Return the table in Markdown, one row per method. runs: the figures of all seeds, by method."""
    before = [run["before"] for seed_runs in runs.values() for run in seed_runs]
    cells = [spread([rates[key] for rates in before], ".1%") for key in ("accuracy", "accuracy_sampled")]
    lines = [f"| method | {' | '.join(heading for heading, _ in COLUMNS.values())} |", "|---" * 7 + "|"]
    lines.append(f"| *before training* | {' | '.join(cells)} | | | | |")
    for method, seed_runs in runs.items():
        cells = [spread([run[key] for run in seed_runs], spec) for key, (_, spec) in COLUMNS.items()]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(runs: dict[str, list[dict]], path: Path) -> None:
    """Plot accuracy against completions, one subplot per method: a line for each seed, other methods in grey."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(4, len(runs))
    rows = math.ceil(len(runs) / columns)
    size = (3 * columns, 2.3 * rows)
    figure, grid = pyplot.subplots(
        rows, columns, figsize=size, layout="constrained", sharex=True, sharey=True, squeeze=False
    )
    for axes in grid.flat[len(runs) :]:
        axes.set_visible(False)
    for axes, method in zip(grid.flat, runs):
        for other, seed_runs in runs.items():
            for run in seed_runs:
                completions, accuracy = zip(*run["points"])
                style = {"color": "C0", "zorder": 2} if other == method else {"color": "0.88", "lw": 0.6}
                axes.plot([n / 1000 for n in completions], [100 * rate for rate in accuracy], **style)
        axes.axhline(100 * GOAL, c="grey", lw=0.8, ls="--")
        axes.set(title=method, ylim=(-2, 102))
    figure.supylabel("accuracy (greedy), %")
    figure.supxlabel("completions, thousands")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--jobs", type=int, default=2, help="number of concurrent runs")
    args = parser.parse_args()
    os.chdir(ROOT)
    os.environ["OMP_NUM_THREADS"] = "1"  # for each run
    jobs = [(method, seed) for method in args.only for seed in args.seeds]
    with ThreadPoolExecutor(args.jobs) as pool:
        figures = list(pool.map(partial(train, args.steps), jobs))
    runs = {method: [f for (name, _), f in zip(jobs, figures) if name == method] for method in args.only}
    setup = f"{args.steps} steps, seeds {args.seeds}; {os.cpu_count()} cores, {args.jobs} runs at a time; {time.strftime('%Y-%m-%d')}"
    text = f"{table(runs)}\n\n{setup}\n"
    document = Path("docs/compare.md")
    document.write_text(TABLE.sub(lambda _: text, document.read_text(encoding="utf-8")), encoding="utf-8")
    draw(runs, Path("docs/compare.png"))
    print(f"\n{text}")


if __name__ == "__main__":
    main()
