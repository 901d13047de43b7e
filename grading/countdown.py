"""The grader of Countdown: reach a target with given numbers, + - * / and brackets, exactly."""

import ast
import operator
import re
from fractions import Fraction

from grading.answers.math_grader import extract_answer
from grading.base import shorten

MAX_CHARS = 200
MAX_NESTING = 20
_SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-", "[": "(", "]": ")"})
_LATEX = (
    (re.compile(r"\\(?:left|right)|\\[,;:! ]|\$|\\[()\[\]]"), ""),
    (re.compile(r"\\(?:times|cdot)(?![A-Za-z])"), "*"),
    (re.compile(r"\\div(?![A-Za-z])"), "/"),
)
_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}")
_EXPRESSION = re.compile(r"[0-9+\-*/() ]+")
_OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def grade_countdown(answer: str, target: int, nums: list[int]) -> tuple[float, str]:
    r"""1.0 where the final answer is an expression of the target's value that uses each number exactly once, else 0.0.

    As in TinyZero's form of the game every number must be used, as often as it is given. Allowed are + - * / and round
    brackets, computed exactly. The answer stands in `\boxed{}`, `<answer>` or another form that
    `grading.extract_answer` knows, and may end in `= target`. Outcomes: right, wrong, no_answer, gave_up (too long).
    """
    found = extract_answer(answer)
    if not found:
        return 0.0, "no_answer: no expression in \\boxed{} or <answer>"
    if len(found) > MAX_CHARS:
        return 0.0, f"gave_up: the expression has {len(found)} characters, over {MAX_CHARS}"
    for pattern, to in _LATEX:
        found = pattern.sub(to, found)
    while (inner := _FRACTION.sub(r"((\1)/(\2))", found)) != found:
        found = inner
    text, equals, result = (part.strip() for part in found.translate(_SIGNS).partition("="))
    if not _EXPRESSION.fullmatch(text) or "**" in text or "//" in text:
        return 0.0, f"wrong: {shorten(text)} has more in it than numbers, + - * / and brackets"
    if equals and result != str(target):
        return 0.0, f"wrong: {shorten(result)} is not the target {target}"
    try:
        used = []
        value = _evaluate(_parse(text), used)
    except (SyntaxError, ValueError):
        return 0.0, f"wrong: {shorten(text)} is no expression"
    except ZeroDivisionError:
        return 0.0, f"wrong: {shorten(text)} divides by zero"
    if sorted(used) != sorted(nums):
        return 0.0, f"wrong: it uses {_listed(used)}, not each of {_listed(nums)} once"
    if value != target:
        return 0.0, f"wrong: {shorten(text)} is {shorten(str(value))}, not {target}"
    return 1.0, "right"


def _parse(text: str) -> ast.expr:
    depth = 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if depth > MAX_NESTING:
            raise ValueError("too many brackets")
    return ast.parse(text, mode="eval").body


def _evaluate(node: ast.expr, used: list[int]) -> Fraction:
    """The value, with the numbers in the expression appended to `used`. Raises ValueError for anything else in it."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used.append(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_evaluate(node.left, used), _evaluate(node.right, used))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_evaluate(node.operand, used)
    raise ValueError(type(node).__name__)


def _listed(numbers: list[int]) -> str:
    return shorten(", ".join(map(str, sorted(numbers))))
