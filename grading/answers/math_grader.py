r"""The math grader: extract the final answer of a completion and compare it with the gold answer.

An answer is compared in these steps, and the first conclusive one decides:

1. Plain numbers, compared as exact fractions.
2. The same text, after `tidy` (tokens.py).
3. Formulas, lists, tuples, sets, intervals and matrices, parsed by structures.py and compared by exact arithmetic
   (equality.py, exact.py). If one of the two cannot be parsed, the answer is wrong.
4. math-verify in a worker process that can be killed: only for formulas that agree in floating point but not term by
   term (tan^2 + 1 and sec^2), or if the gold answer has notation that the parser does not evaluate (\sum).

Nothing is ever evaluated as code. Rules: The last box counts. A decimal with at least six significant digits may have a
relative error of at most 1e-6 (absolute for a whole number); everything else must be exact. A unit may be omitted or
added, but not changed; 5 % is 0.05. Order matters in tuples, not in lists and sets; duplicates count. Variable names
before `=` are ignored. Sums and products of plain numbers must be evaluated: `7+5` is wrong for 12.
"""

import contextlib
import functools
import re
from fractions import Fraction

from grading.answers.equality import NotEvaluated, is_same, is_same_text
from grading.answers.exact import ParseError, TooBig, Unsupported
from grading.answers.structures import Items, parse
from grading.answers.tokens import tidy
from grading.base import Completion, Ungraded, shorten
from grading.sandbox.workers import WorkerError, run_in_worker

MAX_ANSWER_CHARS = 400  # a longer answer is not parsed
MAX_BOX_CHARS = 2000  # a box with more content is ignored
MAX_NESTING = 40  # levels of brackets
MAX_DIGITS = 40  # a longer run of digits is not parsed, since arithmetic on it is slow
SYMBOLIC_SECONDS = 3.0  # time limit of math-verify


def grade_math(answer: str, gold: str | int | float) -> tuple[float, str]:
    """Grade a math answer. Thread-safe.

    Args:
        answer: The text after the thinking (`Completion.answer`), or a whole completion.
        gold: The right answer, or a whole solution that contains it after `####` or in `\\boxed{}`.

    Returns:
        1.0 if the final answer equals the gold answer, else 0.0; and a reason with the outcome right, wrong, no_answer
        or gave_up (the answer is too large or complex to be parsed, or the comparison took too long).

    Raises:
        ValueError: If the gold answer is empty.
        Ungraded: If a formula needs math-verify and no worker process is available.
    """
    if gold is None or str(gold).strip() == "":
        raise ValueError("the gold answer is empty: nothing could be right")
    gold = str(gold)
    if "####" in gold or "\\boxed{" in gold:  # a whole solution
        gold = extract_answer(gold) or gold
    if "think>" in answer:
        answer = Completion("", answer, {}).answer
    final_answer = extract_answer(answer)
    if not final_answer:
        problem = "no \\boxed{}, ####, <answer> or 'the answer is'" if final_answer is None else "the answer is empty"
        return 0.0, f"no_answer: {problem}"
    if len(final_answer) > MAX_ANSWER_CHARS and final_answer != gold.strip():
        return 0.0, f"gave_up: the answer has {len(final_answer)} characters, over {MAX_ANSWER_CHARS}"
    outcome, detail = judge(final_answer, gold)
    return float(outcome == "right"), f"{outcome}: {detail}" if detail else outcome


# --- extraction of the answer

_MARKER = re.compile(r"(?:final answer *[:*_]+|(?:final|the|correct) answer is)[ :*_]*", re.IGNORECASE)
_SIMPLE_BOX = re.compile(rf"\\boxed\{{([^{{}}\\]{{0,{MAX_BOX_CHARS}}})\}}")
_BRACE = re.compile(r"\\(?:boxed|fbox)\s*(?:\{|([^\s$\\{}]+))|\\.|[{}]", re.DOTALL)
_DECIMAL_COMMA = re.compile(r"[+-]?(?![0-9]{1,3},[0-9]{3}$)(?=[0-9,]{4})[0-9]+,[0-9]+")  # 1000,99; 1,2 is a list
_SENTENCE_END = re.compile(r"\n|\.\s+(?=[A-Z])")
_MATH = re.compile(r"\s*(?:\$\$(.*?)\$\$|\$(.*?)\$|\\\((.*?)\\\)|\\\[(.*?)\\\])", re.DOTALL)


def extract_answer(text: str) -> str | None:
    r"""Return the final answer: the last balanced `\boxed{}`, else `#### x`, `<answer>x</answer>` or `the answer is x`.

    Returns None if there is none of these, or only an unclosed box: other numbers in the text are not considered.
    """
    if "\\boxed" in text or "\\fbox" in text:
        return _last_box(text)
    if "####" in text:
        return text.rsplit("####", 1)[1].strip().split("\n", 1)[0].strip()
    if "<answer>" in text:
        before, end_tag, _ = text.rpartition("</answer>")
        return before.rpartition("<answer>")[2].strip() if end_tag and "<answer>" in before else None
    *_, marker = [None, *_MARKER.finditer(text)]
    if marker:
        if math := _MATH.match(text, marker.end()):
            return next(group for group in math.groups() if group is not None).strip()
        sentence = _SENTENCE_END.split(text[marker.end() :].strip(), maxsplit=1)[0]
        return sentence.strip(" *_:").rstrip(".").strip(" *_")
    return None


def _last_box(text: str) -> str | None:
    r"""Return the content of the last balanced `\boxed{...}`, or of `\boxed 5`, in one pass over the text."""
    simple = _SIMPLE_BOX.match(text, text.rfind("\\boxed{"))
    if simple and "box" not in text[simple.end() :]:
        return simple[1].strip()
    content = None
    last_start = -1  # start of the box with this content
    open_braces = []  # for each one, the start of its box and of the content, or None if it is not a box
    for match in _BRACE.finditer(text):
        token, bare = match[0], match[1]
        if bare is not None:
            if match.start() > last_start:
                content, last_start = bare, match.start()
        elif token[-1] == "{" and token != "\\{":
            open_braces.append((match.start(), match.end()) if len(token) > 1 else None)
        elif token == "}" and open_braces and (box := open_braces.pop()):
            start, inside = box
            if start > last_start and match.start() - inside <= MAX_BOX_CHARS:
                content, last_start = text[inside : match.start()], start
    return None if content is None else content.strip()


# --- comparison with the gold answer


@functools.lru_cache(maxsize=8192)
def judge(answer: str, gold: str) -> tuple[str, str]:
    """Compare two final answers. Returns the outcome (right, wrong or gave_up) and an explanation, "" if right."""
    a, g = plain_number(answer), plain_number(gold)
    if a is not None and g is not None and (a == g or "." not in answer + gold):
        return ("right", "") if a == g else ("wrong", f"{shorten(answer)} is not {shorten(gold)}")
    wrong = "wrong", f"{shorten(answer)} is not {shorten(gold)}"
    answer, gold = tidy(answer), tidy(gold)
    if is_same_text(answer, gold):
        return "right", ""
    if problem := refusal_reason(answer):
        return "gave_up", problem
    try:
        verdict = compare(answer, gold)
        if not verdict and _DECIMAL_COMMA.fullmatch(answer) and "." in gold:
            verdict = compare(answer.replace(",", "."), gold)
    except TooBig as error:
        return "gave_up", f"{error} is too large to be compared"
    except NotEvaluated:
        return "wrong", f"{shorten(answer)} is not fully evaluated"
    if verdict is None:
        return judge_symbolically(answer, gold)
    return ("right", "") if verdict else wrong


_PLAIN = re.compile(r"\s*\$?([+-]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,40})(?:\.[0-9]{1,40})?)\.?\s*")


def plain_number(text: str) -> Fraction | None:
    """Return the value of a number in digits, such as 1,080 or -3.50 (most answers are); None for any other text."""
    match = _PLAIN.fullmatch(text) if len(text) < 60 else None
    return Fraction(match[1].replace(",", "")) if match else None


_OPERATOR = re.compile(r"\\(?:sum|prod|int|lim|big)")
_LARGE = re.compile(r"[0-9]{4}|[0-9]\s*\^|!")
_TOWER = re.compile(r"\^\s*\{?[^{}^]*\^\s*\{?[^{}^]*\^")
_DIGIT_RUN = re.compile(rf"[0-9]{{{MAX_DIGITS + 1}}}")


def refusal_reason(text: str) -> str:
    """Return why an answer is too complex to be parsed; "" if it is not."""
    if _DIGIT_RUN.search(text):
        return f"a number of over {MAX_DIGITS} digits"
    if _TOWER.search(text):
        return "a tower of powers"
    if _OPERATOR.search(text) and _LARGE.search(text):
        return "a sum or product with large bounds"
    depth = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if depth > MAX_NESTING:
            return f"brackets nested over {MAX_NESTING} deep"
    return ""


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
        return False
    try:
        parsed_answer = parse(answer)
    except Unsupported:
        if parsed_gold is None:
            return None
        raise NotEvaluated from None
    except ParseError:
        return False
    if parsed_gold is None:
        return None
    verdict = is_same(parsed_answer, parsed_gold)
    if (
        verdict is False
        and isinstance(parsed_answer, Items) != isinstance(parsed_gold, Items)
        and _GROUP.search(answer + gold)
    ):
        with contextlib.suppress(ParseError):
            verdict = is_same(
                parse(answer, grouping=False), parse(gold, grouping=False)
            )  # is 100,200 a number or a list?
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
