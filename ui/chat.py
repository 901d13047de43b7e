"""A chat with two models: questions, verdicts of the reward functions, and downloads.

The raw texts stay on the server, in a `Session`. Both sides are scored with the same reward file: the copy in the right
side's run, else in the left side's, else in the newest run, else rewards.py. Does not import gradio or torch.
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
from ui.turns import Answer, ChatRequest, Sample

BASE = "the base model"
SIDES = "left", "right"
MAX_TEXT_LENGTH = 20_000  # characters of a text shown on the page; downloads contain the full text
REWARD_TIMEOUT = 30.0  # seconds
DEFAULT_CONFIG = Path("configs/tiny.yaml")  # used if there is no run


@dataclass(eq=False)
class Round:
    """A question and the answers of both sides."""

    question: str
    names: list[str]  # model name of each side
    is_hidden: bool  # in a blind chat: names and verdicts are hidden until the vote
    request: ChatRequest
    row: dict | None = None  # data row for scoring; None: no expected answer
    answers: tuple[Answer, ...] = ()
    is_done: bool = False  # answered and scored
    weights: dict[str, float] = field(default_factory=dict)  # by reward function
    no_verdict_reason: str = ""


@dataclass
class Session:
    """The chat of one visitor."""

    rounds: list[Round] = field(default_factory=list)
    held_out_row: dict | None = None  # the last held-out row loaded into the question field
    is_swapped: bool | None = None  # in a blind chat: whether the sides are swapped; None: not blind
    votes: Counter = field(default_factory=Counter)
    unanswered: str = ""  # the last question, if no side answered it
    folder: tempfile.TemporaryDirectory | None = None  # downloads; removed with the session


# --- questions


def side_choices(page: Page) -> list[tuple[str, str]]:
    """Return (label, value) for the base model and each checkpoint of each run, newest first."""
    choices = [(BASE, BASE)]
    for name in page.runs.names():
        with contextlib.suppress(UiError):  # the error is shown when the run is selected
            for checkpoint in reversed(page.runs.get(name).checkpoints()):
                choices.append((f"{name}, step {int(checkpoint[5:])}", f"{name}/{checkpoint}"))
    return choices


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


def held_out_rows(page: Page, left: str | None, right: str | None) -> list[dict]:
    run = shared_run(page, left, right)
    return (run.questions() if run else questions_of(DEFAULT_CONFIG, 0))[1]


def load_held_out(page: Page, session: Session, left, right, number: float | None) -> tuple[str, int]:
    """Return the text of a held-out question and its number, for the question and number fields."""
    rows = held_out_rows(page, left, right)
    if not number or not 1 <= number <= len(rows):
        raise UiError(f"There is no held-out question {number or 0:g}. They are numbered from 1 to {len(rows)}.")
    session.held_out_row = rows[int(number) - 1]
    return prompt_text(session.held_out_row["prompt"]), int(number)


def random_held_out(page: Page, session: Session, left, right) -> tuple[str, int]:
    """Return the text of a random held-out question and its number."""
    return load_held_out(page, session, left, right, random.randint(1, len(held_out_rows(page, left, right))))


def build_messages(rounds: list[Round], side: int, question: str | list[dict]) -> list[dict]:
    """Return the conversation of a side, ending with the question. Only the first sample of each answer is used."""
    messages = []
    for round_ in rounds:
        samples = round_.answers[side].samples if round_.answers else ()
        messages.append({"role": "user", "content": round_.question})
        messages.append({"role": "assistant", "content": samples[0].text if samples else ""})
    return messages + ([{"role": "user", "content": question}] if isinstance(question, str) else list(question))


def stop(session: Session) -> None:
    for round_ in session.rounds:
        round_.request.stop.set()


def start_round(page: Page, session: Session, left, right, blind, question, expected, greedy, *sampling) -> Round:
    """Append a round with a request for the worker to the chat. A held-out question starts a new chat."""
    temperature, top_p, seed, max_tokens, samples = sampling
    if not (question or "").strip():
        raise UiError("There is no question. Type one, or load a held-out question.")
    if (max_tokens or 0) < 0:
        raise UiError("Maximum answer length: enter a positive number of tokens, or 0 for the length used in training.")
    stop(session)
    run = shared_run(page, left, right)
    config = load_config(run)
    row, prompt = None, question
    if session.held_out_row and question.strip() == prompt_text(session.held_out_row["prompt"]).strip():
        row = session.held_out_row
        prompt = row["prompt"]
        session.rounds = []
    elif (expected or "").strip():
        answer = expected.strip()
        row = {config.columns.get("answer", "answer"): answer}
        row |= {"id": "own", "task": "own", "prompt": question, "answer": answer}
    was_blind = session.rounds and session.rounds[-1].is_hidden
    starts_new_chat = not was_blind if blind else session.is_swapped is not None
    if starts_new_chat:  # within a chat, the sides are never swapped again
        session.rounds = []
        session.is_swapped = random.random() < 0.5 if blind else None
    names = [left or BASE, right or BASE]
    if session.is_swapped:
        names.reverse()
    session.rounds = [round_ for round_ in session.rounds if any(answer.samples for answer in round_.answers)]
    request = ChatRequest(
        sides=tuple(map(parse_side, names)),
        messages=tuple(build_messages(session.rounds, side, prompt) for side in (0, 1)),
        run=run.name if run else None,
        temperature=0.0 if greedy else float(temperature),
        top_p=float(top_p),
        seed=int(seed or 0) % 2**31,
        max_tokens=int(max_tokens or 0) or config.max_completion_length,
        samples=1 if greedy else min(16, max(1, int(samples or 1))),
    )
    session.rounds.append(Round(question, names, bool(blind), request, row))
    return session.rounds[-1]


def load_config(run: Run | None) -> Config:
    return run.config if run else config_of(DEFAULT_CONFIG, 0)


# --- verdicts


def score_round(page: Page, round_: Round) -> None:
    """Score the finished samples of both sides. Raise RewardError if a reward function fails or times out."""
    run = page.runs.get(round_.request.run) if round_.request.run else None
    file = run.file("rewards.py") if run else page.rewards_file
    finished = [sample for answer in round_.answers for sample in answer.samples if sample.finished]
    completions = [
        {"text": s.text, "truncated": s.truncated, "tokens": len(s.token_ids), "token_ids": s.token_ids}
        for s in finished
    ]
    arguments = run and run.path, file, file.read_text(encoding="utf-8"), REWARD_TIMEOUT
    round_.weights, scores, _ = score_completions(*arguments, round_.row, completions, round_.request.stop)
    scores = iter(scores)
    round_.answers = tuple(
        replace(answer, samples=tuple(replace(s, score=next(scores)) if s.finished else s for s in answer.samples))
        for answer in round_.answers
    )


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


def sample_scores(answer: Answer) -> list[Score]:
    return [sample.score for sample in answer.samples if sample.score]


def count_correct(answer: Answer) -> tuple[int, int]:
    """Return the number of correct samples of a side, and the number of graded ones."""
    graded = [score for score in sample_scores(answer) if score.judge and score.verdict != "ungraded"]
    return sum(score.is_right for score in graded), len(graded)


def format_accuracy(correct: int, n: int) -> str:
    """Format an accuracy with its 95 % Wilson interval."""
    import_models()
    from rl.evaluate import wilson_interval

    low, high = wilson_interval(correct, n)
    return f"{correct}/{n} correct ({correct / n:.0%}, 95% CI {low:.0%} to {high:.0%})"


def verdict_text(round_: Round, answer: Answer) -> str:
    """Return the line below a side: verdict, reward, and expected answer."""
    if answer.state == "failed":
        return answer.note
    correct, graded = count_correct(answer)
    if len(answer.samples) > 1 and graded:
        text = format_accuracy(correct, graded)
    else:
        text = "; ".join(dict.fromkeys(verdict(sample, round_.request.max_tokens) for sample in answer.samples))
    totals = [score.total for score in sample_scores(answer) if not math.isnan(score.total)]
    if totals:
        text += f". Reward {sum(totals) / len(totals):.3g}" + (" on average" if len(totals) > 1 else "")
    if round_.row:
        text += f". Expected: {expected_answer(round_.row)}"
    return cut(f"{text}. {round_.no_verdict_reason}" if round_.no_verdict_reason else text, 2000)


def expected_answer(row: dict) -> str:
    expected = row.get("tests") if row.get("answer") is None else row["answer"]
    if expected is None:
        expected = row.get("target", "decided by the grader")
    return "; ".join(map(str, expected)) if isinstance(expected, list) else str(expected)


def reward_table(round_: Round, answer: Answer) -> list[list]:
    """Return one row per sample and reward: sample number, name, value, weight, reason."""
    table = []
    for number, sample in enumerate(answer.samples, 1):
        rows = reward_rows(sample.score, round_.weights) if sample.score else []
        table += [[number, *row[:3], cut(row[-1], 500)] for row in rows if row[1] != "-" or row[-1]]
    return table


def summary(round_: Round, seconds: float) -> str:
    """Return the status line of a finished round."""
    counts = [count_correct(answer) for answer in round_.answers]
    is_graded = not round_.is_hidden and all(n for _, n in counts)
    accuracy = f"{' vs '.join(f'{correct}/{n}' for correct, n in counts)} correct. " if is_graded else ""
    sampling = (
        f"temperature {round_.request.temperature:g}, seed {round_.request.seed}"
        if round_.request.temperature
        else "greedy"
    )
    states = {answer.state for answer in round_.answers}
    outcome = "Stopped" if "stopped" in states else "Failed" if states == {"failed"} else "Answered"
    vote = " Vote to reveal the models and the verdicts." if round_.is_hidden else ""
    return f"{accuracy}{outcome} after {seconds:.1f} s ({sampling}).{vote}"


# --- downloads


def as_records(session: Session) -> list[dict]:
    """Return one record per question, with its settings, answers and scores."""
    records = []
    for round_ in session.rounds:
        if not round_.answers:
            continue
        record = {"question": round_.question, "id": round_.row and round_.row["id"]}
        record |= {
            "expected": round_.row and expected_answer(round_.row),
            "run": round_.request.run,
            "seed": round_.request.seed,
        }
        record["settings"] = {
            name: getattr(round_.request, name) for name in ("temperature", "top_p", "max_tokens", "samples")
        }
        record["note"] = round_.no_verdict_reason
        for side, (name, answer) in enumerate(zip(SIDES, round_.answers)):
            model = "hidden until the vote" if round_.is_hidden else round_.names[side]
            samples = [sample_record(round_, sample) for sample in answer.samples]
            record[name] = {"model": model, "state": answer.state, "note": answer.note, "samples": samples}
        records.append(record)
    return records


def sample_record(round_: Round, sample: Sample) -> dict:
    record = {"text": sample.text, "tokens": len(sample.token_ids)}
    if not round_.is_hidden:
        record["verdict"] = verdict(sample, round_.request.max_tokens)
        if score := sample.score:
            record["reward"] = None if math.isnan(score.total) else score.total
            record |= {"rewards": score.parts, "metrics": score.metrics, "reasons": score.reasons}
    return record


def as_markdown(records: list[dict]) -> str:
    parts = ["# Comparison"]
    for record in records:
        settings = ", ".join(
            f"{name} {value:g}" for name, value in (record["settings"] | {"seed": record["seed"]}).items()
        )
        parts += ["## Question", fenced(record["question"]), f"Expected: {record['expected']}. Settings: {settings}."]
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
    """Wrap a text in a Markdown code fence longer than any run of backticks in it."""
    fence = "`" * max(3, *(len(ticks) + 1 for ticks in re.findall("`+", text)), 0)
    return f"{fence}text\n{text}\n{fence}"


def write_downloads(session: Session) -> tuple[str | None, str | None]:
    """Write the chat as Markdown and as JSONL, and return the paths; None if the chat is empty."""
    if not (records := as_records(session)):
        return None, None
    session.folder = session.folder or tempfile.TemporaryDirectory(prefix="ponder-")
    markdown, jsonl = (Path(session.folder.name) / f"comparison.{kind}" for kind in ("md", "jsonl"))
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    markdown.write_text(as_markdown(records), encoding="utf-8", errors="replace")
    jsonl.write_text(lines, encoding="utf-8", errors="replace")
    return str(markdown), str(jsonl)


def cut(text: str, limit: int = MAX_TEXT_LENGTH) -> str:
    return text if len(text) <= limit else f"{text[:limit]} … ({len(text) - limit:,} more characters are not shown)"
