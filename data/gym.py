"""Questions of the package reasoning_gym: over 100 families of puzzles generated from a seed, `reasoning_gym:NAME`.

`reasoning_gym:NAME@1-4` generates equally many questions of levels 1 to 4 of the family's curriculum, and sets `level`.

Questions are graded by grading/gym.py, which needs the complete *entry* of a question.
They are generated in a separate process with a fixed hash seed, because runs must be reproducible bit for bit: some
families depend on the order of a set, use the global random state, or print.
"""

import importlib.util
import itertools
import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

from data.sources import DataError
from data.tasks import assign_split
from grading.base import did_you_mean
from grading.gym_verdicts import REFUSED
from grading.sandbox.gym_scorer import level_settings

PREFIX = "reasoning_gym:"
BATCH_SIZE = 500  # questions generated from one seed of the package
NONSENSE = ("?", "qwertz", "no answer at all")  # a family that accepts all of these cannot be used


def read_gym(source: str, n: int, split: str, seed: int) -> list[dict]:
    """Generate n distinct rows of a family. A question's hash determines its split, so splits are disjoint.

    Columns: grader, family, answer (None if the family gives none), entry (built-in types only), and level if the source
    names levels. Raises DataError.
    """
    if importlib.util.find_spec("reasoning_gym") is None:
        raise DataError(f"{source}: the package reasoning_gym is not installed: pip install reasoning-gym==0.1.25")
    arguments = [source.removeprefix(PREFIX), split, n, seed]
    command = [sys.executable, "-c", "from data.gym import _main; _main()", json.dumps(arguments)]
    root = Path(__file__).resolve().parent.parent
    child = subprocess.run(command, cwd=root, env=os.environ | {"PYTHONHASHSEED": "0"}, capture_output=True)
    if child.returncode:
        reason = (child.stderr.decode(errors="replace").strip().splitlines() or ["the process died"])[-1]
        raise DataError(f"{source}: reasoning_gym cannot generate questions: {reason}")
    rows = pickle.loads(child.stdout)
    if isinstance(rows, str):
        raise DataError(f"{source}: {rows}")
    return rows


def _main() -> None:
    """In the child: write the rows, or an error message, to stdout. Text that the package prints goes to stderr."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        result = _generate(*json.loads(sys.argv[1]))
    except DataError as error:
        result = str(error)
    pickle.dump(result, out)


def _generate(name: str, split: str, n: int, seed: int) -> list[dict]:
    """Generate n rows of NAME, or of NAME@FIRST-LAST divided equally among these levels."""
    from reasoning_gym.factory import DATASETS

    name, at_sign, levels = name.partition("@")
    if name not in DATASETS:
        hint = did_you_mean(name, DATASETS) or f" It has {', '.join(sorted(DATASETS))}."
        raise DataError(f"reasoning_gym has no family {name}.{hint}")
    if name in REFUSED:
        raise DataError(f"the family {name} cannot be trained on: {REFUSED[name]}")
    if not at_sign:
        return _generate_level(name, None, split, n, seed, set())
    first, _, last = levels.partition("-")
    if not (first.isdigit() and (last or first).isdigit() and int(first) <= int(last or first)):
        raise DataError(f"levels are written {PREFIX}{name}@1-4, not @{levels}")
    level_range = range(int(first), int(last or first) + 1)
    rows = []
    seen = set()
    for i, level in enumerate(level_range):
        num_rows = n * (i + 1) // len(level_range) - len(rows)
        rows += _generate_level(name, level, split, num_rows, seed, seen) if num_rows else []
    return rows


def _generate_level(name: str, level: int | None, split: str, n: int, seed: int, seen: set[str]) -> list[dict]:
    """Generate n rows of a level (None: the family's default) whose questions are not in `seen`, and add them to it."""
    from reasoning_gym.factory import create_curriculum, create_dataset, has_curriculum

    label = split
    if level is not None:
        if not has_curriculum(name):
            raise DataError(f"the family {name} has no levels: remove @ from the source")
        curriculum = create_curriculum(name)
        highest = max(len(attribute.levels) for attribute in curriculum.attributes.values()) - 1
        if level > highest:
            raise DataError(f"the family {name} has levels up to {highest}, not {level}")
        label = f"{split}-level{level}"
    rows = []
    num_skipped = 0  # questions of another split, and repeated ones
    for batch in itertools.count():
        batch_seed = random.Random(f"{name}/{label}/{seed}/{batch}").getrandbits(31)
        dataset = create_dataset(name, seed=batch_seed, size=BATCH_SIZE, **level_settings(name, level))
        for i in range(BATCH_SIZE):
            entry = dataset[i]
            question = entry["question"]
            is_in_split = (assign_split(name, question) == "eval") == (split == "eval")  # two tenths are held out
            if not is_in_split or question in seen:
                num_skipped += 1
                if num_skipped > 15 * n + 5000:
                    raise DataError(f"the family does not have {n} different {label} questions: request fewer")
                continue
            seen.add(question)
            if not rows and all(_score(dataset, text, entry) >= 1 for text in NONSENSE):
                raise DataError("the family cannot be trained on: its score_answer accepts nonsense as right")
            row = {"id": f"{PREFIX}{name}-{label}-{seed}-{len(rows)}", "prompt": question, "task": PREFIX + name}
            row |= {
                "grader": "reasoning_gym",
                "family": name,
                "answer": _gold(dataset, entry),
                "entry": to_plain(entry),
            }
            if level is not None:
                row["level"] = level
            rows.append(row)
            if len(rows) == n:
                return rows


def _score(dataset, answer: str, entry: dict) -> float:
    try:
        return dataset.score_answer(answer, entry)
    except Exception:  # some families raise for answers that they cannot parse
        return 0.0


def _gold(dataset, entry: dict) -> str | None:
    """Return the answer or, for a puzzle with many, the example in the metadata (example_answer, ...) if it is right."""
    if entry["answer"] is not None:
        answer = str(entry["answer"])
        return _evaluate_integrals(answer) if "Integral(" in answer else answer
    for name, value in entry["metadata"].items():
        if name.endswith("_answer"):
            example = value if isinstance(value, str) else json.dumps(value)
            return example if _score(dataset, example, entry) >= 1 else None
    return None


def _evaluate_integrals(formula: str) -> str | None:
    """Return an antiderivative of the package without the integrals that it left in it, or None if sympy finds none."""
    import sympy

    evaluated = str(sympy.sympify(formula).doit())
    return None if "Integral(" in evaluated else evaluated


def to_plain(value):
    """Copy a value with built-in types only. Objects of other types become text."""
    if isinstance(value, dict):
        return {to_plain(key): to_plain(item) for key, item in value.items()}
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return kind(to_plain(item) for item in value)
    for kind in (str, bool, int, float, type(None)):
        if isinstance(value, kind):
            return value if type(value) is kind else kind(value)
    return str(value)
