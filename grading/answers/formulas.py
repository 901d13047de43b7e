r"""Parser of numbers and formulas into exact values: signs, products, powers, roots, functions, units.

Unknown syntax raises ParseError, and no text is ever skipped. Sums, integrals and limits raise Unsupported.
grading/answers/structures.py extends the parser to structures that contain formulas: lists, sets, relations, matrices.
"""

from fractions import Fraction

from grading.answers.exact import EVALUABLE, FUNCTIONS, PLAIN, SYMBOLIC, Value, apply_function, number, symbol
from grading.answers.terms import ParseError, TooBig, Unsupported
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
# Tokens that start a factor of a product without a sign, as in 2x and 2(x+1).
_FACTORS = _BRACKETS | {"name", r"\frac", r"\sqrt", r"\binom", *_DELIMITERS, *_FUNCTIONS, *_CONSTANTS, *GREEK}
_CALLED = {*"fghFGH", r"\phi", r"\varphi", r"\zeta", r"\Gamma"}  # names of functions if a bracket follows
_AS_BRACKETS = str.maketrans("{}", "()")
_MONEY = (r"\$", *CURRENCIES)
_BASES = {word: str(n) for n, word in enumerate("two three four five six seven eight nine ten".split(), 2)}


class FormulaParser:
    """A recursive-descent parser: each `parse_` method parses one rule of the grammar, starting at `position`.

    Rules from sum down to primary return a Value, or any other structure that stands alone instead of a formula.
    """

    def __init__(self, tokens: list[tuple[str, object]]):
        self.tokens = tokens  # (kind, value) pairs, see tokenize
        self.position = 0  # index of the next token
        self.plus_minus_sign = 1  # sign of \pm in this pass, 1 or -1; \mp has the other one
        self.has_plus_minus = False  # whether a \pm or \mp has been parsed
        self.open_bars = 0  # number of absolute values that are not yet closed
        self.depth = 0  # nesting depth of parse_primary

    @property
    def kind(self) -> str:
        """The kind of the next token."""
        return self.tokens[self.position][0]

    def advance(self):
        """Consume the next token and return its value."""
        self.position += 1
        return self.tokens[self.position - 1][1]

    def accept(self, *kinds: str) -> str | None:
        """Consume the next token and return its kind if it is one of these, else return None."""
        kind = self.kind
        if kind not in kinds:
            return None
        self.position += 1
        return kind

    def expect(self, kind: str) -> None:
        """Consume a token of this kind. Raises ParseError if the next token is of another kind."""
        if not self.accept(kind):
            raise ParseError(f"expected {kind}, not {self.kind}")

    def source(self, start: int) -> str:
        """Return the text of the tokens from `start` up to the current position."""
        return "".join(
            str(value.rational) if isinstance(value, Value) else value
            for _, value in self.tokens[start : self.position]
        )

    def source_of(self, count: int) -> str:
        """Return the text of the next tokens."""
        start = self.position
        self.position += count
        text = self.source(start)
        self.position = start
        return text

    def parse_structure(self, kind: str):
        """Parse a structure that is not a formula; its first token has been consumed. Overridden in structures.py."""
        raise ParseError(f"expected a formula, not {kind}")

    def parse_signs(self) -> int:
        """Parse any number of signs and return their product."""
        sign = 1
        while kind := self.accept(*_SIGNS):
            self.has_plus_minus |= kind in _SIGNS[2:]
            sign *= {"+": 1, "-": -1, r"\pm": self.plus_minus_sign, r"\mp": -self.plus_minus_sign}[kind]
        return sign

    def parse_sum(self):
        """Parse products, added or subtracted."""
        start = self.position
        sign = self.parse_signs()
        result = self.parse_product()
        result = result if sign > 0 else -as_value(result)
        while self.kind in _SIGNS:
            sign = self.parse_signs()
            term = as_value(self.parse_product())
            result = _pending(as_value(result) + (term if sign > 0 else -term), result, term)
        kinds = [kind for kind, _ in self.tokens[start : self.position] if kind not in _SIGNS]
        if isinstance(result, Value) and r"\infty" in kinds and len(kinds) > 1:
            raise ParseError("arithmetic with infinity")
        return result

    def parse_product(self):
        """Parse powers, multiplied with or without a sign, or divided."""
        result = self.parse_mixed_number() or self.parse_power()
        while isinstance(result, Value):
            kind = self.kind
            if self.accept(*_TIMES, *_DIVIDE):
                sign = self.parse_signs()
                factor = as_value(self.parse_power())
                factor = factor if sign > 0 else -factor
                result = _product(result, factor) if kind in _TIMES else _quotient_with_unit(result, factor)
            elif kind in _FACTORS and not (kind == "|" and self.open_bars):
                result = _product(result, as_value(self.parse_power()))
            else:
                break
        return result

    def parse_mixed_number(self) -> Value | None:
        r"""Parse a mixed number, 2\frac{1}{2}, which is a sum. Return None for anything else (2\frac{\pi}{2})."""
        start = self.position
        if self.kind != "number" or self.tokens[start + 1][0] != r"\frac":
            return None
        whole = self.advance().rational
        fraction = self.parse_primary()
        if fraction.rational is None or fraction.pending:
            self.position = start
            return None
        if whole.denominator != 1 or not 0 < fraction.rational < 1:
            raise ParseError("neither a mixed number nor a product")
        return self.parse_suffixes(number(whole + fraction.rational))

    def parse_power(self):
        """Parse a primary with its suffixes."""
        return self.parse_suffixes(self.parse_primary())

    def parse_suffixes(self, result):
        """Apply the exponents, factorials, percent signs and units that follow a value. Other results are unchanged."""
        while isinstance(result, Value):
            if self.accept("^"):
                result = (
                    with_unit(result, parse_unit("°"))
                    if self.accept_degree_sign()
                    else _evaluable(result ** as_value(self.parse_argument()))
                )
            elif self.accept("!"):
                if self.kind == "!":
                    raise ParseError("a double factorial")
                result = _evaluable(apply_function("factorial", result))
            elif self.accept("%", r"\%"):
                result = with_unit(result, symbol("unit:%"))
            elif self.kind in ("text", "word", *_MONEY):
                unit = self.advance().removeprefix("\\")
                if self.accept("^"):
                    unit += f"^{as_value(self.parse_argument()).rational}"
                result = with_unit(result, parse_unit(unit))
                if self.kind in ("number", "name", "word"):
                    raise ParseError("text after a unit")
            else:
                break
        return result

    def accept_degree_sign(self) -> bool:
        r"""Consume the \circ of an exponent, as in 90^\circ or 90^{\circ}."""
        if [kind for kind, _ in self.tokens[self.position : self.position + 3]] == ["{", r"\circ", "}"]:
            self.position += 3
            return True
        return self.accept(r"\circ") is not None

    def parse_argument(self):
        """Parse the argument of a command, ^ or _: a group in braces, or a single primary with its sign."""
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
        """Parse a number, a name, a command with its arguments, or a bracket. Raises TooBig if nested too deeply."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise TooBig(f"an expression nested over {MAX_DEPTH} levels deep")
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
            return _quotient(as_value(self.parse_argument()), as_value(self.parse_argument()))
        if kind == r"\binom":
            upper, lower = as_value(self.parse_argument()), as_value(self.parse_argument())
            return _evaluable(apply_function("binomial", upper, lower))
        if kind == r"\sqrt":
            index = number(2)
            if self.accept("["):
                index = as_value(self.parse_sum())
                self.expect("]")
            return _evaluable(_nth_root(as_value(self.parse_argument()), index).left_pending(index.pending))
        if kind in _DELIMITERS:
            self.open_bars += kind == "|"
            inner = as_value(self.parse_sum())
            closing, name = _DELIMITERS[kind]
            self.expect(closing)
            self.open_bars -= kind == "|"
            return apply_function(name, inner if name == "abs" else inner.left_pending(PLAIN))
        if kind in _MONEY:
            return with_unit(as_value(self.parse_product()), parse_unit(kind[-1]))
        if kind in _OPERATORS:
            raise Unsupported(f"{kind} is not evaluated")
        return self.parse_structure(kind)

    def parse_name(self, name: str) -> Value:
        """Return the constant, variable with its index, or binomial coefficient C_n^k after its name was consumed."""
        if name in ("e", "i") and self.kind != "_":
            return symbol(name)
        if name in _CALLED and (call := self.parse_call(name)):
            return call
        if self.accept("_"):
            start = self.position
            index = as_value(self.parse_argument())
            if name == "C" and self.accept("^"):  # C_n^k
                return apply_function("binomial", index, as_value(self.parse_argument()))
            name += f"_{self.source(start).strip('{}')}"
        return symbol(name)

    def parse_call(self, name: str) -> Value | None:
        """Parse the rest of a call such as f(2), f'(x) or f^{-1}(3), which is a variable of its own.

        Returns None for a product, such as h(a+b), and for a variable, such as f.
        """
        start = self.position
        primes = ""
        while self.accept("'"):
            primes += "'"
        if self.source_of(5) == "^{-1}":
            self.position += 5
            primes += "^-1"
        opening = self.position
        if self.kind != "(":
            is_variable = "'" not in primes or "^" in primes
            self.position = start if is_variable else opening
            return None if is_variable else symbol(name + primes)
        self.skip_bracket()
        end = self.position
        inner = self.tokens[opening + 1 : end - 1]
        has_letters = any(kind == "name" or kind in GREEK for kind, _ in inner)
        if name != "f" and not primes and has_letters and (len(inner) > 1 or name in GREEK):
            self.position = start
            return None
        arguments = self.source(opening).translate(_AS_BRACKETS)
        if not any(kind == "," for kind, _ in inner):
            self.position = opening
            value = as_value(self.parse_primary()).rational
            arguments = arguments if value is None or self.position != end else f"({value})"
            self.position = end
        return symbol(name + primes + arguments)

    def skip_bracket(self) -> None:
        """Advance past the bracket that closes the one at this position. Raises ParseError if it is missing."""
        depth = 0
        while True:
            kind, _ = self.tokens[self.position]
            if kind == "end":
                raise ParseError("a missing bracket")
            depth += (kind == "(") - (kind == ")")
            self.position += 1
            if not depth:
                return

    def parse_number_base(self, value: Value) -> Value:
        """Parse the base of 204_5. The number is not converted: it equals only the same digits in the same base."""
        self.position += 1
        base = self.parse_word()
        return symbol(f"{value.rational} in base {_BASES.get(base, base)}")

    def parse_word(self) -> str:
        """Consume a group or token that is not a formula and return its text without brackets."""
        start = self.position
        is_group = self.accept("{")
        while not (is_group and self.accept("}")):
            if self.kind == "end":
                raise ParseError("a missing argument")
            self.position += 1
            if not is_group:
                break
        return self.source(start).strip("{()}")

    def parse_function(self, name: str) -> Value:
        """Parse sin x, sin^2 x, sin^{-1} x, log_2 x. An argument without brackets extends up to the next function."""
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
                argument = _product(argument, as_value(self.parse_power()))
        argument = _in_radians(argument)
        if name == "log" and base is not None:
            result = apply_function("ln", argument) / apply_function("ln", base)
        else:
            result = apply_function("lg" if name == "log" else name, argument)
        return _evaluable(result if power is None else result**power)


def as_value(node) -> Value:
    """Return the node if it is a Value. Raises ParseError if it is a structure, which has no arithmetic."""
    if not isinstance(node, Value):
        raise ParseError("arithmetic with a structure")
    return node


def _evaluable(result: Value) -> Value:
    """Mark the result of a power, root or function, which is left to be computed if it is a rational number."""
    return result if result.rational is None else result.left_pending(EVALUABLE)


def _pending(result: Value, a: Value, b: Value) -> Value:
    """Mark the result of an operation as one that the answer leaves to be computed."""
    is_plain = a.rational is not None and b.rational is not None
    return result.left_pending(PLAIN if is_plain else SYMBOLIC)


def _product(a: Value, b: Value) -> Value:
    result = a * b
    is_zero = not result.num and (a.rational is None or b.rational is None)  # 0x
    return result if is_zero else _pending(result, a, b)


def _quotient(a: Value, b: Value) -> Value:
    """Divide. A fraction of two integers is a number, unless it is an integer, as 12/3 is."""
    result = a / b
    x, y = a.rational, b.rational
    if x is not None and y is not None and x.denominator == y.denominator == 1:
        if y in (1, -1) or result.rational.denominator != 1:
            return result
    return _pending(result, a, b)


def _quotient_with_unit(a: Value, b: Value) -> Value:
    """Divide. A unit after a fraction belongs to all of it: 3/4 miles is 3/4 of a mile."""
    magnitude, unit = b.split_unit() if a.rational is not None and b.rational is None else (b, None)
    return with_unit(_quotient(a, magnitude), Value({unit: Fraction(1)})) if unit else _quotient(a, b)


def with_unit(value: Value, unit: Value) -> Value:
    """Multiply by a unit, keeping the digits and pending operations of the value."""
    product = value * unit
    return Value(product.num, product.den, value.digits, value.pending)


def _nth_root(value: Value, n: Value) -> Value:
    """Return the n-th root; for a negative number and odd n, the real one."""
    index = n.rational
    if index is None or index.denominator != 1 or not 2 <= index <= 99:
        raise ParseError("a root whose index is not a whole number from 2 to 99")
    if value.rational is not None and value.rational < 0 and index % 2:
        return -((-value) ** number(1 / index))
    return value ** number(1 / index)


def _in_radians(angle: Value) -> Value:
    """Convert an angle with the unit degree to radians; other values are unchanged."""
    magnitude, unit = angle.split_unit()
    return magnitude * symbol("pi") / number(180) if unit == frozenset({("unit:°", 1)}) else angle
