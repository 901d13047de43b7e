"""Completions of known worth for a row: right ones made from its gold, and wrong ones that must not be paid for.

The self-test and the checks before a run show them to reward functions, `python -m data check` to the graders. How a
reward file wants its answers written is unknown, so the gold is written in several STYLES.
"""

import ast
import contextlib
import copy
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

from grading.answers.math_grader import extract_answer
from grading.base import Completion, prompt_text, row_kind
from grading.sandbox.cases import called_names, parse_tests

THOUGHT = "Let me work this out step by step."
FILLER = "so on and " * 2000
RIGHT, WRONG = "ideal, thinks", "wrong answer"  # names of probes that differ in the answer alone

STYLES = {
    "\\boxed{}": "\\boxed{ANSWER}",
    "```python": "```python\nANSWER\n```",
    "####": "#### ANSWER",
    "<answer>": "<answer>ANSWER</answer>",
    "<reasoning>": "<reasoning>\nTHOUGHT\n</reasoning>\n<answer>\nANSWER\n</answer>\n",
    "plain": "ANSWER",
}
HOSTILE_ANSWERS = {
    "hostile: numbers": ("9^{9^{9^{9^{9}}}}", "99999999!", "9" * 4000),
    "hostile: brackets": ("\\boxed{" * 3000, "(" * 200 + "123456789" + ")" * 200),
}


class Probe(NamedTuple):
    name: str
    text: str
    is_right: bool = False
    is_truncated: bool = False


def completion(row: dict, text: str, is_truncated: bool = False, step: int = 1) -> Completion:
    """A completion that no model wrote; its tokens are its bytes."""
    ids = list(text.encode(errors="replace"))
    return Completion(prompt_text(row["prompt"]), text, row, len(ids), is_truncated, step, ids)


def write(style: str, answer: str, thought: str = "") -> str:
    """An answer as the text of a completion."""
    text = STYLES[style]
    if thought and "THOUGHT" not in text:
        text = "<think>THOUGHT</think>" + text
    return text.replace("THOUGHT", thought).replace("ANSWER", answer)


def answer_styles(row: dict) -> list[str]:
    """The styles in which an answer to a row may be written."""
    return [name for name in STYLES if name != ("\\boxed{}" if row_kind(row) == "code" else "```python")]


def gold_answer(row: dict) -> str | None:
    """The answer of a right completion; of a whole solution, its final answer. None if the row does not say."""
    kind = row_kind(row)
    gold = row.get("solution" if kind in ("code", "countdown") else "answer")
    if gold is None or (not str(gold).strip() and kind != "reasoning_gym"):  # there a word may be reduced to nothing
        return None
    gold = str(gold)
    if kind == "math" and ("####" in gold or "\\boxed{" in gold):
        gold = extract_answer(gold) or gold
    return gold.strip()


# --- the probes of a row


def right_probes(row: dict, style: str) -> list[Probe]:
    """The gold with and without thinking; none without a gold."""
    gold = gold_answer(row)
    if gold is None:
        return []
    return [Probe(RIGHT, write(style, gold, THOUGHT), True), Probe("ideal", write(style, gold), True)]


def wrong_probes(row: dict, style: str) -> Iterator[Probe]:
    """Completions that must get less than the gold; fewer of them without a gold."""
    gold = gold_answer(row)
    if gold:
        wrong, *others = wrong_answers(row)
        ideal = write(style, gold, THOUGHT)
        for answer in (wrong, *others):
            yield Probe(WRONG, write(style, answer, THOUGHT))
        yield Probe("only in the thinking", f"<think>{write(style, gold)}</think>")
        yield Probe("thinking never ends", f"<think>{write(style, gold)}")
        yield Probe("several, the last wrong", "\n".join(write(style, answer) for answer in (gold, wrong, gold, wrong)))
        yield Probe("cut off", ideal[: len(ideal) // 2], is_truncated=True)
        yield Probe("very long", write(style, wrong, FILLER))
    else:
        yield Probe("very long", FILLER)
    if gold != "":
        yield Probe("empty", "")
        yield Probe("tags only", write(style, "", " "))
    yield Probe("no answer", "Let me see. It could be many things, and I am sure that it is one of them.")


def hostile_probes(row: dict, style: str) -> Iterator[Probe]:
    """Wrong completions that attack a grader: programs that end at once, huge numbers, deep brackets, control characters."""
    if row_kind(row) == "code":
        yield Probe("hostile: ends at once", write(style, "import sys\nsys.exit(0)"))
        yield Probe("hostile: equals all", write(style, _returning(row, "Yes()", EQUAL_TO_ALL)))
    else:
        for name, texts in HOSTILE_ANSWERS.items():
            for text in texts:
                yield Probe(name, write(style, text))
    if row_kind(row) == "countdown":  # whose answers are Python expressions
        yield Probe("hostile: numbers", write(style, "9**9**9**9"))
    yield Probe("hostile: characters", "\x00\x1b[2J <answer>?</answer>")


def wrong_answers(row: dict) -> list[str]:
    """Answers of the gold's form that are not right, the most plausible first. The row has a gold."""
    kind = row_kind(row)
    gold = gold_answer(row)
    if kind == "code":
        return [_returning(row, NO_TESTED_VALUE), _returning(row, "None")]
    if kind == "countdown":
        target = row["target"]
        return [str(target), f"{gold} + 1", f"-({gold})", str(row["nums"][0]), f"{gold} = {target + 1}"]
    if numbers := wrong_numbers(gold):
        return numbers
    if kind == "reasoning_gym":  # a text with another letter may be a right answer to a puzzle, too
        return ["another answer"]
    return [*changed_texts(gold), "another answer"]


def wrong_numbers(gold: str) -> list[str]:
    """If the gold is a number: one more, one less (a tenth of a large decimal), the sign flipped, another one.

    Those of the gold's length come first: a reward for short answers cannot tell them from the gold.
    """
    if len(gold) > 100 or not re.fullmatch(r"[+-]?\d[\d,]*(\.\d+|/[1-9]\d*)?", gold):
        return []
    plain = gold.replace(",", "")
    number = Fraction(plain)
    step = 1 if number.denominator == 1 else max(1, abs(number) / 10)
    others = dict.fromkeys([number + step, number - step, -number, 10 * number + 7])
    texts = [str(float(n) if n.denominator > 1 and "." in gold else n) for n in others if n != number]
    return sorted(texts, key=lambda text: abs(len(text) - len(plain)))


def changed_texts(gold: str) -> list[str]:
    """A gold that is no number, with its last letter or number changed."""
    if gold.isalpha():
        return [gold[:-1] + ("b" if gold[-1] != "b" else "c")]
    for last in list(re.finditer(r"\d{1,15}(?!\d)", gold))[-1:]:
        return [gold[: last.start()] + str(int(last[0]) + 1) + gold[last.end() :]]
    return []


# --- wrong programs

NO_TESTED_VALUE = "987654321"  # a constant that no test expects
EQUAL_TO_ALL = """
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
SWAPPED = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Add,
    ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitOr, ast.LShift: ast.RShift,
    ast.RShift: ast.LShift, ast.And: ast.Or, ast.Or: ast.And, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.GtE,
    ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}  # fmt: skip
LOOPING = (ast.While, ast.AugAssign)
OPPOSITES = {"min": "max", "max": "min", "any": "all", "all": "any"}


def _entry_points(row: dict) -> list[str]:
    """The functions that the tests call; none if the program reads standard input."""
    names = {row.get("entry_point")} - {None, ""}
    with contextlib.suppress(ValueError):  # tests of another form, for a grader of the user's own
        names |= called_names(parse_tests(row["tests"], row.get("entry_point"), row.get("setup") or ""))
    return sorted(names)


def _returning(row: dict, value: str, helpers: str = "") -> str:
    """A program whose functions return one value for all arguments, or that prints it."""
    names = _entry_points(row)
    if not names:
        return f"{helpers}print({value})"
    return helpers + "\n".join(f"def {name}(*args, **kwargs):\n    return {value}\n" for name in names)


def mutants(row: dict) -> Iterator[str]:
    """The gold program with one operator swapped or one constant off by one; last, with its result off by one.

    Any of them may make no difference to the tests. Those that may keep a loop from ending come late.
    """
    tree = ast.parse(row["solution"])
    nodes = list(ast.walk(tree))
    steering = [node.test if isinstance(node, ast.While) else node for node in nodes if isinstance(node, LOOPING)]
    loops = {id(node) for top in steering for node in ast.walk(top)}
    places = [place for place, node in enumerate(nodes) if _change(copy.deepcopy(node))]
    places.sort(key=lambda place: id(nodes[place]) in loops)
    for place in places[:MAX_MUTANTS]:
        changed = copy.deepcopy(tree)
        _change(list(ast.walk(changed))[place])
        yield ast.unparse(ast.fix_missing_locations(changed))
    for name in _entry_points(row):
        yield f"{row['solution']}\n{OFF_BY_ONE.format(name=name)}"


def _change(node: ast.AST) -> bool:
    """Change a node in its place; False if there is nothing to change."""
    match node:
        case ast.BinOp() | ast.AugAssign() | ast.BoolOp() if type(node.op) in SWAPPED:
            node.op = SWAPPED[type(node.op)]()
        case ast.Compare():
            node.ops[0] = SWAPPED[type(node.ops[0])]()
        case ast.Constant(value=bool()):
            node.value = not node.value
        case ast.Constant(value=int() | float()):
            node.value += 1
        case ast.UnaryOp(op=ast.USub()):
            node.op = ast.UAdd()
        case ast.Call(func=ast.Name(id=name)) if name in OPPOSITES:
            node.func.id = OPPOSITES[name]
        case _:
            return False
    return True
