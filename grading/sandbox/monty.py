"""The first tier of the code sandbox: Monty, a Python interpreter in Rust without file, network or host access."""

import ast
import builtins
import importlib.util
import os
import secrets
import sys
import time
from contextlib import ExitStack, contextmanager, suppress

from grading.sandbox.cases import Check, Script, parse_python
from grading.sandbox.messages import MAX_MESSAGE_BYTES, MAX_NODES, PLAIN_EXCEPTIONS, error_message
from grading.sandbox.outcomes import TOO_SLOW, Failed, Unsupported, first_line, run_check
from grading.sandbox.tiers import MAX_STDOUT_BYTES, NICE

FAST_MEMORY_BYTES = 64 * 2**20  # filling more takes Monty longer than its time limit
SLOW_MEMORY_BYTES = 256 * 2**20
MAX_WORKERS = 64
MAX_RECURSION = 994  # as in the CPython of the sandbox


class Monty:
    """An interpreter in Rust without file, network or host access, in its own worker processes (pydantic-monty)."""

    name = "monty"

    def __init__(self):
        import pydantic_monty

        if importlib.util.find_spec("opentelemetry") is None:
            # Otherwise every call searches for it, which takes half of the time.
            sys.modules.setdefault("opentelemetry", None)
        self.monty = pydantic_monty
        self.pool = pydantic_monty.Monty(min_processes=1, max_processes=MAX_WORKERS, request_timeout=30.0).__enter__()

    def close(self) -> None:
        self.pool.__exit__(None, None, None)

    @contextmanager
    def open(self, code: str, seconds: float, slow: bool):
        """Yield a session in which the program has run. seconds: running time for all of its calls together."""
        with self._session(seconds, slow) as session:
            session.code = code
            session.run(code)
            yield session

    @contextmanager
    def _session(self, seconds: float, slow: bool):
        # The program cannot change these limits: time and memory of each feed, sleep, recursion depth.
        limits = {
            "max_feed_duration_secs": seconds,
            "max_memory": SLOW_MEMORY_BYTES if slow else FAST_MEMORY_BYTES,
            "max_total_sleep_secs": 0.1,  # for longer ones there is CPython
            "max_recursion_depth": MAX_RECURSION,
            "max_suspensions": 100_000,
        }
        try:
            with ExitStack() as stack:
                session = self._live_session(stack, limits, seconds)
                if hasattr(os, "setpriority") and (pid := session.session.worker_pid):
                    with suppress(OSError):  # only root can raise the priority again after a slow program
                        os.setpriority(os.PRIO_PROCESS, pid, NICE if slow else os.nice(0))
                yield session
        except self.monty.MontyCrashedError as error:
            raise Failed("timeout" if error.timed_out else "killed", first_line(error)) from None

    def _live_session(self, stack: ExitStack, limits: dict, seconds: float) -> "_MontySession":
        """Return a session in a worker that runs. Skip those that were killed while they were idle."""
        for worker in range(MAX_WORKERS + 1):
            with ExitStack() as attempt:
                try:
                    checkout = self.pool.checkout(limits=limits, assert_message_annotations=False)
                    session = _MontySession(self.monty, attempt.enter_context(checkout), seconds)
                    session.feed(_SETUP.replace("S_", session.secret))
                except self.monty.MontyCrashedError:
                    if worker == MAX_WORKERS:
                        raise
                    continue
                stack.push(attempt.pop_all())
                return session

    def check(self, case: Check, session, seconds: float, slow: bool) -> None:
        if case.in_place:
            raise Unsupported("Monty cannot change the arguments of a test")

        def run_tests(call):
            def remote(name):
                def call_program(*args, **kwargs):
                    try:
                        return call(_call_with_copies, session, case, name, args, kwargs)
                    except Failed as failure:
                        raise getattr(builtins, failure.kind or "RuntimeError")(failure.message) from None

                return call_program

            with self._session(seconds, slow) as tests:
                tests.code = case.source
                try:
                    tests.run(case.source, external_lookup={name: remote(name) for name in case.names})
                except Failed as failure:
                    if failure.outcome in ("timeout", "memory"):
                        return False, "the tests ran out of time or memory on the value that the program returned"
                    if failure.kind != "AssertionError":
                        raise Unsupported(f"Monty cannot run the tests: {failure.detail}") from None
                    return False, "the test failed"
            return True, ""

        run_check(case, run_tests)

    def run_script(self, code: str, case: Script, seconds: float, slow: bool) -> str:
        """Run the program as a script and return its standard output. It can read with input() only, not sys.stdin."""
        lines = iter(case.input.splitlines())
        prompts = []

        def read_line(prompt=""):
            prompts.extend([prompt] if prompt else [])
            for line in lines:
                return line
            raise EOFError("EOF when reading a line")

        with self._session(seconds, slow) as session:
            session.code = code
            try:
                session.run(code, external_lookup={"input": read_line})
            except Failed as failure:
                if failure.kind != "SystemExit" or failure.detail not in ("SystemExit", "SystemExit: 0"):
                    raise
            if prompts:
                raise Unsupported("Monty's input() does not print its prompt")
            return "".join(text for stream, text in session.printed.output if stream == "stdout")


def _call_with_copies(session: "_MontySession", case: Check, name: str, args: tuple, kwargs: dict):
    """Call a function of the program for a test. In CPython, tests may also pass functions and get objects."""
    for value in [*args, *kwargs.values()]:
        if isinstance(value, str) and value.startswith(_OBJECTS) or not isinstance(value, _PLAIN):
            raise Unsupported("Monty cannot pass a function or an object of the tests to the program")
    try:
        return session.call(name, args, kwargs)
    except Failed as failure:
        if failure.outcome == "bad_type" and case.uses_objects:
            raise Unsupported("Monty cannot pass an object of the program to the tests") from None
        raise


_OBJECTS = ("<function ", "<class ", "<module ", "<bound ", "<built-in ")  # Monty returns such an object as text
_PLAIN = (int, float, complex, str, bytes, bytearray, list, tuple, dict, set, frozenset, type(None))

# The results of Monty's own round() are not always the nearest decimals; those of formatting are.
_ROUND = """
S_round, S_float, S_type = round, float, type
def round(number, ndigits=None):
    if ndigits is None or S_type(number) is not S_float or ndigits < 0 or number - number != 0:
        return S_round(number) if ndigits is None else S_round(number, ndigits)
    return S_float(f"{number:.{ndigits}f}")
"""

# Code around a call, which returns the repr and the result, or neither if the repr is too long. S_ is replaced by a
# prefix that no program can guess, so that no program can overwrite these names.
_SETUP = "S_repr, S_len = repr, len"
_CALL = f"S_r = CALL\nS_t = S_repr(S_r)\n(S_t, S_r) if S_len(S_t) <= {MAX_MESSAGE_BYTES} else (None, None)"


class _MontySession:
    def __init__(self, monty, session, seconds: float):
        self.monty = monty
        self.session = session
        self.seconds_left = seconds
        self.code = ""
        self.secret = f"s{secrets.token_hex(8)}_"
        self.printed = monty.CollectStreams(MAX_STDOUT_BYTES)

    def run(self, code: str, **options) -> None:
        """Run a program or test code."""
        if "round" in code:
            self.feed(_ROUND.replace("S_", self.secret))
        self.feed(code, **options)

    def call(self, name: str, args: tuple, kwargs: dict | None = None):
        values = [f"kwargs_[{key!r}]" for key in kwargs or {}]
        arguments = ", ".join(["*args_", *(f"{key}={value}" for key, value in zip(kwargs or {}, values))])
        try:
            source = _CALL.replace("S_", self.secret).replace("CALL", f"{name}({arguments})")
            text, result = self.feed(source, inputs={"args_": list(args), "kwargs_": kwargs or {}})
            if text is None:
                raise Failed("output_limit", f"the result has more than {MAX_MESSAGE_BYTES} characters")
        except Failed as failure:
            if failure.detail == f"NameError: name '{name}' is not defined":
                raise Failed("missing_entry", f"the program does not define {name}") from None
            raise
        if not _is_plain(text, result):
            if self._holds_object(text, result):
                raise Failed("bad_type", f"the program did not return plain data: {text}")
            # Monty returns iterators, a Counter, a namedtuple or a range as other types.
            raise Unsupported(f"Monty does not keep the type of this result: {text[:80]}")
        return result

    def _holds_object(self, text: str, result) -> bool:
        """Return True if a result is or holds an instance of a class of the program, a function, or a class."""
        if isinstance(result, str):
            return text.startswith(_OBJECTS)
        values = [result]
        for value in values:
            if isinstance(value, (self.monty.MontyClassProxy, self.monty.MontyStdTypeProxy, type)):
                return True
            if isinstance(value, (list, tuple, set, frozenset, dict)) and len(values) < MAX_NODES:
                values += [*value, *value.values()] if isinstance(value, dict) else value
        return False

    def feed(self, code: str, **options):
        if self.seconds_left <= 0:
            raise Failed("timeout", TOO_SLOW)
        start = time.perf_counter()
        try:
            return self.session.feed_run(code, print_callback=self.printed, **options)
        except self.monty.MontySyntaxError as error:
            if _UNSUPPORTED_SYNTAX in str(error) or _is_python(code):
                raise Unsupported(first_line(error)) from None
            raise Failed("syntax", first_line(error)) from None
        except self.monty.MontyRuntimeError as error:
            cause = error.exception()
            if _is_unsupported(cause, self.code):
                raise Unsupported(first_line(error)) from None
            outcome = {TimeoutError: "timeout", MemoryError: "memory"}.get(type(cause), "crash")
            kind = type(cause).__name__ if type(cause).__name__ in {*PLAIN_EXCEPTIONS, "SystemExit"} else None
            kind = kind if outcome == "crash" else None
            raise Failed(outcome, first_line(error), kind, error_message(cause)) from None
        except self.monty.MontyCrashedError:
            raise
        except self.monty.MontyError as error:
            raise Failed("bad_type", first_line(error)) from None
        finally:
            self.seconds_left -= time.perf_counter() - start


def _is_plain(text: str, result) -> bool:
    """Return True if the result kept its type. Monty returns an iterator as a list, and a range or a function as text.

    text: the repr of the result inside Monty.
    """
    if any(word in text for word in ("inf", "nan", "frozenset", "bytearray")):  # not literals
        return not isinstance(result, str) or text[:1] in "'\""
    try:
        return _is_builtin(result) and (repr(result) == text or ast.literal_eval(parse_python(text, "eval")) == result)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return False


def _is_builtin(value) -> bool:
    """Return True if the repr of a value gives its type."""
    if type(value) in (list, tuple, set):
        return all(map(_is_builtin, value))
    if type(value) is dict:
        return all(map(_is_builtin, value)) and all(map(_is_builtin, value.values()))
    return type(value) in (int, float, complex, str, bytes, bool, type(None))


_UNSUPPORTED_SYNTAX = "The monty syntax parser does not yet support"  # in Monty's error for an unsupported construct


def _is_python(code: str) -> bool:
    try:
        return bool(parse_python(code))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def _is_unsupported(error: BaseException, code: str) -> bool:
    """Return True if Monty lacks what the program uses. A program that names the exception may have raised it."""
    text = str(error)
    if type(error).__name__ in code:
        return False
    if isinstance(error, NotImplementedError) or "not yet supported" in text:
        return True
    if "sleep limit exceeded" in text:
        return True
    quoted = text.split("'")[1::2]  # 'str' object has no attribute 'x'; No module named 'x'; name 'x' is not defined
    if isinstance(error, ImportError):
        name, module = (quoted[0], quoted[1]) if text.startswith("cannot import name") else ("", "".join(quoted[:1]))
        if module.split(".")[0] not in sys.stdlib_module_names:
            return False
        return not name or module not in sys.modules or hasattr(sys.modules[module], name)
    if isinstance(error, AttributeError) and quoted[:1] == ["function"]:
        return True
    if isinstance(error, AttributeError) and len(quoted) == 2:
        module, _, name = quoted[0].rpartition(".")
        owner = getattr(sys.modules.get(module or "builtins"), name, sys.modules.get(quoted[0]))
        return hasattr(owner, quoted[1])
    return isinstance(error, NameError) and bool(quoted) and hasattr(builtins, quoted[0])
