"""Tests of code rows beyond calls with plain data: classes, changes in place, functions as arguments, other types."""

import pytest

from grading import RewardError, Ungraded, check_tests, grade_code
from grading.sandbox.cases import Check, parse_tests
from grading.sandbox.code_grader import available

STACK = """
class Stack:
    def __init__(self): self.items = []
    def push(self, x): self.items.append(x)
    def pop(self): return self.items.pop()
    def is_empty(self): return not self.items
    def __len__(self): return len(self.items)
    def __getitem__(self, i): return self.items[i]
    def __iter__(self): return iter(self.items)
    def __str__(self): return f"Stack{self.items}"
"""
NODE = """
class Node:
    def __init__(self, value, next=None): self.value = value; self.next = next
def reverse(node):
    previous = None
    while node: node.next, previous, node = previous, node, node.next
    return previous
"""
READ_NODES = "node = reverse(Node(1, Node(2)))\nvalues = [node.value]\nwhile node.next:\n    node = node.next\n    values.append(node.value)\n"
ADD = "class Solution:\n    def add(self, a, b): return a + b\n"
APPLY = "def f(g, x): return g(x)\ndef h(x): return x + 1\n"
FRACTION = "from fractions import Fraction\ndef f(a, b): return Fraction(a, b)\n"
MATCH = "import re\ndef f(text): return re.match('(a+)(b)?', text)\n"
RIGHT = [
    (STACK, "s = Stack(); s.push(1); s.push(2); assert s.pop() == 2; assert len(s) == 1"),
    (STACK, "s = Stack()\nassert s.is_empty()\ns.push(3)\nassert not s.is_empty() and s[0] == 3 and list(s) == [3]"),
    (STACK, "s = Stack()\ns.push(3)\nassert str(s) == 'Stack[3]' and s.items == [3]"),
    (STACK, "s = Stack()\ntry:\n    s.pop()\n    assert False\nexcept IndexError:\n    pass"),
    (STACK, "s = Stack()\ns.items = [5]\nassert s.pop() == 5"),
    (ADD, "assert Solution().add(1, 2) == 3"),
    (ADD, "assert abs(Solution().add(0.1, 0.2) - 0.3) < 1e-9"),
    (NODE, READ_NODES + "assert values == [2, 1]"),
    ("def f(x): x.sort()", "x = [3, 1]\nf(x)\nassert x == [1, 3]"),
    ("def f(x): x.sort()", "x = [3, 1]\nassert f(x) is None\nassert x == [1, 3]"),
    ("def f(x): x['a'] = 1; x.pop('b')", "x = {'b': 2}\nf(x)\nassert x == {'a': 1}"),
    ("def f(x): x[0][0] = 9", "row = [1]\nx = [row, [2]]\nf(x)\nassert x == [[9], [2]] and row == [9]"),
    ("def f(x): x.add(1)", "x = set()\nf(x)\nassert x == {1}"),
    (APPLY, "assert f(lambda x: x * 2, 4) == 8"),
    (APPLY, "assert f(len, [1, 2]) == 2 and f(str, 5) == '5'"),
    (APPLY, "assert f(h, 3) == 4"),
    (APPLY, "assert f(lambda x: h(x) * 2, 3) == 8"),
    ("def f(n): return lambda x: x + n", "assert f(2)(3) == 5"),
    ("def f(g):\n    return lambda *a: g(*a) * 2", "@f\ndef add(x, y):\n    return x + y\nassert add(2, 3) == 10"),
    ("def f(a, b=2): return a + b", "assert f(a=1) == 3 and f(1, b=5) == 6"),
    ("def f(x): return x + 1", "assert list(map(f, [1, 2])) == [2, 3]"),
    ("def f(x): return frozenset(x)", "assert f([1, 2]) == frozenset({1, 2})"),
    ("def f(x): return frozenset(x)", "assert f([1, 2]) == {1, 2}"),
    (FRACTION, "from fractions import Fraction\nassert f(1, 2) == Fraction(1, 2)"),
    (FRACTION, "assert f(1, 2) == 0.5"),
    (FRACTION, "assert f(1, 2).denominator == 2"),
    ("from decimal import Decimal\ndef f(x): return Decimal(x)", "from decimal import Decimal\nassert f('1.5') == Decimal('1.5')"),
    ("import datetime\ndef f(y): return datetime.date(y, 1, 2)", "assert f(2020).isoformat() == '2020-01-02'"),
    (MATCH, "assert f('aab') and f('c') is None"),
    (MATCH, "assert f('aab').group() == 'aab' and f('a').groups() == ('a', None) and f('ab').span(2) == (1, 2)"),
    ("import math\ndef f(x): return math.sqrt(x)", "assert math.isclose(f(4), 2.0)"),
    ("def f(x): raise KeyError('a b')", "try:\n    f(1)\nexcept KeyError as e:\n    assert e.args == ('a b',)"),
    ("class E(ValueError): pass\ndef f(x): raise E('no')", "try:\n    f(1)\nexcept Exception as e:\n    assert str(e) == 'no'"),
    ("class E(ValueError):\n    def __str__(self): return 'no'\ndef f(x): raise E", "try:\n    f(1)\nexcept ValueError as e:\n    assert str(e) == 'no'"),
    ("def f(g):\n    try: g()\n    except ValueError as e: return str(e)", "def h(): raise ValueError('no')\nassert f(h) == 'no'"),
    ("def f(x):\n    if x < 0: raise ValueError('x')\n    return x", "try:\n    f(-1)\n    assert False\nexcept ValueError:\n    pass"),
]  # fmt: skip


@pytest.mark.parametrize("program, test", RIGHT)
def test_right_program_passes_or_is_ungraded(program, test):
    try:
        assert grade_code(program, [test]) == (1.0, "passed: all tests")
    except Ungraded:
        assert available() == ("monty",)


@pytest.mark.parametrize(
    "tests",
    [
        "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(a=2, b=2) == 4\n",
        [{"args": [1, 2], "expected": 3}],
    ],
)
def test_entry_point_may_be_a_method(tests):
    for program, score in ((ADD, 1.0), (ADD.replace("+", "-"), 0.0)):
        try:
            assert grade_code(program, tests, "Solution().add", starter="class Solution:\n    pass\n")[0] == score
        except Ungraded:
            assert available() == ("monty",)


@pytest.mark.parametrize(
    "program, test",
    [
        (STACK.replace("pop()", "pop(0)"), "s = Stack(); s.push(1); s.push(2); assert s.pop() == 2"),
        (ADD.replace("+", "-"), "assert Solution().add(1, 2) == 3"),
        (NODE.replace("return previous", "return node"), READ_NODES + "assert values == [2, 1]"),
        ("def f(x): return sorted(x)", "x = [3, 1]\nf(x)\nassert x == [1, 3]"),
        ("def f(x): x.append(0)", "x = [3, 1]\nf(x)\nassert x == [1, 3]"),
        ("def f(g, x): return x", "assert f(lambda x: x * 2, 4) == 8"),
        (FRACTION.replace("a, b)\n", "b, a)\n"), "from fractions import Fraction\nassert f(1, 2) == Fraction(1, 2)"),
        (MATCH.replace("a+", "c+"), "assert f('aab')"),
    ],
)
def test_wrong_program_does_not_pass(program, test):
    try:
        assert grade_code(program, [test])[0] == 0.0
    except Ungraded:
        assert available() == ("monty",)


@pytest.mark.parametrize(
    "test",
    [
        "assert isinstance(f(1), A)",
        "assert A.limit == 3",
        "try:\n    f(1)\nexcept A:\n    pass\nassert True",
        "assert np.allclose(f(1), 1)",
        "class B(A):\n    pass\nassert B().x == f(1)",
    ],
)
def test_tests_that_no_tier_can_run_are_noted_before_the_run(test):
    program = "class A(Exception):\n    limit = 3\n    x = 1\ndef f(x): return A()\n"
    with pytest.raises(Ungraded, match="unsupported: the tests use (A|np) itself"):
        grade_code(program, [test])
    notes = check_tests([{"id": 1, "tests": [test]}, {"id": 2, "tests": ["assert f(1) == 1"]}])
    assert any("1 of 2 code questions" in note and "itself" in note for note in notes)


def test_statements_of_a_test_may_be_separate():
    try:
        assert grade_code(STACK, ["s = Stack()", "s.push(1)", "assert s.pop() == 1"])[0] == 1.0
    except Ungraded:
        assert available() == ("monty",)
    for bad in (["assert f(1) == 1", "f(2)"], ["f(1) == 1", "assert f(2) == 2"], ["x = 1"]):
        with pytest.raises(ValueError, match="must contain an assert"):
            parse_tests(bad)


def test_module_that_the_tests_lack_makes_the_program_ungraded():
    with pytest.raises(Ungraded, match="unsupported"):
        grade_code("def f(x): return x", ["import no_such_module\nassert f(1) == no_such_module.one"])


def test_comparison_of_two_objects_of_the_program_is_ungraded():
    for program in (STACK, STACK + "    def __eq__(self, other): return True\n"):
        with pytest.raises(Ungraded, match="unsupported"):
            grade_code(program, ["assert Stack() == Stack()"])


def test_exception_handler_in_a_test_does_not_hide_what_monty_lacks():
    program = "import heapq\ndef f(x):\n    return heapq.nsmallest(1, x)"
    test = "try:\n    r = f([3])\nexcept Exception:\n    r = 'no'\nassert r == 'no'"
    try:
        assert grade_code(program, [test])[0] == 0.0
    except Ungraded:
        assert available() == ("monty",)


def test_arguments_are_sent_back_only_to_tests_that_read_them():
    def in_place(test):
        (case,) = parse_tests([test])
        return isinstance(case, Check) and case.in_place

    assert in_place("x = [1]\nf(x)\nassert x == [2]") and in_place(
        "x = [1]\nr = f(x)\nassert r is None\nassert x == [2]"
    )
    for test in ("for x in [[1]]: assert f(x) == sorted(x)", "x = [1]\nr = f(x)\nassert r == sorted(x)"):
        assert not in_place(test)


@pytest.mark.parametrize(
    "tests",
    [
        [{"args": [1], "expected": 1}, {"input": "1", "output": "1"}],
        [{"args": [1], "expected": 1}, "assert f(1) == 1"],
        ["assert f(1) == 1", {"input": "1", "output": "1"}],
    ],
)
def test_refuses_a_row_that_mixes_forms_of_tests(tests):
    with pytest.raises(ValueError, match="one form"):
        parse_tests(tests, "f")
    with pytest.raises(RewardError, match="row 3, column tests.*one form"):
        check_tests([{"id": 3, "tests": tests, "entry_point": "f"}])


@pytest.mark.parametrize(
    "program, expected",
    [
        ("def f(n): return n * 1000.0 - 1", "10000000"),
        ("def f(n): return n * 1000 - 1", "10000000.0"),
        ("def f(n): return 2.4329020081766e18", "2432902008176640000"),
        ("def f(n): return n * 100 + 0.5", "1000001.0"),
        ("def f(n): return 10**9 + 0.5", "1000000001.0"),
    ],
)
def test_number_that_is_only_close_fails(program, expected):
    assert grade_code(program, [f"assert f(10000) == {expected}"])[0] == 0.0


def test_float_that_equals_the_expected_int_passes():
    assert grade_code("def f(n): return n / 2", ["assert f(4) == 2"])[0] == 1.0
    assert grade_code("def f(n): return n / 2", [{"args": [6], "expected": 3}], "f")[0] == 1.0


@pytest.mark.parametrize("end", ["exit()", "quit()", "exit(0)", "import sys\nsys.exit()", "raise SystemExit"])
def test_script_may_end_with_exit(end):
    try:
        assert grade_code(f"print(int(input()) + 1)\n{end}", [{"input": "3\n", "output": "4\n"}])[0] == 1.0
    except Ungraded:
        assert available() == ("monty",)


# --- the program in an answer

F = "def f(x):\n    return x"
ANSWERS = [
    f"<answer>```python\n{F}\n```</answer>",
    f"<answer>\n```python\n{F}\n```\n</answer>",
    f"<answer>\n```python\n{F}\n</answer>",
    f"<answer>{F}</answer>",
    f"<answer>\n{F}",
    f"```python\n{F}\n```\n<answer>see above</answer>",
    f"{F}\n```",
    f"{F}\n```\nThis returns its argument.",
    f"{F}\n```\nFor example:\n```python\nprint(f(1))\n```",
    f"Sure!\n```python\n{F}",
    f"Here is the code: ```python\n{F}\n```",
    f"Solution:```\n{F}```\nDone.",
    f"```python\n{F}```",
    f"```python\n{F}\n```This works.",
    f"````python\n{F}\n````",
    f"~~~python\n{F}\n~~~",
    f"> ```Python3 \n{F}\n``` \n",
    f'```python title="f.py"\n{F}\n```',
    f"Set ```n``` first.\n```python\n{F}\n```",
    f"```python\r\n{F}\r\n```".replace("\n", "\r\n").replace("\r\r", "\r"),
]


@pytest.mark.parametrize("answer", ANSWERS)
def test_finds_a_program_at_any_fence(answer):
    assert grade_code(answer, ["assert f(1) == 1"])[0] == 1.0


def test_fence_in_a_docstring_is_text():
    program = 'def f(x):\n    """Use it:\n\n    ```\n    f(1)\n    ```\n    """\n    return x'
    assert grade_code(f"```python\n{program}\n```", ["assert f(1) == 1"])[0] == 1.0


def test_script_after_an_opened_fence():
    assert grade_code("print(int(input()) + 1)\n```\nDone.", [{"input": "3\n", "output": "4\n"}])[0] == 1.0
