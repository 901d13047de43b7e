"""The tiers in which a model's program runs: Monty, or CPython in a locked-down process, normally inside bubblewrap.

A tier opens a *session* for a program. The session calls the program's functions with plain data and returns plain
data; errors are raised as `Failed` with an outcome. Only `check` knows expected answers: its tests run in a separate
sandbox and call the program's functions through this process.
"""

import atexit
import functools
import math
import os
import platform
import shutil
import signal
import tempfile
import threading
import time
from contextlib import contextmanager, suppress

from grading.sandbox.bubblewrap import start_server
from grading.sandbox.cases import Check, Script
from grading.sandbox.messages import PLAIN_EXCEPTIONS, NotPlain, Reference, decode, encode
from grading.sandbox.outcomes import FAILURES, TOO_SLOW, Failed, Unsupported, first_line, run_check
from grading.sandbox.workers import WorkerError, Zygote, wait_for_output

MAX_STDOUT_BYTES = 256 * 1024
MAX_IDLE = 16  # idle servers to keep for the next programs
WALL_FACTOR = 3  # seconds of wall time for each second of running time, in the slow lane
NICE = 5  # in the slow lane: a third of the processor time that a program in the fast lane gets
PRELOAD = (
    "math", "cmath", "re", "random", "string", "itertools", "functools", "operator", "collections", "heapq", "bisect",
    "statistics", "fractions", "decimal", "datetime", "json", "copy", "dataclasses", "enum", "typing", "textwrap",
    "hashlib", "tempfile", "threading", "queue", "array",
)  # fmt: skip


# --- CPython in a separate process


class Process:
    """CPython in locked-down children of server processes, which normally run inside bubblewrap.

    A server runs one program at a time, so that programs cannot affect each other. Files that a program leaves behind
    are removed before the next one starts; if that fails, the server is replaced.
    """

    def __init__(self, name: str, make_zygote):
        self.name = name
        self.make_zygote = make_zygote
        self.idle = {"program": [], "tester": []}  # idle servers; testers never share one with programs
        self.lock = threading.Lock()

    def close(self) -> None:
        with self.lock:
            for zygote in [*self.idle["program"], *self.idle["tester"]]:
                zygote.close()
            self.idle = {"program": [], "tester": []}

    @contextmanager
    def child(self, kind: str, seconds: float, slow: bool, stdio: tuple[int, int] | tuple = ()):
        """Yield (child, deadline), with a child of a server that runs nothing else meanwhile."""
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
        """Start a server in place of a closed one, so that no program has to wait for it."""
        with suppress(WorkerError, RuntimeError, OSError):  # this process may be about to end
            self._put_back(role, self.make_zygote())

    @contextmanager
    def open(self, code: str, seconds: float, slow: bool):
        """Yield a session in which the program has run. seconds: processor time (wall time: 3 times that if slow)."""
        with self.child("program", seconds, slow) as (child, deadline):
            session = _ProcessSession(child, deadline, seconds)
            session.request({"run": code})
            yield session

    def check(self, case: Check, session, seconds: float, slow: bool) -> None:
        def run_tests(call):
            with self.child("tester", seconds, slow) as (tester, deadline):
                request = {"check": case.source, "names": case.names, "in_place": case.in_place}
                answer = _request_tester(tester, request, deadline)
                while "passed" not in answer:
                    try:
                        reply = call(session.forward, answer, case.uses_objects)
                    except Failed as failure:
                        reply = {"type": failure.kind, "message": failure.message}
                    try:
                        answer = _request_tester(tester, reply, deadline)
                    except Unsupported:  # the returned value crashed the tests' process
                        raise Failed("failed", "the tests crashed on the value that the program returned") from None
                if "unsupported" in answer:
                    raise Unsupported(str(answer["unsupported"]))
                if "bad_type" in answer:
                    raise Failed("bad_type", str(answer["bad_type"]))
                return answer["passed"] is True, str(answer.get("detail", ""))

        run_check(case, run_tests)

    def run_script(self, code: str, case: Script, seconds: float, slow: bool) -> str:
        """Run the program as a script and return its standard output."""
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
                        with suppress(EOFError):  # the program ended before it had read the request
                            child.request({"run": code}, deadline, reply=False)
                        output = wait_for_output(read_end, deadline, MAX_STDOUT_BYTES)
                        raise _failure(child.request(None, deadline))
                    except EOFError:  # it ended without reporting an error
                        pass
                    except TimeoutError:
                        raise Failed("timeout", TOO_SLOW) from None
                    except ValueError as error:
                        raise Failed("output_limit", str(error)) from None
            if child.exit_report["exit"] != 0:
                raise Failed(*_exit_outcome(child.exit_report, seconds))
            return output.decode("utf-8", "replace")
        finally:
            os.close(read_end)
            if write_end is not None:
                os.close(write_end)


class _ProcessSession:
    def __init__(self, child, deadline: float, seconds: float):
        self.child = child
        self.deadline = deadline
        self.seconds = seconds  # of processor time

    def call(self, name: str, args, kwargs: dict | None = None):
        try:
            message = {
                "call": name,
                "args": [encode(a) for a in args],
                "kwargs": {k: encode(v) for k, v in (kwargs or {}).items()},
            }
        except NotPlain as error:
            raise Unsupported(f"the tests pass a value that cannot be sent: {error}") from None
        answer = self.request(message)
        try:
            return decode(answer["ok"])
        except (NotPlain, KeyError, RecursionError):
            raise Failed("bad_type", "the program did not return plain data") from None

    def forward(self, message: dict, keep: bool) -> dict:
        """Forward a message of the tests to the program, and return the program's answer, reduced to valid content.

        keep: whether results may refer to objects that stay in the program's process.
        """
        answer = self.request(message | {"keep": keep})
        try:
            if type(number := answer.get("callback")) is int:
                return {"callback": number, "args": [_validated(a, keep) for a in answer["args"]]}
            reply = {"ok": _validated(answer["ok"], keep), "made": answer.get("made") is True}
            if message.get("in_place") and "args" in answer:
                reply["args"] = [_validated(a, keep) for a in answer["args"]]
            return reply
        except (NotPlain, KeyError, TypeError, RecursionError):
            raise Failed("bad_type", "the program did not return plain data") from None

    def request(self, message: dict) -> dict:
        try:
            answer = self.child.request(message, self.deadline)
        except TimeoutError:
            raise Failed("timeout", TOO_SLOW) from None
        except EOFError:
            raise Failed(*_exit_outcome(self.child.end(), self.seconds)) from None
        except ValueError as error:
            raise Failed("output_limit", str(error)) from None
        if not isinstance(answer, dict):
            raise Failed("bad_type", "the program did not return plain data")
        if "error" in answer:
            raise _failure(answer)
        return answer


def _validated(value, keep: bool):
    """Return an encoded value of the program if it is plain data, or if keep and it refers to an object."""

    def resolve(kind, key):
        if not keep or kind != "object" or type(key) is not int:
            raise NotPlain("the value refers to something else than an object of the program")
        return Reference(kind, key)

    return encode(decode(value, resolve), lambda other: other if isinstance(other, Reference) else None)


def _failure(answer) -> Failed:
    """Return the failure that a program's process reports. The program may have forged the report."""
    answer = answer if isinstance(answer, dict) else {}
    outcome, kind = answer.get("error"), answer.get("type")
    outcome = outcome if isinstance(outcome, str) and outcome in FAILURES else "crash"
    kind = kind if isinstance(kind, str) and kind in PLAIN_EXCEPTIONS else None
    message = answer.get("message")
    return Failed(outcome, str(answer.get("detail", "")), kind, message if isinstance(message, str) else None)


def _exit_outcome(exit_report: dict, seconds: float) -> tuple[str, str]:
    """Return (outcome, detail) for a program that ended its process."""
    # Killed at its limit of processor time; the clocks differ a little.
    if exit_report["exit"] == -signal.SIGKILL and exit_report["cpu"] >= seconds / 2:
        return "timeout", TOO_SLOW
    status = f"signal {-exit_report['exit']}" if exit_report["exit"] < 0 else f"exit status {exit_report['exit']}"
    outcome = "killed" if exit_report["exit"] == -signal.SIGKILL else "crash"
    return outcome, f"the program ended its process ({status})"


def _request_tester(tester, message: dict, deadline: float) -> dict:
    try:
        answer = tester.request(message, deadline)
    except TimeoutError:
        raise Failed("timeout", "the tests took too long with this program") from None
    except (EOFError, ValueError):
        raise Unsupported("the tests' process ended") from None
    if not isinstance(answer, dict):
        raise Unsupported("the tests gave no verdict")
    return answer


def start_in_bubblewrap() -> Zygote:
    return start_server(PRELOAD, clean=True)


def start_unprotected() -> Zygote:
    """Start a server with this user's rights: all files, but resource limits and, on Linux, the system call filter."""
    home = tempfile.mkdtemp(prefix="ponder-unsafe-")
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    return Zygote(flags=("-S",), preload=PRELOAD, home=home, clean=True)


# A program that attempts everything forbidden and returns the names of the attempts that succeeded.
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


@functools.cache
def bubblewrap() -> tuple[Process | None, str]:
    """Return the result of `find_bubblewrap`, which is called once."""
    return find_bubblewrap()


def find_bubblewrap() -> tuple[Process | None, str]:
    """Return (bubblewrap tier, ""), or (None, reason) if it does not work or does not isolate programs here."""
    from grading.sandbox.lockdown import can_filter

    if not shutil.which("bwrap"):
        return None, "bubblewrap (bwrap) is not installed"
    if not can_filter():
        return None, f"system calls cannot be filtered on {platform.system()} {platform.machine()}"
    tier = Process("bubblewrap", start_in_bubblewrap)
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
