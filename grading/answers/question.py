"""Answers that repeat an expression of the question instead of evaluating it, also inside another expression.

Expressions are compared as lists of tokens, without differences of notation: 31^{2} and 31^2, \\frac{1}{2} and 1/2, 2*x
and 2x have the same tokens. An answer may repeat an expression that the gold answer contains. If the question asks for
the value of an expression, such as 115^2, another power, root or function with this whole value repeats it too.
"""

import functools
import itertools
import re
from collections.abc import Iterator

from grading.answers.equality import NotEvaluated, is_same, is_same_text
from grading.answers.equations import split_sides
from grading.answers.exact import Value
from grading.answers.structures import Items, parse
from grading.answers.terms import ONE, ParseError, TooBig
from grading.answers.tokens import WORDS, tidy
from grading.answers.units import CURRENCIES, PERCENT

MAX_QUESTION_CHARS = 20_000  # only the end of a longer question is compared
MAX_NESTING = 40  # braces in an expression; deeper ones are not compared
MAX_PARSED = 60  # expressions that are parsed for one answer

_TOKEN = re.compile(
    r"\d{0,40}\.\d{0,40}\\(?:overline|bar|dot)\s*\{\d+\}"  # a repeating decimal
    r"|\\[A-Za-z]+|\\.|\d+(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+|[A-Za-z]{4,}"
    rf"|(?<![A-Za-z])(?:{'|'.join(WORDS)})(?![A-Za-z])|[A-Za-z]|\S",
    re.ASCII,
)
_SYNONYMS = {r"\times": "*", r"\cdot": "*", r"\ast": "*", r"\div": "/", r"\%": "%", "percent": "%", ";": ","}
_SYNONYMS |= WORDS | {"and": ",", "or": ","}
_EXPRESSION = re.compile(r"\$[^$]{1,200}\$|\\\(.{1,200}?\\\)|(?<![\w.])[(\d][\d+\-*/() ]{1,100}[)\d](?!\w|\.\d)")
_UNIT = re.compile(
    rf"\\text\s*\{{[^{{}}]*\}}(?:\s*\^\s*\{{?[23]\}}?)?|\\?[{CURRENCIES}]|\^\s*\{{?\\circ\s*\}}?|(?<=[\d}} ])[^\W\d_][^\\{{}}]*$"
)
_DIGITS = re.compile(r"[-+]?[\d,. ]+")
_DROPPED = {"$", r"\text", r"\limits"}


@functools.lru_cache(maxsize=8192)
def repeats_question(answer: str, gold: str, question: str) -> bool:
    """Return whether a right answer repeats an expression of the question that is equal to the gold answer.

    Args:
        answer: The final answer, which is equal to the gold answer.
        gold: The gold answer. It is no repetition if the gold answer contains the same expression.
        question: The text of the question.
    """
    answer, gold = tidy(answer), tidy(gold)
    try:
        parsed_gold = parse(gold)
    except (ParseError, TooBig):  # then only its own text is right
        return False
    if is_number_with_unit(answer):
        answer = _UNIT.sub("", answer).strip()
        if _DIGITS.fullmatch(answer):  # it may be in the question too
            return False
    if is_same_text(answer, gold):
        return False
    golds = [parsed_gold, *(parsed_gold.items if isinstance(parsed_gold, Items) else ())]
    sides = [side for _, side in split_sides(answer)]
    equal = [side for side in sides if len(sides) > 1 and _equals_any(side, golds)]
    question_text = _question_text(question)
    if _is_left_to_compute(answer) and not _is_left_to_compute(gold) and _is_to_compute(golds, question):
        return True
    return all(_repeats(side, gold, golds, question_text) for side in equal or [answer])


def is_number_with_unit(answer: str) -> bool:
    """Return whether an answer is a number with a unit other than %."""
    try:
        node = parse(answer)
    except (ParseError, TooBig):
        return False
    return isinstance(node, Value) and not node.pending and node.split_unit()[1] not in (ONE, PERCENT)


def _is_left_to_compute(text: str) -> bool:
    """Return whether a text is a power, root or function that is a whole number, such as 4!."""
    try:
        node = parse(text)
    except (ParseError, TooBig):
        return False
    return isinstance(node, Value) and node.pending > 0 and node.rational is not None and node.rational.denominator == 1


def _is_to_compute(golds: list, question: str) -> bool:
    """Return whether the gold answer is the value of an expression of the question, as in "Compute 115^2"."""
    expressions = (tidy(match[0]) for match in _EXPRESSION.finditer(question[-MAX_QUESTION_CHARS:]))
    return any(
        _is_left_to_compute(text) and _equals_any(text, golds) for text in itertools.islice(expressions, MAX_PARSED)
    )


def has_form_of(answer: str, gold: str) -> bool:
    """Return whether two answers are the same expression up to its notation and the order of its terms."""
    return _has_form(_tokens_of(answer), gold)


def _repeats(answer: str, gold: str, golds: list, question_text: str) -> bool:
    """Return whether an answer, or an expression in it that is equal to the gold, is in the question."""
    tokens = _tokens_of(answer)
    whole = _without_all_brackets(tokens)
    if _joined(whole) in _joined(_without_all_brackets(question_text.split())) and not _has_form(tokens, gold):
        return True
    runs = (run for run in _common_runs(tokens, question_text) if not _has_form(run, gold))
    return any(_equals_any(_expression(run), golds) for run in itertools.islice(runs, MAX_PARSED))


def _common_runs(tokens: list[str], question_text: str) -> Iterator[list[str]]:
    """Yield the balanced runs of an answer's tokens that are in the question, longest first for each start.

    The whole answer also counts if the question contains its tokens in another order, as in 3+4 and 4+3.
    """
    for start in range(len(tokens)):
        end = start
        while end < len(tokens) and _joined(tokens[start : end + 1]) in question_text:
            end += 1
        for stop in range(end, start, -1):
            run = tokens[start:stop]
            is_name = run[1:2] == ["="] and not any(token.isalpha() for token in run[2:])  # x = 2 is a plain number
            if _is_balanced(run) and (len(run) > 1 or run[0][0].isdigit()) and not is_name:
                yield run
    words = [word for word in question_text.split() if word != "+"]
    wanted = _sorted(tokens)
    size = len(wanted)
    if size > 2 and any(
        words[i] in wanted and sorted(words[i : i + size]) == wanted for i in range(len(words) - size + 1)
    ):
        yield tokens


def _has_form(run: list[str], gold: str) -> bool:
    """Return whether the gold answer contains an expression, or is it up to the order of its terms."""
    tokens = _without_all_brackets(_tokens_of(gold))
    value = tokens[tokens.index("=") + 1 :] if "=" in tokens else tokens
    bare = [token for token in _without_all_brackets(run) if token != "%"]
    return _joined(bare) in _joined(tokens) or _sorted(bare) in (_sorted(tokens), _sorted(value))


def _expression(run: list[str]) -> str:
    """Return tokens as a text that can be parsed."""
    text = ""
    for before, token in zip(["", *run], run):
        needs_sign = token[0].isdigit() and (before.isalpha() or before == ")")
        text += " * " * needs_sign + (token if "/" in (before, token) else " " + token)
    return text.strip()


def _equals_any(text: str, golds: list) -> bool:
    """Return whether an expression is equal to one of the parsed gold answers, as far as can be told."""
    try:
        node = parse(text)
        return any(is_same(node, gold) is not False for gold in golds)
    except NotEvaluated:
        return True
    except (ParseError, TooBig):
        return False


# --- tokens


@functools.lru_cache(maxsize=1024)
def _question_text(question: str) -> str:
    return _joined(_tokens_of(question[-MAX_QUESTION_CHARS:]))


def _joined(tokens: list[str]) -> str:
    return f" {' '.join(tokens)} "


@functools.lru_cache(maxsize=1024)
def _tokens_of(text: str) -> list[str]:
    """Return the tokens of a text, in which braces are parentheses and fractions have a slash."""
    tokens = [_SYNONYMS.get(token, token) for token in _TOKEN.findall(tidy(text)) if token not in _DROPPED]
    tokens, _ = _convert([_plain_decimal(token) for token in tokens], 0, 0)
    pairs = zip(tokens, [*tokens[1:], ""])
    tokens = [token for token, following in pairs if token != "*" or following[:1].isdigit()]  # 2*x is 2x
    return _without_brackets(tokens)


def _plain_decimal(token: str) -> str:
    """Return a number without digit groups and zeros at its ends; other tokens are unchanged."""
    if not token[-1].isdigit():
        return token
    whole, _, decimals = token.replace(",", "").partition(".")
    decimals = decimals.rstrip("0")
    return (whole.lstrip("0") or "0") + (f".{decimals}" if decimals else "")


def _convert(tokens: list[str], start: int, depth: int) -> tuple[list[str], int]:
    """Convert groups and fractions, up to the closing brace of a group. Returns the new tokens and the next index."""
    result = []
    i = start
    while i < len(tokens):
        token = tokens[i]
        i += 1
        if token == "}":
            if depth:
                break
        elif token == "{":
            if depth >= MAX_NESTING:
                return result, len(tokens)
            group, i = _convert(tokens, i, depth + 1)
            result += ["(", *group, ")"]
        elif token == r"\frac":
            numerator, i = _argument(tokens, i, depth)
            denominator, i = _argument(tokens, i, depth)
            result += [*numerator, "/", *denominator]
        else:
            result.append(token)
    return result, i


def _argument(tokens: list[str], i: int, depth: int) -> tuple[list[str], int]:
    """Return an argument of \\frac, in brackets if it is a group, and the next index."""
    if i < len(tokens) and tokens[i] == "{" and depth < MAX_NESTING:
        group, i = _convert(tokens, i + 1, depth + 1)
        return ["(", *group, ")"], i
    return tokens[i : i + 1], i + 1


def _without_brackets(tokens: list[str]) -> list[str]:
    """Remove brackets around a single token."""
    result = []
    for token in tokens:
        if token == ")" and len(result) > 1 and result[-2] == "(":
            result[-2:] = [result[-1]]
        else:
            result.append(token)
    return result


def _sorted(tokens: list[str]) -> list[str]:
    """Sort tokens, without plus signs: 2x-6 and -6+2x are equal then."""
    return sorted(token for token in tokens if token != "+")


def _without_all_brackets(tokens: list[str]) -> list[str]:
    return [token for token in tokens if token not in ("(", ")")]


def _is_balanced(run: list[str]) -> bool:
    depth = 0
    for token in run:
        depth += (token in "([") - (token in ")]")
        if depth < 0:
            return False
    return depth == 0
