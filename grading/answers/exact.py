"""Exact arithmetic: numbers and formulas in a normal form, so that equal values differ from merely close ones.

A `Value` is a fraction of two sums. Each term of a sum is a rational number times powers of *atoms*: primes under roots
(sqrt(8) is 2 times 2^(1/2)), pi, e, i, variables and units. These atoms are treated as independent, so values without
other atoms are equal if and only if their difference has no terms. *Opaque* atoms (sin x, a root of a sum, 2^n) may
depend on each other: values with different terms can still be equal, which `approx` can refute but not prove.
Nothing here evaluates text as code. A result that would be too large raises TooBig before it is computed.
"""

import cmath
import math
import random
from fractions import Fraction

from grading.answers.terms import (
    MAX_TERMS,
    ONE,
    ParseError,
    TooBig,
    Unsupported,
    add,
    constant,
    int_power,
    multiply,
    normalize_term,
    prime_factors,
    ratio,
)

MAX_FACTORIAL = 1000  # largest n of n!
MAX_DEGREE = 30  # degree of a binomial coefficient that is expanded as a polynomial

EVALUABLE, SYMBOLIC, PLAIN = 1, 2, 3  # levels of `Value.pending`


class Value:
    """An immutable number or formula.

    Args:
        num, den: Numerator and denominator: sums as {term: Fraction}; a denominator of None is 1.
        digits: Number of significant digits if the value was written as one decimal, else 0.
        pending: Kind of the operations that are not evaluated, set by the parser: PLAIN for a sum, product or quotient
            of plain numbers, as in 7+5; SYMBOLIC for another sum, product or quotient, as in 2x; EVALUABLE for a power,
            root or function that is a rational number, as in 4!; else 0.
    """

    __slots__ = ("num", "den", "digits", "pending")

    def __init__(self, num: dict, den: dict | None = None, digits: int = 0, pending: int = 0):
        if den is not None and (factor := ratio(num, den)) is not None:  # equal up to a rational factor: cancel
            num, den = constant(factor), None
        self.num, self.den, self.digits, self.pending = num, den, digits, pending

    @property
    def rational(self) -> Fraction | None:
        """The value if it is a rational number, else None."""
        if self.den is None and (not self.num or (len(self.num) == 1 and ONE in self.num)):
            return self.num.get(ONE, Fraction(0))
        return None

    @property
    def key(self) -> tuple:
        """A hashable form of the fraction, converted back by `Value.from_key`."""
        return frozenset(self.num.items()), self.den and frozenset(self.den.items())

    @classmethod
    def from_key(cls, key: tuple) -> "Value":
        return cls(dict(key[0]), key[1] and dict(key[1]))

    def atoms(self) -> set:
        return {atom for part in (self.num, self.den or {}) for term in part for atom, _ in term}

    def variables(self) -> set[str]:
        """Return the names of the variables, including those inside opaque atoms."""
        names = set()
        for atom in self.atoms():
            if isinstance(atom, str) and atom not in CONSTANTS:
                names.add(atom)
            elif isinstance(atom, tuple):
                names |= {v for key in atom[1:] if isinstance(key, tuple) for v in Value.from_key(key).variables()}
        return names

    def is_variable(self) -> bool:
        names = self.variables()
        return len(names) == 1 and self.den is None and self.num == symbol(min(names)).num

    def is_opaque(self) -> bool:
        return any(isinstance(atom, tuple) for atom in self.atoms())

    def split_unit(self) -> tuple["Value", frozenset]:
        """Return the value without its unit, and the unit: the term of `unit:` atoms that all terms share, else ONE."""
        units = {frozenset((atom, e) for atom, e in term if str(atom).startswith("unit:")) for term in self.num}
        if len(units) != 1 or not (unit := units.pop()):
            return self, ONE
        num = {term - unit: c for term, c in self.num.items()}
        return Value(num, self.den, self.digits, self.pending), unit - {("unit:unit", 1)}

    def left_pending(self, level: int) -> "Value":
        """Return the same value with `pending` raised to a level."""
        return self if level <= self.pending else Value(self.num, self.den, self.digits, level)

    def __neg__(self):
        return Value({term: -c for term, c in self.num.items()}, self.den, self.digits, self.pending)

    def __add__(self, other):
        pending = max(self.pending, other.pending)
        if self.den == other.den:
            return Value(add(self.num, other.num), self.den, pending=pending)
        num = add(multiply(self.num, other.den), multiply(other.num, self.den))
        return Value(num, multiply(self.den, other.den), pending=pending)

    def __sub__(self, other):
        return self + -other

    def __mul__(self, other):
        den = None if self.den is None and other.den is None else multiply(self.den, other.den)
        digits = 0 if self.digits and other.digits else self.digits or other.digits
        return Value(multiply(self.num, other.num), den, digits, max(self.pending, other.pending))

    def __truediv__(self, other):
        pending = max(self.pending, other.pending)
        if not other.num:
            raise ParseError("a division by zero")
        den = multiply(self.den, other.num) if self.den or len(other.num) > 1 else None
        if den is None:
            (term, c), *_ = other.num.items()
            factor, term = normalize_term({atom: -e for atom, e in term})
            num = multiply(multiply(self.num, other.den), {term: factor / c})
            return Value(num, None, self.digits, pending)
        return Value(multiply(self.num, other.den), den, 0, pending)

    def __pow__(self, power: "Value"):
        return _power(self, power).left_pending(max(self.pending, power.pending))

    def approx(self, sample: int = 0) -> tuple[complex, float]:
        """Return the value in floating point, with a fixed random positive number for each variable, and its scale.

        The scale is the sum of the absolute terms. Raises ArithmeticError or ValueError if the value is undefined.
        """
        (num, scale), (den, _) = _approx_sum(self.num, sample), _approx_sum(self.den, sample) if self.den else (1, 1)
        result = num / den
        if not cmath.isfinite(result):
            raise OverflowError
        return result, scale / abs(den)


def number(value, digits: int = 0) -> Value:
    return Value(constant(Fraction(value)), digits=digits)


def symbol(name) -> Value:
    """Return an atom as a value: a variable, pi, e, i, a unit (`unit:cm`) or an opaque atom (a tuple)."""
    return Value({frozenset({(name, 1)}): Fraction(1)})


def proportionality_factor(a: Value, b: Value) -> Fraction | None:
    """Return the rational c != 0 with a = c b, or None if there is none."""
    return ratio(multiply(a.num, b.den), multiply(b.num, a.den))


def are_equal(a: Value, b: Value) -> bool | None:
    """Return whether two values are equal; None if only the symbolic grader can decide. Raises TooBig."""
    difference = a - b
    if not difference.num:
        return True
    if not difference.is_opaque():
        return False
    has_value = False
    for sample in range(3):
        try:
            d, scale = difference.approx(sample)
        except (ArithmeticError, ValueError):
            continue
        if abs(d) > 1e-9 * scale:  # the terms of the difference do not cancel
            return False
        has_value = True
    if not has_value:
        raise TooBig("a formula that is undefined in floating point")
    return None


# --- powers, roots and functions


def _power(base: Value, power: Value) -> Value:
    n = power.rational
    if n is None:
        return _symbolic_power(base, power)
    if n.denominator != 1:
        return _root(base, n)
    if n < 0:
        return number(1) / base**-power
    if not base.num and n == 0:
        raise ParseError("0^0")
    if base.den is None and len(base.num) == 1:
        (term, c), *_ = base.num.items()
        factor, term = normalize_term({atom: e * n for atom, e in term})
        return Value({term: factor * int_power(c, n)})
    if n > MAX_TERMS:
        raise TooBig(f"a power of {n}")
    result, square, n = number(1), base, int(n)
    while n:
        result = result * square if n & 1 else result
        n >>= 1
        square = square * square if n else square
    return result


def _root(base: Value, n: Fraction) -> Value:
    """Return the principal value of base^n for a fraction n, as in sqrt(-3) = i sqrt(3)."""
    if not base.num:
        if n < 0:
            raise ParseError("a division by zero")
        return base
    if base.den is not None:
        return _root(Value(base.num), n) / _root(Value(base.den), n)
    scale = Fraction(
        math.gcd(*(c.numerator for c in base.num.values())), math.lcm(*(c.denominator for c in base.num.values()))
    )
    rest = {term: c / scale for term, c in base.num.items()}
    powers = {}
    for part, sign in ((scale.numerator, 1), (scale.denominator, -1)):
        for p, e in prime_factors(part):
            powers[p] = sign * e * n
    if len(rest) == 1:
        (term, c), *_ = rest.items()
        if c < 0 and n.denominator == 2 and not term:
            powers["i"] = n.numerator
        elif c > 0 and (len(term) <= 1 and all(e == 1 for _, e in term) or _is_positive(term)):
            for atom, e in term:
                powers[atom] = powers.get(atom, 0) + e * n
        else:
            powers["root", Value(rest).key] = n
    else:
        powers["root", Value(rest).key] = n
    factor, term = normalize_term(powers)
    return Value({term: factor})


def _is_positive(term: frozenset) -> bool:
    return all(isinstance(atom, int) or atom in ("pi", "e") or str(atom).startswith("unit:") for atom, _ in term)


def _symbolic_power(base: Value, power: Value) -> Value:
    """Return base^(a n + b) as (base^n)^a base^b, with a rational base split into prime factors."""
    if power.den is not None or not base.num:
        raise Unsupported("a power with a fraction in it")
    result, bases = number(1), [(base, 1)]
    if (value := base.rational) is not None and value > 0:
        bases = [(number(p), e) for p, e in prime_factors(value.numerator)]
        bases += [(number(p), -e) for p, e in prime_factors(value.denominator)]
    for term, c in power.num.items():
        for part, e in bases:
            if term == ONE:
                result *= part ** number(c * e)
            else:
                result *= Value(
                    {frozenset({(("power", part.key, Value({term: Fraction(1)}).key), c * e)}): Fraction(1)}
                )
    return result


FUNCTIONS = {
    "sin": cmath.sin, "cos": cmath.cos, "tan": cmath.tan, "cot": lambda x: 1 / cmath.tan(x), "sec": lambda x: 1 / cmath.cos(x),
    "csc": lambda x: 1 / cmath.sin(x), "arcsin": cmath.asin, "arccos": cmath.acos, "arctan": cmath.atan, "sinh": cmath.sinh,
    "cosh": cmath.cosh, "tanh": cmath.tanh, "ln": cmath.log, "abs": abs, "floor": lambda x: math.floor(x.real),
    "ceil": lambda x: math.ceil(x.real), "factorial": lambda x: math.gamma(x.real + 1),
    "binomial": lambda n, k: math.gamma(n.real + 1) / math.gamma(k.real + 1) / math.gamma(n.real - k.real + 1),
}  # fmt: skip
CONSTANTS = {"pi": math.pi, "e": math.e, "i": 1j, "unit:%": 0.01}


def apply_function(name: str, *args: Value) -> Value:
    """Apply exp, lg (base 10) or one of FUNCTIONS: exactly if that is easy, else as an opaque atom."""
    return _apply(name, *args).left_pending(max(arg.pending for arg in args))


def _apply(name: str, *args: Value) -> Value:
    x, value = args[0], args[0].rational
    if name == "exp":
        return symbol("e") ** x
    if name == "lg":
        return apply_function("ln", x) / apply_function("ln", number(10))
    if name == "ln" and x.key == symbol("e").key:
        return number(1)
    if name == "ln" and value is not None:
        if value <= 0:
            raise ParseError("a logarithm of zero or a negative number")
        parts = [number(e) * symbol(("ln", number(p).key)) for p, e in prime_factors(value.numerator)]
        parts += [number(-e) * symbol(("ln", number(p).key)) for p, e in prime_factors(value.denominator)]
        return sum(parts, number(0))
    if name == "abs" and not x.variables() and not x.is_opaque() and "i" not in x.atoms():
        try:
            return -x if x.approx()[0].real < 0 else x
        except ArithmeticError:
            raise TooBig("an absolute value") from None
    if name in ("floor", "ceil") and value is not None:
        return number(math.floor(value) if name == "floor" else math.ceil(value))
    if name == "factorial" and value is not None:
        if value.denominator != 1 or value < 0:
            raise ParseError("a factorial of a negative number or a fraction")
        if value > MAX_FACTORIAL:
            raise TooBig(f"the factorial of a number over {MAX_FACTORIAL}")
        return number(math.factorial(int(value)))
    if name == "binomial" and (k := args[1].rational) is not None and k.denominator == 1 and k >= 0:
        if max(k, value or 0) > MAX_FACTORIAL or (value is None and k > MAX_DEGREE):
            raise TooBig("a binomial coefficient of this size")
        if value is not None and value.denominator == 1 and value >= 0:
            return number(math.comb(int(value), int(k)))
        result = number(1)  # expanded as a polynomial in x
        for j in range(int(k)):
            result *= (x - number(j)) / number(j + 1)
        return Value(result.num, result.den)
    return symbol((name, *(arg.key for arg in args)))


def _approx_sum(total: dict, sample: int) -> tuple[complex, float]:
    parts = [
        float(c) * math.prod((_approx_atom(atom, sample) ** float(e) for atom, e in term), start=1)
        for term, c in total.items()
    ]
    return sum(parts), sum(map(abs, parts))


def _approx_atom(atom, sample: int) -> complex:
    if isinstance(atom, int):
        return atom
    if isinstance(atom, str):
        return CONSTANTS.get(atom) or random.Random(f"{atom} {sample}").uniform(0.4, 1.9)
    name, *keys = atom
    args = [Value.from_key(key).approx(sample)[0] for key in keys]
    if name == "root":
        return args[0]
    return args[0] ** args[1] if name == "power" else FUNCTIONS[name](*args)
