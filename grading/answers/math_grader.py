r"""The math grader: extract the final answer of a completion and compare it with the gold answer.

An answer is compared in these steps, and the first conclusive one decides:

1. Plain numbers, compared as exact fractions.
2. The same text, after `tidy` (tokens.py).
3. Formulas, lists, tuples, sets, intervals and matrices, parsed by structures.py and compared by exact arithmetic
   (equality.py, exact.py). If one of the two cannot be parsed, the answer is wrong.
4. math-verify in a worker process that can be killed: only for formulas that agree in floating point but not term by
   term (tan^2 + 1 and sec^2), or if the gold answer has notation that the parser does not evaluate (\sum).

Nothing is ever evaluated as code. Rules:

* The last box counts; boxes joined by a comma or a word are a list.
* A decimal with at least six significant digits may be rounded, with a relative error of at most 1e-6 (absolute for a
  whole number); everything else must be exact. A gold answer may have the rounding errors of floats.
* A unit may be omitted or added, but not changed. 5 % is 0.05, and 5 if the gold answer is at least 1.
* Order matters in tuples, not in lists and sets; duplicates count.
* Variable names before `=` are ignored, and so is `|r-s|` in `|r-s| = 16`.
* Sums, products and quotients of plain numbers must be evaluated: `7+5` and `\lfloor 7+5\rfloor` are wrong for 12. A
  single power, root or function, as in `4!`, may be left.
* An answer must not repeat an expression of the question (question.py), unless the gold answer has this form.
"""

import contextlib
import functools
import math
import re
from fractions import Fraction

from grading.answers.equality import NotEvaluated, is_same, is_same_text
from grading.answers.equations import equal_sides
from grading.answers.exact import Value
from grading.answers.extraction import extract_answer
from grading.answers.question import is_number_with_unit, repeats_question
from grading.answers.structures import Items, Relation, parse
from grading.answers.terms import ParseError, TooBig, Unsupported
from grading.answers.tokens import tidy
from grading.base import Completion, Ungraded, prompt_text, shorten
from grading.sandbox.workers import WorkerError, run_in_worker

MAX_ANSWER_CHARS = 400  # a longer answer is not parsed
MAX_NESTING = 40  # levels of brackets
MAX_DIGITS = 40  # a longer run of digits is not parsed, since arithmetic on it is slow
SYMBOLIC_SECONDS = 3.0  # time limit of math-verify


def grade_math(answer: str, gold, question: str | list[dict] | None = None) -> tuple[float, str]:
    """Grade a math answer. Thread-safe.

    Args:
        answer: The text after the thinking (`Completion.answer`), or a whole completion.
        gold: The right answer as a text or number, or a solution that contains it after `####`, in `\\boxed{}` or after
            "the answer is". A list contains several right answers, each of which counts.
        question: The question (`Completion.prompt`), or a conversation that ends with it. An answer that repeats an
            expression of it, such as 115^2, is wrong, unless the gold answer has this form.

    Returns:
        1.0 if the final answer equals the gold answer, else 0.0; and a reason with the outcome right, wrong, no_answer
        or gave_up (the answer is too large or complex to be parsed, or the comparison took too long).

    Raises:
        ValueError: If the gold answer is empty, nan, infinite or a dict.
        Ungraded: If a formula needs math-verify and no worker process is available.
    """
    golds = _gold_texts(gold) if type(gold) is str else gold_answers(gold)
    if "think>" in answer:
        answer = Completion("", answer, {}).answer
    final_answer = extract_answer(answer)
    if not final_answer:
        problem = "no \\boxed{}, ####, <answer> or 'the answer is'" if final_answer is None else "the answer is empty"
        return 0.0, f"no_answer: {problem}"
    if len(final_answer) > MAX_ANSWER_CHARS and final_answer not in golds:
        return 0.0, f"gave_up: the answer has {len(final_answer)} characters, over {MAX_ANSWER_CHARS}"
    reasons = []
    for text in golds:
        outcome, detail = judge(final_answer, text)
        if outcome == "right":
            if not question or final_answer == text or not _repeats_question(final_answer, text, question):
                return 1.0, outcome
            outcome, detail = "wrong", f"{shorten(final_answer)} repeats the question and is not evaluated"
        reasons.append(f"{outcome}: {detail}")
    return 0.0, reasons[0]


def gold_answers(gold) -> list[str]:
    """Return the right answers of a gold answer as texts: several for a list, else one.

    Raises:
        ValueError: If the gold answer is empty, nan, infinite or a dict.
    """
    if hasattr(gold, "tolist"):  # an array or scalar of numpy or torch
        gold = gold.tolist()
    if isinstance(gold, dict):
        raise ValueError(
            f"the gold answer is a dict with the keys {', '.join(map(str, gold))}, must be a text, a number or a list: "
            "choose one of them, as in columns: {answer: COLUMN.KEY}"
        )
    if isinstance(gold, (list, tuple, set, frozenset)):
        if not gold:
            raise ValueError("the gold answer is an empty list: nothing could be right")
        return [text for item in gold for text in gold_answers(item)]
    if isinstance(gold, float) and not math.isfinite(gold):
        raise ValueError(f"the gold answer is {gold}, which is no number: nothing could be right")
    return _gold_texts("" if gold is None else str(gold))


@functools.lru_cache(maxsize=8192)
def _gold_texts(gold: str) -> list[str]:
    """Return a gold answer without the text around it, in a list. Raises ValueError if it is empty or nan."""
    gold = gold.strip()
    if gold in ("", "nan", "NaN"):
        raise ValueError(f"the gold answer is {gold or 'empty'}: nothing could be right")
    if "####" in gold or "\\boxed" in gold or "<answer>" in gold or "nswer" in gold.lower():
        gold = extract_answer(gold) or gold
    return [gold]


def _repeats_question(answer: str, gold: str, question: str) -> bool:
    """Return whether an answer that is equal to the gold answer copies an expression of the question."""
    if plain_number(answer) is not None and plain_number(gold) is not None:
        return False
    return repeats_question(answer, gold, prompt_text(question))


# --- comparison with the gold answer


@functools.lru_cache(maxsize=8192)
def judge(answer: str, gold: str) -> tuple[str, str]:
    """Compare two final answers. Returns the outcome (right, wrong or gave_up) and an explanation, "" if right."""
    a, g = plain_number(answer), plain_number(gold)
    if a is not None and g is not None and (a == g or "." not in answer + gold):
        return ("right", "") if a == g else ("wrong", f"{shorten(answer)} is not {shorten(gold)}")
    wrong = "wrong", f"{shorten(answer)} is not {shorten(gold)}"
    renamed = "\\in" in answer and _with_parameter_of(gold, answer)
    answer, gold = tidy(answer), tidy(gold)
    if is_same_text(answer, gold):
        return "right", ""
    if problem := refusal_reason(answer):
        return "gave_up", problem
    try:
        verdict = compare(answer, gold)
        if not verdict and _DECIMAL_COMMA.fullmatch(answer) and "." in gold:
            verdict = compare(answer.replace(",", "."), gold)
        if not verdict and renamed:
            verdict = compare(tidy(renamed), gold)
        if verdict is False:
            verdict = _is_same_with_letter_as_unit(answer, gold)
    except TooBig as error:
        return "gave_up", f"{error} is too large to be compared"
    except NotEvaluated:
        return "wrong", f"{shorten(answer)} is not fully evaluated"
    if verdict is None:
        return judge_symbolically(answer, gold)
    return ("right", "") if verdict else wrong


_PARAMETER = re.compile(r"([A-Za-z])\s*\\in\s*(?:\\mathbb\s*)?\{?[ZNQ]")


def _with_parameter_of(gold: str, answer: str) -> str | None:
    """Return an answer such as n\\pi, n \\in Z with k for n if the gold answer has the parameter k; else None."""
    name, gold_name = _PARAMETER.search(answer), _PARAMETER.search(gold)
    if not name or not gold_name or re.search(rf"(?<![A-Za-z]){gold_name[1]}(?![A-Za-z])", answer):
        return None
    return re.sub(rf"(?<![A-Za-z]){name[1]}(?![A-Za-z])", gold_name[1], answer)


_LETTER_AT_END = re.compile(r"(?<=[0-9}])\s*([ghlmsJLNVW])(?=(?:\^\{?[23]\}?)?$)")


def _is_same_with_letter_as_unit(answer: str, gold: str) -> bool | None:
    """Return whether an answer such as 5 m equals the gold answer 5 meters, or the reverse."""
    texts = [_LETTER_AT_END.sub(r"\\text{\1}", text) for text in (answer, gold)]
    return texts != [answer, gold] and all(map(is_number_with_unit, texts)) and compare(*texts)


_DECIMAL_COMMA = re.compile(r"[+-]?(?![0-9]{1,3},[0-9]{3}$)(?=[0-9,]{4})[0-9]+,[0-9]+")  # 1000,99; 1,2 is a list
_PLAIN = re.compile(r"\s*\$?([+-]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,40})(?:\.[0-9]{1,40})?)\.?\s*")


def plain_number(text: str) -> int | Fraction | None:
    """Return the value of a number in digits, such as 1,080 or -3.50 (most answers are); None for any other text."""
    match = _PLAIN.fullmatch(text) if len(text) < 60 else None
    if not match:
        return None
    digits = match[1].replace(",", "")
    return Fraction(digits) if "." in digits else int(digits)  # int is faster


_OPERATOR = re.compile(r"\\(?:sum|prod|int|lim|big)")
_LARGE = re.compile(r"[0-9]{4}|[0-9]\s*\^|!")
_POWER_TOKEN = re.compile(r"\^\s*(?:[{(]|[-+]?\s*(?:\\[A-Za-z]+|\w)?)|\\[A-Za-z]+|\s+|\S")
_DIGIT_RUN = re.compile(rf"[0-9]{{{MAX_DIGITS + 1}}}")


def refusal_reason(text: str) -> str:
    """Return why an answer is too complex to be parsed; "" if it is not."""
    if _DIGIT_RUN.search(text):
        return f"a number of over {MAX_DIGITS} digits"
    if text.count("^") > 2 and _height(text) > 2:
        return "a tower of powers"
    if _OPERATOR.search(text) and _LARGE.search(text):
        return "a sum or product with large bounds"
    depth = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if depth > MAX_NESTING:
            return f"brackets nested over {MAX_NESTING} deep"
    return ""


def _height(text: str) -> int:
    """Return the number of exponents that are nested in each other: 3 in a^{b^{c^d}} and a^b^c^d."""
    heights = []  # for each open group, the height around it and whether it is an exponent
    height = highest = 0  # of the exponents at this position
    chain = 0  # exponents without braces directly before this position
    for token in _POWER_TOKEN.findall(text):
        if token[0] == "^":
            chain += 1
            highest = max(highest, height + chain)
            if token[-1] in "{(":
                heights.append((height, chain))
                height, chain = height + chain, 0
        elif token in "{([":
            heights.append((height, 0))
            chain = 0
        elif token in "})]":
            height, chain = heights.pop() if heights else (0, 0)
        elif chain and not token[-1].isspace():
            chain = 0
    return highest


def compare(answer: str, gold: str) -> bool | None:
    """Parse and compare two tidied answers. Returns None if only the symbolic grader can decide.

    Raises:
        NotEvaluated: If the answer is equal, but leaves a sum or product of plain numbers, or an integral and the like.
        TooBig: If a value is too large to be computed.
    """
    try:
        parsed_gold = _parse_gold(gold)
    except Unsupported:
        parsed_gold = None
    except ParseError:
        sides = equal_sides(gold)
        return compare(answer, sides[0]) if sides else False
    try:
        parsed_answer = parse(answer)
    except Unsupported:
        if parsed_gold is None:
            return None
        if sides := equal_sides(answer):
            return _compare_sides(sides, gold)
        raise NotEvaluated from None
    except ParseError:
        return _compare_sides(equal_sides(answer), gold)
    if parsed_gold is None:
        return None
    verdict = is_same(parsed_answer, parsed_gold)
    if verdict is False and isinstance(parsed_answer, Items) != isinstance(parsed_gold, Items):
        if _GROUP.search(answer + gold):
            with contextlib.suppress(ParseError):
                verdict = is_same(
                    parse(answer, grouping=False), parse(gold, grouping=False)
                )  # is 100,200 a number or a list?
    if verdict is False and isinstance(parsed_answer, Relation) and isinstance(parsed_gold, Value):
        return _compare_sides(equal_sides(answer), gold)
    return verdict


def _compare_sides(sides: list[str], gold: str) -> bool | None:
    """Return whether one of the sides of an equation is equal to the gold answer."""
    verdict = False
    for side in sides:
        verdict = compare(side, gold)
        if verdict:
            break
    return verdict


_GROUP = re.compile(r"[0-9],[0-9]{3}")
_parse_gold = functools.lru_cache(maxsize=1024)(parse)


# --- the symbolic grader


def judge_symbolically(answer: str, gold: str) -> tuple[str, str]:
    """Compare two answers as `judge` does, by math-verify in a worker. Raises Ungraded if no worker is available."""
    try:
        verdict = run_in_worker(
            "grading.answers.math_grader:verify_symbolic",
            answer,
            gold,
            timeout=SYMBOLIC_SECONDS,
            preload=("math_verify",),
        )
    except TimeoutError:
        return "gave_up", f"math-verify took over {SYMBOLIC_SECONDS:g} s"
    except WorkerError as error:  # test whether it is due to this answer
        try:
            run_in_worker(
                "grading.answers.math_grader:verify_symbolic",
                "1",
                "1",
                timeout=SYMBOLIC_SECONDS,
                preload=("math_verify",),
            )
        except (WorkerError, TimeoutError):
            raise Ungraded(f"sandbox_error: math-verify: {error}") from None
        return "gave_up", f"math-verify: {error}"
    return ("right", "") if verdict else ("wrong", f"{shorten(answer)} is not {shorten(gold)}")


def verify_symbolic(answer: str, gold: str) -> bool:
    """Return math-verify's verdict. Call it in a worker: it may not terminate, and its own time limits are off."""
    from math_verify import parse, verify

    answer, gold = (parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (answer, gold))
    return bool(verify(gold, answer, timeout_seconds=None))
