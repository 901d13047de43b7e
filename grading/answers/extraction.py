r"""Extraction of the final answer from the text of a completion.

The answer is in the last `\boxed{}`, else after `####`, in `<answer>`, or after "the answer is" or "Answer:".
"""

import re

MAX_BOX_CHARS = 2000  # a box with more content is ignored
MAX_PROSE_CHARS = 1000  # in a longer answer, no prose is removed
MAX_BOXES = 20  # boxes that are joined to a list, as in \boxed{3} and \boxed{4}

_MARKER = re.compile(
    r"(?:\b(?:final|the|correct|my) (?:answer|option|choice)[*_]* (?:is|would be)\b|^[*_# ]{0,9}answer is\b"
    r"|\bans(?:wer)?[*_ ]*[:：=]|\bfinal answer[*_ ]*\n)[\s:*_}]*",
    re.IGNORECASE | re.MULTILINE,
)
_LEAD_IN = re.compile(
    r"(\\[a-z]+\s*\{)?[\s*_]*(?:(?:so|thus|hence|therefore),? )?(?:(?:the|my) )?(?:(?:final|correct) )?answer[\s*_]*(?:is\b|[:：])"
    r"[\s:*_]*(\}\s*)?",
    re.IGNORECASE,
)
_SIMPLE_BOX = re.compile(rf"\\boxed\{{([^{{}}\\]{{0,{MAX_BOX_CHARS}}})\}}")
_BRACE = re.compile(r"\\(?:boxed|fbox)\s*(?:\{|([^\s$\\{}]+))|\\.|[{}]", re.DOTALL)
_BOX_JOIN = re.compile(r"\$?\s*(?:,|,?\s*(?:and|or|\\text\s*\{\s*(?:and|or)\s*\}))\s*\$?\s*(?:[A-Za-z]\w?\s*=\s*)?$")
_SENTENCE_END = re.compile(r"\n|\.\s+(?=[A-Z])|\\n(?![A-Za-z])")  # a line break may be escaped, as in JSON
_MATH = re.compile(r"\s*(?:\$\$(.*?)\$\$|\$(.*?)\$|\\\((.*?)\\\)|\\\[(.*?)\\\])", re.DOTALL)
_MORE_MATH = re.compile(r"\s*(?:,|;|/|,?\s*(?:or|and|to)\b)\s*(?:[$\d(\\-])")
_TAG_AT_END = re.compile(r"(?:\s*(?:</?\w{1,20}>|<\|[^|<>]{1,30}\|>))+$")

# Prose after a number, which does not change it.
_REASON = re.compile(r",?\s+(?:because|since|which|as)\s.*|,\s+(?:so|where|when|making|meaning|given)\s.*", re.DOTALL)
_REMARK = re.compile(
    r"\s+(?:in total|in all|altogether|overall|total)\b.*|\s*\([A-Za-z][^()]*\)"
    r"|(?<=[A-Za-z%])\s+(?:in|for|at|from|on|to|that|every|each|of)\s.*|\n.*",
    re.DOTALL,
)
_BOLD_END = re.compile(r"(?<=\w)\*\*(?=[\s.,]|$)")
_NUMBER_START = re.compile(r"[-+]?\\?[$€£¥₹]?\s?[\d.]")
_AMOUNT = re.compile(rf"{_NUMBER_START.pattern}[\d,.]*\s?\\?%?(?:\s+[A-Za-z]{{2,}}){{0,3}}")  # with a unit
_CHANGES_VALUE = re.compile(
    r"\d|\\|\b(?:or|not|nor|no|but|maybe|perhaps|possibly|plus|minus|times|less|more|than|half|dozen|wrong|false|hundred\w*|"
    r"thousand\w*|million\w*|zero|one|two|three|four|five|six|seven|eight|nine|ten|\w+teen|(?:twen|thir|for|fif|six|seven|eigh|nine)ty)\b",
    re.IGNORECASE,
)


def extract_answer(text: str) -> str | None:
    r"""Return the final answer, or None if the text has none or only an unclosed box.

    The last balanced `\boxed{}` counts, else `#### x`, `<answer>x</answer>`, `the answer is x` or `Answer: x`. Other
    numbers in the text are not considered. Boxes joined by a comma or a word are a list: \boxed{3} and \boxed{4}.
    """
    if "\\boxed" in text or "\\fbox" in text:
        answer = _last_boxes(text)
    elif "####" in text:
        parts = [part.strip() for part in text.split("####")[1:]]
        lines = [_SENTENCE_END.split(part, maxsplit=1)[0].strip() for part in parts]
        answer = _without_remarks(_without_lead_in(next(filter(None, reversed(lines)), "")))
    elif "<answer>" in text:
        before, end_tag, _ = text.rpartition("</answer>")
        answer = before.rpartition("<answer>")[2].strip() if end_tag and "<answer>" in before else None
        answer = answer and _without_remarks(_without_lead_in(answer))
    else:
        answer = _after_marker(text)
    return answer and _without_lead_in(answer)


def _after_marker(text: str) -> str | None:
    """Return the rest of the sentence after the last marker such as "the answer is"; None if there is no marker."""
    *_, marker = [None, *_MARKER.finditer(text)]
    if not marker:
        return None
    if (math := _MATH.match(text, marker.end())) and not _MORE_MATH.match(text, math.end()):
        return next(group for group in math.groups() if group is not None).strip()
    sentence = _SENTENCE_END.split(text[marker.end() :].strip(), maxsplit=1)[0]
    sentence = sentence.strip(" *_:").rstrip(".").strip(' *_"“”')
    return _without_remarks(sentence)


def _without_lead_in(answer: str) -> str:
    r"""Remove "The answer is" from the start of an answer, also in a text command."""
    if ("nswer" not in answer and "NSWER" not in answer) or not (match := _LEAD_IN.match(answer)):
        return answer
    command, end = match.groups()
    rest = answer[match.end() :]
    if command and not end:  # \text{The answer is 5}
        if not rest.endswith("}"):
            return answer
        rest = rest[:-1]
    return rest.strip().rstrip(".") if command or not end else answer


def _without_remarks(answer: str) -> str:
    """Remove prose after a number, such as "in total" or "because ...", unless it may change the number."""
    if len(answer) > MAX_PROSE_CHARS or (" " not in answer and "<" not in answer and "\n" not in answer):
        return answer
    answer = _BOLD_END.sub("", _TAG_AT_END.sub("", answer))
    if not _NUMBER_START.match(answer):
        return answer
    if (reason := _REASON.search(answer)) and _AMOUNT.fullmatch(answer[: reason.start()]):
        return answer[: reason.start()]
    for remark in _REMARK.finditer(answer):
        amount = answer[: remark.start()]
        if _AMOUNT.fullmatch(amount) and not _CHANGES_VALUE.search(remark[0]):
            return amount
    return answer


def _last_boxes(text: str) -> str | None:
    """Return the content of the last box; a list of contents if it is joined to the box before, as in `3 and 4`."""
    content, start = _last_box(text)
    if content is not None and "box" not in text[:start]:
        return content.strip()
    contents = [content]
    while content is not None and start and len(contents) < MAX_BOXES:
        joined = _BOX_JOIN.search(text, max(0, start - 40), start)
        if not joined or text[joined.start() - 1] != "}":
            break
        text = text[: joined.start()]
        content, start = _last_box(text)
        if content is None or not text.endswith(content + "}"):
            break
        contents.append(content)
    if len(contents) == 1:
        return content if contents[0] is None else contents[0].strip()
    return ", ".join(content.strip() for content in reversed(contents))


def _last_box(text: str) -> tuple[str | None, int]:
    r"""Return the content of the last balanced `\boxed{...}`, or of `\boxed 5`, and its start, in one pass."""
    start = text.rfind("\\boxed{")
    simple = _SIMPLE_BOX.match(text, start)
    if simple and "box" not in text[simple.end() :]:
        return simple[1], start
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
    return content, last_start
