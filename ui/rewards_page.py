"""The Rewards page: score a completion, and see how an edited reward file changes the scores of a step.

Reward code never runs in the process of the page (see tools/reward_process.py). Completions are scored with the text in
the editor. The browser keeps unsaved edits, even with errors, until they are saved or discarded.
"""

import contextlib
import json
import re
from collections.abc import Iterator
from functools import partial

import gradio as gr
from gradio.context import Context

from data import DataError
from rl.config import ConfigError, RunError
from rl.run.files import write_atomic
from rl.run.reader import Run, read_text
from tools.reward_process import format_number, reward_rows, run_task, score_completions
from ui.page import Page, UiError
from ui.text import cut
from ui.view import View, menu, show_progress, status_line, table

READ_ONLY = "Other machines can reach this page. Serve it at 127.0.0.1 to edit and try out rewards."
TIME_LIMIT = 60.0  # seconds for reward code
SCORES = ["function", "value", "weight", "weighted", "reason"]
CHANGES = ["#", "question", "old", "new", "verdict", "changes", "reasons", "end of completion"]
CHANGE_WIDTHS = ["60px", "250px", "60px", "60px", "130px", "200px", "250px", "250px"]


# --- completions


def load(page: Page) -> dict:
    """Select the newest run."""
    names = page.runs.names()
    return {"run": gr.Dropdown(choices=names, value=next(iter(names), None))}


def choose_run(page: Page, name: str | None) -> dict:
    """Select the last step of a run, and its first completion."""
    steps = page.runs.get(name).steps() if name else []
    label = f"Step ({steps[0]} to {steps[-1]})" if steps else "Step"
    return {"step": gr.Number(label=label, value=steps[-1] if steps else None), "number": 1}


def find_completion(page: Page, name: str | None, step: float | None, number: float | None) -> tuple[Run, dict]:
    """Return a run and a completion. number: within the step, from 1. Raises UiError if there is no such completion."""
    run = page.runs.get(name or "")
    records = run.completions(int(step or 0))
    if not 1 <= int(number or 0) <= len(records):
        raise UiError(f"Step {int(step)} of {name} has completions 1 to {len(records)}. Choose one of them.")
    return run, records[int(number) - 1]


def pick(page: Page, name: str | None, step: float | None, number: float | None) -> dict:
    """Load a logged completion, with the scores of the run."""
    run, record = find_completion(page, name, step, number)
    row = None
    message = logged_score(record)
    try:
        row = next((row for split in run.questions() for row in split if row["id"] == record["prompt_id"]), None)
        message += "" if row else " The question is no longer in the run's data: enter the expected answer."
    except (ConfigError, DataError) as error:  # the completion can be shown without the data
        message += f" {error}"
    values = record.get("rewards", {}) | record.get("metrics", {})
    rows = [[f, format_number(value), "", "", record.get("reasons", {}).get(f, "")] for f, value in values.items()]
    fields = {"question": record["prompt"], "row_text": json.dumps(row, ensure_ascii=False, indent=1) if row else ""}
    fields |= {"text": cut(record["completion"]), "truncated": record.get("finish_reason") == "length"}
    return fields | {"message": message, "scores": rows}


def score(page: Page, name, step, number, question, row_text, text, truncated, source) -> Iterator[dict]:
    """Score the completion in the fields."""
    run = page.runs.get(name) if name else None
    row = {"id": "pasted", "task": "pasted", "prompt": question} | read_row(row_text)
    completion = {"row": row, "text": text, "truncated": truncated}
    logged = ""
    with contextlib.suppress(UiError, RunError):  # the completion need not come from a run
        record = find_completion(page, name, step, number)[1]
        if (question, text) == (record["prompt"], cut(record["completion"])):
            completion |= {"text": record["completion"], "tokens": record.get("tokens"), "step": record["step"]}
            logged = logged_score(record)
    task = score_completions(run and run.path, page.rewards_file, source, TIME_LIMIT, [completion])
    weights, (result,), printed = yield from show_progress(task, "Scoring")
    verdict = f"{result.verdict} (judged by {result.judge})" if result.judge else result.verdict
    if result.verdict == "wrong" and not result.judge:
        verdict = "no verdict: no reward function decides whether it is correct; enter the expected answer"
    message = f"Scored with {file_label(page, source)}: total {format_number(result.total)}, {verdict}. {logged}"
    yield {"message": message + output_text(printed), "scores": reward_rows(result, weights)}


def rescore(page: Page, name: str | None, step: float | None, source: str) -> Iterator[dict]:
    """Rescore a step. The largest changes come first."""
    run = page.runs.get(name or "")
    records = run.completions(int(step or 0))
    task = run_task("rescore", run.path, page.rewards_file, source, TIME_LIMIT, lines=records)
    result, printed = yield from show_progress(task, "Scoring")
    rows = result["rows"]
    text = f"{len(rows)} completions of step {int(step)}, scored with {file_label(page, source)}:\n{result['report']}"
    if len(rows) < len(records):
        text += f"{len(records) - len(rows)} skipped: their questions are no longer in the run's data.\n"
    yield {"report": text + output_text(printed), "changes": rows}


def logged_score(record: dict) -> str:
    return f"In the run: total {format_number(record.get('reward'))}, {record.get('verdict')}."


def output_text(printed: str) -> str:
    return f" Output: {printed[-500:]}" if printed else ""


def read_row(text: str) -> dict:
    """Parse the JSON of a row; any other text is the expected answer. Raises UiError if the JSON is invalid."""
    if not re.match(r'\s*\{\s*["}]', text):
        return {"answer": text.strip()} if text.strip() else {}
    try:
        return json.loads(text)
    except ValueError as error:
        raise UiError(f"The row is not valid JSON: {error}. Correct it, or enter only the expected answer.") from None


# --- the reward file


def read_file(page: Page, draft: str | None) -> dict:
    """Show the file, or the unsaved edits that the browser has kept. `loaded` is the text of the file."""
    text = read_text(page.rewards_file)
    values = {"source": text, "loaded": text, "file_status": f"Editing {page.rewards_file}."}
    if draft and not is_saved(page, draft):
        values |= {
            "source": draft,
            "file_status": "Showing unsaved edits, which this browser keeps. Save or discard them.",
        }
    return values


def discard_edits(page: Page) -> dict:
    return read_file(page, None) | {"draft": None}


def keep_draft(source: str) -> dict:
    return {"draft": source}


def save(page: Page, source: str, loaded: str | None) -> Iterator[dict]:
    """Save the text in the editor if it can be imported, and the file has not changed since it was `loaded`."""
    file = page.rewards_file
    if is_saved(page, source):
        yield {"file_status": f"{file.name} is up to date: there is nothing to save."}
    elif read_text(file) != loaded:
        status = f"Not saved: {file.name} may have changed on disk. Press Save again to overwrite it."
        yield {"file_status": status, "loaded": read_text(file)}
    else:
        names, _ = yield from show_progress(run_task("check", None, file, source, TIME_LIMIT), "Checking")
        if read_text(file) != loaded:
            raise UiError(f"Not saved: {file.name} changed on disk during the check. Press Save again.")
        mode = file.stat().st_mode if file.is_file() else 0o644
        write_atomic(file, source.strip() + "\n")
        file.chmod(mode)
        status = f"Saved. Rewards: {', '.join(names)}. A run in progress keeps its own copy."
        yield {"file_status": status, "loaded": read_text(file)}


def is_saved(page: Page, source: str) -> bool:
    return read_text(page.rewards_file).strip() == source.strip()  # the editor strips the text


def file_label(page: Page, source: str) -> str:
    return page.rewards_file.name + ("" if is_saved(page, source) else " with unsaved edits")


# --- the layout


def clear_report() -> dict:
    return {"report": "", "changes": []}


def pick_change(event: gr.SelectData) -> dict:
    return {"number": int(event.row_value[0])}


def build(page: Page) -> View:
    view = View(loaded=gr.State(None), draft=gr.BrowserState(storage_key="ponder-rewards", secret="ponder"))
    gr.Markdown("See how each reward function scores a completion, and why. Load a completion from a run, or type one.")
    with gr.Row():
        view["run"] = menu("Run")
        view["step"] = gr.Number(label="Step", precision=0, min_width=110)
        view["number"] = gr.Number(1, label="Completion number, from 1", precision=0, min_width=110)
        load_button = gr.Button("Load this completion", min_width=110)
    view["status"] = status_line()
    with gr.Row():
        with gr.Column(min_width=320):
            view["question"] = gr.Textbox(label="Question", lines=2, max_lines=8)
            view["row_text"] = gr.Textbox(label="Expected answer, or the row as JSON", lines=2, max_lines=8)
            view["text"] = gr.Textbox(label="Completion, including thinking", lines=6, max_lines=20)
            view["truncated"] = gr.Checkbox(label="Truncated at the length limit")
        with gr.Column(min_width=320):
            with gr.Row(visible=page.editable):
                score_button = gr.Button("Score", variant="primary")
                stop_button = gr.Button("Stop")
            view["message"] = gr.Textbox(label="Verdict", lines=2, max_lines=12, interactive=False)
            view["scores"] = table("Rewards", *SCORES, max_chars=500)
    loaded = view.on(Context.root_block.load, partial(load, page))
    for chosen in (loaded.then, view["run"].input):
        view.on(chosen, partial(choose_run, page), "run", "step")
    fields = "question row_text text truncated message scores"
    load_completion = partial(pick, page), "run step number", fields
    view.on(load_button.click, *load_completion)
    if not page.editable:
        gr.Markdown(READ_ONLY)
        return view
    view["source"] = gr.Code(language="python", label="rewards.py", lines=16, max_lines=30, interactive=True)
    with gr.Row():
        save_button = gr.Button("Save")
        discard_button = gr.Button("Discard unsaved edits")
        rescore_button = gr.Button("Rescore the step")
    view["file_status"] = gr.Textbox(label="File status", max_lines=6, interactive=False)
    view["report"] = gr.Code(label="Old and new scores", interactive=False, lines=2, max_lines=30)
    label = "Completions, largest change first (click to load)"
    view["changes"] = table(label, *CHANGES, column_widths=CHANGE_WIDTHS)
    view.on(Context.root_block.load, partial(read_file, page), "draft")
    view.on(view["source"].input, keep_draft, "source")
    view.on(discard_button.click, partial(discard_edits, page))
    stale = [view["run"].change, view["step"].change]
    view.on(stale, clear_report)  # a click would load a completion of another run
    inputs = "run step number question row_text text truncated source"
    tasks = [
        view.on(score_button.click, partial(score, page), inputs, "message scores"),
        view.on(rescore_button.click, partial(rescore, page), "run step source", "report changes"),
        view.on(save_button.click, partial(save, page), "source loaded"),
    ]
    stop_button.click(lambda: "Stopped.", None, view["status"], cancels=tasks)
    clicked = view.on(view["changes"].select, pick_change)
    view.on(clicked.then, *load_completion, api_visibility="private")
    return view
