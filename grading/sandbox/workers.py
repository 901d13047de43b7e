"""Processes that can be killed: what may hang, crash or eat memory runs in a child with limits, never in this process.

`run_in_worker` calls a function on text that nobody vouches for (math-verify, reasoning_gym's graders). `Zygote` is the
server process that forks such children, here and for the code sandbox (grading/sandbox/code_grader.py).
"""

import atexit
import contextlib
import functools
import json
import os
import select
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from grading.base import lock_released
from grading.sandbox.messages import MAX_MESSAGE_BYTES, receive, send

START_SECONDS = 30.0  # a server may take so long to import what it needs, on a busy machine
ENDING_SECONDS = 1.0  # a killed child must be gone within


class WorkerError(Exception):
    """A worker died, ran out of memory or its function raised; or no worker can be made on this machine."""


class Zygote:
    """A server process that forks a locked-down child for each job (grading/sandbox/zygote.py). Linux and macOS.

    wrap: a command that the server runs under, such as bwrap with its arguments. script: its path as seen from there.
    """

    def __init__(
        self,
        wrap: list[str] = (),
        script: str | None = None,
        python: str = sys.executable,
        flags: tuple[str, ...] = (),
        preload: tuple[str, ...] = (),
        path: list[str] = (),
        home: str | None = None,
        clean: bool = False,
    ):
        if not hasattr(os, "fork") or not hasattr(socket, "send_fds"):
            raise WorkerError("this system cannot fork processes: use Linux, macOS or WSL")
        self.control, theirs = socket.socketpair()
        self.lock = threading.Lock()
        options = json.dumps({"preload": list(preload), "path": list(path), "clean": clean})
        script = script or str(Path(__file__).with_name("zygote.py"))
        command = [*wrap, python, "-s", "-B", *flags, script, str(theirs.fileno()), options]
        try:
            self.process = _spawner().submit(_start, command, theirs.fileno(), home).result()
        except OSError as error:
            raise WorkerError(f"{command[0]} cannot be started: {error.strerror}") from None
        finally:
            theirs.close()
        self.control.settimeout(START_SECONDS)
        self._acknowledged()

    def _acknowledged(self) -> None:
        try:
            if self.control.recv(1) == b"+":
                return
        except OSError:
            pass
        self.process.kill()
        problem = b"" if self.process.stderr.closed else self.process.stderr.read(2000)
        self.close()
        raise WorkerError(f"the server process ended: {problem.decode(errors='replace').strip()}")

    def spawn(
        self, kind: str, cpu_seconds: int | None = None, nice: int = 0, stdio: tuple[int, int] | tuple = ()
    ) -> "Child":
        """A new child of a kind that zygote.py knows. stdio: file descriptors for its standard input and output."""
        job = {"kind": kind, "cpu": cpu_seconds, "nice": nice}
        report, their_report = socket.socketpair()
        connection, theirs = socket.socketpair()
        try:
            with self.lock:
                fds = [their_report.fileno(), theirs.fileno(), *stdio]
                socket.send_fds(self.control, [json.dumps(job).encode()], fds)
                self._acknowledged()
        except OSError as error:
            self.close()
            raise WorkerError(f"the server process has gone: {error.strerror}") from None
        finally:
            their_report.close()
            theirs.close()
        return Child(connection, report)

    def close(self) -> None:
        """End the server and all of its children at once."""
        self.process.kill()
        self.process.wait()
        self.process.stderr.close()
        self.control.close()


def _start(command: list[str], fd: int, home: str | None) -> subprocess.Popen:
    environment = {
        "PATH": os.environ.get("PATH", os.defpath),
        "HOME": home or "/",
        "LANG": "C.UTF-8",
        "PYTHONHASHSEED": "0",
    }
    process = subprocess.Popen(
        command,
        pass_fds=[fd],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment,
        cwd=home,
        start_new_session=True,
    )
    atexit.register(process.kill)
    return process


@functools.cache
def _spawner() -> ThreadPoolExecutor:
    """One thread that lives as long as this process: bwrap's --die-with-parent means the thread that started it."""
    return ThreadPoolExecutor(1, thread_name_prefix="spawner")


class Child:
    """One child of a zygote: messages to and fro until it is closed."""

    def __init__(self, connection: socket.socket, report: socket.socket):
        self.connection, self.report = connection, report
        self.ended = None  # how it ended, once it has

    def request(self, message: dict | None, deadline: float, limit: int = MAX_MESSAGE_BYTES + 1024, reply: bool = True):
        """Send a message (None: send nothing) and return the next one that comes back, or do not wait for it.

        Raises TimeoutError at the deadline (time.monotonic), EOFError where the child has ended, ValueError for what
        is no message or longer than `limit` bytes.
        """
        try:
            if message is not None:
                self.connection.settimeout(max(0.001, deadline - time.monotonic()))
                send(self.connection, message, limit=2**26)
            return receive(_Reader(self.connection, deadline, limit)) if reply else None
        except ConnectionError:
            raise EOFError from None
        except RecursionError:
            raise ValueError("the message is nested too deeply") from None

    def end(self) -> dict:
        """Kill the child if it still runs; how it ended: {exit, cpu (seconds), clean}. TimeoutError where it stays."""
        if self.ended is None:
            self.ended = {"exit": -9, "cpu": 0.0, "clean": False}
            self.connection.close()
            with self.report, contextlib.suppress(ConnectionError):
                with contextlib.suppress(OSError):
                    self.report.shutdown(socket.SHUT_WR)
                self.report.settimeout(ENDING_SECONDS)
                self.ended = json.loads(self.report.recv(4096) or "null") or self.ended
        return self.ended


class _Reader:
    """Reads from a socket up to a deadline and a number of bytes."""

    def __init__(self, connection: socket.socket, deadline: float, limit: int):
        self.connection, self.deadline, self.left = connection, deadline, limit + 4

    def recv(self, size: int) -> bytes:
        self.connection.settimeout(max(0.001, self.deadline - time.monotonic()))
        part = self.connection.recv(size)
        self.left -= len(part)
        if self.left < 0:
            raise ValueError("the message is too long")
        return part


def wait_for_output(fd: int, deadline: float, limit: int) -> bytes:
    """All that is written to a pipe until its other end closes. TimeoutError at the deadline, ValueError over limit."""
    data = bytearray()
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    while True:
        if not poll.poll(max(0, deadline - time.monotonic()) * 1000):
            raise TimeoutError
        part = os.read(fd, 65536)
        if not part:
            return bytes(data)
        data += part
        if len(data) > limit:
            raise ValueError(f"the program printed over {limit} bytes")


# --- functions on untrusted text


_idle: dict[tuple, list[Child]] = {}  # children that wait for their next call, by what they have imported
_idle_lock = threading.Lock()
MAX_IDLE = 2


def run_in_worker(function: str, *args, timeout: float = 3.0, preload: tuple[str, ...] = ()):
    """Call `function`, "module:name", in a child process: 1 GiB of memory, no files written, no network, no processes.

    Arguments and result are what JSON can say. timeout: seconds of wall time, after which the child is killed. preload:
    modules that the server imports once, so that each child has them. From any thread. Raises TimeoutError, or
    WorkerError where the function raised, the child died, or none can be made.
    """
    deadline = time.monotonic() + timeout
    with lock_released():
        message = {"function": function, "args": args}
        child = _idle_child(preload)
        try:  # the first call waits for the imports: it has what is left of its time, or half a second
            try:
                answer = child.request(message, max(deadline, time.monotonic() + 0.5))
            except EOFError:  # it died while it was idle, was killed from outside, or will die again
                child.end()
                child = _fresh_child(preload)
                answer = child.request(message, max(deadline, time.monotonic() + 0.5))
        except TimeoutError:
            child.end()
            raise TimeoutError(f"{function} took over {timeout:g} s") from None
        except (EOFError, ValueError):
            child.end()
            raise WorkerError(f"{function} ended its worker, probably out of memory") from None
        with _idle_lock:
            waiting_children = _idle.setdefault(preload, [])
            if len(waiting_children) < MAX_IDLE:
                waiting_children.append(child)
                child = None
        if child:
            child.end()
    if "error" in answer:
        raise WorkerError(answer["error"])
    return answer["ok"]


def _idle_child(preload: tuple[str, ...]) -> Child:
    """A child that waits for a call, or else a fresh one."""
    with _idle_lock:
        if _idle.get(preload):
            return _idle[preload].pop()
    return _fresh_child(preload)


def _fresh_child(preload: tuple[str, ...]) -> Child:
    server = _function_server(preload)
    try:
        return server.spawn("function")
    except WorkerError:  # the server has died: a new one, once
        return _function_server(preload, instead_of=server).spawn("function")


_servers: dict[tuple[str, ...], Zygote] = {}
_server_lock = threading.Lock()


def _function_server(preload: tuple[str, ...], instead_of: Zygote | None = None) -> Zygote:
    """The one server that has imported `preload`, started on first need; a new one in place of one that has died."""
    with _server_lock:
        if _servers.get(preload) is instead_of:
            _servers[preload] = Zygote(preload=preload, path=sys.path)
        return _servers[preload]
