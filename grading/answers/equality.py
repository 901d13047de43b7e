"""Comparison of a parsed answer with the parsed gold answer.

Verdicts are True, False, or None if only the symbolic grader can decide.
"""

import functools
import math
import re
import struct
from fractions import Fraction

from grading.answers.exact import EVALUABLE, PLAIN, SYMBOLIC, Value, are_equal, proportionality_factor, symbol
from grading.answers.regions import Region
from grading.answers.structures import Items, Matrix, Named, Relation, Text, as_region
from grading.answers.terms import ParseError
from grading.answers.units import PERCENT, without_percent

TOLERANCE = Fraction(1, 10**6)
FLOAT_NOISE = Fraction(1, 10**12)  # relative error of decimals with at least FLOAT_DIGITS, as in 3.3000000000000003
FLOAT_DIGITS = 16
MIN_SINGLE_DIGITS = 10  # significant digits of a number in single precision that is written in double precision
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
        is_equal = bool(factor) and (a.op in ("=", "!=") or factor > 0)
        if is_equal and a.difference.pending == PLAIN > g.difference.pending:
            raise NotEvaluated
        return is_equal
    if isinstance(a, Matrix):
        if [len(row) for row in a.rows] != [len(row) for row in g.rows]:
            return False
        return _combine(is_same(x, y) for row, other in zip(a.rows, g.rows) for x, y in zip(row, other))
    return isinstance(a, Text) and is_same_text(a.words, g.words)


def _is_same_named(a, g) -> bool | None:
    relation_a, relation_g = _as_relation(a), _as_relation(g)
    if relation_a and relation_g and is_same(relation_a, relation_g):
        return True
    if _is_implicit(a) or _is_implicit(g):
        return False
    if relation_a and relation_g and len({"x", "y", "z"} & {getattr(node, "name", "") for node in (a, g)}) > 1:
        return False  # y = 2t and x = 2t
    return is_same(a.value if isinstance(a, Named) else a, g.value if isinstance(g, Named) else g)


def _is_implicit(node) -> bool:
    """Return whether a node is an equation such as x = 2x + 3, whose right side is not its answer."""
    return isinstance(node, Named) and isinstance(node.value, Value) and node.name in node.value.variables()


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
    fractions = without_percent(a), without_percent(g)
    (a, unit), (g, gold_unit) = a.split_unit(), g.split_unit()
    if unit and gold_unit and unit != gold_unit:
        return False
    if unit == gold_unit or PERCENT not in (unit, gold_unit):
        verdict = _is_equal(a, g)
    elif g.rational is not None and abs(g.rational) < 1 and not gold_unit:  # 0.5 is not 0.5 %
        verdict = _is_equal(*fractions)
    else:
        verdict = _is_equal(a, g) or _is_equal(*fractions)
    if verdict is not False and a.pending > _allowed_pending(a, g):
        raise NotEvaluated
    return verdict


def _allowed_pending(a: Value, g: Value) -> int:
    """Return how much an answer may leave to be computed: a single function of a number, or as much as the gold does."""
    if g.rational is None:
        return max(g.pending, SYMBOLIC)
    if g.pending:
        return PLAIN
    is_rounded_formula = g.digits and a.rational is None and g.rational.denominator > 1
    return SYMBOLIC if is_rounded_formula else EVALUABLE


def _is_equal(a: Value, g: Value) -> bool | None:
    verdict = are_equal(a, g)
    return verdict or _is_close(a, g) or verdict


def _is_close(a: Value, g: Value) -> bool:
    """Return whether one value is a decimal with enough digits and approximates the other."""
    if max(a.digits, g.digits) < MIN_DIGITS or a.variables() or g.variables():
        return False
    digits, gold_digits = (v.digits if v.rational is not None else 0 for v in (a, g))
    try:
        x, y = (v.approx()[0] if v.rational is None else v.rational for v in (a, g))
        difference, size = abs(x - y), abs(y)
        if max(digits, gold_digits) >= FLOAT_DIGITS and difference <= FLOAT_NOISE * size:
            return True
        if a.rational is not None and gold_digits >= MIN_SINGLE_DIGITS and _is_single(x, y):
            return True
        place, gold_place = (_last_place(v) if d else 0 for v, d in ((a, digits), (g, gold_digits)))
        is_whole = g.rational is not None and g.rational.denominator == 1
        if digits >= MIN_DIGITS and difference <= TOLERANCE * (min(size, 1) if is_whole else size):
            if difference <= max(place, TOLERANCE) and not gold_digits:  # the gold is exact
                return True
            if difference <= place and place > gold_place:  # the answer is rounded
                return True
        return gold_digits >= MIN_DIGITS and not is_whole and place < gold_place and difference <= gold_place / 2
    except (ArithmeticError, ValueError):
        return False


def _last_place(value: Value) -> Fraction:
    """Return the value of a unit in the last digit of a decimal: 1/100 for 3.14."""
    size = abs(value.rational)
    magnitude = math.floor(math.log10(size)) + 1 if size else 0
    return Fraction(10) ** (magnitude - value.digits)


def _is_single(x: Fraction, y: Fraction) -> bool:
    """Return whether y is x in single precision: 0.10000000149011612 for 0.1."""
    single_x, single_y = (struct.unpack("f", struct.pack("f", float(value)))[0] for value in (x, y))
    return single_x == single_y == float(y)


# --- text

_WORDS = re.compile(r"[^\W\d_](?:[\w '-]*[\w.])?")
_CHOICE = re.compile(r"(?:option|choice)?\s*\(?([A-Za-z])\)?:?", re.IGNORECASE)
_LABELLED_CHOICE = re.compile(r"(?:option|choice)?\s*(?:\(([A-J])\)|([A-J])[.:)])(.+)", re.IGNORECASE)
_OTHER_CHOICE = re.compile(r"\([A-J]\)|\b[A-J][.:)]|\b(?:or|and)\b\s*\(?[A-J]\b|^(?:\W*[A-J]\b)+\W*$")


def is_same_text(answer: str, gold: str) -> bool:
    """Return whether two tidied texts are equal up to spaces around signs and the case of words.

    An answer to a multiple-choice question may have brackets, "option" before the letter, and the text of the choice.
    """
    if answer == gold:
        return answer != ""
    a, g = _bare_text(answer), _bare_text(gold)
    if len(g) > 1 and _WORDS.fullmatch(g) and (len(g) > 2 or g.lower() == "no"):
        a, g = a.lower(), g.lower()
    if a == g != "":
        return True
    if len(a) > 1 and len(g) == 1 and "A" <= g <= "J":
        return _labelled_choice(answer) == g
    return len(g) > 1 and len(a) == 1 and "A" <= a <= "J" and _labelled_choice(gold) == a


@functools.lru_cache(maxsize=1024)
def _labelled_choice(text: str) -> str | None:
    """Return the letter of `(E) 7` or `E: a high score`; None if there is none or several."""
    text = re.sub(r"\\text\{([^{}]*)\}", r"\1", text).strip()
    match = _LABELLED_CHOICE.fullmatch(text)
    if not match or _OTHER_CHOICE.search(match[3]):
        return None
    return match[1] or match[2]


@functools.lru_cache(maxsize=1024)
def _bare_text(text: str) -> str:
    """Remove text commands, spaces around signs, and the brackets of a multiple-choice letter."""
    text = re.sub(r"\\text\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\s*([^\w\s])\s*", r"\1", re.sub(r"\s+", " ", text)).strip()
    choice = _CHOICE.fullmatch(text)
    return choice[1] if choice else text
