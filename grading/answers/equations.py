"""Equations as answers: the sides that count as the answer."""

import re

from grading.answers.exact import Value, are_equal
from grading.answers.formulas import as_value
from grading.answers.structures import EQUALS, Text, parse
from grading.answers.terms import ParseError
from grading.answers.units import without_percent

_SIDE = re.compile(r"\\[A-Za-z]+|\\.|(?<![<>!])=|.", re.DOTALL)
_RATIOS = ("sin", "cos", "tan", "cot", "sec", "csc")
_ROUNDED = re.compile(r"([-+]?\d+(?:\.(\d+))?)\s*(\\?%)?", re.ASCII)


def equal_sides(text: str) -> list[str]:
    r"""Return the sides of an equation that are its answer, the last one first: only 16 for `|r-s| = 16`.

    Each side before the last must be an expression without a value, such as E(2,3), a formula with several variables, or a
    number that is equal to the last side. A number that the last side rounds, as in `\frac{2}{3} \approx 0.67`, is an
    answer too. Returns an empty list if the text is no equation, or one that is not solved (2x = 16) or false.
    """
    *others, last = split_sides(text)
    result = [last[1]] if others else []
    for (_, side), (relation, _) in zip(others, [*others[1:], last]):
        try:
            node = parse(side)
        except ParseError:
            continue
        if not isinstance(node, Value):
            if isinstance(node, Text):
                continue
            return []
        names = node.variables()
        if not names:
            if relation == r"\approx" and _is_rounded(node, last[1]):
                result.append(side)
            elif not _has_value(node, last[1]):
                return []
        elif len(names) == 1 and not node.is_variable() and not _is_ratio_of_angle(node):
            return []
    return result


def _is_ratio_of_angle(node: Value) -> bool:
    r"""Return whether a value is a function of an angle, such as \sin A, which is a quantity to be found itself."""
    return all(isinstance(atom, tuple) and atom[0] in _RATIOS for atom in node.atoms())


def split_sides(text: str) -> list[tuple[str, str]]:
    """Split a text at = and \\approx outside of brackets. Returns each side with the sign before it."""
    sides = [["", ""]]
    depth = 0
    for token in _SIDE.findall(text):
        depth += (token in "([{" or token == r"\{") - (token in ")]}" or token == r"\}")
        if token in EQUALS and not depth:
            sides.append([token, ""])
        else:
            sides[-1][1] += token
    return [(sign, side.strip()) for sign, side in sides]


def _has_value(node: Value, text: str) -> bool:
    """Return whether a text is a formula that is equal to a value."""
    try:
        return bool(are_equal(without_percent(node), without_percent(as_value(parse(text)))))
    except ParseError:
        return False


def _is_rounded(node: Value, text: str) -> bool:
    """Return whether a text is a number to which a value is rounded."""
    match = _ROUNDED.fullmatch(text.strip())
    if not match:
        return False
    try:
        difference = abs(node.approx()[0] * (100 if match[3] else 1) - float(match[1]))
    except (ArithmeticError, ValueError):
        return False
    return difference <= 0.500001 * 10.0 ** -len(match[2] or "")
