"""The Countdown grader: an expression must reach a target from given numbers, with exact arithmetic."""

import ast
import operator
import re
from fractions import Fraction

from grading.answers.extraction import extract_answer
from grading.base import shorten
from grading.sandbox.cases import parse_python

MAX_CHARS = 200
MAX_NESTING = 20
_SIGNS = str.maketrans(
    {"×": "*", "·": "*", "∗": "*", "✕": "*", "÷": "/", "∕": "/", "−": "-", "–": "-", "[": "(", "]": ")"}
    | {chr(code + 0xFEE0): chr(code) for code in range(0x21, 0x7F)}  # full-width characters
)
_LATEX = (
    (re.compile(r"\\(?:left|right)|\\[,;:! ]|\$|\\[()\[\]]"), ""),
    (re.compile(r"\\(?:times|cdot)(?![A-Za-z])"), "*"),
    (re.compile(r"\\div(?![A-Za-z])"), "/"),
    (re.compile(r"(?<=[0-9)])\s*[xX]\s*(?=[0-9(])"), "*"),  # 2x3
)
_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}")
_NUMBER = re.compile(r"[+-]?[0-9]{1,40}(?:\.[0-9]{1,40})?")
_EXPRESSION = re.compile(r"[0-9+\-*/() ]+")
_OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def grade_countdown(answer: str, target: int | str, nums: list | str) -> tuple[float, str]:
    r"""Grade an expression that must equal the target and use each of the numbers exactly once.

    As in TinyZero's version of the game, every number must be used, as often as it occurs in `nums`. The operators
    + - * / and parentheses are allowed.

    Args:
        answer: Text whose final answer, in `\boxed{}`, `<answer>` or another form supported by
            `grading.extract_answer`, is the expression. It may end in `= target` or start with `target =`.
        target: Value that the expression must have, a number or its text.
        nums: Numbers that the expression must use, or their texts, or the list as a text.

    Returns:
        1.0 if the expression is right, else 0.0; and a reason with the outcome right, wrong, no_answer or gave_up (the
        expression is too long).

    Raises:
        ValueError: If the target or one of the numbers is not a number.
    """
    target, *nums = _as_numbers(target, nums)
    expression = extract_answer(answer)
    if not expression:
        return 0.0, "no_answer: no expression in \\boxed{} or <answer>"
    if len(expression) > MAX_CHARS:
        return 0.0, f"gave_up: the expression has {len(expression)} characters, over {MAX_CHARS}"
    for pattern, replacement in _LATEX:
        expression = pattern.sub(replacement, expression)
    while (replaced := _FRACTION.sub(r"((\1)/(\2))", expression)) != expression:
        expression = replaced
    text, *results = (side.strip(" .") for side in expression.translate(_SIGNS).split("="))
    if len(results) == 1 and _number(text) == target and _number(results[0]) is None:  # 6 = 1+2+3
        text, results = results[0], [text]
    if not _EXPRESSION.fullmatch(text) or "**" in text or "//" in text:
        return 0.0, f"wrong: {shorten(text)} contains something other than numbers, + - * / and brackets"
    if results and (len(results) > 1 or _number(results[0]) != target):
        return 0.0, f"wrong: {shorten(' = '.join(results))} is not the target {target}"
    try:
        used = []
        value = _evaluate(_parse(text), used)
    except (SyntaxError, ValueError):
        return 0.0, f"wrong: {shorten(text)} is not an expression"
    except ZeroDivisionError:
        return 0.0, f"wrong: {shorten(text)} divides by zero"
    if sorted(used) != sorted(nums):
        return 0.0, f"wrong: it uses {_format_numbers(used)}, not each of {_format_numbers(nums)} once"
    if value != target:
        return 0.0, f"wrong: {shorten(text)} is {shorten(str(value))}, not {target}"
    return 1.0, "right"


def _as_numbers(target, nums) -> list[Fraction]:
    """Return the target and the numbers as fractions. Raises ValueError, which names the column that is wrong."""
    if isinstance(nums, str):  # a list in a CSV file
        nums = nums.strip("[]() ").replace(",", " ").split()
    numbers = []
    for column, value in [("target", target), *(("nums", value) for value in nums)]:
        if (number := _number(str(value))) is None:
            raise ValueError(f"the column {column} contains {value!r}, which is not a number")
        numbers.append(number)
    return numbers


def _number(text: str) -> Fraction | None:
    """Return the value of a whole or decimal number, or None for another text."""
    text = text.strip()
    return Fraction(text) if _NUMBER.fullmatch(text) else None


def _parse(text: str) -> ast.expr:
    """Parse an expression. Raises SyntaxError, or ValueError if it is nested too deeply."""
    depth = 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if depth > MAX_NESTING:
            raise ValueError("too many brackets")
    return parse_python(text, mode="eval").body


def _evaluate(node: ast.expr, used: list[int]) -> Fraction:
    """Return the value of an expression and append its numbers to `used`. Raises ValueError for other syntax."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used.append(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_evaluate(node.left, used), _evaluate(node.right, used))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_evaluate(node.operand, used)
    raise ValueError(type(node).__name__)


def _format_numbers(numbers: list[int]) -> str:
    return shorten(", ".join(map(str, sorted(numbers))))
