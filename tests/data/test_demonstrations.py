"""Demonstrations: written for the built-in families, and read from files in several forms."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from data import DataError, load
from data.demonstrations import read_demonstrations, write_demonstrations
from data.tasks import assign_split, problems
from grading import Completion, grade_code, grade_math

QUESTION = {"role": "user", "content": "1 + 1?"}
ANSWER = {"role": "assistant", "content": "\\boxed{2}"}


def write(tmp_path, *rows):
    path = tmp_path / "demos.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("family", ["sums", "words", "functions", "long_sums"])
def test_written_demonstrations_are_right_and_not_held_out(family):
    rows = write_demonstrations([family], 60, seed=3)
    assert len({row["prompt"] for row in rows}) == 60
    import random

    by_prompt = {}
    for problem, _ in zip(problems(family, "pretrain", random.Random(f"{family} 3")), range(200)):
        by_prompt[problem.prompt] = problem
    for row in rows:
        problem = by_prompt[row["prompt"]]
        assert assign_split(family, problem.key) == "pretrain"
        completion = Completion(row["prompt"], row["completion"], {})
        assert completion.thinking == "\n".join(problem.steps)
        if family == "functions":
            assert grade_code(completion.answer, list(problem.tests), problem.entry_point)[0] == 1
        else:
            assert grade_math(completion.answer, problem.answer, row["prompt"])[0] == 1


def test_the_bundled_file_is_what_the_command_writes():
    command = [sys.executable, "-m", "data", "demos", "sums", "words", "-n", "192"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert output == Path("data/demos/sums_words.jsonl").read_text()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["sumz"], "not a built-in family .*Did you mean 'sums'.*python -m data distil sumz"),
        (["countdown"], "countdown has no demonstrations"),
    ],
)
def test_sources_without_demonstrations(arguments, message):
    with pytest.raises(DataError, match=message):
        write_demonstrations(arguments, 4, seed=0)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "1 + 1?", "completion": "\\boxed{2}"},
        {"prompt": [QUESTION], "completion": [ANSWER]},
        {"prompt": [QUESTION], "completion": "\\boxed{2}"},
        {"messages": [QUESTION, ANSWER]},
        {"messages": json.dumps([QUESTION, ANSWER])},
    ],
)
def test_all_forms_are_read(tmp_path, row):
    (loaded,), notes = read_demonstrations(write(tmp_path, row), [])
    assert loaded["completion"] == "\\boxed{2}" and loaded["prompt"] in ("1 + 1?", [QUESTION])
    assert notes == [f"cold start: 1 demonstrations from {tmp_path / 'demos.jsonl'}"]


@pytest.mark.parametrize(
    "row, message",
    [
        (
            {"prompt": "1 + 1?"},
            "demos.jsonl:1: a demonstration needs the columns prompt and completion.*this row has prompt",
        ),
        ({"prompt": "1 + 1?", "completion": " "}, "demos.jsonl:1: a demonstration needs"),
        ({"completion": "2"}, "demos.jsonl:1: a demonstration needs"),
        ({"prompt": "1 + 1?", "completion": [QUESTION, ANSWER]}, "demos.jsonl:1: completion must begin and end with"),
        ({"messages": [QUESTION]}, "demos.jsonl:1: messages must be a list .* ends with an assistant turn"),
        ({"messages": "no"}, "demos.jsonl:1: messages must be a list"),
        ({"messages": [ANSWER]}, "demos.jsonl:1: a demonstration needs"),
    ],
)
def test_rows_without_a_complete_answer(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        read_demonstrations(write(tmp_path, row), [])


def test_held_out_questions_are_left_out(tmp_path):
    held_out = load("sums", 2, "eval")
    leaked = {"messages": [{"role": "user", "content": f" {held_out[0]['prompt']}\n"}, ANSWER]}
    rows, notes = read_demonstrations(write(tmp_path, leaked, {"prompt": "1 + 1?", "completion": "2"}), held_out)
    assert [row["prompt"] for row in rows] == ["1 + 1?"]
    assert notes[1] == "1 demonstrations are left out: their questions are held out"
    with pytest.raises(DataError, match="sft_data: all questions of .* are also held out"):
        read_demonstrations(write(tmp_path, leaked), held_out)


@pytest.mark.parametrize(
    "name, message", [("demos.txt", "unknown type of file"), ("demo.jsonl", "there is no such file.")]
)
def test_files_that_cannot_be_read(tmp_path, name, message):
    write(tmp_path, {"prompt": "a", "completion": "b"})
    with pytest.raises(DataError, match=message):
        read_demonstrations(str(tmp_path / name), [])
