"""Where a model's program runs: Monty, or CPython in a locked-down process, as a rule inside bubblewrap.

A tier opens a *session* for a program. The session calls the program's functions with plain data and returns plain data;
what goes wrong is a `Failed` with an outcome. Nothing here knows an expected answer but `check`, whose tests run in a
sandbox of their own and see the program's functions only from afar.
"""

import atexit
import math
import os
import platform
import shutil
import signal
import sys
import tempfile
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from grading.sandbox.cases import Check, Script
from grading.sandbox.messages import NotPlain, decode, encode
from grading.sandbox.workers import WorkerError, Zygote, wait_for_output
from grading.sandbox.zygote import PLAIN_EXCEPTIONS

FAILURES = {"timeout", "memory", "crash", "syntax", "missing_entry", "bad_type", "output_limit"}  # that may be reported
TOO_SLOW = "the program took longer than code_timeout allows"
MAX_STDOUT_BYTES = 256 * 1024
TEMPORARY_BYTES = 16 * 2**20
MAX_IDLE = 16  # servers kept for the next programs
WALL_FACTOR = 3  # wall time that a program gets for each second of its running time
NICE = 5  # of what runs long: a third of the processor time of a program that ends at once
PRELOAD = (
    "math", "cmath", "re", "random", "string", "itertools", "functools", "operator", "collections", "heapq", "bisect",
    "statistics", "fractions", "decimal", "datetime", "json", "copy", "dataclasses", "enum", "typing", "textwrap",
    "hashlib", "tempfile", "threading", "queue", "array",
)  # fmt: skip


class Failed(Exception):
    """The program failed: `outcome` is a word such as timeout, crash or bad_type; `kind` a built-in exception it raised."""

    def __init__(self, outcome: str, detail: str, kind: str | None = None):
        super().__init__(f"{outcome}: {detail}")
        detail = "".join(c if c.isprintable() else "?" for c in detail[:200])  # it may be the program's own text
        self.outcome, self.detail, self.kind = outcome, detail, kind


class Unsupported(Exception):
    """This tier cannot run the program or its tests, which says nothing about the program."""


def check_with(session, case: Check, run_tests) -> None:
    """Run test code apart from the program. run_tests(case, call) returns (passed, detail); `call` asks the program.

    Raises Failed where a test fails, Unsupported where the tests never ask the program.
    """
    failures, calls = [], 0

    def call(name, args, kwargs):
        nonlocal calls
        calls += 1
        try:
            result = session.call(name, args, kwargs)
            if "nan" not in case.source and _has_nan(result):  # `not abs(nan - x) > 1e-6` holds
                raise Failed("failed", "the program returned nan")
            return result
        except Failed as failure:
            if failure.kind in (None, "SystemExit"):  # not an exception that a test may expect
                failures.append(failure)
            raise

    try:
        passed, detail = run_tests(case, call)
    except Unsupported:
        if failures:
            raise failures[0] from None
        raise
    if failures:
        raise failures[0]
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


# --- CPython in a process of its own


class Process:
    """CPython in locked-down children of a server process, which as a rule lives in bubblewrap.

    One server runs one program at a time, so that no program meets another; what it leaves in its folder is removed
    before the next one, and where that is doubtful the server is remade.
    """

    def __init__(self, name: str, make_zygote):
        self.name, self.make_zygote = name, make_zygote
        self.idle = {"program": [], "tester": []}  # servers without a job; testers never share one with programs
        self.lock = threading.Lock()

    def close(self) -> None:
        with self.lock:
            for zygote in [*self.idle["program"], *self.idle["tester"]]:
                zygote.close()
            self.idle = {"program": [], "tester": []}

    @contextmanager
    def child(self, kind: str, seconds: float, slow: bool, stdio: tuple[int, int] | tuple = ()):
        """A child of a server that is nobody else's meanwhile. Yields (child, deadline)."""
        role = "tester" if kind == "tester" else "program"
        zygote = child = None
        healthy = False
        try:
            while child is None:
                with self.lock:
                    idle = self.idle[role].pop() if self.idle[role] else None
                zygote = idle or self.make_zygote()
                try:
                    child = zygote.spawn(kind, math.ceil(seconds), NICE if slow else 0, stdio)
                except WorkerError:  # an idle server may have died meanwhile
                    if not idle:
                        raise
            yield child, time.monotonic() + seconds * (WALL_FACTOR if slow else 1)
            healthy = True
        except (Failed, Unsupported):
            healthy = True
            raise
        finally:
            if child:
                try:
                    healthy = child.end()["clean"] and healthy
                except (TimeoutError, ValueError, OSError):
                    healthy = False
            if zygote and healthy:
                self._put_back(role, zygote)
            elif zygote:
                zygote.close()
                threading.Thread(target=self._replace, args=(role,), daemon=True).start()

    def _put_back(self, role: str, zygote: Zygote) -> None:
        with self.lock:
            if len(self.idle[role]) < MAX_IDLE:
                self.idle[role].append(zygote)
                return
        zygote.close()

    def _replace(self, role: str) -> None:
        """Make a server in place of one that was closed, so that no program has to wait for it."""
        with suppress(WorkerError, RuntimeError, OSError):  # the whole process may be about to end
            self._put_back(role, self.make_zygote())

    @contextmanager
    def open(self, code: str, seconds: float, slow: bool):
        """A session in which the program has run. seconds: of processor time; of wall time three times as much."""
        with self.child("program", seconds, slow) as (child, deadline):
            session = _ProcessSession(child, deadline, seconds)
            session.ask({"run": code})
            yield session

    def check(self, case: Check, session, seconds: float, slow: bool) -> None:
        def run_tests(case, call):
            with self.child("tester", seconds, slow) as (tester, deadline):
                answer = _ask(tester, {"check": case.source, "names": case.names}, deadline)
                while "call" in answer:
                    try:
                        args = [decode(a) for a in answer["args"]]
                        kwargs = {k: decode(v) for k, v in answer["kwargs"].items()}
                    except NotPlain as error:
                        raise Unsupported(str(error)) from None
                    try:
                        reply = {"ok": encode(call(answer["call"], args, kwargs))}
                    except NotPlain as error:
                        raise Failed("bad_type", str(error)) from None
                    except Failed as failure:
                        reply = {"error": failure.outcome, "detail": failure.detail, "type": failure.kind}
                    try:
                        answer = _ask(tester, reply, deadline)
                    except Unsupported:  # what the program returned was too much for the tests
                        raise Failed("failed", "the tests broke off at what the program returned") from None
                return answer.get("passed") is True, str(answer.get("detail", ""))

        check_with(session, case, run_tests)

    def run_script(self, code: str, case: Script, seconds: float, slow: bool) -> str:
        """The program's standard output."""
        read_end, write_end = os.pipe()
        child = None
        try:
            with tempfile.TemporaryFile() as stdin:
                stdin.write(case.input.encode("utf-8", "replace"))
                stdin.seek(0)
                with self.child("script", seconds, slow, (stdin.fileno(), write_end)) as (child, deadline):
                    os.close(write_end)
                    write_end = None
                    try:
                        with suppress(EOFError):  # the program has run before we were done asking
                            child.request({"run": code}, deadline, reply=False)
                        output = wait_for_output(read_end, deadline, MAX_STDOUT_BYTES)
                        raise _failure(child.request(None, deadline))
                    except EOFError:  # it has ended
                        pass
                    except TimeoutError:
                        raise Failed("timeout", TOO_SLOW) from None
                    except ValueError as error:
                        raise Failed("output_limit", str(error)) from None
            if child.ended["exit"] != 0:
                raise Failed(*_ending(child.ended, seconds))
            return output.decode("utf-8", "replace")
        finally:
            os.close(read_end)
            if write_end is not None:
                os.close(write_end)


class _ProcessSession:
    def __init__(self, child, deadline: float, seconds: float):
        self.child, self.deadline, self.seconds = child, deadline, seconds  # seconds: of processor time

    def call(self, name: str, args, kwargs: dict | None = None):
        try:
            message = {
                "call": name,
                "args": [encode(a) for a in args],
                "kwargs": {k: encode(v) for k, v in (kwargs or {}).items()},
            }
        except NotPlain as error:
            raise Unsupported(f"the tests pass what cannot travel: {error}") from None
        answer = self.ask(message)
        try:
            return decode(answer["ok"])
        except (NotPlain, KeyError, RecursionError):
            raise Failed("bad_type", "no plain data came back") from None

    def ask(self, message: dict) -> dict:
        try:
            answer = self.child.request(message, self.deadline)
        except TimeoutError:
            raise Failed("timeout", TOO_SLOW) from None
        except EOFError:
            raise Failed(*_ending(self.child.end(), self.seconds)) from None
        except ValueError as error:
            raise Failed("output_limit", str(error)) from None
        if not isinstance(answer, dict):
            raise Failed("bad_type", "no plain data came back")
        if "error" in answer:
            raise _failure(answer)
        return answer


def _failure(answer) -> Failed:
    """The failure that a program's process reports; the program may have written the report itself."""
    answer = answer if isinstance(answer, dict) else {}
    outcome, kind = answer.get("error"), answer.get("type")
    outcome = outcome if isinstance(outcome, str) and outcome in FAILURES else "crash"
    kind = kind if isinstance(kind, str) and kind in PLAIN_EXCEPTIONS else None
    return Failed(outcome, str(answer.get("detail", "")), kind)


def _ending(ended: dict, seconds: float) -> tuple[str, str]:
    """Outcome and detail of a program that ended its process."""
    if (
        ended["exit"] == -signal.SIGKILL and ended["cpu"] >= seconds / 2
    ):  # killed by its limit; the clocks differ a little
        return "timeout", TOO_SLOW
    how = f"signal {-ended['exit']}" if ended["exit"] < 0 else f"exit status {ended['exit']}"
    outcome = "killed" if ended["exit"] == -signal.SIGKILL else "crash"
    return outcome, f"the program ended its process ({how})"


def _ask(tester, message: dict, deadline: float) -> dict:
    try:
        answer = tester.request(message, deadline)
    except TimeoutError:
        raise Failed("timeout", "the tests took too long with this program") from None
    except (EOFError, ValueError):
        raise Unsupported("the tests ended their process") from None
    if not isinstance(answer, dict):
        raise Unsupported("the tests gave no verdict")
    return answer


BUBBLEWRAP_OPTIONS = """
--unshare-user --unshare-all --hostname sandbox --uid 1000 --gid 1000 --die-with-parent --new-session --cap-drop ALL
--clearenv --setenv PATH /usr/bin --setenv HOME /tmp --setenv TMPDIR /tmp --setenv LANG C.UTF-8 --setenv PYTHONHASHSEED 0
--ro-bind /usr /usr
"""


def in_bubblewrap() -> Zygote:
    """A server process inside bubblewrap: no network, no files but /usr and the interpreter, an own process table."""
    here = Path(__file__).parent
    prefixes = {os.path.realpath(p) for p in (sys.base_prefix, sys.base_exec_prefix)} | {sys.base_prefix}
    command = ["bwrap", *BUBBLEWRAP_OPTIONS.split()]
    for name in ("lib", "lib64", "lib32", "bin"):
        if os.path.islink(f"/{name}"):
            command += ["--symlink", os.readlink(f"/{name}"), f"/{name}"]
        elif os.path.isdir(f"/{name}"):
            command += ["--ro-bind", f"/{name}", f"/{name}"]
    for prefix in sorted(prefixes):
        if not prefix.startswith("/usr/") and prefix != "/usr":
            command += ["--ro-bind", prefix, prefix]
    for device in ("null", "zero", "urandom", "random"):
        command += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
    for name in ("zygote.py", "messages.py", "lockdown.py"):
        command += ["--ro-bind", str(here / name), f"/ponder/{name}"]
    command += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    command += ["--size", str(TEMPORARY_BYTES), "--tmpfs", "/tmp", "--remount-ro", "/", "--chdir", "/tmp", "--"]
    python = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    return Zygote(command, "/ponder/zygote.py", python, ("-S",), PRELOAD, clean=True)


def unprotected() -> Zygote:
    """A server process of this user, with resource limits and, on Linux, the filter of system calls, but all files."""
    home = tempfile.mkdtemp(prefix="ponder-unsafe-")
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    return Zygote(flags=("-S",), preload=PRELOAD, home=home, clean=True)


# What a program must not be able to do. It returns the names of those that it could.
_PROBE = """
import os, socket, ctypes
def probe():
    allowed = []
    def attempt(name, function):
        try:
            function()
            allowed.append(name)
        except (OSError, MemoryError):
            pass
    attempt("make a process", os.fork)
    attempt("run a program", lambda: os.execv("/usr/bin/true", ["true"]))
    attempt("open a socket", socket.socket)
    attempt("signal another process", lambda: os.kill(1, 0))
    attempt("read the password file", lambda: open("/etc/passwd"))
    attempt("see other processes", lambda: os.listdir("/proc"))
    attempt("write into /usr", lambda: open("/usr/ponder", "w"))
    attempt("write into /", lambda: open("/ponder/x", "w"))
    attempt("use 2 GiB of memory", lambda: bytearray(2**31))
    if len(os.environ) > 6:
        allowed.append("see the environment")
    return allowed
"""


def find_bubblewrap() -> tuple[Process | None, str]:
    """The bubblewrap tier where it runs here and holds, else None with the reason."""
    from grading.sandbox.lockdown import can_filter

    if not shutil.which("bwrap"):
        return None, "bubblewrap (bwrap) is not installed"
    if not can_filter():
        return None, f"there is no filter of system calls for {platform.system()} on {platform.machine()}"
    tier = Process("bubblewrap", in_bubblewrap)
    try:
        with tier.open(_PROBE, 10.0, slow=False) as session:
            allowed = session.call("probe", ())
    except (Failed, WorkerError, OSError) as error:
        tier.close()
        return None, f"bubblewrap does not run here: {first_line(error)}"
    if allowed:
        tier.close()
        return None, f"in bubblewrap a program could {', '.join(allowed)}"
    return tier, ""


def first_line(error) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
