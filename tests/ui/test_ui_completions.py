"""The completions of a step: groups, verdicts, turns, coloured tokens, damaged files."""

from types import SimpleNamespace

import pytest

gr = pytest.importorskip("gradio")

from watching import build, make_rollouts, write_rollouts, write_tokens  # noqa: E402

from rl.config import RunError  # noqa: E402
from rl.run.metrics import standard_deviation  # noqa: E402
from ui import completions  # noqa: E402
from ui.completions import describe_group, pick_token, show_completion, show_group, show_step, show_tokens  # noqa: E402

HOSTILE = ["<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "</think>" * 9, "\x00\x1b[31m", "x" * 50_000]


def record(reward, verdict="wrong", finish_reason="stop", **fields):
    defaults = {
        "prompt": "q",
        "completion": "c",
        "rewards": {"correct": reward},
        "reasons": {},
        "advantage": 0.5,
        "tokens": 3,
    }
    return defaults | {"reward": reward, "verdict": verdict, "finish_reason": finish_reason} | fields


def data_of(*groups, log=(), logged=None):
    return {"groups": list(groups), "log": list(log), "logged": logged, "note": "No tokens were logged for this step."}


def test_sorts_a_group_by_reward_and_shows_verdicts():
    group = [
        record(0.0, finish_reason="length"),
        record(0.1, reasons={"correct": "no_answer: none values"}),
        record(None, "ungraded", rewards={"correct": None}, advantage=None),
        record(1.1, "right", rewards={"correct": 1.0, "format": 1.0}, reasons={"correct": "right"}),
        record(0.1),
    ]
    values = show_group(data_of(group), 0, "advantage")
    assert [row[:5] for row in values["completions"]] == [
        [4, "1.1", "correct", "+0.5", "stop token"],
        [2, "0.1", "no answer", "+0.5", "stop token"],
        [5, "0.1", "wrong", "+0.5", "stop token"],
        [1, "0", "cut off", "+0.5", "length limit"],
        [3, "-", "not graded", "-", "stop token"],
    ]
    assert (values["question"], values["text"], values["picked"]) == ("q", "c", [0, 3])
    assert values["rewards"] == [["correct", "1", "right"], ["format", "1", ""]]
    assert describe_group(7, group) == [7, "1 of 5", "0.325", "0.519", "q"]
    assert completions.format_number(standard_deviation([1.1] * 8)) == "0"


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_stays_text(text):
    """The components show it as plain text. Text that is too long is cut with a note."""
    group = [record(1.0, completion=text, prompt=text, reasons={"correct": text})]
    values = show_group(data_of(group), 0, "advantage")
    shown = (values["question"], 20_000), (values["text"], 20_000)
    for value, limit in (*shown, (values["completions"][0][-1], 300), (values["rewards"][0][2], 300)):
        assert (
            value == text
            if len(text) <= limit
            else value.startswith(text[:limit]) and f"{len(text) - limit:,} more characters" in value
        )
    step_data = data_of(group, log=[{"tokens": [text], "advantages": [1.0]}], logged=0)
    assert len(show_tokens(step_data, [0, 0], "advantage")["tokens"][0][0]) < 400
    assert len(pick_token(SimpleNamespace(index=0), step_data, [0, 0])["legend"]) < 500


def test_an_episode_is_shown_as_a_chat():
    turns = [{"text": "move(<b>up</b>)", "reply": "A."}, {"text": "done", "reply": ""}]
    chatbot = show_completion(data_of([record(1.0, turns=turns)]), 0, 0, "KL")["turns"]
    shown = [(message["role"], message["content"]) for message in chatbot.value]
    assert chatbot.visible and [role for role, _ in shown] == ["assistant", "user", "assistant"]
    assert not show_completion(data_of([record(1.0)]), 0, 0, "KL")["turns"].visible


# --- tokens


def test_tokens_belong_to_the_chosen_completion():
    """One group of a step has a token log. For another group the page says so, and names the prompt to click."""
    log = [{"tokens": ["a"], "advantages": [1.0]}, {"tokens": ["b"], "advantages": [-1.0]}]
    first, second = ([record(i, prompt_id=key) for i in range(2)] for key in "pq")
    step_data = data_of(first, second, log=log, logged=1)
    assert show_completion(step_data, 1, 0, "advantage")["tokens"] == [("a", 1.0)]
    assert show_completion(step_data, 1, 1, "advantage")["tokens"] == [("b", -1.0)]
    values = show_completion(step_data, 0, 1, "advantage")
    assert values["tokens"] == [] and values["legend"].startswith("Tokens were logged for prompt 2 only")


def test_colours_tokens_by_the_selected_measure():
    log = [
        {"tokens": ["a", "\n", " ", "", "b"], "logprobs": [-1.0] * 5, "advantages": [1.0, -1.0, 0.4, -0.2, None]},
        {"tokens": ["c"], "advantages": [-2.0], "logprobs": [-1.0]},
    ]
    step_data = data_of([record(0.0)] * 2, log=log, logged=0)
    values = show_tokens(step_data, [0, 0], "advantage")
    assert values["tokens"] == [("a", 0.5), ("⏎\n", -0.5), ("␣", 0.2), ("∅", -0.1), ("b", 0.0)]
    assert values["legend"].startswith("advantage of completion 1: -1 and +1 on the scale are -2 and +2")
    assert show_tokens(step_data, [0, 1], "advantage")["tokens"] == [("c", -1.0)]
    text = pick_token(SimpleNamespace(index=1), step_data, [0, 0])["legend"]
    assert text == "token 2, text ⏎, log-probability -1, advantage -1, value -, KL -, entropy -"
    values = show_tokens(step_data, [0, 0], "value")
    assert "no critic" in values["legend"] and {value for _, value in values["tokens"]} == {None}
    assert show_tokens(data_of([record(0.0)]), [0, 0], "KL") == {
        "legend": "No tokens were logged for this step.",
        "tokens": [],
    }


def test_colours_at_most_2000_tokens():
    log = [{"tokens": ["a"] * 9000, "entropy": [0.5] * 9000}]
    values = show_tokens(data_of([record(0.0)], log=log, logged=0), [0, 0], "entropy")
    assert len(values["tokens"]) == 2000 and "first 2,000 of 9,000 tokens" in values["legend"]


def test_finds_the_group_of_the_log():
    groups = [[record(0.0, prompt_id=key, tokens=n)] for key, n in (("p", 1), ("q", 2), ("q", 3))]
    log = {"prompt_id": "p", "completions": [{"tokens": ["a"]}]}
    assert completions.find_group(groups, log) == 0
    assert completions.find_group(groups, log | {"prompt_id": "q", "completions": [{"tokens": ["a"] * 3}]}) == 2
    assert completions.find_group(groups, log | {"prompt_id": "q", "completions": [{"tokens": ["a"] * 9}]}) is None


# --- a step


def test_a_step_opens_at_the_group_with_tokens(folder, page):
    tokens = [{"tokens": ["a", "b"], "logprobs": [-0.5, -1.5], "advantages": [1.0, 0.0]}] * 2
    write_tokens(folder / "a", [{"step": 3, "prompt_id": "q3-1", "completions": tokens}])
    write_rollouts(folder / "a", make_rollouts([3], text="<b>"))
    values = show_step(page, "a", 3, "advantage")
    assert [row[0] for row in values["prompts"]] == [1, 2, 3] and values["picked"] == [1, 1]
    assert values["text"] == "<b> 3 1 1" and values["tokens"] == [("a", 1.0), ("b", 0.0)]
    step_data = values["step_data"]
    values = completions.pick_prompt(SimpleNamespace(row_value=["3", "q"]), step_data, "KL")
    assert values["question"] == "2 + 2 = ?" and values["picked"] == [2, 1] and values["tokens"] == []
    values = completions.pick_completion(SimpleNamespace(row_value=[1, "0"]), step_data, [2, 1], "KL")
    assert values["text"] == "<b> 3 2 0"
    with pytest.raises(RunError, match="There is no run '../a'"):
        show_step(page, "../a", 3, "KL")


def test_a_missing_or_damaged_file_empties_the_tab(folder, page):
    """The message is in the tab and names the file. Nothing of the step before stays."""
    blocks, _ = build(page)
    (function,) = (f for f in blocks.fns.values() if f.api_name == "show_step")
    names = {id(block): block.label for block in function.outputs}
    (folder / "a/rollouts/000004.jsonl").unlink()
    (folder / "a/rollouts/000005.jsonl").write_text('{"step": 5, "prompt_id": "q"}\n')
    for step, message in ((4, "rollouts/000004.jsonl is missing"), (5, "rollouts/000005.jsonl is damaged")):
        values = {
            names[id(block)]: value for block, value in function.fn("a", step, "KL").items() if id(block) in names
        }
        assert message in values["Status"]
        emptied = ("Question", "Completion", "Tokens of the completion", "Rewards of the completion", "Turns")
        assert not any(values[label] for label in emptied)
        assert (
            values["Prompts (click to select)"] == values["Completions, highest reward first (click to select)"] == []
        )
    (folder / "a/tokens").mkdir()
    (folder / "a/tokens/000003.json").write_text('{"step": 3,')
    values = show_step(page, "a", 3, "KL")
    assert "tokens/000003.json is damaged" in values["legend"] and len(values["completions"]) == 2
