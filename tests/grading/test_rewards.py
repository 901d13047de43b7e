"""Reward files: weights, `when`, verdicts, process rewards, the checks before a run, and error messages."""

import importlib
import itertools
import math
import os
import subprocess
import sys
import time

import pytest
from conftest import completion, score_one, write
from hypothesis import given, settings
from hypothesis import strategies as st

from grading import Completion, RewardError, load_rewards, outcome_of, outcome_shares, preflight, row_kind, score_all
from grading.rewards import reward_file
from grading.rewards.reward_file import modules_beside
from grading.rewards.scoring import parse_result


def test_weights_when_metrics_and_verdict(tmp_path):
    rewards = load_rewards(
        write(
            tmp_path,
            """
            @reward(weight=2.0, when="math")
            def right(c): return c.answer == c.row["answer"], "because"
            @reward(weight=0.5, when=lambda row: row["task"] == "t")
            def short(c): return len(c.text) < 5
            @reward
            def never(c): return None
            @metric
            def length(c): return len(c.text)
            """,
        )
    )
    score = score_one(rewards, completion("7", answer="7"))
    assert (score.total, score.verdict) == (2.5, "right")
    assert score.parts == {"right": 1.0, "short": 1.0, "never": None}
    assert score.metrics == {"length": 1.0} and score.reasons == {"right": "because"}
    score = score_one(rewards, completion("8", answer="7"))
    assert (score.total, score.verdict) == (0.5, "wrong")
    code_row = score_one(rewards, Completion("q", "8", {"id": 1, "task": "other", "tests": ["assert f(1) == 1"]}))
    assert code_row.parts["right"] is None and code_row.verdict == "ungraded"  # no function applies: not a reward of 0


def test_reward_funcs_and_weights_by_name(tmp_path):
    path = write(tmp_path, "@reward\ndef one(c): return 1\n@reward(weight=3)\ndef two(c): return 1\n")
    assert load_rewards(path).names == ["one", "two"]
    assert score_one(load_rewards(path, ["two"], {"two": 0.25}), completion("")).total == 0.25
    with pytest.raises(RewardError, match="reward_funcs: .* no reward function 'tow'. Did you mean 'two'"):
        load_rewards(path, ["tow"])
    with pytest.raises(RewardError, match="reward_weights: .* no reward function 'oen'. Did you mean 'one'"):
        load_rewards(path, None, {"oen": 1.0})


def test_ungraded_is_not_zero(tmp_path):
    rewards = load_rewards(
        write(
            tmp_path,
            """
            @reward
            def grader(c): raise Ungraded("the sandbox is gone")
            @reward(weight=0.1)
            def shape(c): return 1
            """,
        )
    )
    score = score_one(rewards, completion("x"))
    assert score.verdict == "ungraded" and math.isnan(score.total)
    assert score.reasons == {"grader": "the sandbox is gone"}


@pytest.mark.parametrize(
    "value",
    [
        "float('nan')",
        "float('inf')",
        "'1'",
        "[1.0]",
        "(1, 2, 3)",
        "{}",
        "10**5000",
        "(1, 2)",
        "[(0, 'x')]",
        "[(0, 1), 2]",
    ],
)
def test_invalid_return_value_names_function_row_and_value(tmp_path, value):
    rewards = load_rewards(write(tmp_path, f"@reward\ndef odd(c): return {value}\n"))
    with pytest.raises(RewardError, match=r"'odd' \(rewards.py:\d+\), row r1: returned .*expected a finite number"):
        score_one(rewards, completion("x"))


def test_exception_names_function_line_row_and_completion(tmp_path):
    rewards = load_rewards(write(tmp_path, "@reward\ndef broken(c):\n    return 1 / 0\n"))
    with pytest.raises(RewardError, match=r"'broken' \(rewards.py:4\), row r1: ZeroDivisionError.*'the end'"):
        score_one(rewards, completion("the end"))


def test_counts_can_be_saved_and_restored(tmp_path):
    rewards = load_rewards(write(tmp_path, "@reward\ndef odd(c): return 1 / len(c.text)\n"), reward_errors="skip")
    score_all(rewards, [completion("x")] * 99 + [completion("")])
    restored = load_rewards(write(tmp_path, "@reward\ndef odd(c): return 1\n"))
    restored.load_state_dict(rewards.state_dict())
    assert (restored.scored, restored.errors) == (100, 1)


def test_preflight_detects_misspelt_column(tmp_path):
    rewards = load_rewards(write(tmp_path, "@reward\ndef right(c): return c.answer == c.row['anwser']\n"))
    with pytest.raises(RewardError, match="no column 'anwser'.*Did you mean 'answer'"):
        preflight(rewards, [{"id": "r1", "task": "t", "prompt": "q", "answer": "1"}])


def test_preflight_detects_rows_that_only_shaping_would_judge(tmp_path):
    """A completion must not count as right for its format alone because the row has no gold answer."""
    rewards = load_rewards("rewards.py")
    good = {"id": "r1", "task": "t", "prompt": "q", "answer": "1"}
    preflight(rewards, [good, {"id": "r2", "task": "t", "prompt": "q", "tests": ["assert f(1) == 1"]}])
    for bad in ({"gold": "1"}, {"answer": None}):
        with pytest.raises(RewardError, match="row r3: .*only format applies.* correct or passes_tests.*columns"):
            preflight(rewards, [good, {"id": "r3", "task": "t", "prompt": "q"} | bad])
    misspelt = load_rewards(write(tmp_path, "@reward(when='maths')\ndef right(c): return 1\n"))
    with pytest.raises(RewardError, match="row r1: rewards.py .*no reward applies.* right"):
        preflight(misspelt, [good])
    preflight(load_rewards(write(tmp_path, "@reward\ndef any(c): return 1\n")), [{"id": 1, "task": "t", "prompt": "q"}])


def test_preflight_detects_empty_gold(tmp_path):
    """Also if the gold is in a custom column and the first rows are valid."""
    rewards = load_rewards(write(tmp_path, "@reward\ndef right(c): return grade_math(c.answer, c.row['gold'])\n"))
    good = {"id": "r1", "task": "t", "prompt": "q", "gold": "1"}
    preflight(rewards, [good, good])
    with pytest.raises(RewardError, match="row r2: ValueError: the gold answer is empty"):
        preflight(rewards, [good, {"id": "r2", "task": "t", "prompt": "q", "gold": None}])
    with pytest.raises(RewardError, match="row r3: KeyError: .*no column 'gold'"):
        preflight(rewards, [good, {"id": "r3", "task": "t", "prompt": "q"}])


def test_selects_judge(tmp_path):
    """Precedence: a grader's outcome, then use of the row, then the weight. A heavier format reward is not selected."""
    source = """
        def gold(c): return c.row["answer"]
        {when}
        def right(c): return {right}
        @reward(weight={weight})
        def format(c): return 1
        """

    def judge_and_verdict(right, weight, when="@reward", answer="7"):
        rewards = load_rewards(write(tmp_path, source.format(right=right, weight=weight, when=when)))
        score = score_one(rewards, completion("\\boxed{8}", answer=answer))
        return score.judge, score.verdict

    assert judge_and_verdict("c.answer == c.row['answer']", 2) == ("right", "wrong")
    assert judge_and_verdict("any(c.row['answer'] == a for a in [c.answer])", 2) == ("right", "wrong")
    assert judge_and_verdict("c.answer == gold(c)", 2) == ("right", "wrong")  # a helper reads the row
    assert judge_and_verdict("grade_math(c.answer, gold(c))", 10) == ("right", "wrong")
    assert judge_and_verdict("c.answer == gold(c)", 0.5) == ("right", "wrong")
    assert judge_and_verdict("None", 0.1) == (None, "wrong")


def test_outcomes_are_counted():
    assert (outcome_of("wrong: 5 is not 6"), outcome_of("right"), outcome_of("too long: 5")) == ("wrong", "right", None)
    rewards = load_rewards("rewards.py")
    scores = score_all(rewards, [completion(text, answer="7") for text in ("\\boxed{7}", "\\boxed{8}", "7", "7")])
    assert outcome_shares(scores) == {"outcomes/right": 0.25, "outcomes/wrong": 0.25, "outcomes/no_answer": 0.5}


def test_row_kinds():
    assert (
        row_kind({"answer": "1"}) == "math" and row_kind({"answer": 0}) == "math" and row_kind({"answer": None}) is None
    )
    assert row_kind({"answer": "1", "tests": ["assert f() == 1"]}) == "code" and row_kind({"tests": []}) is None
    assert row_kind({"grader": "countdown", "target": 4, "nums": [2, 2]}) == "countdown"


# --- process rewards


def test_process_rewards_are_values_at_positions(tmp_path):
    rewards = load_rewards(
        write(
            tmp_path,
            """
            @reward(weight=0.5)
            def steps(c): return [(i + 1, 1.0) for i, x in enumerate(c.text) if x == "."]
            @metric
            def last(c): return [(len(c.text), 2)], "the end"
            """,
        )
    )
    score = score_one(rewards, completion("a. b."))
    assert score.process == {"steps": [(2, 1.0), (5, 1.0)], "last": [(5, 2)]}
    assert score.parts == {"steps": 2.0} and score.metrics == {"last": 2.0} and score.total == 1.0
    assert score.reasons == {"last": "the end"}
    assert score_one(rewards, completion("")).process == {"steps": [], "last": [(0, 2)]}


@pytest.mark.parametrize("position", ["6", "-1", "True", "1.0", "None"])
def test_refuses_positions_outside_the_text(tmp_path, position):
    rewards = load_rewards(write(tmp_path, f"@reward\ndef steps(c): return [(5, 1), ({position}, 1)]\n"))
    with pytest.raises(RewardError, match="'steps' .*row r1: returned the position .*from 0 to 5"):
        score_one(rewards, completion("a. b."))


@given(st.lists(st.tuples(st.integers(0, 9), st.floats(-1e6, 1e6)), max_size=5))
@settings(max_examples=50, deadline=None)
def test_process_reward_counts_as_its_sum(steps):
    total, _, process = parse_result(steps, 9)
    assert process == steps and total == pytest.approx(sum(value for _, value in steps))


# --- notes before a run


def test_reloads_a_changed_file(tmp_path, monkeypatch):
    """Also after a change within one second that keeps the size, which Python's bytecode cache would miss."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    for weight in (0.4, 0.5, 0.6):
        path = write(tmp_path, f"@reward(weight={weight})\ndef right(c): return 1")
        os.utime(path, (1e9, 1e9))
        assert load_rewards(path).functions[0].weight == weight
    assert not (tmp_path / "__pycache__").exists()


def test_imports_modules_beside_the_file(tmp_path):
    """They are imported anew for each file and each load, also inside a function that runs later."""
    for folder, value in (("a", 1), ("b", 2), ("b", 3)):
        (tmp_path / folder / "package").mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "package" / "__init__.py").write_text("from package.inner import VALUE\n")
        (tmp_path / folder / "package" / "inner.py").write_text(f"VALUE = {value}\n")
        (tmp_path / folder / "my_later.py").write_text(f"LATER = {10 * value}\n")
        source = (
            "from package import VALUE\n@reward\ndef f(c):\n    import my_later\n    return VALUE + my_later.LATER\n"
        )
        rewards = load_rewards(write(tmp_path / folder, source))
        assert score_one(rewards, completion("x")).total == 11 * value
        assert [file.name for file in modules_beside(rewards.path)] == ["my_later.py", "__init__.py", "inner.py"]
        assert not list(tmp_path.rglob("__pycache__"))
    assert modules_beside(load_rewards("rewards.py").path) == [] and str(tmp_path / "b") not in sys.path


def test_a_copy_in_a_run_folder_imports_from_the_rewards_of_the_project(tmp_path):
    """The reward file my_rewards.py of a user is called rewards.py there."""
    (tmp_path / "rewards.py").write_text("from rewards import correct\nreward_funcs = [correct]\n")
    command = "from grading import load_rewards; import sys; print(load_rewards(sys.argv[1]).names)"
    arguments = [sys.executable, "-c", command, tmp_path / "rewards.py"]
    assert subprocess.run(arguments, capture_output=True, text=True).stdout == "['correct']\n"


def test_modules_beside_a_file_in_the_folder_of_the_project(tmp_path, monkeypatch):
    """They are imported anew and copied, but the modules of the project are not."""
    monkeypatch.setattr(reward_file, "ROOT", tmp_path)
    monkeypatch.setattr(reward_file, "OWN_MODULES", ("own_module",))
    monkeypatch.setattr(reward_file, "_folders", [])
    (tmp_path / "own_module.py").write_text("")
    path = list(sys.path)
    for value in (1, 2):
        (tmp_path / "root_helper.py").write_text(f"VALUE = {value}\n")
        source = "import own_module\nfrom root_helper import VALUE\n@reward\ndef f(c): return VALUE\n"
        rewards = load_rewards(write(tmp_path, source))
        assert score_one(rewards, completion("x")).total == value
        assert modules_beside(rewards.path) == [tmp_path / "root_helper.py"] and sys.path == path


def test_modules_beside_the_file_do_not_hide_others(tmp_path):
    (tmp_path / "colorsys.py").write_text("def hidden(): return 1\n")
    load_rewards(write(tmp_path, "@reward\ndef f(c): return 1\n"))
    assert "hidden" not in vars(importlib.import_module("colorsys"))


@pytest.mark.parametrize(
    "helper, source, message",
    [
        (
            "my_helper.py",
            "import my_helpr",
            "No module named 'my_helpr'. Put my_helpr.py into .*, or install the package",
        ),
        ("data.py", "from data import my_check", r"cannot import name 'my_check'.* here: rename .*data.py"),
        ("my_helper.py", "import my_helper", "my_helper.py:1: SyntaxError"),
    ],
)
def test_names_the_module_that_cannot_be_imported(tmp_path, helper, source, message):
    (tmp_path / helper).write_text("def my_check(:\n" if "Syntax" in message else "")
    with pytest.raises(RewardError, match=message):
        load_rewards(write(tmp_path, source + "\n@reward\ndef f(c): return 1\n"))


@pytest.mark.parametrize(
    "columns, note",
    [
        ({"grader": "human"}, "column grader is 'human', so that rewards with when='math' do not apply"),
        ({"grader": "code"}, "column grader is 'code', so that rewards with when='code' apply, but tests is missing"),
        ({"grader": "countdown"}, "column grader is 'countdown', .* but target is missing"),
        (
            {"task": "code"},
            r"the task \(the column task, .*\) is 'code', so that rewards with when='code' apply as well",
        ),
        ({"task": "reasoning_gym"}, "is 'reasoning_gym', so that rewards with when='reasoning_gym' apply as well"),
        (
            {"task": "math", "tests": ["assert f(1) == 2"], "answer": None},
            "when='math' apply as well as those for code",
        ),
    ],
)
def test_names_columns_that_change_which_rewards_apply(columns, note):
    row = {"id": "r1", "task": "t", "prompt": "q", "answer": "12"} | columns
    with pytest.raises(RewardError, match=note):
        preflight(load_rewards("rewards.py"), [row])


def test_notes_columns_that_change_which_rewards_apply(tmp_path):
    row = {"id": "r1", "task": "t", "prompt": "q", "answer": "12"}
    right = "@reward(when='math')\ndef right(c): return grade_math(c.answer, c.row['answer'])\n"
    other = "@reward(when={!r})\ndef other(c): return c.row['answer'] == c.answer\n"
    rewards = load_rewards(write(tmp_path, right + other.format("code")))
    notes = preflight(rewards, [row | {"task": "code"}] * 3)
    assert notes[0].startswith("3 rows, such as r1: the task (") and "'code'" in notes[0]
    for value in ({"type": "exact"}, 5):  # some other data
        (note,) = preflight(rewards, [row | {"grader": value}])
        assert "column grader is of type" in note and "ignored" in note
    both = row | {"grader": "math", "tests": ["assert f(1) == 2"]}
    (note,) = preflight(rewards, [both])
    assert "the column grader is 'math', so that rewards with when='code' do not apply" in note
    own = load_rewards(write(tmp_path, right + other.format("exact")))
    assert preflight(own, [row, row | {"id": "r2", "grader": "exact"}, row | {"id": "r3", "task": "math"}]) == []


def test_warnings_if_a_wrong_answer_can_earn_as_much(tmp_path):
    rows = [
        {"id": "r1", "task": "t", "prompt": "q", "answer": "12"},
        {"id": "r2", "task": "t", "prompt": "q", "tests": ["assert f(1) == 2"]},
    ]
    assert preflight(load_rewards("rewards.py"), rows) == []
    source = """
        @reward
        def right(c): return grade_math(c.answer, c.row["answer"])
        @reward(weight=0.5)
        def short(c): return len(c.text) < 50
        @reward(weight={weight})
        def format(c): return {value}
        """
    assert preflight(load_rewards(write(tmp_path, source.format(weight=0.4, value=1))), rows[:1]) == []
    (warning,) = preflight(load_rewards(write(tmp_path, source.format(weight=0.5, value=1))), rows[:1])
    assert "on math rows a wrong answer can earn as much as a right one" in warning
    assert "short 0.5 + format 0.5" in warning and "adds 1." in warning
    gated = "grade_math(c.answer, c.row['answer'])[0] and 1"
    assert preflight(load_rewards(write(tmp_path, source.format(weight=0.5, value=gated))), rows[:1]) == []
    anywhere = "@reward\ndef right(c): return c.row['answer'] in c.text\n"
    (warning,) = preflight(load_rewards(write(tmp_path, anywhere)), rows[:1])
    assert "gets right 1" in warning and "adds 1." in warning  # for an answer in the thinking or in a longer number
    style = "@reward\ndef short(c): return max(0, 1 - len(c.text) / 100)\n"
    (warning,) = preflight(load_rewards(write(tmp_path, style)), rows[:1])
    assert "'empty' gets short 1" in warning and "adds 0." in warning
    heavier = """
        def gold(c): return c.row["answer"]
        @reward
        def right(c): return gold(c) in c.text
        @reward(weight=2)
        def format(c): return 1
        """
    (warning,) = preflight(load_rewards(write(tmp_path, heavier)), rows[:1])
    assert "right 1 + format 2" in warning
    form = "@reward\ndef form(c): return 1\n"
    assert "verdict comes from form" in preflight(load_rewards(write(tmp_path, form)), rows[:1])[1]


def test_counts_golds_that_cannot_be_parsed(tmp_path):
    golds = ["1", "2{", "3", "}", "4{", "5{", "2{"]
    rows = [{"id": f"r{i}", "task": "t", "prompt": "q", "answer": gold} for i, gold in enumerate(golds)]
    notes = preflight(
        load_rewards(write(tmp_path, "@reward\ndef right(c): return c.row['answer'] == c.answer\n")), rows
    )
    assert "5 of 7 gold answers" in notes[0] and "rows r1, r3, r4, ... (no_answer" in notes[0]


def test_checking_thousands_of_rows_is_fast():
    rows = [{"id": str(i), "task": "t", "prompt": "q", "answer": str(i)} for i in range(5000)]
    rewards = load_rewards("rewards.py")
    start = time.perf_counter()
    preflight(rewards, rows)
    assert time.perf_counter() - start < 2


def test_shaping_and_penalties_do_not_judge(tmp_path):
    row = {"id": "r1", "task": "t", "prompt": "q"}
    shaped = load_rewards(
        write(tmp_path, "@reward\ndef right(c): return None\n@reward(weight=0.1)\ndef form(c): return 1\n")
    )
    assert score_one(shaped, completion("x")).verdict == "wrong"
    penalty = load_rewards(write(tmp_path, "@reward(weight=-1)\ndef long(c): return 1\n@metric\ndef n(c): return 1\n"))
    preflight(penalty, [row])
    assert score_one(penalty, completion("x")).total == -1


def test_exception_in_when_names_the_function(tmp_path):
    rewards = load_rewards(write(tmp_path, "@reward(when=lambda row: row['level'] > 1)\ndef hard(c): return 1\n"))
    with pytest.raises(RewardError, match="'hard' .*no column 'level'"):
        preflight(rewards, [{"id": "r1", "task": "t", "prompt": "q"}])


@pytest.mark.parametrize(
    "source, message",
    [
        ("def f(:\n", r"rewards.py:2: SyntaxError"),
        ("x = 1\ny = undefined\n", r"rewards.py:3: NameError"),
        ("def plain(c): return 1\n", "no reward with a weight"),
        ("@metric\ndef only(c): return 1\n", "no reward with a weight"),
    ],
)
def test_refuses_invalid_reward_files(tmp_path, source, message):
    with pytest.raises(RewardError, match=message):
        load_rewards(write(tmp_path, source))


def test_bundled_rewards():
    rewards = load_rewards("rewards.py")

    def total(text, truncated=False, **row):
        c = completion(text, **row)
        c.truncated = truncated
        return round(score_one(rewards, c).total, 6)

    assert total("<think>3+4=7</think>\\boxed{7}", answer="7") == total("\\boxed{7}", answer="7") == 1.1
    assert total("<think>3+4=7</think>\\boxed{8}", answer="7") == 0.1
    assert total("<think>\\boxed{7}", answer="7") == 0.0  # unclosed thinking has no answer
    assert total("a<think>b</think>\\boxed{7}", answer="7") == 1.0
    assert total("7", answer="7") == total("\\boxed{}", answer="7") == 0.0
    assert total("\\boxed{7}", truncated=True, answer="7") == 1.0
    code = {"tests": ["assert f(1) == 2"], "entry_point": "f"}
    assert total("<think>x+1</think>def f(x):\n    return x+1", **code) == 1.1
    assert total("def f(x):\n    return x", **code) == 0.1
    assert total("hello", **code) == 0.0
    with_starter = {"tests": "def check(candidate):\n    assert candidate(4) == 2.0", "entry_point": "f"}
    with_starter |= {"setup": "import math", "starter": "import math\ndef f(x):\n"}
    assert total("```python\n    return math.sqrt(x)\n```", **with_starter) == 1.0  # continues the starter: no def
    assert total("```python\ndef f(x):\n    return math.sqrt(x)\n```", **with_starter) == 1.1
    game = {"grader": "countdown", "target": 6, "nums": [2, 3]}
    assert total("<think>?</think>\\boxed{2 * 3}", **game) == 1.1 and total("\\boxed{6}", **game) == 0.1


def test_format_reward_is_strict():
    """It accepts the answer alone, or one closed thinking block at the start followed by the answer."""
    rewards = load_rewards("rewards.py", ["format"], {"format": 1.0})
    pieces = ("<think>", "</think>", "a", "\\boxed{7}")
    texts = ["".join(parts) for n in range(6) for parts in itertools.product(pieces, repeat=n)]
    for text, score in zip(texts, score_all(rewards, [completion(text, answer="7") for text in texts])):
        thinking, closed, answer = text.removeprefix("<think>").partition("</think>")
        if not (text.startswith("<think>") and closed):
            thinking, answer = "", text
        expected = "\\boxed{7}" in answer and not any("think>" in part for part in (thinking, answer))
        assert score.total == expected, text


def test_rewards_start_quickly_and_import_no_torch():
    code = "import sys, rewards; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    assert time.perf_counter() - start < 5
