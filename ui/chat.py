"""A chat with one or two models: questions, answers, verdicts of the reward functions, votes and downloads.

The raw texts stay on the server, in a `Session`. Both sides are scored with the same reward file: the copy in the right
side's run, else in the left side's, else in the newest run, else rewards.py. Does not import gradio or torch.
"""

import contextlib
import itertools
import json
import math
import random
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from data import DataError
from grading import outcome_of, prompt_text
from rl.config import Config, RunError
from rl.run.reader import Run, config_of, questions_of
from tools.reward_process import score_completions
from ui.page import Page, UiError, import_models
from ui.text import fenced
from ui.turns import Answer, ChatRequest, Sample

BASE = "the base model"
SIDES = "left", "right"
COMPARE, BLIND, SINGLE = "Compare two models", "Blind vote", "One model"
GREEDY, SAMPLING = "Greedy: one answer", "Sampling"
REWARD_TIMEOUT = 30.0  # seconds
DEFAULT_CONFIG = Path("configs/tiny.yaml")  # used if there is no run
MAX_SESSIONS = 100  # the oldest chats are dropped


@dataclass(eq=False)
class Round:
    """A question and the answers of one or two models."""

    question: str
    sides: list[str]  # value of `side_choices` of each side
    is_blind: bool
    is_hidden: bool  # in a blind chat, names and verdicts are hidden until the vote
    is_fresh: bool  # starts a conversation: the models do not see the rounds before it
    run: str | None
    options: dict  # sampling settings, as in ChatRequest
    row: dict | None = None  # data row for scoring; None: no expected answer
    title: str = ""  # "Held-out question 7"
    stop: threading.Event = field(default_factory=threading.Event)
    is_done: bool = False  # answered and scored, or stopped
    answers: tuple[Answer, ...] = ()
    weights: dict[str, float] = field(default_factory=dict)  # by reward function
    no_verdict_reason: str = ""

    @property
    def names(self) -> list[str]:
        return list(map(side_label, self.sides))

    def end(self) -> None:
        """Mark the question as answered, or as stopped if the visitor has left."""
        self.answers = tuple(a if a.is_over else replace(a, state="stopped", note="stopped") for a in self.answers)
        self.is_done = True

    def note(self, side: int) -> str:
        """Return what a side is doing, or its error. In a blind chat, without the names of model and files."""
        answer = self.answers[side]
        if not self.is_hidden or not answer.note:
            return answer.note
        return "This side failed." if answer.state == "failed" else "Loading ..."


@dataclass
class Session:
    """The chat of one browser tab."""

    rounds: list[Round] = field(default_factory=list)
    selected: tuple = ()  # mode, left and right of the last question
    is_raw: bool = False  # show the raw texts
    is_swapped: bool = False  # in a blind chat
    votes: Counter = field(default_factory=Counter)
    folder: tempfile.TemporaryDirectory | None = None  # downloads; removed with the session

    def is_answering(self, before: Round) -> bool:
        """Return whether a question before this one is not answered yet."""
        earlier = itertools.takewhile(lambda round_: round_ is not before, self.rounds)
        return any(not round_.is_done for round_ in earlier)

    def stop(self) -> None:
        for round_ in self.rounds:
            round_.stop.set()

    def reveal(self) -> None:
        """Show the names and verdicts of a blind vote."""
        for round_ in self.rounds:
            round_.is_hidden = False


def find_session(page: Page, tab_id: str | None, session: Session) -> Session:
    """Return the chat of a browser tab, which sends the same ID after a reload.

    session: the chat of this load of the page, which has questions if they were asked before the page was complete.
    """
    if not tab_id:
        return session
    known = page.sessions.pop(tab_id, session)
    if known is not session:
        known.rounds += session.rounds
    page.sessions[tab_id] = known  # the most recently used one comes last
    for oldest in list(page.sessions)[:-MAX_SESSIONS]:
        page.sessions.pop(oldest, None)
    return known


# --- models and questions


def side_choices(page: Page) -> list[tuple[str, str]]:
    """Return (label, value) for the base model and each checkpoint of each run, newest first."""
    choices = [(BASE, BASE)]
    for name in page.runs.names():
        with contextlib.suppress(RunError):  # the error is shown when the run is selected
            for checkpoint in reversed(page.runs.get(name).checkpoints()):
                choices.append((side_label(f"{name}/{checkpoint}"), f"{name}/{checkpoint}"))
    return choices


def side_label(value: str | None) -> str:
    if not (side := parse_side(value)):
        return BASE
    number = side[1].removeprefix("step_")
    return f"{side[0]}, step {int(number)}" if number.isdecimal() else str(value)


def default_side(page: Page) -> str:
    """Return the last checkpoint of the newest run that improved; else of the newest finished one, or of the newest."""
    latest = {}
    for _, value in side_choices(page)[1:]:
        latest.setdefault(value.partition("/")[0], value)

    def rank(name: str) -> tuple:
        with contextlib.suppress(RunError, AttributeError, LookupError, TypeError):  # a damaged summary
            summary = page.runs.get(name).summary()
            return summary.get("eval", {}).get("gain", {}).get("ci95", [0])[0] > 0, bool(summary.get("finished"))
        return False, False

    return latest[max(latest, key=rank)] if latest else BASE  # of equal ones, the newest


def parse_side(value: str | None) -> tuple[str, str] | None:
    """Convert a value of `side_choices` to (run, checkpoint), or None for the base model."""
    if value in (None, "", BASE):
        return None
    run, _, checkpoint = str(value).partition("/")
    return run, checkpoint


def shared_run(page: Page, left: str | None, right: str | None) -> Run | None:
    """Return the run whose base model, questions and rewards both sides use, or None if there is no run."""
    names = [side[0] for side in (parse_side(right), parse_side(left)) if side] + page.runs.names()[:1]
    return page.runs.get(names[0]) if names else None


def load_config(run: Run | None) -> Config:
    return run.config if run else config_of(DEFAULT_CONFIG, 0)


def held_out_rows(page: Page, left: str | None, right: str | None) -> list[dict]:
    run = shared_run(page, left, right)
    return (run.questions() if run else questions_of(DEFAULT_CONFIG, 0))[1]


def held_out_question(page: Page, mode: str, left, right, number: float | None) -> tuple[str, int]:
    """Return the text of a held-out question and its number; a random one if there is no number."""
    right = left if mode == SINGLE else right
    rows = held_out_rows(page, left, right)
    number = random.randint(1, len(rows)) if number is None else int(number)
    if not 1 <= number <= len(rows):
        raise UiError(f"There is no held-out question {number}. They are numbered from 1 to {len(rows)}.")
    return prompt_text(rows[number - 1]["prompt"]), number


def add_question(page: Page, session: Session, mode: str, left, right, question, expected, **options) -> Round:
    """Append a question to the chat. options: sampling settings of ChatRequest. Raises UiError if one is invalid.

    A held-out question is asked as in training: in a new conversation.
    """
    if not (question or "").strip():
        raise UiError("There is no question. Type one, or load a held-out question.")
    sides = [left or BASE] if mode == SINGLE else [left or BASE, right or BASE]
    run = shared_run(page, sides[0], sides[-1])
    config = load_config(run)
    session.selected = mode, left, right
    options["max_tokens"] = int(options.get("max_tokens") or 0) or config.max_completion_length
    if options["max_tokens"] < 0:
        raise UiError("Maximum answer length: enter a positive number of tokens, or 0 for the length used in training.")
    row = None
    title = ""
    with contextlib.suppress(DataError):  # the data is gone: no question is known
        for number, held_out in enumerate(held_out_rows(page, sides[0], sides[-1]), 1):
            if prompt_text(held_out["prompt"]).strip() == question.strip():
                row = held_out
                title = f"Held-out question {number}"
    if not row and (expected or "").strip():
        answer = expected.strip()
        row = {config.columns.get("answer", "answer"): answer}
        row |= {"id": "own", "task": "own", "prompt": question, "answer": answer}
    is_blind = mode == BLIND
    if not is_blind:
        session.reveal()
    previous = session.rounds[-1] if session.rounds else None
    keeps_sides = previous is not None and previous.is_blind == previous.is_hidden == is_blind
    if not keeps_sides:  # they are shuffled once for each vote
        session.is_swapped = is_blind and random.random() < 0.5
    is_fresh = bool(title) or not keeps_sides
    if session.is_swapped:
        sides.reverse()
    run_name = run.name if run else None
    round_ = Round(question, sides, is_blind, is_blind, is_fresh, run_name, options, row, title)
    session.rounds.append(round_)
    return round_


def make_request(session: Session, round_: Round) -> ChatRequest:
    """Return the request for the worker: the conversation of each side, ending with the question."""
    before = session.rounds[: session.rounds.index(round_)]
    start = max((i for i, other in enumerate(before) if other.is_fresh), default=0)
    prompt = round_.row["prompt"] if round_.title else round_.question
    question = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    conversations = []
    for side in range(len(round_.names)):
        messages = []
        for other in [] if round_.is_fresh else before[start:]:
            samples = other.answers[side].samples if side < len(other.answers) else ()
            if samples:
                messages.append({"role": "user", "content": other.question})
                messages.append({"role": "assistant", "content": samples[0].text})
        conversations.append([messages + question])
    sides = tuple(map(parse_side, round_.sides))
    return ChatRequest(sides, tuple(conversations), round_.run, stop=round_.stop, **round_.options)


# --- verdicts


def score_round(page: Page, round_: Round) -> Iterator[float]:
    """Score the finished samples of all sides. Raise RewardError if a reward function fails or times out."""
    samples = [sample for answer in round_.answers for sample in answer.samples if sample.finished]
    weights, scores = yield from score_samples(page, round_.run, [(round_.row, sample) for sample in samples])
    round_.weights = weights
    scores = iter(scores)
    round_.answers = tuple(
        replace(answer, samples=tuple(replace(s, score=next(scores)) if s.finished else s for s in answer.samples))
        for answer in round_.answers
    )


def score_samples(page: Page, run_name: str | None, samples: list[tuple[dict, Sample]]) -> Iterator[float]:
    """Score (row, sample) pairs with the reward file of a run. Returns the weights and the scores."""
    run = page.runs.get(run_name) if run_name else None
    file = run.file("rewards.py") if run else page.rewards_file
    completions = [
        {"row": row, "text": s.text, "truncated": s.truncated, "tokens": len(s.token_ids), "token_ids": s.token_ids}
        for row, s in samples
    ]
    source = file.read_text(encoding="utf-8")
    seconds = REWARD_TIMEOUT + 0.05 * len(samples)
    weights, scores, _ = yield from score_completions(run and run.path, file, source, seconds, completions)
    return weights, scores


def verdict(sample: Sample, max_tokens: int) -> str:
    """Return "correct", "wrong", "cut off ...", "no answer", or the reason why there is no verdict."""
    if not sample.finished:
        return "stopped: no verdict"
    score = sample.score
    cut_off = f"cut off after {max_tokens} tokens" if sample.truncated else ""
    if score is None:
        return cut_off or "no verdict"
    if score.verdict == "ungraded":
        return f"ungraded: {next(iter(score.reasons.values()), '')}"
    if not score.judge:
        return "no verdict: no reward function decides whether this answer is correct"
    if score.is_right:
        return "correct"
    return cut_off or ("no answer" if outcome_of(score.reasons.get(score.judge, "")) == "no_answer" else "wrong")


def count_correct(answer: Answer) -> tuple[int, int]:
    """Return the number of correct samples of a side, and the number of graded ones."""
    scores = [sample.score for sample in answer.samples if sample.score]
    graded = [score for score in scores if score.judge and score.verdict != "ungraded"]
    return sum(score.is_right for score in graded), len(graded)


def format_accuracy(correct: int, n: int) -> str:
    """Format an accuracy with its 95 % Wilson interval, or the verdict of a single answer."""
    if n == 1:
        return "correct" if correct else "not correct"
    import_models()
    from rl.evaluate import wilson_interval

    low, high = wilson_interval(correct, n)
    return f"{correct}/{n} correct ({correct / n:.0%}, 95% CI {low:.0%} to {high:.0%})"


def describe_sample(round_: Round, side: int, sample: Sample) -> str:
    """Return the line below an answer: verdict, reward, length, speed, and the model that wrote it."""
    length = f"{len(sample.token_ids)} tokens"
    if round_.is_hidden:
        return length
    answer = round_.answers[side]
    text = verdict(sample, round_.options["max_tokens"])
    text += f" (expected {expected_answer(round_.row)})" if round_.row else ""
    total = sample.score.total if sample.score else math.nan
    reward = [] if math.isnan(total) else [f"reward {total:.3g}"]
    return " · ".join([text, *reward, length, f"{answer.tokens_per_second:.0f} tokens/s", round_.names[side]])


def expected_answer(row: dict) -> str:
    expected = row.get("tests") if row.get("answer") is None else row["answer"]
    if expected is None:
        expected = row.get("target", "decided by the grader")
    return "; ".join(map(str, expected)) if isinstance(expected, list) else str(expected)


def summary(round_: Round, seconds: float) -> str:
    """Return the status line of a finished round."""
    counts = [count_correct(answer) for answer in round_.answers]
    is_graded = not round_.is_hidden and counts and all(n for _, n in counts)
    accuracy = " against ".join(format_accuracy(*count) for count in counts) + ". " if is_graded else ""
    temperature = round_.options.get("temperature")
    sampling = f"temperature {temperature:g}, seed {round_.options['seed']}" if temperature else "greedy"
    states = {answer.state for answer in round_.answers}
    outcome = "Stopped" if "stopped" in states else "Failed" if states == {"failed"} else "Answered"
    reason = f" {round_.no_verdict_reason}" if round_.no_verdict_reason and not round_.is_hidden else ""
    vote = " Vote to reveal the models and the verdicts." if round_.is_hidden else ""
    return f"{accuracy}{outcome} after {seconds:.1f} s ({sampling}).{reason}{vote}"


# --- downloads


def as_records(session: Session) -> list[dict]:
    """Return one record per answered question, with its settings, answers and scores."""
    records = []
    for round_ in session.rounds:
        if not round_.answers:
            continue
        record = {"question": round_.question, "id": round_.row and round_.row["id"], "run": round_.run}
        record |= {"expected": round_.row and expected_answer(round_.row), "new_conversation": round_.is_fresh}
        record |= {"settings": round_.options, "note": round_.no_verdict_reason}
        for side, answer in enumerate(round_.answers):
            model = "hidden until the vote" if round_.is_hidden else round_.names[side]
            samples = [sample_record(round_, sample) for sample in answer.samples]
            record[SIDES[side]] = {"model": model, "state": answer.state, "note": round_.note(side), "samples": samples}
        records.append(record)
    return records


def sample_record(round_: Round, sample: Sample) -> dict:
    record = {"text": sample.text, "tokens": len(sample.token_ids)}
    if not round_.is_hidden:
        record["verdict"] = verdict(sample, round_.options["max_tokens"])
        if score := sample.score:
            record["reward"] = None if math.isnan(score.total) else score.total
            record |= {"rewards": score.parts, "metrics": score.metrics, "reasons": score.reasons}
    return record


def as_markdown(records: list[dict]) -> str:
    parts = ["# Chat"]
    for record in records:
        settings = ", ".join(f"{name} {value}" for name, value in record["settings"].items() if value != "")
        parts += ["## Question", fenced(record["question"]), f"Expected: {record['expected']}. Settings: {settings}."]
        for name in SIDES:
            side = record.get(name, {"samples": []})
            if side["samples"]:
                parts.append(f"### {name.title()}: {side['model']} {side['note']}".strip())
            for sample in side["samples"]:
                rewards = ", ".join(f"{k} {v:g}" for k, v in sample.get("rewards", {}).items() if v is not None)
                outcome = sample.get("verdict", "no vote yet")
                parts.append(fenced(sample["text"]))
                parts.append(f"{outcome}; {sample['tokens']} tokens; rewards: {rewards or 'none'}")
    return "\n\n".join(parts) + "\n"


def write_downloads(session: Session) -> list[str]:
    """Write the chat as Markdown and as JSONL, and return the paths. Raises UiError if the chat is empty."""
    if not (records := as_records(session)):
        raise UiError("There is nothing to download yet. Ask a question first.")
    session.folder = session.folder or tempfile.TemporaryDirectory(prefix="ponder-")
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    files = []
    for name, text in (("chat.md", as_markdown(records)), ("chat.jsonl", lines)):
        files.append(Path(session.folder.name) / name)
        files[-1].write_text(text, encoding="utf-8", errors="replace")
    return list(map(str, files))
