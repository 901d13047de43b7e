"""The tab Rewards: what the reward functions give to a completion, and what an edited file changes in a step of a run.

No reward code runs in the process of the page (ui/reward_process.py). Completions are scored with the text in the editor. What
is not saved is kept beside the file (rewards.draft.py) until it is saved or dropped, also if it cannot be imported.
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
from ui.reward_process import number_of, reward_rows, run_task, score_completions, text_of
from ui.runs import Page, Run, UiError, shows_errors

READ_ONLY = "This page is open to other machines: here rewards are neither edited nor tried out."
WRITING = threading.Lock()  # held while the reward file or its draft is written
SECONDS = 60.0  # the time limit of reward code
SCORES = ["function", "value", "weight", "counts", "why"]
CHANGES = ["completion", "question", "old", "new", "verdict", "what changed", "why", "its end"]


# --- the completion


def choose(page: Page, name: str | None, step: float | None, number: float | None) -> tuple:
    """The runs to choose from, the newest if none is chosen, and its last step if it does not have the chosen one."""
    names = page.runs.names()
    name = name if name in names else next(iter(names), None)
    steps = page.runs.get(name).steps() if name else []
    label = f"step, {steps[0]} to {steps[-1]}" if steps else "step"
    if step is None or int(step) not in steps:
        step, number = (steps[-1] if steps else None), 1
    return gr.Dropdown(choices=names, value=name), gr.Number(label=label, value=step), number


def find(page: Page, name: str | None, step: float | None, number: float | None) -> tuple[Run, dict]:
    """A run and one of its completions; number: within the step, from 1. Raises UiError if there is none."""
    run = page.runs.get(name or "")
    records = run.completions(int(step or 0))
    if not 1 <= int(number or 0) <= len(records):
        raise UiError(f"Step {int(step)} of {name} has the completions 1 to {len(records)}. Choose one of these.")
    return run, records[int(number) - 1]


def pick(page: Page, name: str | None, step: float | None, number: float | None) -> tuple:
    """A completion as the run has logged it. Outputs: words, table, question, row, completion, whether it was cut off."""
    run, record = find(page, name, step, number)
    row, words = None, logged_score(record)
    try:
        row = next((row for rows in run.questions() for row in rows if row["id"] == record["prompt_id"]), None)
        words += "" if row else " Its question is not in the run's data any more: give the expected answer."
    except (ConfigError, DataError) as error:  # the data cannot be read: the rest can be shown
        words += f" {error}"
    values = record.get("rewards", {}) | record.get("metrics", {})
    table = [[f, number_of(value), "", "", record.get("reasons", {}).get(f, "")] for f, value in values.items()]
    given = json.dumps(row, ensure_ascii=False, indent=1) if row else ""
    return words, table, record["prompt"], given, cut(record["completion"]), record.get("finish_reason") == "length"


def score(page: Page, name, step, number, question, given, text, truncated, source) -> tuple[str, list]:
    """Score the completion in the fields: one of a run, or any other. Outputs: words, in which errors stay, and the table."""
    run = page.runs.get(name) if name else None
    row = {"id": "pasted", "task": "pasted", "prompt": question} | read_row(given)
    completion, logged = {"text": text, "truncated": truncated}, ""
    with contextlib.suppress(UiError):  # it need not be one of a run
        record = find(page, name, step, number)[1]
        if (question, text) == (record["prompt"], cut(record["completion"])):
            completion |= {"text": record["completion"], "tokens": record.get("tokens"), "step": record["step"]}
            logged = logged_score(record)
    process = run and run.path, page.rewards_file, source, SECONDS
    try:
        weights, (result,), printed = score_completions(*process, row, [completion])
    except RewardError as error:
        return str(error), []
    verdict = f"{result.verdict} (by {result.judge})" if result.judge else result.verdict
    if result.verdict == "wrong" and not result.judge:
        verdict = "no verdict: none of the rewards that apply can judge it; give the expected answer"
    words = f"By {file_label(page, source)}: total {number_of(result.total)}, {verdict}. {logged}"
    return words + output(printed), reward_rows(result, weights)


def rescore(page: Page, name: str | None, step: float | None, source: str) -> tuple[str, list]:
    """Score a step again: old -> new, the completions that change most first. Outputs as of `score`."""
    run = page.runs.get(name or "")
    records = run.completions(int(step or 0))
    try:
        result, printed = run_task("rescore", run.path, page.rewards_file, source, SECONDS, lines=records)
    except RewardError as error:
        return str(error), []
    rows = result["rows"]
    words = f"{len(rows)} completions of step {int(step)} by {file_label(page, source)}:\n{result['report']}"
    if len(rows) < len(records):
        words += f"{len(records) - len(rows)} are left out: their questions are not in the run's data any more.\n"
    return words + output(printed), rows


def logged_score(record: dict) -> str:
    return f"In the run: total {number_of(record.get('reward'))}, {record.get('verdict')}."


def output(printed: str) -> str:
    return f" It printed: {printed[-500:]}" if printed else ""


def read_row(given: str) -> dict:
    """The columns of a row in JSON; any other text is the answer. Raises UiError."""
    if not re.match(r'\s*\{\s*["}]', given):
        return {"answer": given.strip()} if given.strip() else {}
    try:
        return json.loads(given)
    except ValueError as error:
        raise UiError(f"The row is not JSON: {error}. Correct it, or give the expected answer alone.") from None


# --- the reward file


def read_file(page: Page, request: gr.Request) -> tuple[str, str, str]:
    """Words, the text for the editor, and that of the file. A draft is edited on, and belongs to this visitor then."""
    file, draft = places(page)
    page.draft_of = request.session_hash
    if draft.is_file():
        words = f"These are changes that are not in {file.name}: save or drop them. They are kept in {draft.name}."
        return words, text_of(draft), text_of(file)
    return f"This is {file}.", text_of(file), text_of(file)


def drop(page: Page, request: gr.Request) -> tuple[str, str, str]:
    """Remove the draft, and read the file as `read_file` does."""
    with WRITING:
        places(page)[1].unlink(missing_ok=True)
    return read_file(page, request)


def keep(page: Page, source: str, request: gr.Request) -> str:
    """Write the text in the editor to the draft, unless the draft has the edits of another visitor."""
    file, draft = places(page)
    with WRITING:
        if draft.is_file() and page.draft_of != request.session_hash:
            return f"Not kept: {draft.name} has the edits of another window. Reload this page in the browser to continue those."
        page.draft_of = request.session_hash
        if is_saved(page, source):
            draft.unlink(missing_ok=True)
            return f"This is {file}."
        write(draft, source)
    return f"What is in the editor is kept in {draft.name}."


def save(page: Page, source: str, loaded: str | None, request: gr.Request) -> tuple[str, str]:
    """Save the text in the editor if it can be imported. loaded: the text of the file when it was read.

    Outputs: words, the text of the file as the editor knows it.
    """
    file, draft = places(page)
    if is_saved(page, source):
        return f"{file.name} is as in the editor: there is nothing to save.", text_of(file)
    kept = keep(page, source, request)
    if text_of(file) != loaded:
        words = f"Not saved: {file.name} may have changed since it was read. Press Save once more to write over it."
        return f"{words} {kept}", text_of(file)
    try:
        names, _ = run_task("check", None, file, source, SECONDS)
    except RewardError as error:
        return f"Not saved: {error}\n{file.name} is as it was. {kept}", loaded
    with WRITING:
        write(file, source)
        if text_of(draft).strip() == source.strip():  # else it has been edited in the meantime
            draft.unlink(missing_ok=True)
    return f"Saved. Its rewards: {', '.join(names)}. A run in progress keeps its own copy.", text_of(file)


def places(page: Page) -> tuple[Path, Path]:
    """The reward file and its draft."""
    file = page.rewards_file.resolve()
    return file, file.with_suffix(".draft.py")


def is_saved(page: Page, source: str) -> bool:
    return text_of(page.rewards_file).strip() == source.strip()  # the editor strips it


def file_label(page: Page, source: str) -> str:
    return page.rewards_file.name + ("" if is_saved(page, source) else ", with what is not saved")


def write(file: Path, source: str) -> None:
    """Write a file as a whole, or not at all."""
    unfinished = file.with_name(f"{file.name}.unfinished")
    unfinished.write_text(source.strip() + "\n", encoding="utf-8")
    if file.is_file():
        shutil.copymode(file, unfinished)
    os.replace(unfinished, file)


# --- the layout


def build(page: Page) -> None:
    with gr.Tab("Rewards") as tab:
        gr.Markdown(
            "What each reward function says of a completion, and why. Take one of a run, or write one of your own."
        )
        with gr.Row():
            run = gr.Dropdown(page.runs.names(), label="run")
            step = gr.Number(label="step", precision=0)
            number = gr.Number(1, label="completion, from 1", precision=0)
            taking = gr.Button("Take this completion")
        with gr.Row():
            with gr.Column():
                question = gr.Textbox(label="question", lines=2, max_lines=8)
                given = gr.Textbox(label="expected answer, or the row as JSON", lines=2, max_lines=8)
                text = gr.Textbox(label="completion, with its thinking", lines=6, max_lines=20)
                truncated = gr.Checkbox(label="it was cut at the length limit")
            with gr.Column():
                scoring = gr.Button("Score", variant="primary", visible=page.editable)
                words = gr.Textbox(label="verdict", lines=2, max_lines=12)
                table = gr.Dataframe(headers=SCORES, label="rewards", wrap=True, interactive=False, max_chars=500)
        chosen, fields = [run, step, number], [question, given, text, truncated]
        choosing = [tab.select, run.input]
        gr.on(choosing, shows_errors(choose, page), chosen, chosen, show_progress="hidden", api_name="choose")
        taken = shows_errors(pick, page), chosen, [words, table, *fields]
        taking.click(*taken, api_name="pick")
        if page.editable:
            editor, changes = build_editor(page, chosen)
            scoring.click(shows_errors(score, page), [*chosen, *fields, editor], [words, table], api_name="score")
            changes.select(shows_errors(number_in_row), None, number).success(*taken)
        else:
            gr.Markdown(READ_ONLY)


def build_editor(page: Page, chosen: list) -> tuple[gr.Code, gr.Dataframe]:
    """The reward file, and what it changes in a step."""
    editor = gr.Code(language="python", label="rewards.py", lines=16, max_lines=30, interactive=True)
    loaded = gr.State(None)  # the text of the file when it was read
    with gr.Row():
        saving, dropping = gr.Button("Save"), gr.Button("Reload (drops what is not saved)")
        rescoring = gr.Button("Rescore the step")
    words = gr.Textbox(label="the file", max_lines=6)
    report = gr.Code(label="old -> new", interactive=False, lines=2, max_lines=30, wrap_lines=False)
    changes = gr.Dataframe(
        headers=CHANGES,
        column_widths=["105px", "250px", "60px", "60px", "130px", "200px", "250px", "250px"],
        label="completions, those that change most first; a click takes one",
        interactive=False,
        wrap=True,
        max_chars=300,
    )
    gr.on(None, shows_errors(read_file, page), None, [words, editor, loaded], show_progress="hidden", api_name="read")
    keeping = {"show_progress": "hidden", "trigger_mode": "always_last", "api_name": "keep"}
    editor.input(shows_errors(keep, page), editor, words, **keeping)
    another = [component.change for component in chosen[:2]]
    gr.on(another, lambda: ("", []), None, [report, changes], api_visibility="private")
    rescoring.click(shows_errors(rescore, page), [*chosen[:2], editor], [report, changes], api_name="rescore")
    saving.click(shows_errors(save, page), [editor, loaded], [words, loaded], api_name="save")
    dropping.click(shows_errors(drop, page), None, [words, editor, loaded], api_name="reload")
    return editor, changes


def number_in_row(event: gr.SelectData) -> int:
    """The number of the completion in the row that was clicked."""
    return int(event.row_value[0])
