"""Loading questions from files: all formats, all mistakes, held-out questions, and the order of sampling."""

import json
import random
import subprocess
import sys
from types import SimpleNamespace

import pytest

from data import DataError, QuestionSampler, load, load_questions
from data.tasks import MAKERS, make_sum

ROWS = [{"question": f"What is {i} + 1?", "gold": i + 1, "level": "easy"} for i in range(20)]


def load_with(train_data, eval_data, train_questions, eval_questions, seed, curriculum_steps=0, system_prompt=None):
    """Call `load_questions` with these settings."""
    settings = {
        "train_data": train_data,
        "eval_data": eval_data,
        "train_questions": train_questions,
        "eval_questions": eval_questions,
        "seed": seed,
        "columns": {},
        "curriculum_steps": curriculum_steps,
        "system_prompt": system_prompt,
    }
    return load_questions(SimpleNamespace(**settings))


def make_files(folder):
    import pyarrow
    import pyarrow.parquet

    (folder / "q.jsonl").write_text("\n\n".join(map(json.dumps, ROWS)) + "\n")
    (folder / "q.json").write_text(json.dumps(ROWS))
    lines = ["question,gold,level"] + [f"{r['question']},{r['gold']},{r['level']}" for r in ROWS]
    (folder / "q.csv").write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "q.parquet")


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_every_format_gives_the_same_schema(tmp_path, suffix):
    make_files(tmp_path)
    rows = load(str(tmp_path / f"q.{suffix}"), columns={"answer": "gold"})
    assert len(rows) == 20
    assert rows[3]["prompt"] == rows[3]["question"] == "What is 3 + 1?"
    assert str(rows[3]["answer"]) == "4" and rows[3]["level"] == "easy" and rows[3]["task"] == "q"
    assert len({row["id"] for row in rows}) == 20
    assert len(load(str(tmp_path / f"q.{suffix}"), n=5)) == 5


def test_keeps_ids_tasks_messages_and_tests(tmp_path):
    row = {
        "id": 7,
        "task": "code",
        "prompt": [{"role": "user", "content": "Hi"}],
        "tests": "assert f(1) == 1\n\nassert f(2) == 2",
    }
    (tmp_path / "q.jsonl").write_text(json.dumps(row))
    (loaded,) = load(str(tmp_path / "q.jsonl"))
    assert (loaded["id"], loaded["task"]) == ("7", "code")
    assert loaded["prompt"] == row["prompt"] and loaded["tests"] == ["assert f(1) == 1", "assert f(2) == 2"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("q.jsonl", '{"prompt": "a"}\n{"prompt": \n', r"q.jsonl:2: not valid JSON"),
        ("q.jsonl", '{"prompt": "a"}\n[1]\n', r"q.jsonl:2: expected an object"),
        ("q.jsonl", "", r"q.jsonl: the file has no rows"),
        ("q.jsonl", '{"text": "a"}', r"q.jsonl:1: no column prompt.*, only text"),
        ("q.jsonl", '{"prompt": ""}', r"q.jsonl:1: the prompt is ''"),
        ("q.jsonl", '{"prompt": 3}', r"q.jsonl:1: the prompt is '3'"),
        ("q.jsonl", '{"prompt": []}', r"q.jsonl:1: the prompt is"),
        ("q.jsonl", '{"prompt": ["Hi"]}', r"q.jsonl:1: the prompt is .* list of .role, content"),
        ("q.jsonl", '{"prompt": [{"role": "user"}]}', r"q.jsonl:1: the prompt is"),
        ("q.jsonl", '{"prompt": [{"role": "user", "content": [1]}]}', r"q.jsonl:1: the prompt is"),
        ("q.json", '{"prompt": "a"}', r"q.json: expected a list"),
        ("q.json", '[{"prompt": "a"},\n oops]', r"q.json:2: not valid JSON"),
        ("q.csv", "prompt,answer\na,1\nb\n", r"q.csv:3: .* 2 fields"),
        ("q.csv", "prompt,answer\na,1,2\n", r"q.csv:2: .* 2 fields"),
        ("q.csv", "", r"q.csv: the file has no rows"),
        ("q.parquet", "not parquet", r"q.parquet: not a parquet file"),
        ("q.txt", "a", r"q.txt: unknown source"),
    ],
)  # fmt: skip
def test_errors_name_file_and_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message) as error:
        load(str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_refuses_missing_files_missing_columns_and_other_encodings(tmp_path):
    make_files(tmp_path)
    with pytest.raises(DataError, match=r"p.jsonl: there is no such file. Did you mean 'q.jsonl'"):
        load(str(tmp_path / "p.jsonl"))
    with pytest.raises(DataError, match=r"q.jsonl:1: columns maps answer to 'glod'.*Did you mean 'gold'"):
        load(str(tmp_path / "q.jsonl"), columns={"answer": "glod"})
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é"}'.encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8 text at byte 12"):
        load(str(tmp_path / "latin.jsonl"))


def test_splits_a_file_into_training_and_held_out_questions(tmp_path):
    rows = ROWS + ROWS[:5]  # duplicates must be in the same part
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = str(tmp_path / "q.jsonl")
    train, held_out, notes = load_with([source], [], 1000, 400, 0)
    assert len(held_out) == 4 and len({r["prompt"] for r in train}) == 16
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in held_out}
    assert load_with([source], [], 1000, 400, 9)[1] == held_out  # the same for every seed
    assert "4 held out" in notes[0]
    (tmp_path / "one.jsonl").write_text(json.dumps(ROWS[0]))
    with pytest.raises(DataError, match="one.jsonl: one question cannot be"):
        load_with([str(tmp_path / "one.jsonl")], [], 1000, 400, 0)


def make_questions(*levels):
    return [SimpleNamespace(row={"id": f"r{i}", "level": level}) for i, level in enumerate(levels)]


def test_levels_are_numbers_also_in_text():
    assert QuestionSampler(make_questions(3, "Level 5", 2.5), 10, seed=0).levels == [3.0, 5.0, 2.5]
    for level in (None, "hard", ""):
        with pytest.raises(DataError, match="curriculum_steps: row r1 has no number in .* level"):
            QuestionSampler(make_questions(3, level), 10, seed=0)
    QuestionSampler(make_questions(None), 0, seed=0)  # levels are needed only for a curriculum


def test_load_questions_refuses_rows_without_a_level(tmp_path):
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    source = str(tmp_path / "q.jsonl")
    load_with([source], [], 10, 4, 0)
    with pytest.raises(DataError, match="curriculum_steps: row q:.* has no number in .* level"):
        load_with([source], [], 10, 4, 0, curriculum_steps=5)
    load_with(["sums"], [], 10, 4, 0, curriculum_steps=5)


def test_each_epoch_has_every_question_in_a_new_order():
    """The order for a seed is fixed, so that runs of earlier versions can be resumed."""
    sampler = QuestionSampler(make_questions(*range(5)), 0, seed=0)
    order = [question.row["level"] for step in (1, 2, 3, 4, 5) for question in sampler.take(3, step)]
    rng = random.Random(0)
    assert order == [i for _ in range(3) for i in rng.sample(range(5), 5)]
    assert order == [3, 4, 0, 1, 2, 3, 2, 1, 4, 0, 4, 1, 3, 0, 2]
    assert sampler.state_dict() == {"drawn": 15}
    restored = QuestionSampler(sampler.questions, 0, seed=0)
    restored.take(2, 1)
    restored.load_state_dict({"drawn": 3})
    assert [question.row["level"] for question in restored.take(12, 2)] == order[3:]


def test_curriculum_adds_levels_one_by_one():
    sampler = QuestionSampler(make_questions(1, 1, 2, 3), 3, seed=0)
    levels = [{question.row["level"] for question in sampler.take(8, step)} for step in (1, 2, 3, 9)]
    assert levels == [{1}, {1, 2}, {1, 2, 3}, {1, 2, 3}]


def test_removes_held_out_questions_from_training(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, ROWS[:3])))
    train, held_out, notes = load_with([str(tmp_path / "a.jsonl")], [str(tmp_path / "b.jsonl")], 99, 9, 0)
    assert len(train) == 17 and len(held_out) == 3 and "3 training questions are also held out" in notes[0]
    with pytest.raises(DataError, match="train_data: .* eval_data"):
        load_with([str(tmp_path / "b.jsonl")], [str(tmp_path / "a.jsonl")], 99, 99, 0)


def test_built_in_families_have_separate_held_out_questions():
    train, held_out, notes = load_with(["sums", "words", "functions"], [], 50, 30, 1)
    assert len(train) == 150 and len(held_out) == 30 and not notes
    assert {row["task"] for row in held_out} == {"sums", "words", "functions"}
    assert load_with(["sums", "words", "functions"], [], 50, 30, 2)[1] == held_out


def test_empty_cells_unusual_line_separators_and_long_cells(tmp_path):
    (tmp_path / "q.csv").write_text('prompt,answer,tests,id\na,1,,0\nb,,"assert f(1) == 1",\n')
    first, second = load(str(tmp_path / "q.csv"))
    assert (first["answer"], first["tests"], first["id"]) == ("1", None, "0")
    assert (second["answer"], second["tests"], second["id"]) == (None, ["assert f(1) == 1"], "q:3")
    (tmp_path / "q.jsonl").write_text('{"prompt": "a\u2028b"}\r\n{"prompt": "c"}', encoding="utf-8")
    assert [row["prompt"] for row in load(str(tmp_path / "q.jsonl"))] == ["a\u2028b", "c"]
    (tmp_path / "long.csv").write_text("prompt\n" + "x" * 200_000)
    assert len(load(str(tmp_path / "long.csv"))[0]["prompt"]) == 200_000


def test_refuses_more_questions_than_a_family_has(monkeypatch):
    """It must not search forever."""
    few = [make_sum(random.Random(seed)) for seed in range(40)]
    monkeypatch.setitem(MAKERS, "sums", lambda rng: rng.choice(few))
    with pytest.raises(DataError, match="sums does not have 100 different eval questions"):
        load("sums", 100, "eval")


def test_notes_that_only_part_of_a_file_is_used(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    train, _, notes = load_with([str(tmp_path / "a.jsonl")], ["sums"], 7, 9, 0)
    assert len(train) == 7 and "the first 7 of 20 questions are used" in notes[0]
    _, held_out, notes = load_with(["sums"], [str(tmp_path / "a.jsonl")], 7, 9, 0)
    assert len(held_out) == 9 and "the first 9 of 20 questions are held out" in notes[0]


def test_notes_that_system_prompt_replaces_system_messages(tmp_path):
    def prompt(i, *system):
        return [*({"role": "system", "content": text} for text in system), {"role": "user", "content": f"{i} + 1?"}]

    systems = [("Be brief.",), ("Be kind.",), (), ("Be brief.", "Be kind.")] * 3
    rows = [{"prompt": prompt(i, *system), "answer": "1"} for i, system in enumerate(systems)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"prompt": "Hi", "answer": "1"}])))

    def notes(system_prompt):
        return [n for n in load_with([str(tmp_path / "a.jsonl")], [], 99, 9, 0, 0, system_prompt)[2] if "replaces" in n]

    (note,) = notes("Be brief.")
    assert "system_prompt replaces the system message of 6 of 13 questions (such as row a:" in note
    assert "of 9 of 13 questions" in notes("Think.")[0]
    assert not notes(None) and not notes("")


def test_notes_answers_that_may_have_a_decimal_comma(tmp_path):
    golds = ["0,5", "-2,25", "1,23456", "1,234", "1,234,567", "(1,2)", "1, 2", "5", "", "0.5"]
    rows = "\n".join(f"What is {i}?;{gold}" for i, gold in enumerate(golds))
    (tmp_path / "q.csv").write_text(f"prompt;answer\n{rows}\n")
    (note,) = [n for n in load_with([str(tmp_path / "q.csv")], [], 99, 1, 0)[2] if "decimal comma" in n]
    assert note.startswith("3 answers are two numbers, such as ") and "write a point" in note


def test_show_prints_rows_and_errors():
    show = [sys.executable, "-m", "data", "show"]
    shown = subprocess.run([*show, "words", "-n", "1", "--split", "eval"], capture_output=True, text=True, check=True)
    row = json.loads(shown.stdout)
    assert row["task"] == "words" and row["id"].startswith("words-eval")
    failed = subprocess.run([*show, "wrods"], capture_output=True, text=True)
    assert failed.returncode == 1 and failed.stderr.startswith("error: wrods: unknown source")


# --- delimiters and line formats


@pytest.mark.parametrize(
    "text, rows",
    [
        ("prompt;answer\na, b or c?;1\nd;2\n", [("a, b or c?", "1"), ("d", "2")]),
        ("\ufeffprompt;answer\r\na;1\r\n", [("a", "1")]),
        ("prompt\tanswer\na, b; c?\t1\n\nd\t2\n", [("a, b; c?", "1"), ("d", "2")]),
        ('prompt;answer\n"a; b";1\n"c\nd";2\n', [("a; b", "1"), ("c\nd", "2")]),
        ('"prompt";"answer"\n"a ""b"" c";1\n', [('a "b" c', "1")]),
        ('"prompt; long",prompt,answer\nx,"a;\nb",1\ny,c;d,2\n', [("a;\nb", "1"), ("c;d", "2")]),
        ("prompt;answer\nWas ist 1/2?;0,5\nUnd 1/4?;0,25\n", [("Was ist 1/2?", "0,5"), ("Und 1/4?", "0,25")]),
        ("prompt;answer;unit, if any\na;1;cm\n", [("a", "1")]),
        ("prompt,answer;note\na,1\n", [("a", None)]),
        ("prompt\nWhat is 1, 2 or 3?\nAnd 4?\n", [("What is 1, 2 or 3?", None), ("And 4?", None)]),
        ("prompt\na;b\tc,d\n", None),  # no delimiter can be excluded
        ("prompt,answer\nWas ist 1/2?,0,5\n", None),
        ("prompt;answer\na;1;2\n", None),
        ("prompt\tanswer\na\n", None),
    ],
)
def test_csv_delimiters(tmp_path, text, rows):
    """Commas, semicolons (as in Excel with a decimal comma) and tabs."""
    for name in ("q.csv", "q.tsv"):
        (tmp_path / name).write_text(text, encoding="utf-8", newline="")
        if rows is None:
            with pytest.raises(DataError, match=rf"{name}:2: this row does not have \d fields like the header"):
                load(str(tmp_path / name))
        else:
            assert [(row["prompt"], row.get("answer")) for row in load(str(tmp_path / name))] == rows


OBJECTS = '{"prompt": "a, b"}', '{"prompt": "c"}'


@pytest.mark.parametrize("name", ["q.json", "q.jsonl"])
@pytest.mark.parametrize(
    "text",
    [
        "{}\n{}\n",
        "\n{}\n\n\r\n{}",
        "\ufeff{}\r\n{}\r\n",
        "{},\n{},\n",
        "{},\n{}",
        "{} ,\n{}",
        "[{}, {}]",
        "[\n{},\n{}\n]\n",
        " \n[{},\n{}]",
    ],
)
def test_json_lines_and_lists_in_both_file_types(tmp_path, name, text):
    (tmp_path / name).write_text(text.replace("{}", "%s") % OBJECTS, encoding="utf-8", newline="")
    assert [row["prompt"] for row in load(str(tmp_path / name))] == ["a, b", "c"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("q.json", '{"prompt": "a"}\n{"prompt": \n', "q.json:2: not valid JSON"),
        ("q.json", '{"prompt": "a"}\n\n[1]\n', "q.json:3: expected an object"),
        ("q.json", '{"prompt":\n "a"}', "q.json: expected a list of objects.* or one object per line"),
        ("q.json", '{"prompt":\n "a"', "q.json:2: not valid JSON"),
        ("q.json", "", "q.json:1: not valid JSON"),
        ("q.jsonl", "[]", "q.jsonl: the file has no rows"),
        ("q.jsonl", '[{"prompt": "a"},\n oops]', "q.jsonl:2: not valid JSON"),
        ("q.jsonl", '{"prompt": "a"},,\n', "q.jsonl:1: not valid JSON"),
        ("q.jsonl", '{"prompt": "a"} {"prompt": "b"}\n', "q.jsonl:1: not valid JSON"),
        ("q.tsv", "", "q.tsv: the file has no rows"),
        ("q.csv", ";;\n", "q.csv: the file has no rows"),
        ("q.csv", "prompt;answer\n;5\n", "q.csv:2: the prompt is ''"),
    ],
)  # fmt: skip
def test_errors_in_json_lines_and_csv_name_the_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message) as error:
        load(str(tmp_path / name))
    assert "\n" not in str(error.value)
