"""The code sandbox: code extraction, forms of tests, comparison, and the catalogue of hostile and honest programs."""

import json
import math
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import NamedTuple

import pytest
from hostile import FAMILIES, HONEST, HOSTILE
from hostile.case import RIGHT, TESTS
from hostile.host import Host
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grading import Completion, RewardError, Ungraded, check_tests, extract_code, grade_code, sandbox
from grading.sandbox import tiers
from grading.sandbox.cases import Call, Check, Script, parse_tests
from grading.sandbox.code_grader import compare_output, is_same
from grading.sandbox.messages import NotPlain, decode, encode
from grading.sandbox.workers import WorkerError, run_in_worker

TIERS = ("monty", "bubblewrap")
WALL_SECONDS = 3.5  # limit for each verdict: 3 s at the default code_timeout, and a margin


# --- the catalogue


class Verdict(NamedTuple):
    score: float | None  # None: ungraded
    outcome: str
    reason: str
    seconds: float


def judge(case, host) -> Verdict:
    if case.previous:
        with suppress(Ungraded):
            grade(case.previous, host)
    start = time.perf_counter()
    options = {"entry_point": case.entry_point, "setup": case.setup, "starter": case.starter, "timeout": case.timeout}
    try:
        score, reason = grade(case.answer, host, case.tests or TESTS, **options)
    except Ungraded as error:
        score, reason = None, str(error)
    return Verdict(score, reason.split(":")[0], reason, time.perf_counter() - start)


def grade(text: str, host, tests=TESTS, **options) -> tuple[float, str]:
    text = host.fill(text)
    answer = Completion("", text, {}).answer if "<think>" in text else text
    return grade_code(answer, tests, **options)


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    with Host(tmp_path_factory.mktemp("home")) as host:
        yield host


@pytest.fixture(scope="module")
def verdicts(host, request):
    """Return a function tier -> {case: Verdict}. It grades the selected cases once in each tier, two at a time."""
    items = [item for item in request.session.items if hasattr(item, "callspec")]
    selected = {item.callspec.params["case"] for item in items if "case" in item.callspec.params}
    cases = [case for case in [*HOSTILE, *HONEST] if case in selected]
    results = {}

    def grade_in_tier(tier):
        skip_without(tier)
        if tier not in results:
            with sandbox.use_only_tier(tier), ThreadPoolExecutor(2) as pool:
                results[tier] = dict(zip(cases, pool.map(lambda case: judge(case, host), cases)))
        return results[tier]

    return grade_in_tier


def skip_without(tier):
    if tier not in sandbox.available():
        pytest.skip(f"no tier {tier} here: {sandbox.describe()}")


@pytest.mark.parametrize("case", HOSTILE, ids=str)
@pytest.mark.parametrize("tier", TIERS)
def test_hostile_program_scores_zero(tier, case, verdicts):
    verdict = verdicts(tier)[case]
    assert verdict.score == 0 or (tier == "monty" and verdict.outcome == "unsupported"), verdict
    allowed = case.monty if tier == "monty" else case.outcome
    assert not allowed or verdict.outcome in allowed.split("|"), verdict
    assert verdict.seconds < WALL_SECONDS, verdict
    assert verdict.reason.isprintable() and len(verdict.reason) < 1000, verdict  # it is printed and written to files


@pytest.mark.parametrize("case", HONEST, ids=str)
@pytest.mark.parametrize("tier", TIERS)
def test_honest_program_passes(tier, case, verdicts):
    verdict = verdicts(tier)[case]
    allowed = (case.monty or "passed|unsupported") if tier == "monty" else case.outcome
    assert verdict.outcome in allowed.split("|"), verdict
    assert verdict.score == (1.0 if verdict.outcome == "passed" else None)
    assert verdict.seconds < WALL_SECONDS, verdict


@pytest.mark.parametrize("tier", TIERS)
def test_hostile_programs_leave_no_traces_and_an_intact_grader(tier, verdicts, host):
    verdicts(tier)
    assert host.traces() == []
    with sandbox.use_only_tier(tier):
        for _ in range(3):
            assert grade_code(RIGHT, TESTS)[0] == 1.0
            assert grade_code(RIGHT.replace("4", "5"), TESTS)[0] == 0.0


def test_catalogue_is_complete():
    assert len(HOSTILE) >= 105 and len(HONEST) >= 10 and len(FAMILIES) >= 10
    names = [str(case) for case in [*HOSTILE, *HONEST]]
    assert len(set(names)) == len(names)


def test_honest_programs_pass_next_to_hostile_ones(host):
    """A program that dies, floods or fills the folder does not change the verdict of one that runs at the same time."""
    neighbours = [case for case in HOSTILE if case.family in ("neighbours", "forging the channel", "processes")]
    honest = [case for case in HONEST if case.score == 1 and not case.previous and case.monty == "unsupported"]
    if "bubblewrap" not in sandbox.available():
        honest = [case for case in HONEST if case.monty == "passed"]
    cases = [case for pair in zip(neighbours, honest * len(neighbours)) for case in pair]
    with ThreadPoolExecutor(8) as pool:
        verdicts = list(pool.map(lambda case: judge(case, host), cases))
    assert [v for case, v in zip(cases, verdicts) if v.score != case.score and v.outcome != "unsupported"] == []
    assert [v for case, v in zip(cases, verdicts) if case.score == 1 and v.score != 1] == []


# --- the program in an answer


@pytest.mark.parametrize(
    "answer, code",
    [
        ("def f(x):\n    return x", "def f(x):\n    return x"),
        ("Here:\n```python\na = 1\n```\nbye", "a = 1"),
        ("```\na = 1\n```\nor\n```py\nb = 2\n```", "b = 2"),
        ("```python\na = 1", "a = 1"),  # not closed
        ("```python3\ndef f(x): return x\n```\nFor example:\n```text\n>>> f(1)\n1\n```\nDone.", "def f(x): return x"),
        ("```python\ndef f(x): return x\n```\n```\nf(1)\n```", "def f(x): return x"),
        ("", ""),
    ],
)
def test_extracts_code(answer, code):
    assert extract_code(answer) == code


def test_code_is_extracted_in_linear_time():
    start = time.perf_counter()
    for text in ("```" + " " * 300_000, "```\n" * 100_000, "`" * 300_000):
        extract_code(text)
    assert time.perf_counter() - start < 2


# --- verdicts


def test_right_and_wrong_programs():
    score, reason = grade_code(RIGHT, TESTS)
    assert (score, reason.split(":")[0]) == (1.0, "passed")
    assert grade_code("def f(x):\n    return x + 4 * 3", TESTS) == (0.0, "failed: test 1 of 2: f(3) gave 15")
    assert grade_code("", TESTS)[0] == 0.0


def test_program_that_monty_cannot_run_is_ungraded_there_and_runs_in_bubblewrap():
    programs = "def f(x):\n    yield x\n", "import heapq\ndef f(x):\n    return 21"
    with sandbox.use_only_tier("monty"):
        for program in programs:
            with pytest.raises(Ungraded, match="unsupported.*cannot run"):
                grade_code(program, TESTS)
    skip_without("bubblewrap")
    assert [grade_code(program, ["assert f(3) == 21"])[0] for program in programs] == [0.0, 1.0]


@pytest.mark.parametrize(
    "error",
    [
        "NotImplementedError('The monty syntax parser does not yet support yield expressions')",
        "ImportError(\"No module named 'heapq'\")",
    ],
)
def test_program_cannot_declare_itself_ungraded(error):
    with sandbox.use_only_tier("monty"):
        assert grade_code(f"def f(x):\n    raise {error}", TESTS)[0] == 0.0


def test_names_a_missing_tier():
    with pytest.raises(ValueError, match="tier docker is not available"), sandbox.use_only_tier("docker"):
        pass


WITHOUT_BUBBLEWRAP = """
import shutil
which, shutil.which = shutil.which, lambda name: None if name == "bwrap" else which(name)
from grading import Ungraded, grade_code, sandbox
program, tests = "import heapq\\ndef f(x):\\n    return heapq.nsmallest(1, [x])", ["assert f(3) == [3]"]
print(*sandbox.available(), "|", sandbox.describe())
try:
    print(grade_code(program, tests))
except Ungraded as error:
    print(error)
sandbox.start(unsafe=True)
print(*sandbox.available(), "|", sandbox.describe())
print(grade_code(program, tests))
"""


def test_without_bubblewrap_nothing_runs_unprotected_unless_unsafe_is_set():
    """The command bwrap is hidden, in a separate process."""
    command = [sys.executable, "-c", WITHOUT_BUBBLEWRAP]
    default_tiers, ungraded, unsafe_tiers, graded = subprocess.check_output(command, text=True).splitlines()
    assert default_tiers.startswith("monty | ") and "not installed" in default_tiers
    assert ungraded.startswith("unsupported")
    assert unsafe_tiers.startswith("monty unprotected | ") and "UNPROTECTED" in unsafe_tiers
    assert graded.startswith("(1.0, 'passed")


def test_rejects_a_sandbox_that_does_not_isolate(monkeypatch):
    skip_without("bubblewrap")
    monkeypatch.setattr(tiers, "start_in_bubblewrap", tiers.start_unprotected)
    tier, reason = tiers.find_bubblewrap()
    assert tier is None and "a program could" in reason and "read the password file" in reason


def test_code_timeout_limits_the_running_time():
    sandbox.start(code_timeout=0.2)
    try:
        start = time.perf_counter()
        assert grade_code("def f(x):\n    while True: pass", TESTS)[1].startswith("timeout")
        assert time.perf_counter() - start < 1.5
    finally:
        sandbox.start()


def test_counts_the_tier_that_decided_the_verdict():
    before = sandbox.graded_by_tier["monty"]
    grade_code(RIGHT, TESTS)
    assert sandbox.graded_by_tier["monty"] == before + 1


# --- plain data and comparison


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5)
    | st.binary(max_size=5)
)
KEYS = st.integers() | st.text(max_size=5) | st.booleans() | st.none()
PLAIN = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=4)
        | st.sets(KEYS, max_size=4)
    ),
    max_leaves=12,
)


JSON = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
TAGS = ["tuple", "set", "frozenset", "dict", "bytes", "bytearray", "complex", "iterator"]


@given(PLAIN)
def test_plain_data_is_unchanged_by_encoding(value):
    assert is_same(decode(json.loads(json.dumps(encode(value)))), value)


@pytest.mark.parametrize("tier", TIERS)
def test_plain_values_pass_through_a_program(tier):
    skip_without(tier)

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(PLAIN)
    def check(value):
        assert grade_code("def f(x):\n    return x", [f"assert f({value!r}) == {value!r}"])[0] == 1.0

    with sandbox.use_only_tier(tier):
        check()


@given(
    st.recursive(
        JSON,
        lambda v: st.lists(v) | st.dictionaries(st.sampled_from(TAGS) | st.text(max_size=3), v, max_size=2),
        max_leaves=20,
    )
)
def test_decodes_any_json_or_raises_not_plain(value):
    """A forged message may hold any JSON value."""
    try:
        decode(value)
    except NotPlain:
        pass


@pytest.mark.parametrize(
    "result, expected, same",
    [
        (1, 1, True), (1, True, False), (1, 1.0, True), (1.0 + 1e-8, 1.0, True), (1.001, 1.0, False), (10**400, 1.0, False),
        (2**60 + 1, 2**60, False), (math.nan, math.nan, False), ("a", "a", True), ([1, 2], (1, 2), False),
        ([1, [2.0]], [1, [2]], True), ([True], [1], False), ({"a": 1}, {"a": 1}, True), ({"a": True}, {"a": 1}, False),
        ({1, 2}, {2, 1}, True), ({1}, {True}, False), ({1: 1}, {True: 1}, False), (None, None, True), (None, 0, False),
        (object, object, False), (2.0, 2, True), (math.inf, math.inf, True), (math.inf, 1e308, False), (-0.0, 0, True),
        (1 + 1e-9j, 1 + 0j, True), (1 + 1j, 1 + 0j, False), (b"a", "a", False), (frozenset({1}), {1}, False),
    ],
)  # fmt: skip
def test_is_same_compares_types_and_values(result, expected, same):
    assert is_same(result, expected) is same


@pytest.mark.parametrize(
    "output, expected, same",
    [
        ("1 2\n", "1 2", True), ("1 2", "1 2\n\n", True), ("1  2 \n", "1 2\n", True), ("1\n2", "1 2", False), ("1", "1\n2", False),
        ("1\n2\n3", "1\n2", False), ("", "1", False), ("0.33333333", "0.3333333", True), ("0.334", "0.333", False),
        ("1000000001", "1000000000", False), ("yes", "YES", False), ("nan", "0.5", False), ("1_0.0", "10.0", False),
        ("inf", "1e999", False), ("0.5.", "0.5", False), ("\u0661.0", "1.0", False), ("2", "2.0", True),
    ],
)  # fmt: skip
def test_compare_output(output, expected, same):
    assert (compare_output(output, expected) == "") is same


# --- the tests of a row


def test_parses_the_forms_of_tests():
    calls = parse_tests(["assert f(1, [2]) == 3\nassert g('a') == (1,)"])
    assert calls == (Call("f", (1, [2]), 3), Call("g", ("a",), (1,)))
    (check,) = parse_tests(["import math\nassert math.isclose(f(1), 2.5)"])
    assert isinstance(check, Check) and check.names == ("f",)
    assert parse_tests([{"args": [1, 2], "expected": [3]}], "f") == (Call("f", (1, 2), [3]),)
    assert parse_tests([{"input": "1\n", "output": "2\n"}]) == (Script("1\n", "2\n"),)
    simple = parse_tests("def check(candidate):\n    assert candidate(1) == 2\n", "f")
    assert simple == (Call("f", (1,), 2),)
    (check,) = parse_tests("def check(candidate):\n    for i in range(3):\n        assert candidate(i) == i\n", "f")
    assert isinstance(check, Check) and check.names == ("f",)


def test_refuses_tests_that_cannot_run_or_fail():
    for bad in ((), ("",), ("f(3) == 2",), ("assert (",), ("assert 1 == 1",), ("x = 1",), "", "assert True", 5, None):
        with pytest.raises(ValueError):
            parse_tests(bad)
    for bad in (
        "def check(candidate):\n    pass\n",
        "def check():\n    assert f(1)\n",
        "def check(c):\n    assert 1\n",
    ):
        with pytest.raises(ValueError):
            parse_tests(bad, "f")
    with pytest.raises(ValueError, match="entry_point"):
        parse_tests("def check(candidate):\n    assert candidate(1) == 2\n")
    with pytest.raises(ValueError, match="entry_point"):
        parse_tests([{"args": [1], "expected": 2}])
    for bad in ({"args": [1]}, {"input": "1"}, {"input": 1, "output": "1"}, {}):
        with pytest.raises(ValueError):
            parse_tests([bad], "f")
    with pytest.raises(RewardError, match="row 7, column tests"):
        check_tests([{"id": 7, "tests": ["f(3)"]}])
    with pytest.raises(RewardError, match="row 8, column tests.*empty"):
        check_tests([{"id": 8, "tests": []}])
    check_tests([{"id": 9, "answer": "1", "tests": None}, {"id": 10}])


# --- functions in worker processes


def test_run_in_worker():
    assert run_in_worker("builtins:sorted", [3, 1, 2]) == [1, 2, 3]
    with pytest.raises(WorkerError, match="ValueError"):
        run_in_worker("builtins:int", "x")
    with pytest.raises(WorkerError):
        run_in_worker("os:getcwdb")  # bytes are not JSON
    with pytest.raises(WorkerError):
        run_in_worker("operator:mul", [0], 10**10)  # 80 GB
    with pytest.raises(WorkerError):
        run_in_worker("os:fork")
    with pytest.raises(WorkerError):
        run_in_worker("os:_exit", 0)
    start = time.perf_counter()
    with pytest.raises(TimeoutError, match="time:sleep"):
        run_in_worker("time:sleep", 60, timeout=0.3)
    assert time.perf_counter() - start < 1
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda i: run_in_worker("builtins:abs", -i), range(40))) == list(range(40))
