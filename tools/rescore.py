"""Rescore the saved completions of a run with a reward file: `python rewards.py --rescore runs/NAME`."""

import contextlib
import itertools
import json
import math
import time
from collections import Counter
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace

import yaml

from data import load_questions
from grading import Completion, RewardError, Rewards, Score, load_rewards, score_all
from grading.base import did_you_mean, shorten
from grading.rewards.reward_file import modules_beside
from grading.rewards.trials import try_to_learn_payments
from grading.rewards.verdicts import find_payment, payments_from_lists

MAX_CHANGES = 8  # number of completions to print, those whose reward changes most


def rescore(rewards_file: str, target: str) -> None:
    """Print old and new means of each reward, changed verdicts, and the completions whose reward changes most.

    Args:
        rewards_file: Path of the reward file.
        target: A run folder, or a .jsonl file in it. If a line has no `row`, its row is looked up by `prompt_id` in the
            data named in the run's config.yaml.

    Raises:
        RewardError: There are no completions or no config.yaml, or a function fails on a completion.
    """
    start = time.perf_counter()
    lines, folder = _read(Path(target))
    settings = read_settings(folder)
    rewards = load_run_rewards(rewards_file, settings)
    by_id = {} if all("row" in line for line in lines) else questions(settings, folder)
    known = [line for line in lines if "row" in line or line["prompt_id"] in by_id]
    if len(known) < len(lines):
        print(f"note  {len(lines) - len(known)} completions skipped: their questions are no longer in the run's data")
    if any("completion_ids" in f.parameters for f in rewards.functions):
        print("note  completion_ids are empty: runs do not save them")
    learn_run_payments(rewards, folder, list(by_id.values()) or [line["row"] for line in lines])
    scores = []
    for _, group in itertools.groupby(known, key=itemgetter("step")):  # batch functions get whole steps, as in the run
        completions = [saved_completion(line, line.get("row") or by_id[line["prompt_id"]]) for line in group]
        scores += score_all(rewards, completions)
    report(rewards, known, scores)
    print(f"rescored {len(known):,} completions of {target} in {time.perf_counter() - start:.1f} s")


def load_run_rewards(rewards_file: str, settings: dict, source: str | None = None) -> Rewards:
    """Load a reward file with the run's reward_funcs and reward_weights. Names that the file does not have are ignored.

    Args:
        source: Content of the file, if it is not saved yet.
    """
    rewards = load_rewards(rewards_file, source=source)
    present = {f.name for f in rewards.functions}
    chosen = [name for name in settings.get("reward_funcs") or [] if name in present]
    weights = {name: w for name, w in (settings.get("reward_weights") or {}).items() if name in present}
    return load_rewards(rewards_file, chosen, weights, source=source) if chosen or weights else rewards


def learn_run_payments(rewards: Rewards, folder: Path | None, rows: list[dict]) -> None:
    """Set `rewards.payments`, which verdicts follow from: those of the run if its reward files have not changed.

    Args:
        folder: The run folder, if any.
        rows: The rows whose golds are tried otherwise.
    """
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        path = rewards.path
        files = {m.relative_to(path.parent): m.read_text(encoding="utf-8") for m in modules_beside(path)}
        files[Path("rewards.py")] = rewards.source
        if folder and all(
            (folder / name).read_text(encoding="utf-8").splitlines() == text.splitlines()
            for name, text in files.items()
        ):
            summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
            rewards.payments.update(payments_from_lists(summary["payments"]))
    if not any(find_payment(rewards, f, row) for f in rewards.functions for row in rows[:1]):
        try_to_learn_payments(rewards, rows)


def saved_completion(line: dict, row: dict) -> Completion:
    """Convert a saved line and the row of its question to a completion."""
    is_truncated = line.get("finish_reason") == "length"
    return Completion(line["prompt"], line["completion"], row, line.get("tokens", 0), is_truncated, line["step"])


def _read(target: Path) -> tuple[list[dict], Path]:
    """Read the saved completions of a run folder, or of a file in it. Return them and the folder."""
    if target.is_dir():
        files = sorted(target.glob("rollouts/*.jsonl"))
        folder = target
    else:
        files = [target]
        folder = target.parent.parent if target.parent.name == "rollouts" else target.parent
    if not files or not files[0].is_file():
        runs = [path.parent for path in target.parent.glob("*/rollouts")]
        raise RewardError(f"--rescore: there are no completions in {target}.{did_you_mean(str(target), runs)}")
    lines = []
    for file in files:
        for line_number, text in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
            if not text.strip():
                continue
            try:
                line = json.loads(text)
                line["step"], line["prompt_id"], line["prompt"], line["completion"]
            except (ValueError, TypeError, KeyError) as error:
                raise RewardError(
                    f"--rescore: {file}:{line_number} is not a saved completion of a run: {error}"
                ) from None
            lines.append(line)
    return lines, folder


def read_settings(folder: Path) -> dict:
    """Read the settings of a run. The dict is empty if there is no config.yaml."""
    config = folder / "config.yaml"
    return yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else {}


def questions(settings: dict, folder: Path) -> dict[str, dict]:
    """Load the rows of a run's data, by id."""
    if not settings:
        raise RewardError(f"--rescore: there is no config.yaml in {folder}, and without it the questions are unknown")
    train_rows, eval_rows, _ = load_questions(SimpleNamespace(**settings))
    return {row["id"]: row for row in train_rows + eval_rows}


def report(rewards: Rewards, lines: list[dict], scores: list[Score], shown: int = MAX_CHANGES) -> None:
    """Print old and new means, changed verdicts, and the completions whose reward changes most, at most `shown`."""
    print(f"{'':<24}{'old mean':>12}{'new mean':>12}{'changed':>10}")
    old_names = {name for line in lines for name in line.get("rewards", {})}
    for name in [*rewards.names, *sorted(old_names - set(rewards.names))]:
        _print_means(name, [line.get("rewards", {}).get(name) for line in lines], [s.parts.get(name) for s in scores])
    old = [line.get("reward") for line in lines]
    new = [None if math.isnan(score.total) else score.total for score in scores]
    _print_means("total", old, new)
    changed_verdicts = Counter()
    for line, score in zip(lines, scores):
        if line.get("verdict") not in (None, score.verdict):
            changed_verdicts[f"{line['verdict']} -> {score.verdict}"] += 1
    print(f"  verdicts: {', '.join(f'{n:,} {change}' for change, n in changed_verdicts.items()) or 'unchanged'}")
    changed = [i for i in range(len(lines)) if differ(old[i], new[i])]
    changed.sort(key=lambda i: -abs((new[i] or 0) - (old[i] or 0)))
    if changed[:shown]:
        print("largest changes:")
    for i in changed[:shown]:
        reason = shorten("; ".join(scores[i].reasons.values()), 30)
        summary = f"  {shorten(str(lines[i]['prompt_id']), 24):<24} {_format(old[i])} -> {_format(new[i])}  {reason}"
        tail = repr(lines[i]["completion"][-80:])
        print(f"{summary:<74} {'...' + tail[-31:] if len(tail) > 34 else tail}")


def _print_means(name: str, old: list[float | None], new: list[float | None]) -> None:
    means = []
    for values in (old, new):
        known = [value for value in values if value is not None]
        means.append(f"{sum(known) / len(known):.4f}" if known else "-")
    print(f"  {shorten(name, 22):<22}{means[0]:>12}{means[1]:>12}{sum(map(differ, old, new)):>10,}")


def differ(old: float | None, new: float | None) -> bool:
    """Return True if two values differ by more than the rounding of saved values, or only one is None."""
    return (old is None) != (new is None) or (old is not None and abs(old - new) > 1e-5)


def _format(value: float | None) -> str:
    return "ungraded" if value is None else f"{value:.3g}"
