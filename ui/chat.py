"""A chat with two models: the questions, what the reward functions say of the answers, and the downloads.

Raw texts stay on the server, in a `Session`. Both sides are scored by one reward file: that of the run on the right, else
on the left, else of the newest run, else the project's own. Imports neither gradio nor torch.
"""

import contextlib
import json
import math
import random
import re
import tempfile
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from grading import Score, outcome_of, prompt_text
from rl.config import Config
from ui.reward_process import reward_rows, score_completions
from ui.runs import Page, Run, UiError, config_of, import_models, questions_of
from ui.turns import Answer, Ask, Sample

BASE = "the base model"
SIDES = "left", "right"
SHOWN = 20_000  # characters of a text; the download has all of it
SECONDS = 30.0  # the time limit of the reward functions
TINY = Path("configs/tiny.yaml")  # the settings if there is no run


@dataclass(eq=False)
class Round:
    """A question and the answers of both sides."""

    question: str
    names: list[str]  # of the sides
    hidden: bool  # blind: the names and verdicts are shown after the vote
    ask: Ask
    row: dict | None = None  # None: no expected answer
    answers: tuple[Answer, ...] = ()
    done: bool = False  # answered and judged
    weights: dict[str, float] = field(default_factory=dict)
    unjudged: str = ""  # why there is no verdict


@dataclass
class Session:
    """The chat of one visitor."""

    rounds: list[Round] = field(default_factory=list)
    held_out: dict | None = None  # the row that was put into the question field last
    swapped: bool | None = None  # of a blind chat: whether the sides are swapped; None: it is not blind
    votes: Counter = field(default_factory=Counter)
    unanswered: str = ""  # the last question if nothing was written
    folder: tempfile.TemporaryDirectory | None = None  # of the downloads; removed with the session


# --- the questions


def choices(page: Page) -> list[tuple[str, str]]:
    """What a side can be, as (label, value): the base, then the checkpoints of each run, the newest first."""
    found = [(BASE, BASE)]
    for name in page.runs.names():
        with contextlib.suppress(UiError):  # it is shown when the run is chosen
            for checkpoint in reversed(page.runs.get(name).checkpoints()):
                found.append((f"{name}, step {int(checkpoint[5:])}", f"{name}/{checkpoint}"))
    return found


def side_of(chosen: str | None) -> tuple[str, str] | None:
    """The worker's side for a value of `choices`."""
    if chosen in (None, "", BASE):
        return None
    run, _, checkpoint = str(chosen).partition("/")
    return run, checkpoint


def home_of(page: Page, left: str | None, right: str | None) -> Run | None:
    """The run whose base, questions and rewards are used; None if there is no run."""
    names = [side[0] for side in (side_of(right), side_of(left)) if side] + page.runs.names()[:1]
    return page.runs.get(names[0]) if names else None


def held_out_rows(page: Page, left: str | None, right: str | None) -> list[dict]:
    home = home_of(page, left, right)
    return (home.questions() if home else questions_of(TINY, 0))[1]


def take_held_out(page: Page, session: Session, left, right, number: float | None) -> tuple[str, int]:
    """A held-out question for the question field, and its number."""
    rows = held_out_rows(page, left, right)
    if not number or not 1 <= number <= len(rows):
        raise UiError(f"There is no held-out question {number or 0:g}: they are numbered from 1 to {len(rows)}.")
    session.held_out = rows[int(number) - 1]
    return prompt_text(session.held_out["prompt"]), int(number)


def draw_held_out(page: Page, session: Session, left, right) -> tuple[str, int]:
    """A random one."""
    return take_held_out(page, session, left, right, random.randint(1, len(held_out_rows(page, left, right))))


def conversation(rounds: list[Round], side: int, question: str | list[dict]) -> list[dict]:
    """The chat of a side so far and the question. Of several samples it continues from the first."""
    messages = []
    for done in rounds:
        samples = done.answers[side].samples if done.answers else ()
        messages.append({"role": "user", "content": done.question})
        messages.append({"role": "assistant", "content": samples[0].text if samples else ""})
    return messages + ([{"role": "user", "content": question}] if isinstance(question, str) else list(question))


def stop(session: Session) -> None:
    for round_ in session.rounds:
        round_.ask.stop.set()


def begin(page: Page, session: Session, left, right, blind, question, expected, greedy, *sampling) -> Round:
    """Add the next round to a chat, to be answered by the worker; a held-out question starts a new chat."""
    temperature, top_p, seed, longest, samples = sampling
    if not (question or "").strip():
        raise UiError("There is no question. Write one, or take a held-out one.")
    if (longest or 0) < 0:
        raise UiError("Longest answer: give a number of tokens, or 0 for as many as in training.")
    stop(session)
    home = home_of(page, left, right)
    config = settings_of(home)
    row, prompt = None, question
    if session.held_out and question.strip() == prompt_text(session.held_out["prompt"]).strip():
        row, prompt = session.held_out, session.held_out["prompt"]
        session.rounds = []
    elif (expected or "").strip():
        answer = expected.strip()
        row = {config.columns.get("answer", "answer"): answer}
        row |= {"id": "own", "task": "own", "prompt": question, "answer": answer}
    was_blind = session.rounds and session.rounds[-1].hidden
    is_new = not was_blind if blind else session.swapped is not None
    if is_new:  # the sides of a chat stay what they are
        session.rounds = []
        session.swapped = random.random() < 0.5 if blind else None
    chosen = [left or BASE, right or BASE]
    if session.swapped:
        chosen.reverse()
    session.rounds = [done for done in session.rounds if any(answer.samples for answer in done.answers)]
    ask = Ask(
        sides=tuple(map(side_of, chosen)),
        messages=tuple(conversation(session.rounds, side, prompt) for side in (0, 1)),
        run=home.name if home else None,
        temperature=0.0 if greedy else float(temperature),
        top_p=float(top_p),
        seed=int(seed or 0) % 2**31,
        max_tokens=int(longest or 0) or config.max_completion_length,
        samples=1 if greedy else min(16, max(1, int(samples or 1))),
    )
    session.rounds.append(Round(question, chosen, bool(blind), ask, row))
    return session.rounds[-1]


def settings_of(home: Run | None) -> Config:
    return home.config if home else config_of(TINY, 0)


# --- the verdicts


def judge(page: Page, round_: Round) -> None:
    """Score the samples of both sides that have ended. Raises RewardError, also if a function does not end."""
    home = page.runs.get(round_.ask.run) if round_.ask.run else None
    file = home.file("rewards.py") if home else page.rewards_file
    ended = [sample for answer in round_.answers for sample in answer.samples if sample.ended]
    completions = [
        {"text": s.text, "truncated": s.truncated, "tokens": len(s.token_ids), "token_ids": s.token_ids} for s in ended
    ]
    process = home and home.path, file, file.read_text(encoding="utf-8"), SECONDS
    round_.weights, scores, _ = score_completions(*process, round_.row, completions, round_.ask.stop)
    scores = iter(scores)
    round_.answers = tuple(
        replace(answer, samples=tuple(replace(s, score=next(scores)) if s.ended else s for s in answer.samples))
        for answer in round_.answers
    )


def verdict(sample: Sample, max_tokens: int) -> str:
    """correct, wrong, cut off, no answer, or why there is no verdict."""
    if not sample.ended:
        return "stopped: no verdict"
    score = sample.score
    cut_off = f"cut off after {max_tokens} tokens" if sample.truncated else ""
    if score is None:
        return cut_off or "no verdict"
    if score.verdict == "ungraded":
        return f"ungraded: {next(iter(score.reasons.values()), '')}"
    if not score.judge:
        return "no verdict: none of the rewards that apply here can judge"
    if score.is_right:
        return "correct"
    return cut_off or ("no answer" if outcome_of(score.reasons.get(score.judge, "")) == "no_answer" else "wrong")


def scores_of(answer: Answer) -> list[Score]:
    return [sample.score for sample in answer.samples if sample.score]


def rate(answer: Answer) -> tuple[int, int]:
    """How many samples of a side are right, and how many were graded."""
    graded = [score for score in scores_of(answer) if score.judge and score.verdict != "ungraded"]
    return sum(score.is_right for score in graded), len(graded)


def in_percent(right: int, n: int) -> str:
    import_models()
    from rl.evaluate import wilson_interval

    low, high = wilson_interval(right, n)
    return f"{right}/{n} correct ({right / n:.0%}, 95 %: {low:.0%} to {high:.0%})"


def verdict_text(round_: Round, answer: Answer) -> str:
    """The line below a side."""
    if answer.state == "failed":
        return answer.note
    right, graded = rate(answer)
    if len(answer.samples) > 1 and graded:
        text = in_percent(right, graded)
    else:
        text = "; ".join(dict.fromkeys(verdict(sample, round_.ask.max_tokens) for sample in answer.samples))
    totals = [score.total for score in scores_of(answer) if not math.isnan(score.total)]
    if totals:
        text += f". Reward {sum(totals) / len(totals):.3g}" + (" on average" if len(totals) > 1 else "")
    if round_.row:
        text += f". Expected: {expected_of(round_.row)}"
    return cut(f"{text}. {round_.unjudged}" if round_.unjudged else text, 2000)


def expected_of(row: dict) -> str:
    expected = row.get("tests") if row.get("answer") is None else row["answer"]
    if expected is None:
        expected = row.get("target", "what its grader says")
    return "; ".join(map(str, expected)) if isinstance(expected, list) else str(expected)


def reward_table(round_: Round, answer: Answer) -> list[list]:
    rows = []
    for number, sample in enumerate(answer.samples, 1):
        known = reward_rows(sample.score, round_.weights) if sample.score else []
        rows += [[number, *row[:3], cut(row[-1], 500)] for row in known if row[1] != "-" or row[-1]]
    return rows


def summary(round_: Round, seconds: float) -> str:
    """The status line of a round that is over."""
    rates = [rate(answer) for answer in round_.answers]
    is_known = not round_.hidden and all(n for _, n in rates)
    correct = f"{' against '.join(f'{right}/{n}' for right, n in rates)} correct. " if is_known else ""
    how = f"temperature {round_.ask.temperature:g}, seed {round_.ask.seed}" if round_.ask.temperature else "greedy"
    states = {answer.state for answer in round_.answers}
    ended = "Stopped" if "stopped" in states else "Failed" if states == {"failed"} else "Answered"
    vote = " Vote to see which is which, and the verdicts." if round_.hidden else ""
    return f"{correct}{ended} after {seconds:.1f} s ({how}).{vote}"


# --- the downloads


def as_records(session: Session) -> list[dict]:
    """One record a question, with its settings, answers and scores."""
    records = []
    for done in session.rounds:
        if not done.answers:
            continue
        record = {"question": done.question, "id": done.row and done.row["id"]}
        record |= {"expected": done.row and expected_of(done.row), "run": done.ask.run, "seed": done.ask.seed}
        record["settings"] = {
            name: getattr(done.ask, name) for name in ("temperature", "top_p", "max_tokens", "samples")
        }
        record["note"] = done.unjudged
        for side, (name, answer) in enumerate(zip(SIDES, done.answers)):
            model = "hidden until the vote" if done.hidden else done.names[side]
            samples = [sample_record(done, sample) for sample in answer.samples]
            record[name] = {"model": model, "state": answer.state, "note": answer.note, "samples": samples}
        records.append(record)
    return records


def sample_record(round_: Round, sample: Sample) -> dict:
    record = {"text": sample.text, "tokens": len(sample.token_ids)}
    if not round_.hidden:
        record["verdict"] = verdict(sample, round_.ask.max_tokens)
        if score := sample.score:
            record["reward"] = None if math.isnan(score.total) else score.total
            record |= {"rewards": score.parts, "metrics": score.metrics, "reasons": score.reasons}
    return record


def as_markdown(records: list[dict]) -> str:
    parts = ["# A comparison"]
    for record in records:
        how = ", ".join(f"{name} {value:g}" for name, value in (record["settings"] | {"seed": record["seed"]}).items())
        parts += ["## Question", fenced(record["question"]), f"Expected: {record['expected']}. Settings: {how}."]
        for name in SIDES:
            side = record[name]
            parts.append(f"### {name.title()}: {side['model']} {side['note']}".strip())
            for sample in side["samples"]:
                rewards = ", ".join(f"{k} {v:g}" for k, v in sample.get("rewards", {}).items() if v is not None)
                outcome = sample.get("verdict", "no vote yet")
                parts.append(fenced(sample["text"]))
                parts.append(f"{outcome}; {sample['tokens']} tokens; rewards: {rewards or 'none'}")
    return "\n\n".join(parts) + "\n"


def fenced(text: str) -> str:
    fence = "`" * max(3, *(len(ticks) + 1 for ticks in re.findall("`+", text)), 0)
    return f"{fence}text\n{text}\n{fence}"


def files(session: Session) -> tuple[str | None, str | None]:
    """Write the chat as Markdown and as JSONL."""
    if not (records := as_records(session)):
        return None, None
    session.folder = session.folder or tempfile.TemporaryDirectory(prefix="ponder-")
    markdown, jsonl = (Path(session.folder.name) / f"comparison.{kind}" for kind in ("md", "jsonl"))
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    markdown.write_text(as_markdown(records), encoding="utf-8", errors="replace")
    jsonl.write_text(lines, encoding="utf-8", errors="replace")
    return str(markdown), str(jsonl)


def cut(text: str, limit: int = SHOWN) -> str:
    return text if len(text) <= limit else f"{text[:limit]} … ({len(text) - limit:,} more characters are not shown)"
