r"""Reading numbers and formulas from tokens into exact values: signs, products, powers, roots, functions, units.

What is not known raises Unreadable, and text is never skipped. Sums, integrals and limits are not worked out
(Unsupported). grading/answers/structures.py adds what formulas stand in: lists, brackets, sets, relations, matrices.
"""

from fractions import Fraction

from grading.answers.exact import FUNCTIONS, TooBig, Unreadable, Unsupported, Value, apply, number, symbol
from grading.answers.units import CURRENCIES, read_unit

GREEK = {
    rf"\{name}"
    for name in """alpha beta gamma delta epsilon varepsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau phi varphi chi
    psi omega Gamma Delta Theta Lambda Sigma Phi Psi Omega ell""".split()
}
MAX_DEPTH = 60
_CONSTANTS = {r"\pi": "pi", r"\infty": "infinity", r"\imath": "i"}
_OPERATORS = {rf"\{name}" for name in "sum prod int iint oint lim max min gcd lcm det sup partial nabla".split()}
_FUNCTIONS = {rf"\{name}" for name in [*FUNCTIONS, "log", "lg", "exp"]} - {r"\abs", r"\floor", r"\ceil", r"\binomial"}
_ENCLOSED = {"|": ("|", "abs"), r"\lfloor": (r"\rfloor", "floor"), r"\lceil": (r"\rceil", "ceil")}
_SIGNS = ("+", "-", r"\pm", r"\mp")
_TIMES, _OVER = ("*", r"\cdot", r"\times", r"\ast"), ("/", r"\div")
_BRACKETS = {"(", "[", "{"}
_FACTORS = _BRACKETS | {
    "name",
    r"\frac",
    r"\sqrt",
    r"\binom",
    *_ENCLOSED,
    *_FUNCTIONS,
    *_CONSTANTS,
    *GREEK,
}  # of 2x, 2(x+1)
_MONEY = (r"\$", *CURRENCIES)
_BASES = {word: str(n) for n, word in enumerate("two three four five six seven eight nine ten".split(), 2)}


class FormulaReader:
    """A recursive descent over the tokens; each method reads one kind of thing from `at` on.

    What `sum`, `product` and the like return is a Value, or where that stands alone anything that `structure` reads.
    """

    def __init__(self, tokens: list[tuple[str, object]]):
        self.tokens, self.at = tokens, 0
        self.sign, self.has_sign = 1, False  # which of the two that a plus-minus stands for; whether one was met
        self.bars = 0  # absolute values that are open
        self.depth = 0

    @property
    def kind(self) -> str:
        return self.tokens[self.at][0]

    def next(self):
        self.at += 1
        return self.tokens[self.at - 1][1]

    def skip(self, *kinds: str) -> str | None:
        """The next token's kind if it is one of these; then it has been read."""
        kind = self.kind
        if kind not in kinds:
            return None
        self.at += 1
        return kind

    def expect(self, kind: str) -> None:
        if not self.skip(kind):
            raise Unreadable(f"{self.kind} where {kind} should be")

    def text(self, start: int) -> str:
        """The tokens from a place on, up to here, as they are written."""
        return "".join(
            str(value.rational) if isinstance(value, Value) else value for _, value in self.tokens[start : self.at]
        )

    def structure(self, kind: str):
        raise Unreadable(f"{kind} where a formula should be")

    def signs(self) -> int:
        sign = 1
        while kind := self.skip(*_SIGNS):
            self.has_sign |= kind in _SIGNS[2:]
            sign *= {"+": 1, "-": -1, r"\pm": self.sign, r"\mp": -self.sign}[kind]
        return sign

    def sum(self):
        start, sign = self.at, self.signs()
        result = self.product()
        result = result if sign > 0 else -as_value(result)
        while self.kind in _SIGNS:
            sign = self.signs()
            term = as_value(self.product())
            result = as_value(result) + (term if sign > 0 else -term)
        kinds = [kind for kind, _ in self.tokens[start : self.at] if kind not in _SIGNS]
        if isinstance(result, Value) and r"\infty" in kinds and len(kinds) > 1:
            raise Unreadable("arithmetic with infinity")
        return result

    def product(self):
        result = self.mixed() or self.power()
        while isinstance(result, Value):
            kind = self.kind
            if self.skip(*_TIMES, *_OVER):
                sign = self.signs()
                factor = as_value(self.power())
                factor = factor if sign > 0 else -factor
                result = result / factor if kind in _OVER else result * factor
            elif kind in _FACTORS and not (kind == "|" and self.bars):
                result = result * as_value(self.power())
            else:
                break
        return result

    def mixed(self) -> Value | None:
        r"""2\frac{1}{2}, which is a sum; None where there is none, as in 2\frac{\pi}{2}."""
        start = self.at
        if self.kind != "number" or self.tokens[start + 1][0] != r"\frac":
            return None
        whole, part = self.next().rational, self.base()
        if part.rational is None or part.work:
            self.at = start
            return None
        if whole.denominator != 1 or not 0 < part.rational < 1:
            raise Unreadable("neither a mixed number nor a product")
        return self.with_suffixes(number(whole + part.rational))

    def power(self):
        return self.with_suffixes(self.base())

    def with_suffixes(self, result):
        """What was read, with the exponents, factorials, percent signs and units behind it."""
        while isinstance(result, Value):
            if self.skip("^"):
                result = with_unit(result, read_unit("°")) if self.degrees() else result ** as_value(self.argument())
            elif self.skip("!"):
                if self.kind == "!":
                    raise Unreadable("a double factorial")
                result = apply("factorial", result)
            elif self.skip("%", r"\%"):
                result = with_unit(result, number(Fraction(1, 100)))
            elif self.kind in ("text", "word", *_MONEY):
                unit = self.next().removeprefix("\\")
                if self.skip("^"):
                    unit += f"^{as_value(self.argument()).rational}"
                result = with_unit(result, read_unit(unit))
                if self.kind in ("number", "name", "word"):
                    raise Unreadable("more behind the unit")
            else:
                break
        return result

    def degrees(self) -> bool:
        if [kind for kind, _ in self.tokens[self.at : self.at + 3]] == ["{", r"\circ", "}"]:
            self.at += 3
            return True
        return self.skip(r"\circ") is not None

    def argument(self):
        """What a macro, ^ or _ takes: a group, or one thing with its sign."""
        if self.skip("{"):
            result = self.sum()
            self.expect("}")
            return result
        sign = self.signs()
        if self.kind not in _FACTORS and self.kind != "number":
            raise Unreadable(f"{self.kind} as an argument")
        result = self.base()
        return result if sign > 0 else -as_value(result)

    def base(self):
        """The smallest thing that stands here: a number, a name, or what a command or a bracket makes of others."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise TooBig(f"what is nested over {MAX_DEPTH} deep")
        result = self._base(*self.tokens[self.at])
        self.depth -= 1
        return result

    def _base(self, kind: str, value):
        self.at += 1
        if kind == "number":
            return self.with_base(value) if self.kind == "_" else value
        if kind == "name" or kind in GREEK:
            return self.name(value)
        if kind in _CONSTANTS:
            return symbol(_CONSTANTS[kind])
        if kind in _FUNCTIONS:
            return self.function(kind[1:])
        if kind == r"\frac":
            return as_value(self.argument()) / as_value(self.argument())
        if kind == r"\binom":
            return apply("binomial", as_value(self.argument()), as_value(self.argument()))
        if kind == r"\sqrt":
            index = number(2)
            if self.skip("["):
                index = as_value(self.sum())
                self.expect("]")
            return _nth_root(as_value(self.argument()), index)
        if kind in _ENCLOSED:
            self.bars += kind == "|"
            inner = as_value(self.sum())
            closing, name = _ENCLOSED[kind]
            self.expect(closing)
            self.bars -= kind == "|"
            return apply(name, inner)
        if kind in _MONEY:
            return with_unit(as_value(self.product()), read_unit(kind[-1]))
        if kind in _OPERATORS:
            raise Unsupported(f"{kind} is not worked out")
        return self.structure(kind)

    def name(self, name: str) -> Value:
        if name in ("e", "i") and self.kind != "_":
            return symbol(name)
        if self.skip("_"):
            start = self.at
            index = as_value(self.argument())
            if name == "C" and self.skip("^"):  # C_n^k
                return apply("binomial", index, as_value(self.argument()))
            name += f"_{self.text(start).strip('{}')}"
        return symbol(name)

    def with_base(self, value: Value) -> Value:
        """204_5: a number of its own, equal to nothing else."""
        self.at += 1
        base = self.word()
        return symbol(f"{value.rational} in base {_BASES.get(base, base)}")

    def word(self) -> str:
        """A group or token that is no formula, without its brackets."""
        start = self.at
        is_group = self.skip("{")
        while not (is_group and self.skip("}")):
            if self.kind == "end":
                raise Unreadable("an argument that is missing")
            self.at += 1
            if not is_group:
                break
        return self.text(start).strip("{()}")

    def function(self, name: str) -> Value:
        """sin x, sin^2 x, sin^{-1} x, log_2 x; without brackets the argument is the product up to the next function."""
        power = base = None
        while kind := self.skip("^", "_"):
            if kind == "^":
                power = as_value(self.argument())
            else:
                base = as_value(self.argument())
        if power is not None and power.rational == -1 and f"arc{name}" in FUNCTIONS:
            name, power = f"arc{name}", None
        if self.kind in _BRACKETS:
            argument = as_value(self.base())
        else:
            argument = as_value(self.power())
            while self.kind in _FACTORS - _FUNCTIONS - _BRACKETS - {"|"}:
                argument = argument * as_value(self.power())
        argument = _in_radians(argument)
        if name == "log" and base is not None:
            result = apply("ln", argument) / apply("ln", base)
        else:
            result = apply("lg" if name == "log" else name, argument)
        return result if power is None else result**power


def as_value(thing) -> Value:
    if not isinstance(thing, Value):
        raise Unreadable("arithmetic with what is no number or formula")
    return thing


def with_unit(value: Value, unit: Value) -> Value:
    product = value * unit
    return Value(product.num, product.den, value.digits, value.work)


def _nth_root(value: Value, n: Value) -> Value:
    index = n.rational
    if index is None or index.denominator != 1 or not 2 <= index <= 99:
        raise Unreadable("a root of an odd kind")
    if value.rational is not None and value.rational < 0 and index % 2:
        return -((-value) ** number(1 / index))
    return value ** number(1 / index)


def _in_radians(angle: Value) -> Value:
    bare, unit = angle.split_unit()
    return bare * symbol("pi") / number(180) if unit == frozenset({("unit:°", 1)}) else angle
