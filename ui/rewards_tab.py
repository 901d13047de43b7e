"""The Rewards tab: score a completion, and see how an edited reward file changes the scores of a step.

Reward code never runs in the process of the page (see ui/reward_process.py). Completions are scored with the text in
the editor. Unsaved edits, even with errors, stay in rewards.draft.py beside the file until they are saved or discarded.
"""

import contextlib
import json
import os
import re
import shutil
import threading
from pathlib import Path

import gradio as gr

from data import DataError
from grading import RewardError
from rl.config import ConfigError
from ui.chat import cut
from ui.reward_process import format_number, read_text, reward_rows, run_task, score_completions
from ui.runs import Page, Run, UiError, shows_errors

READ_ONLY = "Other machines can reach this page. Serve it at 127.0.0.1 to edit and try out rewards."
WRITE_LOCK = threading.Lock()  # held while the reward file or its draft is written
TIME_LIMIT = 60.0  # seconds for reward code
SCORES = ["function", "value", "weight", "weighted", "reason"]
CHANGES = ["#", "question", "old", "new", "verdict", "changes", "reasons", "end of completion"]


# --- completions


def choose(page: Page, name: str | None, step: float | None, number: float | None) -> tuple:
    """Update the run, step and completion number. The defaults are the newest run, its last step and completion 1."""
    names = page.runs.names()
    name = name if name in names else next(iter(names), None)
    steps = page.runs.get(name).steps() if name else []
    label = f"Step ({steps[0]} to {steps[-1]})" if steps else "Step"
    if step is None or int(step) not in steps:
        step, number = (steps[-1] if steps else None), 1
    return gr.Dropdown(choices=names, value=name), gr.Number(label=label, value=step), number


def find_completion(page: Page, name: str | None, step: float | None, number: float | None) -> tuple[Run, dict]:
    """Return a run and a completion. number: within the step, from 1. Raises UiError if there is no such completion."""
    run = page.runs.get(name or "")
    records = run.completions(int(step or 0))
    if not 1 <= int(number or 0) <= len(records):
        raise UiError(f"Step {int(step)} of {name} has completions 1 to {len(records)}. Choose one of them.")
    return run, records[int(number) - 1]


def pick(page: Page, name: str | None, step: float | None, number: float | None) -> tuple:
    """Load a logged completion. Outputs: message, table, question, row, completion, whether it was truncated."""
    run, record = find_completion(page, name, step, number)
    row, message = None, logged_score(record)
    try:
        row = next((row for split in run.questions() for row in split if row["id"] == record["prompt_id"]), None)
        message += "" if row else " The question is no longer in the run's data: enter the expected answer."
    except (ConfigError, DataError) as error:  # the completion can be shown without the data
        message += f" {error}"
    values = record.get("rewards", {}) | record.get("metrics", {})
    rows = [[f, format_number(value), "", "", record.get("reasons", {}).get(f, "")] for f, value in values.items()]
    row_text = json.dumps(row, ensure_ascii=False, indent=1) if row else ""
    return message, rows, record["prompt"], row_text, cut(record["completion"]), record.get("finish_reason") == "length"


def score(page: Page, name, step, number, question, row_text, text, truncated, source) -> tuple[str, list]:
    """Score the completion in the fields. Outputs: message, which may be an error, and table."""
    run = page.runs.get(name) if name else None
    row = {"id": "pasted", "task": "pasted", "prompt": question} | read_row(row_text)
    completion, logged = {"text": text, "truncated": truncated}, ""
    with contextlib.suppress(UiError):  # the completion need not come from a run
        record = find_completion(page, name, step, number)[1]
        if (question, text) == (record["prompt"], cut(record["completion"])):
            completion |= {"text": record["completion"], "tokens": record.get("tokens"), "step": record["step"]}
            logged = logged_score(record)
    arguments = run and run.path, page.rewards_file, source, TIME_LIMIT
    try:
        weights, (result,), printed = score_completions(*arguments, row, [completion])
    except RewardError as error:
        return str(error), []
    verdict = f"{result.verdict} (judged by {result.judge})" if result.judge else result.verdict
    if result.verdict == "wrong" and not result.judge:
        verdict = "no verdict: no reward function decides whether it is correct; enter the expected answer"
    message = f"Scored with {file_label(page, source)}: total {format_number(result.total)}, {verdict}. {logged}"
    return message + output_text(printed), reward_rows(result, weights)


def rescore(page: Page, name: str | None, step: float | None, source: str) -> tuple[str, list]:
    """Rescore a step. Outputs: message, which may be an error, and table with the largest changes first."""
    run = page.runs.get(name or "")
    records = run.completions(int(step or 0))
    try:
        result, printed = run_task("rescore", run.path, page.rewards_file, source, TIME_LIMIT, lines=records)
    except RewardError as error:
        return str(error), []
    rows = result["rows"]
    message = (
        f"{len(rows)} completions of step {int(step)}, scored with {file_label(page, source)}:\n{result['report']}"
    )
    if len(rows) < len(records):
        message += f"{len(records) - len(rows)} skipped: their questions are no longer in the run's data.\n"
    return message + output_text(printed), rows


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


def read_file(page: Page, request: gr.Request) -> tuple[str, str, str]:
    """Read the draft if there is one, and make this visitor its owner. Outputs: message, editor text, file text."""
    file, draft = file_and_draft(page)
    page.draft_owner = request.session_hash
    if draft.is_file():
        message = f"Showing unsaved edits of {file.name} from {draft.name}. Save or discard them."
        return message, read_text(draft), read_text(file)
    return f"Editing {file}.", read_text(file), read_text(file)


def reload_file(page: Page, request: gr.Request) -> tuple[str, str, str]:
    """Remove the draft and read the file. Outputs as for `read_file`."""
    with WRITE_LOCK:
        file_and_draft(page)[1].unlink(missing_ok=True)
    return read_file(page, request)


def save_draft(page: Page, source: str, request: gr.Request) -> str:
    """Write the text in the editor to the draft, unless the draft contains the edits of another visitor."""
    file, draft = file_and_draft(page)
    with WRITE_LOCK:
        if draft.is_file() and page.draft_owner != request.session_hash:
            return f"Draft not saved: {draft.name} has edits from another window. Reload the page to continue them."
        page.draft_owner = request.session_hash
        if is_saved(page, source):
            draft.unlink(missing_ok=True)
            return f"Editing {file}."
        write(draft, source)
    return f"Unsaved edits are kept in {draft.name}."


def save(page: Page, source: str, loaded: str | None, request: gr.Request) -> tuple[str, str]:
    """Save the text in the editor if it can be imported. Outputs: message, the new value of `loaded`.

    loaded: the text of the file when it was last read.
    """
    file, draft = file_and_draft(page)
    if is_saved(page, source):
        return f"{file.name} is up to date: there is nothing to save.", read_text(file)
    draft_message = save_draft(page, source, request)
    if read_text(file) != loaded:
        message = f"Not saved: {file.name} may have changed on disk. Press Save again to overwrite it."
        return f"{message} {draft_message}", read_text(file)
    try:
        names, _ = run_task("check", None, file, source, TIME_LIMIT)
    except RewardError as error:
        return f"Not saved: {error}\n{file.name} is unchanged. {draft_message}", loaded
    with WRITE_LOCK:
        write(file, source)
        if read_text(draft).strip() == source.strip():  # otherwise it was edited in the meantime
            draft.unlink(missing_ok=True)
    return f"Saved. Rewards: {', '.join(names)}. A run in progress keeps its own copy.", read_text(file)


def file_and_draft(page: Page) -> tuple[Path, Path]:
    """Return the paths of the reward file and its draft."""
    file = page.rewards_file.resolve()
    return file, file.with_suffix(".draft.py")


def is_saved(page: Page, source: str) -> bool:
    return read_text(page.rewards_file).strip() == source.strip()  # the editor strips the text


def file_label(page: Page, source: str) -> str:
    return page.rewards_file.name + ("" if is_saved(page, source) else " with unsaved edits")


def write(file: Path, source: str) -> None:
    """Write a file atomically."""
    unfinished = file.with_name(f"{file.name}.unfinished")
    unfinished.write_text(source.strip() + "\n", encoding="utf-8")
    if file.is_file():
        shutil.copymode(file, unfinished)
    os.replace(unfinished, file)


# --- the layout


def build(page: Page) -> None:
    with gr.Tab("Rewards") as tab:
        gr.Markdown(
            "See how each reward function scores a completion, and why. Load a completion from a run, or type one."
        )
        with gr.Row():
            run = gr.Dropdown(page.runs.names(), label="Run")
            step = gr.Number(label="Step", precision=0)
            number = gr.Number(1, label="Completion number, from 1", precision=0)
            load_button = gr.Button("Load this completion")
        with gr.Row():
            with gr.Column():
                question = gr.Textbox(label="Question", lines=2, max_lines=8)
                row_text = gr.Textbox(label="Expected answer, or the row as JSON", lines=2, max_lines=8)
                text = gr.Textbox(label="Completion, including thinking", lines=6, max_lines=20)
                truncated = gr.Checkbox(label="Truncated at the length limit")
            with gr.Column():
                score_button = gr.Button("Score", variant="primary", visible=page.editable)
                message = gr.Textbox(label="Verdict", lines=2, max_lines=12)
                table = gr.Dataframe(headers=SCORES, label="Rewards", wrap=True, interactive=False, max_chars=500)
        place = [run, step, number]
        fields = [question, row_text, text, truncated]
        events = [tab.select, run.input]
        gr.on(events, shows_errors(choose, page), place, place, show_progress="hidden", api_name="choose")
        load = shows_errors(pick, page), place, [message, table, *fields]
        load_button.click(*load, api_name="pick")
        if page.editable:
            editor, changes = build_editor(page, place)
            score_button.click(shows_errors(score, page), [*place, *fields, editor], [message, table], api_name="score")
            changes.select(shows_errors(number_in_row), None, number).success(*load)
        else:
            gr.Markdown(READ_ONLY)


def build_editor(page: Page, place: list) -> tuple[gr.Code, gr.Dataframe]:
    """Build the editor of the reward file and the table of changes. place: the run, step and completion number."""
    editor = gr.Code(language="python", label="rewards.py", lines=16, max_lines=30, interactive=True)
    loaded = gr.State(None)  # text of the file when it was last read
    with gr.Row():
        save_button = gr.Button("Save")
        reload_button = gr.Button("Reload (discards unsaved edits)")
        rescore_button = gr.Button("Rescore the step")
    message = gr.Textbox(label="File status", max_lines=6)
    report = gr.Code(label="Old and new scores", interactive=False, lines=2, max_lines=30, wrap_lines=False)
    changes = gr.Dataframe(
        headers=CHANGES,
        column_widths=["105px", "250px", "60px", "60px", "130px", "200px", "250px", "250px"],
        label="Completions, largest change first (click to load)",
        interactive=False,
        wrap=True,
        max_chars=300,
    )
    gr.on(None, shows_errors(read_file, page), None, [message, editor, loaded], show_progress="hidden", api_name="read")
    options = {"show_progress": "hidden", "trigger_mode": "always_last", "api_name": "keep"}
    editor.input(shows_errors(save_draft, page), editor, message, **options)
    events = [component.change for component in place[:2]]
    gr.on(events, lambda: ("", []), None, [report, changes], api_visibility="private")
    rescore_button.click(shows_errors(rescore, page), [*place[:2], editor], [report, changes], api_name="rescore")
    save_button.click(shows_errors(save, page), [editor, loaded], [message, loaded], api_name="save")
    reload_button.click(shows_errors(reload_file, page), None, [message, editor, loaded], api_name="reload")
    return editor, changes


def number_in_row(event: gr.SelectData) -> int:
    """Return the number of the completion in the clicked row."""
    return int(event.row_value[0])
