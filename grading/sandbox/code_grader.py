"""The code sandbox: run a model-written program against a row's tests and compare, in this process, what it returns.

The program's process gets arguments and returns plain data; it never holds an expected answer and never decides the
verdict. Two tiers (grading/sandbox/tiers.py): Monty first, since it is fast and holds everywhere; what did not pass there runs in
CPython inside bubblewrap, which has the last word. Where there is no bubblewrap, a program that needs what Monty lacks is
*ungraded*. No tier runs model code unprotected unless a person asks for it.
"""

import ast
import atexit
import functools
import math
import os
import re
import textwrap
import threading
from collections import Counter
from collections.abc import Iterable
from contextlib import contextmanager

from grading.base import RewardError, Ungraded, lock_released, short_repr
from grading.sandbox.cases import Call, Case, Check, Script, called_names, parse_tests
from grading.sandbox.monty import Monty
from grading.sandbox.tiers import Failed, Process, Unsupported, find_bubblewrap, first_line, unprotected
from grading.sandbox.workers import WorkerError

MAX_PROGRAM_CHARS = 64 * 1024
RELATIVE_TOLERANCE = 1e-6  # only where a float is involved
FIRST_SECONDS = 0.03  # what does not end within is tried again in the slow lane, behind everything that does

decided = Counter()  # programs by the tier that had the last word


def grade_code(
    answer: str,
    tests: str | list,
    entry_point: str | None = None,
    setup: str = "",
    starter: str = "",
    timeout: float | None = None,
) -> tuple[float, str]:
    """1.0 where the code in `answer` passes every test, else 0.0, with the reason in words.

    tests: in one of the forms of grading/sandbox/cases.py. entry_point: the function asked for. setup: imports and helper functions
    that the program and the tests may use. starter: the beginning of a program, which an answer that does not define
    entry_point goes on with. timeout: seconds of running time in all; default `code_timeout`.

    Raises Ungraded where no tier can run the program or its tests, ValueError where the tests have no such form.
    """
    cases = parse_tests(tests, entry_point, setup)
    code = extract_code(answer, called_names(cases))
    if not code.strip():
        return 0.0, "no_code: no code in the answer"
    if len(code) > MAX_PROGRAM_CHARS:
        return 0.0, f"output_limit: the program has {len(code)} characters, over {MAX_PROGRAM_CHARS}"
    with lock_released():
        return _grade(complete(code, entry_point, setup, starter), cases, timeout or _settings["code_timeout"])


def extract_code(answer: str, names: Iterable[str] = ()) -> str:
    """The program in an answer: the last fenced block that defines one of `names`, else that defines anything, else the last.

    A fence is a line that starts with three backticks; the last block need not be closed. Blocks in another language than
    Python count only where there is no other. Without a fence, all of the answer.
    """
    blocks, inside, language = [], None, ""
    for line in [*answer.split("\n"), None]:
        if line is None or line.lstrip().startswith("```"):
            if inside is not None:
                blocks.append((language, textwrap.dedent("\n".join(inside))))  # a fence within a list is indented
            elif line is not None:
                language = line.strip().strip("`").strip().lower()
            inside = [] if inside is None else None
        elif inside is not None:
            inside.append(line)
    python = [block for block in blocks if block[0].startswith("py")] if not names else []
    kept = python or [block for block in blocks if block[0].startswith("py") or not block[0]] or blocks
    kept = [text for _, text in kept]
    asked = [text for text in kept if any(f"def {name}" in text or f"{name} =" in text for name in names)]
    defining = [text for text in kept if "def " in text or "lambda" in text]
    return (asked or defining or kept or [answer])[-1].strip("\n").rstrip()


def complete(code: str, entry_point: str | None, setup: str, starter: str) -> str:
    """The whole program: a function's bare body goes on where `starter` ends, `setup` stands before everything else."""
    defines = rf"^[ \t]*(?:async[ \t]+)?(?:def|class)[ \t]+{entry_point}\b|^{entry_point}[ \t]*="
    if starter and entry_point and not re.search(defines, code, re.MULTILINE):
        first, _, rest = code.partition("\n")
        if not first.startswith((" ", "\t")):  # the body's indentation is lost, of the first line or of all
            lines = [line for line in rest.split("\n") if line.strip()]
            is_first_alone = bool(lines) and all(line.startswith((" ", "\t")) for line in lines)
            code = f"    {first}\n{rest}" if is_first_alone else "\n".join("    " + line for line in code.split("\n"))
        return starter.rstrip("\n") + "\n" + code
    return f"{setup}\n{code}" if setup else code


# --- lanes: what ends at once is never kept waiting by what does not


_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
_fast_lane = threading.BoundedSemaphore(2 * _cores)  # much of a short program's time is waiting for its process
_slow_lane = threading.BoundedSemaphore(2 * _cores)  # at a lower priority; some of it sleeps


def _grade(code: str, cases: tuple[Case, ...], timeout: float) -> tuple[float, str]:
    """Run the program in each tier until it passes; where the last tier needs more time, once more in the slow lane."""
    try:
        tiers = _tiers()
        with _fast_lane:
            for tier in tiers if not _CHANCE.search(code) else tiers[-1:]:  # what is left to chance gets one try
                outcome, detail = _judge(tier, code, cases, min(FIRST_SECONDS, timeout), slow=False)
                if (
                    outcome == "killed"
                ):  # by whom? by the system, for want of memory, or by itself: then it will be again
                    outcome, detail = _judge(tier, code, cases, min(FIRST_SECONDS, timeout), slow=False)
                    outcome = "crash" if outcome == "killed" else outcome
                if outcome == "passed":
                    break
        if outcome == "timeout" or (outcome == "memory" and tier.name == "monty"):
            with _slow_lane:
                outcome, detail = _judge(tier, code, cases, timeout, slow=True)
                outcome = "crash" if outcome == "killed" else outcome
    except (WorkerError, OSError) as error:
        raise Ungraded(f"sandbox_error: {first_line(error)}") from error
    if outcome == "unsupported":
        more = "" if len(available()) > 1 else " (CPython in bubblewrap could: install bubblewrap)"
        raise Ungraded(f"unsupported: the sandbox cannot run this: {detail}{more}")
    with _lock:
        decided[tier.name] += 1
    return float(outcome == "passed"), f"{outcome}: {detail}"


_ITERATORS = {"map", "zip", "filter", "enumerate", "reversed"}
_SETS = {"set", "frozenset"}
_READS_ALL = {
    "list",
    "tuple",
    "set",
    "frozenset",
    "dict",
    "sum",
    "max",
    "min",
    "sorted",
    "any",
    "all",
    "join",
    "extend",
}
_ASKS_NO_ORDER = {"len", "sorted", "sum", "min", "max", "any", "all", "bool", "set", "frozenset"}


def _may_differ(code: str) -> bool:
    """Whether a program that passed in Monty may fail in CPython.

    In Monty map() and its like, and generator expressions, are lists, and sets keep their order. A pass is believed
    where such a value is used up at once by what asks for nothing else.
    """
    try:
        nodes = list(ast.walk(ast.parse(code)))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return True
    read, unordered = set(), set()  # places where an iterator is read out, where a set's order does not matter
    for node in nodes:
        if isinstance(node, (ast.For, ast.comprehension)):
            read.add(id(node.iter))
        elif isinstance(node, ast.Starred):
            read.add(id(node.value))
        elif isinstance(node, ast.Compare):
            unordered.update(map(id, [node.left, *node.comparators]))
        elif isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            read.update(map(id, node.args if name in _READS_ALL else ()))
            unordered.update(map(id, node.args if name in _ASKS_NO_ORDER else ()))
            read.add(id(node.func))
    for node in nodes:
        called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
        if (called in _ITERATORS or isinstance(node, ast.GeneratorExp)) and id(node) not in read:
            return True
        if (called in _SETS or isinstance(node, (ast.Set, ast.SetComp))) and id(node) not in unordered:
            return True
        if isinstance(node, ast.Name) and node.id in _ITERATORS | _SETS and id(node) not in read:
            return True  # under another name
    return False


_CHANCE = re.compile(r"random|secrets|time|uuid|\bid\b|hash")


def _judge(tier, code: str, cases: tuple[Case, ...], seconds: float, slow: bool) -> tuple[str, str]:
    """Outcome and detail of a program in one tier."""
    number = 0
    try:
        if isinstance(cases[0], Script):
            for number, case in enumerate(cases, 1):
                output = tier.run_script(code, case, seconds, slow)
                if problem := compare_output(output, case.output):
                    return "failed", f"test {number} of {len(cases)}: {problem}"
        else:
            with tier.open(code, seconds, slow) as session:
                for number, case in enumerate(cases, 1):
                    if isinstance(case, Check):
                        tier.check(case, session, seconds, slow)
                    elif not is_same(result := session.call(case.name, case.args), case.expected):
                        problem = f"{_call_text(case)} gave {short_repr(result)}"
                        return "failed", f"test {number} of {len(cases)}: {problem}"
    except Failed as failure:
        where = f"test {number} of {len(cases)}: " if number else ""
        return failure.outcome, f"{where}{failure.detail}"
    except Unsupported as lacking:
        return "unsupported", str(lacking)
    if tier.name == "monty" and _may_differ(code):  # in either lane
        return "unsupported", "an iterator or a set may have been taken for a list"
    return "passed", "all tests"


# --- comparing


def is_same(result, expected) -> bool:
    """Equality of plain data by exact type: bool is not int, nan equals nothing, floats within a relative 1e-6."""
    if type(result) in (int, float) and type(expected) in (int, float):
        if type(result) is type(expected) is int:
            return result == expected
        try:
            return math.isclose(result, expected, rel_tol=RELATIVE_TOLERANCE, abs_tol=1e-9)
        except OverflowError:  # an int too large for a float
            return False
    if type(result) is not type(expected):
        return False
    if type(expected) in (list, tuple):
        return len(result) == len(expected) and all(map(is_same, result, expected))
    if type(expected) is dict:
        return _typed(result) == _typed(expected) and all(is_same(result[key], expected[key]) for key in expected)
    if type(expected) in (set, frozenset):
        return _typed(result) == _typed(expected)
    if type(expected) is complex:
        return is_same(result.real, expected.real) and is_same(result.imag, expected.imag)
    return type(expected) in (str, bytes, bool, type(None)) and result == expected


def _typed(values) -> set:
    """Elements or keys with their types, so that 1 and True differ."""
    return {(type(value), value) for value in values}


def compare_output(output: str, expected: str) -> str:
    """ "" where two standard outputs are the same line by line and word by word, decimals within a relative 1e-6; else why not."""
    lines, expected_lines = ([line.split() for line in text.rstrip().split("\n")] for text in (output, expected))
    if len(lines) != len(expected_lines):
        return f"printed {len(lines)} lines, not {len(expected_lines)}"
    for number, (line, expected_line) in enumerate(zip(lines, expected_lines), 1):
        if len(line) != len(expected_line) or not all(map(_is_same_word, line, expected_line)):
            return f"line {number} is {short_repr(' '.join(line))}"
    return ""


_DECIMAL = re.compile(r"[+-]?(?:\d{1,40}\.\d{0,40}|\.\d{1,40}|\d{1,40})(?:[eE][+-]?\d{1,3})?", re.ASCII)


def _is_same_word(word: str, expected: str) -> bool:
    if word == expected:
        return True
    if not all(_DECIMAL.fullmatch(w) for w in (word, expected)) or not set(".eE") & set(expected):
        return False
    return math.isclose(float(word), float(expected), rel_tol=RELATIVE_TOLERANCE, abs_tol=1e-9)


def _call_text(call: Call) -> str:
    return f"{call.name}({', '.join(map(short_repr, call.args))})"


# --- what there is on this machine


_settings = {"code_timeout": 1.0, "unsafe": False, "only": None}
_lock = threading.RLock()


def start(code_timeout: float = 1.0, unsafe: bool = False) -> None:
    """Find the tiers of this machine by trying forbidden things in them, and start their processes.

    code_timeout: seconds of running time that a program gets in all its tests (three times as many on the wall clock).
    unsafe: run what Monty does not pass in a process of this user where there is no bubblewrap. To be called before a
    process has grown large; without it the tiers are found at the first program.
    """
    _settings.update(code_timeout=code_timeout, unsafe=unsafe)
    _tiers()


def available() -> tuple[str, ...]:
    """The names of the tiers, in the order in which they are tried."""
    return tuple(tier.name for tier in _tiers())


def describe() -> str:
    """One line on where model-written code runs here."""
    names = available()
    if "unprotected" in names:
        return "in Monty, then UNPROTECTED with the rights of this user (unsafe_run_model_code)"
    if "bubblewrap" in names:
        return "in Monty, then in CPython inside bubblewrap"
    return f"in Monty alone: {_bubblewrap()[1]}; what Monty cannot run is ungraded"


@contextmanager
def only(name: str):
    """Run programs in one tier alone, for tests and measurements. Raises ValueError where this machine lacks it."""
    if name not in available():
        raise ValueError(f"the tier {name} is not available here: {describe()}")
    _settings["only"] = name
    try:
        yield
    finally:
        _settings["only"] = None


def _tiers() -> list[Monty | Process]:
    with _lock:
        tiers = [_monty()]
        bubblewrap, _ = _bubblewrap()
        if bubblewrap:
            tiers.append(bubblewrap)
        elif _settings["unsafe"]:
            tiers.append(_unprotected())
        return [tier for tier in tiers if _settings["only"] in (None, tier.name)]


@functools.cache
def _monty() -> Monty:
    tier = Monty()
    atexit.register(tier.close)
    return tier


@functools.cache
def _bubblewrap() -> tuple[Process | None, str]:
    return find_bubblewrap()


@functools.cache
def _unprotected() -> Process:
    return Process("unprotected", unprotected)


def check_tests(rows: list[dict]) -> list[str]:
    """Notes on how the rows' tests are run. Raises RewardError naming the first row whose tests have no known form."""
    kinds = Counter()
    for row in rows:
        if row.get("tests") is None:
            continue
        try:
            cases = parse_tests(row["tests"], row.get("entry_point"), row.get("setup") or "")
        except (ValueError, TypeError) as error:
            raise RewardError(f"row {row['id']}, column tests: {error}") from None
        kinds[next((type(case) for case in cases if not isinstance(case, Call)), Call)] += 1
    if not kinds:
        return []
    notes = [f"model-written code runs {describe()}"]
    if len(available()) == 1 and kinds[Check] + kinds[Script]:
        notes.append(
            f"{kinds[Check] + kinds[Script]} of {kinds.total()} code questions have tests that are code or use standard input: without bubblewrap some may be ungraded"
        )
    return notes
