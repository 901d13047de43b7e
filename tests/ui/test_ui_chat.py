"""The chat: verdicts, samples, conversations, names, the order of questions, votes, history, downloads, errors."""

import html
import json
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

gr = pytest.importorskip("gradio")

from grading import Score, prompt_text  # noqa: E402
from rl.config import RunError  # noqa: E402
from rl.run.reader import Runs  # noqa: E402
from ui import chat, chat_page  # noqa: E402
from ui.chat import BASE, BLIND, COMPARE, GREEDY, SAMPLING, SINGLE, Session  # noqa: E402
from ui.page import Page, UiError  # noqa: E402
from ui.turns import Answer, Sample  # noqa: E402

HOSTILE = '<script>alert("x")</script><img src=x onerror=alert(1)> & **bold**  <b>\n</think> $$x$$'
CHECKPOINT = "one/step_000001"
NAME = "one, step 1"


def make_record(key, verdict, text="", **fields):
    return {
        "id": key,
        "task": "sums",
        "question": f"question {key}",
        "expected": "13",
        "completion": text or f"\\boxed{{{verdict}}}",
        "verdict": verdict,
        "thinks": False,
        "finish_reason": "stop",
        "tokens": 9,
        "reward": 0.1,
        "rewards": {"correct": float(verdict == "right"), "passes_tests": None},
        "reasons": {"correct": f"{verdict}: so"},
    } | fields


def make_run(folder, name="one"):
    """Make a run folder with an empty checkpoint."""
    (folder / name / "eval").mkdir(parents=True)
    questions = {"train_data": ["sums"], "train_questions": 30, "eval_questions": 8}
    settings = {"max_completion_length": 40, "device": "cpu"} | questions
    (folder / name / "config.yaml").write_text(yaml.safe_dump(settings))
    shutil.copy("rewards.py", folder / name / "rewards.py")
    add_checkpoint(folder, name, 1)
    return folder / name


def add_checkpoint(folder, name, step):
    checkpoint = folder / name / f"checkpoints/step_{step:06d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "adapter_config.json").write_text("{}")


class FakeWorker:
    """A worker whose sides write the given samples in two parts."""

    fails = False

    def __init__(self, *sides, finished=True, truncated=False):
        self.sides = sides
        self.flags = finished, truncated
        self.requests = []
        self.preloaded = []

    def preload(self, run):
        self.preloaded.append(run)

    def answer(self, request):
        self.requests.append(request)
        sides = self.sides[: len(request.sides)]
        if self.fails:
            yield tuple(Answer("failed", "no memory") for _ in sides)
            return
        for state in ("answering", "done"):
            is_done, (finished, truncated) = state == "done", self.flags
            yield tuple(
                Answer(
                    state,
                    "",
                    tuple(
                        Sample(text if is_done else text[:3], [1] * len(text), finished and is_done, truncated)
                        for text in texts
                    ),
                    "<|user|> the prompt",
                    0.5,
                )
                for texts in sides
            )


@pytest.fixture
def page(tmp_path):
    make_run(tmp_path / "runs")
    worker = FakeWorker(["\\boxed{14}"], ["<think>so</think>\\boxed{13}"])
    return Page(Runs(tmp_path / "runs"), worker, True, Path("rewards.py"))


def settings(mode=COMPARE, left=BASE, right=CHECKPOINT, decoding=GREEDY, samples=8, temperature=0.7, **more):
    more = {"top_p": 0.9, "seed": 5, "max_tokens": 0, "system_prompt": ""} | more
    return mode, left, right, decoding, samples, temperature, *more.values()


def ask(page, session, question="What is 6 + 7?", expected="", **options):
    """Ask a question, and return the last values of the page."""
    values = {}
    for update in chat_page.ask(page, session, question, expected, *settings(**options)):
        values |= update
    return values


def ask_two(page):
    """Ask two questions. Returns the session, and the updates of the second one, which waits for the first one."""
    session = Session()
    updates = [chat_page.ask(page, session, question, "", *settings()) for question in ("First?", "Second?")]
    for update in updates:
        next(update)
    session.first = updates[0]  # a generator that nothing refers to is closed
    return session, updates[1]


def texts(values, side="left", titles=False):
    """Return the texts of a chat without those below the answers, or their titles."""
    messages = values[f"{side}_chat"]
    if titles:
        return [html.unescape(m["metadata"]["title"]) for m in messages if m["metadata"].get("title")]
    return [m["content"] for m in messages if not m["metadata"].get("title")]


# --- verdicts


def test_held_out_question_is_scored(page):
    session = Session()
    values = chat_page.load_question(page, COMPARE, BASE, CHECKPOINT, 3)
    row = chat.held_out_rows(page, BASE, CHECKPOINT)[2]
    question, expected = prompt_text(row["prompt"]), row["answer"]
    assert values == {"question": question, "number": 3}
    page.worker.sides = ["\\boxed{99}"], [f"<think>so</think>\\boxed{{{expected}}}"]
    values = ask(page, session, question)
    (left,), (right,) = texts(values, titles=True), texts(values, "right", titles=True)
    assert left == f"wrong (expected {expected}) · reward 0.1 · 10 tokens · 20 tokens/s · the base model"
    assert right.startswith(f"correct (expected {expected}) · reward 1.1 · ") and right.endswith(NAME)
    below = values["left_chat"][-1]["content"]
    assert "correct | 0 | 1 | wrong: 99 is not " in below and "format | 1 | 0.1 | " in below
    assert "```text\n<|user|> the prompt\n```" in below
    assert values["status"].startswith("not correct against correct. Answered after") and "greedy" in values["status"]
    assert texts(values, "right") == [
        f"*Held-out question 3*\n\n{question}",
        "&lt;think>so&lt;/think>" + texts(values, "right")[1].partition("&lt;/think>")[2],
    ]
    (request,) = page.worker.requests
    assert request.sides == (None, ("one", "step_000001")) and request.run == "one"
    assert (request.temperature, request.max_tokens, request.samples) == (0, 40, 1)
    for number in (0, 99, -1):
        with pytest.raises(UiError, match="from 1 to 8"):
            chat_page.load_question(page, COMPARE, BASE, CHECKPOINT, number)
    assert 1 <= chat_page.load_question(page, COMPARE, BASE, CHECKPOINT, None)["number"] <= 8


def test_own_question_has_no_verdict_without_an_expected_answer(page):
    values = ask(page, Session())
    assert texts(values, titles=True)[0].startswith("no verdict · 10 tokens") and "expected answer" in values["status"]
    values = ask(page, Session(), expected=" 13 ")
    assert texts(values, titles=True)[0].startswith("wrong (expected 13) · reward 0.1")
    assert texts(values, "right", titles=True)[0].startswith("correct (expected 13) · reward 1.1")
    for question in (" \n", None):
        with pytest.raises(UiError, match="no question"):
            ask(page, Session(), question)


def test_reward_file_and_columns_of_the_run_are_used(page):
    run = page.runs.folder / "one"
    (run / "rewards.py").write_text(
        "from grading import reward\n@reward\ndef twice(c):\n    return 2 * (str(c.row['gold']) in c.text), 'raw <b>'\n"
    )
    (run / "config.yaml").write_text((run / "config.yaml").read_text() + "columns: {answer: gold}\n")
    values = ask(page, Session(), expected="13")
    assert texts(values, "right", titles=True)[0].startswith("correct (expected 13) · reward 2 ·")
    assert "twice | 2 | 1 | raw &#60;b&#62;" in values["right_chat"][-1]["content"]


def test_reward_functions_that_fail_or_hang(page, monkeypatch):
    file = page.runs.folder / "one/rewards.py"
    session = Session()
    source = file.read_text()
    messages = {
        "1 / 0": "'bad' (rewards.py:4)",
        "raise SystemExit(3)": "No verdict: ",
        "while True: pass": "line 4",
    }
    for code, message in messages.items():
        monkeypatch.setattr(chat, "REWARD_TIMEOUT", 1 if "while" in code else 30)
        file.write_text(f"from grading import reward\n@reward\ndef bad(completion):\n    {code}\n")
        values = ask(page, session, expected="13")
        assert "No verdict: " in values["status"] and message in values["status"]
        assert texts(values)[-1] == "\\(\\boxed{14}\\)"
    file.write_text("def bad(:\n")
    assert "rewards.py" in ask(page, session, expected="13")["status"]
    monkeypatch.setattr(chat, "REWARD_TIMEOUT", 30)
    file.write_text(source)  # the function that hung does not slow the next question down
    start = time.monotonic()
    assert texts(ask(page, session, expected="13"), "right", titles=True)[-1].startswith("correct (expected 13)")
    assert time.monotonic() - start < 5  # about 0.3 s on a quiet machine


def test_a_looping_reward_function_can_be_stopped(page):
    """Stop ends the scoring within a second, although the limit is 30 seconds."""
    file = page.runs.folder / "one/rewards.py"
    file.write_text("from grading import reward\n@reward\ndef endless(c):\n    while True: pass\n")
    session = Session()
    values = {}
    for values in chat_page.ask(page, session, "What?", "13", *settings()):
        if values["status"].startswith("Scoring"):
            start = time.monotonic()
            chat_page.stop(session)
    assert time.monotonic() - start < 2 and "No verdict: stopped" in values["status"]


def test_samples_are_one_clear_choice(page):
    """Greedy gives one answer. Sampling gives the chosen number, each with its verdict."""
    page.worker.sides = ["\\boxed{13}"] * 5 + ["no"] * 3, ["\\boxed{13}"] * 2 + ["no"] * 6
    values = ask(page, Session(), expected="13", decoding=SAMPLING, max_tokens=30)
    assert values["status"].startswith(
        "5/8 correct (62%, 95% CI 31% to 86%) against 2/8 correct (25%, 95% CI 7% to 59%). Answered after"
    )
    assert "temperature 0.7, seed 5" in values["status"]
    titles = texts(values, titles=True)
    assert titles[1].startswith("Sample 2 of 8: correct") and titles[-1].startswith("Sample 8 of 8: no answer")
    assert len(titles) == 8
    request = page.worker.requests[-1]
    sampling = request.temperature, request.top_p, request.seed, request.max_tokens, request.samples
    assert sampling == (0.7, 0.9, 5, 30, 8)
    ask(page, Session(), decoding=GREEDY)
    assert (page.worker.requests[-1].temperature, page.worker.requests[-1].samples) == (0.0, 1)
    assert (
        chat_page.show_decoding(SAMPLING)["sampling"].visible
        and not chat_page.show_decoding(GREEDY)["sampling"].visible
    )


def test_verdict_texts():
    def verdict(name=None, reason="", judge="correct", finished=True, truncated=False):
        score = Score(0.0, {"correct": 0.0}, {}, {"correct": reason}, name, judge) if name else None
        return chat.verdict(Sample("x", [1], finished, truncated, score), 9)

    assert verdict("right") == "correct"
    assert verdict("wrong", "wrong: 3 is not 4") == "wrong"
    assert verdict("wrong", "no_answer") == "no answer"
    assert verdict("wrong", truncated=True) == verdict(truncated=True) == "cut off after 9 tokens"
    assert verdict() == "no verdict"
    assert verdict("ungraded", "sandbox_error: killed") == "ungraded: sandbox_error: killed"
    assert verdict("wrong", judge=None).startswith("no verdict: no reward function")
    assert verdict(finished=False) == "stopped: no verdict"


# --- conversations


def test_an_answer_keeps_the_name_of_its_model(page):
    """After another model is chosen in mid-chat, earlier answers keep the name of the model that wrote them."""
    session = Session()
    ask(page, session)
    add_checkpoint(page.runs.folder, "one", 2)
    values = ask(page, session, "And then?", right="one/step_000002")
    names = [title.rpartition(" · ")[2] for title in texts(values, "right", titles=True)]
    assert names == [NAME, "one, step 2"]
    ask(page, session, "Alone?", mode=SINGLE, left="one/step_000002")
    records = chat.as_records(session)
    assert [record["right"]["model"] for record in records[:2]] == names and "right" not in records[2]
    assert records[2]["left"]["model"] == "one, step 2"


def test_one_model_answers_alone(page):
    session = Session()
    ask(page, session)
    values = ask(page, session, "Alone?", mode=SINGLE, left=CHECKPOINT)
    assert page.worker.requests[-1].sides == (("one", "step_000001"),)
    assert len(texts(values)) == 4 and len(texts(values, "right")) == 2, "the right side was not asked"
    values = ask(page, session, "Both?")
    (left,), (right,) = page.worker.requests[-1].conversations
    assert [m["content"] for m in left if m["role"] == "user"] == ["What is 6 + 7?", "Alone?", "Both?"]
    assert [m["content"] for m in right if m["role"] == "user"] == ["What is 6 + 7?", "Both?"]
    assert not chat_page.show_mode(SINGLE)["right"].visible and not chat_page.show_mode(SINGLE)["right_column"].visible


def test_held_out_question_keeps_the_chat_but_starts_a_conversation(page):
    """The models answer it as in training, without the earlier questions. They stay on the page and in the download."""
    session = Session()
    question = chat_page.load_question(page, COMPARE, BASE, CHECKPOINT, 1)["question"]
    ask(page, session, question)
    values = ask(page, session, "Are you sure?")
    assert len(texts(values)) == 4 and "expected answer" in values["status"]
    (left,), (right,) = page.worker.requests[-1].conversations
    assert [m["content"] for m in left] == [question, "\\boxed{14}", "Are you sure?"]
    assert [m["content"] for m in right] == [question, "<think>so</think>\\boxed{13}", "Are you sure?"]  # raw
    values = ask(page, session, question)
    assert len(page.worker.requests[-1].conversations[0][0]) == 1 and len(texts(values)) == 6
    assert texts(values)[4].startswith("*Held-out question 1, in a new conversation*")
    ask(page, session, "Still?")
    (left,), _ = page.worker.requests[-1].conversations
    assert [m["content"] for m in left] == [question, "\\boxed{14}", "Still?"]
    markdown, jsonl = (Path(file).read_text() for file in chat.write_downloads(session))
    records = [json.loads(line) for line in jsonl.splitlines()]
    assert [r["question"] for r in records] == [question, "Are you sure?", question, "Still?"]
    assert [r["new_conversation"] for r in records] == [True, False, True, False] and markdown.count("## Question") == 4
    values = chat_page.new_chat(session)
    assert values["left_chat"] == []
    with pytest.raises(UiError, match="nothing to download"):
        chat.write_downloads(session)


def test_a_question_during_an_answer_waits(page):
    session = Session()
    first = chat_page.ask(page, session, "First?", "", *settings())
    next(first), next(first)
    second = chat_page.ask(page, session, "Second?", "", *settings(right=BASE))
    values = next(second)
    assert texts(values)[-2:] == ["Second?", "*Waiting ...*"] and values["question"] == ""
    done = []
    thread = threading.Thread(target=lambda: done.extend(second))
    thread.start()
    time.sleep(0.2)
    assert thread.is_alive() and len(page.worker.requests) == 1
    assert texts(list(first)[-1])[-2:] == ["Second?", "*Waiting ...*"]
    thread.join(10)
    assert [text for text in texts(done[-1]) if text.endswith("?")] == ["First?", "Second?"]
    assert page.worker.requests[1].sides == (None, None)
    assert [m["content"] for m in page.worker.requests[1].conversations[0][0]] == ["First?", "\\boxed{14}", "Second?"]


def test_stop_ends_a_waiting_question(page):
    session, second = ask_two(page)
    chat_page.stop(session)
    list(second)
    assert session.rounds[1].is_done and page.worker.requests[0].stop.is_set()


def test_settings_reach_the_model(page):
    ask(page, Session(), system_prompt=" Be brief. ", max_tokens=7)
    assert page.worker.requests[-1].system_prompt == "Be brief." and page.worker.requests[-1].max_tokens == 7
    with pytest.raises(UiError, match="Maximum answer length"):
        ask(page, Session(), max_tokens=-1)


def test_a_failed_question_is_not_sent_again(page):
    session = Session()
    page.worker.fails = True
    values = ask(page, session)
    assert values["status"].startswith("Failed after") and texts(values)[-1] == "no memory"
    page.worker.fails = False
    ask(page, session, "And then?")
    assert [m["content"] for m in page.worker.requests[-1].conversations[0][0]] == ["And then?"]


@pytest.mark.parametrize("side", [0, 1])
def test_retry_and_edit_replace_a_question_and_the_later_ones(page, side):
    session = Session()
    ask(page, session, "First?", "13")
    values = ask(page, session, "Second?")
    messages = gr.Chatbot(reasoning_tags=chat_page.REASONING_TAGS).postprocess(values[f"{chat.SIDES[side]}_chat"])
    messages = [message.model_dump() for message in messages.root]  # the browser's list
    last = len(messages) - 1
    list(chat_page.retry(page, side, SimpleNamespace(index=last), session, messages, *settings(right=BASE)))
    assert [r.question for r in session.rounds] == ["First?", "Second?"] and page.worker.requests[-1].sides[1] is None
    event = SimpleNamespace(index=0, value="Third?")
    *_, values = chat_page.edit(page, side, event, session, messages, *settings())
    assert [r.question for r in session.rounds] == ["Third?"] and session.rounds[0].row["answer"] == "13"
    assert "wrong (expected 13)" in texts(values, titles=True)[0]


def test_a_retry_with_a_wrong_setting_keeps_the_chat(page):
    session = Session()
    values = ask(page, session, "First?")
    with pytest.raises(UiError, match="Maximum answer length"):
        list(chat_page.retry(page, 0, SimpleNamespace(index=0), session, values["left_chat"], *settings(max_tokens=-1)))
    assert [r.question for r in session.rounds] == ["First?"]


def test_reasoning_tags_in_a_question(page):
    """Gradio folds the tags in messages of users too, which would change the number of messages."""
    session = Session()
    values = ask(page, session, "Put it in <think></think> tags, <think>like this</think>")
    shown = gr.Chatbot(reasoning_tags=chat_page.REASONING_TAGS).postprocess(values["left_chat"]).root
    assert sum(message.role == "user" for message in shown) == 1


def test_new_chat_while_a_question_waits(page):
    session, second = ask_two(page)
    chat_page.new_chat(session)
    list(second)
    assert session.rounds == [] and len(page.worker.requests) == 1, "the second question is not asked"


def test_one_model_has_its_own_questions(page):
    """Those of the hidden right side, which may be another run, do not count."""
    make_run(page.runs.folder, "other")
    config = page.runs.folder / "other/config.yaml"
    config.write_text(config.read_text().replace("sums", "words"))
    left, right = CHECKPOINT, "other/step_000001"
    own = chat_page.load_question(page, COMPARE, left, left, 1)["question"]
    assert chat_page.load_question(page, SINGLE, left, right, 1)["question"] == own
    assert chat_page.load_question(page, COMPARE, left, right, 1)["question"] != own
    assert chat_page.show_examples(page, SINGLE, left, right)["left_chat"].examples[0]["text"] == own


def test_a_damaged_newest_run_does_not_disable_the_chat(page):
    make_run(page.runs.folder, "newest")
    (page.runs.folder / "newest/config.yaml").write_text("lerning_rate: 1\n")
    values = chat_page.load(page, "number", Session())
    assert CHECKPOINT in [value for _, value in values["right"].choices] and values["left_chat"].examples == []
    (page.runs.folder / "one/config.yaml").write_text("train_data: [missing.jsonl]\n")
    page.worker.sides = ["a"], ["b"]
    assert texts(ask(page, Session(), "What?"))[-1] == "a", "a model can be asked without its data"


def test_new_chat_stops_the_old_answers(page):
    session = Session()
    updates = chat_page.ask(page, session, "What?", "", *settings())
    next(updates), next(updates)
    chat_page.new_chat(session)
    assert [values["left_chat"] for values in updates] == [[]], "a late update must not bring them back"
    assert page.worker.requests[0].stop.is_set() and session.rounds == []


def test_a_reload_finds_the_chat(page):
    values = chat_page.load(page, "number", Session())
    session = values["session"]
    assert (
        values["left_chat"].value == [] and len(values["left_chat"].examples) == 4 and not values["first_run"].visible
    )
    ask(page, session, mode=SINGLE, left=CHECKPOINT)
    chat_page.show_raw(session, True)
    again = chat_page.load(page, "number", Session())
    assert (
        again["session"] is session and again["mode"] == SINGLE and again["left"].value == CHECKPOINT and again["raw"]
    )
    assert len(texts({"left_chat": again["left_chat"].value})) == 2
    assert chat_page.load(page, "another", Session())["session"].rounds == []
    for i in range(chat.MAX_SESSIONS):
        chat.find_session(page, str(i), Session())
    assert len(page.sessions) == chat.MAX_SESSIONS and "number" not in page.sessions


@pytest.mark.parametrize("is_reload", [False, True])
def test_a_question_asked_before_the_page_is_complete(page, is_reload):
    """It is answered, and the chat before a reload is kept."""
    if is_reload:
        ask(page, chat_page.load(page, "number", Session())["session"], "Before?")
    session = Session()
    updates = chat_page.ask(page, session, "Early?", "", *settings())
    next(updates)
    values = chat_page.load(page, "number", session)
    list(updates)
    expected = ["Before?", "Early?"] if is_reload else ["Early?"]
    assert [round_.question for round_ in values["session"].rounds if round_.is_done] == expected
    assert is_reload or values["session"] is session


def test_an_answer_that_a_reload_interrupted_is_over(page):
    session = Session()
    updates = chat_page.ask(page, session, "What?", "13", *settings())
    next(updates)
    updates.close()
    assert session.rounds[0].is_done and all(answer.state == "stopped" for answer in session.rounds[0].answers)
    assert len(texts(chat_page.panes(session))) == 2


# --- blind votes


def test_blind_vote_hides_names_until_the_vote(page, monkeypatch):
    session = Session()
    question = chat_page.load_question(page, COMPARE, BASE, CHECKPOINT, 1)["question"]
    for swapped, better, winner in ((True, 0, NAME), (False, 0, BASE), (False, None, "neither"), (True, 1, BASE)):
        monkeypatch.setattr(chat.random, "random", lambda swapped=swapped: 0.1 if swapped else 0.9)
        values = ask(page, session, question, mode=BLIND)
        for _ in range(2):  # the sides are not shuffled again before the vote
            expected = [("one", "step_000001"), None] if swapped else [None, ("one", "step_000001")]
            assert list(page.worker.requests[-1].sides) == expected
            last = len(session.rounds) - 1
            hidden = chat_page.panes(Session([round_ for round_ in session.rounds if round_.is_hidden]))
            shown = json.dumps([hidden["left_chat"], hidden["right_chat"]]) + values["status"]
            shown += json.dumps(chat.as_records(session)[last]).replace('"run": "one"', "")
            assert not [word for word in ("step 1", "step_000001", BASE, "correct", "tokens/s") if word in shown]
            assert values["vote_row"].visible
            monkeypatch.setattr(chat.random, "random", lambda: 0.5)
            values = ask(page, session, "And then?", mode=BLIND)
        values = chat_page.vote(better, session)
        status = values["status"]
        assert f"{winner} " in status.partition("Votes:")[2] and not values["vote_row"].visible
        assert f"right was {BASE if swapped else NAME}" in status
        titles = texts(values, titles=True)[-3:]
        assert titles[0].startswith(("wrong (expected", "correct (expected")), "the held-out question has a verdict"
        with pytest.raises(UiError, match="vote"):
            chat_page.vote(0, session)
    assert session.votes == {NAME: 1, BASE: 2, "neither": 1}
    ask(page, session)
    assert len(page.worker.requests[-1].conversations[0][0]) == 1, "not blind: starts a conversation"
    labels = [chat_page.show_mode(BLIND)[side].label for side in ("left", "right")]
    assert not {"Left", "Right"} & set(labels), "the menus must not reveal the sides"


def test_blind_vote_continues_after_a_failed_question(page):
    session = Session()
    ask(page, session, mode=BLIND)
    page.worker.fails = True
    assert ask(page, session, "too long", mode=BLIND)["vote_row"].visible
    page.worker.fails = False
    ask(page, session, "And then?", mode=BLIND)
    assert [m["content"] for m in page.worker.requests[-1].conversations[0][0]][0] == "What is 6 + 7?"
    assert "Left was" in chat_page.vote(0, session)["status"]


def test_notes_do_not_reveal_the_sides(page):
    """Neither what a side loads nor its error, which names a checkpoint."""
    session = Session()
    (round_,) = [chat.add_question(page, session, BLIND, BASE, CHECKPOINT, "What?", "", max_tokens=0)]
    secret = "adapter: runs/one/checkpoints/step_000001 does not fit"
    round_.answers = Answer("loading", "Loading data/tiny ..."), Answer("failed", secret)
    assert [round_.note(side) for side in (0, 1)] == ["Loading ...", "This side failed."]
    shown = json.dumps([chat_page.panes(session)[f"{side}_chat"] for side in chat.SIDES] + chat.as_records(session))
    assert "data/tiny" not in shown and "does not fit" not in shown
    session.reveal()
    assert round_.note(1) == secret


def test_a_blind_round_without_a_vote_is_revealed_by_another_mode(page):
    session = Session()
    ask(page, session, mode=BLIND)
    values = ask(page, session, "And then?")
    assert not values["vote_row"].visible and not session.rounds[0].is_hidden


# --- texts and downloads


def test_downloads(page):
    session = Session()
    page.worker.sides = ["```\n" + HOSTILE], ["\\boxed{13}"]
    ask(page, session, expected="13", decoding=SAMPLING, samples=1, max_tokens=30)
    markdown, lines = (Path(file).read_text() for file in chat.write_downloads(session))
    (record,) = map(json.loads, lines.splitlines())
    assert record["question"] == "What is 6 + 7?" and record["expected"] == "13"
    assert record["settings"] == {
        "max_tokens": 30,
        "system_prompt": "",
        "temperature": 0.7,
        "top_p": 0.9,
        "seed": 5,
        "samples": 1,
    }
    assert record["left"]["model"] == BASE and record["right"]["model"] == NAME
    (left,), (right,) = record["left"]["samples"], record["right"]["samples"]
    assert left["text"] == "```\n" + HOSTILE and right["rewards"]["correct"] == 1 and right["verdict"] == "correct"
    assert f"````text\n```\n{HOSTILE}\n````" in markdown and "seed 5" in markdown


def test_raw_texts(page):
    page.worker.sides = ["<think>a</think>" + HOSTILE], ["b"]
    session = Session()
    ask(page, session, HOSTILE)
    values = chat_page.show_raw(session, True)
    assert texts(values) == [f"```text\n{HOSTILE}\n```", f"```text\n<think>a</think>{HOSTILE}\n```"]
    assert session.rounds[0].answers[0].samples[0].text == "<think>a</think>" + HOSTILE


@pytest.mark.parametrize(
    "text",
    [HOSTILE, "<think>" + HOSTILE, "<think>a" + HOSTILE, "<think>\n" * 9, "x<think>y", "</think>", "a " * 25_000, ""],
)
def test_hostile_texts_stay_text(page, text):
    page.worker.sides = [text], [text, text]
    values = ask(page, Session(), text or "?", decoding=SAMPLING)
    chatbot = gr.Chatbot(reasoning_tags=chat_page.REASONING_TAGS)
    payload = json.dumps([m.model_dump(mode="json") for m in chatbot.postprocess(values["left_chat"]).root])
    assert "<script" not in payload and "<img" not in payload and "<b>" not in payload and "<think" not in payload
    if len(text) > 20_000:
        assert "(30,000 more characters are not shown)" in payload


def test_thinking_is_folded_and_closed_when_the_answer_is_over(page):
    def messages(text):
        page.worker.sides = [text], [text]
        chatbot = gr.Chatbot(reasoning_tags=chat_page.REASONING_TAGS)
        shown = chatbot.postprocess(ask(page, Session())["left_chat"]).root[1:-1]
        return [
            (m.content[0].text, *(m.metadata and (m.metadata.get("title"), m.metadata.get("status")) or ()))
            for m in shown
        ]

    assert messages("<think>a</think>b") == [("a", "Reasoning", "done"), ("b",)]
    assert messages("<think>a") == [("a", "Reasoning", "done")], "cut off"


# --- selection of the models


def test_default_side(page):
    """The newest run that improved, else the newest finished one, else the newest. Not merely the newest."""
    folder = page.runs.folder
    assert chat.default_side(page) == CHECKPOINT
    for step in (5, 15, 100):
        add_checkpoint(folder, "one", step)
    assert chat.side_choices(page)[:3] == [
        (BASE, BASE),
        ("one, step 100", "one/step_000100"),
        ("one, step 15", "one/step_000015"),
    ]
    time.sleep(0.01)
    make_run(folder, "newer")
    assert chat.default_side(page) == "newer/step_000001"
    (folder / "one/summary.json").write_text('{"finished": true}')
    assert chat.default_side(page) == "one/step_000100"
    (folder / "newer/summary.json").write_text('{"finished": true}')
    assert chat.default_side(page) == "newer/step_000001"
    (folder / "one/summary.json").write_text('{"finished": true, "eval": {"gain": {"ci95": [0.1, 0.3]}}}')
    assert chat.default_side(page) == "one/step_000100"
    shutil.rmtree(folder)
    assert chat.default_side(page) == BASE and chat_page.load(page, "x", Session())["first_run"].visible


@pytest.mark.parametrize("side", ["../../etc/passwd", "/etc", "x/step_000001"])
def test_a_side_outside_of_the_runs_folder(page, side):
    with pytest.raises(RunError, match="no run|No run"):
        ask(page, Session(), right=side)
