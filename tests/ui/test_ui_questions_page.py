"""The page What changed: saved evaluations, many questions asked now, and evaluations that cannot be read."""

from types import SimpleNamespace

import pytest
from test_ui_chat import CHECKPOINT, HOSTILE, FakeWorker, make_record, make_run
from watching import build, to_jsonl

gr = pytest.importorskip("gradio")

from gradio.helpers import special_args  # noqa: E402

from rl.config import RunError  # noqa: E402
from rl.run.reader import Runs  # noqa: E402
from ui import chat, questions_page  # noqa: E402
from ui.chat import BASE  # noqa: E402
from ui.page import Page, UiError  # noqa: E402
from ui.turns import Answer, Sample  # noqa: E402


@pytest.fixture
def page(tmp_path):
    make_run(tmp_path / "runs")
    return Page(Runs(tmp_path / "runs"), FakeWorker(), True, tmp_path / "rewards.py")


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
        (run / f"eval/{name}.jsonl").write_text(to_jsonl(lines))
    return page


def test_compares_two_evaluations(evaluated):
    values = questions_page.compare(evaluated, "one", "before", "after")
    first, second, gain = values["summary"].splitlines()
    assert first.startswith("one, before: 2/5 correct (40%, 95% CI") and first.endswith(
        "1 ungraded, which count as wrong"
    )
    assert second.startswith("one, after: 2/5 correct (40%")
    # Bonett and Price: (2 - 2) / 7 +- 1.96 sqrt(4 / 7 / 7)
    assert gain == "Gain: +0.0 points (95% CI -56.0 to +56.0), 1 questions fixed, 1 broken"
    assert [row[:2] for row in values["table"]] == [
        [1, "fixed"],
        [2, "broken"],
        [3, "both right"],
        [4, "both wrong"],
        [5, "both wrong"],
    ]
    assert ("both wrong (2)", "both wrong") in values["which"].choices
    assert max(len(str(cell)) for row in values["table"] for cell in row) < 100
    assert [row[0] for row in questions_page.filter_pairs(values["pairs"], "both wrong")["table"]] == [4, 5]
    answers = questions_page.open_pair(SimpleNamespace(row_value=["1", "fixed"]), values["pairs"])
    assert answers["question"] == "1 (fixed): question q0\nExpected: 13"
    assert answers["before_text"].startswith("wrong, reward 0.1, 9 tokens, finished\ncorrect 0 wrong: so\n\nxxx")
    assert answers["before_text"].endswith("(30,000 more characters are not shown)")
    assert answers["after_text"].endswith(HOSTILE)


def test_row_selection_reaches_its_handler(evaluated):
    """Gradio passes the selection only to handlers with an argument annotated as gr.SelectData."""
    blocks, view = build(evaluated, questions_page)
    (handler,) = (f for f in blocks.fns.values() if f.api_name == "open_pair")
    pairs = questions_page.compare(evaluated, "one", "before", "after")["pairs"]
    selection = gr.EventData(None, {"index": [0, 1], "value": "fixed", "row_value": [1, "fixed"]})
    inputs, *_ = special_args(handler.fn, [pairs], event_data=selection)
    assert handler.fn(*inputs)[view["question"]].startswith("1 (fixed): question q0")


def test_a_broken_evaluation_empties_the_page(evaluated):
    """The figures of another run must not stay under the name of this one."""
    run = evaluated.runs.folder / "one"
    blocks, view = build(evaluated, questions_page)
    handlers = {f.api_name: f.fn for f in blocks.fns.values()}
    assert handlers["compare"]("one", "before", "after")[view["summary"]].startswith("one, before: 2/5")
    (run / "eval/before.jsonl").write_text("nonsense\n")
    values = handlers["compare"]("one", "before", "after")
    assert "before.jsonl is damaged" in values[view["status"]]
    emptied = {name: values[view[name]] for name in "pairs summary table question before_text after_text".split()}
    assert not any(emptied.values()) and len(emptied) == 6
    values = handlers["choose_run"]("../x")
    assert "no run" in values[view["status"]] and values[view["table"]] == []


def test_no_evaluation_yet(page):
    loaded = questions_page.load(page)
    assert loaded["run"].value == "one" and loaded["right"].value == CHECKPOINT
    assert questions_page.choose_run(page, "one")["before"].value is None
    with pytest.raises(UiError, match="no evaluation yet"):
        questions_page.compare(page, "one", None, None)
    with pytest.raises(RunError, match="has no evaluation '../config'"):
        questions_page.compare(page, "one", "../config", "after")


def test_selects_the_newest_run_with_two_evaluations(evaluated):
    make_run(evaluated.runs.folder, "newer")
    assert questions_page.load(evaluated)["run"].value == "one"
    ends = questions_page.choose_run(evaluated, "one")
    assert (ends["before"].value, ends["after"].value) == ("before", "after")


def answers_of(rows, *sides):
    """Return the final answers of both sides, in which the questions with True are answered correctly."""
    return tuple(
        Answer(
            "done",
            "",
            tuple(
                Sample(f"\\boxed{{{row['answer'] if is_right else 99}}}", [1, 2], True, False)
                for row, is_right in zip(rows, side)
            ),
        )
        for side in sides
    )


def test_asks_many_questions(page):
    rows = chat.held_out_rows(page, BASE, CHECKPOINT)[:5]
    progress = Answer("answering", "3 of 5 answered"), Answer("answering", "2 of 5 answered")
    final = answers_of(rows, [False, True, True, False, False], [True, True, True, True, False])
    requests = []

    class Worker:
        def answer(self, request):
            requests.append(request)
            yield progress
            yield final

    page.worker = Worker()
    first, *_, last = questions_page.ask_many(page, BASE, CHECKPOINT, 5)
    assert first == {"status": "Left: 3 of 5 answered; Right: 2 of 5 answered"}
    assert requests[0].sides == (None, ("one", "step_000001")) and requests[0].temperature == 0
    assert [len(side) for side in requests[0].conversations] == [5, 5]
    lines = last["summary"].splitlines()
    assert lines[0].startswith("the base model: 2/5 correct") and lines[1].startswith("one, step 1: 4/5 correct")
    # (3 - 1) / 7 +- 1.96 sqrt((4 / 7 - 4 / 49) / 7), as rl.evaluate.paired_gain
    assert lines[2] == "Gain: +40.0 points (95% CI -23.3 to +80.4), 2 questions fixed, 0 broken"
    assert [row[1] for row in last["table"]] == ["fixed", "both right", "both right", "fixed", "both wrong"]
    assert last["status"] == "5 held-out questions, greedy."
    record = last["pairs"][0][2]
    assert (
        record["verdict"] == "wrong" and record["rewards"]["correct"] == 0 and record["expected"] == rows[0]["answer"]
    )


def test_a_side_that_fails_ends_the_comparison(page):
    class Worker:
        def answer(self, request):
            yield Answer("done"), Answer("failed", "adapter: x does not fit")

    page.worker = Worker()
    with pytest.raises(UiError, match="Right: adapter: x does not fit"):
        list(questions_page.ask_many(page, BASE, CHECKPOINT, 3))
