"""Other sources than custom files: the formats of well-known datasets, the Hub, reasoning_gym, Countdown."""

import json
import random
import subprocess
import sys
import time
from fractions import Fraction

import pytest
from test_data import load_with

from data import DataError, gym, hub, load
from data.tasks import questions

ADD = "def add(a, b):\n    return a + b\n"
GSM8K = {"question": "A hen lays 1200 eggs, then 34.", "answer": "1200+34=<<1200+34=1234>>1234 eggs.\n#### 1,234"}
MATH_500 = {
    "problem": "Halve three quarters.", "solution": "It is $\\boxed{\\frac{3}{8}}$.", "answer": "\\frac{3}{8}",
    "subject": "Algebra", "level": 2, "unique_id": "test/algebra/1.json",
}  # fmt: skip
DAPO = {
    "prompt": "Find 6 times 7.", "solution": "42", "data_source": "math_dapo", "ability": "MATH",
    "reward_model": {"ground_truth": "42", "style": "rule"}, "extra_info": {"index": "a-1"},
}  # fmt: skip
MBPP_SANITIZED = {
    "source_file": "x.ipynb", "task_id": 7, "prompt": "Write a function to add two numbers.", "code": ADD,
    "test_imports": ["import math"], "test_list": ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"],
}  # fmt: skip
MBPP_FULL = {
    "task_id": 8, "text": "Write a function to add two numbers.", "code": ADD.replace("\n", "\r\n"), "test_setup_code": "x = 1",
    "test_list": ["assert add(1, 2) == 3"], "challenge_test_list": ["assert add(5, 5) == 10"],
}  # fmt: skip
HUMANEVAL = {
    "task_id": "HumanEval/900",
    "prompt": "import math\n\ndef twice(x):\n    return 2 * x\n\n\ndef area(r: float) -> float:\n    \"\"\"Twice the area of a circle.\"\"\"\n",
    "canonical_solution": "    return twice(math.pi * r * r)\n",
    "test": "def check(candidate):\n    assert abs(candidate(1) - twice(math.pi)) < 1e-9\n    assert candidate(0) == 0\n",
    "entry_point": "area",
}  # fmt: skip


def write(folder, name, *rows):
    (folder / name).write_text("\n".join(map(json.dumps, rows)))
    return str(folder / name)


# --- formats


def test_gsm8k(tmp_path):
    (row,) = load(write(tmp_path, "q.jsonl", GSM8K))
    assert (row["prompt"], row["answer"], row["task"]) == (GSM8K["question"], "1234", "gsm8k")
    assert row["solution"] == "1200+34=1234 eggs.\n#### 1,234"


def test_a_custom_file_is_not_taken_for_gsm8k(tmp_path):
    (first, second) = load(write(tmp_path, "q.jsonl", GSM8K, {"question": "1 + 1?", "answer": "2"}))
    assert first["answer"] == GSM8K["answer"] and first["task"] == second["task"] == "q"


def test_math_500_and_dapo(tmp_path):
    (row,) = load(write(tmp_path, "m.jsonl", MATH_500))
    assert (row["id"], row["prompt"], row["answer"]) == ("test/algebra/1.json", "Halve three quarters.", "\\frac{3}{8}")
    assert row["level"] == 2 and row["task"] == "math_500"
    (row,) = load(write(tmp_path, "d.jsonl", DAPO))
    assert (row["prompt"], row["answer"], row["solution"], row["task"]) == ("Find 6 times 7.", "42", None, "dapo")


def test_mbpp_prompt_shows_one_of_the_tests(tmp_path):
    (row,) = load(write(tmp_path, "m.jsonl", MBPP_SANITIZED))
    assert row["tests"] == MBPP_SANITIZED["test_list"] and row["setup"] == "import math" and row["solution"] == ADD
    assert "add(1, 2) == 3" in row["prompt"] and "add(-1" not in row["prompt"] and row["id"] == "mbpp/7"
    (row,) = load(write(tmp_path, "f.jsonl", MBPP_FULL))
    assert row["tests"] == ["assert add(1, 2) == 3", "assert add(5, 5) == 10"]
    assert (row["setup"], row["solution"], row["task"]) == ("x = 1", ADD, "mbpp")


def test_mbpp_prompt_does_not_show_the_only_test(tmp_path):
    """A program could hard-code it: the prompt only gives the function's name."""
    (row,) = load(write(tmp_path, "f.jsonl", MBPP_FULL | {"challenge_test_list": []}))
    assert row["prompt"] == "Write a function to add two numbers.\nIt is called add."


def test_humaneval(tmp_path):
    (row,) = load(write(tmp_path, "h.jsonl", HUMANEVAL))
    assert row["setup"] == "import math\n\ndef twice(x):\n    return 2 * x"
    assert row["starter"] == HUMANEVAL["prompt"] and row["starter"].strip() in row["prompt"]
    assert row["tests"] == HUMANEVAL["test"] and row["entry_point"] == "area" and row["task"] == "humaneval"
    compile(row["solution"], "solution", "exec")


@pytest.mark.parametrize("suffix", ["csv", "parquet", "json"])
def test_recognises_formats_in_all_file_types(tmp_path, suffix):
    import csv

    import pyarrow
    import pyarrow.parquet

    path = tmp_path / f"m.{suffix}"
    if suffix == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, MBPP_SANITIZED)
            writer.writeheader()
            writer.writerow(MBPP_SANITIZED)
    elif suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([MBPP_SANITIZED]), path)
    else:
        path.write_text(json.dumps([MBPP_SANITIZED]))
    (row,) = load(str(path))
    assert row["tests"] == MBPP_SANITIZED["test_list"] and row["setup"] == "import math"


def test_columns_take_precedence_over_the_format(tmp_path):
    source = write(tmp_path, "m.jsonl", MBPP_SANITIZED | {"mine": "Add!", "name": 5})
    (row,) = load(source, columns={"prompt": "mine", "id": "name"})
    assert (row["prompt"], row["id"], row["tests"]) == ("Add!", "5", MBPP_SANITIZED["test_list"])
    (row,) = load(source, columns={"answer": "gold"})  # meant for another source of the run
    assert "add(1, 2)" in row["prompt"] and "answer" not in row


@pytest.mark.parametrize(
    "row, message",
    [
        (GSM8K | {"answer": "no idea ####"}, "q.jsonl:1: not a valid gsm8k row: the answer has nothing after ####"),
        (MBPP_SANITIZED | {"test_list": []}, "q.jsonl:1: not a valid mbpp row: the test_list is empty"),
        (HUMANEVAL | {"entry_point": "volume"}, "q.jsonl:1: not a valid humaneval row: the prompt does not define volume"),
        (HUMANEVAL | {"prompt": "def ("}, "q.jsonl:1: not a valid humaneval row: the prompt is not Python"),
    ],
)  # fmt: skip
def test_refuses_rows_that_violate_the_format(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        load(write(tmp_path, "q.jsonl", row))


def test_tests_in_a_single_cell(tmp_path):
    """A check function stays as it is, a JSON list is parsed, any other text has one assert per line."""
    cells = [
        "def check(candidate):\n    assert candidate(1) == 2",
        '[{"args": [1], "expected": 2}]',
        "assert f(1) == 2\n",
    ]
    rows = load(write(tmp_path, "q.jsonl", *({"prompt": "a", "tests": cell} for cell in cells)))
    assert [row["tests"] for row in rows] == [cells[0], [{"args": [1], "expected": 2}], ["assert f(1) == 2"]]


# --- the Hub


@pytest.fixture
def sets(monkeypatch):
    """A fake Hub with a few small datasets: {(name, config): {split: rows}}."""
    datasets, huggingface_hub = pytest.importorskip("datasets"), pytest.importorskip("huggingface_hub")
    sets = {
        ("openai/gsm8k", "main"): {"train": [GSM8K] * 3, "test": [GSM8K | {"question": "Another?"}]},
        ("HuggingFaceH4/MATH-500", None): {"test": [MATH_500 | {"problem": f"Halve {i}."} for i in range(10)]},
        ("google-research-datasets/mbpp", "sanitized"): {"train": [MBPP_SANITIZED], "test": [MBPP_SANITIZED], "prompt": []},
        ("someone/own", None): {"one": [{"q": "1+1?", "gold": "2"}], "two": [{"q": "1+2?", "gold": "3"}]},
    }  # fmt: skip

    def load_dataset(name, config=None):
        if (name, config) not in sets:
            raise ValueError(f"BuilderConfig '{config}' not found.\nAvailable: ['main']")
        splits = sets[name, config]
        return datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in splits.items()})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name, timeout: None)
    hub._fetch.cache_clear()
    yield sets
    hub._fetch.cache_clear()


def test_default_configuration_and_split(sets):
    assert [row["id"] for row in load("openai/gsm8k")] == ["gsm8k:train-0", "gsm8k:train-1", "gsm8k:train-2"]
    assert load("openai/gsm8k", split="eval")[0]["prompt"] == "Another?"
    assert load("openai/gsm8k:main[test]", split="train")[0]["prompt"] == "Another?"
    assert len(load("openai/gsm8k", n=2)) == 2
    assert load("google-research-datasets/mbpp")[0]["tests"] == MBPP_SANITIZED["test_list"]
    assert len(load("HuggingFaceH4/MATH-500")) == 10  # its only split
    columns = {"prompt": "q", "answer": "gold"}
    (row,) = load("someone/own[two]", columns=columns)
    assert (row["prompt"], row["answer"], row["task"]) == ("1+2?", "3", "own")


@pytest.mark.parametrize(
    "source, message",
    [
        ("openai/gsm8k[tset]", r"there is no split tset, only train, test"),
        ("openai/gsm8k:mian", r"gsm8k:mian: cannot be loaded: BuilderConfig 'mian' not found. Available: \['main'\]"),
        ("someone/own", r"choose a split, such as someone/own\[one\]: one, two"),
        ("someone/own[one]", r"someone/own\[one\]:one-0: no column prompt.*, only q, gold: .*columns"),
        ("google-research-datasets/mbpp[prompt]", "has no rows"),
    ],
)
def test_refuses_invalid_hub_sources(sets, source, message):
    with pytest.raises(DataError, match=message) as error:
        load(source)
    assert "\n" not in str(error.value)


def test_held_out_questions_come_from_the_evaluation_split(sets):
    train, held_out, notes = load_with(["openai/gsm8k"], [], 2, 9, 0)
    assert len(train) == 2 and [row["prompt"] for row in held_out] == ["Another?"]
    assert notes == ["openai/gsm8k: the first 2 of 3 questions are used (train_questions)"]
    train, held_out, notes = load_with(["openai/gsm8k[train]"], [], 9, 9, 0)
    assert [row["prompt"] for row in held_out] == ["Another?"]


def test_notes_training_on_a_benchmark(sets):
    train, held_out, notes = load_with(["HuggingFaceH4/MATH-500"], [], 99, 99, 0)
    assert len(train) == 8 and len(held_out) == 2  # a fifth of its only split is held out
    assert "made for evaluation" in notes[0]
    assert not load_with(["sums"], ["HuggingFaceH4/MATH-500"], 9, 9, 0)[2][1:]


def test_fails_fast_without_network_or_package(monkeypatch):
    pytest.importorskip("datasets")
    hub._fetch.cache_clear()
    start = time.monotonic()
    with pytest.raises(DataError, match="openai/gsm8k: this machine cannot reach the Hub.*countdown.*files"):
        load("openai/gsm8k")
    assert time.monotonic() - start < 10
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="openai/gsm8k: .*pip install datasets"):
        load("openai/gsm8k")


def test_refuses_unknown_hub_datasets(monkeypatch):
    import httpx
    import huggingface_hub

    def refuse(self, name, timeout):
        raise httpx.HTTPError("404 Client Error")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
    hub._fetch.cache_clear()
    with pytest.raises(DataError, match="openai/gms8k: .*Hub.* Did you mean 'openai/gsm8k'"):
        load("openai/gms8k")


def test_a_folder_is_not_a_hub_dataset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    with pytest.raises(DataError, match="a/b: unknown source: use sums"):
        load("a/b")


# --- Countdown


def test_countdown_solutions_and_splits():
    rows = questions("countdown", "train", 200, seed=0)
    for row in rows:
        value = eval(row["solution"].replace("/", "//"), {"__builtins__": {}})
        assert value == Fraction(eval(row["solution"], {"__builtins__": {}})) == row["target"]
        numbers = "".join(c if c.isdigit() else " " for c in row["solution"]).split()
        assert sorted(map(int, numbers)) == sorted(row["nums"]) and len(row["nums"]) in (3, 4)
        assert all(str(n) in row["prompt"] for n in [row["target"], *row["nums"]]) and row["grader"] == "countdown"
    held_out = questions("countdown", "eval", 200, seed=0)
    problems = {(row["target"], *sorted(row["nums"])) for row in rows}
    assert not problems & {(row["target"], *sorted(row["nums"])) for row in held_out}


# --- reasoning_gym


@pytest.fixture
def generate():
    """data/gym.py without its child process."""
    pytest.importorskip("reasoning_gym")
    random_state = random.getstate()
    yield gym._generate
    random.setstate(random_state)


def test_reasoning_gym_is_reproducible():
    pytest.importorskip("reasoning_gym")
    rows = load("reasoning_gym:ransom_note", 5, seed=3)  # depends on the order of a set
    assert rows == load("reasoning_gym:ransom_note", 5, seed=3)
    assert [row["id"] for row in rows][:2] == [
        "reasoning_gym:ransom_note-train-3-0",
        "reasoning_gym:ransom_note-train-3-1",
    ]
    assert (rows[0]["grader"], rows[0]["family"], rows[0]["task"]) == (
        "reasoning_gym",
        "ransom_note",
        "reasoning_gym:ransom_note",
    )


def test_reasoning_gym_splits_are_disjoint(generate):
    train = {row["prompt"] for seed in (0, 1) for row in generate("coin_flip", "train", 60, seed)}
    held_out = {row["prompt"] for row in generate("coin_flip", "eval", 15, 0)}
    assert len(held_out) == 15 and not train & held_out
    with pytest.raises(DataError, match="does not have 500 different eval questions"):
        generate("coin_flip", "eval", 500, 0)


def test_entries_have_built_in_types_and_golds_come_from_examples(generate):
    (row,) = generate("gsm_symbolic", "train", 1, 0)  # its entries contain fractions
    assert row["answer"] and json.dumps(row["entry"])
    (row,) = generate("graph_color", "train", 1, 0)  # has no answer, but an example in its metadata
    assert json.loads(row["answer"])
    assert generate("rush_hour", "train", 1, 0)[0]["answer"] is None


def test_refuses_unknown_families(generate):
    with pytest.raises(DataError, match="has no family chain_summ. Did you mean 'chain_sum'"):
        generate("chain_summ", "train", 1, 0)


def test_levels_of_a_family(generate):
    rows = generate("chain_sum@1-3", "train", 7, 0)
    assert [row["level"] for row in rows] == [1, 1, 2, 2, 3, 3, 3] and {row["family"] for row in rows} == {"chain_sum"}
    assert len({row["id"] for row in rows}) == len({row["prompt"] for row in rows}) == 7
    assert rows == generate("chain_sum@1-3", "train", 7, 0)
    assert [row["level"] for row in generate("chain_sum@2", "eval", 2, 0)] == [2, 2]
    assert "level" not in generate("chain_sum", "train", 1, 0)[0]
    for levels, problem in (
        ("x", "levels are written"),
        ("3-1", "levels are written"),
        ("1-99", "chain_sum has levels up to 10, not 11"),
    ):
        with pytest.raises(DataError, match=problem):
            generate(f"chain_sum@{levels}", "train", 500, 0)


def test_refuses_families_that_accept_nonsense(generate):
    with pytest.raises(DataError, match="nonsense"):
        generate("game_of_life_halting", "train", 1, 0)


def test_missing_package_names_the_install_command(monkeypatch):
    monkeypatch.setattr(gym.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="reasoning_gym:chain_sum: .*pip install reasoning-gym"):
        load("reasoning_gym:chain_sum")


def test_importing_data_imports_no_optional_packages():
    code = "import sys, data; sys.exit(bool({'torch', 'datasets', 'reasoning_gym', 'pyarrow', 'sympy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
