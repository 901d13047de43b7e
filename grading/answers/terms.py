"""Sums of terms, the arithmetic under `Value` (exact.py): {term: rational coefficient}.

A term is a frozenset of (atom, exponent) pairs. A result that would be too large raises TooBig before it is computed.
"""

import math
from fractions import Fraction

MAX_TERMS = 200  # terms of a sum
MAX_PRODUCTS = 3000  # products of two terms in one multiplication
MAX_BITS = 20_000  # bits of a number
MAX_PRIME = 1000  # largest trial divisor when factorizing

ONE = frozenset()  # the term without atoms; other terms are frozensets of (atom, exponent) pairs


class ParseError(Exception):
    """The text cannot be parsed, or has no value to compare."""


class Unsupported(ParseError):
    """The text contains notation that only the symbolic grader supports, such as an integral."""


class TooBig(Exception):
    """A number or formula, named in the message, is too large to be computed."""


def constant(value: Fraction) -> dict:
    return {ONE: value} if value else {}


def add(a: dict, b: dict) -> dict:
    total = dict(a)
    for term, c in b.items():
        total[term] = total.get(term, 0) + c
    if len(total) > MAX_TERMS:
        raise TooBig(f"a sum of over {MAX_TERMS} terms")
    return {term: c for term, c in total.items() if c}


def multiply(a: dict | None, b: dict | None) -> dict | None:
    """Return the product of two sums; None is the sum 1."""
    if a is None or b is None:
        return b if a is None else a
    if len(a) * len(b) > MAX_PRODUCTS:
        raise TooBig(f"a product of over {MAX_PRODUCTS} terms")
    total = {}
    for s, c in a.items():
        for t, d in b.items():
            if s and t:
                powers = dict(s)
                for atom, e in t:
                    powers[atom] = powers.get(atom, 0) + e
                factor, term = normalize_term(powers)
                total[term] = total.get(term, 0) + c * d * factor
            else:
                total[s or t] = total.get(s or t, 0) + c * d
    return add({}, total)


def normalize_term(powers: dict) -> tuple[Fraction, frozenset]:
    """Return a rational factor and the remaining term: primes have exponents in (0, 1) and i has exponent 1."""
    factor = Fraction(1)
    for atom, e in list(powers.items()):
        if isinstance(atom, int):
            whole = math.floor(e)
            factor *= int_power(Fraction(atom), whole)
            e -= whole
        elif atom == "i" and e == int(e):
            factor *= (1, 1, -1, -1)[int(e) % 4]
            e = e % 2
        powers[atom] = e
    return factor, frozenset((atom, e) for atom, e in powers.items() if e)


def int_power(value: Fraction, n) -> Fraction:
    bits = max(value.numerator.bit_length(), value.denominator.bit_length())
    if value not in (1, -1) and bits * abs(n) > MAX_BITS:
        raise TooBig(f"a number of about {'10^6 or more' if bits * abs(n) > 4e6 else int(bits * abs(n) * 0.3)} digits")
    return value ** int(n)


def ratio(a: dict, b: dict) -> Fraction | None:
    """Return the rational c != 0 with a = c b, or None if there is none."""
    if len(a) != len(b) or not a or a.keys() != b.keys():
        return None
    ratios = {a[term] / b[term] for term in a}
    return ratios.pop() if len(ratios) == 1 else None


def prime_factors(n: int) -> list[tuple[int, int]]:
    """Return (prime, exponent) pairs. A cofactor with only large primes is not split, except into a square."""
    factors, p = [], 2
    while p * p <= n and p < MAX_PRIME:
        e = 0
        while n % p == 0:
            n, e = n // p, e + 1
        if e:
            factors.append((p, e))
        p += 1 + (p > 2)
    root = math.isqrt(n)
    return factors + ([(root, 2)] if root * root == n > 1 else [(n, 1)] * (n > 1))
