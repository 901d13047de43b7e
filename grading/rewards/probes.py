"""Probes: test completions for a row. Right ones are made from its gold; wrong ones must not be rewarded.

The self-test and the checks before a run score them with the reward functions, `python -m data check` with the graders.
How a reward file expects answers to be formatted is unknown, so the gold is written in several STYLES.
"""

import ast
import contextlib
import copy
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

from grading.answers.extraction import extract_answer
from grading.answers.math_grader import gold_answers
from grading.answers.question import has_form_of
from grading.base import Completion, prompt_text, row_kind
from grading.sandbox.cases import called_names, parse_python, parse_tests

THOUGHT = "Let me work this out step by step."
FILLER = "so on and " * 2000
RIGHT = "gold, with thinking"  # the probes RIGHT and WRONG differ only in the answer
WRONG = "wrong answer"

STYLES = {
    "\\boxed{}": "\\boxed{ANSWER}",
    "```python": "```python\nANSWER\n```",
    "####": "#### ANSWER",
    "<answer>": "<answer>ANSWER</answer>",
    "<reasoning>": "<reasoning>\nTHOUGHT\n</reasoning>\n<answer>\nANSWER\n</answer>\n",
    "Answer:": "Answer: ANSWER",
    "plain": "ANSWER",
}
CLOSING_TAG = (("<", "</"), ("[", "[/"), ("start", "end"), ("begin", "end"), ("START", "END"), ("BEGIN", "END"))
MAX_TAG_PAIRS = 4
HOSTILE_ANSWERS = {
    "hostile: numbers": ("9^{9^{9^{9^{9}}}}", "99999999!", "9" * 4000),
    "hostile: brackets": ("\\boxed{" * 3000, "(" * 200 + "123456789" + ")" * 200),
}


COPY = "copies the question"
WRAPPINGS = (  # each leaves the value of an expression as it is
    "Q", "\\lfloor Q\\rfloor", "\\lceil Q\\rceil", "\\binom{Q}{1}", "\\log_2 2^{Q}", "e^{\\ln(Q)}", "Q+\\sin 0", "\\left|Q\\right|",
    "\\sqrt{(Q)^2}", "\\frac{Q}{1}",
)  # fmt: skip


class Probe(NamedTuple):
    """A test completion that is known to be right or wrong."""

    name: str
    text: str
    is_right: bool = False
    is_truncated: bool = False


def completion(row: dict, text: str, is_truncated: bool = False, step: int = 1) -> Completion:
    """Make a completion from a text. Its bytes serve as token ids."""
    ids = list(text.encode(errors="replace"))
    return Completion(prompt_text(row["prompt"]), text, row, len(ids), is_truncated, step, ids)


def write(style: str, answer: str, thought: str = "") -> str:
    """Format an answer, and optionally a thought, as the text of a completion.

    Args:
        style: A name in STYLES, or a template that contains ANSWER.
    """
    text = STYLES.get(style, style)
    if thought and "THOUGHT" not in text:
        text = "<think>THOUGHT</think>" + text
    parts = {"THOUGHT": thought, "ANSWER": answer}
    return re.sub(r"(?<![\w</\[|])(THOUGHT|ANSWER)(?![\w>\]|])", lambda name: parts[name[0]], text)  # no <ANSWER>


def answer_styles(row: dict) -> list[str]:
    """Return the names of the styles in which an answer to a row may be written."""
    return [name for name in STYLES if name != ("\\boxed{}" if row_kind(row) == "code" else "```python")]


def own_styles(source: str) -> list[str]:
    """Return templates with the tags in the text of a reward file, such as <SOLUTION>ANSWER</SOLUTION>.

    Which pair of tags encloses the answer is unknown, so that each is tried; the others enclose the thought.
    """
    plain = re.sub(r"\\([^\w\s])", r"\1", source)  # a regular expression escapes brackets
    tags = dict.fromkeys(re.findall(r"</?[A-Za-z][\w|-]*>|<\|\w+\|>|\[/?[A-Z_]{2,}\]", plain))
    ends = [(tag, tag.replace(a, b, 1)) for tag in tags for a, b in CLOSING_TAG if a in tag]
    pairs = [(tag, end) for tag, end in ends if end in tags][:MAX_TAG_PAIRS]
    styles = [f"```{name}\nANSWER\n```" for name in dict.fromkeys(re.findall(r"```([a-z]\w*)", plain))]
    for pair in (pair for pair in pairs if pair[0] != "<think>"):
        for gap in ("", "\n"):
            parts = [f"{tag}{gap}THOUGHT{gap}{end}{gap}" for tag, end in pairs if (tag, end) != pair]
            styles.append("".join(parts) + f"{pair[0]}{gap}ANSWER{gap}{pair[1]}")
    return styles


def gold_answer(row: dict) -> str | None:
    """Return the gold answer of a row, or the final answer if the gold is a worked solution; None without a gold."""
    kind = row_kind(row)
    gold = row.get("solution" if kind in ("code", "countdown") else "answer")
    if gold is None or (not str(gold).strip() and kind != "reasoning_gym"):  # a puzzle's answer may be the empty text
        return None
    if kind == "math" and not isinstance(gold, (str, dict)):
        with contextlib.suppress(ValueError):  # preflight.py reports a gold that no answer can equal
            gold = gold_answers(gold)[0]
    gold = str(gold)
    if kind == "math" and ("####" in gold or "\\boxed{" in gold):
        gold = extract_answer(gold) or gold
    return gold.strip()


# --- the probes of a row


def right_probes(row: dict, style: str) -> list[Probe]:
    """Return the gold with and without thinking; an empty list for a row without a gold."""
    gold = gold_answer(row)
    if gold is None:
        return []
    return [Probe(RIGHT, write(style, gold, THOUGHT), True), Probe("gold", write(style, gold), True)]


def wrong_probes(row: dict, style: str) -> Iterator[Probe]:
    """Yield completions that must earn less than the gold; fewer of them for a row without a gold."""
    gold = gold_answer(row)
    if gold:
        wrong, *others = wrong_answers(row)
        right_text = write(style, gold, THOUGHT)
        for answer in (wrong, *others):
            yield Probe(WRONG, write(style, answer, THOUGHT))
        yield Probe("only inside <think>", f"<think>{write(style, gold)}</think>")
        yield Probe("unclosed <think>", f"<think>{write(style, gold)}")
        yield Probe("several, last is wrong", "\n".join(write(style, answer) for answer in (gold, wrong, gold, wrong)))
        yield Probe("truncated", right_text[: len(right_text) // 2], is_truncated=True)
        yield Probe("very long", write(style, wrong, FILLER))
    else:
        yield Probe("very long", FILLER)
    if gold != "":
        yield Probe("empty", "")
        yield Probe("tags only", write(style, "", " "))
    yield Probe("no answer", "Let me see. It could be many things, and I am sure that it is one of them.")


def hostile_probes(row: dict, style: str) -> Iterator[Probe]:
    """Yield wrong completions that attack a grader: early exits, huge numbers, deep brackets, control characters."""
    if row_kind(row) == "code":
        yield Probe("hostile: exits early", write(style, "import sys\nsys.exit(0)"))
        yield Probe("hostile: always equal", write(style, _constant_program(row, "Yes()", ALWAYS_EQUAL)))
    else:
        for name, texts in HOSTILE_ANSWERS.items():
            for text in texts:
                yield Probe(name, write(style, text))
    if row_kind(row) == "countdown":  # its answers are Python expressions
        yield Probe("hostile: numbers", write(style, "9**9**9**9"))
    if row_kind(row) == "reasoning_gym":  # a distance to nan is not above any limit
        yield Probe("hostile: numbers", write(style, "nan"))
    yield Probe("hostile: characters", "\x00\x1b[2J <answer>?</answer>")


def copy_probes(row: dict, style: str) -> Iterator[Probe]:
    """Yield completions that repeat the question instead of answering it, bare and in formulas of the same value."""
    question = prompt_text(row["prompt"]).strip()
    if row_kind(row) == "code":
        if question:
            yield Probe(COPY, write(style, question))
    elif expression := _copied_expression(row, question):
        for wrapping in WRAPPINGS:
            yield Probe(COPY, write(style, wrapping.replace("Q", expression)))


def _copied_expression(row: dict, question: str) -> str:
    """Return the longest expression of a question; one that is equal to the gold if it has none; else the question.

    Returns "" if the expression is the gold answer.
    """
    gold = gold_answer(row) or ""
    if row_kind(row) == "countdown":
        return str(row["target"])
    expressions = [math.strip() for math in _MATH.findall(question)] or _ARITHMETIC.findall(question)
    expressions = [text.rstrip(" =?.,") for text in expressions]
    expressions = [text for text in expressions if _OPERATION.search(text)]
    if not expressions and re.fullmatch(r"-?\d{1,15}", gold):
        expressions = [f"{int(gold) + 1}-1"]
    expression = max(expressions, key=len, default=question)
    return "" if gold and has_form_of(expression, gold) else expression


_MATH = re.compile(r"\$([^$]{1,200})\$")
_ARITHMETIC = re.compile(r"[-(]?\d[\d\s.+\-*/^()×÷]*")
_OPERATION = re.compile(r"[\w)}]\s*[-+*/^×÷]\s*[\w({\\]|\\[A-Za-z]+")


def wrong_answers(row: dict) -> list[str]:
    """Return wrong answers in the form of the gold, the most plausible first. The row must have a gold."""
    kind = row_kind(row)
    gold = gold_answer(row)
    if kind == "code":
        return [_constant_program(row, UNTESTED_VALUE), _constant_program(row, "None")]
    if kind == "countdown":
        target = row["target"]
        return [str(target), f"{gold} + 1", f"-({gold})", str(row["nums"][0]), f"{gold} = {target}1"]
    if numbers := wrong_numbers(gold):
        others = row["answer"] if isinstance(row["answer"], (list, tuple)) else ()  # other right answers
        return [number for number in numbers if number not in map(str, others)] or ["another answer"]
    if kind == "reasoning_gym":  # a text with one letter changed may also solve the puzzle
        return ["another answer"]
    return [*changed_texts(gold), "another answer"]


def wrong_numbers(gold: str) -> list[str]:
    """Return wrong numbers: the gold off by one (large decimals: by a tenth), sign flipped, or with one more digit.

    Numbers as long as the gold come first, because a reward for short answers cannot distinguish them from it. Empty if
    the gold is not a number.
    """
    if len(gold) > 100 or not re.fullmatch(r"[+-]?\d[\d,]*(\.\d+|/[1-9]\d*)?", gold):
        return []
    digits = gold.replace(",", "")
    number = Fraction(digits)
    step = 1 if number.denominator == 1 else max(1, abs(number) / 10)
    others = dict.fromkeys([number + step, number - step, -number, 10 * number + 7])
    texts = [str(float(n) if n.denominator > 1 and "." in gold else n) for n in others if n != number]
    return sorted(texts, key=lambda text: abs(len(text) - len(digits)))


def changed_texts(gold: str) -> list[str]:
    """Return a non-numeric gold with its last letter, or its last number, changed; an empty list if it has neither."""
    if gold.isalpha():
        return [gold[:-1] + ("b" if gold[-1] != "b" else "c")]
    for last in list(re.finditer(r"\d{1,15}(?!\d)", gold))[-1:]:
        return [gold[: last.start()] + str(int(last[0]) + 1) + gold[last.end() :]]
    return []


# --- wrong programs

UNTESTED_VALUE = "987654321"  # a constant that no test expects
ALWAYS_EQUAL = """
class Yes:
    def __eq__(self, other):
        return True
    def __ne__(self, other):
        return False
"""
OFF_BY_ONE = """
{name}_before_ = {name}
def {name}(*args, **kwargs):
    value = {name}_before_(*args, **kwargs)
    if type(value) is bool:
        return not value
    return value + 1 if type(value) in (int, float) else [value]
"""
MAX_MUTANTS = 25
SWAPPED_OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Add,
    ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitOr, ast.LShift: ast.RShift,
    ast.RShift: ast.LShift, ast.And: ast.Or, ast.Or: ast.And, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.GtE,
    ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}  # fmt: skip
LOOP_NODES = (ast.While, ast.AugAssign)  # a change here may make a loop endless
SWAPPED_FUNCTIONS = {"min": "max", "max": "min", "any": "all", "all": "any"}


def _entry_points(row: dict) -> list[str]:
    """Return the names of the functions that the tests call; an empty list if the program reads standard input."""
    names = {row.get("entry_point")} - {None, ""}
    with contextlib.suppress(ValueError):  # the tests may have another form, for a custom grader
        names |= called_names(parse_tests(row["tests"], row.get("entry_point"), row.get("setup") or ""))
    return sorted(names)


def _constant_program(row: dict, value: str, helpers: str = "") -> str:
    """Return a program whose functions always return one value, or that prints this value."""
    names = _entry_points(row)
    if not names:
        return f"{helpers}print({value})"
    return helpers + "\n".join(f"def {name}(*args, **kwargs):\n    return {value}\n" for name in names)


def mutants(row: dict) -> Iterator[str]:
    """Yield the gold program with one operator swapped or one constant off by one, and last with its result off by one.

    A mutant may be equivalent to the gold in every test. Mutants that may cause an endless loop come late.
    """
    tree = parse_python(row["solution"])
    nodes = list(ast.walk(tree))
    loop_parts = [node.test if isinstance(node, ast.While) else node for node in nodes if isinstance(node, LOOP_NODES)]
    loop_ids = {id(node) for top in loop_parts for node in ast.walk(top)}
    indices = [index for index, node in enumerate(nodes) if _mutate(copy.deepcopy(node))]
    indices.sort(key=lambda index: id(nodes[index]) in loop_ids)
    for index in indices[:MAX_MUTANTS]:
        mutant = copy.deepcopy(tree)
        _mutate(list(ast.walk(mutant))[index])
        yield ast.unparse(ast.fix_missing_locations(mutant))
    for name in _entry_points(row):
        yield f"{row['solution']}\n{OFF_BY_ONE.format(name=name)}"


def _mutate(node: ast.AST) -> bool:
    """Mutate a node in place. Return False if there is nothing to mutate."""
    match node:
        case ast.BinOp() | ast.AugAssign() | ast.BoolOp() if type(node.op) in SWAPPED_OPERATORS:
            node.op = SWAPPED_OPERATORS[type(node.op)]()
        case ast.Compare():
            node.ops[0] = SWAPPED_OPERATORS[type(node.ops[0])]()
        case ast.Constant(value=bool()):
            node.value = not node.value
        case ast.Constant(value=int() | float()):
            node.value += 1
        case ast.UnaryOp(op=ast.USub()):
            node.op = ast.UAdd()
        case ast.Call(func=ast.Name(id=name)) if name in SWAPPED_FUNCTIONS:
            node.func.id = SWAPPED_FUNCTIONS[name]
        case _:
            return False
    return True
