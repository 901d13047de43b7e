"""A chat with two models: what is asked of them, what the reward functions say of their answers, and what is taken away.

Raw texts stay here, on the server, in a `Session`. Both sides are judged by one reward file: that of the run on the right,
else on the left, else of the newest run, else the project's own. Imports neither gradio nor torch.
"""

import contextlib
import functools
import itertools
import json
import math
import random
import re
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from data import load_questions
from grading import Score, outcome_of, prompt_text
from rl.config import Config
from rl.run.read_config import read_yaml
from ui.reward_process import parts_of, score_apart
from ui.runs import Page, Run, UiError, import_models
from ui.worker import Answer, Ask, Sample

BASE = "the base model"
SIDES = "left", "right"
ROUNDS = 20  # of a chat: what was before is neither shown nor put to the models
SHOWN = 20_000  # characters of a text; the download has all of it
JUDGING = 30.0  # seconds that the reward functions have
TINY = "configs/tiny.yaml"  # the settings where there is no run


@dataclass(eq=False)
class Round:
    """A question, what both sides answered, and what the reward functions say of it."""

    question: str
    names: list[str]  # of the sides
    hidden: bool  # the vote is to come
    ask: Ask
    row: dict | None = None  # None: nothing to judge by
    answers: tuple[Answer, ...] = ()
    scores: tuple[list[Score | None], ...] = [], []  # of each side's samples; None: it had not ended
    weights: dict[str, float] = field(default_factory=dict)
    unjudged: str = ""  # why there is no verdict


@dataclass
class Session:
    """One visitor's chat."""

    rounds: list[Round] = field(default_factory=list)
    held_out: dict | None = None  # the row that was put into the question's field last
    swapped: bool | None = None  # the sides of this chat, which is a blind one; None: it is not
    votes: Counter = field(default_factory=Counter)
    unanswered: str = ""  # the last question, where nothing was written
    folder: tempfile.TemporaryDirectory | None = None  # of what is taken away; it goes with the session


# --- what is asked


def choices(page: Page) -> list[tuple[str, str]]:
    """(shown, value) of what a side can be: the base, then the checkpoints, the newest first."""
    found = [(BASE, BASE)]
    for name in page.runs.names():
        with contextlib.suppress(UiError):  # it says so where it is chosen
            for checkpoint in reversed(page.runs.get(name).checkpoints()):
                found.append((f"{name}, step {int(checkpoint[5:])}", f"{name}/{checkpoint}"))
    return found


def side_of(chosen: str | None) -> tuple[str, str] | None:
    """The worker's side for a value of `choices`. Raises UiError."""
    if chosen in (None, "", BASE):
        return None
    run, _, checkpoint = str(chosen).partition("/")
    return run, checkpoint


def home_of(page: Page, left: str | None, right: str | None) -> Run | None:
    """The run whose base, questions and rewards are meant; None where there is none."""
    names = [side[0] for side in (side_of(right), side_of(left)) if side] + page.runs.names()[:1]
    return page.runs.get(names[0]) if names else None


def settings_of(home: Run | None) -> Config:
    return home.config if home else read_yaml(TINY)


def questions(config: Config) -> tuple[list[dict], list[dict]]:
    """The training rows and the held-out rows of a run's data."""
    c = config
    return _questions(json.dumps([c.train_data, c.eval_data, c.train_questions, c.eval_questions, c.columns, c.seed]))


@functools.lru_cache(2)
def _questions(data: str) -> tuple[list[dict], list[dict]]:
    return load_questions(*json.loads(data))[:2]


def put(page: Page, session: Session, left, right, number: float | None) -> tuple[str, int]:
    """A held-out question for the question's field, and its number."""
    rows = questions(settings_of(home_of(page, left, right)))[1]
    if not number or not 1 <= number <= len(rows):
        raise UiError(f"There is no held-out question {number or 0:g}: they are numbered from 1 to {len(rows)}.")
    session.held_out = rows[int(number) - 1]
    return prompt_text(session.held_out["prompt"]), int(number)


def draw(page: Page, session: Session, left, right) -> tuple[str, int]:
    """As `put`, any of them."""
    rows = questions(settings_of(home_of(page, left, right)))[1]
    return put(page, session, left, right, random.randint(1, len(rows)))


def conversation(rounds: list[Round], side: int, question: str | list[dict]) -> list[dict]:
    """A side's chat so far with the question behind it; of several samples it goes on from the first."""
    messages = []
    for done in rounds:
        samples = done.answers[side].samples if done.answers else ()
        messages.append({"role": "user", "content": done.question})
        messages.append({"role": "assistant", "content": samples[0].text if samples else ""})
    return messages + ([{"role": "user", "content": question}] if isinstance(question, str) else list(question))


def stop(session: Session) -> None:
    for round_ in session.rounds:
        round_.ask.stop.set()


def begin(page: Page, session: Session, left, right, blind, question, expected, greedy, *how) -> Round:
    """The next round of a chat, to be put to the worker; a held-out question begins a new chat."""
    temperature, top_p, seed, longest, samples = how
    if not (question or "").strip():
        raise UiError("There is no question. Write one, or take a held-out one.")
    if (longest or 0) < 0:
        raise UiError("Longest answer: give a number of tokens, or 0 for as many as in training.")
    stop(session)
    home = home_of(page, left, right)
    config = settings_of(home)
    row, put_before = None, question
    if session.held_out and question.strip() == prompt_text(session.held_out["prompt"]).strip():
        row, put_before, session.rounds = session.held_out, session.held_out["prompt"], []
    elif (expected or "").strip():
        ours = {"id": "own", "task": "own", "prompt": question, "answer": expected.strip()}
        row = {config.columns["answer"]: ours["answer"]} | ours if "answer" in config.columns else ours
    hidden = session.rounds and session.rounds[-1].hidden
    is_new = not hidden if blind else session.swapped is not None
    if is_new:  # a chat's sides stay what they are
        session.rounds, session.swapped = [], random.random() < 0.5 if blind else None
    order = (1, 0) if session.swapped else (0, 1)
    chosen = [(left, right)[i] or BASE for i in order]
    answered = [done for done in session.rounds if any(answer.samples for answer in done.answers)]
    session.rounds = answered[-ROUNDS:]  # of the others nothing is left to go on from
    ask = Ask(
        sides=tuple(map(side_of, chosen)),
        messages=tuple(conversation(session.rounds, side, put_before) for side in (0, 1)),
        run=home.name if home else None,
        temperature=0.0 if greedy else float(temperature),
        top_p=float(top_p),
        seed=int(seed or 0) % 2**31,
        max_tokens=int(longest or 0) or config.max_completion_length,
        samples=1 if greedy else min(16, max(1, int(samples or 1))),
    )
    session.rounds.append(Round(question, chosen, bool(blind), ask, row))
    return session.rounds[-1]


# --- what is said of the answers


def judge(page: Page, round_: Round) -> None:
    """Have the reward functions score all that has ended, on both sides. Raises RewardError, also where they hang."""
    home = page.runs.get(round_.ask.run) if round_.ask.run else None
    file = home.file("rewards.py") if home else page.rewards_file
    completions = [
        {"text": s.text, "truncated": s.truncated, "tokens": len(s.token_ids), "token_ids": s.token_ids}
        for answer in round_.answers for s in answer.samples if s.ended
    ]  # fmt: skip
    source = file.read_text(encoding="utf-8")
    how = home and home.path, file, source, JUDGING, round_.row, completions, round_.ask.stop
    round_.weights, found, _ = score_apart(*how)
    scores = iter(found)
    round_.scores = tuple([next(scores) if s.ended else None for s in answer.samples] for answer in round_.answers)


def verdict(sample: Sample, score: Score | None, max_tokens: int) -> str:
    """In words: correct, wrong, cut off, no answer, or why there is none."""
    if not sample.ended:
        return "stopped: no verdict"
    cut = f"cut off after {max_tokens} tokens" if sample.truncated else ""
    if score is None:
        return cut or "no verdict"
    reason = score.reasons.get(score.judge, "")
    if score.verdict == "ungraded":
        return f"ungraded: {next(iter(score.reasons.values()), '')}"
    if not score.judge:
        return "no verdict: none of the rewards that apply here can judge"
    if score.is_right:
        return "correct"
    return cut or ("no answer" if outcome_of(reason) == "no_answer" else "wrong")


def judged(round_: Round, side: int) -> list[tuple[Sample, Score | None]]:
    """Each sample of a side with its score, None where it has none."""
    return list(itertools.zip_longest(round_.answers[side].samples, round_.scores[side]))


def rate(round_: Round, side: int) -> tuple[int, int]:
    """How many of a side's samples are right, and of how many that were graded."""
    graded = [score for _, score in judged(round_, side) if score and score.judge and score.verdict != "ungraded"]
    return sum(score.is_right for score in graded), len(graded)


def in_percent(right: int, n: int) -> str:
    import_models()
    from rl.evaluate import wilson_interval

    low, high = wilson_interval(right, n)
    return f"{right}/{n} correct ({right / n:.0%}, 95 %: {low:.0%} to {high:.0%})"


def verdict_text(round_: Round, side: int) -> str:
    """What stands under a side."""
    answer, both = round_.answers[side], judged(round_, side)
    if answer.state == "failed":
        return answer.note
    if len(both) > 1 and rate(round_, side)[1]:
        text = in_percent(*rate(round_, side))
    else:
        text = "; ".join(dict.fromkeys(verdict(sample, score, round_.ask.max_tokens) for sample, score in both))
    totals = [score.total for _, score in both if score and not math.isnan(score.total)]
    if totals:
        text += f". Reward {sum(totals) / len(totals):.3g}" + (" on average" if len(totals) > 1 else "")
    if round_.row:
        text += f". Expected: {expected_of(round_.row)}"
    return cut(f"{text}. {round_.unjudged}" if round_.unjudged else text, 2000)


def expected_of(row: dict) -> str:
    found = row.get("tests") if row.get("answer") is None else row["answer"]
    found = row.get("target", "what its grader says") if found is None else found
    return "; ".join(map(str, found)) if isinstance(found, list) else str(found)


def reward_table(round_: Round, side: int) -> list[list]:
    rows = []
    for number, (_, score) in enumerate(judged(round_, side), 1):
        for name, value, why in parts_of(score) if score else ():
            if value is not None or why:
                weight = round_.weights.get(name, 0)
                shown = "" if value is None else f"{value:g}", f"{weight:g}" if weight else "metric"
                rows.append([number, name, *shown, cut(why, 500)])
    return rows


def summary(round_: Round, seconds: float) -> str:
    """One line on the round."""
    rates = [rate(round_, side) for side in (0, 1)]
    known = not round_.hidden and all(n for _, n in rates)
    text = f"{' against '.join(f'{right}/{n}' for right, n in rates)} correct. " if known else ""
    how = f"temperature {round_.ask.temperature:g}, seed {round_.ask.seed}" if round_.ask.temperature else "greedy"
    states = {answer.state for answer in round_.answers}
    ended = "Stopped" if "stopped" in states else "Failed" if states == {"failed"} else "Answered"
    vote = " Vote to see which is which, and the verdicts." if round_.hidden else ""
    return f"{text}{ended} after {seconds:.1f} s ({how}).{vote}"


# --- to take away


def as_records(session: Session) -> list[dict]:
    """One a question, with all that was asked, written and said of it."""
    records = []
    for done in (r for r in session.rounds if r.answers):
        ask, sides = done.ask, {}
        for side, name in enumerate(SIDES):
            both = judged(done, side)
            sides[name] = {
                "model": "hidden until the vote" if done.hidden else done.names[side],
                "state": done.answers[side].state, "note": done.answers[side].note,
                "samples": [
                    {"text": s.text, "tokens": len(s.token_ids)} | ({} if done.hidden else judgement(s, score, ask.max_tokens))
                    for s, score in both
                ],
            }  # fmt: skip
        how = {name: getattr(ask, name) for name in ("temperature", "top_p", "max_tokens", "samples")}
        records.append({
            "question": done.question, "id": done.row and done.row["id"], "expected": done.row and expected_of(done.row),
            "run": ask.run, "seed": ask.seed, "settings": how, "note": done.unjudged, **sides,
        })  # fmt: skip
    return records


def judgement(sample: Sample, score: Score | None, max_tokens: int) -> dict:
    found = {"verdict": verdict(sample, score, max_tokens)}
    if score:
        total = None if math.isnan(score.total) else score.total
        found |= {"reward": total, "rewards": score.parts, "metrics": score.metrics, "reasons": score.reasons}
    return found


def as_markdown(records: list[dict]) -> str:
    parts = ["# A comparison"]
    for record in records:
        how = ", ".join(f"{name} {value:g}" for name, value in (record["settings"] | {"seed": record["seed"]}).items())
        parts += ["## Question", fenced(record["question"]), f"Expected: {record['expected']}. Asked with {how}."]
        for side in SIDES:
            parts.append(f"### {side.title()}: {record[side]['model']} {record[side]['note']}".strip())
            for sample in record[side]["samples"]:
                rewards = ", ".join(f"{k} {v:g}" for k, v in sample.get("rewards", {}).items() if v is not None)
                said = (
                    f"{sample.get('verdict', 'no vote yet')}; {sample['tokens']} tokens; rewards: {rewards or 'none'}"
                )
                parts += [fenced(sample["text"]), said]
    return "\n\n".join(parts) + "\n"


def fenced(text: str) -> str:
    fence = "`" * max(3, *(len(found) + 1 for found in re.findall("`+", text)), 0)
    return f"{fence}text\n{text}\n{fence}"


def files(session: Session) -> tuple[str | None, str | None]:
    """The chat as Markdown and as JSONL."""
    if not (records := as_records(session)):
        return None, None
    session.folder = session.folder or tempfile.TemporaryDirectory(prefix="ponder-")
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    markdown, jsonl = (Path(session.folder.name) / f"comparison.{kind}" for kind in ("md", "jsonl"))
    markdown.write_text(as_markdown(records), encoding="utf-8", errors="replace")
    jsonl.write_text(lines, encoding="utf-8", errors="replace")
    return str(markdown), str(jsonl)


def cut(text: str, limit: int = SHOWN) -> str:
    return text if len(text) <= limit else f"{text[:limit]} … ({len(text) - limit:,} more characters are not shown)"
