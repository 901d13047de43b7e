r"""The math grader: find the final answer in a completion and judge whether it is the gold answer.

In this order: the same text; plain numbers, as exact fractions; what structures.py reads (formulas, lists, tuples, sets,
intervals, matrices), compared by exact arithmetic (grading/answers/exact.py); and only for formulas that agree with the gold in
floating point but not term by term (tan^2 + 1 and sec^2), math-verify in a worker process that can be killed. What
cannot be read is right only as the same text. Nothing is ever evaluated as code.

Policies. The last box counts. A decimal is right where it has six or more significant digits and is within a relative
1e-6 (of a whole number: 1e-6), anything else must be exact. A unit may be left out or added, but not exchanged, and
5 % is 0.05. Order counts in tuples, not in lists and sets; repeats count. Names of variables before `=` do not. Sums and
products of plain numbers are not worked out: `7+5` is no answer where the gold is 12.
"""

import contextlib
import functools
import re
from fractions import Fraction

from grading.answers.equality import NotEvaluated, is_same, is_same_text
from grading.answers.exact import TooBig, ParseError, Unsupported
from grading.answers.structures import Items, parse
from grading.answers.tokens import tidy
from grading.base import Completion, Ungraded, shorten
from grading.sandbox.workers import WorkerError, run_in_worker

MAX_ANSWER_CHARS = 400  # a longer answer is refused before anything is parsed
MAX_BOX_CHARS = 2000
MAX_NESTING = 40
MAX_DIGITS = 40  # a longer run of digits is refused: no big-number arithmetic on model text
SYMBOLIC_SECONDS = 3.0


def grade_math(answer: str, gold: str | int | float) -> tuple[float, str]:
    """1.0 where the final answer in `answer` equals `gold`, else 0.0, with an outcome and its reason.

    `answer` is what stands after the thinking (`Completion.answer`), or a whole completion. Of a gold that is a whole
    solution (`####` or `\\boxed{}`) its final answer counts. Outcomes: right, wrong, no_answer, gave_up (refused, or too
    large or slow to be compared). Raises ValueError for an empty gold, Ungraded where a formula needs math-verify and no
    worker process can be had. Safe to call from any thread.
    """
    if gold is None or str(gold).strip() == "":
        raise ValueError("the gold answer is empty: nothing could be right")
    gold = str(gold)
    if "####" in gold or "\\boxed{" in gold:  # a whole solution: its final answer is the gold
        gold = extract_answer(gold) or gold
    if "think>" in answer:
        answer = Completion("", answer, {}).answer
    found = extract_answer(answer)
    if not found:
        missing = "no \\boxed{}, ####, <answer> or 'the answer is'" if found is None else "the answer is empty"
        return 0.0, f"no_answer: {missing}"
    if len(found) > MAX_ANSWER_CHARS and found != gold.strip():
        return 0.0, f"gave_up: the answer has {len(found)} characters, over {MAX_ANSWER_CHARS}"
    outcome, detail = judge(found, gold)
    return float(outcome == "right"), f"{outcome}: {detail}" if detail else outcome


# --- finding the answer

_MARKER = re.compile(r"(?:final answer *[:*_]+|(?:final|the|correct) answer is)[ :*_]*", re.IGNORECASE)
_SIMPLE_BOX = re.compile(rf"\\boxed\{{([^{{}}\\]{{0,{MAX_BOX_CHARS}}})\}}")
_BRACE = re.compile(r"\\(?:boxed|fbox)\s*(?:\{|([^\s$\\{}]+))|\\.|[{}]", re.DOTALL)
_DECIMAL_COMMA = re.compile(r"[+-]?(?![0-9]{1,3},[0-9]{3}$)(?=[0-9,]{4})[0-9]+,[0-9]+")  # 1000,99; 1,2 is a list
_SENTENCE_END = re.compile(r"\n|\.\s+(?=[A-Z])")
_MATH = re.compile(r"\s*(?:\$\$(.*?)\$\$|\$(.*?)\$|\\\((.*?)\\\)|\\\[(.*?)\\\])", re.DOTALL)


def extract_answer(text: str) -> str | None:
    r"""The final answer: the last balanced `\boxed{}`, else `#### x`, `<answer>x</answer>`, `the answer is x`.

    Never simply the last number in the text, and nothing else where there is a box that never closes. None where there
    is none of these.
    """
    if "\\boxed" in text or "\\fbox" in text:
        return _last_box(text)
    if "####" in text:
        return text.rsplit("####", 1)[1].strip().split("\n", 1)[0].strip()
    if "<answer>" in text:
        before, closed, _ = text.rpartition("</answer>")
        return before.rpartition("<answer>")[2].strip() if closed and "<answer>" in before else None
    *_, marker = [None, *_MARKER.finditer(text)]
    if marker:
        if math := _MATH.match(text, marker.end()):
            return next(group for group in math.groups() if group is not None).strip()
        sentence = _SENTENCE_END.split(text[marker.end() :].strip(), maxsplit=1)[0]
        return sentence.strip(" *_:").rstrip(".").strip(" *_")
    return None


def _last_box(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` whose braces balance, in one pass over the text; also of `\boxed 5`."""
    simple = _SIMPLE_BOX.match(text, text.rfind("\\boxed{"))
    if simple and "box" not in text[simple.end() :]:
        return simple[1].strip()
    found, found_at, opened = (
        None,
        -1,
        [],
    )  # opened: for each open brace, where its box and its content begin, if it is a box
    for match in _BRACE.finditer(text):
        token, bare = match[0], match[1]
        if bare is not None:
            if match.start() > found_at:
                found, found_at = bare, match.start()
        elif token[-1] == "{" and token != "\\{":
            opened.append((match.start(), match.end()) if len(token) > 1 else None)
        elif token == "}" and opened and (box := opened.pop()):
            start, inside = box
            if start > found_at and match.start() - inside <= MAX_BOX_CHARS:
                found, found_at = text[inside : match.start()], start
    return None if found is None else found.strip()


# --- judging it


@functools.lru_cache(maxsize=8192)
def judge(answer: str, gold: str) -> tuple[str, str]:
    """The outcome (right, wrong or gave_up) and why, of two final answers."""
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
        return "wrong", f"{shorten(answer)} is not worked out"
    if verdict is None:
        return judge_symbolically(answer, gold)
    return ("right", "") if verdict else wrong


_PLAIN = re.compile(r"\s*\$?([+-]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,40})(?:\.[0-9]{1,40})?)\.?\s*")


def plain_number(text: str) -> Fraction | None:
    """A number written with digits alone, such as 1,080 or -3.50, as nearly all are; None for anything else."""
    match = _PLAIN.fullmatch(text) if len(text) < 60 else None
    return Fraction(match[1].replace(",", "")) if match else None


_OPERATOR = re.compile(r"\\(?:sum|prod|int|lim|big)")
_LARGE = re.compile(r"[0-9]{4}|[0-9]\s*\^|!")
_TOWER = re.compile(r"\^\s*\{?[^{}^]*\^\s*\{?[^{}^]*\^")
_DIGIT_RUN = re.compile(rf"[0-9]{{{MAX_DIGITS + 1}}}")


def refusal_reason(text: str) -> str:
    """Why an answer is not even parsed; "" where it is."""
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
    """Whether two tidied texts say the same; None where only the symbolic grader can tell."""
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
    if verdict is False and isinstance(parsed_answer, Items) != isinstance(parsed_gold, Items) and _GROUP.search(answer + gold):
        with contextlib.suppress(ParseError):
            verdict = is_same(parse(answer, grouping=False), parse(gold, grouping=False))  # 100,200 beside 100, 200
    return verdict


_GROUP = re.compile(r"[0-9],[0-9]{3}")
_parse_gold = functools.lru_cache(maxsize=1024)(parse)


# --- the symbolic grader, in a worker


def judge_symbolically(answer: str, gold: str) -> tuple[str, str]:
    """Like `judge`, by math-verify in a worker. Raises Ungraded where no worker can be had."""
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
    except WorkerError as error:  # because of this answer, or is there no worker for any?
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
    """math-verify's verdict on two answers. To be called in a worker: it may run for ever, and its own limits are off."""
    from math_verify import parse, verify

    answer, gold = (parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (answer, gold))
    return bool(verify(gold, answer, timeout_seconds=None))
