"""The tabs Compare and What changed: verdicts, samples, chats, votes, downloads, what goes wrong."""

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
ONE = "one/step_000001"


def record(key, verdict, text="", **more):
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
    } | more


def make_run(folder, name="one"):
    """A run folder without a model."""
    (folder / name / "eval").mkdir(parents=True)
    questions = {"train_data": ["sums"], "train_questions": 30, "eval_questions": 8}
    settings = {"max_completion_length": 40, "device": "cpu"} | questions
    (folder / name / "config.yaml").write_text(yaml.safe_dump(settings))
    shutil.copy("rewards.py", folder / name / "rewards.py")
    return folder / name


class Told:
    """In the worker's place: each side writes these samples, in two parts."""

    fails = False

    def __init__(self, *sides, ended=True, truncated=False):
        self.sides, self.how, self.asks, self.ahead = sides, (ended, truncated), [], []

    def load_ahead(self, run):
        self.ahead.append(run)

    def answer(self, ask):
        self.asks.append(ask)
        if self.fails:
            yield Answer("failed", "it fails"), Answer("failed", "it fails")
            return
        for state in ("answering", "done"):
            over, (ended, truncated) = state == "done", self.how
            yield tuple(
                Answer(
                    state,
                    "",
                    tuple(Sample(t if over else t[:3], [1] * len(t), ended and over, truncated) for t in texts),
                )
                for texts in self.sides
            )


@pytest.fixture
def page(tmp_path):
    make_run(tmp_path / "runs")
    return Page(
        Runs(tmp_path / "runs"), Told(["\\boxed{14}"], ["<think>so</think>\\boxed{13}"]), True, Path("rewards.py")
    )


def ask(page, session, question="What is 6 + 7?", expected="", blind=False, left=BASE, right=ONE, how=GREEDY):
    """The last outputs: chats, verdicts, tables, status, vote, question."""
    return list(compare_tab.answer(page, session, left, right, blind, question, expected, *how))[-1]


def texts(chatbot):
    return [message["content"][0]["text"] for message in chatbot.value]


# --- one question


def test_a_held_out_question_is_judged(page):
    session = Session()
    question, number = chat.take_held_out(page, session, BASE, ONE, 3)
    assert number == 3 and question == session.held_out["prompt"]
    page.worker.sides = ["\\boxed{99}"], [f"<think>so</think>\\boxed{{{session.held_out['answer']}}}"]
    *chats, left, right, of_left, of_right, status, _, _, _ = ask(page, session, question)
    expected = session.held_out["answer"]
    assert left == f"wrong. Reward 0.1. Expected: {expected}" and right == f"correct. Reward 1.1. Expected: {expected}"
    assert [1, "correct", "0", "1", f"wrong: 99 is not {expected}"] in of_left and [
        1,
        "format",
        "1",
        "0.1",
        "",
    ] in of_right
    assert status.startswith("0/1 against 1/1 correct. Answered after") and "greedy" in status
    assert texts(chats[1])[0] == question and texts(chats[1])[1:] == ["so", f"\\boxed{{{expected}}}"]
    (asked,) = page.worker.asks
    assert asked.sides == (None, ("one", "step_000001")) and asked.run == "one"
    assert (asked.temperature, asked.max_tokens, asked.samples) == (0, 40, 1)
    for wrong in (0, 99, -1, None):
        with pytest.raises(UiError, match="they are numbered from 1 to 8"):
            chat.take_held_out(page, session, BASE, ONE, wrong)
    assert 1 <= chat.draw_held_out(page, session, BASE, ONE)[1] <= 8


def test_a_question_of_ones_own_has_no_verdict_without_an_expected_answer(page):
    *_, left, right, of_left, _, status, _, _, _ = ask(page, Session())
    assert left.startswith("no verdict. Your own question: give the expected answer")
    assert of_left == [] and not status.startswith("0")
    *_, left, right, _, _, _, _, _, _ = ask(page, Session(), expected=" 13 ")
    assert left.startswith("wrong. Reward 0.1") and right == "correct. Reward 1.1. Expected: 13"
    with pytest.raises(UiError, match="no question"):
        ask(page, Session(), " \n")


def test_the_runs_own_reward_file_and_columns_count(page):
    run = page.runs.folder / "one"
    (run / "rewards.py").write_text(
        "from grading import reward\n@reward\ndef twice(c):\n    return 2 * (str(c.row['gold']) in c.text), 'as it is <b>'\n"
    )
    (run / "config.yaml").write_text((run / "config.yaml").read_text() + "columns: {answer: gold}\n")
    *_, right, _, of_right, _, _, _, _ = ask(page, Session(), expected="13")
    assert right == "correct. Reward 2. Expected: 13" and of_right == [[1, "twice", "2", "1", "as it is <b>"]]


def test_reward_functions_that_fail_or_hang(page, monkeypatch):
    file, session = page.runs.folder / "one/rewards.py", Session()
    good = file.read_text()
    failing = {
        "1 / 0": "No verdict: reward function 'bad' (rewards.py:4)",
        "raise SystemExit(3)": "No verdict: ",
        "while True: pass": "No verdict: rewards.py gave no answer within 1 s, it was in bad, line 4.",
    }
    for code, words in failing.items():
        monkeypatch.setattr(chat, "SECONDS", 1 if "while" in code else 30)
        file.write_text(f"from grading import reward\n@reward\ndef bad(completion):\n    {code}\n")
        *chats, left, right, _, _, _, _, _, _ = ask(page, session, expected="13")
        assert left.startswith("no verdict. Expected: 13. " + words[:10]) and words in left, left
        assert texts(chats[0])[-1] == "\\boxed{14}"
    file.write_text("def bad(:\n")
    assert "rewards.py" in ask(page, session, expected="13")[2]
    monkeypatch.setattr(chat, "SECONDS", 30)
    file.write_text(good)  # nothing of the one that hung is in the way
    started = time.monotonic()
    assert ask(page, session, expected="13")[3] == "correct. Reward 1.1. Expected: 13"
    assert time.monotonic() - started < 5  # about 0.3 s on a quiet machine


def test_samples_and_their_rates(page):
    page.worker.sides = ["\\boxed{13}"] * 5 + ["no"] * 3, ["\\boxed{13}"] * 2 + ["no"] * 6
    *chats, left, right, of_left, _, status, _, _, _ = ask(
        page, Session(), expected="13", how=(False, 0.7, 0.9, 5, 30, 8)
    )
    assert left.startswith("5/8 correct (62%, 95 %: 31% to 86%). Reward ") and right.startswith("2/8 correct (25%")
    assert status.startswith("5/8 against 2/8 correct.") and "temperature 0.7, seed 5" in status
    titles = [m["metadata"].get("title") for m in chats[0].value[2:]]
    assert titles[0] == "Sample 2 of 8: correct" and titles[-1] == "Sample 8 of 8: no answer" and len(titles) == 7
    asked = page.worker.asks[-1]
    assert (asked.temperature, asked.top_p, asked.seed, asked.max_tokens, asked.samples) == (0.7, 0.9, 5, 30, 8)
    assert [row[0] for row in of_left if row[1] == "correct"] == list(range(1, 9))


def test_verdicts_in_words():
    def verdict(name=None, reason="", judge="correct", ended=True, truncated=False):
        score = Score(0.0, {"correct": 0.0}, {}, {"correct": reason}, name, judge) if name else None
        return chat.verdict(Sample("x", [1], ended, truncated, score), 9)

    assert verdict("right") == "correct"
    assert verdict("wrong", "wrong: 3 is not 4") == "wrong"
    assert verdict("wrong", "no_answer") == "no answer"
    assert verdict("wrong", truncated=True) == verdict(truncated=True) == "cut off after 9 tokens"
    assert verdict() == "no verdict"
    assert verdict("ungraded", "sandbox_error: gone") == "ungraded: sandbox_error: gone"
    assert verdict("wrong", judge=None) == "no verdict: none of the rewards that apply here can judge"
    assert verdict(ended=False) == "stopped: no verdict"


# --- a chat


def test_a_blind_chat_goes_on_where_a_question_fails(page):
    session = Session()
    ask(page, session, blind=True)
    page.worker.fails = True
    *_, status, voting, question, _ = ask(page, session, "too long", blind=True)
    assert status == "Failed: it fails" and voting.visible and len(session.rounds) == 1 and session.rounds[0].hidden
    assert compare_tab.put_back(session, "") == "too long" and compare_tab.put_back(session, "typed") == "typed"
    page.worker.fails = False
    ask(page, session, "And then?", blind=True)
    assert len(session.rounds) == 2 and compare_tab.put_back(session, "") == ""
    assert "Left was" in compare_tab.vote(0, session)[-1]


def test_follow_up_turns_are_each_sides_own(page):
    session = Session()
    question, _ = chat.take_held_out(page, session, BASE, ONE, 1)
    ask(page, session, question)
    *chats, left, _, _, _, _, _, _, _ = ask(page, session, "Are you sure?")
    assert "Your own question" in left and len(texts(chats[0])) == 4 and len(texts(chats[1])) == 6
    messages = page.worker.asks[-1].messages
    assert [m["content"] for m in messages[0]] == [question, "\\boxed{14}", "Are you sure?"]
    assert [m["content"] for m in messages[1]] == [question, "<think>so</think>\\boxed{13}", "Are you sure?"]  # raw
    ask(page, session, question)  # a held-out question begins a new chat
    assert len(session.rounds) == 1 and len(page.worker.asks[-1].messages[0]) == 1
    compare_tab.new_chat(session)
    assert compare_tab.panes(session)[0].value == [] and chat.files(session) == (None, None)


def test_a_new_chat_ends_the_old_answers(page):
    session = Session()
    answering = compare_tab.answer(page, session, BASE, ONE, False, "What?", "", *GREEDY)
    next(answering), next(answering)
    compare_tab.new_chat(session)
    assert list(answering) == [] and page.worker.asks[0].stop.is_set() and session.rounds == []


def test_blind_until_the_vote(page, monkeypatch):
    session = Session()
    for swapped, better, winner in ((True, 0, ONE), (False, 0, BASE), (False, None, "neither"), (True, 1, BASE)):
        monkeypatch.setattr(chat.random, "random", lambda swapped=swapped: 0.1 if swapped else 0.9)
        outputs = ask(page, session, blind=True)
        for _ in range(2):  # the sides of a chat stay what they are
            expected = [("one", "step_000001"), None] if swapped else [None, ("one", "step_000001")]
            assert list(page.worker.asks[-1].sides) == expected
            shown = json.dumps([o.get_config() if hasattr(o, "get_config") else o for o in outputs], default=str)
            shown += "".join(Path(file).read_text() for file in chat.files(session)).replace('"run": "one"', "")
            assert "step_000001" not in shown and BASE not in shown and outputs[7].visible
            assert outputs[2:6] == ["", "", [], []] and "correct" not in outputs[6], "verdicts would tell"
            samples = [s for record in chat.as_records(session) for side in chat.SIDES for s in record[side]["samples"]]
            assert all(sample.keys() == {"text", "tokens"} for sample in samples)
            monkeypatch.setattr(chat.random, "random", lambda: 0.5)
            outputs = ask(page, session, "And then?", blind=True)
        left, right, *verdicts, _, _, voting, status = compare_tab.vote(better, session)
        assert all(verdict.startswith("no verdict. Your own question") for verdict in verdicts)
        assert (
            f"{winner} " in status.partition("Votes for:")[2]
            and f"right was {BASE if swapped else ONE}" in status
            and not voting.visible
            and ONE in left.label + right.label
        )
        assert len(session.rounds) == 3
        with pytest.raises(UiError, match="nothing to vote on"):
            compare_tab.vote(0, session)
    assert session.votes == {ONE: 1, BASE: 2, "neither": 1}
    ask(page, session)  # not blind: a new chat, with the sides as chosen
    assert len(session.rounds) == 1 and page.worker.asks[-1].sides == (None, ("one", "step_000001"))


def test_taken_away(page):
    session = Session()
    page.worker.sides = ["```\n" + HOSTILE], ["\\boxed{13}"]
    ask(page, session, expected="13", how=(False, 0.7, 0.9, 5, 30, 1))
    markdown, lines = (Path(file).read_text() for file in chat.files(session))
    (found,) = map(json.loads, lines.splitlines())
    assert found["question"] == "What is 6 + 7?" and found["seed"] == 5 and found["expected"] == "13"
    assert found["settings"] == {"temperature": 0.7, "top_p": 0.9, "max_tokens": 30, "samples": 1}
    assert found["left"]["model"] == BASE and found["right"]["model"] == ONE
    (left,), (right,) = found["left"]["samples"], found["right"]["samples"]
    assert left["text"] == "```\n" + HOSTILE and right["rewards"]["correct"] == 1 and right["verdict"] == "correct"
    assert f"````text\n```\n{HOSTILE}\n````" in markdown and "seed 5" in markdown


# --- hostile and very long texts


@pytest.mark.parametrize(
    "text",
    [HOSTILE, "<think>" + HOSTILE, "<think>a" + HOSTILE, "<think>\n" * 9, "x<think>y", "</think>", "a " * 25_000, ""],
)
def test_what_a_model_writes_is_shown_as_text(page, text):
    page.worker.sides, session = ([text], [text, text]), Session()
    chatbot = ask(page, session, text or "?")[1]
    payload = gr.Chatbot(render_markdown=False).postprocess(chatbot.value).model_dump_json()
    assert not re.search(r"<(?!br>)", payload)  # no tag but our own
    assert len(payload) < 4 * 6 * chat.SHOWN
    if len(text) > chat.SHOWN:
        assert "(30,000 more characters are not shown)" in payload
    assert session.rounds[0].answers[0].samples[0].text == text  # raw


def test_thinking_folds_when_it_is_over():
    def shown(*how):
        return [
            (m["content"][0]["text"], m["metadata"].get("title"), m["metadata"].get("status"))
            for m in compare_tab.bubbles(*how)
        ]

    assert shown("<think>a", False) == [("a", "Thinking", "pending")]
    assert shown("<think>a", True) == [("a", "Thinking (never ended)", "done")]
    assert shown("<think>a</think>b</think>", True) == [("a", "Thinking", "done"), ("b&lt;/think&gt;", None, None)]
    assert shown("b <think>", True) == [("b &lt;think&gt;", None, None)]


# --- what changed


@pytest.fixture
def evaluated(page):
    """One question fixed, one broken, one right and two wrong both times."""
    run = page.runs.folder / "one"
    before = [record(f"q{i}", verdict) for i, verdict in enumerate(["wrong", "right", "right", "wrong", "ungraded"])]
    after = [record(f"q{i}", verdict) for i, verdict in enumerate(["right", "wrong", "right", "wrong", "wrong"])]
    before[0]["completion"] = "x" * 50_000
    after[0]["completion"] = HOSTILE
    after.append(record("only after", "right"))
    for name, lines in (("before", before), ("after", after)):
        (run / f"eval/{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return page, "one", "before", "after"


def test_what_changed(evaluated):
    text, which, rows, *of_one = compare_tab.changed(*evaluated, "all")
    assert of_one == ["", "", ""]
    assert text.startswith("1 fixed, 1 broke, 1 both right, 2 both wrong of 5. before -> after: 2/5 correct (40%")
    assert text.endswith(" Not graded, and counted as wrong: 1 before, 0 after.")
    assert [row[:2] for row in rows] == [
        [1, "fixed"],
        [2, "broke"],
        [3, "both right"],
        [4, "both wrong"],
        [5, "both wrong"],
    ]
    assert ("both wrong (2)", "both wrong") in which.choices and max(
        len(str(cell)) for row in rows for cell in row
    ) < 100
    assert [row[0] for row in compare_tab.changed(*evaluated, "both wrong")[2]] == [4, 5]
    question, before, after = compare_tab.open_question(*evaluated, SimpleNamespace(row_value=["1", "fixed"]))
    assert question == "1 (fixed): question q0\nExpected: 13"
    assert before.startswith("wrong, reward 0.1, 9 tokens, ended by itself\ncorrect 0 wrong: so\n\nxxx")
    assert before.endswith("(30,000 more characters are not shown)") and after.endswith(HOSTILE)


def test_a_click_on_the_table_reaches_its_handler(evaluated):
    """Gradio tells by the annotation that it wants to know of the click."""
    with gr.Blocks() as blocks:
        compare_tab.build(evaluated[0])
    (table,) = (key for key, block in blocks.blocks.items() if getattr(block, "elem_id", None) == "changed-table")
    (handler,) = (f for f in blocks.fns.values() if (table, "select") in f.targets)
    click = gr.SelectData(None, {"index": [0, 1], "value": "fixed", "row_value": [1, "fixed"]})
    inputs, *_ = special_args(handler.fn, ["one", "before", "after"], event_data=click)
    assert handler.fn(*inputs)[0].startswith("1 (fixed): question q0")


def test_nothing_to_compare_yet(page):
    assert compare_tab.changed(page, None, None, None, "all")[0].startswith("There is no evaluation yet")
    with pytest.raises(UiError, match="has no evaluation '../config'"):
        compare_tab.changed(page, "one", "../config", "after", "all")


# --- the choice of the sides


def test_the_newest_checkpoint_stands_on_the_right(page):
    known = [BASE]

    def values(*chosen):
        known[:], _, left, right = compare_tab.refresh(page, list(known), *chosen)
        return [left.value, right.value]

    assert values(BASE, BASE) == [BASE, BASE]
    for step in (5, 15, 100):
        folder = page.runs.folder / f"one/checkpoints/step_{step:06d}"
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text("{}")
    assert chat.choices(page)[:3] == [
        (BASE, BASE),
        ("one, step 100", "one/step_000100"),
        ("one, step 15", "one/step_000015"),
    ]
    assert values(BASE, BASE) == [BASE, "one/step_000100"]
    assert values("one/step_000005", "one/step_000015") == ["one/step_000005", "one/step_000015"]
    assert values("gone/step_000005", "gone/step_000015") == [BASE, "one/step_000100"]
    assert values("one/step_000005", BASE) == ["one/step_000005", BASE], "the base was chosen"
    assert page.worker.ahead == ["one"] * 5
