"""Sets of real numbers made of intervals and points: unions, intersections, and inequalities as such sets."""

import math
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from grading.answers.exact import ONE, Unreadable, Value


@dataclass(frozen=True)
class Region:
    """pieces: (low, whether it belongs to it, high, whether it belongs to it), apart from each other and in order."""

    pieces: tuple

    def __or__(self, other: "Region") -> "Region":
        merged = []
        for low, has_low, high, has_high in sorted(self.pieces + other.pieces, key=lambda p: (place(p[0]), not p[1])):
            if merged and (
                place(low) < place(merged[-1][2]) or (place(low) == place(merged[-1][2]) and (has_low or merged[-1][3]))
            ):
                last = merged[-1]
                if (place(high), has_high) > (place(last[2]), last[3]):
                    merged[-1] = (last[0], last[1], high, has_high)
            else:
                merged.append((low, has_low, high, has_high))
        return Region(tuple(merged))

    def complement(self) -> "Region":
        ends = [(-math.inf, True), *((e, has) for p in self.pieces for e, has in (p[:2], p[2:])), (math.inf, True)]
        gaps = [
            (low, not has_low, high, not has_high) for (low, has_low), (high, has_high) in list(pairwise(ends))[::2]
        ]
        return Region(tuple(gap for gap in gaps if _is_piece(*gap)))

    def __and__(self, other: "Region") -> "Region":
        return (self.complement() | other.complement()).complement()


REALS = Region(((-math.inf, False, math.inf, False),))


def place(end: Value | float) -> float:
    """Where an end lies on the real line, for ordering. Raises Unreadable where it is no real number."""
    if isinstance(end, float):
        return end
    try:
        value = end.approx()[0] if not end.variables() else 1j
    except (ArithmeticError, ValueError):
        value = 1j
    if abs(complex(value).imag) > 1e-9:
        raise Unreadable("an interval whose end is no real number")
    return complex(value).real


def _is_piece(low, has_low: bool, high, has_high: bool) -> bool:
    return place(low) < place(high) or (
        place(low) == place(high) and has_low and has_high and not isinstance(low, float)
    )


def interval(low: Value, has_low: bool, high: Value, has_high: bool) -> Region:
    """Raises Unreadable where the ends are no numbers, or not in this order."""
    low, high = _end(low), _end(high)
    has_low, has_high = has_low and not isinstance(low, float), has_high and not isinstance(high, float)
    if not _is_piece(low, has_low, high, has_high):
        raise Unreadable("an interval without any number in it")
    return Region(((low, has_low, high, has_high),))


def _end(value: Value) -> Value | float:
    if not isinstance(value, Value):
        raise Unreadable("an interval whose end is no number")
    sign = value.num.get(frozenset({("infinity", 1)}))
    return math.copysign(math.inf, sign) if sign else value


def solve(op: str, difference: Value) -> Region | None:
    """The numbers for which `difference op 0` (op: < <= !=), where that is linear in its only variable; else None."""
    names = difference.variables()
    if len(names) != 1 or difference.den is not None:
        return None
    term = frozenset({(names.pop(), 1)})
    slope, rest = difference.num.get(term), Value({t: c for t, c in difference.num.items() if t != term})
    if slope is None or rest.variables():
        return None
    end = -rest / Value({ONE: Fraction(slope)})
    if op == "!=":
        return Region(((end, True, end, True),)).complement()
    low, high = (-math.inf, end) if slope > 0 else (end, math.inf)
    return Region(((low, op == "<=" and slope < 0, high, op == "<=" and slope > 0),))
