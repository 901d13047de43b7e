"""The schema of a row: nested columns, prompts that would show the answer, and damaged golds."""

import csv
import json

import pytest

from data import DataError, load
from data.schema import is_prefill

VERL = {
    "data_source": "openai/gsm8k",
    "prompt": [{"role": "user", "content": "What is 3 + 4?"}],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "7"},
    "extra_info": {"index": 0, "split": "train", "level": 2, "tags": ["a", "b"]},
}
QUESTION = {"role": "user", "content": "What is 3 + 4?"}


def write_jsonl(folder, *rows):
    (folder / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder / "q.jsonl")


def load_prompt(folder, prompt, answer="7", **more):
    """Load one row with this prompt, and return its prompt in the schema."""
    (row,) = load(write_jsonl(folder, {"prompt": prompt, "answer": answer} | more))
    return row["prompt"]


def load_error(source, columns=None):
    with pytest.raises(DataError) as error:
        load(source, columns=columns)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- nested columns


def write_rows(folder, suffix, rows):
    """Write rows with nested columns. A CSV file holds them as JSON text (csv) or as Python literals (python)."""
    import pyarrow
    import pyarrow.parquet

    path = folder / f"q.{'csv' if suffix == 'python' else suffix}"
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif suffix == "jsonl":
        write_jsonl(folder, *rows)
    else:
        dump = json.dumps if suffix == "csv" else str
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows({k: v if isinstance(v, str) else dump(v) for k, v in row.items()} for row in rows)
    return str(path)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "csv", "python"])
def test_columns_read_nested_columns(tmp_path, suffix):
    source = write_rows(tmp_path, suffix, [VERL, VERL])
    columns = {"answer": "reward_model.ground_truth", "level": "extra_info.level", "tag": "extra_info.tags.-1"}
    rows = load(source, columns=columns)
    assert [(row["answer"], row["level"], row["tag"]) for row in rows] == [("7", 2, "b")] * 2
    assert rows[0]["prompt"] == VERL["prompt"]
    assert load(source, columns={"prompt": "prompt.0.content"})[0]["prompt"] == "What is 3 + 4?"


def test_a_name_with_dots_is_preferred_to_a_nested_column(tmp_path):
    row = {"prompt": "a", "x.y": "flat", "x": {"y": "nested", "y.z": {"w": 1}}, "u.v": {"w.x": [5]}}
    source = write_jsonl(tmp_path, row)
    for path, value in {"x.y": "flat", "x.y.z.w": 1, "u.v.w.x.0": 5, "u.v.w.x.-1": 5}.items():
        assert load(source, columns={"answer": path})[0]["answer"] == value, path


def test_nested_column_of_an_empty_cell_is_empty(tmp_path):
    source = write_rows(tmp_path, "parquet", [VERL, VERL | {"reward_model": None}])
    rows = load(source, columns={"answer": "reward_model.ground_truth"})
    assert [row["answer"] for row in rows] == ["7", None]


@pytest.mark.parametrize(
    "path, message",
    [
        ("reward_model.ground_thruth", "Did you mean 'reward_model.ground_truth'?"),
        ("ground_truth", "Did you mean 'reward_model.ground_truth'?"),
        ("xyz", "It has data_source, prompt, prompt.0, prompt.0.role, prompt.0.content, ability, reward_model, "),
        ("prompt.1.content", "Did you mean 'prompt.0.content'?"),
        ("ability.x.y.z.q.w.e.r.t", "there is no such column. It has "),
        ("", "there is no such column. It has "),
        (".", "there is no such column. It has "),
        ("reward_model.", "there is no such column."),
    ],
)
def test_missing_nested_columns_name_the_row_and_a_column(tmp_path, path, message):
    source = write_jsonl(tmp_path, VERL, VERL)
    assert message in (error := load_error(source, {"answer": path})) and "q.jsonl:1: columns maps answer" in error


def test_a_nested_column_that_one_row_lacks_is_an_error(tmp_path):
    source = write_jsonl(tmp_path, VERL, VERL | {"reward_model": {"style": "rule"}})
    error = load_error(source, {"answer": "reward_model.ground_truth"})
    assert "q.jsonl:2: columns maps answer to 'reward_model.ground_truth', but there is no such column" in error


def test_text_that_only_looks_like_a_list_stays_text(tmp_path):
    for text in ("[asy] draw((0,0)--(1,1)); [/asy] What is it?", "[1, 2] has what sum?", "[1, 2]", '{"a": 1}', "[]"):
        assert load_prompt(tmp_path, text) == text


# --- prompts that end with an assistant turn


def test_messages_as_text_are_parsed(tmp_path):
    assert load_prompt(tmp_path, json.dumps([QUESTION])) == [QUESTION]
    assert load_prompt(tmp_path, str([QUESTION])) == [QUESTION]


@pytest.mark.parametrize("role", ["assistant", "Assistant", "model", "gpt"])
@pytest.mark.parametrize(
    "answer", ["3+4=7, so \\boxed{7}", "<think>3+4=7</think>\\boxed{7}", "7", "I cannot tell.", "```python\nx = 7\n```"]
)
def test_refuses_a_prompt_that_ends_with_an_answer(tmp_path, role, answer):
    """The chat template would show the model the answer of a dataset for supervised fine-tuning."""
    system = {"role": "system", "content": "Be brief."}
    messages = [system, QUESTION, {"role": role, "content": answer}]
    for prompt in (messages, json.dumps(messages)):
        source = write_jsonl(tmp_path, {"messages": prompt, "answer": "7"})
        error = load_error(source, {"prompt": "messages"})
        assert "q.jsonl:1: the prompt ends with an assistant turn" in error
        assert "columns: {prompt: messages.1.content}" in error
        assert load(source, columns={"prompt": "messages.1.content"})[0]["prompt"] == "What is 3 + 4?"


@pytest.mark.parametrize(
    "turns",
    [
        [{"role": "assistant", "content": "7"}],  # no question
        [QUESTION, {"role": "assistant", "content": "7"}, {"role": "assistant", "content": "<think>"}],
        [QUESTION, {"role": "assistant", "content": "7"}, {"role": "assistant", "content": ""}],
        [{"role": "assistant", "content": "<think>"}],
        [QUESTION, {"role": "assistant", "content": "3+4=7, so <answer>"}],  # a prefill with the gold
        [QUESTION, {"role": "assistant", "content": "<think>3+4=7"}],
        [QUESTION, {"role": "model", "content": "<think>"}],  # not continued by chat templates
    ],
)
def test_refuses_other_prompts_that_show_the_answer(tmp_path, turns):
    source = write_jsonl(tmp_path, {"prompt": turns, "answer": "7"})
    assert "the prompt ends with an assistant turn" in load_error(source)


@pytest.mark.parametrize(
    "text",
    ["<think>", "<think>\n", "<think> ", "Let me think.\n<think>\n", "<think>\nOkay, 3", "<answer>", "```python\n"],
)
def test_keeps_a_prefill(tmp_path, text):
    assert is_prefill(text)
    prompt = [QUESTION, {"role": "assistant", "content": text}]
    assert load_prompt(tmp_path, prompt) == prompt
    assert load_prompt(tmp_path, prompt, answer=None, tests=["assert f(1) == 1"]) == prompt


def test_drops_an_empty_assistant_turn(tmp_path):
    for text in ("", "\n", " "):
        assert load_prompt(tmp_path, [QUESTION, {"role": "assistant", "content": text}]) == [QUESTION]


def test_keeps_earlier_assistant_turns_and_tool_turns(tmp_path):
    earlier = [QUESTION, {"role": "assistant", "content": "7"}, {"role": "user", "content": "And 8 + 9?"}]
    tool = [QUESTION, {"role": "assistant", "content": "sum(3, 4)"}, {"role": "tool", "content": "sum works"}]
    for prompt in (earlier, tool, [{"role": "system", "content": "Be brief."}, QUESTION]):
        assert load_prompt(tmp_path, prompt) == prompt


@pytest.mark.parametrize("text", ["a <b> c", "#include <iostream>\nint main() {}", "x < y > z", "```\ncode\n```", ""])
def test_an_answer_with_angle_brackets_is_not_a_prefill(text):
    assert not is_prefill(text)


# --- damaged golds


@pytest.mark.parametrize(
    "answer",
    [
        "\frac{1}{2}",
        "\boxed{3}",
        "2\text{ cm}",
        "3\times 4",
        "x\right)",
        "\vec{a}",
        "x\neq 1",
        "\triangle ABC",
        "x\rfloor",
    ],
)
def test_refuses_a_gold_with_a_control_character_for_a_backslash(tmp_path, answer):
    """JSON reads "\\frac" with a single backslash as a form feed and "rac"."""
    (tmp_path / "q.jsonl").write_text(json.dumps({"prompt": "a", "answer": answer}))
    error = load_error(str(tmp_path / "q.jsonl"))
    assert "q.jsonl:1: the answer" in error and "write two, as in \\\\frac" in error


def test_keeps_line_breaks_and_tabs_in_golds(tmp_path):
    for answer in ("a\nb", "1\t2", "a\tb", "7\r\n", "\\frac{1}{2}"):
        (row,) = load(write_jsonl(tmp_path, {"prompt": "a", "answer": answer}))
        assert row["answer"] == answer
