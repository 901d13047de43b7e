r"""Reading numbers and formulas from tokens into exact values: signs, products, powers, roots, functions, units.

What is not known raises Unreadable, and text is never skipped. Sums, integrals and limits are not worked out
(Unsupported). grading/answers/structures.py adds what formulas stand in: lists, brackets, sets, relations, matrices.
"""

from fractions import Fraction

from grading.answers.exact import FUNCTIONS, TooBig, ParseError, Unsupported, Value, apply_function, number, symbol
from grading.answers.units import CURRENCIES, parse_unit

GREEK = {
    rf"\{name}"
    for name in """alpha beta gamma delta epsilon varepsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau phi varphi chi
    psi omega Gamma Delta Theta Lambda Sigma Phi Psi Omega ell""".split()
}
MAX_DEPTH = 60
_CONSTANTS = {r"\pi": "pi", r"\infty": "infinity", r"\imath": "i"}
_OPERATORS = {rf"\{name}" for name in "sum prod int iint oint lim max min gcd lcm det sup partial nabla".split()}
_FUNCTIONS = {rf"\{name}" for name in [*FUNCTIONS, "log", "lg", "exp"]} - {r"\abs", r"\floor", r"\ceil", r"\binomial"}
_DELIMITERS = {"|": ("|", "abs"), r"\lfloor": (r"\rfloor", "floor"), r"\lceil": (r"\rceil", "ceil")}
_SIGNS = ("+", "-", r"\pm", r"\mp")
_TIMES, _DIVIDE = ("*", r"\cdot", r"\times", r"\ast"), ("/", r"\div")
_BRACKETS = {"(", "[", "{"}
_FACTORS = _BRACKETS | {
    "name",
    r"\frac",
    r"\sqrt",
    r"\binom",
    *_DELIMITERS,
    *_FUNCTIONS,
    *_CONSTANTS,
    *GREEK,
}  # of 2x, 2(x+1)
_MONEY = (r"\$", *CURRENCIES)
_BASES = {word: str(n) for n, word in enumerate("two three four five six seven eight nine ten".split(), 2)}


class FormulaParser:
    """A recursive descent over the tokens; each method reads one kind of thing from `position` on.

    What `sum`, `product` and the like return is a Value, or where that stands alone anything that `structure` reads.
    """

    def __init__(self, tokens: list[tuple[str, object]]):
        self.tokens, self.position = tokens, 0
        self.plus_minus_sign, self.has_plus_minus = 1, False  # which of the two that a plus-minus stands for; whether one was met
        self.open_bars = 0  # absolute values that are open
        self.depth = 0

    @property
    def kind(self) -> str:
        return self.tokens[self.position][0]

    def advance(self):
        self.position += 1
        return self.tokens[self.position - 1][1]

    def accept(self, *kinds: str) -> str | None:
        """The next token's kind if it is one of these; then it has been read."""
        kind = self.kind
        if kind not in kinds:
            return None
        self.position += 1
        return kind

    def expect(self, kind: str) -> None:
        if not self.accept(kind):
            raise ParseError(f"{self.kind} where {kind} should be")

    def source(self, start: int) -> str:
        """The tokens from a place on, up to here, as they are written."""
        return "".join(
            str(value.rational) if isinstance(value, Value) else value for _, value in self.tokens[start : self.position]
        )

    def parse_structure(self, kind: str):
        raise ParseError(f"{kind} where a formula should be")

    def parse_signs(self) -> int:
        sign = 1
        while kind := self.accept(*_SIGNS):
            self.has_plus_minus |= kind in _SIGNS[2:]
            sign *= {"+": 1, "-": -1, r"\pm": self.plus_minus_sign, r"\mp": -self.plus_minus_sign}[kind]
        return sign

    def parse_sum(self):
        start, sign = self.position, self.parse_signs()
        result = self.parse_product()
        result = result if sign > 0 else -as_value(result)
        while self.kind in _SIGNS:
            sign = self.parse_signs()
            term = as_value(self.parse_product())
            result = as_value(result) + (term if sign > 0 else -term)
        kinds = [kind for kind, _ in self.tokens[start : self.position] if kind not in _SIGNS]
        if isinstance(result, Value) and r"\infty" in kinds and len(kinds) > 1:
            raise ParseError("arithmetic with infinity")
        return result

    def parse_product(self):
        result = self.parse_mixed_number() or self.parse_power()
        while isinstance(result, Value):
            kind = self.kind
            if self.accept(*_TIMES, *_DIVIDE):
                sign = self.parse_signs()
                factor = as_value(self.parse_power())
                factor = factor if sign > 0 else -factor
                result = result / factor if kind in _DIVIDE else result * factor
            elif kind in _FACTORS and not (kind == "|" and self.open_bars):
                result = result * as_value(self.parse_power())
            else:
                break
        return result

    def parse_mixed_number(self) -> Value | None:
        r"""2\frac{1}{2}, which is a sum; None where there is none, as in 2\frac{\pi}{2}."""
        start = self.position
        if self.kind != "number" or self.tokens[start + 1][0] != r"\frac":
            return None
        whole, part = self.advance().rational, self.parse_primary()
        if part.rational is None or part.pending:
            self.position = start
            return None
        if whole.denominator != 1 or not 0 < part.rational < 1:
            raise ParseError("neither a mixed number nor a product")
        return self.parse_suffixes(number(whole + part.rational))

    def parse_power(self):
        return self.parse_suffixes(self.parse_primary())

    def parse_suffixes(self, result):
        """What was read, with the exponents, factorials, percent signs and units behind it."""
        while isinstance(result, Value):
            if self.accept("^"):
                result = with_unit(result, parse_unit("°")) if self.accept_degree_sign() else result ** as_value(self.parse_argument())
            elif self.accept("!"):
                if self.kind == "!":
                    raise ParseError("a double factorial")
                result = apply_function("factorial", result)
            elif self.accept("%", r"\%"):
                result = with_unit(result, number(Fraction(1, 100)))
            elif self.kind in ("text", "word", *_MONEY):
                unit = self.advance().removeprefix("\\")
                if self.accept("^"):
                    unit += f"^{as_value(self.parse_argument()).rational}"
                result = with_unit(result, parse_unit(unit))
                if self.kind in ("number", "name", "word"):
                    raise ParseError("more behind the unit")
            else:
                break
        return result

    def accept_degree_sign(self) -> bool:
        if [kind for kind, _ in self.tokens[self.position : self.position + 3]] == ["{", r"\circ", "}"]:
            self.position += 3
            return True
        return self.accept(r"\circ") is not None

    def parse_argument(self):
        """What a macro, ^ or _ takes: a group, or one thing with its sign."""
        if self.accept("{"):
            result = self.parse_sum()
            self.expect("}")
            return result
        sign = self.parse_signs()
        if self.kind not in _FACTORS and self.kind != "number":
            raise ParseError(f"{self.kind} as an argument")
        result = self.parse_primary()
        return result if sign > 0 else -as_value(result)

    def parse_primary(self):
        """The smallest thing that stands here: a number, a name, or what a command or a bracket makes of others."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise TooBig(f"what is nested over {MAX_DEPTH} deep")
        result = self._parse_primary(*self.tokens[self.position])
        self.depth -= 1
        return result

    def _parse_primary(self, kind: str, value):
        self.position += 1
        if kind == "number":
            return self.parse_number_base(value) if self.kind == "_" else value
        if kind == "name" or kind in GREEK:
            return self.parse_name(value)
        if kind in _CONSTANTS:
            return symbol(_CONSTANTS[kind])
        if kind in _FUNCTIONS:
            return self.parse_function(kind[1:])
        if kind == r"\frac":
            return as_value(self.parse_argument()) / as_value(self.parse_argument())
        if kind == r"\binom":
            return apply_function("binomial", as_value(self.parse_argument()), as_value(self.parse_argument()))
        if kind == r"\sqrt":
            index = number(2)
            if self.accept("["):
                index = as_value(self.parse_sum())
                self.expect("]")
            return _nth_root(as_value(self.parse_argument()), index)
        if kind in _DELIMITERS:
            self.open_bars += kind == "|"
            inner = as_value(self.parse_sum())
            closing, name = _DELIMITERS[kind]
            self.expect(closing)
            self.open_bars -= kind == "|"
            return apply_function(name, inner)
        if kind in _MONEY:
            return with_unit(as_value(self.parse_product()), parse_unit(kind[-1]))
        if kind in _OPERATORS:
            raise Unsupported(f"{kind} is not worked out")
        return self.parse_structure(kind)

    def parse_name(self, name: str) -> Value:
        if name in ("e", "i") and self.kind != "_":
            return symbol(name)
        if self.accept("_"):
            start = self.position
            index = as_value(self.parse_argument())
            if name == "C" and self.accept("^"):  # C_n^k
                return apply_function("binomial", index, as_value(self.parse_argument()))
            name += f"_{self.source(start).strip('{}')}"
        return symbol(name)

    def parse_number_base(self, value: Value) -> Value:
        """204_5: a number of its own, equal to nothing else."""
        self.position += 1
        base = self.parse_word()
        return symbol(f"{value.rational} in base {_BASES.get(base, base)}")

    def parse_word(self) -> str:
        """A group or token that is no formula, without its brackets."""
        start = self.position
        is_group = self.accept("{")
        while not (is_group and self.accept("}")):
            if self.kind == "end":
                raise ParseError("an argument that is missing")
            self.position += 1
            if not is_group:
                break
        return self.source(start).strip("{()}")

    def parse_function(self, name: str) -> Value:
        """sin x, sin^2 x, sin^{-1} x, log_2 x; without brackets the argument is the product up to the next function."""
        power = base = None
        while kind := self.accept("^", "_"):
            if kind == "^":
                power = as_value(self.parse_argument())
            else:
                base = as_value(self.parse_argument())
        if power is not None and power.rational == -1 and f"arc{name}" in FUNCTIONS:
            name, power = f"arc{name}", None
        if self.kind in _BRACKETS:
            argument = as_value(self.parse_primary())
        else:
            argument = as_value(self.parse_power())
            while self.kind in _FACTORS - _FUNCTIONS - _BRACKETS - {"|"}:
                argument = argument * as_value(self.parse_power())
        argument = _in_radians(argument)
        if name == "log" and base is not None:
            result = apply_function("ln", argument) / apply_function("ln", base)
        else:
            result = apply_function("lg" if name == "log" else name, argument)
        return result if power is None else result**power


def as_value(thing) -> Value:
    if not isinstance(thing, Value):
        raise ParseError("arithmetic with what is no number or formula")
    return thing


def with_unit(value: Value, unit: Value) -> Value:
    product = value * unit
    return Value(product.num, product.den, value.digits, value.pending)


def _nth_root(value: Value, n: Value) -> Value:
    index = n.rational
    if index is None or index.denominator != 1 or not 2 <= index <= 99:
        raise ParseError("a root of an odd kind")
    if value.rational is not None and value.rational < 0 and index % 2:
        return -((-value) ** number(1 / index))
    return value ** number(1 / index)


def _in_radians(angle: Value) -> Value:
    bare, unit = angle.split_unit()
    return bare * symbol("pi") / number(180) if unit == frozenset({("unit:°", 1)}) else angle
