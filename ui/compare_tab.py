"""The tabs Compare (one question to two models, side by side) and What changed (the held-out set before and after).

Whatever a model wrote is shown as text: escaped where a component would take it for HTML. What is asked and said: ui/chat.py.
"""

import html
import time
from collections import Counter
from collections.abc import Iterator

import gradio as gr
from gradio.context import Context

from rl.config import first_line
from ui import chat
from ui.chat import BASE, SIDES, Session, cut, judged
from ui.runs import Page, UiError, shows_errors

NO_RUN = (
    "There is no run yet, so both sides are the bundled tiny model as it was before any training. To train it, in about two "
    "minutes: `make train`."
)
TABLE = {
    "headers": ["no.", "reward", "value", "weight", "why"], "column_widths": ["45px", "130px", "70px", "75px", "235px"],
    "datatype": "str", "interactive": False, "wrap": True, "min_width": 320,
}  # fmt: skip
CHANGES = {"fixed": (False, True), "broke": (True, False), "both right": (True, True), "both wrong": (False, False)}
ALL = "all"


# --- what is shown


def as_text(text: str) -> str:
    """HTML that shows the text as it is, whatever it contains."""
    return html.escape(cut(text)).replace("\n", "<br>").replace("  ", "&nbsp; ")


def bubbles(text: str, over: bool) -> list[dict]:
    """An answer's messages: the thinking, which folds when it is over, and the rest."""
    found, rest = [], text
    if text.lstrip().startswith("<think>"):
        thinking, closed, rest = text.lstrip()[len("<think>") :].partition("</think>")
        status = "done" if closed or over else "pending"
        title = "Thinking" if closed or not over else "Thinking (never ended)"
        found = [message("assistant", thinking.strip() or " ", {"title": title, "status": status})]
    return found + ([message("assistant", rest.strip())] if rest.strip() else [])


def message(role: str, text: str, metadata: dict | None = None) -> dict:
    return {"role": role, "content": [{"type": "text", "text": as_text(text)}], "metadata": metadata or {}}


def messages(session: Session, side: int) -> list[dict]:
    """A side's chat for gr.Chatbot."""
    shown = []
    for round_ in session.rounds:
        shown.append(message("user", round_.question))
        if not round_.answers:
            continue
        answer, both = round_.answers[side], judged(round_, side)
        for number, (sample, score) in enumerate(both, 1):
            if number == 1:
                shown += bubbles(sample.text, sample.ended or answer.over)
            elif answer.over:
                said_of = "" if round_.hidden else f": {as_text(chat.verdict(sample, score, round_.ask.max_tokens))}"
                title = f"Sample {number} of {len(both)}{said_of}"
                shown.append(message("assistant", sample.text or " ", {"title": title, "status": "done"}))
        ended = sum(sample.ended for sample in answer.samples)
        if answer.note and answer.state != "stopped":
            shown.append(message("assistant", answer.note))
        elif answer.state == "answering" and round_.ask.samples > 1:
            shown.append(message("assistant", f"({ended} of {round_.ask.samples} samples have ended)"))
    return shown


def panes(session: Session) -> list:
    """Both chats, and below them what is said of their last answers: verdicts and tables."""
    last, chats = session.rounds[-1] if session.rounds else None, []
    for side, label in enumerate(map(str.title, SIDES)):
        name = f": {'hidden' if last.hidden else last.names[side]}" if last else ""
        chats.append(gr.Chatbot(messages(session, side), label=label + name))
    if not (last and last.answers and all(answer.over for answer in last.answers)) or last.hidden:
        return [*chats, "", "", [], []]
    return [*chats, *(of(last, side) for of in (chat.verdict_text, chat.reward_table) for side in (0, 1))]


def answer(page: Page, session: Session, *asked) -> Iterator[list]:
    """Put the question and yield both sides as they grow; then the verdicts. Outputs: `panes`, status, vote, both fields."""
    question, expected = asked[3:5]
    session.unanswered = ""
    round_ = chat.begin(page, session, *asked)
    started, unchanged = time.monotonic(), [gr.skip()] * 4
    yield [*panes(session), "asks ...", gr.Row(visible=False), "", gr.skip()]
    for answers in page.worker.answer(round_.ask):
        round_.answers = answers
        if round_ not in session.rounds:  # a new chat has begun
            return
        notes = dict.fromkeys(a.note for a in round_.answers if a.note and not a.over)
        yield [*panes(session)[:2], *unchanged, "; ".join(notes) or "answering ...", *unchanged[:3]]
    session.unanswered = "" if any(a.samples for a in round_.answers) else question
    if all(a.state == "failed" for a in round_.answers):
        if round_.hidden and round_ is not session.rounds[0]:  # the chat is as it was: its vote is to come
            session.rounds.remove(round_)
            yield [*panes(session), f"Failed: {round_.answers[0].note}", gr.Row(visible=True), *unchanged[:2]]
            return
        round_.hidden = False
    if not round_.row:
        round_.unjudged = "Your own question: give the expected answer (under Settings) and it gets a verdict."
    elif any(sample.ended for a in round_.answers for sample in a.samples):
        yield [*panes(session)[:2], *unchanged, "the reward functions judge ...", *unchanged[:3]]
        round_.ask.stop.clear()  # those that had ended are judged; Stop once more ends that too
        try:
            if round_ not in session.rounds:
                return
            chat.judge(page, round_)
        except Exception as error:
            round_.unjudged = f"No verdict: {first_line(error)}"
        if round_ not in session.rounds:
            return
    status = chat.summary(round_, time.monotonic() - started)
    yield [*panes(session), status, gr.Row(visible=round_.hidden), gr.skip(), expected if session.unanswered else ""]


def put_back(session: Session, question: str) -> str:
    """A question that was not answered, where nothing else has been written meanwhile."""
    return question or session.unanswered


def vote(better: int | None, session: Session) -> tuple:
    """Reveal the sides and count the vote. better: a side, None for a tie. Outputs: `panes`, vote, status."""
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
    session.rounds, session.swapped = [], None
    return [*panes(session), "", gr.Row(visible=False), "", ""]


# --- the tab Compare


def line(label: str, name: str) -> gr.Textbox:
    """One line of words, without a frame and with its label inside."""
    how = {"interactive": False, "max_lines": 3, "show_label": False, "container": False}
    return gr.Textbox(label=label, placeholder=label, elem_id=name, **how)


def refresh(page: Page, known: list[str], left, right) -> tuple:
    """The sides that there are now; what was chosen stays. Outputs: the values known, note, left, right."""
    found = chat.choices(page)
    values = [value for _, value in found]
    left = left if left in values else BASE
    right = right if right in values and known != [BASE] else values[:2][-1]  # the newest one, where there is any
    home = chat.home_of(page, left, right)
    page.worker.load_ahead(home.name if home else None)
    no_run = gr.Markdown(visible=not page.runs.names())
    return values, no_run, gr.Dropdown(found, value=left), gr.Dropdown(found, value=right)


def build(page: Page) -> None:
    with gr.Tab("Compare") as tab:
        session, known = gr.State(Session()), gr.State([BASE])
        note = gr.Markdown(NO_RUN, visible=not page.runs.names())
        sides, chats, verdicts = [], [], []
        with gr.Row():
            for side in SIDES:
                with gr.Column(min_width=320):
                    label = f"{side.title()}: base model, or run and checkpoint"
                    sides.append(gr.Dropdown([BASE], value=BASE, label=label, allow_custom_value=True))
                    how = {"height": 300, "render_markdown": False, "buttons": []}
                    chats.append(gr.Chatbot(label=side.title(), elem_id=f"{side}-chat", **how))
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
            tables = [gr.Dataframe(label=f"{side.title()}: rewards", **TABLE) for side in SIDES]
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
            taken = [gr.DownloadButton(f"Download as {kind}", interactive=False) for kind in ("Markdown", "JSONL")]

    outputs = [*chats, *verdicts, *tables, status, voting, question, expected]
    asked = [session, *sides, blind, question, expected, greedy, temperature, top_p, seed, longest, samples]
    quiet = {"show_progress": "hidden", "api_visibility": "private"}
    asking = gr.on(
        [ask.click, question.submit], shows_errors(answer, page), asked, outputs, show_progress="hidden", api_name="ask"
    )
    asking.then(shows_errors(put_back), [session, question], question, **quiet)
    asking.then(shows_errors(downloads), session, taken, show_progress="hidden", api_name="files")
    end.click(shows_errors(chat.stop), session, None, queue=False, api_name="stop")
    gr.on([anew.click, *(pane.clear for pane in chats)], shows_errors(new_chat), session, outputs, api_name="new_chat")
    take.click(shows_errors(chat.put, page), [session, *sides, number], [question, number], api_name="held_out")
    draw.click(shows_errors(chat.draw, page), [session, *sides], [question, number], api_name="random_held_out")
    for button, better in zip(votes, (0, None, 1)):
        voted = button.click(
            shows_errors(vote, better), session, [*outputs[:6], voting, status], api_name=f"vote_{better}"
        )
        voted.then(shows_errors(downloads), session, taken, **quiet)
    gr.on(
        [tab.select, Context.root_block.load],
        shows_errors(refresh, page),
        [known, *sides],
        [known, note, *sides],
        **quiet,
    )
    what_changed(page)


def downloads(session: Session) -> list:
    return [gr.DownloadButton(value=file, interactive=file is not None) for file in chat.files(session)]


# --- the tab What changed


def paired(page: Page, name: str, before: str, after: str) -> list[tuple[int, str, dict, dict]]:
    """(number, which of CHANGES, record before, record after) of each question that both evaluations asked."""
    first, second = ({line["id"]: line for line in page.runs.get(name).evaluation(which)} for which in (before, after))
    words = {pair: word for word, pair in CHANGES.items()}
    pairs = [(b, second[key]) for key, b in first.items() if key in second]
    return [(n, words[b["verdict"] == "right", a["verdict"] == "right"], b, a) for n, (b, a) in enumerate(pairs, 1)]


def changed(page: Page, name, before, after, which) -> tuple:
    """Outputs: counts in words, the filter, the table, and nothing in the boxes of one question."""
    nothing = gr.skip(), [], "", "", ""
    if not (name and before and after):
        return "There is no evaluation yet: a run writes the first one before its first step.", *nothing
    pairs = paired(page, name, before, after)
    if not pairs:
        return "The two evaluations have no question in common.", *nothing
    counts = Counter(change for _, change, _, _ in pairs)
    verdicts = [Counter(record["verdict"] for record in records) for records in list(zip(*pairs))[2:]]
    shares = " -> ".join(chat.in_percent(of["right"], len(pairs)) for of in verdicts)
    text = ", ".join(f"{counts[word]} {word}" for word in CHANGES) + f" of {len(pairs)}. {before} -> {after}: {shares}."
    ungraded = [of["ungraded"] for of in verdicts]
    if any(ungraded):
        text += f" Not graded, and counted as wrong: {ungraded[0]} before, {ungraded[1]} after."
    rows = [
        [n, change, b["task"], cut(b["question"], 200), last_of(b), last_of(a), cut(str(b["expected"]), 100)]
        for n, change, b, a in pairs if which in (ALL, change)
    ]  # fmt: skip
    filters = [(f"all ({len(pairs)})", ALL), *((f"{word} ({counts[word]})", word) for word in CHANGES)]
    return text, gr.Radio(filters, value=which), rows, "", "", ""


def last_of(record: dict) -> str:
    """The end of an answer, where it states its result, with its verdict."""
    return f"{record['verdict']}: {record['completion'].strip()[-60:]}"


def opened(page: Page, name, before, after, event: gr.SelectData) -> tuple[str, str, str]:
    """Both completions of the row that was clicked. Outputs: question, before, after."""
    number = int(event.row_value[0])
    _, change, *records = paired(page, name, before, after)[number - 1]
    first = records[0]
    words = f"{number} ({change}): {cut(first['question'])}\nExpected: {cut(str(first['expected']))}"
    return words, *map(in_full, records)


def in_full(record: dict) -> str:
    """A record of an evaluation as text."""
    rewards = [
        f"{name} {value if value is None else format(value, 'g')} {record['reasons'].get(name, '')}".rstrip()
        for name, value in record["rewards"].items() if value is not None or name in record["reasons"]
    ]  # fmt: skip
    end = "cut off" if record["finish_reason"] == "length" else "ended by itself"
    head = f"{record['verdict']}, reward {record['reward']}, {record['tokens']} tokens, {end}"
    return "\n".join([head, *rewards, "", cut(record["completion"])])


def what_changed(page: Page) -> None:
    """The tab."""

    def look(name, before, after, which):
        """The runs and evaluations that there are; what was chosen stays, where it is among them."""
        names = page.runs.names()
        name = name if name in names else next(iter(names), None)
        there = page.runs.get(name).evaluations() if name else []
        before = before if before in there else next(iter(there), None)
        after = after if after in there else next(reversed(there), None)
        chosen = [gr.Dropdown(names, value=name), gr.Dropdown(there, value=before), gr.Dropdown(there, value=after)]
        return *chosen, *changed(page, name, before, after, which)

    def click(name, before, after, event: gr.SelectData):
        return opened(page, name, before, after, event)

    with gr.Tab("What changed") as tab:
        with gr.Row():
            run = gr.Dropdown([], label="Run", allow_custom_value=True)
            ends = [gr.Dropdown([], label=f"Evaluation {end}", allow_custom_value=True) for end in ("before", "after")]
        counts = gr.Textbox(label="Held-out questions", interactive=False, lines=2, elem_id="changes")
        which = gr.Radio([ALL, *CHANGES], value=ALL, label="Show")
        table = gr.Dataframe(
            headers=["no.", "change", "task", "question", "before", "after", "expected"], datatype="str", interactive=False,
            column_widths=["50px", "105px", "85px", "300px", "265px", "265px", "100px"],
            wrap=True, max_height=420, label="Questions: click one to read both answers", elem_id="changed-table",
        )  # fmt: skip
        question = gr.Textbox(label="Question", interactive=False, lines=2, elem_id="changed-question")
        with gr.Row():
            both = [gr.Textbox(label=label, interactive=False, lines=10, max_lines=30) for label in ("Before", "After")]
    shown = [run, *ends, counts, which, table, question, *both]
    events = [tab.select, run.input, *(end.input for end in ends), which.input]
    gr.on(events, shows_errors(look), [run, *ends, which], shown, show_progress="hidden", api_name="changed")
    table.select(shows_errors(click), [run, *ends], [question, *both], show_progress="hidden", api_visibility="private")
