"""Verdicts: which reward judges a completion, and from which value on it is right, as learned from golds."""

import json
import textwrap
from pathlib import Path

import pytest
from conftest import completion, write

from grading import Completion, load_rewards, preflight, score_all
from grading.rewards.probes import own_styles
from grading.rewards.probes import write as write_style
from grading.rewards.trials import learn_payments
from grading.rewards.verdicts import columns_read, judge_range, payments_from_lists, payments_to_lists
from tools.rescore import learn_run_payments

ROWS = [{"id": f"r{i}", "task": "t", "prompt": "q", "answer": str(100 + 7 * i)} for i in range(12)]
BOXED = ("\\boxed{100}", "\\boxed{95}", "\\boxed{101}", "\\boxed{x}", "")

# Partial credit and tags of its own, as in notebooks.
TAGS = r"""
    import re
    reasoning_start, reasoning_end = "<start_working_out>", "<end_working_out>"
    solution_start, solution_end = "<SOLUTION>", "</SOLUTION>"
    match_format = re.compile(
        rf"^[\s]{{0,}}{reasoning_start}.+?{reasoning_end}.*?{solution_start}(.+?){solution_end}[\s]{{0,}}$",
        flags=re.MULTILINE | re.DOTALL,
    )

    def match_format_exactly(completions, **kwargs):
        return [3.0 if match_format.search(c[0]["content"]) else 0 for c in completions]

    def check_answer(prompts, completions, answer, **kwargs):
        scores = []
        for c, true_answer in zip(completions, answer):
            match = match_format.search(c[0]["content"])
            if match is None:
                scores.append(0)
            elif match.group(1) == true_answer:
                scores.append(3.0)
            elif match.group(1).strip() == true_answer.strip():
                scores.append(1.5)
            else:
                try:
                    ratio = float(match.group(1)) / float(true_answer)
                    scores.append(1.5 if 0.9 <= ratio <= 1.1 else 0.5 if 0.8 <= ratio <= 1.2 else -1.5)
                except ValueError:
                    scores.append(-0.5)
        return scores

    reward_funcs = [match_format_exactly, check_answer]
    """


def verdicts(tmp_path, source, texts=BOXED, rows=ROWS):
    """Return the name of the judge, the verdicts of texts for the first row, and the notes before a run."""
    rewards = load_rewards(write(tmp_path, source))
    notes = preflight(rewards, rows)
    scores = score_all(rewards, [Completion("q", text, rows[0]) for text in texts])
    return scores[0].judge, [score.is_right for score in scores], notes


@pytest.mark.parametrize(
    "paid, right_value",
    [
        ("3.0 if x == g else 1.5 if abs(x - g) <= 0.1 * g else 0.5 if abs(x - g) <= 0.2 * g else -0.5", "3"),
        ("5.0 if x == g else 3.5 if abs(x - g) <= 1 else 2.0 if abs(x - g) <= 0.1 * g else -2.5", "5"),
        ("max(0, 1 - abs(x - g) / 100)", None),
        ("0.5 * (x == g)", "0.5"),
        ("0 if x == g else -1", "0"),
        ("1 if x == g else -1", None),
        ("-1 if x == g else -3", "-1"),
        ("(x == g) * 1000", "1000"),
        ("(x == g) + 0.3 * bool(c.thinking)", None),
        ("(x == g) - 0.0005 * len(c.text)", "0.2"),
    ],
)
def test_a_completion_is_right_from_the_value_of_the_gold(tmp_path, paid, right_value):
    source = f"""
        @reward
        def close(c):
            g = float(c.row["answer"])
            try:
                x = float(extract_answer(c.answer) or "nan")
            except ValueError:
                x = float("nan")
            return {paid} if x == x else -9
        """
    judge, are_right, notes = verdicts(tmp_path, source)
    assert judge == "close" and are_right == [True, False, False, False, False]
    notes = [note for note in notes if "a completion is right if close pays" in note]
    assert len(notes) == (right_value is not None) and all(f"pays {right_value}" in note for note in notes)


def test_near_misses_in_tags_of_a_notebook_are_wrong(tmp_path):
    text = "<start_working_out>x<end_working_out><SOLUTION>{}</SOLUTION>"
    texts = [text.format(answer) for answer in ("100", "95", "85", "7", "x")]
    judge, are_right, notes = verdicts(tmp_path, TAGS, texts)
    assert judge == "check_answer" and are_right == [True, False, False, False, False]
    assert notes[-1] == "on math rows a completion is right if check_answer pays 3, as for the gold"


@pytest.mark.parametrize("sign", ["", "-"])
def test_penalties_judge_if_they_spare_the_gold(tmp_path, sign):
    source = f"@reward(weight=-1)\ndef wrong(c): return {sign}1 * (extract_answer(c.answer) != c.row['answer'])\n"
    judge, are_right, _ = verdicts(tmp_path, source)
    assert (judge, are_right) == (("wrong", [True] + [False] * 4) if not sign else (None, [False] * 5))


JUDGES = {
    "kwargs": "def right(completions, **kwargs): return pay(completions, kwargs['answer'])",
    "get": "def right(completions, **kw): return pay(completions, kw.get('answer'))",
    "constant": "GOLD = 'answer'\ndef right(completions, **kwargs): return pay(completions, kwargs[GOLD])",
    "helper": "def golds(kw): return kw['answer']\ndef right(completions, **kw): return pay(completions, golds(kw))",
    "passed on": "def inner(completions, answer, **kw): return pay(completions, answer)\n"
    "def right(completions, **kw): return inner(completions, **kw)",
    "parameter": "def right(prompts, completions, answer): return pay(completions, answer)",
    "wrapper": "def wrap(f):\n    def right(completions, **kw): return f(completions, **kw)\n    return right\n"
    "right = wrap(lambda completions, answer, **kw: pay(completions, answer))",
    "closure": "def make(name):\n    def right(completions, **kw): return pay(completions, kw[name])\n    return right\n"
    "right = make('answer')",
    "object": "class Right:\n    __name__ = 'right'\n    def __init__(self, name): self.name = name\n"
    "    def __call__(self, completions, **kw): return pay(completions, kw[self.name])\nright = Right('answer')",
    "async": "async def right(completions, **kwargs): return pay(completions, kwargs['answer'])",
    "row": "@reward\ndef right(c): return pay([[{'content': c.text}]], [c.row['answer']])[0]",
}


@pytest.mark.parametrize("name", JUDGES)
def test_the_function_that_reads_the_gold_judges(tmp_path, name):
    source = "def pay(completions, golds):\n"
    source += "    texts = [extract_answer(c[0]['content']) for c in completions]\n"
    source += "    return [2.0 if t == g else 1.5 if t else 0.0 for t, g in zip(texts, golds)]\n"
    source += "def boxed(completions, answer, level, **kwargs): return [float('boxed' in c[0]['content']) for c in completions]\n"
    source += "def levels(completions, level, **kwargs): return [level[0] / 2] * len(completions)\n"
    source += f"{JUDGES[name]}\nreward_funcs = [boxed, levels, right]\n"
    judge, are_right, _ = verdicts(tmp_path, source, rows=[row | {"level": 4} for row in ROWS])
    assert (judge, are_right) == ("right", [True, False, False, False, False])


def test_columns_that_a_function_reads(tmp_path):
    source = """
        import functools
        def one(completions, answer, level, **kwargs): return [answer[0] in kwargs["source"] for c in completions]
        @reward
        def two(c): return c.answer == c.row.get("gold")
        @reward
        def three(c): return c.answer == "answer"
        part = functools.partial(one, level="gold")
        part.__name__ = "part"
        reward_funcs = [one, part]
        """
    rewards = load_rewards(write(tmp_path, source))
    row = dict.fromkeys(("answer", "level", "source", "gold", "row"), "1")
    read = {f.name: columns_read(f, row) for f in rewards.functions}
    assert read["one"] == {"answer", "source"} and read["two"] == {"gold"} and read["three"] == set()
    assert read["part"] >= {"answer", "source"}


def test_columns_that_helpers_in_another_module_read(tmp_path):
    (tmp_path / "my_checks.py").write_text("GOLD = 'gold'\ndef is_right(c): return c.text == c.row[GOLD]\n")
    for source in (
        "import my_checks\n@reward\ndef f(c): return my_checks.is_right(c)",
        "from my_checks import is_right\n@reward\ndef f(c): return is_right(c)",
    ):
        (f,) = load_rewards(write(tmp_path, source)).functions
        assert columns_read(f, {"prompt": "q", "gold": "1"}) == {"gold"}


@pytest.mark.parametrize("column", ["ground_truth", "solution", "gold", "reference", "my_column"])
def test_a_gold_in_a_column_of_another_name(tmp_path, column):
    source = f"""
        def right(completions, {column}, **kwargs):
            texts = [extract_answer(c[0]["content"]) for c in completions]
            return [2.0 if t == g else 1.5 if t and t[0] == g[0] else 0.0 for t, g in zip(texts, {column})]
        reward_funcs = [right]
        """
    rows = [{"id": row["id"], "task": "t", "prompt": "q", column: row["answer"], "level": 1} for row in ROWS]
    judge, are_right, notes = verdicts(tmp_path, source, rows=rows)
    assert are_right == [True, False, False, False, False] and "right pays 2" in notes[-1]


def test_each_kind_and_task_has_its_own_value(tmp_path):
    source = """
        @reward(when="math")
        def result(c): return {"easy": 1, "hard": 4}[c.row["task"]] * grade_math(c.answer, c.row["answer"])[0] + len(c.text) % 2
        @reward(when="code")
        def share(c):
            tests = c.row["tests"]
            return 3 * sum(grade_code(c.answer, [test], "f")[0] for test in tests) / len(tests)
        """
    rows = [row | {"task": task} for task in ("easy", "hard") for row in ROWS]
    code = {"id": "c", "task": "code", "prompt": "q", "tests": ["assert f(1) == 2", "assert f(2) == 4"]}
    code |= {"solution": "def f(x):\n    return 2 * x"}
    rewards = load_rewards(write(tmp_path, source))
    preflight(rewards, [*rows, code])
    half_right = "```python\ndef f(x):\n    return 2\n```"
    answers = [(rows[0], "\\boxed{100}"), (rows[12], "\\boxed{100}"), (rows[12], "x"), (code, half_right)]
    answers.append((code, f"```python\n{code['solution']}\n```"))
    scores = score_all(rewards, [Completion("q", text, row) for row, text in answers])
    assert [score.is_right for score in scores] == [True, True, False, False, True]


def test_examples_decide_if_no_probe_fits(tmp_path):
    source = """
        import json
        @reward
        def right(c):
            try:
                return 5.0 if str(json.loads(c.answer)["result"]) == c.row["answer"] else 2
            except Exception:
                return 0
        """
    texts = ['{"result": 100}', '{"result": 95}', ""]
    judge, _, notes = verdicts(tmp_path, source, texts)
    assert judge == "right" and "no probe fits right" in notes[0] and "examples" in notes[0]
    assert "no completion may count as right" in notes[0] and len(notes) == 1
    examples = [
        {"label": "right", "text": '{"result": 7}', "answer": "7"},
        {"label": "wrong", "text": '{"result": 8}', "answer": "7"},
    ]
    for used in (examples, examples[:1]):
        judge, are_right, notes = verdicts(tmp_path, source + f"examples = {used}\n", texts)
        assert are_right == [True, False, False] and notes == [
            "on math rows a completion is right if right pays 5, as for the gold"
        ]


def test_examples_of_one_kind_leave_other_kinds_alone(tmp_path):
    source = """
        @reward(when="math")
        def right(c): return c.answer == "result: " + c.row["answer"]
        @reward(when="jokes")
        def funny(c): return "ha" in c.text
        examples = [{"label": "right", "text": "result: 7", "answer": "7"}, {"label": "wrong", "text": "7", "answer": "7"}]
        """
    joke = {"id": "j", "task": "jokes", "prompt": "q"}
    rewards = load_rewards(write(tmp_path, source))
    assert preflight(rewards, [*ROWS, joke]) == []
    answers = [(ROWS[0], "result: 100"), (ROWS[0], "100"), (joke, "ha"), (joke, "x")]
    scores = score_all(rewards, [Completion("q", text, row) for row, text in answers])
    assert [(score.judge, score.is_right) for score in scores] == [
        ("right", True),
        ("right", False),
        ("funny", True),
        ("funny", False),
    ]


def test_notes_if_nothing_can_count_as_right(tmp_path):
    constant = "@reward\ndef half(c): return 0.5\n"
    notes = verdicts(tmp_path, constant)[2]
    assert "no completion may count as right: " in notes[0] and "half pays 1, and it pays at most 0.5" in notes[0]
    spared = """
        @reward
        def spared(c):
            text = extract_answer(c.answer)
            return 0 if not text or text == c.row["answer"] else -1
        """
    judge, are_right, notes = verdicts(tmp_path, spared)
    assert not any(are_right) and "a completion without an answer 0: pay less for the latter" in notes[0]
    share = "@reward\ndef share(c): return len(c.row['tests']) / 4\n"
    code = {"id": "c", "task": "code", "prompt": "q", "tests": ["assert f(1) == 2"]}
    (note,) = verdicts(tmp_path, share, rows=[code])[2]
    assert note == "on code rows, which have no gold to try, a completion is right if share pays 1"


def test_a_small_weight_may_judge_if_it_pays_the_gold_more(tmp_path):
    source = """
        @reward(weight=0.01)
        def points(c): return 100 * (extract_answer(c.answer) == c.row["answer"])
        @reward
        def boxed(c): return "boxed" in c.text
        """
    judge, are_right, _ = verdicts(tmp_path, source)
    assert (judge, are_right) == ("points", [True, False, False, False, False])


def test_shaping_that_finds_the_gold_does_not_replace_a_judge_that_no_probe_fits(tmp_path):
    source = """
        import json
        @reward
        def right(c):
            try:
                return float(str(json.loads(c.answer)["result"]) == c.row["answer"])
            except Exception:
                return 0
        @reward(weight=0.1)
        def mentions(c): return c.row["answer"] in c.text
        """
    judge, are_right, _ = verdicts(tmp_path, source, ['{"result": 100}', "100 apples"])
    assert (judge, are_right) == ("right", [True, False])


def test_a_judge_that_reads_the_original_column_of_a_converted_row(tmp_path):
    source = """
        import json
        def boxed(completions, **kwargs): return [1.0 for c in completions]
        def right(completions, **kwargs):
            golds = [model["ground_truth"] for model in kwargs["reward_model"]]
            return [float(c[0]["content"] == json.dumps({"result": gold})) for c, gold in zip(completions, golds)]
        reward_funcs = [boxed, right]
        """
    rows = [row | {"reward_model": {"ground_truth": row["answer"]}} for row in ROWS]
    judge, are_right, notes = verdicts(tmp_path, source, ['{"result": "100"}', "x"], rows)
    assert (judge, are_right) == ("right", [True, False]) and "no probe fits right" in notes[0]


def test_a_form_reward_does_not_judge_if_the_judge_returns_none(tmp_path):
    source = """
        @reward
        def right(c): return True if extract_answer(c.answer) == c.row["answer"] else None
        @reward
        def boxed(c): return "boxed" in c.text
        """
    rewards = load_rewards(write(tmp_path, source))
    preflight(rewards, ROWS)
    scores = score_all(rewards, [Completion("q", text, ROWS[0]) for text in BOXED])
    assert [score.judge for score in scores] == ["right"] + [None] * 4
    assert [score.is_right for score in scores] == [True] + [False] * 4


def test_targets_of_countdown_are_not_answers(tmp_path):
    """The functions read a target and numbers. No row has a solution."""
    source = """
        import re
        def format_reward(completions, target, **kwargs): return [1.0 for c in completions]
        def equation(completions, target, nums, **kwargs):
            found = [re.fullmatch(r"<answer>([-+*/() 0-9]+)</answer>", c[0]["content"]) for c in completions]
            numbers = [sorted(map(int, re.findall(r"[0-9]+", match[1]))) if match else [] for match in found]
            return [float(n == sorted(m) and eval(f[1]) == t) for n, m, f, t in zip(numbers, nums, found, target)]
        reward_funcs = [format_reward, equation]
        """
    rows = [{"id": "r", "task": "t", "prompt": "q", "target": 6, "nums": [1, 2, 3]}]
    judge, are_right, (note,) = verdicts(tmp_path, source, ["<answer>1+2+3</answer>", "<answer>6</answer>"], rows)
    assert (judge, are_right) == ("equation", [True, False]) and "no gold to try" in note


def test_the_value_does_not_depend_on_the_order_of_the_rows(tmp_path):
    source = "@reward\ndef points(c): return c.row['level'] * (extract_answer(c.answer) == c.row['answer'])\n"
    rows = [row | {"level": 1 + i % 4} for i, row in enumerate(ROWS)]
    payments = []
    for order in (rows, rows[::-1], rows[5:] + rows[:5]):
        rewards = load_rewards(write(tmp_path, source))
        learn_payments(rewards, order)
        payments.append(rewards.payments)
    assert payments[0] and payments[0] == payments[1] == payments[2]


@pytest.mark.parametrize(
    "paid, weight, wrong, right",
    [("5 * ok", 1, 0, 5), ("ok - 1", 2, -2, 0), ("2 * ok - 1", 1, -1, 1), ("ok", -1, -1, 0)],
)
def test_rewards_of_wrong_and_right_answers_for_the_alarms(tmp_path, paid, weight, wrong, right):
    ok = "==" if weight > 0 else "!="
    source = f"""
        @reward(weight={weight})
        def judge(c):
            ok = extract_answer(c.answer) {ok} c.row["answer"]
            return {paid}
        """
    rewards = load_rewards(write(tmp_path, source))
    assert judge_range(rewards, {"judge"}) == (0, abs(weight))  # before any gold has been tried
    preflight(rewards, ROWS)
    assert judge_range(rewards, {"judge"}) == (wrong, right)
    assert judge_range(rewards, set()) == (0, 0)


def test_rescoring_uses_the_values_of_the_run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    source = "@reward\ndef half(c): return 0.5 * (extract_answer(c.answer) == c.row['answer'])\n"
    path = write(folder, source)
    rewards = load_rewards(path)
    preflight(rewards, ROWS)
    (folder / "summary.json").write_text(json.dumps({"payments": payments_to_lists(rewards)}))
    assert payments_from_lists(json.loads(json.dumps(payments_to_lists(rewards)))) == rewards.payments
    for text in (source, source.replace("0.5", "0.25")):  # the same file, and an edited one
        edited = load_rewards(path, source="from grading import *\n" + textwrap.dedent(text))
        learn_run_payments(edited, folder, ROWS[:1])
        scores = score_all(edited, [Completion("q", text, ROWS[0]) for text in BOXED])
        assert [score.is_right for score in scores] == [True, False, False, False, False]
    (folder / "rewards.py").write_bytes(Path(path).read_bytes().replace(b"\n", b"\r\n"))  # written on Windows
    (folder / "summary.json").write_text(json.dumps({"payments": [["half", "math", "t", 0.4, 0, 0, False]]}))
    rewards = load_rewards(path)
    learn_run_payments(rewards, folder, [ROWS[0] | {"task": "t"}])
    assert [payment.right for payment in rewards.payments.values()] == [0.4]
    fragile = load_rewards(
        path, source="from grading import *\n@reward\ndef f(c): return 1 / (c.row['answer'] == '1')\n"
    )
    learn_run_payments(fragile, folder, ROWS)
    assert fragile.payments == {}


def test_rescoring_with_a_changed_module_learns_the_values_anew(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    source = (
        "import my_pay\n@reward\ndef pays(c): return my_pay.RIGHT * (extract_answer(c.answer) == c.row['answer'])\n"
    )
    thresholds = []
    for right in (0.5, 0.25):  # the run, and the module edited after it
        (tmp_path / "my_pay.py").write_text(f"RIGHT = {right}\n")
        rewards = load_rewards(write(tmp_path, source))
        learn_run_payments(rewards, folder, ROWS)
        thresholds += {payment.right for payment in rewards.payments.values()}
        (folder / "rewards.py").write_bytes(rewards.path.read_bytes())
        (folder / "my_pay.py").write_text("RIGHT = 0.5\n")
        (folder / "summary.json").write_text(json.dumps({"payments": payments_to_lists(rewards)}))
    assert thresholds == [0.5, 0.25]


def test_many_tasks_are_tried_together(tmp_path):
    calls = "calls = []\n@reward\ndef right(c):\n    calls.append(1)\n    return 2 * (c.answer == c.row['answer'])\n"
    rewards = load_rewards(write(tmp_path, calls))
    learn_payments(rewards, [row | {"task": f"t{i}"} for i, row in enumerate(ROWS * 100)])
    assert len(rewards.functions[0].function.__globals__["calls"]) < 200
    (score,) = score_all(rewards, [completion("100", **ROWS[0])])
    assert score.is_right and list(rewards.payments) == [("right", "math", None)]


def test_styles_with_the_tags_of_a_reward_file():
    assert own_styles("no tags") == own_styles("<think> but no end") == own_styles("<think>...</think>") == []
    assert "<think>\nTHOUGHT\n</think>\n<answer>\nANSWER\n</answer>" in own_styles(
        r"^<think>\n.*?\n</think>\n<answer>\n.*?\n</answer>$"
    )
    (first, second, *others) = own_styles('A, B = "<work>", "</work>"\nC, D = r"\\[RESULT\\]", r"\\[/RESULT\\]"')
    assert write_style(first, "7", "x") == "[RESULT]x[/RESULT]<work>7</work>" and second.count("\n") == 5
    assert "<work>x</work>[RESULT]7[/RESULT]" in [write_style(style, "7", "x") for style in others]
    assert own_styles("```sql\nSELECT 1\n```") == ["```sql\nANSWER\n```"]
    answer_tag = own_styles("<ANSWER>(.*)</ANSWER>")[0]
    assert write_style(answer_tag, "7") == "<ANSWER>7</ANSWER>"
