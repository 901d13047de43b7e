"""Sets of real numbers that consist of intervals and points, their operations, and inequalities as such sets."""

import math
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from grading.answers.exact import PLAIN, Value
from grading.answers.terms import ONE, ParseError


@dataclass(frozen=True)
class Region:
    """A set of real numbers, as disjoint intervals (low, has_low, high, has_high) in ascending order.

    has_low and has_high tell whether an endpoint is included; a point is a closed interval of length 0. Endpoints are
    Values, or floats if infinite.
    """

    pieces: tuple

    def __or__(self, other: "Region") -> "Region":
        merged = []
        for low, has_low, high, has_high in sorted(
            self.pieces + other.pieces, key=lambda p: (as_float(p[0]), not p[1])
        ):
            if merged and (
                as_float(low) < as_float(merged[-1][2])
                or (as_float(low) == as_float(merged[-1][2]) and (has_low or merged[-1][3]))
            ):
                last = merged[-1]
                if (as_float(high), has_high) > (as_float(last[2]), last[3]):
                    merged[-1] = (last[0], last[1], high, has_high)
            else:
                merged.append((low, has_low, high, has_high))
        return Region(tuple(merged))

    def complement(self) -> "Region":
        """Return the real numbers that are not in the region."""
        ends = [(-math.inf, True), *((e, has) for p in self.pieces for e, has in (p[:2], p[2:])), (math.inf, True)]
        gaps = [
            (low, not has_low, high, not has_high) for (low, has_low), (high, has_high) in list(pairwise(ends))[::2]
        ]
        return Region(tuple(gap for gap in gaps if _is_nonempty(*gap)))

    def __and__(self, other: "Region") -> "Region":
        return (self.complement() | other.complement()).complement()


REALS = Region(((-math.inf, False, math.inf, False),))


def as_float(endpoint: Value | float) -> float:
    """Return an endpoint as a float, for ordering. Raises ParseError if it is not a real number."""
    if isinstance(endpoint, float):
        return endpoint
    try:
        value = endpoint.approx()[0] if not endpoint.variables() else 1j
    except (ArithmeticError, ValueError):
        value = 1j
    if abs(complex(value).imag) > 1e-9:
        raise ParseError("an interval whose endpoint is not a real number")
    return complex(value).real


def _is_nonempty(low, has_low: bool, high, has_high: bool) -> bool:
    return as_float(low) < as_float(high) or (
        as_float(low) == as_float(high) and has_low and has_high and not isinstance(low, float)
    )


def interval(low: Value, has_low: bool, high: Value, has_high: bool) -> Region:
    """Return an interval as a region. Raises ParseError if the endpoints are not real numbers in ascending order."""
    low, high = _as_endpoint(low), _as_endpoint(high)
    has_low = has_low and not isinstance(low, float)
    has_high = has_high and not isinstance(high, float)
    if not _is_nonempty(low, has_low, high, has_high):
        raise ParseError("an empty interval")
    return Region(((low, has_low, high, has_high),))


def _as_endpoint(value: Value) -> Value | float:
    """Convert infinity to a float. Raises ParseError if the value is not a number or formula."""
    if not isinstance(value, Value):
        raise ParseError("an interval whose endpoint is not a number")
    sign = value.num.get(frozenset({("infinity", 1)}))
    return math.copysign(math.inf, sign) if sign else value


def solve(op: str, difference: Value) -> Region | None:
    """Return the solutions of `difference op 0` (op: < <= !=) if it is linear in its only variable, else None."""
    names = difference.variables()
    if len(names) != 1 or difference.den is not None:
        return None
    term = frozenset({(names.pop(), 1)})
    slope = difference.num.get(term)
    rest = Value({t: c for t, c in difference.num.items() if t != term})
    if slope is None or rest.variables():
        return None
    endpoint = -rest / Value({ONE: Fraction(slope)})
    if difference.pending == PLAIN:
        endpoint = endpoint.left_pending(PLAIN)
    if op == "!=":
        return Region(((endpoint, True, endpoint, True),)).complement()
    low, high = (-math.inf, endpoint) if slope > 0 else (endpoint, math.inf)
    return Region(((low, op == "<=" and slope < 0, high, op == "<=" and slope > 0),))
