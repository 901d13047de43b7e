"""The tabs Compare (one question to two models, side by side) and What changed (the held-out questions before and after).

Everything that a model wrote is shown as text: it is escaped where a component would take it for HTML. The chat itself is
in ui/chat.py.
"""

import html
import time
from collections import Counter
from collections.abc import Iterator

import gradio as gr
from gradio.context import Context

from grading.base import first_line
from ui import chat
from ui.chat import BASE, SIDES, Session, cut
from ui.runs import Page, UiError, shows_errors

NO_RUN = (
    "There is no run yet, so both sides are the bundled tiny model as it was before any training. To train it, in about two "
    "minutes: `make train`."
)
CHANGES = {"fixed": (False, True), "broke": (True, False), "both right": (True, True), "both wrong": (False, False)}
ALL = "all"
QUIET = {"show_progress": "hidden", "api_visibility": "private"}  # options of an event


# --- what is shown


def as_text(text: str) -> str:
    """HTML that shows a text as it is, whatever it contains."""
    return html.escape(cut(text)).replace("\n", "<br>").replace("  ", "&nbsp; ")


def message(role: str, text: str, title: str | None = None, status: str = "done") -> dict:
    """A message for gr.Chatbot; one with a title folds."""
    metadata = {"title": title, "status": status} if title else {}
    return {"role": role, "content": [{"type": "text", "text": as_text(text)}], "metadata": metadata}


def bubbles(text: str, over: bool) -> list[dict]:
    """The messages of an answer: the thinking, which folds when it is over, and the rest."""
    shown, rest = [], text
    if text.lstrip().startswith("<think>"):
        thinking, closed, rest = text.lstrip()[len("<think>") :].partition("</think>")
        title = "Thinking" if closed or not over else "Thinking (never ended)"
        shown = [message("assistant", thinking.strip() or " ", title, "done" if closed or over else "pending")]
    return shown + ([message("assistant", rest.strip())] if rest.strip() else [])


def messages(session: Session, side: int) -> list[dict]:
    """The chat of a side for gr.Chatbot."""
    shown = []
    for round_ in session.rounds:
        shown.append(message("user", round_.question))
        if not round_.answers:
            continue
        answer = round_.answers[side]
        for number, sample in enumerate(answer.samples, 1):
            if number == 1:
                shown += bubbles(sample.text, sample.ended or answer.over)
            elif answer.over:
                title = f"Sample {number} of {len(answer.samples)}"
                if not round_.hidden:
                    title += f": {as_text(chat.verdict(sample, round_.ask.max_tokens))}"
                shown.append(message("assistant", sample.text or " ", title))
        if answer.note and answer.state != "stopped":
            shown.append(message("assistant", answer.note))
        elif answer.state == "answering" and round_.ask.samples > 1:
            ended = sum(sample.ended for sample in answer.samples)
            shown.append(message("assistant", f"({ended} of {round_.ask.samples} samples have ended)"))
    return shown


def panes(session: Session) -> list:
    """Both chats, and below them the verdicts and the tables of rewards of the last answers."""
    last = session.rounds[-1] if session.rounds else None
    chats = []
    for side, label in enumerate(map(str.title, SIDES)):
        name = f": {'hidden' if last.hidden else last.names[side]}" if last else ""
        chats.append(gr.Chatbot(messages(session, side), label=label + name))
    if not last or last.hidden or not last.done:
        return [*chats, "", "", [], []]
    below = [function(last, answer) for function in (chat.verdict_text, chat.reward_table) for answer in last.answers]
    return [*chats, *below]


def answer(page: Page, session: Session, *asked) -> Iterator[list]:
    """Put the question and yield both sides as they grow; then the verdicts.

    Outputs: `panes`, status, the row of the vote, question, expected answer.
    """

    def progress(status: str) -> list:
        return [*panes(session), status, gr.skip(), gr.skip(), gr.skip()]

    question, expected = asked[3:5]
    session.unanswered = ""
    round_ = chat.begin(page, session, *asked)
    started = time.monotonic()
    yield [*panes(session), "asks ...", gr.Row(visible=False), "", gr.skip()]
    for answers in page.worker.answer(round_.ask):
        round_.answers = answers
        if round_ not in session.rounds:  # a new chat was started
            return
        notes = dict.fromkeys(a.note for a in answers if a.note and not a.over)
        yield progress("; ".join(notes) or "answering ...")
    if not any(a.samples for a in round_.answers):
        session.unanswered = question
    if all(a.state == "failed" for a in round_.answers):
        if round_.hidden and round_ is not session.rounds[0]:  # the chat is as before, with its vote to come
            session.rounds.remove(round_)
            status = f"Failed: {round_.answers[0].note}"
            yield [*panes(session), status, gr.Row(visible=True), gr.skip(), gr.skip()]
            return
        round_.hidden = False
    if not round_.row:
        round_.unjudged = "Your own question: give the expected answer (under Settings) and it gets a verdict."
    elif any(sample.ended for a in round_.answers for sample in a.samples):
        yield progress("the reward functions judge ...")
        round_.ask.stop.clear()  # what has ended is judged; another Stop ends that too
        try:
            if round_ in session.rounds:
                chat.judge(page, round_)
        except Exception as error:
            round_.unjudged = f"No verdict: {first_line(error)}"
        if round_ not in session.rounds:
            return
    round_.done = True
    status = chat.summary(round_, time.monotonic() - started)
    yield [*panes(session), status, gr.Row(visible=round_.hidden), gr.skip(), expected if session.unanswered else ""]


def put_back(session: Session, question: str) -> str:
    """The question field: a question that was not answered is put back if nothing else has been written."""
    return question or session.unanswered


def vote(better: int | None, session: Session) -> tuple:
    """Reveal the sides and count the vote. better: a side, None for a tie. Outputs: `panes`, the row of the vote, status."""
    if not session.rounds or not session.rounds[-1].hidden:
        raise UiError("There is nothing to vote on. Tick Blind and ask a question.")
    names = session.rounds[-1].names
    session.votes["neither" if better is None else names[better]] += 1
    for round_ in session.rounds:
        round_.hidden = False
    tally = ", ".join(f"{name} {n}" for name, n in session.votes.most_common())
    status = f"Left was {names[0]}, right was {names[1]}. Votes for: {tally}."
    return *panes(session), gr.Row(visible=False), status


def new_chat(session: Session) -> list:
    chat.stop(session)
    session.rounds = []
    session.swapped = None
    return [*panes(session), "", gr.Row(visible=False), "", ""]


def downloads(session: Session) -> list:
    return [gr.DownloadButton(value=file, interactive=file is not None) for file in chat.files(session)]


# --- the tab Compare


def refresh(page: Page, known: list[str], left, right) -> tuple:
    """The sides that can be chosen; a choice stays. Outputs: their values, the note, left, right."""
    choices = chat.choices(page)
    values = [value for _, value in choices]
    left = left if left in values else BASE
    if right not in values or known == [BASE]:
        right = values[:2][-1]  # the newest checkpoint, if there is any
    home = chat.home_of(page, left, right)
    page.worker.load_ahead(home.name if home else None)
    no_run = gr.Markdown(visible=not page.runs.names())
    return values, no_run, gr.Dropdown(choices, value=left), gr.Dropdown(choices, value=right)


def line(label: str, name: str) -> gr.Textbox:
    """A line of text without a frame."""
    return gr.Textbox(
        label=label, placeholder=label, elem_id=name, interactive=False, max_lines=3, show_label=False, container=False
    )


def build(page: Page) -> None:
    with gr.Tab("Compare") as tab:
        session = gr.State(Session())
        known = gr.State([BASE])
        note = gr.Markdown(NO_RUN, visible=not page.runs.names())
        sides, chatbots, verdicts = [], [], []
        with gr.Row():
            for side in SIDES:
                with gr.Column(min_width=320):
                    label = f"{side.title()}: base model, or run and checkpoint"
                    sides.append(gr.Dropdown([BASE], value=BASE, label=label, allow_custom_value=True))
                    options = {"height": 300, "render_markdown": False, "buttons": []}
                    chatbots.append(gr.Chatbot(label=side.title(), elem_id=f"{side}-chat", **options))
                    verdicts.append(line(f"{side.title()}: verdict", f"{side}-verdict"))
        with gr.Row(visible=False) as voting:
            votes = [gr.Button(text) for text in ("Left is better", "Neither is better", "Right is better")]
        placeholder = "Ask both, or take a held-out question"
        question = gr.Textbox(label="Question", lines=1, max_lines=6, placeholder=placeholder)
        with gr.Row():
            ask, end, anew = gr.Button("Ask both", variant="primary"), gr.Button("Stop"), gr.Button("New chat")
        status = line("What happens", "status")
        with gr.Row():
            number = gr.Number(1, label="Held-out question, by its number", precision=0)
            take, draw = gr.Button("Take this held-out question"), gr.Button("Take one at random")
        with gr.Accordion("Rewards, and why"), gr.Row():
            headers = ["no.", "reward", "value", "weight", "why"]
            options = {"datatype": "str", "interactive": False, "wrap": True, "min_width": 320}
            options["column_widths"] = ["45px", "130px", "70px", "75px", "235px"]
            tables = [gr.Dataframe(headers=headers, label=f"{side.title()}: rewards", **options) for side in SIDES]
        with gr.Accordion("Settings", open=False):
            blind = gr.Checkbox(label="Blind: which side is which is drawn by chance, and shown when you have voted")
            expected = gr.Textbox(label="Expected answer to a question of your own (optional: gives it a verdict)")
            greedy = gr.Checkbox(True, label="Greedy: always the likeliest token; one sample a side")
            samples = gr.Slider(1, 16, value=1, step=1, label="Samples a side, when not greedy")
            temperature = gr.Slider(0.05, 2.0, value=1.0, step=0.05, label="Temperature, when not greedy")
            top_p = gr.Slider(0.05, 1.0, value=1.0, step=0.05, label="top_p, when not greedy (1 is off)")
            seed = gr.Number(0, label="Seed", precision=0)
            longest = gr.Number(0, label="Longest answer in tokens (0: as in training)", precision=0)
        with gr.Row():
            files = [gr.DownloadButton(f"Download as {kind}", interactive=False) for kind in ("Markdown", "JSONL")]

    shown = [*chatbots, *verdicts, *tables]
    outputs = [*shown, status, voting, question, expected]
    inputs = [session, *sides, blind, question, expected, greedy, temperature, top_p, seed, longest, samples]
    asking = [ask.click, question.submit]
    asked = gr.on(asking, shows_errors(answer, page), inputs, outputs, show_progress="hidden", api_name="ask")
    asked.then(shows_errors(put_back), [session, question], question, **QUIET)
    asked.then(shows_errors(downloads), session, files, show_progress="hidden", api_name="files")
    end.click(shows_errors(chat.stop), session, None, queue=False, api_name="stop")
    clearing = [anew.click, *(chatbot.clear for chatbot in chatbots)]
    gr.on(clearing, shows_errors(new_chat), session, outputs, api_name="new_chat")
    held_out = [question, number]
    take.click(shows_errors(chat.take_held_out, page), [session, *sides, number], held_out, api_name="held_out")
    draw.click(shows_errors(chat.draw_held_out, page), [session, *sides], held_out, api_name="random_held_out")
    for button, better in zip(votes, (0, None, 1)):
        voted = button.click(shows_errors(vote, better), session, [*shown, voting, status], api_name=f"vote_{better}")
        voted.then(shows_errors(downloads), session, files, **QUIET)
    loading = [tab.select, Context.root_block.load]
    gr.on(loading, shows_errors(refresh, page), [known, *sides], [known, note, *sides], **QUIET)
    build_changes(page)


# --- the tab What changed


def paired(page: Page, name: str, before: str, after: str) -> list[tuple[int, str, dict, dict]]:
    """(number, one of CHANGES, record before, record after) of each question that is in both evaluations."""
    first, second = ({record["id"]: record for record in page.runs.get(name).evaluation(e)} for e in (before, after))
    pairs = [(record, second[key]) for key, record in first.items() if key in second]
    words = {change: word for word, change in CHANGES.items()}
    return [(n, words[b["verdict"] == "right", a["verdict"] == "right"], b, a) for n, (b, a) in enumerate(pairs, 1)]


def choose(page: Page, name, before, after, which) -> tuple:
    """The runs and evaluations, of which a choice stays if it is among them, and the rest of the tab."""
    names = page.runs.names()
    name = name if name in names else next(iter(names), None)
    evaluations = page.runs.get(name).evaluations() if name else []
    before = before if before in evaluations else next(iter(evaluations), None)
    after = after if after in evaluations else next(reversed(evaluations), None)
    chosen = (gr.Dropdown(names, value=name), *(gr.Dropdown(evaluations, value=end) for end in (before, after)))
    return *chosen, *changed(page, name, before, after, which)


def changed(page: Page, name, before, after, which) -> tuple:
    """Outputs: the counts in words, the filter, the table, and empty boxes for one question."""
    nothing = gr.skip(), [], "", "", ""
    if not (name and before and after):
        return "There is no evaluation yet: a run writes the first one before its first step.", *nothing
    pairs = paired(page, name, before, after)
    if not pairs:
        return "The two evaluations have no question in common.", *nothing
    counts = Counter(change for _, change, _, _ in pairs)
    verdicts = [Counter(record["verdict"] for record in records) for records in list(zip(*pairs))[2:]]
    rates = " -> ".join(chat.in_percent(count["right"], len(pairs)) for count in verdicts)
    text = ", ".join(f"{counts[word]} {word}" for word in CHANGES) + f" of {len(pairs)}. {before} -> {after}: {rates}."
    ungraded = [count["ungraded"] for count in verdicts]
    if any(ungraded):
        text += f" Not graded, and counted as wrong: {ungraded[0]} before, {ungraded[1]} after."
    rows = []
    for n, change, b, a in pairs:
        if which in (ALL, change):
            ends = [
                f"{r['verdict']}: {r['completion'].strip()[-60:]}" for r in (b, a)
            ]  # an answer states its result last
            rows.append([n, change, b["task"], cut(b["question"], 200), *ends, cut(str(b["expected"]), 100)])
    filters = [(f"all ({len(pairs)})", ALL), *((f"{word} ({counts[word]})", word) for word in CHANGES)]
    return text, gr.Radio(filters, value=which), rows, "", "", ""


def open_question(page: Page, name, before, after, event: gr.SelectData) -> tuple[str, str, str]:
    """Both answers to the question in the row that was clicked. Outputs: question, before, after."""
    number, change, first, second = paired(page, name, before, after)[int(event.row_value[0]) - 1]
    question = f"{number} ({change}): {cut(first['question'])}\nExpected: {cut(str(first['expected']))}"
    return question, in_full(first), in_full(second)


def in_full(record: dict) -> str:
    """A record of an evaluation as text."""
    ended = "cut off" if record["finish_reason"] == "length" else "ended by itself"
    lines = [f"{record['verdict']}, reward {record['reward']}, {record['tokens']} tokens, {ended}"]
    for name, value in record["rewards"].items():
        reason = record["reasons"].get(name, "")
        if value is not None or reason:
            lines.append(f"{name} {value if value is None else format(value, 'g')} {reason}".rstrip())
    return "\n".join([*lines, "", cut(record["completion"])])


def build_changes(page: Page) -> None:
    with gr.Tab("What changed") as tab:
        with gr.Row():
            run = gr.Dropdown([], label="Run", allow_custom_value=True)
            ends = [gr.Dropdown([], label=f"Evaluation {end}", allow_custom_value=True) for end in ("before", "after")]
        counts = gr.Textbox(label="Held-out questions", interactive=False, lines=2, elem_id="changes")
        which = gr.Radio([ALL, *CHANGES], value=ALL, label="Show")
        table = gr.Dataframe(
            headers=["no.", "change", "task", "question", "before", "after", "expected"],
            column_widths=["50px", "105px", "85px", "300px", "265px", "265px", "100px"],
            label="Questions: click one to read both answers",
            datatype="str",
            interactive=False,
            wrap=True,
            max_height=420,
            elem_id="changed-table",
        )
        question = gr.Textbox(label="Question", interactive=False, lines=2, elem_id="changed-question")
        with gr.Row():
            both = [gr.Textbox(label=label, interactive=False, lines=10, max_lines=30) for label in ("Before", "After")]
    shown = [run, *ends, counts, which, table, question, *both]
    events = [tab.select, run.input, *(end.input for end in ends), which.input]
    inputs = [run, *ends, which]
    gr.on(events, shows_errors(choose, page), inputs, shown, show_progress="hidden", api_name="changed")
    table.select(shows_errors(open_question, page), [run, *ends], [question, *both], **QUIET)
