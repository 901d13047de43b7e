"""The self-test of a reward file: what it gives to completions whose worth is known. Starts at once and needs no model.

    python rewards.py                                       on questions of sums, words and functions
    python rewards.py --data my.jsonl --columns prompt=question answer=gold
    python rewards.py --watch                               again at every save
    python rewards.py --rescore runs/NAME                   a run's completions, with the file as it is now: old -> new
    python -m grading self-test my_rewards.py ...           another file

The completions are the file's own `examples` and, for each question, its gold as a good completion would write it, and
wrong ones that must not be paid for (grading/rewards/probes.py). Only the weighted total is judged, and only against the
wrong ones: the self-test fails if one of them scores as high as the right one, or if a reward is the same for everything.
"""

import argparse
import math
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

from data import DataError, load, parse_columns
from grading.base import RewardError, RewardFunction, Rewards, row_kind, shorten
from grading.rewards import probes
from grading.rewards.preflight import Trial, preflight, try_probes, try_rows
from grading.rewards.reward_file import load_rewards
from tools.rescore import rescore

WIDTH = 110  # columns of the table
NAMES_WIDTH = 48  # of them, for the rewards
WATCH_SECONDS = 0.3  # between two looks at the file


def self_test(file: str, arguments: list[str] | None = None) -> None:
    """The command line of the self-test. Ends the program: status 0 if all is well, 1 if not."""
    parser = argparse.ArgumentParser(
        prog=f"python {Path(file).name}", description="What this reward file gives to completions whose worth is known."
    )
    add = parser.add_argument
    sources = ["sums", "words", "functions"]
    add("--data", nargs="+", metavar="SOURCE", default=sources, help="where the questions come from")
    add("--columns", nargs="*", default=[], metavar="OURS=THEIRS", help="such as prompt=question")
    add("-n", type=int, default=3, help="questions of each source (default 3)")
    add("--watch", action="store_true", help="again at every save of the file, until Ctrl-C")
    add("--rescore", metavar="RUN", help="a run folder, or a file of it such as rollouts/000012.jsonl or failed.jsonl")
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments)
    if options.n < 1:
        parser.error("-n takes a number from 1")
    sys.stdout.reconfigure(errors="replace")  # a console may not know every character
    if not Path(file).is_file():
        sys.exit(f"error: there is no file {file}")
    if options.watch:
        return _watch(file, [argument for argument in arguments if argument != "--watch"])
    try:
        if options.rescore:
            rescore(file, options.rescore)
        elif not _test(file, options.data, parse_columns(options.columns), options.n):
            sys.exit(1)
    except (RewardError, DataError) as error:
        sys.exit(f"error: {error}")
    except BrokenPipeError:  # `| head` has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _watch(file: str, arguments: list[str]) -> None:
    """Run the self-test in a fresh process at every change of the file."""
    command = [sys.executable, "-m", "grading", "self-test", file, *arguments]
    root = str(Path(__file__).resolve().parent.parent)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    seen = None
    try:
        while True:
            changed = Path(file).stat().st_mtime_ns if Path(file).exists() else None
            if changed not in (seen, None):
                seen = changed
                print(f"--- {time.strftime('%H:%M:%S')} {file}", flush=True)
                subprocess.run(command, env=environment)
                print("--- waiting for the next save; Ctrl-C ends", flush=True)
            time.sleep(WATCH_SECONDS)
    except KeyboardInterrupt:
        print()


def _test(file: str, sources: list[str], columns: dict[str, str], n: int) -> bool:
    """Print the tables, what fails and the verdict; whether nothing fails."""
    started = time.perf_counter()
    rewards = load_rewards(file)
    rows = {source: load(source, n, columns=columns) for source in sources}
    notes = preflight(rewards, [row for loaded in rows.values() for row in loaded])
    functions = ", ".join(f"{f.name} {f.weight:g}" if f.weight else f"{f.name} (metric)" for f in rewards.functions)
    _print_wrapped(f"{Path(file).name}: {functions}")
    trials = try_probes(rewards, _examples(rewards))
    best_example = max((t.score.total for t in trials if t.probe.is_right), default=math.nan)
    failures = []
    if trials:
        failures += _print_block(rewards, "examples", "examples in the file", trials, math.nan)
    for source, loaded in rows.items():
        name = Path(source).name
        for kind in dict.fromkeys(map(row_kind, loaded)):
            block = [row for row in loaded if row_kind(row) == kind]
            style, tried = try_rows(rewards, block)
            question = shorten(" ".join(probes.completion(block[0], "").prompt.split()), 50)
            title = f"{name}, the answers written as {style}: questions such as {question!r}"
            failures += _print_block(rewards, name, title, tried, best_example)
            notes += _notes_on_golds(name, tried)
            trials += tried
    for name in rewards.names:
        values = [t.score.parts[name] for t in trials if t.score.parts[name] is not None]
        if not values:
            notes.append(f"{name} applied to none of these questions: --data SOURCE tries others")
        elif len(values) > 1 and len(set(values)) == 1:
            failures.append(
                f"{name} gives {values[0]:g} to all {len(values)} completions: nothing can be learnt from it"
            )
    print()
    for text in [*notes, *(f"FAIL: {failure}" for failure in failures)]:
        _print_wrapped(text)
    verdict = f"FAILED: {len(failures)} problem{'s' if len(failures) > 1 else ''}" if failures else "passed"
    print(
        f"self-test {verdict}; {len(rewards.names)} rewards, {sum(map(len, rows.values()))} questions, {len(trials)} "
        f"completions, {time.perf_counter() - started:.1f} s"
    )
    return not failures


def _examples(rewards: Rewards) -> list[tuple[dict, probes.Probe]]:
    """The file's own examples as rows and probes. Raises RewardError."""
    tried = []
    for number, example in enumerate(rewards.examples, 1):
        text = example.get("text") if isinstance(example, dict) else None
        if not isinstance(text, str) or example.get("label") not in ("right", "wrong"):
            raise RewardError(
                f"{rewards.path.name}: example {number} must be a dict with label: 'right' or 'wrong', text, and the columns "
                "of its row, such as prompt and answer"
            )
        row = {"id": f"example {number}", "task": "examples", "prompt": ""} | example
        label, text = row.pop("label"), row.pop("text")
        name = f"{number}. {shorten(' '.join(text.split()), 20)}"
        tried.append((row, probes.Probe(name, text, label == "right", row.pop("truncated", False))))
    return tried


def _notes_on_golds(source: str, trials: list[Trial]) -> list[str]:
    """Notes on rows that have no gold, or whose gold is ungraded."""
    if not any(t.probe.is_right for t in trials):
        return [f"{source}: no gold (answer, solution): probes that need one are left out; examples in the file help"]
    ungraded = [t for t in trials if t.probe.name == probes.RIGHT and t.score.verdict == "ungraded"]
    return [f"{t.row['id']}: the gold is ungraded ({'; '.join(t.score.reasons.values())})" for t in ungraded]


# --- printing


def _print_wrapped(text: str) -> None:
    print(textwrap.fill(text, WIDTH, subsequent_indent="    "))


def _print_block(rewards: Rewards, source: str, title: str, trials: list[Trial], best_example: float) -> list[str]:
    """Print a table with a line for each kind of completion; return what fails."""
    failures = _overpaid(source, trials, best_example)
    functions = [f for f in rewards.functions if any(_value(t, f) is not None for t in trials)]
    limit = max(6, NAMES_WIDTH // len(functions))  # of the columns of functions
    lines = [["  completion", "is", *(f.name[:limit] for f in functions), "total", "verdict", "ms", "reason"]]
    for name in dict.fromkeys(t.probe.name for t in trials):
        same = [t for t in trials if t.probe.name == name]
        reasons = dict.fromkeys(filter(None, same[0].score.reasons.values()))
        lines.append(
            [
                f"{'!' if name in failures else ' '} {name}",
                "right" if same[0].probe.is_right else "wrong",
                *(_range([_value(t, f) for t in same], limit) for f in functions),
                _range([t.score.total for t in same], 10),
                "/".join(dict.fromkeys(t.score.verdict for t in same))[:9],
                f"{max(t.score.seconds for t in same) * 1000:.0f}",
                " ".join("; ".join(reasons).split()),
            ]
        )
    widths = [max(map(len, cells)) for cells in zip(*lines)]
    print(f"\n{shorten(title, WIDTH)}")
    for cells in lines:
        texts = [f"{cell:<{width}}" for cell, width in zip(cells[:2], widths)]
        numbers = [f"{cell:>{width}}" for cell, width in zip(cells[2:-1], widths[2:])]
        print(shorten("  ".join([*texts, *numbers, cells[-1]]), WIDTH))
    return list(failures.values())


def _overpaid(source: str, trials: list[Trial], best_example: float) -> dict[str, str]:
    """By the probe's name: wrong completions that earn as much as the best right one to their prompt.

    Without a right one only an empty completion is judged: against `best_example`, else against the best of all.
    """
    prompts = {}
    for t in trials:
        prompts.setdefault(str(t.row["prompt"]), []).append(t)
    found = {}  # by name and prompt: the total, and the one that it should have stayed below
    for prompt, tried in prompts.items():
        wrong = [t for t in tried if not t.probe.is_right]
        totals = [t.score.total for t in tried if t.probe.is_right]
        best = max((total for total in totals if not math.isnan(total)), default=math.nan)
        if not totals:
            best, least = best_example, min(t.score.total for t in wrong)
            if math.isnan(best) and any(t.score.total > least for t in wrong):
                best = max(t.score.total for t in wrong)
            wrong = [t for t in wrong if t.probe.name == "empty"]
        for t in wrong:
            if t.score.total >= best - 1e-9:
                found.setdefault(t.probe.name, {}).setdefault(prompt, (t.score.total, best))
    other = "the right one" if any(t.probe.is_right for t in trials) else "the best there is"
    failures = {}
    for name, paid in found.items():
        total, best = next(iter(paid.values()))
        failures[name] = (
            f"{source}: {name!r} (wrong) gets {total:.3g}, {other} {best:.3g}, in {len(paid)} of {len(prompts)} questions"
        )
    return failures


def _value(trial: Trial, f: RewardFunction) -> float | None:
    return (trial.score.parts if f.weight else trial.score.metrics)[f.name]


def _range(values: list[float | None], width: int) -> str:
    """Values as "1", "0..1" (only the largest, "<=1", if that is too wide) or "-" if none applies."""
    known = [0.0 if v == 0 else v for v in values if v is not None]  # no minus zero
    if not known:
        return "-"
    if any(math.isnan(v) for v in known):
        return "ungraded"
    low, high = f"{min(known):.3g}", f"{max(known):.3g}"
    if low == high:
        return low
    return f"{low}..{high}" if len(low) + len(high) + 2 <= width else f"<={max(known):.2g}"
