"""Self-test of a reward file: score completions that are known to be right or wrong. Needs no model, starts instantly.

    python rewards.py                                       test on questions of sums, words and functions
    python rewards.py --data my.jsonl --columns prompt=question answer=gold
    python rewards.py --watch                               rerun whenever the file is saved
    python rewards.py --rescore runs/NAME                   rescore a run's completions with the file: old -> new
    python -m grading self-test my_rewards.py ...           test another file

The completions are the file's `examples` and, for each question, right completions made from its gold, and wrong ones
(grading/rewards/probes.py). The self-test fails if the weighted total of a wrong completion is as high as that of the
right one, or if a reward is the same for all completions.
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

WIDTH = 110  # characters per line of the table
NAMES_WIDTH = 48  # of these, for the columns of the reward functions
WATCH_SECONDS = 0.3  # polling interval of --watch


def self_test(file: str, arguments: list[str] | None = None) -> None:
    """Run the command line of the self-test. Exits with status 1 if the self-test fails."""
    parser = argparse.ArgumentParser(
        prog=f"python {Path(file).name}", description="Score completions that are known to be right or wrong."
    )
    add = parser.add_argument
    sources = ["sums", "words", "functions"]
    add(
        "--data",
        nargs="+",
        metavar="SOURCE",
        default=sources,
        help="sources of questions (default: sums words functions)",
    )
    add("--columns", nargs="*", default=[], metavar="OURS=THEIRS", help="column names, such as prompt=question")
    add("-n", type=int, default=3, help="questions per source (default 3)")
    add("--watch", action="store_true", help="rerun whenever the file is saved, until Ctrl-C")
    add("--rescore", metavar="RUN", help="a run folder, or a file in it such as rollouts/000012.jsonl or failed.jsonl")
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments)
    if options.n < 1:
        parser.error("-n must be at least 1")
    sys.stdout.reconfigure(errors="replace")  # the console's encoding may lack characters
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
    """Run the self-test in a new process whenever the file changes."""
    command = [sys.executable, "-m", "grading", "self-test", file, *arguments]
    root = str(Path(__file__).resolve().parent.parent)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    last_modified = None
    try:
        while True:
            modified = Path(file).stat().st_mtime_ns if Path(file).exists() else None
            if modified not in (last_modified, None):
                last_modified = modified
                print(f"--- {time.strftime('%H:%M:%S')} {file}", flush=True)
                subprocess.run(command, env=environment)
                print("--- waiting for changes; press Ctrl-C to stop", flush=True)
            time.sleep(WATCH_SECONDS)
    except KeyboardInterrupt:
        print()


def _test(file: str, sources: list[str], columns: dict[str, str], n: int) -> bool:
    """Print the tables, failures and verdict. Return True if nothing fails."""
    start = time.perf_counter()
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
            style, block_trials = try_rows(rewards, block)
            question = shorten(" ".join(probes.completion(block[0], "").prompt.split()), 50)
            title = f"{name}: answers written as {style}, first question {question!r}"
            failures += _print_block(rewards, name, title, block_trials, best_example)
            notes += _gold_notes(name, block_trials)
            trials += block_trials
    for name in rewards.names:
        values = [t.score.parts[name] for t in trials if t.score.parts[name] is not None]
        if not values:
            notes.append(f"{name} does not apply to these questions: test others with --data SOURCE")
        elif len(values) > 1 and len(set(values)) == 1:
            failures.append(f"{name} gives {values[0]:g} to all {len(values)} completions: it gives no learning signal")
    print()
    for text in [*notes, *(f"FAIL: {failure}" for failure in failures)]:
        _print_wrapped(text)
    verdict = f"FAILED: {len(failures)} problem{'s' if len(failures) > 1 else ''}" if failures else "passed"
    print(
        f"self-test {verdict}; {len(rewards.names)} rewards, {sum(map(len, rows.values()))} questions, {len(trials)} "
        f"completions, {time.perf_counter() - start:.1f} s"
    )
    return not failures


def _examples(rewards: Rewards) -> list[tuple[dict, probes.Probe]]:
    """Return the examples of a reward file as rows and probes. Raise RewardError for an invalid example."""
    row_probes = []
    for number, example in enumerate(rewards.examples, 1):
        text = example.get("text") if isinstance(example, dict) else None
        if not isinstance(text, str) or example.get("label") not in ("right", "wrong"):
            raise RewardError(
                f"{rewards.path.name}: example {number} must be a dict with label ('right' or 'wrong'), text, and the "
                "columns of its row, such as prompt and answer"
            )
        row = {"id": f"example {number}", "task": "examples", "prompt": ""} | example
        label, text = row.pop("label"), row.pop("text")
        name = f"{number}. {shorten(' '.join(text.split()), 20)}"
        row_probes.append((row, probes.Probe(name, text, label == "right", row.pop("truncated", False))))
    return row_probes


def _gold_notes(source: str, trials: list[Trial]) -> list[str]:
    """Return notes on rows without a gold, or with an ungraded gold."""
    if not any(t.probe.is_right for t in trials):
        return [f"{source}: no gold answers (answer, solution), so few checks are possible: add examples to the file"]
    ungraded = [t for t in trials if t.probe.name == probes.RIGHT and t.score.verdict == "ungraded"]
    return [f"{t.row['id']}: the gold is ungraded ({'; '.join(t.score.reasons.values())})" for t in ungraded]


# --- printing


def _print_wrapped(text: str) -> None:
    print(textwrap.fill(text, WIDTH, subsequent_indent="    "))


def _print_block(rewards: Rewards, source: str, title: str, trials: list[Trial], best_example: float) -> list[str]:
    """Print a table with a line for each kind of completion. Return the failures."""
    failures = _overpaid(source, trials, best_example)
    functions = [f for f in rewards.functions if any(_value(t, f) is not None for t in trials)]
    limit = max(6, NAMES_WIDTH // len(functions))  # width of the column of a function
    lines = [["  completion", "label", *(f.name[:limit] for f in functions), "total", "verdict", "ms", "reason"]]
    for name in dict.fromkeys(t.probe.name for t in trials):
        group = [t for t in trials if t.probe.name == name]
        reasons = dict.fromkeys(filter(None, group[0].score.reasons.values()))
        lines.append(
            [
                f"{'!' if name in failures else ' '} {name}",
                "right" if group[0].probe.is_right else "wrong",
                *(_range([_value(t, f) for t in group], limit) for f in functions),
                _range([t.score.total for t in group], 10),
                "/".join(dict.fromkeys(t.score.verdict for t in group))[:9],
                f"{max(t.score.seconds for t in group) * 1000:.0f}",
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
    """Return the wrong completions that earn as much as the best right one for their prompt, by name of the probe.

    For prompts without a right completion, only the empty completion is checked, against `best_example` or, if that is
    nan, the best wrong completion.
    """
    by_prompt = {}
    for t in trials:
        by_prompt.setdefault(str(t.row["prompt"]), []).append(t)
    overpaid = {}  # by name and prompt: the total, and the total that it must be below
    for prompt, prompt_trials in by_prompt.items():
        wrong = [t for t in prompt_trials if not t.probe.is_right]
        right_totals = [t.score.total for t in prompt_trials if t.probe.is_right]
        best = max((total for total in right_totals if not math.isnan(total)), default=math.nan)
        if not right_totals:
            best = best_example
            lowest = min(t.score.total for t in wrong)
            if math.isnan(best) and any(t.score.total > lowest for t in wrong):
                best = max(t.score.total for t in wrong)
            wrong = [t for t in wrong if t.probe.name == "empty"]
        for t in wrong:
            if t.score.total >= best - 1e-9:
                overpaid.setdefault(t.probe.name, {}).setdefault(prompt, (t.score.total, best))
    other = "the right one" if any(t.probe.is_right for t in trials) else "the best completion"
    failures = {}
    for name, totals in overpaid.items():
        total, best = next(iter(totals.values()))
        failures[name] = (
            f"{source}: {name!r} (wrong) gets {total:.3g}, {other} {best:.3g}, in {len(totals)} of {len(by_prompt)} "
            "questions"
        )
    return failures


def _value(trial: Trial, f: RewardFunction) -> float | None:
    return (trial.score.parts if f.weight else trial.score.metrics)[f.name]


def _range(values: list[float | None], width: int) -> str:
    """Format values as "1", as "0..1" (or "<=1" if that is too wide), or as "-" if no function applies."""
    known = [0.0 if v == 0 else v for v in values if v is not None]  # turns -0.0 into 0.0
    if not known:
        return "-"
    if any(math.isnan(v) for v in known):
        return "ungraded"
    low, high = f"{min(known):.3g}", f"{max(known):.3g}"
    if low == high:
        return low
    return f"{low}..{high}" if len(low) + len(high) + 2 <= width else f"<={max(known):.2g}"
