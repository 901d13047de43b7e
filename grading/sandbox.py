"""The code sandbox: run a model-written function in Monty and compare what it returns in this process.

Monty (pydantic-monty) is a Python interpreter without files, network or host access, in worker processes of its own.
The program gets arguments and returns plain data; it never sees an expected value and never decides the verdict. What
Monty cannot run (generators, some modules) is *ungraded*, not wrong: there is no tier that runs it unprotected.
"""

import ast
import atexit
import functools
import math
import re
import sys
import threading
from typing import NamedTuple

from grading.registry import RewardError, Ungraded, short_repr

MAX_PROGRAM_CHARS = 64 * 1024
MAX_STDOUT_BYTES = 256 * 1024
MEMORY_BYTES = 256 * 1024 * 1024
RELATIVE_TOLERANCE = 1e-6  # only where a float is involved
MONTY_LACKS = "The monty syntax parser does not yet support"  # how Monty refuses a construct


class Call(NamedTuple):
    """One test: call the function `name` with `args`, expect `expected`."""

    name: str
    args: tuple
    expected: object


def grade_code(answer: str, tests: list[str], timeout: float = 1.0) -> tuple[float, str]:
    """1.0 where the code in `answer` passes every test, else 0.0, with the reason in words.

    tests: assert statements `assert f(literals) == literal`. timeout: seconds of running time for each call.
    Raises Ungraded where the sandbox cannot run the program, ValueError where a test is not such an assert.
    """
    calls = parse_tests(tuple(tests))
    code = extract_code(answer)
    if not code:
        return 0.0, "no code in the answer"
    if len(code) > MAX_PROGRAM_CHARS:
        return 0.0, f"the program has {len(code)} characters, over {MAX_PROGRAM_CHARS}"
    return _run_calls(code, calls, timeout)


def extract_code(answer: str) -> str:
    """The program in an answer: the last fenced block that defines something, else the last block, else all of it.

    A fence is a line that starts with three backticks; the last block need not be closed.
    """
    blocks, inside = [], None
    for line in answer.split("\n"):
        if line.lstrip().startswith("```"):
            if inside is not None:
                blocks.append("\n".join(inside))
            inside = [] if inside is None else None
        elif inside is not None:
            inside.append(line)
    if inside is not None:
        blocks.append("\n".join(inside))
    defining = [block for block in blocks if "def " in block or "lambda" in block]
    return (defining or blocks or [answer])[-1].strip("\n").rstrip()


@functools.lru_cache(maxsize=10_000)
def parse_tests(tests: tuple[str, ...]) -> tuple[Call, ...]:
    """Turn `assert f(1, [2]) == 3` statements into calls. Raises ValueError naming the test that is not of this form."""
    if not tests:
        raise ValueError("the list of tests is empty: nothing could be wrong, so nothing can be right")
    return tuple(call for test in tests for call in _parse_asserts(test))


def _parse_asserts(source: str) -> list[Call]:
    form = "a test must read `assert name(literals) == literal`"
    try:
        calls = []
        for node in ast.parse(source.strip()).body:
            left, right = node.test.left, node.test.comparators[0]
            if not isinstance(node, ast.Assert) or len(node.test.ops) != 1 or not isinstance(node.test.ops[0], ast.Eq):
                raise ValueError
            if left.keywords or not isinstance(left.func, ast.Name):
                raise ValueError
            args = tuple(ast.literal_eval(arg) for arg in left.args)
            calls.append(Call(left.func.id, args, ast.literal_eval(right)))
    except (SyntaxError, ValueError, AttributeError, TypeError):
        raise ValueError(f"{form}, but this one reads {source.strip()[:80]!r}") from None
    if not calls:
        raise ValueError(f"{form}, but this one is empty")
    return calls


def _run_calls(code: str, calls: tuple[Call, ...], timeout: float) -> tuple[float, str]:
    import pydantic_monty as monty

    # Not to be set from within: time and memory of each feed, sleep, depth; what is printed goes nowhere, up to a cap.
    limits = {
        "max_feed_duration_secs": timeout, "max_memory": MEMORY_BYTES, "max_total_sleep_secs": 0.1,
        "max_recursion_depth": 500,
    }  # fmt: skip
    try:
        with _pool().checkout(limits=limits) as session:

            def feed(source, **inputs):
                return session.feed_run(source, inputs=inputs, print_callback=monty.CollectString(MAX_STDOUT_BYTES))

            feed(code)
            for number, call in enumerate(calls, 1):
                result = feed(f"{call.name}(*arguments_)", arguments_=list(call.args))
                if not is_same(result, call.expected):
                    return 0.0, f"test {number} of {len(calls)}: {_call_text(call)} gave {short_repr(result)}"
    except monty.MontySyntaxError as error:
        if MONTY_LACKS in str(error):
            raise Ungraded(f"the sandbox cannot run this: {error}") from None
        return 0.0, f"syntax error: {_first_line(error)}"
    except monty.MontyRuntimeError as error:
        if _is_unsupported(error.exception(), code):
            raise Ungraded(f"the sandbox cannot run this: {_first_line(error)}") from None
        return 0.0, f"raised {_first_line(error)}"
    except monty.MontyCrashedError as error:
        return 0.0, f"the program crashed or hung its worker: {_first_line(error)}"  # the program's doing: wrong
    except monty.MontyError as error:
        return 0.0, f"no plain value came back: {_first_line(error)}"
    return 1.0, f"passed {len(calls)} tests"


def _is_unsupported(error: BaseException, code: str) -> bool:
    """Whether the sandbox lacks what an honest program uses; raising such an error on purpose does not count."""
    if isinstance(error, NotImplementedError):
        return MONTY_LACKS in str(error) and "NotImplementedError" not in code
    if isinstance(error, ImportError):  # a real module that Monty lacks, not one that nobody has
        name = next(iter(re.findall(r"'(\w+)", str(error))), "")
        imported = rf"^\s*(?:import|from)\s[^\n]*\b{name}\b"
        return name in sys.stdlib_module_names and re.search(imported, code, re.MULTILINE) is not None
    return False


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
    return type(expected) in (str, bytes, bool, type(None), complex) and result == expected


def _typed(values) -> set:
    """Elements or keys with their types, so that 1 and True differ."""
    return {(type(value), value) for value in values}


_lock = threading.Lock()


def _pool():
    with _lock:
        return _start_pool()


@functools.cache
def _start_pool():
    import pydantic_monty as monty

    pool = monty.Monty(min_processes=1, request_timeout=30.0).__enter__()
    atexit.register(pool.__exit__, None, None, None)
    return pool


def _call_text(call: Call) -> str:
    return f"{call.name}({', '.join(map(short_repr, call.args))})"


def _first_line(error) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


def check_tests(rows: list[dict]) -> None:
    """Raise RewardError naming the first row whose `tests` could not be run."""
    for row in rows:
        if row.get("tests") is not None:
            try:
                parse_tests(tuple(row["tests"]))
            except (ValueError, TypeError) as error:
                raise RewardError(f"row {row['id']}, column tests: {error}") from None
