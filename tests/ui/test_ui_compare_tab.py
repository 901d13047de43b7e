"""The Compare and What changed tabs: verdicts, samples, chats, votes, downloads, errors."""

import json
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

gr = pytest.importorskip("gradio")

from gradio.helpers import special_args  # noqa: E402

from grading import Score  # noqa: E402
from ui import chat, compare_tab  # noqa: E402
from ui.chat import BASE, Session  # noqa: E402
from ui.runs import Page, Runs, UiError  # noqa: E402
from ui.turns import Answer, Sample  # noqa: E402

GREEDY = True, 1.0, 1.0, 0, 0, 1
HOSTILE = '<script>alert("x")</script><img src=x onerror=alert(1)> & **bold**  <b>\n</think> $$x$$'
CHECKPOINT = "one/step_000001"


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
    """Make a run folder without a model."""
    (folder / name / "eval").mkdir(parents=True)
    questions = {"train_data": ["sums"], "train_questions": 30, "eval_questions": 8}
    settings = {"max_completion_length": 40, "device": "cpu"} | questions
    (folder / name / "config.yaml").write_text(yaml.safe_dump(settings))
    shutil.copy("rewards.py", folder / name / "rewards.py")
    return folder / name


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
        if self.fails:
            yield Answer("failed", "no memory"), Answer("failed", "no memory")
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
                )
                for texts in self.sides
            )


@pytest.fixture
def page(tmp_path):
    make_run(tmp_path / "runs")
    worker = FakeWorker(["\\boxed{14}"], ["<think>so</think>\\boxed{13}"])
    return Page(Runs(tmp_path / "runs"), worker, True, Path("rewards.py"))


def ask(
    page, session, question="What is 6 + 7?", expected="", blind=False, left=BASE, right=CHECKPOINT, sampling=GREEDY
):
    """Return the last outputs: chats, verdicts, tables, status, vote row, question, expected answer."""
    return list(compare_tab.answer(page, session, left, right, blind, question, expected, *sampling))[-1]


def texts(chatbot):
    return [message["content"][0]["text"] for message in chatbot.value]


# --- verdicts


def test_held_out_question_is_scored(page):
    session = Session()
    question, number = chat.load_held_out(page, session, BASE, CHECKPOINT, 3)
    assert number == 3 and question == session.held_out_row["prompt"]
    page.worker.sides = ["\\boxed{99}"], [f"<think>so</think>\\boxed{{{session.held_out_row['answer']}}}"]
    *chats, left, right, left_table, right_table, status, _, _, _ = ask(page, session, question)
    expected = session.held_out_row["answer"]
    assert left == f"wrong. Reward 0.1. Expected: {expected}" and right == f"correct. Reward 1.1. Expected: {expected}"
    assert [1, "correct", "0", "1", f"wrong: 99 is not {expected}"] in left_table and [
        1,
        "format",
        "1",
        "0.1",
        "",
    ] in right_table
    assert status.startswith("0/1 vs 1/1 correct. Answered after") and "greedy" in status
    assert texts(chats[1])[0] == question and texts(chats[1])[1:] == ["so", f"\\boxed{{{expected}}}"]
    (request,) = page.worker.requests
    assert request.sides == (None, ("one", "step_000001")) and request.run == "one"
    assert (request.temperature, request.max_tokens, request.samples) == (0, 40, 1)
    for number in (0, 99, -1, None):
        with pytest.raises(UiError, match="from 1 to 8"):
            chat.load_held_out(page, session, BASE, CHECKPOINT, number)
    assert 1 <= chat.random_held_out(page, session, BASE, CHECKPOINT)[1] <= 8


def test_own_question_has_no_verdict_without_an_expected_answer(page):
    *_, left, right, left_table, _, status, _, _, _ = ask(page, Session())
    assert left.startswith("no verdict. ") and "expected answer" in left
    assert left_table == [] and not status.startswith("0")
    *_, left, right, _, _, _, _, _, _ = ask(page, Session(), expected=" 13 ")
    assert left.startswith("wrong. Reward 0.1") and right == "correct. Reward 1.1. Expected: 13"
    with pytest.raises(UiError, match="no question"):
        ask(page, Session(), " \n")


def test_reward_file_and_columns_of_the_run_are_used(page):
    run = page.runs.folder / "one"
    (run / "rewards.py").write_text(
        "from grading import reward\n@reward\ndef twice(c):\n    return 2 * (str(c.row['gold']) in c.text), 'raw <b>'\n"
    )
    (run / "config.yaml").write_text((run / "config.yaml").read_text() + "columns: {answer: gold}\n")
    *_, right, _, right_table, _, _, _, _ = ask(page, Session(), expected="13")
    assert right == "correct. Reward 2. Expected: 13" and right_table == [[1, "twice", "2", "1", "raw <b>"]]


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
        *chats, left, right, _, _, _, _, _, _ = ask(page, session, expected="13")
        assert left.startswith("no verdict. Expected: 13. No verdict") and message in left, left
        assert texts(chats[0])[-1] == "\\boxed{14}"
    file.write_text("def bad(:\n")
    assert "rewards.py" in ask(page, session, expected="13")[2]
    monkeypatch.setattr(chat, "REWARD_TIMEOUT", 30)
    file.write_text(source)  # the function that hung does not slow the next question down
    start = time.monotonic()
    assert ask(page, session, expected="13")[3] == "correct. Reward 1.1. Expected: 13"
    assert time.monotonic() - start < 5  # about 0.3 s on a quiet machine


def test_samples_are_counted(page):
    page.worker.sides = ["\\boxed{13}"] * 5 + ["no"] * 3, ["\\boxed{13}"] * 2 + ["no"] * 6
    *chats, left, right, left_table, _, status, _, _, _ = ask(
        page, Session(), expected="13", sampling=(False, 0.7, 0.9, 5, 30, 8)
    )
    assert left.startswith("5/8 correct (62%, 95% CI 31% to 86%). Reward ") and right.startswith("2/8 correct (25%")
    assert status.startswith("5/8 vs 2/8 correct.") and "temperature 0.7, seed 5" in status
    titles = [m["metadata"].get("title") for m in chats[0].value[2:]]
    assert titles[0] == "Sample 2 of 8: correct" and titles[-1] == "Sample 8 of 8: no answer" and len(titles) == 7
    request = page.worker.requests[-1]
    sampling = request.temperature, request.top_p, request.seed, request.max_tokens, request.samples
    assert sampling == (0.7, 0.9, 5, 30, 8)
    assert [row[0] for row in left_table if row[1] == "correct"] == list(range(1, 9))


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


# --- chats


def test_blind_chat_continues_after_a_failed_question(page):
    session = Session()
    ask(page, session, blind=True)
    page.worker.fails = True
    *_, status, vote_row, question, _ = ask(page, session, "too long", blind=True)
    assert status == "Failed: no memory" and vote_row.visible
    assert len(session.rounds) == 1 and session.rounds[0].is_hidden
    assert compare_tab.restore_question(session, "") == "too long"
    assert compare_tab.restore_question(session, "typed") == "typed"
    page.worker.fails = False
    ask(page, session, "And then?", blind=True)
    assert len(session.rounds) == 2 and compare_tab.restore_question(session, "") == ""
    assert "Left was" in compare_tab.vote(0, session)[-1]


def test_follow_up_questions_continue_each_side(page):
    session = Session()
    question, _ = chat.load_held_out(page, session, BASE, CHECKPOINT, 1)
    ask(page, session, question)
    *chats, left, _, _, _, _, _, _, _ = ask(page, session, "Are you sure?")
    assert "expected answer" in left and len(texts(chats[0])) == 4 and len(texts(chats[1])) == 6
    messages = page.worker.requests[-1].messages
    assert [m["content"] for m in messages[0]] == [question, "\\boxed{14}", "Are you sure?"]
    assert [m["content"] for m in messages[1]] == [question, "<think>so</think>\\boxed{13}", "Are you sure?"]  # raw
    ask(page, session, question)  # a held-out question starts a new chat
    assert len(session.rounds) == 1 and len(page.worker.requests[-1].messages[0]) == 1
    compare_tab.new_chat(session)
    assert compare_tab.panes(session)[0].value == [] and chat.write_downloads(session) == (None, None)


def test_new_chat_stops_the_old_answers(page):
    session = Session()
    updates = compare_tab.answer(page, session, BASE, CHECKPOINT, False, "What?", "", *GREEDY)
    next(updates), next(updates)
    compare_tab.new_chat(session)
    assert list(updates) == [] and page.worker.requests[0].stop.is_set() and session.rounds == []


def test_blind_chat_hides_names_until_the_vote(page, monkeypatch):
    session = Session()
    for swapped, better, winner in ((True, 0, CHECKPOINT), (False, 0, BASE), (False, None, "neither"), (True, 1, BASE)):
        monkeypatch.setattr(chat.random, "random", lambda swapped=swapped: 0.1 if swapped else 0.9)
        outputs = ask(page, session, blind=True)
        for _ in range(2):  # the sides are not shuffled again within a chat
            expected = [("one", "step_000001"), None] if swapped else [None, ("one", "step_000001")]
            assert list(page.worker.requests[-1].sides) == expected
            shown = json.dumps([o.get_config() if hasattr(o, "get_config") else o for o in outputs], default=str)
            shown += "".join(Path(file).read_text() for file in chat.write_downloads(session)).replace(
                '"run": "one"', ""
            )
            assert "step_000001" not in shown and BASE not in shown and outputs[7].visible
            assert outputs[2:6] == ["", "", [], []] and "correct" not in outputs[6], "a verdict would reveal the side"
            samples = [s for record in chat.as_records(session) for side in chat.SIDES for s in record[side]["samples"]]
            assert all(sample.keys() == {"text", "tokens"} for sample in samples)
            monkeypatch.setattr(chat.random, "random", lambda: 0.5)
            outputs = ask(page, session, "And then?", blind=True)
        left, right, *verdicts, _, _, vote_row, status = compare_tab.vote(better, session)
        assert all(verdict.startswith("no verdict. ") for verdict in verdicts)
        assert (
            f"{winner} " in status.partition("Votes:")[2]
            and f"right was {BASE if swapped else CHECKPOINT}" in status
            and not vote_row.visible
            and CHECKPOINT in left.label + right.label
        )
        assert len(session.rounds) == 3
        with pytest.raises(UiError, match="vote"):
            compare_tab.vote(0, session)
    assert session.votes == {CHECKPOINT: 1, BASE: 2, "neither": 1}
    ask(page, session)  # not blind: starts a new chat with the selected sides
    assert len(session.rounds) == 1 and page.worker.requests[-1].sides == (None, ("one", "step_000001"))


def test_downloads(page):
    session = Session()
    page.worker.sides = ["```\n" + HOSTILE], ["\\boxed{13}"]
    ask(page, session, expected="13", sampling=(False, 0.7, 0.9, 5, 30, 1))
    markdown, lines = (Path(file).read_text() for file in chat.write_downloads(session))
    (record,) = map(json.loads, lines.splitlines())
    assert record["question"] == "What is 6 + 7?" and record["seed"] == 5 and record["expected"] == "13"
    assert record["settings"] == {"temperature": 0.7, "top_p": 0.9, "max_tokens": 30, "samples": 1}
    assert record["left"]["model"] == BASE and record["right"]["model"] == CHECKPOINT
    (left,), (right,) = record["left"]["samples"], record["right"]["samples"]
    assert left["text"] == "```\n" + HOSTILE and right["rewards"]["correct"] == 1 and right["verdict"] == "correct"
    assert f"````text\n```\n{HOSTILE}\n````" in markdown and "seed 5" in markdown


# --- hostile and long texts


@pytest.mark.parametrize(
    "text",
    [HOSTILE, "<think>" + HOSTILE, "<think>a" + HOSTILE, "<think>\n" * 9, "x<think>y", "</think>", "a " * 25_000, ""],
)
def test_model_output_is_shown_as_plain_text(page, text):
    page.worker.sides = [text], [text, text]
    session = Session()
    chatbot = ask(page, session, text or "?")[1]
    payload = gr.Chatbot(render_markdown=False).postprocess(chatbot.value).model_dump_json()
    assert not re.search(r"<(?!br>)", payload)  # no tag except our own <br>
    assert len(payload) < 4 * 6 * chat.MAX_TEXT_LENGTH
    if len(text) > chat.MAX_TEXT_LENGTH:
        assert "(30,000 more characters are not shown)" in payload
    assert session.rounds[0].answers[0].samples[0].text == text  # the session keeps the raw text


def test_thinking_collapses_when_complete():
    def messages(text, is_over):
        return [
            (m["content"][0]["text"], m["metadata"].get("title"), m["metadata"].get("status"))
            for m in compare_tab.answer_messages(text, is_over)
        ]

    assert messages("<think>a", False) == [("a", "Thinking", "pending")]
    assert messages("<think>a", True) == [("a", "Thinking (unfinished)", "done")]
    assert messages("<think>a</think>b</think>", True) == [("a", "Thinking", "done"), ("b&lt;/think&gt;", None, None)]
    assert messages("b <think>", True) == [("b &lt;think&gt;", None, None)]


# --- what changed


@pytest.fixture
def evaluated(page):
    """A page and two evaluations: one question fixed, one broken, one right and two wrong in both."""
    run = page.runs.folder / "one"
    before = [
        make_record(f"q{i}", verdict) for i, verdict in enumerate(["wrong", "right", "right", "wrong", "ungraded"])
    ]
    after = [make_record(f"q{i}", verdict) for i, verdict in enumerate(["right", "wrong", "right", "wrong", "wrong"])]
    before[0]["completion"] = "x" * 50_000
    after[0]["completion"] = HOSTILE
    after.append(make_record("only after", "right"))
    for name, lines in (("before", before), ("after", after)):
        (run / f"eval/{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return page, "one", "before", "after"


def test_changes(evaluated):
    text, which, rows, *answers = compare_tab.show_changes(*evaluated, "all")
    assert answers == ["", "", ""]
    assert text.startswith(
        "1 fixed, 1 broken, 1 both right, 2 both wrong (5 questions). before -> after: 2/5 correct (40%"
    )
    assert text.endswith(" 1 before, 0 after.")
    assert [row[:2] for row in rows] == [
        [1, "fixed"],
        [2, "broken"],
        [3, "both right"],
        [4, "both wrong"],
        [5, "both wrong"],
    ]
    assert ("both wrong (2)", "both wrong") in which.choices and max(
        len(str(cell)) for row in rows for cell in row
    ) < 100
    assert [row[0] for row in compare_tab.show_changes(*evaluated, "both wrong")[2]] == [4, 5]
    question, before, after = compare_tab.open_question(*evaluated, SimpleNamespace(row_value=["1", "fixed"]))
    assert question == "1 (fixed): question q0\nExpected: 13"
    assert before.startswith("wrong, reward 0.1, 9 tokens, finished\ncorrect 0 wrong: so\n\nxxx")
    assert before.endswith("(30,000 more characters are not shown)") and after.endswith(HOSTILE)


def test_row_selection_reaches_its_handler(evaluated):
    """Gradio passes the selection only to handlers with an argument annotated as gr.SelectData."""
    with gr.Blocks() as blocks:
        compare_tab.build(evaluated[0])
    (table,) = (key for key, block in blocks.blocks.items() if getattr(block, "elem_id", None) == "changed-table")
    (handler,) = (f for f in blocks.fns.values() if (table, "select") in f.targets)
    selection = gr.SelectData(None, {"index": [0, 1], "value": "fixed", "row_value": [1, "fixed"]})
    inputs, *_ = special_args(handler.fn, ["one", "before", "after"], event_data=selection)
    assert handler.fn(*inputs)[0].startswith("1 (fixed): question q0")


def test_no_evaluation_yet(page):
    assert compare_tab.show_changes(page, None, None, None, "all")[0].startswith("There is no evaluation")
    with pytest.raises(UiError, match="has no evaluation '../config'"):
        compare_tab.show_changes(page, "one", "../config", "after", "all")


# --- selection of the sides


def test_newest_checkpoint_is_selected_on_the_right(page):
    values = [BASE]

    def refresh(left, right):
        values[:], _, left, right = compare_tab.refresh(page, list(values), left, right)
        return [left.value, right.value]

    assert refresh(BASE, BASE) == [BASE, BASE]
    for step in (5, 15, 100):
        folder = page.runs.folder / f"one/checkpoints/step_{step:06d}"
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text("{}")
    assert chat.side_choices(page)[:3] == [
        (BASE, BASE),
        ("one, step 100", "one/step_000100"),
        ("one, step 15", "one/step_000015"),
    ]
    assert refresh(BASE, BASE) == [BASE, "one/step_000100"]
    assert refresh("one/step_000005", "one/step_000015") == ["one/step_000005", "one/step_000015"]
    assert refresh("removed/step_000005", "removed/step_000015") == [BASE, "one/step_000100"]
    assert refresh("one/step_000005", BASE) == ["one/step_000005", BASE], "the user selected the base"
    assert page.worker.preloaded == ["one"] * 5
