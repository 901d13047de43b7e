"""How a program fails, and how test code runs apart from the program that it tests."""

from grading.sandbox.cases import Check

# Outcomes that a program's process may report.
FAILURES = {"timeout", "memory", "crash", "syntax", "missing_entry", "bad_type", "output_limit"}
TOO_SLOW = "the program took longer than code_timeout allows"


def first_line(error) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


class Failed(Exception):
    """The program failed. `outcome` is a word such as timeout or crash.

    kind, message: The built-in exception that the program raised, for tests that expect it.
    """

    def __init__(self, outcome: str, detail: str, kind: str | None = None, message: str | None = None):
        super().__init__(f"{outcome}: {detail}")
        detail = "".join(c if c.isprintable() else "?" for c in detail[:200])  # may be text from the program
        self.outcome = outcome
        self.detail = detail
        self.kind = kind
        self.message = detail if message is None else message


class Unsupported(Exception):
    """This tier cannot run the program or its tests. Says nothing about the program."""


def run_check(case: Check, run_tests) -> None:
    """Run test code in isolation from the program. run_tests(call) returns (passed, detail).

    It makes every request to the program with `call(function, *args)`, which returns the function's result.

    Raises Failed if a test fails, Unsupported if the tests never call the program or cannot run.
    """
    problems = []  # that the tests must not hide by catching exceptions
    calls = 0

    def call(function, *args):
        nonlocal calls
        calls += 1
        try:
            result = function(*args)
            if "nan" not in case.source and _has_nan(result):  # `not abs(nan - x) > 1e-6` is true
                raise Failed("failed", "the program returned nan")
            return result
        except Failed as failure:
            if failure.kind in (None, "SystemExit"):  # not an exception that a test may expect
                problems.append(failure)
            raise
        except Unsupported as error:
            problems.append(error)
            raise

    try:
        passed, detail = run_tests(call)
    except Unsupported:
        if problems:
            raise problems[0] from None
        raise
    if problems:
        raise problems[0]
    if not passed:
        raise Failed("failed", detail)
    if not calls:
        raise Unsupported("the tests never call the program")


def _has_nan(value) -> bool:
    if isinstance(value, (list, tuple, set, frozenset)):
        return any(map(_has_nan, value))
    if isinstance(value, dict):
        return any(map(_has_nan, value.values())) or any(map(_has_nan, value))
    return isinstance(value, (float, complex)) and value != value
