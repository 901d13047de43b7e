"""Completions of known worth for a row: its gold put as a good completion would put it, and what must not be paid for.

The checks before a run and the self-test (tools/self_test.py) show them to the reward functions. How a file wants its
answers written is not known, so the gold is put in several STYLES.
"""

import contextlib
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import NamedTuple

from grading.base import Completion, prompt_text, row_kind
from grading.sandbox.cases import called_names, parse_tests

THOUGHT = "Let me work this out step by step."
FILLER = "so on and " * 2000

STYLES: dict[str, Callable[[str, str], str]] = {  # (the thinking, the answer) -> the completion
    "\\boxed{}": lambda thought, answer: f"{_think(thought)}\\boxed{{{answer}}}",
    "```python": lambda thought, answer: f"{_think(thought)}```python\n{answer}\n```",
    "####": lambda thought, answer: f"{_think(thought)}#### {answer}",
    "<answer>": lambda thought, answer: f"{_think(thought)}<answer>{answer}</answer>",
    "<reasoning>": lambda thought, answer: f"<reasoning>\n{thought}\n</reasoning>\n<answer>\n{answer}\n</answer>\n",
    "plain": lambda thought, answer: f"{_think(thought)}{answer}",
}


class Probe(NamedTuple):
    name: str
    text: str
    is_right: bool = False
    is_truncated: bool = False


def _think(thought: str) -> str:
    return f"<think>{thought}</think>" if thought else ""


def completion(row: dict, text: str, is_truncated: bool = False, step: int = 1) -> Completion:
    """A completion that no model wrote; its tokens are its bytes."""
    ids = list(text.encode(errors="replace"))
    return Completion(prompt_text(row["prompt"]), text, row, len(ids), is_truncated, step, ids)


def styles_of(row: dict) -> list[str]:
    """The styles in which an answer to a row may be written."""
    return [name for name in STYLES if name != ("\\boxed{}" if row_kind(row) == "code" else "```python")]


def gold_of(row: dict) -> str | None:
    """What stands in the place of the answer in a right completion; None where the row does not say."""
    is_worked_out = row_kind(row) in ("code", "countdown")
    gold = row.get("solution" if is_worked_out else "answer")
    if gold is None or not str(gold).strip():
        return None
    gold = str(gold)
    for marker in () if is_worked_out else ("####", "\\boxed{"):
        if marker in gold:  # a whole solution: its final answer
            gold = gold.rpartition(marker)[2].strip().removesuffix("}")
    return gold.strip()


def wrong_answer(row: dict) -> str:
    """An answer of the same form that is not right: another number, a program that returns something else."""
    gold = gold_of(row) or ""
    if row_kind(row) == "code":
        return _wrong_program(row)
    if row_kind(row) == "countdown":
        return str(row.get("target"))  # the target itself, made of none of the numbers
    with contextlib.suppress(ValueError, ZeroDivisionError):
        return str(Fraction(gold.replace(",", "")) + 1)
    return "another answer"


def _wrong_program(row: dict) -> str:
    names = {row.get("entry_point")} - {None, ""}
    with contextlib.suppress(ValueError):  # tests of another form, for a grader of the person's own
        names |= called_names(parse_tests(row["tests"], row.get("entry_point"), row.get("setup") or ""))
    return "\n".join(f"def {name}(*args, **kwargs):\n    return 'wrong'" for name in sorted(names)) or "print('wrong')"


def ideals(row: dict, style: str) -> list[Probe]:
    """The gold in a style, with and without thinking; none where there is no gold."""
    gold = gold_of(row)
    if gold is None:
        return []
    return [Probe("ideal, thinks", STYLES[style](THOUGHT, gold), True), Probe("ideal", STYLES[style]("", gold), True)]


def wrongs(row: dict, style: str) -> Iterator[Probe]:
    """What must get less than the gold; of a row without a gold, what can be said all the same."""
    put, gold = STYLES[style], gold_of(row)
    if gold is not None:
        wrong = wrong_answer(row)
        ideal = put(THOUGHT, gold)
        yield Probe("wrong answer", put(THOUGHT, wrong))
        yield Probe("only in the thinking", f"<think>{put('', gold)}</think>")
        yield Probe("thinking never ends", f"<think>{put('', gold)}")
        yield Probe("several, the last wrong", "\n".join(put("", answer) for answer in (gold, wrong, gold, wrong)))
        yield Probe("cut off", ideal[: len(ideal) // 2], is_truncated=True)
        yield Probe("very long", put(FILLER, wrong))
    else:
        yield Probe("very long", FILLER)
    yield Probe("empty", "")
    yield Probe("tags only", put(" ", ""))
    if row_kind(row) == "code":
        yield Probe("hostile: ends at once", put("", "import sys\nsys.exit(0)"))
        yield Probe("hostile: equals all", put("", _equal_to_all(row)))
    else:
        yield Probe("hostile: huge power", put("", "9**9**9**9" if row_kind(row) == "countdown" else "9^{9^{9^{9}}}"))
        yield Probe("hostile: open braces", "\\boxed{" * 1000)


def _equal_to_all(row: dict) -> str:
    program = _wrong_program(row).replace("'wrong'", "Yes()")
    return f"class Yes:\n    def __eq__(self, other): return True\n    def __ne__(self, other): return False\n{program}"
