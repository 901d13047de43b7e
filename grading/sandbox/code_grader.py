"""The code grader: run a model-written program against a row's tests and compare the results in this process.

The program's process gets arguments and returns plain data; it never has an expected answer and never decides the
verdict. There are two tiers (grading/sandbox/tiers.py). Monty comes first, since it is fast and works on every machine.
Programs that do not pass there run in CPython inside bubblewrap, whose verdict is final. Without bubblewrap, a program
that needs a feature that Monty lacks is *ungraded*. Model code never runs unprotected unless the user asks for it.
"""

import atexit
import functools
import math
import os
import re
import threading
from collections import Counter
from contextlib import contextmanager
from decimal import Decimal
from fractions import Fraction

from grading.base import RewardError, Ungraded, lock_released, short_repr
from grading.sandbox.cases import Call, Case, Check, Script, called_names, parse_tests
from grading.sandbox.differences import difference
from grading.sandbox.extraction import MAX_PROGRAM_CHARS, complete_program, extract_code
from grading.sandbox.monty import Monty
from grading.sandbox.outcomes import Failed, Unsupported, first_line
from grading.sandbox.tiers import Process, bubblewrap, start_unprotected
from grading.sandbox.workers import WorkerError

FAST_SECONDS = 0.03  # a program that takes longer runs again in the slow lane, after the fast ones
MAX_TRIES = 4  # of a program whose process is killed, perhaps for lack of memory

graded_by_tier = Counter()  # number of programs by the tier that decided the verdict


def grade_code(
    answer: str,
    tests: str | list,
    entry_point: str | None = None,
    setup: str = "",
    starter: str = "",
    timeout: float | None = None,
) -> tuple[float, str]:
    """Return the score, 1.0 if the code in `answer` passes every test and 0.0 otherwise, and the reason.

    Args:
        tests: The tests, in one of the forms of grading/sandbox/cases.py.
        entry_point: The name of the function that the answer should define.
        setup: Imports and helper functions that the program and the tests may use.
        starter: The beginning of the program, put before an answer that does not define `entry_point`.
        timeout: Running time in seconds for all tests together. Default: `code_timeout`.

    Raises:
        Ungraded: If no tier can run the program or its tests.
        ValueError: If the tests have none of these forms.
    """
    cases = parse_tests(tests, entry_point, setup)
    if reason := _unsupported(cases):
        raise Ungraded(f"unsupported: {reason}")
    code = extract_code(answer, called_names(cases))
    if not code.strip():
        return 0.0, "no_code: the answer contains no code"
    if len(code) > MAX_PROGRAM_CHARS:
        return 0.0, f"output_limit: the program has {len(code)} characters, the limit is {MAX_PROGRAM_CHARS}"
    program = complete_program(code, entry_point, setup, starter)
    doubts = _doubts(program, cases)
    with lock_released():
        return _grade(program, cases, timeout or _settings["code_timeout"], doubts)


# --- lanes: short programs never wait for long ones


_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
_fast_lane = threading.BoundedSemaphore(2 * _cores)  # a short program mostly waits for its process
_slow_lane = threading.BoundedSemaphore(2 * _cores)  # at a lower priority; some programs sleep


def _grade(code: str, cases: tuple[Case, ...], timeout: float, doubts: str) -> tuple[float, str]:
    """Run the program in each tier until it passes. If the last one runs out of time, run it again in the slow lane.

    doubts: why Monty's verdict would not be trusted, or "".
    """
    try:
        tiers = _tiers()
        with _fast_lane:
            # A program whose result may depend on chance gets one try.
            for tier in tiers[-1:] if doubts or _NONDETERMINISTIC.search(code) else tiers:
                outcome, detail = _judge(tier, code, cases, min(FAST_SECONDS, timeout), slow=False)
                if outcome == "passed":
                    break
        if outcome == "timeout" or (outcome == "memory" and tier.name == "monty"):
            with _slow_lane:
                outcome, detail = _judge(tier, code, cases, timeout, slow=True)
    except (WorkerError, OSError) as error:
        raise Ungraded(f"sandbox_error: {first_line(error)}") from error
    if tier.name == "monty" and doubts and outcome in ("passed", "failed", "crash"):
        outcome, detail = "unsupported", doubts
    if outcome == "unsupported":
        hint = "" if len(available()) > 1 else " (install bubblewrap to run it in CPython)"
        raise Ungraded(f"unsupported: the sandbox cannot run this: {detail}{hint}")
    with _lock:
        graded_by_tier[tier.name] += 1
    return float(outcome == "passed"), f"{outcome}: {detail}"


_NONDETERMINISTIC = re.compile(r"random|secrets|time|uuid|\bid\b|hash")


def _judge(tier, code: str, cases: tuple[Case, ...], seconds: float, slow: bool) -> tuple[str, str]:
    """Run a program in one tier and return (outcome, detail). If its process is killed, run it again."""
    for _ in range(MAX_TRIES):
        outcome, detail = _run(tier, code, cases, seconds, slow)
        if outcome != "killed":
            return outcome, detail
    return "crash", detail


def _run(tier, code: str, cases: tuple[Case, ...], seconds: float, slow: bool) -> tuple[str, str]:
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
                        continue
                    result = session.call(case.name, case.args)
                    comparable = set(result) if type(result) is frozenset and type(case.expected) is set else result
                    if not is_same(comparable, case.expected):
                        problem = f"{_call_text(case)} gave {short_repr(result)}"
                        return "failed", f"test {number} of {len(cases)}: {problem}"
    except Failed as failure:
        prefix = f"test {number} of {len(cases)}: " if number else ""
        return failure.outcome, f"{prefix}{failure.detail}"
    except Unsupported as error:
        return "unsupported", str(error)
    return "passed", "all tests"


def _doubts(code: str, cases: tuple[Case, ...]) -> str:
    """Return why Monty's verdict may differ from CPython's, or ""."""
    texts = [case.source if isinstance(case, Check) else repr(case[1]) for case in cases]
    may_hold_newlines = any("\\n" in text for text in texts)
    tests = (difference(case.source, may_hold_newlines) for case in cases if isinstance(case, Check))
    return difference(code, may_hold_newlines) or next(filter(None, tests), "")


# --- comparison


def is_same(result, expected) -> bool:
    """Compare plain data by type and value. bool is not int, nan equals nothing.

    Only where a float is expected may a result differ a little.
    """
    if type(result) in _NUMBERS and type(expected) is int:
        return result == expected
    if type(result) in _NUMBERS and type(expected) is float:
        return _is_close(result, expected)
    if type(result) is not type(expected):
        return False
    if type(expected) in (list, tuple):
        return len(result) == len(expected) and all(map(is_same, result, expected))
    if type(expected) is dict:
        return _with_types(result) == _with_types(expected) and all(
            is_same(result[key], expected[key]) for key in expected
        )
    if type(expected) in (set, frozenset):
        return _with_types(result) == _with_types(expected)
    if type(expected) is complex:
        return is_same(result.real, expected.real) and is_same(result.imag, expected.imag)
    return type(expected) in (str, bytes, bool, type(None)) and result == expected


_NUMBERS = (int, float, Fraction, Decimal)


def _is_close(result: float, expected: float) -> bool:
    """Return True if two numbers differ by rounding errors only: by a relative 1e-6, and by no more than 1e-6."""
    try:
        return math.isclose(result, expected, rel_tol=1e-12, abs_tol=max(1e-9, 1e-6 * min(1.0, abs(expected))))
    except OverflowError:  # an int too large for a float
        return False


def _with_types(values) -> set:
    """Pair elements or keys with their types, so that 1 and True differ."""
    return {(type(value), value) for value in values}


def compare_output(output: str, expected: str) -> str:
    """Return "" if two outputs match word by word in each line (decimals: _is_close), else the difference."""
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
    return _is_close(float(word), float(expected))


def _call_text(call: Call) -> str:
    return f"{call.name}({', '.join(map(short_repr, call.args))})"


# --- the tiers of this machine


_settings = {"code_timeout": 1.0, "unsafe": False, "only_tier": None}
_lock = threading.RLock()


def start(code_timeout: float = 1.0, unsafe: bool = False) -> None:
    """Find the tiers of this machine, by attempting forbidden actions in them, and start their processes.

    Call it while this process is small. If it is not called, the tiers are found when the first program is graded.

    Args:
        code_timeout: Running time in seconds for all tests of a program (three times as much wall time).
        unsafe: Without bubblewrap, run programs that do not pass in Monty in an unprotected process of this user.
    """
    _settings.update(code_timeout=code_timeout, unsafe=unsafe)
    _tiers()


def available() -> tuple[str, ...]:
    """Return the names of the tiers, in the order in which they are tried."""
    return tuple(tier.name for tier in _tiers())


def describe() -> str:
    """Describe in one line where model-written code runs on this machine."""
    names = available()
    if "unprotected" in names:
        return "in Monty, then UNPROTECTED with the rights of this user (unsafe_run_model_code)"
    if "bubblewrap" in names:
        return "in Monty, then in CPython inside bubblewrap"
    return f"in Monty only: {bubblewrap()[1]}; programs that Monty cannot run are ungraded"


@contextmanager
def use_only_tier(name: str):
    """Run programs in one tier only, for tests and benchmarks. Raise ValueError if this machine lacks the tier."""
    if name not in available():
        raise ValueError(f"the tier {name} is not available here: {describe()}")
    _settings["only_tier"] = name
    try:
        yield
    finally:
        _settings["only_tier"] = None


def _tiers() -> list[Monty | Process]:
    with _lock:
        tiers = [_monty()]
        in_bubblewrap, _ = bubblewrap()
        if in_bubblewrap:
            tiers.append(in_bubblewrap)
        elif _settings["unsafe"]:
            tiers.append(_unprotected())
        return [tier for tier in tiers if _settings["only_tier"] in (None, tier.name)]


@functools.cache
def _monty() -> Monty:
    tier = Monty()
    atexit.register(tier.close)
    return tier


@functools.cache
def _unprotected() -> Process:
    return Process("unprotected", start_unprotected)


def _unsupported(cases: tuple[Case, ...]) -> str:
    """Return why no tier can run the tests, or ""."""
    return next((case.unsupported for case in cases if isinstance(case, Check) and case.unsupported), "")


def check_tests(rows: list[dict]) -> list[str]:
    """Return notes on how the rows' tests run. Raise RewardError for the first row whose tests have no known form."""
    kinds = Counter()
    unsupported = Counter()
    for row in rows:
        if row.get("tests") is None:
            continue
        try:
            cases = parse_tests(row["tests"], row.get("entry_point"), row.get("setup") or "")
        except (ValueError, TypeError) as error:
            raise RewardError(f"row {row['id']}, column tests: {error}") from None
        if reason := _unsupported(cases):
            unsupported[reason] += 1
        kinds[next((type(case) for case in cases if not isinstance(case, Call)), Call)] += 1
    if not kinds:
        return []
    notes = [f"model-written code runs {describe()}"]
    if unsupported:
        notes.append(f"{unsupported.total()} of {kinds.total()} code questions are ungraded: {next(iter(unsupported))}")
    if len(available()) == 1 and kinds[Check] + kinds[Script]:
        notes.append(
            f"{kinds[Check] + kinds[Script]} of {kinds.total()} code questions use test code or standard input: without bubblewrap, some may be ungraded"
        )
    return notes
