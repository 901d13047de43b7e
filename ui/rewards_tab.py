"""The tab Rewards: what the reward functions say of a completion, and what an edited file says of a step of a run.

No reward code runs in the page's process (ui/reward_process.py). What is scored with is the file as it stands in the editor: what
is not saved is kept beside the file (rewards.draft.py) until it is saved or dropped, also where it does not import.
"""

import contextlib
import functools
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
from ui import chat, learn_tab
from ui.reward_process import apart, number_of, parts_of, score_apart
from ui.runs import Page, Run, UiError, shows_errors

READ_ONLY = "This page is open to other machines: here rewards are neither edited nor tried out."
WRITING = threading.Lock()  # the reward file or its draft
SECONDS = 60.0  # that reward code has
SHOWN_ROWS = 200  # of a step that is scored again
SCORED = ["function", "value", "weight", "counts", "why"]
CHANGES = ["completion", "question", "old", "new", "verdict", "what changed", "why", "its end"]


# --- the tab Rewards: its buttons


def kept(function):
    """A handler with (words, table): what is wrong with a reward file stays in the words, instead of passing by."""

    @functools.wraps(function)
    def call(*args):
        try:
            return function(*args)
        except RewardError as error:
            return str(error), []

    return call


def pick(page: Page, name: str | None, step: float | None, number: float | None) -> tuple:
    """(words, table, question, row, completion, whether it was cut): as the run has saved them."""
    run, line = find(page, name, step, number)
    row, words = None, in_the_run(line)
    try:
        row = next((row for rows in chat.questions(run.config) for row in rows if row["id"] == line["prompt_id"]), None)
        words += "" if row else " Its question is not in the run's data any more: give the expected answer."
    except (ConfigError, DataError) as error:  # the data is out of reach: the rest can be shown
        words += f" {error}"
    values = line.get("rewards", {}) | line.get("metrics", {})
    table = [[f, number_of(value), "", "", line.get("reasons", {}).get(f, "")] for f, value in values.items()]
    given = json.dumps(row, ensure_ascii=False, indent=1) if row else ""
    return words, table, line["prompt"], given, chat.cut(line["completion"]), line.get("finish_reason") == "length"


@kept
def score(page: Page, name, step, number, question, given, text, cut, source) -> tuple[str, list]:
    """(words, table) on the completion in the fields: one of a run, or any other."""
    run = page.runs.get(name) if name else None
    row = {"id": "pasted", "task": "pasted", "prompt": question} | read_row(given)
    asked, words = {"text": text, "truncated": cut}, ""
    with contextlib.suppress(UiError):  # it need not be of a run
        line = find(page, name, step, number)[1]
        if (question, text) == (line["prompt"], chat.cut(line["completion"])):  # perhaps its beginning alone
            asked |= {"text": line["completion"], "tokens": line.get("tokens"), "step": line["step"]}
            words = in_the_run(line)
    weights, (found,), printed = score_apart(run and run.path, page.rewards_file, source, SECONDS, row, [asked])
    table = []
    for name, value, why in parts_of(found):
        weight = weights.get(name, 0)
        counts = number_of(weight * value) if weight and value is not None else ""
        table.append([name, number_of(value), f"{weight:g}" if weight else "metric", counts, why])
    verdict = f"{found.verdict} (by {found.judge})" if found.judge else found.verdict
    if found.verdict == "wrong" and not found.judge:
        verdict = "no verdict: none of the rewards that apply can judge it; give the expected answer"
    return f"By {called(page, source)}: total {number_of(found.total)}, {verdict}. {words}{output(printed)}", table


@kept
def rescore(page: Page, name: str | None, step: float | None, source: str) -> tuple[str, list]:
    """(words, table) on a step of a run: old -> new, the completions that change most first."""
    run = page.runs.get(name or "")
    lines = lines_of(run, step)
    found, printed = apart("rescore", run.path, page.rewards_file, source, SECONDS, lines=lines)
    known = found["lines"]
    words = f"{len(known)} completions of step {int(step)} by {called(page, source)}:\n{found['report']}"
    if len(known) < len(lines):
        words += f"{len(lines) - len(known)} are left out: their questions are not in the run's data any more.\n"
    if len(known) > SHOWN_ROWS:
        words += f"The {SHOWN_ROWS} that change most are shown.\n"
    return words + output(printed), known[:SHOWN_ROWS]


def read_file(page: Page, request: gr.Request) -> tuple[str, str, str]:
    """(words, the text for the editor, that of the file): of the draft, where there is one; it is this visitor's then."""
    file, draft = places(page)
    page.draft_of = request.session_hash
    if draft.is_file():
        words = f"These are changes that are not in {file.name}: save or drop them. They are kept in {draft.name}."
        return words, text_of(draft), text_of(file)
    return f"This is {file}.", text_of(file), text_of(file)


def drop(page: Page, request: gr.Request) -> tuple[str, str, str]:
    """The file as it is, as `read_file`, without the draft."""
    with WRITING:
        places(page)[1].unlink(missing_ok=True)
    return read_file(page, request)


def save(page: Page, source: str, loaded: str | None, request: gr.Request) -> tuple[str, str]:
    """(words, the text of the file as far as the editor knows it). What does not import is not saved, and not lost."""
    file, draft = places(page)
    if is_saved(page, source):
        return f"{file.name} is as in the editor: there is nothing to save.", text_of(file)
    keeps = keep(page, source, request)
    if text_of(file) != loaded:
        words = f"Not saved: {file.name} may have changed since it was read. Press Save once more to write over it."
        return f"{words} {keeps}", text_of(file)
    try:
        names, _ = apart("check", None, file, source, SECONDS)
    except RewardError as error:
        return f"Not saved: {error}\n{file.name} is as it was. {keeps}", loaded
    with WRITING:
        write(file, source)
        if text_of(draft).strip() == source.strip():  # else more has been typed meanwhile
            draft.unlink(missing_ok=True)
    return f"Saved. Its rewards: {', '.join(names)}. A run that is under way keeps its own copy.", text_of(file)


def choose(page: Page, name: str | None, step: float | None, number: float | None) -> tuple:
    """The runs there are; the chosen one, else the newest; its step, else its last one."""
    names = page.runs.names()
    name = name if name in names else next(iter(names), None)
    steps = page.runs.get(name).steps() if name else []
    label = f"step, {steps[0]} to {steps[-1]}" if steps else "step"
    if step is None or int(step) not in steps:
        step, number = steps[-1] if steps else None, 1
    return gr.Dropdown(choices=names, value=name), gr.Number(label=label, value=step), number


# --- what they share


def lines_of(run: Run, step: float | None) -> list[dict]:
    lines = [line for group in run.groups(int(step or 0)) for line in group]
    if not lines:
        raise UiError(f"{run.name} has no completions of step {int(step or 0)}. Choose another step.")
    return lines


def find(page: Page, name: str | None, step: float | None, number: float | None) -> tuple[Run, dict]:
    """A run and one of its completions; number: from 1, within the step. Raises UiError."""
    run = page.runs.get(name or "")
    lines = lines_of(run, step)
    if not 1 <= int(number or 0) <= len(lines):
        raise UiError(f"Step {int(step)} of {name} has the completions 1 to {len(lines)}. Choose one of these.")
    return run, lines[int(number) - 1]


def in_the_run(line: dict) -> str:
    return f"In the run: total {number_of(line.get('reward'))}, {line.get('verdict')}."


def output(printed: str) -> str:
    return f" It printed: {printed[-500:]}" if printed else ""


def read_row(given: str) -> dict:
    """The columns of a row that is JSON; of anything else it is the answer. Raises UiError."""
    if not re.match(r'\s*\{\s*["}]', given):
        return {"answer": given.strip()} if given.strip() else {}
    try:
        return json.loads(given)
    except ValueError as error:
        raise UiError(f"The row is not JSON: {error}. Mend it, or give the expected answer alone.") from None


def places(page: Page) -> tuple[Path, Path]:
    """The reward file and the draft of it."""
    file = page.rewards_file.resolve()
    return file, file.with_suffix(".draft.py")


def text_of(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def is_saved(page: Page, source: str) -> bool:
    return text_of(page.rewards_file).strip() == source.strip()  # as the editor shows it


def called(page: Page, source: str) -> str:
    return page.rewards_file.name + ("" if is_saved(page, source) else ", with what is not saved")


def keep(page: Page, source: str, request: gr.Request) -> str:
    """Let the draft have what is in the editor, unless it has the edits of another visitor. In words, what became of it."""
    file, draft = places(page)
    with WRITING:
        if draft.is_file() and page.draft_of != request.session_hash:
            return f"Not kept: {draft.name} has the edits of another window. Reload this page in the browser to go on with those."
        page.draft_of = request.session_hash
        if is_saved(page, source):
            draft.unlink(missing_ok=True)
            return f"This is {file}."
        write(draft, source)
    return f"What is in the editor is kept in {draft.name}."


def write(file: Path, source: str) -> None:
    """The whole of it, or nothing."""
    unfinished = file.with_name(f"{file.name}.unfinished")
    unfinished.write_text(source.strip() + "\n", encoding="utf-8")
    if file.is_file():
        shutil.copymode(file, unfinished)
    os.replace(unfinished, file)


# --- its layout


def build(page: Page) -> None:
    with gr.Tab("Rewards") as tab:
        gr.Markdown(
            "What each reward function says of a completion, and why. Take one of a run, or write one of your own."
        )
        with gr.Row():
            run = gr.Dropdown(page.runs.names(), label="run")
            step, number = gr.Number(label="step", precision=0), gr.Number(1, label="completion, from 1", precision=0)
            taking = gr.Button("Take this completion")
        with gr.Row():
            with gr.Column():
                question = gr.Textbox(label="question", lines=2, max_lines=8)
                given = gr.Textbox(label="expected answer, or the row as JSON", lines=2, max_lines=8)
                text = gr.Textbox(label="completion, with its thinking", lines=6, max_lines=20)
                cut = gr.Checkbox(label="it was cut at the length limit")
            with gr.Column():
                scoring = gr.Button("Score", variant="primary", visible=page.editable)
                words = gr.Textbox(label="verdict", lines=2, max_lines=12)
                parts = gr.Dataframe(headers=SCORED, label="rewards", wrap=True, interactive=False, max_chars=500)
        chosen, fields = [run, step, number], [question, given, text, cut]
        gr.on(
            [tab.select, run.input],
            shows_errors(choose, page),
            chosen,
            chosen,
            show_progress="hidden",
            api_name="choose",
        )
        taken = shows_errors(pick, page), chosen, [words, parts, *fields]
        taking.click(*taken, api_name="pick")
        if page.editable:
            editor, changes = build_editor(page, chosen)
            scoring.click(shows_errors(score, page), [*chosen, *fields, editor], [words, parts], api_name="score")
            changes.select(shows_errors(number_in), None, number).success(*taken)
        else:
            gr.Markdown(READ_ONLY)
    learn_tab.build(page)


def build_editor(page: Page, chosen: list) -> tuple[gr.Code, gr.Dataframe]:
    """The file, and what it makes of a whole step."""
    editor = gr.Code(language="python", label="rewards.py", lines=16, max_lines=30, interactive=True)
    loaded = gr.State(None)  # the text of the file when it was read
    with gr.Row():
        saving, dropping = gr.Button("Save"), gr.Button("Reload (drops what is not saved)")
        rescoring = gr.Button("Rescore the step")
    of_file = gr.Textbox(label="the file", max_lines=6)
    result = gr.Code(label="old -> new", interactive=False, lines=2, max_lines=30, wrap_lines=False)
    changes = gr.Dataframe(
        headers=CHANGES, label="completions, those that change most first; a click takes one", wrap=True, interactive=False,
        max_chars=300, column_widths=["105px", "250px", "60px", "60px", "130px", "200px", "250px", "250px"],
    )  # fmt: skip
    read = [of_file, editor, loaded]
    gr.on(None, shows_errors(read_file, page), None, read, show_progress="hidden", api_name="read")  # at first
    editor.input(
        shows_errors(keep, page), editor, of_file, show_progress="hidden", trigger_mode="always_last", api_name="keep"
    )
    gr.on([part.change for part in chosen[:2]], lambda: ("", []), None, [result, changes], api_visibility="private")
    rescoring.click(shows_errors(rescore, page), [*chosen[:2], editor], [result, changes], api_name="rescore")
    saving.click(shows_errors(save, page), [editor, loaded], [of_file, loaded], api_name="save")
    dropping.click(shows_errors(drop, page), None, read, api_name="reload")
    return editor, changes


def number_in(event: gr.SelectData) -> int:
    """That of the completion in the row that was clicked."""
    return int(event.row_value[0])
