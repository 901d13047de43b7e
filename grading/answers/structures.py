r"""Reading an answer: tidied LaTeX or plain text into what it says.

That is a Value (a number or formula, grading/answers/exact.py), a Region of the real line, or one of the classes here. The
reader is strict: what it does not know raises Unreadable, and text behind a complete answer is never skipped. Work and
recursion are bounded: answers are short and not deeply nested (grading/answers/math_grader.py), and exact.py refuses what is large.
"""

import functools
import re
from dataclasses import dataclass

from grading.answers.exact import ParseError, Unsupported, Value, are_equal, symbol
from grading.answers.formulas import GREEK, FormulaParser, as_value
from grading.answers.regions import REALS, Region, interval, solve
from grading.answers.tokens import CLOSING, OPENING, WORDS, tokenize


@dataclass(frozen=True)
class Text:
    words: str


@dataclass(frozen=True)
class Items:
    kind: str  # list (in any order, with repeats), tuple (in order), set, ratio
    items: tuple


@dataclass(frozen=True)
class Named:
    """`name = value`."""

    name: str
    value: object


@dataclass(frozen=True)
class Relation:
    """`difference op 0`, where op is one of = < <= !=."""

    op: str
    difference: Value


@dataclass(frozen=True)
class Matrix:
    rows: tuple


_EQUALS = ("=", r"\approx")
_RELATIONS = dict.fromkeys(_EQUALS, "=") | {"<": "<", ">": ">", r"\le": "<=", r"\ge": ">=", r"\ne": "!=", r"\in": "in"}
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
    r"(?:_\w|_\{\w+\})?'*(?:\^\{-1\})?(?:\([\w,]+\))?"
    r"|\\angle[A-Z]+|\|[A-Z]{2}\||#words"
)


def parse(text: str, grouping: bool = True):
    """What a tidied text says. grouped: whether 1,080 is one number, or two.

    Raises Unreadable, of which Unsupported is mathematics that is known but not worked out, or TooBig.
    """
    if _SENTENCE.fullmatch(text) and WORDS.keys().isdisjoint(text.split()):
        return _text_or_set(text)
    result = _Parser(tokenize(text, grouping)).items("end")
    if result is None:
        raise ParseError("nothing")
    return result


def _text_or_set(words: str):
    """A text, or what it says of sets."""
    if len(words) == 1:
        return symbol(words)
    return _SETS_AS_TEXT.get(words.lower().removeprefix("the "), Text(words))


class _Parser(FormulaParser):
    def parse_items(self, *closing: str, is_group: bool = False):
        """Things between separators, up to a closing token: the thing where there is one, None where there is none.

        A plus-minus makes two things of the one that it is in, unless that is a group of a larger one.
        """
        found, joints = [], set()
        while not self.accept(*closing):
            if found:
                joint = self.accept(*_SEPARATORS)
                if not joint:
                    raise ParseError(f"{self.kind} behind a complete answer")
                joints.add(self.accept("or", "and") or joint)  # ", and"
            start, self.has_plus_minus = self.position, is_group and self.has_plus_minus
            found.append(self.parse_item())
            if self.has_plus_minus and not is_group:
                self.position, self.plus_minus_sign = start, -1
                found.append(self.parse_item())
                self.plus_minus_sign = 1
        if len(found) < 2:
            return found[0] if found else None
        if len(joints) == 1 and all(isinstance(item, Region) for item in found):
            join = _CONNECTIVES.get(joints.pop())
            result = functools.reduce(join or Region.__and__, found)  # x > 1, x < 3 is "and"
            return result if join or result.pieces else functools.reduce(Region.__or__, found)  # x < 1, x > 3 "or"
        return Items("list", tuple(found))

    def parse_item(self):
        """One thing, or a relation or chain of relations between such."""
        names = []
        while name := self.parse_name_before_equals():
            names.append(name)
        parts, relations = [self.parse_ratio()], []
        while relation := self.accept(*_RELATIONS):
            relations.append(_RELATIONS[relation])
            parts.append(self.parse_ratio())
        if relations == ["in"] and not names and as_value(parts[0]).is_variable() and not isinstance(parts[1], Value):
            return parts[1]
        if set(relations) <= {"="}:
            return _equation(names, parts)
        if names or "in" in relations:
            raise ParseError("a chain of unlike relations")
        return _inequality([as_value(part) for part in parts], relations)

    def parse_name_before_equals(self) -> str | None:
        """What stands before an equals sign where it is a mere name, or (x,y) for several."""
        start, words = self.position, ""
        while self.kind not in (*_EQUALS, "end", *_SEPARATORS[1:]) and self.position - start < 12:
            is_word = self.kind in ("text", "word")
            self.position += 1
            words += "#words" if is_word else self.source(self.position - 1)
        names = words[1:-1].split(",") if words[:1] == "(" and words[-1:] == ")" else [words]
        if self.kind in _EQUALS and all(map(_NAME.fullmatch, names)) and words != "e":
            self.position += 1
            return ",".join(names).translate(_WITHOUT_BRACES)
        self.position = start
        return None

    def parse_ratio(self):
        start, result = self.position, self.parse_set_expression()
        if self.kind != ":" or not isinstance(result, Value):
            return result
        parts = [result]
        while self.accept(":"):
            parts.append(as_value(self.parse_set_expression()))
        if any(kind == "name" for kind, _ in self.tokens[start : self.position]):
            raise ParseError("a ratio or time with letters")
        return Items("ratio", tuple(parts))

    def parse_set_expression(self):
        result = self.parse_sum()
        while operation := self.accept(*_SET_OPERATIONS):
            result = _SET_OPERATIONS[operation](as_region(result), as_region(self.parse_sum()))
        return result

    def parse_structure(self, kind: str):
        """What formulas stand in; its first token has just been read."""
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
        raise ParseError(f"{kind} where an answer should be")

    def parse_bracket(self, opening: str):
        """( or [: one thing, an interval or a tuple."""
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
        raise ParseError("brackets around what is no tuple")

    def parse_set(self):
        r"""\{1, 2\}, or \{x \in R : x > 2\} as the region of its condition."""
        start, depth = self.position, 0
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
        r"""\begin{pmatrix} ... \end{pmatrix} is a Matrix, \begin{cases} a list of its rows."""
        name = self.parse_word()
        is_list = name in ("cases", "aligned", "align", "align*")
        if not is_list and name not in ("matrix", "pmatrix", "bmatrix", "smallmatrix", "array"):
            raise Unsupported(f"{name} is not worked out")
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
                    raise ParseError("a matrix with something between its entries")
        self.parse_word()
        rows = tuple(tuple(row) for row in rows if row)
        return Items("list", sum(rows, ())) if is_list else Matrix(rows)


def _equation(names: list[str], parts: list):
    """x = 5, 2 + 3 = 5 (5, as all sides are equal), y - x = 1."""
    values = [part for part in parts if isinstance(part, Value)]
    while len(parts) == len(values) > 1 and are_equal(values[-2], values[-1]):
        parts, values = values[:-2] + values[-1:], values[:-2] + values[-1:]
    if len(values) == 2 and len(parts) == 2 and not names:
        left, right = values
        if right.is_variable() and not left.variables():
            return Named(min(right.variables()), left)
        if left.variables() or right.variables():
            return Relation("=", left - right)
    if len(parts) != 1:
        raise ParseError("sides that are not equal")
    if len(names) == 1 and "," in names[0]:
        each, tuple_ = names[0].split(","), parts[0]
        if not isinstance(tuple_, Items) or tuple_.kind != "tuple" or len(tuple_.items) != len(each):
            raise ParseError("a tuple of names without as many values")
        return Items("list", tuple(map(Named, each, tuple_.items)))
    named = [Named(name, parts[0]) for name in names]
    return parts[0] if not named else named[0] if len(named) == 1 else Items("list", tuple(named))


def _inequality(parts: list[Value], relations: list[str]):
    """A region where each part is linear in the same variable, else a Relation."""
    steps = []
    for left, op, right in zip(parts, relations, parts[1:]):
        if op[0] == ">":
            left, op, right = right, "<" + op[1:], left
        if op[0] == "<" and (left.key == (-_INFINITY).key or right.key == _INFINITY.key):  # says nothing
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
    if len(steps) != 1 or not names:
        raise ParseError("a chain of inequalities")
    return steps[0]


def as_region(thing) -> Region:
    """A pair in round brackets as an interval, a set of numbers as points. Raises Unreadable for anything else."""
    if isinstance(thing, Region):
        return thing
    if isinstance(thing, Items) and thing.kind == "tuple" and len(thing.items) == 2:
        return interval(thing.items[0], False, thing.items[1], False)
    if isinstance(thing, Items) and thing.kind == "set":
        result = Region(())
        for item in thing.items:
            result |= interval(item, True, item, True)
        return result
    raise ParseError("no set of real numbers")
