"""The chat page: ask one or two models, side by side. The chat itself is in ui/chat.py."""

import contextlib
import time
from collections.abc import Iterator
from functools import partial

import gradio as gr
from gradio.context import Context

from data import DataError
from grading import RewardError, prompt_text
from rl.config import ConfigError, RunError
from tools.reward_process import reward_rows
from ui import chat, launch
from ui.chat import BASE, BLIND, COMPARE, GREEDY, SAMPLING, SIDES, SINGLE, Round, Session
from ui.page import Page, UiError, describe_error
from ui.text import LATEX_DELIMITERS, fenced, plain, to_markdown
from ui.turns import Sample
from ui.view import View, menu, show_progress, status_line

NO_RUN = "No model has been trained yet, so both sides are the bundled model. Start the first run here. It takes a few minutes."
REASONING_TAGS = [("&lt;think>", "&lt;/think>")]  # as `to_markdown` escapes them
NUM_EXAMPLES = 4
# The browser keeps an ID for the tab, so that a reload finds the chat again.
TAB_ID = """() => {
    sessionStorage.ponder_tab ??= Array.from(crypto.getRandomValues(new Uint8Array(16)), b => b.toString(16)).join('')
    return [sessionStorage.ponder_tab, null]
}"""


# --- rendering


def message(role: str, text: str, title: str | None = None) -> dict:
    """Build a message for gr.Chatbot. A message with a title is folded."""
    return {"role": role, "content": text or " ", "metadata": {"title": title, "status": "done"} if title else {}}


def chat_messages(session: Session, side: int) -> list[dict]:
    """Return the chat of a side for gr.Chatbot."""
    messages = []
    show = fenced if session.is_raw else to_markdown
    for number, round_ in enumerate(session.rounds):
        if side >= len(round_.sides):
            continue
        title = round_.title + (", in a new conversation" if round_.is_fresh and number else "")
        heading = f"*{title}*\n\n" if title else ""
        question = show(round_.question).replace("&lt;", "&#60;")  # Gradio folds REASONING_TAGS of users too
        messages.append(message("user", heading + question))
        if not round_.answers:
            messages.append(message("assistant", "*Stopped*" if round_.is_done else "*Waiting ...*"))
            continue
        answer = round_.answers[side]
        for i, sample in enumerate(answer.samples):
            if i and not answer.is_over:
                break
            text = show(sample.text)
            if answer.is_over and not session.is_raw and "&lt;think>" in text and "&lt;/think>" not in text:
                text += "&lt;/think>"  # cut off: Gradio would show that it is still thinking
            below = plain(chat.describe_sample(round_, side, sample))
            title = f"Sample {i + 1} of {len(answer.samples)}: {below}" if i else None
            messages.append(message("assistant", text, title))
            if i == 0 and round_.is_done:
                details = "" if round_.is_hidden else describe_rewards(round_, side, sample)
                messages.append(message("assistant", details or f"*{below}*", below if details else None))
        if answer.note and answer.state != "stopped":
            messages.append(message("assistant", plain(round_.note(side))))
    return messages


def describe_rewards(round_: Round, side: int, sample: Sample) -> str:
    """Return the rewards of an answer with their reasons, and the rendered prompt, as Markdown."""
    parts = []
    if sample.score:
        rows = [row for row in reward_rows(sample.score, round_.weights) if row[1] != "-" or row[-1]]
        cells = [[plain(cell[:500]) for cell in (*row[:3], row[-1])] for row in rows]
        lines = ["reward | value | weight | reason", "--|--|--|--", *map(" | ".join, cells)]
        parts.append("\n".join(lines))
    parts.append(f"Prompt as the model reads it:\n\n{fenced(round_.answers[side].prompt)}")
    return "\n\n".join(parts)


def panes(session: Session) -> dict:
    """Return both chats, and whether there is something to vote on."""
    chats = {f"{name}_chat": chat_messages(session, side) for side, name in enumerate(SIDES)}
    last = session.rounds[-1] if session.rounds else None
    return chats | {"vote_row": gr.Row(visible=bool(last and last.is_hidden and last.is_done))}


# --- handlers


def load(page: Page, tab_id: str, session: Session) -> dict:
    """Restore the chat of this browser tab, and update the models to choose from."""
    choices = chat.side_choices(page)
    selected = page.sessions.get(tab_id, session).selected or (COMPARE, BASE, chat.default_side(page))
    mode, *sides = selected
    existing = dict(choices).values()
    left, right = (side if side in existing else BASE for side in sides)
    run = chat.shared_run(page, left, right)
    page.worker.preload(run.name if run else None)
    session = chat.find_session(page, tab_id, session)  # last: a question may be asked at any time
    values = panes(session) | {"session": session, "raw": session.is_raw}
    values |= {"left": gr.Dropdown(choices, value=left), "right": gr.Dropdown(choices, value=right)}
    if session.selected:  # else the visitor may have chosen a mode already
        values["mode"] = mode
    examples = show_examples(page, mode, left, right)["left_chat"].examples
    values["left_chat"] = gr.Chatbot(values["left_chat"], examples=examples)
    return values | {"first_run": gr.Column(visible=not page.runs.names())}


def show_mode(mode: str) -> dict:
    """Hide the right side if there is one model. The labels of a blind vote do not tell which side a model is on."""
    labels = ("First model", "Second model (shuffled)") if mode == BLIND else ("Left", "Right")
    left, right = (gr.Dropdown(label=label, visible=True) for label in labels)
    if mode == SINGLE:
        left, right = gr.Dropdown(label="Model"), gr.Dropdown(visible=False)
    return {"left": left, "right": right, "right_column": gr.Column(visible=mode != SINGLE)}


def show_examples(page: Page, mode: str, left: str, right: str) -> dict:
    """Offer the first held-out questions as examples."""
    rows = []
    with contextlib.suppress(ConfigError, DataError, RunError):  # asking a question shows what is wrong
        rows = chat.held_out_rows(page, left, left if mode == SINGLE else right)[:NUM_EXAMPLES]
    return {"left_chat": gr.Chatbot(examples=[{"text": prompt_text(row["prompt"])} for row in rows])}


def ask(page: Page, session: Session, question: str, expected: str, *settings) -> Iterator[dict]:
    """Append a question to the chat, and answer it after the earlier ones. Yields the page meanwhile."""
    mode, left, right, decoding, samples, temperature, top_p, seed, max_tokens, system_prompt = settings
    options = {"max_tokens": max_tokens, "system_prompt": (system_prompt or "").strip()}
    options |= {"temperature": 0.0, "top_p": 1.0, "seed": int(seed or 0) % 2**31, "samples": 1}
    if decoding == SAMPLING:
        options |= {"temperature": float(temperature), "top_p": float(top_p), "samples": min(16, int(samples))}
    round_ = chat.add_question(page, session, mode, left, right, question, expected, **options)
    try:
        cleared = {"question": "", "expected": ""}
        while session.is_answering(before=round_) and not round_.stop.is_set():
            yield panes(session) | cleared | {"status": "Waiting for the earlier question ..."}
            cleared = {}
            time.sleep(0.1)
        begin = time.monotonic()
        if round_ not in session.rounds:  # a new chat was started
            return
        with contextlib.closing(page.worker.answer(chat.make_request(session, round_))) as updates:
            for round_.answers in updates:
                if round_ not in session.rounds:
                    break
                notes = dict.fromkeys(round_.note(i) for i, a in enumerate(round_.answers) if a.note and not a.is_over)
                yield panes(session) | cleared | {"status": "; ".join(notes) or "Answering ..."}
                cleared = {}
        yield from score(page, session, round_)
    finally:
        round_.end()
    status = chat.summary(round_, time.monotonic() - begin) if round_ in session.rounds else ""
    yield panes(session) | {"status": status}


def ask_example(page: Page, event: gr.SelectData, session: Session, *settings) -> Iterator[dict]:
    yield from ask(page, session, event.value["text"], "", *settings)


def retry(page: Page, side: int, event: gr.RetryData, session: Session, messages: list, *settings) -> Iterator[dict]:
    yield from ask_again(page, session, side, messages, event.index, None, *settings)


def edit(page: Page, side: int, event: gr.EditData, session: Session, messages: list, *settings) -> Iterator[dict]:
    yield from ask_again(page, session, side, messages, event.index, event.value, *settings)


def ask_again(page: Page, session: Session, side: int, messages: list, index, question, *settings) -> Iterator[dict]:
    """Ask a question again, or an edited one, and remove it and the later ones from the chat.

    index: position in `messages`, the Chatbot's list, which has one user message per question.
    """
    position = index[0] if isinstance(index, (list, tuple)) else index
    number = sum(m["role"] == "user" for m in messages[: position + 1]) - 1
    old = [round_ for round_ in session.rounds if side < len(round_.sides)][number]
    expected = chat.expected_answer(old.row) if old.row and not old.title else ""
    rounds = session.rounds
    session.rounds = rounds[: rounds.index(old)]
    updates = ask(page, session, question or old.question, expected, *settings)
    try:
        yield next(updates)
    except UiError:  # a setting is wrong: nothing is asked, and nothing removed
        session.rounds = rounds
        raise
    for round_ in rounds[rounds.index(old) :]:
        round_.stop.set()
    yield from updates


def score(page: Page, session: Session, round_: Round) -> Iterator[dict]:
    """Score the finished answers. Stop ends the scoring too."""
    if not round_.row:
        round_.no_verdict_reason = "To get a verdict on your own question, enter the expected answer under Settings."
        return
    if round_ not in session.rounds or not any(s.finished for a in round_.answers for s in a.samples):
        return
    round_.stop.clear()  # finished samples are scored even after Stop
    try:
        with contextlib.closing(show_progress(chat.score_round(page, round_), "Scoring")) as updates:
            for values in updates:
                if round_.stop.is_set() or round_ not in session.rounds:
                    raise RewardError("stopped")
                yield values
    except Exception as error:
        round_.no_verdict_reason = f"No verdict: {describe_error(error)}"


def stop(session: Session) -> dict:
    session.stop()
    return {"status": "Stopping ..."}


def vote(better: int | None, session: Session) -> dict:
    """Reveal the sides and count the vote. better: index of a side, or None for a tie."""
    if not session.rounds or not session.rounds[-1].is_hidden:
        raise UiError("There is nothing to vote on. Choose the blind vote and ask a question.")
    names = session.rounds[-1].names
    session.votes["neither" if better is None else names[better]] += 1
    session.reveal()
    tally = ", ".join(f"{name} {n}" for name, n in session.votes.most_common())
    return panes(session) | {"status": f"Left was {names[0]}, right was {names[1]}. Votes: {tally}."}


def new_chat(session: Session) -> dict:
    session.stop()
    session.rounds = []
    return panes(session) | {"download": gr.File(visible=False)}


def show_raw(session: Session, is_raw: bool) -> dict:
    session.is_raw = is_raw
    return panes(session)


def show_decoding(decoding: str) -> dict:
    return {"sampling": gr.Row(visible=decoding == SAMPLING)}


def load_question(page: Page, mode: str, left, right, number: float | None) -> dict:
    """Put a held-out question into the question field; a random one if there is no number."""
    question, number = chat.held_out_question(page, mode, left, right, number)
    return {"question": question, "number": number}


def download(session: Session) -> dict:
    return {"download": gr.File(chat.write_downloads(session), visible=True)}


# --- the layout


def build(page: Page) -> View:
    view = View(session=gr.State(Session()), tab_id=gr.Textbox(label="Browser tab", visible=False))
    with gr.Column(visible=not page.runs.names()) as view["first_run"]:
        if page.editable:
            gr.Markdown(NO_RUN)
            launch.build_form(page, Context.root_block.load, is_first_run=True)
    with gr.Row():
        view["mode"] = gr.Dropdown([COMPARE, BLIND, SINGLE], value=COMPARE, label="Mode", min_width=90)
        for name in SIDES:
            view[name] = menu(name.title(), [BASE], BASE, min_width=90)
    with gr.Row(elem_id="chats"):
        for name in SIDES:
            with gr.Column(min_width=300) as view[f"{name}_column"]:
                view[f"{name}_chat"] = gr.Chatbot(
                    label=name.title(),
                    elem_id=f"{name}-chat",
                    elem_classes="chat",
                    height="46vh",
                    layout="panel",
                    buttons=["copy"],
                    editable="user",
                    latex_delimiters=LATEX_DELIMITERS,
                    reasoning_tags=REASONING_TAGS,
                    allow_tags=False,
                    placeholder="Ask a question below." if name == "right" else "Ask a question, or choose one:",
                )
    with gr.Row(visible=False) as view["vote_row"]:
        vote_buttons = [gr.Button(text) for text in ("Left is better", "Neither is better", "Right is better")]
    view["question"] = gr.Textbox(
        label="Question", placeholder="Ask a question", max_lines=6, submit_btn=True, stop_btn=True, elem_id="question"
    )
    view["status"] = status_line()
    with gr.Row():
        view["number"] = gr.Number(1, label="Held-out question", precision=0, min_width=110)
        number_button = gr.Button("Load this one", min_width=110)
        random_button = gr.Button("Load a random one", min_width=110)
        new_chat_button = gr.Button("New chat", min_width=110)
        download_button = gr.Button("Download", min_width=110)
    view["download"] = gr.File(label="The chat as Markdown and JSONL", visible=False, interactive=False)
    with gr.Accordion("Settings", open=False):
        view["decoding"] = gr.Radio([GREEDY, SAMPLING], value=GREEDY, label="Answers")
        with gr.Row(visible=False) as view["sampling"]:
            view["samples"] = gr.Slider(1, 16, value=8, step=1, label="Samples of each model")
            view["temperature"] = gr.Slider(0.05, 2.0, value=1.0, step=0.05, label="Temperature")
            view["top_p"] = gr.Slider(0.05, 1.0, value=1.0, step=0.05, label="top_p (1: off)")
            view["seed"] = gr.Number(0, label="Seed", precision=0)
        with gr.Row():
            view["expected"] = gr.Textbox(label="Expected answer to your own question (needed for a verdict)")
            view["max_tokens"] = gr.Number(0, label="Maximum answer length in tokens (0: as in training)", precision=0)
        view["system_prompt"] = gr.Textbox(label="System prompt (empty: as in training)", lines=2)
        view["raw"] = gr.Checkbox(label="Raw text: show answers exactly as the model wrote them")

    settings = "mode left right decoding samples temperature top_p seed max_tokens system_prompt"
    many = {"trigger_mode": "multiple", "concurrency_limit": None}  # a question asked during an answer waits
    view.on(view["question"].submit, partial(ask, page), f"session question expected {settings}", **many)
    view.on(view["left_chat"].example_select, partial(ask_example, page), f"session {settings}", **many)
    for side, name in enumerate(SIDES):
        for again in (retry, edit):
            inputs = f"session {name}_chat {settings}"
            event = getattr(view[f"{name}_chat"], again.__name__)
            view.on(event, partial(again, page, side), inputs, api_name=f"{again.__name__}_{name}", **many)
    loaded = view.on(Context.root_block.load, partial(load, page), "tab_id session", js=TAB_ID)
    view.on(loaded.then, show_mode, "mode", api_visibility="private")
    view.on(view["question"].stop, stop, "session", queue=False)
    view.on([new_chat_button.click, *(view[f"{name}_chat"].clear for name in SIDES)], new_chat, "session")
    view.on(download_button.click, download, "session")
    view.on(view["raw"].input, show_raw, "session raw")
    view.on(view["mode"].input, show_mode, "mode")
    menus = [view[name].input for name in ("mode", "left", "right")]
    view.on(menus, partial(show_examples, page), "mode left right")
    view.on(view["decoding"].input, show_decoding, "decoding")
    view.on([number_button.click, view["number"].submit], partial(load_question, page), "mode left right number")
    view.on(
        random_button.click, partial(load_question, page, number=None), "mode left right", api_name="random_question"
    )
    for button, better in zip(vote_buttons, (0, None, 1)):
        view.on(button.click, partial(vote, better), "session", api_name=f"vote_{better}")
    return view
