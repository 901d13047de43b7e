"""Every algorithm of the family on the bundled tiny model, each with the same number of completions.

    make compare                                          24 steps, three seeds: about an hour on two cores
    python bench/compare.py --only ppo gspo --seeds 0     two of them, one seed

Each run is `python train.py` with the settings of configs/tiny.yaml and those below. The budget is steps x 32 x 8
completions; a run with dynamic sampling asks for more in a step, so it is measured at its last step within the budget.

What was measured of a run is kept in runs/compare/NAME-SEED.json. A run that is there with the same settings and source
is not repeated, so an interrupted comparison goes on where it stopped. The source is all that training depends on, not
this file: after a change of the measurement here use --fresh. Writes docs/compare.md and docs/compare.png.
"""

import argparse
import collections
import dataclasses
import hashlib
import itertools
import json
import math
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from rl.config import Config, ConfigError  # noqa: E402
from rl.run.read_config import read_config  # noqa: E402

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
DEFAULTS = "configs/tiny.yaml"  # of every run, unless it names a file
SOURCE = ("train.py", "rewards.py", "configs/tiny*.yaml", "rl/**/*.py", "grading/**/*.py", "data/*.py", "data/tiny/*")
EVERY = 4  # steps between evaluations
GOAL = 0.8  # held-out accuracy, greedy
KEPT = Path("runs/compare")
MEASURING = threading.Lock()  # transformers is imported and a policy loaded by one thread at a time


# --- a run


def settings_of(name: str, seed: int, steps: int, questions: int) -> list[str]:
    """The arguments of train.py. Each step is saved, so that any of them can be measured."""
    return [
        *FAMILY[name].split(), "--seed", str(seed), "--max-steps", str(steps), "--eval-questions", str(questions),
        "--eval-steps", str(EVERY), "--save-steps", "1",
    ]  # fmt: skip


def source() -> str:
    """A hash of everything that a run depends on: trainer, rewards, graders, questions, the tiny model."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in SOURCE for path in ROOT.glob(pattern) if path.is_file()}):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def kept_path(name: str, seed: int) -> Path:
    return KEPT / f"{re.sub('[^a-z0-9+_]+', '-', name)}-{seed}.json"


def kept_run(name: str, seed: int, settings: list[str], of_source: str) -> dict | None:
    """What was measured of this run before, None where it was not, or with other settings or another source."""
    try:
        run = json.loads(kept_path(name, seed).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return run if (run.get("settings"), run.get("source")) == (settings, of_source) else None


def train(arguments: list[str], folder: Path) -> None:
    """Run train.py into a folder. Raises RuntimeError with the last line that it printed as an error."""
    command = [sys.executable, "train.py", *arguments, "--output-dir", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise RuntimeError(lines[-1] if lines else f"train.py ended with the exit status {done.returncode}")


def run_and_measure(name: str, seed: int, settings: list[str], of_source: str) -> dict:
    """Train, and measure at the last step within the budget.

    Returns what is kept: `points`, completions and greedy accuracy of each evaluation; all of `before` and `after`;
    `completions` until then; `seconds` of roll-out, scoring and update; what kl_from_base returns. Raises RuntimeError.
    """
    config, _ = read_config(settings, DEFAULTS)
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent, "run")
        train(settings, folder)
        metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        asked = completions_by_step(folder)
        last = last_within(asked, config.max_steps * config.prompts_per_step * config.num_generations)
        before, after = summary["eval"]["before"], summary["eval"]["after"]
        checkpoint = folder / "checkpoints" / f"step_{last:06d}"
        if last < config.max_steps:
            train(["--eval-only", "--adapter", str(checkpoint)], Path(parent, "measured"))
            after = json.loads(Path(parent, "measured/summary.json").read_text(encoding="utf-8"))["eval"]["after"]
        with MEASURING:
            drift = kl_from_base(dataclasses.replace(config, adapter=str(checkpoint)))
    if source() != of_source:
        raise RuntimeError("the source changed while it ran: start the comparison again")

    rates = {asked[m["step"]]: m["eval/accuracy"] for m in metrics if "eval/accuracy" in m and m["step"] < last}
    rates = {0: before["accuracy"], **rates, asked[last]: after["accuracy"]}
    parts = ("time/rollout", "time/score", "time/update")
    return {
        "name": name, "seed": seed, "settings": settings, "source": of_source, "steps": last,
        "completions": asked[last], "points": list(rates.items()), "before": before, "after": after, **drift,
        "seconds": sum(m[part] for m in metrics if m["step"] <= last for part in parts),
        "torch": summary["versions"]["torch"], "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def completions_by_step(folder: Path) -> dict[int, int]:
    """How many completions a run had generated by the end of each step: those left out of learning are counted too."""
    with (folder / "rollouts.jsonl").open(encoding="utf-8") as file:
        asked = collections.Counter(json.loads(line)["step"] for line in file)  # in the order of the steps
    return dict(zip(asked, itertools.accumulate(asked.values())))


def last_within(asked: dict[int, int], budget: int) -> int:
    """The last step by whose end no more completions than the budget were generated; the first one where none is."""
    return max((step for step, total in asked.items() if total <= budget), default=min(asked))


def kl_from_base(config: Config) -> dict:
    """KL(policy || base) in nats a token and a completion, and the machine.

    The estimator is k1, the mean of log pi - log pi_base, on one completion of each held-out question, sampled from the
    policy at the training temperature. config names the LoRA as its adapter.
    """
    import torch

    from data import load_questions
    from rl.model.logprobs import completion_logprobs
    from rl.model.policy import load_policy
    from rl.model.sampling import Sampling
    from rl.rollout import rollout
    from rl.run.folder import describe_machine

    policy = load_policy(config)
    _, rows, _ = load_questions(
        config.train_data, config.eval_data, config.train_questions, config.eval_questions, config.columns, config.seed
    )
    prompts = policy.encode_prompts(rows, config.max_completion_length)
    generator = torch.Generator(policy.device).manual_seed(0)
    episodes = rollout(
        policy, prompts, 1, config.max_completion_length, Sampling(config.temperature), generator, config.rollout_batch_size
    )  # fmt: skip
    nats = tokens = 0.0
    with torch.no_grad():
        for first in range(0, len(episodes), 64):
            batch = episodes[first : first + 64]
            rows = [e.prompt_ids for e in batch], [e.completion_ids for e in batch]
            logprobs, mask, _ = completion_logprobs(policy, *rows)  # (B, C)
            with policy.model.disable_adapter():  # not policy.reference(), which here is the same LoRA, frozen
                base, _, _ = completion_logprobs(policy, *rows)
            nats += (logprobs - base).sum().item()  # masked places are 0 in both
            tokens += mask.sum().item()
    machine = f"{describe_machine(policy.device)}, {processor()}"
    return {"kl_token": nats / tokens, "kl_completion": nats / len(episodes), "machine": machine}


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.+)", info.read_text()) if info.is_file() else None
    return named[1] if named else platform.processor() or platform.machine()


# --- the table


def completions_needed(points: list[tuple[int, float]], goal: float = GOAL) -> float:
    """Completions until the accuracy first reaches the goal, linear between evaluations; infinity where it never does.

    points: completions and accuracy of each evaluation, from before training on.
    """
    if points[0][1] >= goal:
        return float(points[0][0])
    for (x, low), (end, high) in itertools.pairwise(points):
        if high >= goal:
            return x + (goal - low) / (high - low) * (end - x)
    return math.inf


def spread(values: list[float], form: str) -> str:
    """The median with the least and the greatest value in brackets; infinity is "not reached"."""
    three = statistics.median(values), min(values), max(values)
    middle, least, most = (format(value, form) if math.isfinite(value) else "not reached" for value in three)
    return middle if least == most else f"{middle} ({least} to {most})"


COLUMNS = {  # heading: the figure of a run, and its format
    "right, greedy: %": (lambda run: 100 * run["after"]["accuracy"], ".1f"),
    "right, sampled: %": (lambda run: 100 * run["after"]["accuracy_sampled"], ".1f"),
    f"completions to {GOAL:.0%} greedy": (lambda run: completions_needed(run["points"]), ",.0f"),
    "KL: nats a token": (lambda run: run["kl_token"], ".3f"),
    "nats a completion": (lambda run: run["kl_completion"], ".2f"),
    "completions": (lambda run: run["completions"], ",.0f"),
    "seconds": (lambda run: run["seconds"], ".0f"),
}


def table(runs: dict[str, list[dict | None]]) -> str:
    """In Markdown, a line a method. runs: those of each method, None for one that failed; one at least did not."""
    before = [run["before"] for of_method in runs.values() for run in of_method if run]
    rates = [spread([100 * of[key] for of in before], ".1f") for key in ("accuracy", "accuracy_sampled")]
    lines = [f"| method | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines.append(f"| *before training* | {' | '.join(rates)} |" + " |" * (len(COLUMNS) - 2))
    for name, of_method in runs.items():
        done = [run for run in of_method if run]
        failed = f" ({len(of_method) - len(done)} of {len(of_method)} failed)" if 0 < len(done) < len(of_method) else ""
        cells = [spread([figure(run) for run in done], form) if done else "" for figure, form in COLUMNS.values()]
        lines.append(f"| {name}{failed} | {' | '.join(cells if done else ['failed', *cells[1:]])} |")
    return "\n".join(lines)


def document(runs: dict[str, list[dict | None]], args: argparse.Namespace, command: str) -> str:
    """docs/compare.md: the table, how it was measured, and what it does not say."""
    done = [run for of_method in runs.values() for run in of_method if run]
    machines, torches, dates = (sorted({run[key] for run in done}) for key in ("machine", "torch", "date"))
    ppo, _ = read_config(FAMILY["ppo"].split(), DEFAULTS)
    return f"""# The family, compared

Written by `{command}`. The bundled tiny model, {done[0]["before"]["n"]} held-out questions, {args.steps * 32 * 8:,} completions
for each method ({args.steps} steps of 32 x 8), seeds {", ".join(map(str, args.seeds))}. A figure is the median of the seeds, with the least and the greatest
in brackets.

![held-out accuracy against completions](compare.png)

{table(runs)}

{"; ".join(machines)}; {args.jobs} runs side by side, one thread each; torch {", ".join(torches)}; {" to ".join(dict.fromkeys((dates[0], dates[-1])))}.

* **Settings**: those of `configs/tiny.yaml` and of `FAMILY` in `bench/compare.py`; PPO's are `configs/tiny_ppo.yaml`. The
  learning rate falls to 0 at the last step.
* **Right**: of the held-out questions, answered greedily, or sampled at temperature 1. All runs start from the same model.
* **Completions to {GOAL:.0%}**: until the greedy accuracy first reaches it; linear between evaluations, which are {EVERY} steps apart.
* **KL** from the model before training: k1, the mean of log pi - log pi_base, on one sampled completion of each held-out
  question.
* **Completions**: all that were generated. With dynamic sampling (`dapo`) a step asks for more than 32 x 8: that run is
  measured at its last step within the budget, where its learning rate has not fallen to 0 yet.
* **Seconds** on the clock: roll-out, scoring and update until then, without loading, evaluating and saving.

What it says: how far each came from the same start with as many completions. What it does not say:

* which method is best. The settings are one choice for each, without a search of equal effort; others would give another
  order. Where the ranges of two methods overlap, nothing tells them apart here.
* what a longer run gives: of PPO's steps the first {ppo.critic_warmup_steps} teach its critic only, and their completions count.
* anything about harder jobs. Here a habit that pretraining left rare is elicited, by a reward for the whole completion.
"""


# --- the picture


def curve(runs: list[dict]) -> tuple[list[float], list[float], list[float], list[float]]:
    """Completions in thousands, and the median, least and greatest accuracy of the seeds there, in percent.

    The places are the evaluations of the first run, as far as all of them go; the others are linear in between.
    """
    import numpy

    end = min(run["points"][-1][0] for run in runs)
    places = sorted({x for x, _ in runs[0]["points"] if x < end} | {end})
    rates = numpy.array([numpy.interp(places, *zip(*run["points"])) for run in runs])  # (seeds, places)
    return [x / 1000 for x in places], *(100 * of(rates, axis=0) for of in (numpy.median, numpy.min, numpy.max))


def draw(runs: dict[str, list[dict | None]], path: Path) -> None:
    """A small picture for each method: its accuracy by completions, with those of the others in grey behind."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    done = {name: [run for run in of_method if run] for name, of_method in runs.items()}
    curves = {name: curve(of_method) for name, of_method in done.items() if of_method}
    across = min(4, len(curves))
    down = math.ceil(len(curves) / across)
    figure, grid = pyplot.subplots(
        down, across, figsize=(max(3 * across, 8), 2.3 * down + 0.9), layout="constrained", sharex=True, sharey=True, squeeze=False
    )  # fmt: skip
    for axes in grid.flat[len(curves) :]:
        axes.set_visible(False)
    for axes, name in zip(grid.flat, curves):
        for x, median, _, _ in curves.values():
            others, *_ = axes.plot(x, median, c="0.85", lw=0.8, zorder=1)
        axes.axhline(100 * GOAL, c="grey", lw=0.8, ls="--", zorder=1)
        x, median, least, most = curves[name]
        band = axes.fill_between(x, least, most, color="C0", alpha=0.2, lw=0)
        line, *_ = axes.plot(x, median, "o-", c="C0", ms=3.5)
        needed = statistics.median(completions_needed(run["points"]) for run in done[name])
        reached = math.isfinite(needed)
        said, colour = (f"{GOAL:.0%} at {needed:,.0f}", "C1") if reached else (f"{GOAL:.0%} not reached", "grey")
        axes.text(0.97, 0.06, said, transform=axes.transAxes, ha="right", color=colour)
        if reached:
            axes.plot(needed / 1000, 100 * GOAL, "o", c="C1", ms=6, zorder=3)
        axes.set(title=name, ylim=(-2, 102))
        axes.xaxis.set_tick_params(labelbottom=axes in grid.flat[max(0, len(curves) - across) : len(curves)])
        axes.grid(alpha=0.3)
    figure.supylabel("right (greedy), %")
    figure.supxlabel("completions, thousands")
    drawn = {line: "median of the seeds", band: "least to greatest", others: "the other methods"}
    figure.legend(drawn, drawn.values(), loc="outside upper center", ncols=len(drawn), frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


# --- the comparison


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=FAMILY, default=list(FAMILY), metavar="METHOD")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--questions", type=int, default=201, help="held-out questions")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    parser.add_argument("--fresh", action="store_true", help="repeat runs that are there already")
    args = parser.parse_args()
    os.chdir(ROOT)
    os.environ["OMP_NUM_THREADS"] = "1"  # of each run, and of the measurement here, before torch is imported
    of_source = source()

    def job(name, seed):
        return name, seed, settings_of(name, seed, args.steps, args.questions), of_source

    jobs = [job(name, seed) for seed in args.seeds for name in args.only]
    due = [job for job in jobs if args.fresh or not kept_run(*job)]
    print(f"{len(jobs)} runs, of which {len(jobs) - len(due)} are in {KEPT} already", flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:  # an interrupt cancels what has not begun
        list(pool.map(run_and_keep, due))

    runs = {name: [kept_run(*job(name, seed)) for seed in args.seeds] for name in FAMILY}
    runs = {name: of_method for name, of_method in runs.items() if name in args.only or all(of_method)}
    if not any(run for of_method in runs.values() for run in of_method):
        sys.exit("error: every run failed, so there is nothing to compare: see the lines above")
    command = shlex.join(["python", "bench/compare.py", *sys.argv[1:]])
    draw(runs, Path("docs/compare.png"))
    Path("docs/compare.md").write_text(document(runs, args, command), encoding="utf-8")
    print(f"\n{table(runs)}\n\nWritten: docs/compare.md and docs/compare.png")
    sys.exit(any(None in of_method for of_method in runs.values()))


def run_and_keep(job: tuple) -> None:
    """One run, for the arguments of run_and_measure; a line when it ends, or when it fails."""
    name, seed, *_ = job
    path, started = kept_path(name, seed), time.perf_counter()
    path.unlink(missing_ok=True)
    try:
        run = run_and_measure(*job)
    except (RuntimeError, ConfigError) as error:
        print(f"{name}, seed {seed}: failed: {error}", flush=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, path)
    rates = " -> ".join(f"{run[when]['accuracy']:.1%}" for when in ("before", "after"))
    seconds = time.perf_counter() - started
    print(f"{name:<24} seed {seed}  greedy {rates}, {run['completions']:,} completions, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("Stopped. The same command goes on where it stopped.")
