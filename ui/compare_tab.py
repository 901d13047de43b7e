"""The Compare tab (two models side by side) and the What changed tab (held-out questions before and after training).

Model output is always shown as plain text: it is escaped for components that would render it as HTML. The chat logic is
in ui/chat.py.
"""

import html
import time
from collections import Counter
from collections.abc import Iterator

import gradio as gr
from gradio.context import Context

from grading.base import first_line
from rl.run.report import transcript
from ui import chat
from ui.chat import BASE, SIDES, Session, cut
from ui.runs import Page, UiError, shows_errors

NO_RUN = (
    "There is no run yet: both sides are the bundled tiny model before training. Run `make train` to train it (about "
    "two minutes)."
)
CHANGES = {"fixed": (False, True), "broken": (True, False), "both right": (True, True), "both wrong": (False, False)}
ALL = "all"
INTERNAL = {"show_progress": "hidden", "api_visibility": "private"}  # options of events that are not part of the API


# --- rendering


def escape_text(text: str) -> str:
    """Escape a text for HTML, keeping its line breaks and spaces."""
    return html.escape(cut(text)).replace("\n", "<br>").replace("  ", "&nbsp; ")


def message(role: str, text: str, title: str | None = None, status: str = "done") -> dict:
    """Build a message for gr.Chatbot. A message with a title is collapsible."""
    metadata = {"title": title, "status": status} if title else {}
    return {"role": role, "content": [{"type": "text", "text": escape_text(text)}], "metadata": metadata}


def answer_messages(text: str, is_over: bool) -> list[dict]:
    """Split an answer into messages: the thinking, which collapses once it is complete, and the rest."""
    messages, rest = [], text
    if text.lstrip().startswith("<think>"):
        thinking, closed, rest = text.lstrip()[len("<think>") :].partition("</think>")
        title = "Thinking" if closed or not is_over else "Thinking (unfinished)"
        messages = [message("assistant", thinking.strip() or " ", title, "done" if closed or is_over else "pending")]
    return messages + ([message("assistant", rest.strip())] if rest.strip() else [])


def chat_messages(session: Session, side: int) -> list[dict]:
    """Return the chat of a side for gr.Chatbot."""
    messages = []
    for round_ in session.rounds:
        messages.append(message("user", round_.question))
        if not round_.answers:
            continue
        answer = round_.answers[side]
        for number, sample in enumerate(answer.samples, 1):
            if number == 1:
                messages += answer_messages(sample.text, sample.finished or answer.is_over)
            elif answer.is_over:
                title = f"Sample {number} of {len(answer.samples)}"
                if not round_.is_hidden:
                    title += f": {escape_text(chat.verdict(sample, round_.request.max_tokens))}"
                messages.append(message("assistant", sample.text or " ", title))
        if answer.note and answer.state != "stopped":
            messages.append(message("assistant", answer.note))
        elif answer.state == "answering" and round_.request.samples > 1:
            finished = sum(sample.finished for sample in answer.samples)
            messages.append(message("assistant", f"({finished} of {round_.request.samples} samples finished)"))
    return messages


def panes(session: Session) -> list:
    """Return both chats, and the verdicts and reward tables of the last answers."""
    last = session.rounds[-1] if session.rounds else None
    chats = []
    for side, label in enumerate(map(str.title, SIDES)):
        name = f": {'hidden' if last.is_hidden else last.names[side]}" if last else ""
        chats.append(gr.Chatbot(chat_messages(session, side), label=label + name))
    if not last or last.is_hidden or not last.is_done:
        return [*chats, "", "", [], []]
    results = [render(last, answer) for render in (chat.verdict_text, chat.reward_table) for answer in last.answers]
    return [*chats, *results]


def answer(page: Page, session: Session, *inputs) -> Iterator[list]:
    """Send the question to both models and yield the page while they answer, then with the verdicts.

    Outputs: `panes`, status, row of vote buttons, question, expected answer.
    """

    def progress(status: str) -> list:
        return [*panes(session), status, gr.skip(), gr.skip(), gr.skip()]

    question, expected = inputs[3:5]
    session.unanswered = ""
    round_ = chat.start_round(page, session, *inputs)
    start = time.monotonic()
    yield [*panes(session), "Sending ...", gr.Row(visible=False), "", gr.skip()]
    for answers in page.worker.answer(round_.request):
        round_.answers = answers
        if round_ not in session.rounds:  # a new chat was started
            return
        notes = dict.fromkeys(a.note for a in answers if a.note and not a.is_over)
        yield progress("; ".join(notes) or "Answering ...")
    if not any(a.samples for a in round_.answers):
        session.unanswered = question
    if all(a.state == "failed" for a in round_.answers):
        if round_.is_hidden and round_ is not session.rounds[0]:  # drop the round and keep the chat open for a vote
            session.rounds.remove(round_)
            status = f"Failed: {round_.answers[0].note}"
            yield [*panes(session), status, gr.Row(visible=True), gr.skip(), gr.skip()]
            return
        round_.is_hidden = False
    if not round_.row:
        round_.no_verdict_reason = "To get a verdict on your own question, enter the expected answer under Settings."
    elif any(sample.finished for a in round_.answers for sample in a.samples):
        yield progress("Scoring ...")
        round_.request.stop.clear()  # finished samples are scored even after Stop; a second Stop ends the scoring
        try:
            if round_ in session.rounds:
                chat.score_round(page, round_)
        except Exception as error:
            round_.no_verdict_reason = f"No verdict: {first_line(error)}"
        if round_ not in session.rounds:
            return
    round_.is_done = True
    status = chat.summary(round_, time.monotonic() - start)
    yield [*panes(session), status, gr.Row(visible=round_.is_hidden), gr.skip(), expected if session.unanswered else ""]


def restore_question(session: Session, question: str) -> str:
    """Return the text for the question field: an unanswered question, unless the user has typed another one."""
    return question or session.unanswered


def vote(better: int | None, session: Session) -> tuple:
    """Reveal the sides and count the vote. better: index of a side, or None for a tie.

    Outputs: `panes`, row of vote buttons, status.
    """
    if not session.rounds or not session.rounds[-1].is_hidden:
        raise UiError("There is nothing to vote on. Select Blind under Settings and ask a question.")
    names = session.rounds[-1].names
    session.votes["neither" if better is None else names[better]] += 1
    for round_ in session.rounds:
        round_.is_hidden = False
    tally = ", ".join(f"{name} {n}" for name, n in session.votes.most_common())
    status = f"Left was {names[0]}, right was {names[1]}. Votes: {tally}."
    return *panes(session), gr.Row(visible=False), status


def new_chat(session: Session) -> list:
    chat.stop(session)
    session.rounds = []
    session.is_swapped = None
    return [*panes(session), "", gr.Row(visible=False), "", ""]


def update_downloads(session: Session) -> list:
    return [gr.DownloadButton(value=file, interactive=file is not None) for file in chat.write_downloads(session)]


# --- the Compare tab


def refresh(page: Page, old_values: list[str], left, right) -> tuple:
    """Update the choices of both sides and keep the selection. Outputs: their values, note, left, right."""
    choices = chat.side_choices(page)
    values = [value for _, value in choices]
    left = left if left in values else BASE
    if right not in values or old_values == [BASE]:
        right = values[:2][-1]  # the newest checkpoint, if there is one
    run = chat.shared_run(page, left, right)
    page.worker.preload(run.name if run else None)
    note = gr.Markdown(visible=not page.runs.names())
    return values, note, gr.Dropdown(choices, value=left), gr.Dropdown(choices, value=right)


def text_line(label: str, name: str) -> gr.Textbox:
    """Create a read-only line of text without a frame."""
    return gr.Textbox(
        label=label, placeholder=label, elem_id=name, interactive=False, max_lines=3, show_label=False, container=False
    )


def build(page: Page) -> None:
    with gr.Tab("Compare") as tab:
        session = gr.State(Session())
        values = gr.State([BASE])
        note = gr.Markdown(NO_RUN, visible=not page.runs.names())
        sides, chatbots, verdicts = [], [], []
        with gr.Row():
            for side in SIDES:
                with gr.Column(min_width=320):
                    label = f"{side.title()}: base model or checkpoint"
                    sides.append(gr.Dropdown([BASE], value=BASE, label=label, allow_custom_value=True))
                    options = {"height": 300, "render_markdown": False, "buttons": []}
                    chatbots.append(gr.Chatbot(label=side.title(), elem_id=f"{side}-chat", **options))
                    verdicts.append(text_line(f"{side.title()} verdict", f"{side}-verdict"))
        with gr.Row(visible=False) as vote_row:
            vote_buttons = [gr.Button(text) for text in ("Left is better", "Neither is better", "Right is better")]
        placeholder = "Type a question, or load a held-out one below"
        question = gr.Textbox(label="Question", lines=1, max_lines=6, placeholder=placeholder)
        with gr.Row():
            ask_button = gr.Button("Ask both", variant="primary")
            stop_button = gr.Button("Stop")
            new_chat_button = gr.Button("New chat")
        status = text_line("Status", "status")
        with gr.Row():
            number = gr.Number(1, label="Held-out question number", precision=0)
            load_button = gr.Button("Load this question")
            random_button = gr.Button("Load a random question")
        with gr.Accordion("Rewards and reasons"), gr.Row():
            headers = ["#", "reward", "value", "weight", "reason"]
            options = {"datatype": "str", "interactive": False, "wrap": True, "min_width": 320}
            options["column_widths"] = ["45px", "130px", "70px", "75px", "235px"]
            tables = [gr.Dataframe(headers=headers, label=f"{side.title()} rewards", **options) for side in SIDES]
        with gr.Accordion("Settings", open=False):
            blind = gr.Checkbox(label="Blind: shuffle the sides and hide the names of the models until you vote")
            expected = gr.Textbox(label="Expected answer to your own question (optional, needed for a verdict)")
            greedy = gr.Checkbox(True, label="Greedy: always pick the most likely token (one sample per side)")
            samples = gr.Slider(1, 16, value=1, step=1, label="Samples per side (if not greedy)")
            temperature = gr.Slider(0.05, 2.0, value=1.0, step=0.05, label="Temperature (if not greedy)")
            top_p = gr.Slider(0.05, 1.0, value=1.0, step=0.05, label="top_p (if not greedy; 1 = off)")
            seed = gr.Number(0, label="Seed", precision=0)
            max_tokens = gr.Number(0, label="Maximum answer length in tokens (0 = as in training)", precision=0)
        with gr.Row():
            files = [gr.DownloadButton(f"Download as {kind}", interactive=False) for kind in ("Markdown", "JSONL")]

    views = [*chatbots, *verdicts, *tables]
    outputs = [*views, status, vote_row, question, expected]
    inputs = [session, *sides, blind, question, expected, greedy, temperature, top_p, seed, max_tokens, samples]
    triggers = [ask_button.click, question.submit]
    event = gr.on(triggers, shows_errors(answer, page), inputs, outputs, show_progress="hidden", api_name="ask")
    event.then(shows_errors(restore_question), [session, question], question, **INTERNAL)
    event.then(shows_errors(update_downloads), session, files, show_progress="hidden", api_name="files")
    stop_button.click(shows_errors(chat.stop), session, None, queue=False, api_name="stop")
    triggers = [new_chat_button.click, *(chatbot.clear for chatbot in chatbots)]
    gr.on(triggers, shows_errors(new_chat), session, outputs, api_name="new_chat")
    fields = [question, number]
    load_button.click(shows_errors(chat.load_held_out, page), [session, *sides, number], fields, api_name="held_out")
    random_button.click(shows_errors(chat.random_held_out, page), [session, *sides], fields, api_name="random_held_out")
    for button, better in zip(vote_buttons, (0, None, 1)):
        event = button.click(shows_errors(vote, better), session, [*views, vote_row, status], api_name=f"vote_{better}")
        event.then(shows_errors(update_downloads), session, files, **INTERNAL)
    triggers = [tab.select, Context.root_block.load]
    gr.on(triggers, shows_errors(refresh, page), [values, *sides], [values, note, *sides], **INTERNAL)
    build_changes(page)


# --- the What changed tab


def pair_records(page: Page, name: str, before: str, after: str) -> list[tuple[int, str, dict, dict]]:
    """Return (number, key of CHANGES, record before, record after) of each question in both evaluations."""
    first, second = ({record["id"]: record for record in page.runs.get(name).evaluation(e)} for e in (before, after))
    pairs = [(record, second[key]) for key, record in first.items() if key in second]
    labels = {verdicts: label for label, verdicts in CHANGES.items()}
    return [(n, labels[b["verdict"] == "right", a["verdict"] == "right"], b, a) for n, (b, a) in enumerate(pairs, 1)]


def choose(page: Page, name, before, after, which) -> tuple:
    """Update the choices and keep the selection. Outputs: run, both evaluations, and the outputs of `show_changes`."""
    names = page.runs.names()
    name = name if name in names else next(iter(names), None)
    evaluations = page.runs.get(name).evaluations() if name else []
    before = before if before in evaluations else next(iter(evaluations), None)
    after = after if after in evaluations else next(reversed(evaluations), None)
    menus = (gr.Dropdown(names, value=name), *(gr.Dropdown(evaluations, value=value) for value in (before, after)))
    return *menus, *show_changes(page, name, before, after, which)


def show_changes(page: Page, name, before, after, which) -> tuple:
    """Compare two evaluations. Outputs: summary, filter, table, and empty fields for question and answers."""
    empty = gr.skip(), [], "", "", ""
    if not (name and before and after):
        return "There is no evaluation yet. A run writes the first one before its first step.", *empty
    pairs = pair_records(page, name, before, after)
    if not pairs:
        return "The two evaluations have no question in common. Choose others.", *empty
    counts = Counter(change for _, change, _, _ in pairs)
    verdicts = [Counter(record["verdict"] for record in records) for records in list(zip(*pairs))[2:]]
    rates = " -> ".join(chat.format_accuracy(count["right"], len(pairs)) for count in verdicts)
    text = ", ".join(f"{counts[c]} {c}" for c in CHANGES) + f" ({len(pairs)} questions). {before} -> {after}: {rates}."
    ungraded = [count["ungraded"] for count in verdicts]
    if any(ungraded):
        text += f" Ungraded (counted as wrong): {ungraded[0]} before, {ungraded[1]} after."
    rows = []
    for n, change, b, a in pairs:
        if which in (ALL, change):
            # The last characters of a completion contain its result.
            endings = [f"{r['verdict']}: {r['completion'].strip()[-60:]}" for r in (b, a)]
            rows.append([n, change, b["task"], cut(b["question"], 200), *endings, cut(str(b["expected"]), 100)])
    filters = [(f"all ({len(pairs)})", ALL), *((f"{change} ({counts[change]})", change) for change in CHANGES)]
    return text, gr.Radio(filters, value=which), rows, "", "", ""


def open_question(page: Page, name, before, after, event: gr.SelectData) -> tuple[str, str, str]:
    """Show both answers to the question in the selected row. Outputs: question, before, after."""
    number, change, first, second = pair_records(page, name, before, after)[int(event.row_value[0]) - 1]
    question = f"{number} ({change}): {cut(first['question'])}\nExpected: {cut(str(first['expected']))}"
    return question, format_record(first), format_record(second)


def format_record(record: dict) -> str:
    """Format an evaluation record: verdict, rewards with reasons, and completion."""
    finish = "cut off" if record["finish_reason"] == "length" else "finished"
    lines = [f"{record['verdict']}, reward {record['reward']}, {record['tokens']} tokens, {finish}"]
    for name, value in record["rewards"].items():
        reason = record["reasons"].get(name, "")
        if value is not None or reason:
            lines.append(f"{name} {value if value is None else format(value, 'g')} {reason}".rstrip())
    return "\n".join([*lines, "", cut(transcript(record))])


def build_changes(page: Page) -> None:
    with gr.Tab("What changed") as tab:
        with gr.Row():
            run = gr.Dropdown([], label="Run", allow_custom_value=True)
            evals = [
                gr.Dropdown([], label=f"{end}: evaluation", allow_custom_value=True) for end in ("Before", "After")
            ]
        summary = gr.Textbox(label="Held-out questions", interactive=False, lines=2, elem_id="changes")
        which = gr.Radio([ALL, *CHANGES], value=ALL, label="Show")
        table = gr.Dataframe(
            headers=["#", "change", "task", "question", "before", "after", "expected"],
            column_widths=["50px", "105px", "85px", "300px", "265px", "265px", "100px"],
            label="Questions (click one to read both answers)",
            datatype="str",
            interactive=False,
            wrap=True,
            max_height=420,
            elem_id="changed-table",
        )
        question = gr.Textbox(label="Question", interactive=False, lines=2, elem_id="changed-question")
        with gr.Row():
            texts = [
                gr.Textbox(label=label, interactive=False, lines=10, max_lines=30) for label in ("Before", "After")
            ]
    outputs = [run, *evals, summary, which, table, question, *texts]
    triggers = [tab.select, run.input, *(e.input for e in evals), which.input]
    inputs = [run, *evals, which]
    gr.on(triggers, shows_errors(choose, page), inputs, outputs, show_progress="hidden", api_name="changed")
    table.select(shows_errors(open_question, page), [run, *evals], [question, *texts], **INTERNAL)
