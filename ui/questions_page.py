"""The page What changed: held-out questions before and after training, from saved evaluations or asked now."""

import contextlib
import math
from collections import Counter
from collections.abc import Iterator
from functools import partial

import gradio as gr
from gradio.context import Context

from grading import Score, prompt_text
from rl.config import RunError
from rl.run.reader import Run
from rl.run.report import describe_gain, transcript
from ui import chat
from ui.chat import BASE, SIDES
from ui.page import Page, UiError, import_models
from ui.text import cut
from ui.turns import ChatRequest, Sample
from ui.view import View, menu, show_progress, status_line, table

CHANGES = {"fixed": (False, True), "broken": (True, False), "both right": (True, True), "both wrong": (False, False)}
ALL = "all"
COLUMNS = {"#": "50px", "change": "100px", "task": "90px", "question": "260px", "before": "150px", "after": "150px"}
MAX_QUESTIONS = 500

Pair = tuple[int, str, dict, dict]  # number, key of CHANGES, record before, record after (rl.evaluate.record)


def pair_records(before: list[dict], after: list[dict]) -> list[Pair]:
    """Pair the records of the questions that both lists have."""
    second = {record["id"]: record for record in after}
    labels = {verdicts: label for label, verdicts in CHANGES.items()}
    pairs = [(record, second[record["id"]]) for record in before if record["id"] in second]
    return [(n, labels[b["verdict"] == "right", a["verdict"] == "right"], b, a) for n, (b, a) in enumerate(pairs, 1)]


def show_pairs(pairs: list[Pair], before: str, after: str) -> dict:
    """Summarize the differences of two evaluations, and list the questions."""
    import_models()
    from rl.evaluate import paired_gain

    if not pairs:
        raise UiError("The two evaluations have no question in common. Choose others.")
    records = [[pair[2] for pair in pairs], [pair[3] for pair in pairs]]
    lines = []
    for name, side in zip((before, after), records):
        right = sum(record["verdict"] == "right" for record in side)
        ungraded = sum(record["verdict"] == "ungraded" for record in side)
        note = f", {ungraded} ungraded, which count as wrong" if ungraded else ""
        lines.append(f"{name}: {chat.format_accuracy(right, len(pairs))}{note}")
    lines.append(f"Gain: {describe_gain(paired_gain(*records))}")
    counts = Counter(pair[1] for pair in pairs)
    filters = [(f"all ({len(pairs)})", ALL), *((f"{change} ({counts[change]})", change) for change in CHANGES)]
    values = {"pairs": pairs, "summary": "\n".join(lines), "which": gr.Radio(filters, value=ALL)}
    return values | {"table": list_pairs(pairs, ALL), "question": "", "before_text": "", "after_text": ""}


def list_pairs(pairs: list[Pair], which: str) -> list[list]:
    rows = []
    for n, change, before, after in pairs:
        if which in (ALL, change):
            # The last characters of a completion contain its result.
            endings = [f"{r['verdict']}: {r['completion'].strip()[-60:]}" for r in (before, after)]
            rows.append([n, change, before["task"], cut(before["question"], 200), *endings])
    return rows


def show_record(record: dict) -> str:
    """Format an evaluation record: verdict, rewards with reasons, and completion."""
    finish = "cut off" if record["finish_reason"] == "length" else "finished"
    lines = [f"{record['verdict']}, reward {record['reward']}, {record['tokens']} tokens, {finish}"]
    for name, value in record["rewards"].items():
        reason = record["reasons"].get(name, "")
        if value is not None or reason:
            lines.append(f"{name} {value if value is None else format(value, 'g')} {reason}".rstrip())
    return "\n".join([*lines, "", cut(transcript(record))])


# --- handlers


def load(page: Page) -> dict:
    """List the runs and the models. The newest run with two evaluations is selected."""
    names = page.runs.names()
    newest = next((name for name in names if has_two_evaluations(page.runs.get(name))), next(iter(names), None))
    choices = chat.side_choices(page)
    sides = {"left": gr.Dropdown(choices, value=BASE), "right": gr.Dropdown(choices, value=chat.default_side(page))}
    return {"run": gr.Dropdown(names, value=newest)} | sides


def has_two_evaluations(run: Run) -> bool:
    with contextlib.suppress(RunError):  # the error is shown when the run is selected
        return len(run.evaluations()) > 1
    return False


def choose_run(page: Page, name: str | None) -> dict:
    """Select the first and the last evaluation of a run."""
    names = page.runs.get(name).evaluations() if name else []
    ends = {"before": next(iter(names), None), "after": next(reversed(names), None)}
    return {end: gr.Dropdown(names, value=value) for end, value in ends.items()}


def compare(page: Page, name: str, before: str | None, after: str | None) -> dict:
    """Compare two evaluations of a run."""
    if not (name and before and after):
        raise UiError("There is no evaluation yet. A run writes the first one before its first step.")
    run = page.runs.get(name)
    pairs = pair_records(run.evaluation(before), run.evaluation(after))
    return show_pairs(pairs, f"{name}, {before}", f"{name}, {after}")


def ask_many(page: Page, left: str, right: str, count: float) -> Iterator[dict]:
    """Ask both models the first held-out questions, score the answers, and compare them."""
    rows = chat.held_out_rows(page, left, right)[: int(count)]
    run = chat.shared_run(page, left, right)
    prompts = [row["prompt"] for row in rows]
    sides = tuple(map(chat.parse_side, (left, right)))
    max_tokens = chat.load_config(run).max_completion_length
    request = ChatRequest(sides, (prompts, prompts), run.name if run else None, max_tokens=max_tokens)
    with contextlib.closing(page.worker.answer(request)) as updates:
        for answers in updates:
            notes = [f"{side.title()}: {answer.note}" for side, answer in zip(SIDES, answers) if answer.note]
            yield {"status": "; ".join(notes) or "Answering ..."}
    for side, answer in zip(SIDES, answers):
        if answer.state != "done":
            raise UiError(f"{side.title()}: {answer.note}")
    samples = [(row, sample) for answer in answers for row, sample in zip(rows, answer.samples)]
    _, scores = yield from show_progress(chat.score_samples(page, request.run, samples), "Scoring")
    records = [make_record(row, sample, score) for (row, sample), score in zip(samples, scores)]
    pairs = pair_records(records[: len(rows)], records[len(rows) :])
    yield show_pairs(pairs, chat.side_label(left), chat.side_label(right)) | {
        "status": f"{len(rows)} held-out questions, greedy."
    }


def make_record(row: dict, sample: Sample, score: Score) -> dict:
    """Return an answer as a record of an evaluation (rl.evaluate.record)."""
    return {
        "id": row["id"],
        "task": row["task"],
        "question": prompt_text(row["prompt"]),
        "expected": chat.expected_answer(row),
        "completion": sample.text,
        "verdict": score.verdict,
        "finish_reason": "length" if sample.truncated else "stop",
        "tokens": len(sample.token_ids),
        "reward": None if math.isnan(score.total) else round(score.total, 6),
        "rewards": score.parts,
        "reasons": score.reasons,
    }


def filter_pairs(pairs: list[Pair], which: str) -> dict:
    return {"table": list_pairs(pairs, which)}


def open_pair(event: gr.SelectData, pairs: list[Pair]) -> dict:
    """Show both answers to the question in the selected row."""
    number, change, before, after = pairs[int(event.row_value[0]) - 1]
    question = f"{number} ({change}): {cut(before['question'])}\nExpected: {cut(str(before['expected']))}"
    return {"question": question, "before_text": show_record(before), "after_text": show_record(after)}


def build(page: Page) -> View:
    view = View(pairs=gr.State([]))
    with gr.Tabs():
        with gr.Tab("Evaluations"), gr.Row():
            for name in ("run", "before", "after"):
                view[name] = menu(name.title())
        with gr.Tab("Ask many"), gr.Row():
            for name in SIDES:
                view[name] = menu(name.title(), [BASE], BASE)
            view["count"] = gr.Slider(1, MAX_QUESTIONS, value=100, step=1, label="Held-out questions")
            ask_button = gr.Button("Ask both", variant="primary", min_width=110)
            stop_button = gr.Button("Stop", min_width=110)
    view["status"] = status_line()
    view["summary"] = gr.Textbox(label="Difference", interactive=False, lines=3, elem_id="changes")
    with gr.Row():
        with gr.Column(scale=3, min_width=340):
            view["which"] = gr.Radio([ALL, *CHANGES], value=ALL, label="Show", interactive=True)
            options = {"column_widths": list(COLUMNS.values()), "elem_id": "changed-table", "show_search": "search"}
            view["table"] = table("Questions (click one to read both answers)", *COLUMNS, max_height=480, **options)
        with gr.Column(scale=2, min_width=340, elem_id="changed-answers"):
            view["question"] = gr.Textbox(label="Question", interactive=False, max_lines=8, elem_id="changed-question")
            for end in ("before", "after"):
                view[f"{end}_text"] = gr.Textbox(label=end.title(), interactive=False, lines=6, max_lines=12)
    results = "pairs summary table question before_text after_text"
    loaded = view.on(Context.root_block.load, partial(load, page))
    for chosen in (loaded.then, view["run"].input):
        event = view.on(chosen, partial(choose_run, page), "run", f"before after {results}")
        view.on(event.then, partial(compare, page), "run before after", results)
    view.on([view[end].input for end in ("before", "after")], partial(compare, page), "run before after", results)
    options = {"show_progress": "minimal", "show_progress_on": view["status"]}
    asking = view.on(ask_button.click, partial(ask_many, page), "left right count", results, **options)
    stop_button.click(lambda: "Stopped.", None, view["status"], cancels=[asking])
    view.on(view["which"].input, filter_pairs, "pairs which")
    opened = view.on(view["table"].select, open_pair, "pairs")
    opened.then(None, js="() => document.getElementById('changed-question').scrollIntoView({block: 'nearest'})")
    return view
