"""The first tier of the code sandbox: Monty, an interpreter in Rust without files, network or host access."""

import ast
import builtins
import importlib.util
import os
import secrets
import sys
import time
from contextlib import contextmanager, suppress

from grading.sandbox.cases import Check, Script
from grading.sandbox.messages import MAX_MESSAGE_BYTES
from grading.sandbox.tiers import MAX_STDOUT_BYTES, NICE, TOO_SLOW, Failed, Unsupported, check_with, first_line
from grading.sandbox.zygote import PLAIN_EXCEPTIONS

FAST_MEMORY_BYTES = 64 * 2**20  # filling more takes Monty over its time
SLOW_MEMORY_BYTES = 256 * 2**20


class Monty:
    """An interpreter in Rust without files, network or host access, in worker processes of its own (pydantic-monty)."""

    name = "monty"

    def __init__(self):
        import pydantic_monty

        if importlib.util.find_spec("opentelemetry") is None:
            sys.modules.setdefault("opentelemetry", None)  # else it is searched for in every call, half of the time
        self.monty = pydantic_monty
        self.pool = pydantic_monty.Monty(min_processes=1, max_processes=64, request_timeout=30.0).__enter__()

    def close(self) -> None:
        self.pool.__exit__(None, None, None)

    @contextmanager
    def open(self, code: str, seconds: float, slow: bool):
        """A session in which the program has run. seconds: of running time, for all of its calls together."""
        with self._session(seconds, slow) as session:
            session.code = code
            session.feed(_BEFORE.replace("S_", session.secret))
            session.feed(code)
            yield session

    @contextmanager
    def _session(self, seconds: float, slow: bool):
        # Not to be set from within: time and memory of each feed, sleep, depth.
        limits = {
            "max_feed_duration_secs": seconds,
            "max_memory": SLOW_MEMORY_BYTES if slow else FAST_MEMORY_BYTES,
            "max_total_sleep_secs": 0.1,
            "max_recursion_depth": 500,
            "max_suspensions": 100_000,
        }
        try:
            with self.pool.checkout(limits=limits, assert_message_annotations=False) as session:
                if hasattr(os, "setpriority") and (pid := session.worker_pid):
                    with suppress(OSError):  # a worker that was slow once stays so where only root may undo it
                        os.setpriority(os.PRIO_PROCESS, pid, NICE if slow else os.nice(0))
                yield _MontySession(self.monty, session, seconds)
        except self.monty.MontyCrashedError as error:
            raise Failed("timeout" if error.timed_out else "killed", first_line(error)) from None

    def check(self, case: Check, session, seconds: float, slow: bool) -> None:
        def run_tests(case, call):
            def remote(name):
                def ask(*args, **kwargs):
                    try:
                        return call(name, args, kwargs)
                    except Failed as failure:
                        raise getattr(builtins, failure.kind or "RuntimeError")(failure.detail) from None

                return ask

            with self._session(seconds, slow) as tests:
                tests.code = case.source
                try:
                    tests.feed(case.source, external_lookup={name: remote(name) for name in case.names})
                except Failed as failure:
                    if failure.outcome in ("timeout", "memory"):
                        return False, "the tests took too long with what the program returned"
                    if failure.kind != "AssertionError":
                        raise Unsupported(f"the tests do not run here: {failure.detail}") from None
                    return False, "the test failed"
            return True, ""

        check_with(session, case, run_tests)

    def run_script(self, code: str, case: Script, seconds: float, slow: bool) -> str:
        """The program's standard output. It reads with input() only: there is no sys.stdin."""
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
                session.feed(code, external_lookup={"input": read_line})
            except Failed as failure:
                if failure.kind != "SystemExit" or failure.detail not in ("SystemExit", "SystemExit: 0"):
                    raise
            if prompts:
                raise Unsupported("input() does not print its prompt here")
            return "".join(text for stream, text in session.printed.output if stream == "stdout")


# Around a call: its result comes with its repr, and not at all where that is long. S_ stands for a prefix that no program
# can guess, so that none overwrites these names.
_BEFORE = "S_repr, S_len = repr, len"
_CALL = f"S_r = CALL\nS_t = S_repr(S_r)\n(S_t, S_r) if S_len(S_t) <= {MAX_MESSAGE_BYTES} else (None, None)"


class _MontySession:
    def __init__(self, monty, session, seconds: float):
        self.monty, self.session, self.left = monty, session, seconds
        self.code, self.secret = "", f"s{secrets.token_hex(8)}_"
        self.printed = monty.CollectStreams(MAX_STDOUT_BYTES)

    def call(self, name: str, args: tuple, kwargs: dict | None = None):
        names = [f"kwargs_[{key!r}]" for key in kwargs or {}]
        given = ", ".join(["*args_", *(f"{key}={value}" for key, value in zip(kwargs or {}, names))])
        try:
            source = _CALL.replace("S_", self.secret).replace("CALL", f"{name}({given})")
            text, result = self.feed(source, inputs={"args_": list(args), "kwargs_": kwargs or {}})
            if text is None:
                raise Failed("output_limit", f"the result has over {MAX_MESSAGE_BYTES} characters")
        except Failed as failure:
            if failure.detail == f"NameError: name '{name}' is not defined":
                raise Failed("missing_entry", f"the program does not define {name}") from None
            raise
        if not _is_plain(text, result):
            if type(result) in (list, dict, str):  # as which Monty hands over iterators, a Counter, a range
                raise Unsupported(f"a result of this kind cannot be told apart here: {text[:80]}")
            raise Failed("bad_type", f"no plain data came back: {text}")
        return result

    def feed(self, code: str, **more):
        if self.left <= 0:
            raise Failed("timeout", TOO_SLOW)
        started = time.perf_counter()
        try:
            return self.session.feed_run(code, print_callback=self.printed, **more)
        except self.monty.MontySyntaxError as error:
            if _MONTY_LACKS in str(error):
                raise Unsupported(first_line(error)) from None
            raise Failed("syntax", first_line(error)) from None
        except self.monty.MontyRuntimeError as error:
            cause = error.exception()
            if _is_lacking(cause, self.code):
                raise Unsupported(first_line(error)) from None
            outcome = {TimeoutError: "timeout", MemoryError: "memory"}.get(type(cause), "crash")
            kind = type(cause).__name__ if type(cause).__name__ in {*PLAIN_EXCEPTIONS, "SystemExit"} else None
            raise Failed(outcome, first_line(error), kind if outcome == "crash" else None) from None
        except self.monty.MontyCrashedError:
            raise
        except self.monty.MontyError as error:
            raise Failed("bad_type", first_line(error)) from None
        finally:
            self.left -= time.perf_counter() - started


def _is_plain(text: str, result) -> bool:
    """Whether a result came over as what it was: Monty hands over an iterator as a list, a range or a function as text.

    text: its repr inside.
    """
    if any(word in text for word in ("inf", "nan", "frozenset", "bytearray")):  # no literals
        return not isinstance(result, str) or text[:1] in "'\""
    try:
        return ast.literal_eval(text) == result
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return False


_MONTY_LACKS = "The monty syntax parser does not yet support"  # how Monty refuses a construct


def _is_lacking(error: BaseException, code: str) -> bool:
    """Whether Monty lacks what an honest program uses. A program that names the exception may have raised it itself."""
    text = str(error)
    if type(error).__name__ in code:
        return False
    if isinstance(error, NotImplementedError) or "not yet supported" in text:
        return True
    quoted = text.split("'")[1::2]  # 'str' object has no attribute 'x'; No module named 'x'; name 'x' is not defined
    if isinstance(error, ImportError):
        return bool(quoted) and (quoted[0].split(".")[0] in sys.stdlib_module_names)
    if isinstance(error, AttributeError) and len(quoted) == 2:
        module, _, name = quoted[0].rpartition(".")
        owner = getattr(sys.modules.get(module or "builtins"), name, sys.modules.get(quoted[0]))
        return hasattr(owner, quoted[1])
    return isinstance(error, NameError) and bool(quoted) and hasattr(builtins, quoted[0])
