"""Comparison of a parsed answer with the parsed gold answer.

Verdicts are True, False, or None if only the symbolic grader can decide.
"""

import functools
import math
import re
from fractions import Fraction

from grading.answers.exact import ParseError, Value, are_equal, proportionality_factor, symbol
from grading.answers.regions import Region
from grading.answers.structures import Items, Matrix, Named, Relation, Text, as_region

TOLERANCE = Fraction(1, 10**6)
MIN_DIGITS = 6  # significant digits that a decimal needs to be accepted for a number that it approximates


class NotEvaluated(Exception):
    """The answer is a sum or product of plain numbers, such as 7+5, instead of its value."""


def is_same(a, g) -> bool | None:
    """Return whether a parsed answer equals the parsed gold answer; None if that is unknown.

    Args:
        a, g: Results of `parse` for the answer and the gold answer.

    Raises:
        NotEvaluated: If the answer is equal, but a sum or product of plain numbers is left in it.
        TooBig: If a value is too large to be computed.
    """
    if isinstance(a, Named) or isinstance(g, Named):
        return _is_same_named(a, g)
    try:
        if isinstance(a, Region) or isinstance(g, Region):
            return _is_same_region(as_region(a), as_region(g))
    except ParseError:
        return False
    if isinstance(a, Items) or isinstance(g, Items):
        return _is_same_items(a, g)
    if type(a) is not type(g):
        return False
    if isinstance(a, Value):
        return is_same_value(a, g)
    if isinstance(a, Relation):
        factor = a.op == g.op and proportionality_factor(a.difference, g.difference)
        return bool(factor) and (a.op in ("=", "!=") or factor > 0)
    if isinstance(a, Matrix):
        if [len(row) for row in a.rows] != [len(row) for row in g.rows]:
            return False
        return _combine(is_same(x, y) for row, other in zip(a.rows, g.rows) for x, y in zip(row, other))
    return isinstance(a, Text) and is_same_text(a.words, g.words)


def _is_same_named(a, g) -> bool | None:
    relation_a, relation_g = _as_relation(a), _as_relation(g)
    if relation_a and relation_g and is_same(relation_a, relation_g):
        return True
    return is_same(a.value if isinstance(a, Named) else a, g.value if isinstance(g, Named) else g)


def _as_relation(node) -> Relation | None:
    """Return y = 2x + 1 as a relation; None for x = 5, whose right side alone is the answer."""
    if isinstance(node, Named) and isinstance(node.value, Value) and node.value.variables():
        return Relation("=", symbol(node.name) - node.value)
    return node if isinstance(node, Relation) else None


def _is_same_region(a: Region, g: Region) -> bool | None:
    if [p[1::2] for p in a.pieces] != [p[1::2] for p in g.pieces]:
        return False
    ends = [(x, y) for p, q in zip(a.pieces, g.pieces) for x, y in ((p[0], q[0]), (p[2], q[2]))]
    return _combine(x == y if isinstance(x, float) or isinstance(y, float) else is_same_value(x, y) for x, y in ends)


def _is_same_items(a, g) -> bool | None:
    (kind_a, a, names_a), (kind_g, g, names_g) = _unpack(a), _unpack(g)
    kinds = {kind_a, kind_g}
    if len(a) != len(g) or ("one" in kinds and "set" not in kinds) or ("ratio" in kinds and len(kinds) > 1):
        return False
    if "set" in kinds and not kinds <= {"set", "list", "one"}:
        return False
    if names_a and names_g and set(names_a) == set(names_g):
        a = [a[names_a.index(name)] for name in names_g]
    if not kinds.isdisjoint(("tuple", "ratio", "named")) or Text("...") in g:
        return _combine(map(is_same, a, g))
    remaining = list(a)
    verdicts = []
    for y in g:
        verdict, x = max(((is_same(x, y), x) for x in remaining), key=lambda pair: (pair[0] is True, pair[0] is None))
        remaining.remove(x)
        verdicts.append(verdict)
    return _combine(verdicts)


def _unpack(node) -> tuple[str, list, list | None]:
    """Return (kind, items, names).

    The kind is `named` for x=2, y=3 (with names), list for x=2, x=3 and x=2, 3, and `one` for a node that is not Items.
    """
    if not isinstance(node, Items):
        return "one", [node], None
    items = list(node.items)
    names = [item.name for item in items if isinstance(item, Named)]
    values = [item.value if isinstance(item, Named) else item for item in items]
    if len(names) == len(items) == len(set(names)):
        return "named", values, names
    if len(set(names)) == 1 and (len(names) == len(items) or isinstance(items[0], Named)):
        return "list", values, None
    return node.kind, items, None


def _combine(verdicts) -> bool | None:
    """Return False if a verdict is False, else None if one is None, else True."""
    verdicts = list(verdicts)
    return False if False in verdicts else None if None in verdicts else True


def is_same_value(a: Value, g: Value) -> bool | None:
    """Return whether two values are equal or close enough. A unit may be missing in one of them. See `is_same`."""
    (a, unit), (g, gold_unit) = a.split_unit(), g.split_unit()
    if unit and gold_unit and unit != gold_unit:
        return False
    verdict = are_equal(a, g)
    if verdict and a.pending and not g.pending and g.rational is not None:
        raise NotEvaluated
    return verdict or _is_close(a, g) or verdict


def _is_close(a: Value, g: Value) -> bool:
    """Return whether one value is a decimal with enough digits and approximates the other."""
    if max(a.digits, g.digits) < MIN_DIGITS or a.variables() or g.variables():
        return False
    try:
        x, y = (v.approx()[0] if v.rational is None else v.rational for v in (a, g))
        difference, size = abs(x - y), abs(y)
        if a.digits >= MIN_DIGITS and a.rational is not None:
            is_whole = g.rational is not None and g.rational.denominator == 1
            return difference <= TOLERANCE * (min(size, 1) if is_whole else size)
        if not a.digits and g.rational:  # the gold is a rounded decimal, the answer exact
            return difference <= Fraction(10) ** (math.floor(math.log10(size)) + 1 - g.digits) / 2
    except (ArithmeticError, ValueError):
        pass
    return False


# --- text

_WORDS = re.compile(r"[^\W\d_](?:[\w '-]*[\w.])?")
_CHOICE = re.compile(r"\(?([A-Za-z])\)?")


def is_same_text(answer: str, gold: str) -> bool:
    """Return whether two tidied texts are equal up to spaces around signs, the case of words, and brackets of (A)."""
    if answer == gold:
        return answer != ""
    a, g = _bare_text(answer), _bare_text(gold)
    if len(g) > 1 and _WORDS.fullmatch(g) and (len(g) > 2 or g.lower() == "no"):
        a, g = a.lower(), g.lower()
    return a == g != ""


@functools.lru_cache(maxsize=1024)
def _bare_text(text: str) -> str:
    """Remove text commands, spaces around signs, and the brackets of a multiple-choice letter."""
    text = re.sub(r"\\text\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\s*([^\w\s])\s*", r"\1", re.sub(r"\s+", " ", text)).strip()
    choice = _CHOICE.fullmatch(text)
    return choice[1] if choice else text
