r"""Parser of a tidied answer in LaTeX or plain text.

The result of `parse` is a Value (a number or formula, grading/answers/exact.py), a Region (a set of real numbers,
grading/answers/regions.py), or one of the classes below. The parser is strict: unknown syntax and text after a complete
answer raise ParseError. Time and recursion depth are bounded: grading/answers/math_grader.py limits the length and
nesting of answers, and grading/answers/exact.py the size of values.
"""

import functools
import re
from dataclasses import dataclass

from grading.answers.exact import Value, are_equal, symbol
from grading.answers.formulas import GREEK, FormulaParser, as_value
from grading.answers.regions import REALS, Region, interval, solve
from grading.answers.terms import ParseError, Unsupported
from grading.answers.tokens import CLOSING, OPENING, WORDS, tokenize
from grading.answers.units import without_percent


@dataclass(frozen=True)
class Text:
    """Words that are not a formula; compared by is_same_text."""

    words: str


@dataclass(frozen=True)
class Items:
    """A collection of answers."""

    kind: str  # list (unordered, may have duplicates), tuple (ordered), set, ratio
    items: tuple


@dataclass(frozen=True)
class Named:
    """An equation `name = value`, whose value is the answer."""

    name: str
    value: object


@dataclass(frozen=True)
class Relation:
    """A relation `difference op 0`; op is one of = < <= !=."""

    op: str
    difference: Value


@dataclass(frozen=True)
class Matrix:
    """A matrix or vector."""

    rows: tuple  # tuples of entries


EQUALS = ("=", r"\approx")
_RELATIONS = dict.fromkeys(EQUALS, "=") | {"<": "<", ">": ">", r"\le": "<=", r"\ge": ">=", r"\ne": "!=", r"\in": "in"}
_SET_OPERATIONS = {r"\cup": Region.__or__, r"\cap": Region.__and__, r"\setminus": lambda a, b: a & b.complement()}
_CONNECTIVES = dict.fromkeys(("or", r"\lor", r"\vee"), Region.__or__) | dict.fromkeys(("and", r"\land"), Region.__and__)
_SEPARATORS = (",", ";", "\\\\", *_CONNECTIVES)
_WITHOUT_BRACES = str.maketrans("", "", "{}")
_SUCH_THAT = (":", "|")
_INFINITY = symbol("infinity")
_SENTENCE = re.compile(r"[A-Za-z]{2,}(?: [A-Za-z]{2,})+")
_SETS_AS_TEXT = dict.fromkeys(("empty set", "no solution", "no solutions"), Items("set", ()))
_SETS_AS_TEXT |= dict.fromkeys(("all real numbers", "all reals"), REALS)
_NAME = re.compile(  # x, A_1, f(x), \theta, BC, P(A), |AB|, \angle ABC, f^{-1}(x), words
    rf"(?:[A-Za-z]|[A-Z]{{2,3}}|\\(?:{'|'.join(name[1:] for name in sorted(GREEK))}))"
    r"(?:_\w|_\{\w+\})?'*(?:\^\{-1\})?(?:\([\w,]+\)|(?<=^[f-hA-Z])\([^()]+\))?"
    r"|\\angle[A-Z]+|\|[A-Z]{2}\||#words"
)


def parse(text: str, grouping: bool = True):
    """Parse a tidied answer.

    Args:
        text: Output of `tidy`.
        grouping: Whether commas group digits, so that 1,080 is one number, not two.

    Raises:
        ParseError: If the answer cannot be parsed; Unsupported if it contains known notation that is not evaluated.
        TooBig: If a value is too large to be computed.
    """
    if _SENTENCE.fullmatch(text) and WORDS.keys().isdisjoint(text.split()):
        return _text_or_set(text)
    result = _Parser(tokenize(text, grouping)).parse_items("end")
    if result is None:
        raise ParseError("an empty answer")
    return result


def _text_or_set(words: str):
    """Return a single letter as a variable, a phrase such as "no solution" as a set, and other words as Text."""
    if len(words) == 1:
        return symbol(words)
    return _SETS_AS_TEXT.get(words.lower().removeprefix("the "), Text(words))


class _Parser(FormulaParser):
    def parse_items(self, *closing: str, is_group: bool = False):
        """Parse items between separators, up to one of the closing tokens, which is consumed.

        A plus-minus doubles the item that contains it; in a bracket (is_group) it doubles the item around the bracket.

        Returns:
            The item if there is only one, else a list, or a Region if all items are regions; None without items.
        """
        items = []
        separators = set()
        while not self.accept(*closing):
            if items:
                separator = self.accept(*_SEPARATORS)
                if not separator:
                    raise ParseError(f"{self.kind} after a complete answer")
                separators.add(self.accept("or", "and") or separator)  # ", and"
            start = self.position
            self.has_plus_minus = is_group and self.has_plus_minus
            items.append(self.parse_item())
            if self.has_plus_minus and not is_group:
                self.position = start
                self.plus_minus_sign = -1
                items.append(self.parse_item())
                self.plus_minus_sign = 1
        if len(items) < 2:
            return items[0] if items else None
        if len(separators) == 1 and all(isinstance(item, Region) for item in items):
            join = _CONNECTIVES.get(separators.pop())
            result = functools.reduce(join or Region.__and__, items)  # "x > 1, x < 3" means "and"
            return result if join or result.pieces else functools.reduce(Region.__or__, items)  # "x < 1, x > 3": "or"
        return Items("list", tuple(items))

    def parse_item(self):
        """Parse a ratio, set or formula, or a chain of relations between these."""
        names = []
        while name := self.parse_name_before_equals():
            names.append(name)
        parts = [self.parse_ratio()]
        relations = []
        while relation := self.accept(*_RELATIONS):
            relations.append(_RELATIONS[relation])
            parts.append(self.parse_ratio())
        if relations == ["in"] and not names and as_value(parts[0]).is_variable() and not isinstance(parts[1], Value):
            return parts[1]
        if set(relations) <= {"="}:
            return _equation(names, parts)
        if names or "in" in relations:
            raise ParseError("a chain of different relations")
        return _inequality([as_value(part) for part in parts], relations)

    def parse_name_before_equals(self) -> str | None:
        """Consume `name =` or `(x,y) =` and return the names, joined by commas; return None if neither comes next."""
        start = self.position
        words = ""
        while self.kind not in (*EQUALS, "end", *_SEPARATORS[1:]) and self.position - start < 12:
            is_word = self.kind in ("text", "word")
            self.position += 1
            words += "#words" if is_word else self.source(self.position - 1)
        names = words[1:-1].split(",") if words[:1] == "(" and words[-1:] == ")" else [words]
        if self.kind in EQUALS and all(map(_NAME.fullmatch, names)) and words != "e":
            self.position += 1
            return ",".join(names).translate(_WITHOUT_BRACES)
        self.position = start
        return None

    def parse_ratio(self):
        """Parse a ratio such as 2:3, or a set or formula."""
        start = self.position
        result = self.parse_set_expression()
        if self.kind != ":" or not isinstance(result, Value):
            return result
        parts = [result]
        while self.accept(":"):
            parts.append(as_value(self.parse_set_expression()))
        if any(kind == "name" for kind, _ in self.tokens[start : self.position]):
            raise ParseError("a ratio or time with letters")
        return Items("ratio", tuple(parts))

    def parse_set_expression(self):
        """Parse sets joined by set operations, or a formula."""
        result = self.parse_sum()
        while operation := self.accept(*_SET_OPERATIONS):
            result = _SET_OPERATIONS[operation](as_region(result), as_region(self.parse_sum()))
        return result

    def parse_structure(self, kind: str):
        """Parse a structure that is not a formula; its first token has been consumed."""
        if kind in ("text", "word"):
            self.position -= 1
            words = []
            while self.kind in ("text", "word", "name"):
                words.append(self.advance())
            return _text_or_set(" ".join(words))
        if kind == r"\ldots":
            return Text("...")
        if kind == r"\emptyset":
            return Items("set", ())
        if kind == r"\mathbb":
            letter = self.parse_word()
            return REALS if letter == "R" else Text(f"set of numbers {letter}")
        if kind == "{":
            result = self.parse_items("}", is_group=True)
            return Items("set", result.items) if isinstance(result, Items) and result.kind == "list" else result
        if kind in ("(", "["):
            return self.parse_bracket(kind)
        if kind == r"\{":
            return self.parse_set()
        if kind == r"\begin":
            return self.parse_environment()
        raise ParseError(f"expected an answer, not {kind}")

    def parse_bracket(self, opening: str):
        """Parse an interval, a tuple or a single item in brackets; the opening bracket has been consumed."""
        result = self.parse_items(")", "]", is_group=True)
        brackets = opening + self.tokens[self.position - 1][0]
        if isinstance(result, Items) and result.kind == "list":
            if brackets != "()" and len(result.items) == 2:
                low, high = result.items
                return interval(low, brackets[0] == "[", high, brackets[1] == "]")
            if brackets in ("()", "[]"):
                return Items("tuple", result.items)
        elif brackets in ("()", "[]") and result is not None and not isinstance(result, Named):
            return result
        raise ParseError("brackets that enclose neither an interval, a tuple nor a single item")

    def parse_set(self):
        r"""Parse \{1, 2\}, or \{x \in R : x > 2\}, which is the region of its condition."""
        start = self.position
        depth = 0
        while self.kind not in ("end", *_SUCH_THAT) and depth >= 0:
            depth += (self.kind in OPENING) - (self.kind in CLOSING)
            self.position += 1
        if self.kind in _SUCH_THAT and re.fullmatch(r"[A-Za-z](\\in\\mathbb(R|\{R\}))?", self.source(start)):
            self.position += 1
            return as_region(self.parse_items(r"\}"))
        self.position = start
        result = self.parse_items(r"\}")
        if isinstance(result, Items) and result.kind == "list":
            return Items("set", result.items)
        return Items("set", () if result is None else (result,))

    def parse_environment(self):
        r"""Parse \begin{pmatrix} ... \end{pmatrix} as a Matrix, \begin{cases} and the like as a list of the entries."""
        name = self.parse_word()
        is_list = name in ("cases", "aligned", "align", "align*")
        if not is_list and name not in ("matrix", "pmatrix", "bmatrix", "smallmatrix", "array"):
            raise Unsupported(f"{name} is not evaluated")
        if name == "array":
            self.parse_word()
        if is_list:
            self.tokens = [token for token in self.tokens if token[0] != "&"]
        rows = [[]]
        while not self.accept(r"\end"):
            if self.accept("\\\\"):
                rows.append([])
            elif not self.accept("&"):
                rows[-1].append(self.parse_item())
                if self.kind not in ("&", "\\\\", r"\end"):
                    raise ParseError("a matrix entry with text after it")
        self.parse_word()
        rows = tuple(tuple(row) for row in rows if row)
        return Items("list", sum(rows, ())) if is_list else Matrix(rows)


def _equation(names: list[str], parts: list):
    """Interpret x = 5 as Named, 2 + 3 = 5 as its last side (all sides must be equal), and y - x = 1 as a Relation."""
    values = [part for part in parts if isinstance(part, Value)]
    while len(parts) == len(values) > 1 and are_equal(*map(without_percent, values[-2:])):
        simplest = min(values[-2:][::-1], key=lambda value: value.pending)
        parts = values = [*values[:-2], simplest]
    if len(values) == 2 and len(parts) == 2 and not names:
        left, right = values
        if right.is_variable() and not left.variables():
            return Named(min(right.variables()), left)
        if left.variables() or right.variables():
            return Relation("=", left - right)
    if len(parts) != 1:
        raise ParseError("an equation whose sides differ")
    if len(names) == 1 and "," in names[0] and "(" not in names[0]:
        split_names, value = names[0].split(","), parts[0]
        if not isinstance(value, Items) or value.kind != "tuple" or len(value.items) != len(split_names):
            raise ParseError("a tuple of names with another number of values")
        return Items("list", tuple(map(Named, split_names, value.items)))
    results = [Named(name, parts[0]) for name in names]
    return parts[0] if not results else results[0] if len(results) == 1 else Items("list", tuple(results))


def _inequality(parts: list[Value], relations: list[str]):
    """Interpret a chain of inequalities as a Region if all are linear in the same variable; else one as a Relation."""
    steps = []
    for left, op, right in zip(parts, relations, parts[1:]):
        if op[0] == ">":
            left, op, right = right, "<" + op[1:], left
        if op[0] == "<" and (left.key == (-_INFINITY).key or right.key == _INFINITY.key):  # always true
            continue
        if "infinity" in left.atoms() | right.atoms():
            raise ParseError("a relation with infinity")
        steps.append(Relation(op, left - right))
    regions = [solve(step.op, step.difference) for step in steps]
    names = {name for step in steps for name in step.difference.variables()}
    if steps and len(names) == 1 and None not in regions:
        result = REALS
        for region in regions:
            result &= region
        return result
    if not steps or not names:
        raise ParseError("a chain of inequalities")
    return steps[0] if len(steps) == 1 else Items("list", tuple(steps))


def as_region(node) -> Region:
    """Return a pair in parentheses as an open interval, a set of numbers as points. Raises ParseError for others."""
    if isinstance(node, Region):
        return node
    if isinstance(node, Items) and node.kind == "tuple" and len(node.items) == 2:
        return interval(node.items[0], False, node.items[1], False)
    if isinstance(node, Items) and node.kind == "set":
        result = Region(())
        for item in node.items:
            result |= interval(item, True, item, True)
        return result
    raise ParseError("not a set of real numbers")
