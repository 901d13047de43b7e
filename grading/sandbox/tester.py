"""The child process that runs test code. It calls the program's functions through the parent.

Plain data is copied between the two processes. Other objects stay where they are: the tests have a handle of an object
of the program, and the program has a stub of a function of the tests. The program never decides a comparison.
Also imported inside the sandbox: standard library only.
"""

import builtins
import functools
import socket
import types

if __name__ == "tester":  # inside the sandbox
    import messages
else:
    from grading.sandbox import messages

_NOT_PLAIN = {"bad_type": "the program did not return plain data"}
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial)


class CallFailed(BaseException):
    """A call requested by a test failed in a way that no test may catch."""


class Tests:
    """The functions and objects of the program, as test code sees them."""

    def __init__(self, connection: socket.socket, in_place: bool):
        self.connection = connection
        self.in_place = in_place
        self.calls = 0
        self.handles = {}  # number -> handle: an object has one, so that `is` works
        self.functions = []  # the tests' functions that the program may call
        self.verdict = {}  # set if the verdict is clear before the tests end

    def function(self, name: str):
        """Return a function that calls a function of the program."""

        def call(*args, **kwargs):
            return self.request({"call": name}, args, kwargs)

        call.program_name = name
        return call

    def request(self, message: dict, args=(), kwargs=None):
        """Send a request to the program and return its result."""
        self.calls += 1
        try:
            message |= {"args": [messages.encode(a, self._refer) for a in args], "in_place": self.in_place}
            message["kwargs"] = {k: messages.encode(v, self._refer) for k, v in (kwargs or {}).items()}
        except messages.NotPlain as error:
            self.stop({"unsupported": f"the tests pass a value that cannot be sent: {error}"})
        messages.send(self.connection, message, 16 * messages.MAX_MESSAGE_BYTES)
        answer = messages.receive(self.connection)
        while "callback" in answer:
            messages.send(self.connection, self._call_back(answer))
            answer = messages.receive(self.connection)
        if answer.get("type"):  # an exception that a test may expect
            error = getattr(builtins, answer["type"])(answer["message"])
            error.is_of_program = True
            raise error
        if "ok" not in answer:
            raise CallFailed
        for argument, changed in zip(args, answer.get("args", ())):
            _update(argument, messages.decode(changed, self._resolve))
        result = messages.decode(answer["ok"], self._resolve)
        if isinstance(result, Handle) and (answer.get("made") or "get" in message):
            object.__setattr__(result, "_is_instance", True)
        return result

    def stop(self, verdict: dict):
        """End the tests with a verdict."""
        self.verdict = self.verdict or {"passed": False} | verdict
        raise CallFailed

    def _refer(self, value) -> messages.Reference | None:
        if type(value) is Handle:
            return messages.Reference("object", value._number)
        if name := getattr(value, "program_name", None):
            return messages.Reference("program", name)
        name = getattr(value, "__name__", None)
        if name and getattr(builtins, name, None) is value:
            return messages.Reference("builtin", name)
        if isinstance(value, _FUNCTIONS):
            self.functions.append(value)
            return messages.Reference("function", len(self.functions) - 1)
        return None

    def _resolve(self, kind: str, number: int):
        return self.handles.setdefault(number, Handle(self, number))

    def _call_back(self, message: dict) -> dict:
        try:
            args = [messages.decode(a, self._resolve) for a in message["args"]]
            return {"returned": messages.encode(self.functions[message["callback"]](*args), self._refer)}
        except Exception as error:
            kind = messages.builtin_name(error) or "RuntimeError"
            return {"returned": None, "type": kind, "message": messages.error_message(error)}


class Handle:
    """An object of the program. Its attributes, items and methods are read in the program's process."""

    def __init__(self, tests: Tests, number: int):
        object.__setattr__(self, "_tests", tests)
        object.__setattr__(self, "_number", number)
        object.__setattr__(self, "_is_instance", False)  # made by a class or read from an object, not a result

    def _apply(self, operation: str, *args, **kwargs):
        return self._tests.request({"call": operation, "on": self._number}, args, kwargs)

    def __getattr__(self, name):
        return self._tests.request({"get": name, "on": self._number})

    def __setattr__(self, name, value):
        self._apply("set", name, value)

    def __call__(self, *args, **kwargs):
        return self._apply("call", *args, **kwargs)

    def __getitem__(self, key):
        return self._apply("getitem", key)

    def __setitem__(self, key, value):
        self._apply("setitem", key, value)

    def __len__(self):
        return self._apply("len")

    def __iter__(self):
        return iter(self._apply("list"))

    def __next__(self):
        return self._apply("next")

    def __str__(self):
        return self._apply("str")

    def __repr__(self):
        return self._apply("repr")

    def __bool__(self):
        return self._is_instance or self._refuse()

    def __eq__(self, other):
        if self is other or other is None:
            return self is other
        return self._refuse() if type(other) is Handle else self._tests.stop(_NOT_PLAIN)

    def __ne__(self, other):
        return not self == other

    __hash__ = object.__hash__

    def _refuse(self, *_):
        """Refuse an operation whose result would be the program's verdict on itself."""
        if self._is_instance:
            self._tests.stop({"unsupported": "the tests compare or compute with an object of the program"})
        self._tests.stop(_NOT_PLAIN)

    __lt__ = __le__ = __gt__ = __ge__ = __contains__ = __abs__ = __neg__ = __int__ = __float__ = __index__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __pow__ = _refuse
    __mod__ = __floordiv__ = __and__ = __or__ = __round__ = __enter__ = __exit__ = __format__ = _refuse


def _update(old, new) -> None:
    """Change a container of the tests in place, as the program has changed its copy."""
    if type(old) is not type(new):
        return
    if isinstance(old, (list, tuple)):
        for i, (before, after) in enumerate(zip(old, new)):
            if isinstance(before, (list, dict, set, tuple, bytearray)) and type(before) is type(after):
                _update(before, after)
            elif isinstance(old, list):
                old[i] = after
    if isinstance(old, (list, bytearray)):
        old[len(new) :] = new[len(old) :]
    if isinstance(old, bytearray):
        old[:] = new
    if isinstance(old, (dict, set)):
        for key in list(old) if isinstance(old, dict) else ():
            if isinstance(old[key], (list, dict, set, tuple, bytearray)) and type(old[key]) is type(new.get(key)):
                _update(old[key], new[key])
                new[key] = old[key]
        old.clear()
        old.update(new)


def serve_tester(connection: socket.socket) -> None:
    """Run test code. The functions named in the message are called through the parent."""
    message = messages.receive(connection)
    tests = Tests(connection, message["in_place"])
    namespace = {"__name__": "tester"} | {name: tests.function(name) for name in message["names"]}
    try:
        exec(compile(message["check"], "<tests>", "exec"), namespace)
        verdict = {"passed": True}
    except BaseException as error:
        problem = "the test failed" if isinstance(error, AssertionError) else messages.describe_error(error)
        verdict = {"passed": False, "detail": f"{problem}: {_failing_line(error, message['check'])}".rstrip(": ")}
        if isinstance(error, (NameError, ImportError)) and not getattr(error, "is_of_program", False):
            verdict = {"passed": False, "unsupported": f"the tests do not run: {messages.describe_error(error)}"}
    messages.send(connection, (tests.verdict or verdict) | {"calls": tests.calls})


def _failing_line(error: BaseException, source: str) -> str:
    """Return the line of the test code that raised an exception."""
    line = None
    trace = error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == "<tests>":
            line = trace.tb_lineno
        trace = trace.tb_next
    lines = source.splitlines()
    return lines[line - 1].strip()[:120] if line and line <= len(lines) else ""
