"""Completions that a run has saved, scored again by a reward file: `python rewards.py --rescore runs/NAME`."""

import json
import math
import time
from pathlib import Path

from grading.base import Completion, RewardError, Score, did_you_mean, shorten
from grading.rewards.reward_file import Rewards, load_rewards

SHOWN = 8  # of the completions whose reward changes most


def rescore(rewards_file: str, target: str) -> None:
    """Print old -> new for each reward, the verdicts that turn, and the completions that change most.

    target: a run folder, or a .jsonl file of it. A line's question is its `row`, else is found by its id in the data that
    the run's config.yaml names. Raises RewardError, also where a function fails on one of the completions.
    """
    started = time.perf_counter()
    file = Path(target) / "rollouts.jsonl" if Path(target).is_dir() else Path(target)
    lines = _read_lines(file, target)
    settings = read_settings(file.parent)
    rewards = as_in_run(rewards_file, settings)
    by_id = {} if all("row" in line for line in lines) else questions(settings, file)
    known = [line for line in lines if "row" in line or line["prompt_id"] in by_id]
    known.sort(key=lambda line: line.get("step", 0))
    if len(known) < len(lines):
        print(
            f"note  {len(lines) - len(known)} completions are left out: their questions are not in the run's data any more"
        )
    if any("completion_ids" in f.parameters for f in rewards.functions):
        print("note  completion_ids are not saved: they are empty here")
    scores = []
    for step in dict.fromkeys(line.get("step", 0) for line in known):  # batch functions see a step, as in the run
        completions = [
            saved_completion(line, line.get("row") or by_id[line["prompt_id"]])
            for line in known
            if line.get("step", 0) == step
        ]
        scores += rewards.score_all(completions)
    report(rewards, known, scores)
    print(f"rescored {len(known):,} completions of {file} in {time.perf_counter() - started:.1f} s")


def as_in_run(rewards_file: str, settings: dict, source: str | None = None) -> Rewards:
    """The rewards of a file as they would count in the run: its reward_funcs and reward_weights, as far as the file has them.
    source: as for `load_rewards`."""
    rewards = load_rewards(rewards_file, source=source)
    present = {f.name for f in rewards.functions}
    chosen = [name for name in settings.get("reward_funcs") or [] if name in present]
    weights = {name: w for name, w in (settings.get("reward_weights") or {}).items() if name in present}
    return load_rewards(rewards_file, chosen, weights, source=source) if chosen or weights else rewards


def saved_completion(line: dict, row: dict) -> Completion:
    """The completion of a line of rollouts.jsonl; row: its question."""
    return Completion(
        prompt=line["prompt"], text=line["completion"], row=row, tokens=line.get("tokens", 0),
        truncated=line.get("finish_reason") == "length", step=line.get("step", 0),
    )  # fmt: skip


def _read_lines(file: Path, target: str) -> list[dict]:
    if not file.is_file():
        there = [str(path.parent) for path in Path(target).parent.glob("*/rollouts.jsonl")]
        raise RewardError(f"--rescore: there is no file {file}.{did_you_mean(target.rstrip('/'), there)}")
    lines = []
    for number, text in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            line["prompt"], line["completion"], line["prompt_id"]
        except (ValueError, TypeError, KeyError) as error:
            raise RewardError(f"--rescore: {file}:{number} is not a completion as runs save them: {error}") from None
        lines.append(line)
    if not lines:
        raise RewardError(f"--rescore: {file} holds no completions")
    return lines


def read_settings(folder: Path) -> dict:
    import yaml

    config = folder / "config.yaml"
    return yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else {}


def questions(settings: dict, file: Path) -> dict[str, dict]:
    """The rows of a run's data, by id."""
    from data import load_questions

    if not settings:
        raise RewardError(
            f"--rescore: there is no config.yaml beside {file}, which tells where its questions come from"
        )
    names = ("train_data", "eval_data", "train_questions", "eval_questions", "columns", "seed")
    train_rows, eval_rows, _ = load_questions(*(settings[name] for name in names))
    return {row["id"]: row for row in train_rows + eval_rows}


def report(rewards: Rewards, lines: list[dict], scores: list[Score], shown: int = SHOWN) -> None:
    """Print the means old and new, the verdicts that turn, and so many of the completions that change most."""
    print(f"{'':<24}{'old mean':>12}{'new mean':>12}{'changed':>10}")
    old_names = {name for line in lines for name in line.get("rewards", {})}
    for name in [*rewards.names, *sorted(old_names - set(rewards.names))]:
        old = [line.get("rewards", {}).get(name) for line in lines]
        new = [score.parts.get(name) for score in scores]
        print(f"  {shorten(name, 22):<22}{_mean(old):>12}{_mean(new):>12}{_changed(old, new):>10,}")
    old = [line.get("reward") for line in lines]
    new = [None if math.isnan(score.total) else score.total for score in scores]
    print(f"  {'total':<22}{_mean(old):>12}{_mean(new):>12}{_changed(old, new):>10,}")
    turned = {}
    for line, score in zip(lines, scores):
        if line.get("verdict") not in (None, score.verdict):
            turn = f"{line['verdict']} -> {score.verdict}"
            turned[turn] = turned.get(turn, 0) + 1
    print(f"  verdicts: {', '.join(f'{n:,} {turn}' for turn, n in turned.items()) or 'as they were'}")
    by_change = sorted(range(len(lines)), key=lambda i: -abs((new[i] or 0) - (old[i] or 0)))
    by_change = [i for i in by_change[:shown] if differ(old[i], new[i])]
    if by_change:
        print("the largest changes:")
    for i in by_change:
        line, score = lines[i], scores[i]
        reason = "; ".join(score.reasons.values())
        start = (
            f"  {shorten(str(line['prompt_id']), 24):<24} {number(old[i])} -> {number(new[i])}  {shorten(reason, 30)}"
        )
        tail = repr(line["completion"][-80:])
        print(f"{start:<74} {'...' + tail[-31:] if len(tail) > 34 else tail}")


def differ(old: float | None, new: float | None) -> bool:
    return (old is None) != (new is None) or (old is not None and abs(old - new) > 1e-5)  # saved with some digits


def _changed(old: list, new: list) -> int:
    return sum(map(differ, old, new))


def _mean(values: list[float | None]) -> str:
    values = [value for value in values if value is not None]
    return f"{sum(values) / len(values):.4f}" if values else "-"


def number(value: float | None) -> str:
    return "ungraded" if value is None else f"{value:.3g}"
