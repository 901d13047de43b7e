"""The math grader: find the final answer in a completion and compare it exactly with the gold answer.

Numbers are compared as `fractions.Fraction`, never as floats and never by evaluating text. What it does not read yet
(LaTeX beyond fractions, sets, intervals) is right only where it equals the gold as normalised text.
"""

import re
from fractions import Fraction

from grading.registry import shorten

MAX_ANSWER_CHARS = 400  # a longer answer is refused before anything is parsed
MAX_BOX_CHARS = 2000
MAX_DIGITS = 40  # a longer run of digits is refused: no big-number arithmetic on model text


def grade_math(answer: str, gold: str | int | float) -> tuple[float, str]:
    """1.0 where the final answer in `answer` equals `gold`, else 0.0, with the reason in words.

    `answer` is what stands after the thinking (`Completion.answer`). Decimals count as equal within a relative 1e-6;
    everything else must be exact. Of a gold that is a whole solution (`####` or `\\boxed{}`) its final answer counts.
    Raises ValueError for an empty gold.
    """
    if gold is None or str(gold).strip() == "":
        raise ValueError("the gold answer is empty: nothing could be right")
    gold = str(gold)
    if "####" in gold or "\\boxed{" in gold:  # a whole solution: its final answer is the gold
        gold = extract_answer(gold) or gold
    found = extract_answer(answer)
    if found is None:
        return 0.0, "no answer: no \\boxed{}, no ####, no <answer>, no 'answer is'"
    if len(found) > MAX_ANSWER_CHARS:
        return 0.0, f"the answer has {len(found)} characters, over {MAX_ANSWER_CHARS}"
    if is_equal(found, gold):
        return 1.0, "right"
    return 0.0, f"{shorten(found)} is not {shorten(gold)}"


def extract_answer(text: str) -> str | None:
    r"""The final answer: the last balanced `\boxed{}`, else `#### x`, `<answer>x</answer>`, `the answer is x`.

    Never simply the last number in the text. None where there is none of these.
    """
    boxed = _last_box(text)
    if boxed is not None:
        return boxed.strip()
    if "####" in text:
        return text.rsplit("####", 1)[1].strip().split("\n", 1)[0].strip()
    if "<answer>" in text:
        tail = text.rsplit("<answer>", 1)[1]
        return tail.split("</answer>", 1)[0].strip() if "</answer>" in tail else None
    markers = list(_MARKER.finditer(text))
    if markers:
        return text[markers[-1].end() :].split("\n", 1)[0].strip(" *_:").rstrip(".").strip(" *_")
    return None


_MARKER = re.compile(r"(?:final answer *[:*_]+|(?:final|the) answer is)[ :*_]*", re.IGNORECASE)


def _last_box(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` whose braces balance, in one pass over the text."""
    end = len(text)
    while (start := text.rfind("\\boxed{", 0, end)) >= 0:
        depth = 0
        for i in range(start + len("\\boxed"), min(len(text), start + MAX_BOX_CHARS)):
            depth += {"{": 1, "}": -1}.get(text[i], 0)
            if depth == 0:
                return text[start + len("\\boxed{") : i]
        end = start
        if len(text) - start > MAX_BOX_CHARS * 2:  # unbalanced boxes far from the end: give up, stay linear
            return None
    return None


def is_equal(answer: str, gold: str) -> bool:
    """Whether two answers are the same number, or the same text once spaces and LaTeX dressing are gone.

    A unit in \\text{} behind a number is left aside where only one side has it; two units must be the same.
    """
    (answer, unit), (gold, gold_unit) = split_unit(answer), split_unit(gold)
    if unit and gold_unit and unit != gold_unit:
        return False
    answer, gold = normalise(answer), normalise(gold)
    if answer == gold:
        return answer != ""
    a, b = to_fraction(answer), to_fraction(gold)
    if a is None or b is None:
        return False
    return a == b or ("." in answer and abs(a - b) <= abs(b) / 10**6)


_DRESSING = re.compile(r"\\(?:left|right|displaystyle|,|;|!|:| )|\\?\$|[€£]|\^?\\circ|°")
_TEXT = re.compile(r"\\(?:text|mathrm|mbox|textbf)\{([^{}]*)\}")


def split_unit(text: str) -> tuple[str, str]:
    """An answer and the unit in \\text{} behind it: `12\\text{ cm}` is `12` and `cm`; "" where there is none."""
    text = text.strip().rstrip("$. ")
    *_, last = [None, *_TEXT.finditer(text)]
    if last and last.end() == len(text) and last.start() > 0:
        return text[: last.start()], last[1].strip()
    return text, ""


def normalise(text: str) -> str:
    """Text without the dressing that does not change an answer: dollar signs, spacing commands, \\text{} around words."""
    text = _DRESSING.sub("", text.strip())
    text = re.sub(r"\\[dt]frac", r"\\frac", text).replace("\\%", "%").replace("−", "-")
    text = _TEXT.sub(r"\1", text)  # words that are the answer
    if re.fullmatch(r"[+-]?\d{1,3}(?:(?:,|\{,\})\d{3})+(?:\.\d*)?%?", text.strip()):
        text = text.replace("{,}", "").replace(",", "")  # 1,080 and 1{,}080, but not the pair (1,200)
    text = re.sub(r"(?<=\{)\d{1,3}(?:,\d{3})+(?=\})", lambda m: m[0].replace(",", ""), text)  # \frac{1,080}{7}
    return re.sub(r"\s+", " ", text).strip().rstrip(".").strip()


_NUMBER = r"\d+(?:\.\d+)?|\.\d+"
_PATTERNS = (  # each reads the whole text, after an optional sign
    (re.compile(rf"({_NUMBER})(%?)"), lambda m: Fraction(m[1]) / (100 if m[2] else 1)),
    (re.compile(rf"({_NUMBER})[eE]([+-]?\d{{1,3}})"), lambda m: Fraction(f"{m[1]}e{m[2]}")),
    (re.compile(rf"({_NUMBER}) ?/ ?({_NUMBER})"), lambda m: Fraction(m[1]) / Fraction(m[2])),
    (re.compile(rf"\\frac ?\{{ ?(-?(?:{_NUMBER})) ?\}} ?\{{ ?({_NUMBER}) ?\}}"), lambda m: Fraction(m[1]) / Fraction(m[2])),
    (re.compile(r"\\frac(\d)(\d)"), lambda m: Fraction(m[1]) / Fraction(m[2])),
    (re.compile(r"(\d+) (\d+) ?/ ?(\d+)"), lambda m: int(m[1]) + Fraction(int(m[2]), int(m[3]))),
    (re.compile(r"(\d+) ?\\frac\{(\d+)\}\{(\d+)\}"), lambda m: int(m[1]) + Fraction(int(m[2]), int(m[3]))),
)  # fmt: skip


def to_fraction(text: str) -> Fraction | None:
    r"""A number as an exact Fraction: 17, -3.5, 2/3, \frac{2}{3}, 2 2/3, 15%. None where the text is not a number."""
    if len(text) > MAX_ANSWER_CHARS or re.search(rf"\d{{{MAX_DIGITS + 1},}}", text):
        return None
    sign, body = (-1, text[1:].strip()) if text.startswith("-") else (1, text.removeprefix("+").strip())
    for pattern, value in _PATTERNS:
        if match := pattern.fullmatch(body):
            try:
                return sign * value(match)
            except ZeroDivisionError:
                return None
    return None
