"""The grader of reasoning_gym: no probe wins in any family, right answers do in their usual forms, nothing is evaluated."""

import functools
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

gym_package = pytest.importorskip("reasoning_gym", reason="reasoning_gym is not installed")

from reasoning_gym.factory import DATASETS  # noqa: E402

from data import DataError, gym  # noqa: E402
from grading import Ungraded, grade_gym  # noqa: E402
from grading.gym_verdicts import CHECKS, REFUSED, VERDICTS  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
GENERATED = sorted(set(DATASETS) - set(REFUSED) - {"composite"})  # composite only combines other families
FAST = [
    "arc_1d", "binary_matrix", "calendar_arithmetic", "chain_sum", "coin_flip", "complex_arithmetic", "countdown",
    "fraction_simplification", "game_of_life", "gsm_symbolic", "intermediate_integration", "letter_jumble", "n_queens",
    "number_format", "number_sorting", "polynomial_equations", "polynomial_multiplication", "puzzle24", "simple_integration",
    "sokoban", "spell_backward", "spiral_matrix", "string_insertion", "word_sorting",
]  # fmt: skip
CONSTANTS = [
    "", "0", "1", "-1", "2", "17", "100", "0.5", "-0", "0.0", "nan", "NaN", "-nan", "inf", "-inf", "Infinity", "1e999", "nanj",
    "nan+nanj", "None", "null", "True", "true", "False", "yes", "No", "A", "x", "C", "E", "pi", "I", "zoo", "[]", "{}", "()",
    '""', "[[]]", "[0]", "[NaN]", "[NaN, NaN, NaN]", "['nan', 'nan', 'nan', 'nan']", "[Infinity]", "{0: 1}", "*", "#", "?",
    "0/1", "0/0", "1/0", "0 0", "\n", "answer", "the answer", "qwertz", "6*4*1*1", "24+0*1*1", "Integral(x, x)", "Derivative(x)",
]  # fmt: skip


@functools.cache
def rows_of(family: str, n: int = 3) -> list[dict]:
    state = random.getstate()
    try:
        return gym._generate(family, "train", n, 0)
    finally:
        random.setstate(state)


def copies(row: dict) -> list[str]:
    """Return answers made from the question alone, without solving it."""
    question = row["prompt"]
    lines = [line.strip() for line in question.splitlines() if line.strip()]
    metadata = row["entry"]["metadata"]
    texts = [question, *lines, lines[-1].split(":")[-1].strip(), lines[-1].split()[-1].strip(".?")]
    if "integrand" in metadata:
        f, x = metadata["integrand"], metadata["variable"]
        texts += [f, f"({f})*{x}", f"Integral({f}, {x})", f"Integral({f}, {x}) + C", f"integrate({f}, {x})", f"Integral({f}).doit()"]
        texts += [f"Add(Integral({f}, {x}), C)", f"antiderivative({f})", f"Subs(Integral({f}, {x}), C, 0)", f"{x}*Mean({f})"]
    if "polynomial_expr" in metadata:
        f = metadata["polynomial_expr"]
        texts += [f, f"expand({f})", f"({f}).expand()", f"simplify({f})", f"Poly({f})", f"Mul({f})", f"factor({f})", f"S('{f}')"]
    if "numbers" in metadata and isinstance(metadata["numbers"], list):
        numbers = metadata["numbers"]
        target = metadata.get("target", 24)
        texts += [f"{numbers}", f"{target}", f"{target}+0*({'+'.join(map(str, numbers))})"]
    if "premises" in metadata:
        texts += metadata["premises"]
    if "original_numbers" in metadata:
        texts += [json.dumps(metadata["original_numbers"]), json.dumps([float("nan")] * len(metadata["original_numbers"]))]
    return texts


def is_same(text: str, gold: str | None) -> bool:
    """Return True if a probe happens to be the gold, as in a puzzle with two answers."""
    if gold is None:
        return False
    try:
        return float(text) == float(gold)
    except ValueError:
        return "".join(text.lower().split()) == "".join(gold.lower().split())


@pytest.mark.parametrize("family", [pytest.param(f, marks=[] if f in FAST else pytest.mark.slow) for f in GENERATED])
def test_gold_wins_and_no_constant_and_no_copy_of_the_question_does(family):
    for row in rows_of(family):
        gold = row["answer"]
        if gold is not None:
            for text in (f"<answer>{gold}</answer>", f"<answer>\n{gold}\n</answer>", gold or "<answer></answer>"):
                assert grade_gym(text, row) == (1.0, "right"), gold
        wins = [
            text
            for text in dict.fromkeys([*CONSTANTS, *copies(row)])
            if not is_same(text, gold) and grade_gym(f"<answer>{text}</answer>", row)[0]
        ]
        assert wins == [], f"{row['prompt'][-300:]}\ngold {gold}"


