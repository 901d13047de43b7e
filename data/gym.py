"""Questions of reasoning_gym, a package of over 100 families of puzzles made from a seed: `reasoning_gym:NAME`.

`reasoning_gym:NAME@1-4` makes as many of each of these levels, by the family's own curriculum; a row's `level` says which.

They are graded by the package's own `score_answer` (grading/gym.py), which needs the whole *entry* that the package made.
The questions are made in a process of their own with a fixed hash seed: some families go by the order of a set, draw
from the global random numbers or print, and a run must be reproducible to the bit.
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
from data.tasks import split_of
from grading.base import did_you_mean

PREFIX = "reasoning_gym:"
BATCH = 500  # questions from one seed of the package
NONSENSE = ("?", "qwertz", "no answer at all")  # a family that takes all of these for right takes anything


def read_gym(source: str, n: int, split: str, seed: int) -> list[dict]:
    """`n` rows of a family, no question twice; a question's hash decides its split, so they are disjoint.

    Columns: grader, family, answer (None where the family gives none), entry (plain data), and level where levels are
    asked for. Raises DataError.
    """
    if importlib.util.find_spec("reasoning_gym") is None:
        raise DataError(f"{source}: the package reasoning_gym is missing: pip install reasoning-gym==0.1.25")
    work = [source.removeprefix(PREFIX), split, n, seed]
    command = [sys.executable, "-c", "from data.gym import _main; _main()", json.dumps(work)]
    root = Path(__file__).resolve().parent.parent
    child = subprocess.run(command, cwd=root, env=os.environ | {"PYTHONHASHSEED": "0"}, capture_output=True)
    if child.returncode:
        reason = (child.stderr.decode(errors="replace").strip().splitlines() or ["it died"])[-1]
        raise DataError(f"{source}: reasoning_gym cannot make its questions: {reason}")
    rows = pickle.loads(child.stdout)
    if isinstance(rows, str):
        raise DataError(f"{source}: {rows}")
    return rows


def _main() -> None:
    """In the child: write the rows, or a message, to standard output. What the package prints goes elsewhere."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        result = _make(*json.loads(sys.argv[1]))
    except DataError as error:
        result = str(error)
    pickle.dump(result, out)


def _make(name: str, split: str, n: int, seed: int) -> list[dict]:
    from reasoning_gym.factory import DATASETS

    name, at, levels = name.partition("@")
    if name not in DATASETS:
        hint = did_you_mean(name, DATASETS) or f" It has {', '.join(sorted(DATASETS))}."
        raise DataError(f"reasoning_gym has no family {name}.{hint}")
    if not at:
        return _make_level(name, None, split, n, seed, set())
    first, _, last = levels.partition("-")
    if not (first.isdigit() and (last or first).isdigit() and int(first) <= int(last or first)):
        raise DataError(f"levels are written {PREFIX}{name}@1-4, not @{levels}")
    asked, rows, seen = range(int(first), int(last or first) + 1), [], set()
    for i, level in enumerate(asked):
        share = n * (i + 1) // len(asked) - len(rows)
        rows += _make_level(name, level, split, share, seed, seen) if share else []
    return rows


def _make_level(name: str, level: int | None, split: str, n: int, seed: int, seen: set[str]) -> list[dict]:
    """n questions of a level, of none that is in `seen`, where they are put. level None: the family as it is by itself."""
    from reasoning_gym.factory import create_curriculum, create_dataset, has_curriculum

    settings, label = {}, split
    if level is not None:
        if not has_curriculum(name):
            raise DataError(f"the family {name} has no levels: leave @ out")
        curriculum = create_curriculum(name)
        highest = max(len(attribute.levels) for attribute in curriculum.attributes.values()) - 1
        if level > highest:
            raise DataError(f"the family {name} has levels up to {highest}, not {level}")
        curriculum.set_global_level(level)
        made = vars(curriculum.generate_configuration())
        settings = {key: value for key, value in made.items() if key not in ("seed", "size")}
        label = f"{split}-level{level}"
    rows, others = [], 0  # others: questions that were not taken
    for batch in itertools.count():
        batch_seed = random.Random(f"{name}/{label}/{seed}/{batch}").getrandbits(31)
        dataset = create_dataset(name, seed=batch_seed, size=BATCH, **settings)
        for i in range(BATCH):
            entry = dataset[i]
            question = entry["question"]
            of_split = (split_of(name, question) == "eval") == (split == "eval")  # two tenths are held out
            if not of_split or question in seen:
                others += 1
                if others > 15 * n + 5000:
                    raise DataError(f"the family does not have {n} different {label} questions: ask for fewer")
                continue
            seen.add(question)
            if not rows and all(_score(dataset, text, entry) >= 1 for text in NONSENSE):
                raise DataError(
                    "the family's own score_answer takes any nonsense for right: nothing can be learnt from it"
                )
            row = {"id": f"{PREFIX}{name}-{label}-{seed}-{len(rows)}", "prompt": question, "task": PREFIX + name}
            row |= {"grader": "reasoning_gym", "family": name, "answer": _gold(dataset, entry), "entry": plain(entry)}
            if level is not None:
                row["level"] = level
            rows.append(row)
            if len(rows) == n:
                return rows


def _score(dataset, answer: str, entry: dict) -> float:
    try:
        return dataset.score_answer(answer, entry)
    except Exception:  # some of them expect a form that nonsense does not have
        return 0.0


def _gold(dataset, entry: dict) -> str | None:
    """The answer; where a puzzle has many, the example among the metadata (example_answer, ...), if it is a right one."""
    if entry["answer"] is not None:
        return str(entry["answer"])
    for name, value in entry["metadata"].items():
        if name.endswith("_answer"):
            example = value if isinstance(value, str) else json.dumps(value)
            return example if _score(dataset, example, entry) >= 1 else None
    return None


def plain(value):
    """A copy of built-in types alone: what it does not know becomes text."""
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return kind(plain(item) for item in value)
    for kind in (str, bool, int, float, type(None)):
        if isinstance(value, kind):
            return value if type(value) is kind else kind(value)
    return str(value)
