"""Ponder against TRL: how long each takes to teach the bundled model the same thing.

    python bench/learn.py --peer trl

Both begin with the same fresh LoRA on the same model, ask the same questions (sums and word problems) in the same order, 32 x
8 completions and one AdamW step each at the same constant learning rate, and give 1 for a right answer in the box. In turns
they take a few steps and write down their LoRA, and Ponder's evaluation answers the same held-out questions with it,
greedily, until it reaches the target. The seconds are those of the steps alone: without loading, saving and evaluating. A
side at rest sleeps. The ratio is Ponder's advantage in seconds (peer / ours): more than 1 is better for Ponder.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import sides  # noqa: E402
from bench.sides import BenchError, spread  # noqa: E402


def learn(args, seed: int, evaluator: sides.Side, folder: Path) -> dict:
    """Both sides with one seed: steps and seconds of each until the target is reached, and accuracies by step."""
    rows, _ = sides.draw_rows(args.max_steps, seed)
    job = sides.tiny_job(rows, seed, args.max_steps, args.learning_rate)
    folder.mkdir()
    with sides.start_ours(job, folder) as ours:
        with sides.start_peer(
            sides.peer_job(job, ours, args.peer, folder / "start", folder, sides.MICRO_BATCH), folder
        ) as peer:
            both = {"ours": ours, "peer": peer}
            found = {side: {"steps": 0, "seconds": 0.0, "reached": False, "accuracy": {}} for side in both}
            turn = 0
            while any(not f["reached"] and f["steps"] < args.max_steps for f in found.values()):
                for side in ("ours", "peer") if turn % 2 == 0 else ("peer", "ours"):
                    if not found[side]["reached"] and found[side]["steps"] < args.max_steps:
                        advance(both[side], found[side], args, evaluator, folder / f"{side}{turn}")
                turn += 1
            versions = {side: both[side].about["versions"] for side in both}
    return {"seed": seed, **found, "ratio": seconds_ratio(found), "versions": versions}


def advance(side: sides.Side, found: dict, args, evaluator: sides.Side, adapter: Path) -> None:
    """A few steps of one side, and what it knows after them."""
    n = min(args.chunk, args.max_steps - found["steps"])
    found["seconds"] += sum(step["step"] for step in side.ask("steps", n=n)["steps"])
    found["steps"] += n
    side.ask("save", folder=str(adapter))
    accuracy = evaluator.ask("evaluate", folder=str(adapter))
    found["accuracy"][found["steps"]] = accuracy
    found["reached"] = accuracy >= args.target
    print(f"  {side.name}: {found['steps']} steps, {found['seconds']:.0f} s, {100 * accuracy:.1f} %", flush=True)


def seconds_ratio(found: dict) -> float | None:
    """Ponder's advantage; None where a side has not reached the target."""
    ours, peer = found["ours"], found["peer"]
    return peer["seconds"] / ours["seconds"] if ours["reached"] and peer["reached"] else None


def report(runs: list[dict], peer: str, target: float) -> str:
    """The table in Markdown."""
    lines = [
        f"| to {100 * target:.0f} % right, seed | Ponder, steps | s | {peer}, steps | s | ratio of seconds |",
        "|---" * 6 + "|",
    ]
    for run in runs:
        cells = []
        for side in ("ours", "peer"):
            reached = run[side]["reached"]
            cells += [f"{run[side]['steps']}{'' if reached else ', not reached'}", f"{run[side]['seconds']:.1f}"]
        ratio = "–" if run["ratio"] is None else f"{run['ratio']:.2f}"
        lines.append(f"| {run['seed']} | {' | '.join(cells)} | {ratio} |")
    ratios = [run["ratio"] for run in runs if run["ratio"] is not None]
    lines += ["", f"ratio of seconds, median of {len(ratios)} seeds (least to greatest): {sides.show(spread(ratios))}"]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=("trl", "trl-cb"), default="trl")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--target", type=float, default=0.8, help="share of the held-out questions that are right")
    parser.add_argument("--questions", type=int, default=200, help="held-out questions")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--chunk", type=int, default=3, help="steps between two evaluations")
    parser.add_argument(
        "--max-steps", type=int, default=60, help="a side that has not reached the target by then gives up"
    )
    parser.add_argument("--json", metavar="FILE", help="write all of it")
    args = parser.parse_args()
    machine, runs = sides.machine(), []
    try:
        _, held_out = sides.draw_rows(1, 0, args.questions)
        with tempfile.TemporaryDirectory() as folder:
            job = sides.tiny_job(held_out, 0, 1, args.learning_rate)
            with sides.start_ours(job, Path(folder), "Evaluation") as evaluator:
                for seed in args.seeds:
                    print(f"seed {seed}:", flush=True)
                    runs.append(learn(args, seed, evaluator, Path(folder, f"seed{seed}")))
    except BenchError as error:
        sys.exit(f"error: {error}")
    versions = runs[0]["versions"]
    peer = sides.title(args.peer, versions["peer"])
    print("\n" + report(runs, peer, args.target) + "\n")
    print(sides.circumstances(machine, versions, peer))
    if args.json:
        ratios = spread([run["ratio"] for run in runs if run["ratio"] is not None])
        sides.write_json(
            args.json, {"ratio": ratios, "runs": runs, "machine": machine, "versions": versions, "command": sys.argv}
        )


if __name__ == "__main__":
    main()
