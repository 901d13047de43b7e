"""The forking server: it imports modules once, then forks a locked-down child for each job within milliseconds.

    python zygote.py CONTROL_FD OPTIONS      (started by grading/sandbox/workers.py; OPTIONS: {"preload": [modules], "path": [...]})

There are four kinds of children. Each exchanges messages, framed as (length, JSON), with the parent over a socket:

    program    runs a model's program and calls its functions:   {"run": code}, {"call": name, "args": [...]}
    tester     runs test code, which requests such calls:        {"check": code, "names": [...]} (tester.py)
    script     runs a program on standard input and output:      {"run": code}
    function   calls trusted functions on untrusted text:        {"function": "module:name", "args": [...]}

A child sends back plain data and makes no decisions. Inside the sandbox, this file, tester.py, messages.py and
lockdown.py are the only files of the project: standard library only.
"""

import builtins
import contextlib
import functools
import gc
import importlib
import json
import operator
import os
import random
import select
import shutil
import signal
import socket
import sys
import traceback
import types

if __name__ == "__main__":  # started as a script: the modules that it needs are in its folder
    import lockdown
    from messages import NotPlain, Reference, builtin_name, decode, describe_error, encode, error_message, receive, send
    from tester import serve_tester

    sys.path.pop(0)
else:
    from grading.sandbox import lockdown
    from grading.sandbox.messages import (
        NotPlain,
        Reference,
        builtin_name,
        decode,
        describe_error,
        encode,
        receive,
        send,
    )
    from grading.sandbox.tester import serve_tester

# --- children


def error_outcome(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return "memory"
    is_running = any(frame.f_code.co_filename == "<program>" for frame, _ in traceback.walk_tb(error.__traceback__))
    return "syntax" if isinstance(error, (SyntaxError, ValueError)) and not is_running else "crash"


def serve_program(connection: socket.socket) -> None:
    """Run a program, then call its functions on request."""
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    program = Program(connection, vars(module))
    while True:
        program.serve(receive(connection))


class Program:
    """A program and its objects that tests use. The objects stay in this process; the tests have their numbers.

    A message runs the program, calls a function of it, applies an operation to an object ("on"), or reads an attribute
    of an object ("get").
    """

    def __init__(self, connection: socket.socket, namespace: dict):
        self.connection = connection
        self.namespace = namespace
        self.objects = []

    def serve(self, message: dict) -> None:
        """Act on a message and send the answer."""
        try:
            answer = self._answer(message)
        except BaseException as error:
            answer = {"error": error_outcome(error), "detail": describe_error(error)}
            answer |= {"type": builtin_name(error), "message": error_message(error)}
        try:
            send(self.connection, answer)
        except NotPlain as error:
            send(self.connection, {"error": "output_limit", "detail": str(error)})

    def _answer(self, message: dict) -> dict:
        if "run" in message:
            exec(compile(message["run"], "<program>", "exec"), self.namespace)
            return {"ok": None}
        refer = self._refer if message.get("keep") else None
        args = [decode(a, self._resolve) for a in message.get("args", ())]
        kwargs = {k: decode(v, self._resolve) for k, v in message.get("kwargs", {}).items()}
        if "get" in message:
            function = functools.partial(getattr, self.objects[message["on"]], message["get"])
        elif "on" in message:
            function = functools.partial(_OPERATIONS[message["call"]], self.objects[message["on"]])
        elif (name := message["call"]) not in self.namespace:
            return {"error": "missing_entry", "detail": f"the program does not define {name}"}
        elif not callable(function := self.namespace[name]):
            return {"error": "missing_entry", "detail": f"{name} is a {type(function).__name__}, not a function"}
        result = function(*args, **kwargs)
        try:
            answer = {"ok": encode(result, refer), "made": isinstance(function, type)}
            if message.get("in_place"):
                answer["args"] = [encode(a, refer) for a in args]
        except NotPlain as error:
            return {"error": "bad_type", "detail": str(error)}
        return answer

    def _refer(self, value) -> Reference:
        for number, other in enumerate(self.objects):
            if other is value:
                return Reference("object", number)
        self.objects.append(value)
        return Reference("object", len(self.objects) - 1)

    def _resolve(self, kind: str, key: int | str):
        if kind == "object":
            return self.objects[key]
        if kind == "function":
            return functools.partial(self._call_back, key)
        return self.namespace[key] if kind == "program" else getattr(builtins, key)

    def _call_back(self, number: int, *args):
        """Call a function of the tests."""
        send(self.connection, {"callback": number, "args": [encode(a, self._refer) for a in args]})
        while "returned" not in (message := receive(self.connection)):
            self.serve(message)  # the function calls the program
        if message.get("type"):
            raise getattr(builtins, message["type"])(message["message"])
        return decode(message["returned"], self._resolve)


_OPERATIONS = {
    "call": operator.call, "getitem": operator.getitem, "setitem": operator.setitem, "set": setattr, "list": list,
    "len": len, "str": str, "repr": repr, "next": next,
}  # fmt: skip


def serve_script(connection: socket.socket) -> None:
    """Run a program as a script, with standard input and output in place. It ends like a script: threads are joined,
    exit handlers run, and the exit status tells whether it succeeded."""
    code = receive(connection)["run"]
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    sys.stdin = sys.__stdin__ = open(0, encoding="utf-8", errors="replace", closefd=False)
    sys.stdout = sys.__stdout__ = open(1, "w", encoding="utf-8", errors="replace", closefd=False)
    try:
        exec(compile(code, "<program>", "exec"), vars(main))
    except SystemExit:
        raise
    except BaseException as error:
        send(connection, {"error": error_outcome(error), "detail": describe_error(error)})
        sys.exit(1)
    sys.exit(0)


def serve_functions(connection: socket.socket) -> None:
    """Call functions of the project or of a library on untrusted text."""
    while True:
        message = receive(connection)
        module, name = message["function"].split(":")
        try:
            answer = {"ok": getattr(importlib.import_module(module), name)(*map(decode, message["args"]))}
        except BaseException as error:
            answer = {"error": describe_error(error)}
        try:
            send(connection, answer)
        except NotPlain as error:
            send(connection, {"error": str(error)})


SERVE = {"program": serve_program, "tester": serve_tester, "script": serve_script, "function": serve_functions}


def run_child(job: dict, fds: list[int]) -> None:
    """Run a forked child: give up its rights, then serve its messages. Never returns."""
    try:
        connection_fd, *stdio = fds
        null = os.open(os.devnull, os.O_RDWR)
        stdin, stdout = stdio or (null, null)
        saved_fd = os.dup2(connection_fd, 100)
        for source, target in ((stdin, 0), (stdout, 1), (null, 2)):
            os.dup2(source, target)
        os.closerange(3, 100)
        os.closerange(101, 1024)
        connection = socket.socket(fileno=os.dup2(saved_fd, 3))
        os.close(100)
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
            signal.signal(signum, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        lockdown.limit_resources(job.get("cpu"), nice=job.get("nice", 0))
        if lockdown.can_filter():
            lockdown.refuse_system_calls(may_write=job["kind"] != "function")
        random.seed(0)
        builtins.exit = builtins.quit = sys.exit  # Python defines them in the module site, which is not imported
        SERVE[job["kind"]](connection)
    except SystemExit:
        if job["kind"] == "script":
            raise
    except BaseException:
        pass  # the parent has ended, or the program has broken its own process
    os._exit(1)


# --- the zygote itself


def main() -> None:
    options = json.loads(sys.argv[2])
    lockdown.hide_memory()
    os.environ.pop("PWD", None)
    control_fd = int(sys.argv[1])
    sys.argv[1:] = []
    sys.path[:0] = options["path"]
    for module in options["preload"]:
        importlib.import_module(module)
    lockdown.prepare()
    gc.collect()
    gc.freeze()
    control = socket.socket(fileno=control_fd)
    wakeup, alarm = os.pipe()
    os.set_blocking(alarm, False)
    os.set_blocking(wakeup, False)
    signal.set_wakeup_fd(alarm)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C in the terminal
    home = os.getcwd() if options.get("clean") else None
    children = {}  # pid: the socket that its exit report is sent to
    control.sendall(b"+")
    poll = select.poll()
    poll.register(control, select.POLLIN)
    poll.register(wakeup, select.POLLIN)
    while True:
        events = sorted(fd for fd, _ in poll.poll())
        # The wakeup pipe comes last, since reaping children closes other descriptors of this list.
        for fd in [*(fd for fd in events if fd != wakeup), *(fd for fd in events if fd == wakeup)]:
            if fd == control.fileno():
                data, fds, _, _ = socket.recv_fds(control, 65536, 8)
                if not data:  # the parent has ended
                    for pid in children:
                        os.kill(pid, signal.SIGKILL)
                    os._exit(0)
                pid = os.fork()
                if pid == 0:
                    run_child(json.loads(data), fds[1:])
                children[pid] = socket.socket(fileno=fds[0])
                poll.register(fds[0], select.POLLIN)
                for other in fds[1:]:
                    os.close(other)
                control.sendall(b"+")
            elif fd == wakeup:
                with contextlib.suppress(BlockingIOError):
                    os.read(wakeup, 4096)
                reap(children, poll, home)
            else:  # the parent no longer needs this child
                poll.unregister(fd)
                os.kill(next(pid for pid, report in children.items() if report.fileno() == fd), signal.SIGKILL)


def reap(children: dict, poll, home: str | None) -> None:
    """Report the children that have ended, after removing the files that they left."""
    while children:
        pid, status, usage = os.wait4(-1, os.WNOHANG)
        if pid == 0:
            return
        report = children.pop(pid)
        with contextlib.suppress(KeyError):
            poll.unregister(report)
        code = os.waitstatus_to_exitcode(status)
        clean = home is None or remove_contents(home)
        message = {"exit": code, "cpu": usage.ru_utime + usage.ru_stime, "clean": clean}
        with contextlib.suppress(OSError):
            report.sendall(json.dumps(message).encode())
        report.close()


def remove_contents(folder: str, max_entries: int = 200) -> bool:
    """Remove the files that a child left. Return False if there are too many or removal fails: replace the server."""
    try:
        os.chmod(folder, 0o700)
        names = os.listdir(folder)
        for name in names[:max_entries]:
            path = os.path.join(folder, name)
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path)
            else:
                os.unlink(path)
        return len(names) <= max_entries
    except (OSError, RecursionError):
        return False


if __name__ == "__main__":
    main()
