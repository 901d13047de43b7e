"""Worker processes: code that may hang, crash or exhaust memory runs in a limited child that can be killed.

`run_in_worker` calls a function on untrusted text (math-verify, reasoning_gym). `Zygote` is the server
process that forks such children, here and for the code sandbox (grading/sandbox/code_grader.py).
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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from grading.base import lock_released
from grading.sandbox.messages import MAX_MESSAGE_BYTES, encode, receive, send

START_SECONDS = 30.0  # time for a server to import its modules on a busy machine
ENDING_SECONDS = 1.0  # time for a killed child to end


class WorkerError(Exception):
    """A worker died or ran out of memory, its function raised, or no worker can be started on this machine."""


class Zygote:
    """A server process that forks a locked-down child for each job (grading/sandbox/zygote.py). Linux and macOS.

    wrap: a command that the server runs under, such as bwrap and its arguments. script: path of zygote.py inside it.
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
        self.control, server_end = socket.socketpair()
        self.lock = threading.Lock()
        options = json.dumps({"preload": list(preload), "path": list(path), "clean": clean})
        script = script or str(Path(__file__).with_name("zygote.py"))
        command = [*wrap, python, "-s", "-B", *flags, script, str(server_end.fileno()), options]
        try:
            self.process = _spawner().submit(_start_process, command, server_end.fileno(), home).result()
        except OSError as error:
            raise WorkerError(f"{command[0]} cannot be started: {error.strerror}") from None
        finally:
            server_end.close()
        self.control.settimeout(START_SECONDS)
        self._wait_for_acknowledgement()

    def _wait_for_acknowledgement(self) -> None:
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
        """Start a child of a kind that zygote.py knows. stdio: file descriptors for its standard input and output."""
        job = {"kind": kind, "cpu": cpu_seconds, "nice": nice}
        report, server_report = socket.socketpair()
        connection, child_connection = socket.socketpair()
        try:
            with self.lock:
                fds = [server_report.fileno(), child_connection.fileno(), *stdio]
                socket.send_fds(self.control, [json.dumps(job).encode()], fds)
                self._wait_for_acknowledgement()
        except OSError as error:
            self.close()
            raise WorkerError(f"the server process has ended: {error.strerror}") from None
        finally:
            server_report.close()
            child_connection.close()
        return Child(connection, report)

    def close(self) -> None:
        """Kill the server and all of its children."""
        self.process.kill()
        self.process.wait()
        self.process.stderr.close()
        self.control.close()


def _start_process(command: list[str], fd: int, home: str | None) -> subprocess.Popen:
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
    """Return the thread that starts all servers. It never ends, since bwrap's --die-with-parent watches it."""
    return ThreadPoolExecutor(1, thread_name_prefix="spawner")


class Child:
    """A child of a zygote, which exchanges messages with this process until it ends."""

    def __init__(self, connection: socket.socket, report: socket.socket):
        self.connection = connection
        self.report = report
        self.exit_report = None  # set once the child has ended

    def request(self, message: dict | None, deadline: float, limit: int = MAX_MESSAGE_BYTES + 1024, reply: bool = True):
        """Send a message and return the child's next message. message=None only receives, reply=False only sends.

        Raises TimeoutError at the deadline (time.monotonic), EOFError if the child has ended, ValueError if it sent no
        valid message or more than `limit` bytes.
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
        """End the child and return its exit report: {exit, cpu (seconds), clean}. Raise TimeoutError if it survives."""
        if self.exit_report is None:
            self.exit_report = {"exit": -9, "cpu": 0.0, "clean": False}
            self.connection.close()
            with self.report, contextlib.suppress(ConnectionError):
                with contextlib.suppress(OSError):
                    self.report.shutdown(socket.SHUT_WR)
                self.report.settimeout(ENDING_SECONDS)
                self.exit_report = json.loads(self.report.recv(4096) or "null") or self.exit_report
        return self.exit_report


class _Reader:
    """Reads from a socket until a deadline, at most `limit` bytes after the 4 bytes of the length."""

    def __init__(self, connection: socket.socket, deadline: float, limit: int):
        self.connection = connection
        self.deadline = deadline
        self.bytes_left = limit + 4

    def recv(self, size: int) -> bytes:
        self.connection.settimeout(max(0.001, self.deadline - time.monotonic()))
        chunk = self.connection.recv(size)
        self.bytes_left -= len(chunk)
        if self.bytes_left < 0:
            raise ValueError("the message is too long")
        return chunk


def wait_for_output(fd: int, deadline: float, limit: int) -> bytes:
    """Read a pipe until its other end closes. Raise TimeoutError at the deadline, ValueError above `limit` bytes."""
    data = bytearray()
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    while True:
        if not poll.poll(max(0, deadline - time.monotonic()) * 1000):
            raise TimeoutError
        chunk = os.read(fd, 65536)
        if not chunk:
            return bytes(data)
        data += chunk
        if len(data) > limit:
            raise ValueError(f"the program printed over {limit} bytes")


# --- functions on untrusted text


ServerKey = tuple[str, ...] | Callable[[], Zygote]  # the modules that a server has preloaded, or how it is started
_idle: dict[ServerKey, list[Child]] = {}  # children waiting for a call
_idle_lock = threading.Lock()
MAX_IDLE = 2


def run_in_worker(
    function: str,
    *args,
    timeout: float = 3.0,
    preload: tuple[str, ...] = (),
    start: Callable[[], Zygote] | None = None,
):
    """Call `function` in a child process with 1 GiB of memory and without file writes, network or new processes.

    Can be called from any thread. The arguments must be plain data (grading/sandbox/messages.py), the result a JSON value.

    Args:
        function: "module:name".
        timeout: Wall time of the call in seconds, after which the child is killed. Starting a server does not count.
        preload: Modules that the server imports once, so that every child has them.
        start: Function that starts the server, for one that does not have this user's rights.

    Raises:
        TimeoutError: If the call takes longer than `timeout`.
        WorkerError: If the function raised, the child died, or no child can be started.
        NotPlain: If an argument is not plain data.
    """
    server = start or preload
    message = {"function": function, "args": [encode(value) for value in args]}
    with lock_released():
        child = _idle_child(server)
        try:
            try:
                answer = child.request(message, time.monotonic() + timeout)
            except EOFError:  # the child died while idle, was killed, or will be killed again by this call
                child.end()
                child = _new_child(server)
                answer = child.request(message, time.monotonic() + timeout)
        except TimeoutError:
            child.end()
            raise TimeoutError(f"{function} took over {timeout:g} s") from None
        except (EOFError, ValueError):
            child.end()
            raise WorkerError(f"{function} ended its worker, probably out of memory") from None
        with _idle_lock:
            idle_children = _idle.setdefault(server, [])
            if len(idle_children) < MAX_IDLE:
                idle_children.append(child)
                child = None
        if child:
            child.end()
    if "error" in answer:
        raise WorkerError(answer["error"])
    return answer["ok"]


def _idle_child(server: ServerKey) -> Child:
    """Return an idle child, or a new one if there is none."""
    with _idle_lock:
        if _idle.get(server):
            return _idle[server].pop()
    return _new_child(server)


def _new_child(server: ServerKey) -> Child:
    zygote = _function_server(server)
    try:
        return zygote.spawn("function")
    except WorkerError:  # the server has died: replace it, once
        return _function_server(server, dead_zygote=zygote).spawn("function")


_servers: dict[ServerKey, Zygote] = {}
_server_lock = threading.Lock()


def _function_server(server: ServerKey, dead_zygote: Zygote | None = None) -> Zygote:
    """Return the running server. Start it if there is none yet or if it is `dead_zygote`."""
    with _server_lock:
        if _servers.get(server) is dead_zygote:
            _servers[server] = server() if callable(server) else Zygote(preload=server, path=sys.path)
        return _servers[server]
