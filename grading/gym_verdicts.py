r"""Verdicts of this project for families of reasoning_gym whose `score_answer` cannot be used on model text.

Their `score_answer` evaluates the text as Python (`eval`, `parse_expr`), or gives full marks to a wrong answer: `nan`, an
expression that is not worked out, the right answer with a longer tail. These verdicts only read plain data. A verdict takes
the final answer and the entry of the question, and returns why the answer is wrong, or "" if it is right.

For the families in `CHECKS`, `score_answer` decides, but only on an answer that passes the check first.
"""

import ast
import json
import math
import re
from collections.abc import Callable
from fractions import Fraction

from grading.answers.extraction import extract_answer
from grading.answers.math_grader import grade_math
from grading.base import shorten
from grading.countdown import grade_countdown
from grading.sandbox.cases import parse_python

Verdict = Callable[[str, dict], str]

WRONG = "it is not the right answer"
ROUNDING = 1e-4  # answers are rounded to four decimals
PROBABILITY_ERROR = 0.01  # relative; a tiny probability is not 0
_DECIMAL = re.compile(r"[+-]?(?:\d{1,40}\.?\d{0,40}|\.\d{1,40})(?:[eE][+-]?\d{1,3})?", re.ASCII)
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d*)?", re.ASCII)
_FRACTION = re.compile(r"[+-]?\d{1,40}/\d{1,40}", re.ASCII)


def _number(text: str) -> float:
    """Return the value of a finite decimal number. Raise ValueError for any other text, such as nan."""
    text = text.strip().replace("−", "-")
    if _THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    if not _DECIMAL.fullmatch(text) or not math.isfinite(value := float(text)):
        raise ValueError(f"{shorten(text)} is not a number")
    return value


def _compare(is_right: bool) -> str:
    return "" if is_right else WRONG


# --- text


def same_text(answer: str, entry: dict) -> str:
    """Decide families whose answer is a text with one spelling. The case of letters counts."""
    return _compare(_squeeze(answer) in map(_squeeze, entry["metadata"].get("valid_answers") or [entry["answer"]]))


def same_letters(answer: str, entry: dict) -> str:
    return _compare(_squeeze(answer.lower()) == _squeeze(entry["answer"].lower()))


def same_word(answer: str, entry: dict) -> str:
    return _compare("".join(answer.lower().split()) == "".join(entry["answer"].lower().split()))


def _squeeze(text: str) -> list[list[str]]:
    """Split a text into lines and words, because the width of a space is not part of an answer."""
    return [line.split() for line in text.strip().splitlines()]


def word_sorting(answer: str, entry: dict) -> str:
    return _compare([word.strip() for word in answer.split(",")] == entry["metadata"]["sorted_words"])


# --- numbers


def gsm_symbolic(answer: str, entry: dict) -> str:
    """Let the math grader decide: `score_answer` ignores signs, thousands separators and all numbers but the first."""
    final = extract_answer(answer)
    score, reason = grade_math(f"\\boxed{{{answer if final is None else final}}}", str(entry["answer"]))
    return "" if score == 1 else reason.partition(": ")[2] or WRONG


def coin_flip(answer: str, entry: dict) -> str:
    """Compare a probability, which may be a fraction or rounded. `score_answer` accepts 0 for each 0.2."""
    text = answer.replace(" ", "")
    if _FRACTION.fullmatch(text) and text.partition("/")[2].strip("0"):
        value = float(Fraction(text))
    else:
        value = _number(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    gold = float(Fraction(entry["answer"]))
    return _compare(abs(value - gold) <= min(ROUNDING, PROBABILITY_ERROR * gold))


def complex_arithmetic(answer: str, entry: dict) -> str:
    """Compare a complex number. `score_answer` accepts nan."""
    text = "".join(answer.lower().split()).replace("i", "j").replace("−", "-").replace("*j", "j")
    while text.startswith("(") and text.endswith(")"):
        text = text[1:-1]
    if not re.fullmatch(r"[0-9.+\-ej]{1,80}", text):
        raise ValueError(f"{shorten(answer)} is not a complex number")
    value = complex(text)
    return _compare(math.isfinite(abs(value)) and abs(value - complex(*entry["metadata"]["result"])) <= 1e-9)


def number_format(answer: str, entry: dict) -> str:
    """Compare the number exactly, because the candidates may differ by little."""
    return _compare(math.isclose(_number(answer), entry["metadata"]["solution"], rel_tol=1e-12))


def number_sorting(answer: str, entry: dict) -> str:
    """Compare all numbers exactly. `score_answer` accepts a list of nan, and errors up to 1."""
    items = json.loads(answer.replace("'", '"'))
    if not isinstance(items, list):
        raise ValueError("it is not a list")
    return _compare([_number(str(item)) for item in items] == [float(n) for n in entry["metadata"]["sorted_numbers"]])


def polynomial_equations(answer: str, entry: dict) -> str:
    """Compare all real solutions. `score_answer` skips words, and accepts any text if there are no solutions."""
    golds = sorted(_number(text) for text in entry["answer"].split(",") if text.strip())
    if not golds:
        words = answer.lower().strip(' ".')
        return _compare(words in ("", "none", "no solution", "no solutions", "no real solution", "no real solutions"))
    values = sorted(_number(text) for text in answer.strip(' []()"').split(","))
    is_right = len(values) == len(golds) and all(abs(v - g) <= 1.001 * ROUNDING for v, g in zip(values, golds))
    return _compare(is_right)


def pool_matrix(answer: str, entry: dict) -> str:
    """Compare a matrix to two decimals. `score_answer` accepts errors of 1 %."""
    matrix = [[_number(word) for word in line] for line in _squeeze(answer)]
    golds = entry["metadata"]["solution"]
    if [len(row) for row in matrix] != [len(row) for row in golds]:
        return "it has another shape"
    return _compare(all(abs(v - float(g)) <= 0.005001 for row, gold in zip(matrix, golds) for v, g in zip(row, gold)))


def game_of_life(answer: str, entry: dict) -> str:
    """Compare whole boards. `score_answer` ignores the cells beyond the right ones."""
    return _compare(_json(answer) == json.loads(entry["answer"]))


def _json(text: str):
    """Parse JSON that contains no nan, no infinity and no true or false in place of a number."""

    def refuse(word):
        raise ValueError(f"{word} is not a number")

    if re.search(r"\b(?:true|false)\b", text):
        raise ValueError("true and false are not numbers")
    return json.loads(text, parse_constant=refuse)


# --- arithmetic and polynomials


def arithmetic(answer: str, entry: dict) -> str:
    """Evaluate an expression exactly: it must use each number of the question once and reach the target."""
    metadata = entry["metadata"]
    score, reason = grade_countdown(f"<answer>{answer}</answer>", metadata.get("target", 24), metadata["numbers"])
    return "" if score == 1 else reason.partition(": ")[2]


_FACTOR = r"(?:\d{1,4000}|[A-Za-z](?:\^\d{1,4})?)"
_TERM = rf"{_FACTOR}(?:\*{_FACTOR})*"
_POLYNOMIAL = re.compile(rf"[+-]?{_TERM}(?:[+-]{_TERM})*", re.ASCII)
_POWER = re.compile(r"([A-Za-z])(?:\^(\d+))?", re.ASCII)


def polynomial_multiplication(answer: str, entry: dict) -> str:
    """Compare the terms of an expanded polynomial, in any order."""
    return _compare(_terms(answer) == _terms(entry["answer"]))


def _terms(text: str) -> dict[tuple, int]:
    """Return {((variable, exponent), ...): coefficient} of a polynomial that is worked out.

    Raises:
        ValueError: If the text is not a sum of terms such as `-3*x**2*y`, or has two numbers in a term, a variable twice
            in a term, or two terms with the same powers.
    """
    compact = "".join(text.split()).replace("**", "^")
    if not _POLYNOMIAL.fullmatch(compact):
        raise ValueError(f"{shorten(text)} is not a sum of terms such as -3*x**2*y")
    terms = {}
    for term in re.findall(r"[+-]?[^+-]+", compact):
        factors = term.lstrip("+-").split("*")
        numbers = [int(factor) for factor in factors if factor.isdigit()]
        powers = [(name, int(exponent or 1)) for name, exponent in _POWER.findall(term)]
        key = tuple(sorted(power for power in powers if power[1]))
        if len(numbers) > 1 or len({name for name, _ in powers}) < len(powers) or key in terms:
            raise ValueError(f"{shorten(term)} is not worked out")
        coefficient = numbers[0] if numbers else 1
        terms[key] = -coefficient if term.startswith("-") else coefficient
    return {key: coefficient for key, coefficient in terms.items() if coefficient}


# --- checks before score_answer decides

MAX_FORMULA_CHARS = 600
MAX_FORMULA_NESTING = 20
FUNCTIONS = {
    "exp", "log", "ln", "sqrt", "sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "acot", "sinh", "cosh",
    "tanh", "asinh", "acosh", "atanh", "abs", "Abs", "erf", "Si", "Ci", "Ei",
}  # fmt: skip
CONSTANTS = {"C", "C1", "C_1", "c", "K", "k", "E", "pi"}
_FORMULA = re.compile(r"[A-Za-z0-9_.+\-*/() ]+", re.ASCII)
_OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Pow, ast.USub, ast.UAdd)


def integral(answer: str, entry: dict) -> str:
    """Check that an antiderivative is a formula of numbers, the variable and known functions, and is worked out.

    `score_answer` gives it to sympy, which evaluates any Python expression, and which accepts `Integral(f, x)`.
    """
    text = " ".join(answer.split())
    if len(text) > MAX_FORMULA_CHARS or not _FORMULA.fullmatch(text):
        raise ValueError("it is not a formula of numbers, names, + - * / ** and brackets")
    depth = 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if depth > MAX_FORMULA_NESTING:
            raise ValueError("it has too many brackets")
    tree = parse_python(text, mode="eval").body
    names = {entry["metadata"]["variable"], *CONSTANTS}
    known = FUNCTIONS if "(" in entry["metadata"]["integrand"] else ()  # the antiderivative of a polynomial has none
    functions = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if not isinstance(node.func, ast.Name) or node.func.id not in known or len(node.args) != 1 or node.keywords:
                raise ValueError(f"{shorten(ast.unparse(node.func))} is not a known function of one argument")
            functions.add(node.func)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            if node not in functions and node.id not in names:
                raise ValueError(f"{node.id} is not a name in the question")
        elif isinstance(node, ast.Constant):
            if type(node.value) not in (int, float) or abs(node.value) > 1e12:
                raise ValueError(f"{shorten(repr(node.value))} is not a number")
        elif not isinstance(node, (ast.BinOp, ast.UnaryOp, ast.Call, ast.Load, *_OPERATORS)):
            raise ValueError(f"{type(node).__name__} is not part of a formula")
    return _unfinished(tree)


def _unfinished(tree: ast.expr) -> str:
    """Return which part of a formula is arithmetic that is not worked out; "" if there is none."""
    for node in ast.walk(tree):
        shown = shorten(ast.unparse(node)) if isinstance(node, (ast.BinOp, ast.Call)) else ""
        match node:
            case ast.BinOp(op=ast.Add() | ast.Sub()) if sum(map(_is_number, _summands(node))) > 1:
                return f"{shown} is not worked out"
            case ast.BinOp(op=ast.Mult() | ast.Div()):
                above, below = _factors(node)
                numbers = [[n for n in part if isinstance(n, ast.Constant)] for part in (above, below)]
                bases = [ast.unparse(_base(n)) for n in above + below if not _is_number(n)]
                if max(map(len, numbers)) > 1 or len(set(bases)) < len(bases):
                    return f"{shown} is not worked out"
            case ast.BinOp(op=ast.Pow()) if _is_number(node.left) and _is_number(node.right):
                return f"{shown} is not worked out"
            case ast.BinOp(op=ast.Pow()) if not _is_number(node.right) and _names(node.left) - CONSTANTS:
                return f"{shown} has an exponent that is not a number"
            case ast.Call() if any(isinstance(n, ast.Call) and _is_number(n) for a in node.args for n in ast.walk(a)):
                return f"{shown} is not worked out"
    return ""


def _is_number(node: ast.expr) -> bool:
    return not _names(node)


def _names(node: ast.expr) -> set[str]:
    """Return the names in a formula without those of functions."""
    functions = {n.func for n in ast.walk(node) if isinstance(n, ast.Call)}
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and n not in functions}


def _summands(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub)):
        return [*_summands(node.left), *_summands(node.right)]
    return _summands(node.operand) if isinstance(node, ast.UnaryOp) else [node]


def _factors(node: ast.expr) -> tuple[list[ast.expr], list[ast.expr]]:
    """Return the factors above and below the fraction bar of a product."""
    if isinstance(node, ast.UnaryOp):
        return _factors(node.operand)
    if not isinstance(node, ast.BinOp) or not isinstance(node.op, (ast.Mult, ast.Div)):
        return [node], []
    above, below = _factors(node.left)
    right_above, right_below = _factors(node.right)
    if isinstance(node.op, ast.Div):
        right_above, right_below = right_below, right_above
    return above + right_above, below + right_below


def _base(node: ast.expr) -> ast.expr:
    return node.left if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow) else node


_INTEGER = r"\s*[+-]?\d+\s*"


def only(form: str) -> Verdict:
    """Return a check that the whole answer has a form, for families whose `score_answer` skips everything else."""
    pattern = re.compile(form, re.ASCII)
    return lambda answer, entry: "" if pattern.fullmatch(answer) else "it contains more than the answer"


def palindrome_partitioning(answer: str, entry: dict) -> str:
    """Check that the partitions are lists, because a text counts as the list of its letters in `score_answer`."""
    partitions = json.loads(answer)
    is_list = isinstance(partitions, list) and all(isinstance(partition, list) for partition in partitions)
    return "" if is_list else "it is not a list of lists"


def sokoban(answer: str, entry: dict) -> str:
    """Check that the moves are few, because a long random walk solves small puzzles."""
    if not re.fullmatch(r"[LRUD\s]*", answer):
        return "it contains more than the moves L, R, U and D"
    return _few_moves(len("".join(answer.split())), 2 * len(entry["answer"] or ""))


def rush_hour(answer: str, entry: dict) -> str:
    """Check that the moves are few and short, because `score_answer` skips those that are not possible."""
    if re.search(r"\d\d", answer):
        return "it moves a car by more than 9 squares"
    return _few_moves(len(re.findall(r"[A-Z][+-]\d+", answer)), 5 * entry["metadata"]["min_moves"])


def _few_moves(num_moves: int, limit: int) -> str:
    return f"it has {num_moves} moves, over {max(limit, 20)}" if num_moves > max(limit, 20) else ""


VERDICTS: dict[str, Verdict] = {
    "binary_matrix": same_text,
    "coin_flip": coin_flip,
    "complex_arithmetic": complex_arithmetic,
    "countdown": arithmetic,
    "figlet_font": same_word,
    "game_of_life": game_of_life,
    "gsm_symbolic": gsm_symbolic,
    "letter_jumble": same_letters,
    "n_queens": same_text,
    "number_format": number_format,
    "number_sorting": number_sorting,
    "polynomial_equations": polynomial_equations,
    "polynomial_multiplication": polynomial_multiplication,
    "pool_matrix": pool_matrix,
    "puzzle24": arithmetic,
    "spell_backward": same_letters,
    "spiral_matrix": same_text,
    "string_insertion": same_text,
    "word_sorting": word_sorting,
}
CHECKS: dict[str, Verdict] = {
    "advanced_geometry": only(r"[^,]*(?:,[^,]*)?"),
    "fraction_simplification": only(
        rf"\$*(?:{_INTEGER}/{_INTEGER}|\s*\\[dt]?frac\s*{{{_INTEGER}}}\s*{{{_INTEGER}}}\s*)\$*"
    ),
    "intermediate_integration": integral,
    "kakurasu": only(r"[01\s,;|\[\]]*"),
    "palindrome_partitioning": palindrome_partitioning,
    "quantum_lock": only(r"[A-Ca-c\s,→>\[\]()'\"-]*"),
    "rush_hour": rush_hour,
    "simple_integration": integral,
    "sokoban": sokoban,
    "survo": only(r"[\d\s,;|\[\]-]*"),
    "time_intervals": only(rf"{_INTEGER}(?:days?)?|(?:{_INTEGER}days?,\s*)?\d+:\d\d(?::\d\d(?:\.\d+)?)?"),
}
REFUSED = {
    "game_of_life_halting": "its score_answer accepts nonsense, because every text counts as True",
    "propositional_logic": "its score_answer accepts a premise copied from the question as the conclusion",
}
