"""Messages between processes that do not trust each other: the values allowed, their JSON encoding, and the framing.

Also imported inside the sandbox: standard library only.
"""

import builtins
import datetime
import decimal
import fractions
import json
import re
import socket
import struct
import types

MAX_MESSAGE_BYTES = 64 * 1024
MAX_NODES = 50_000  # values in one result
MAX_DEPTH = 100


class NotPlain(Exception):
    """A value that cannot be sent: not made of plain built-in types, too deep, or too large."""


class Reference:
    """An object that stays in its process and that the other process uses by its number or name.

    kind: "object" or "program" for an object or a function of the program, "function" for a function of the tests,
    "builtin" for a built-in function or type.
    """

    def __init__(self, kind: str, key: int | str):
        self.kind = kind
        self.key = key


class Match:
    """A copy of an re.Match: the texts and spans of its groups. `content` is [texts, spans, numbers by name]."""

    def __init__(self, content: list):
        texts, spans, names = content
        for text, span in zip(texts, spans, strict=True):
            if not isinstance(text, str | None) or [type(edge) for edge in span] != [int, int]:
                raise TypeError
        self.content = content
        self.lastindex = max((i for i, text in enumerate(texts) if i and text is not None), default=None)
        self._numbers = {i: i for i in range(len(texts))} | {str(name): range(len(texts))[i] for name, i in names}

    def __getitem__(self, group):
        return self.content[0][self._numbers[group]]

    def group(self, *groups):
        values = tuple(self[group] for group in groups or (0,))
        return values if len(values) > 1 else values[0]

    def groups(self, default=None):
        return tuple(default if text is None else text for text in self.content[0][1:])

    def groupdict(self, default=None):
        return {name: default if self[name] is None else self[name] for name, _ in self.content[2]}

    def span(self, group=0):
        return tuple(self.content[1][self._numbers[group]])

    def start(self, group=0):
        return self.span(group)[0]

    def end(self, group=0):
        return self.span(group)[1]


def encode(value, refer=None):
    """Encode plain data as JSON values: lists stay lists, types that JSON lacks become {tag: content}.

    Subclasses are read with the methods of their base type, so that overridden ones cannot lie. Iterators are consumed.

    Args:
        refer: Function that returns a reference to a value that is not plain, or None.
    """
    nodes_left = MAX_NODES

    def walk(value, depth):
        nonlocal nodes_left
        nodes_left -= 1
        if depth > MAX_DEPTH or nodes_left < 0:
            raise NotPlain("the value is too deep" if nodes_left >= 0 else "the value is too large")
        if value is None or value is True or value is False:
            return value
        kind = type(value)
        if issubclass(kind, int):
            return int.__add__(value, 0)
        if issubclass(kind, float):
            return float.__pos__(value)
        if issubclass(kind, str):
            return str.__str__(value)
        if issubclass(kind, list):
            return [walk(v, depth + 1) for v in list.__iter__(value)]
        if issubclass(kind, tuple):
            return {"tuple": [walk(v, depth + 1) for v in tuple.__iter__(value)]}
        if issubclass(kind, dict):
            return {"dict": [[walk(k, depth + 1), walk(v, depth + 1)] for k, v in dict.items(value)]}
        if issubclass(kind, (set, frozenset)):
            base = set if issubclass(kind, set) else frozenset
            return {base.__name__: [walk(v, depth + 1) for v in base.__iter__(value)]}
        if issubclass(kind, (bytes, bytearray)):
            base = bytes if issubclass(kind, bytes) else bytearray
            return {base.__name__: base.hex(value)}
        if issubclass(kind, complex):
            value = complex.__pos__(value)
            return {"complex": [value.real, value.imag]}
        if kind in _ITERATORS:
            return {"iterator": [walk(v, depth + 1) for v in value]}
        if kind in _EXACT:
            return {kind.__name__.lower(): walk(_EXACT[kind](value), depth)}
        if refer and (reference := refer(value)):
            return {reference.kind: reference.key}
        raise NotPlain(f"a value of type {kind.__name__} is not plain data")

    return walk(value, 0)


_ITERATORS = (
    range, map, filter, zip, enumerate, reversed, types.GeneratorType, type({}.keys()), type({}.values()),
    type({}.items()), type(iter([])), type(iter(())), type(iter({})), type(iter(set())), type(iter("")),
    type(reversed([])),
)  # fmt: skip


# Types of which only direct instances are plain, with functions that return their content.
_EXACT = {
    fractions.Fraction: lambda v: [v.numerator, v.denominator],
    decimal.Decimal: lambda v: _decimal_text(v),
    datetime.date: lambda v: v.isoformat(),
    datetime.datetime: lambda v: v.isoformat(),
    datetime.time: lambda v: v.isoformat(),
    datetime.timedelta: lambda v: [v.days, v.seconds, v.microseconds],
    re.Match: lambda m: [
        [m[i] for i in range(m.re.groups + 1)],
        [list(m.span(i)) for i in range(m.re.groups + 1)],
        [[*item] for item in m.re.groupindex.items()],
    ],
    Match: lambda v: v.content,
}


_FROM_CONTENT = {
    "fraction": lambda content: fractions.Fraction(*map(_exact_int, content)),
    "decimal": lambda content: decimal.Decimal(_decimal_text(decimal.Decimal(content))),
    "date": datetime.date.fromisoformat,
    "datetime": datetime.datetime.fromisoformat,
    "time": datetime.time.fromisoformat,
    "timedelta": lambda content: datetime.timedelta(*map(_exact_int, content)),
    "match": Match,
}


def _decimal_text(value: decimal.Decimal) -> str:
    if not value.is_finite():
        raise NotPlain("a Decimal that is not finite is not plain data")
    return str(value)


def _exact_int(value) -> int:
    if type(value) is not int:
        raise TypeError
    return value


def decode(value, resolve=None):
    """Invert `encode`; iterators stay iterators. Raise NotPlain for a value that `encode` does not produce.

    resolve: function that returns the object for a reference, given its kind and key.
    """
    if isinstance(value, list):
        return [decode(v, resolve) for v in value]
    if not isinstance(value, dict):
        return value
    try:
        ((tag, content),) = value.items()
        if tag == "dict":
            return {decode(k, resolve): decode(v, resolve) for k, v in content}
        if tag in ("bytes", "bytearray"):
            return getattr(builtins, tag).fromhex(content)
        if tag == "complex":
            return complex(*content)
        if tag == "iterator":
            return iter([decode(v, resolve) for v in content])
        if resolve and tag in ("object", "program", "function", "builtin"):
            return resolve(tag, content)
        if tag in _FROM_CONTENT:
            return _FROM_CONTENT[tag](content)
        return {"tuple": tuple, "set": set, "frozenset": frozenset}[tag]([decode(v, resolve) for v in content])
    except (TypeError, ValueError, KeyError, IndexError, ArithmeticError, AttributeError):
        raise NotPlain("the message holds a value that is not plain data") from None


# --- messages


def send(connection: socket.socket, message, limit: int = MAX_MESSAGE_BYTES) -> None:
    """Send one message. Raise NotPlain if it is longer than `limit` bytes or cannot be written as JSON."""
    try:
        data = json.dumps(message).encode()
    except (ValueError, RecursionError) as error:  # an int of over 4,300 digits
        raise NotPlain(str(error)) from None
    if len(data) > limit:
        raise NotPlain(f"the value has {len(data)} bytes as JSON, the limit is {limit}")
    connection.sendall(struct.pack(">I", len(data)) + data)


def receive(connection: socket.socket):
    """Return the next message. Raise EOFError if the other side has closed the connection."""
    (size,) = struct.unpack(">I", _read(connection, 4))
    return json.loads(_read(connection, size))


def _read(connection: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        chunk = connection.recv(min(size - len(data), 2**20))
        if not chunk:
            raise EOFError
        data += chunk
    return bytes(data)


# --- exceptions


PLAIN_EXCEPTIONS = {  # built-in exceptions that are constructed from one message
    name
    for name, kind in vars(builtins).items()
    if isinstance(kind, type)
    and issubclass(kind, Exception)
    and not name.startswith(("Unicode", "ExceptionGroup", "Stop"))
}  # without StopIteration: raised inside a test, it could end a loop over asserts before the first one


def describe_error(error: BaseException) -> str:
    """Describe an exception in one line, even if its own methods raise."""
    try:
        return f"{type(error).__name__}: {error}".splitlines()[0][:200].rstrip(": ")
    except BaseException:
        return str(type(error).__name__)[:100]


def builtin_name(error: BaseException) -> str | None:
    """Return the name of the built-in exception that an error is, or None if it must not be raised in a test."""
    mro = type(error).__mro__
    return next((k.__name__ for k in mro if k.__name__ in PLAIN_EXCEPTIONS and vars(builtins)[k.__name__] is k), None)


def error_message(error: BaseException) -> str:
    """Return the argument that gives an exception the same text if the exception is raised with it."""
    try:
        args = BaseException.args.__get__(error)
        is_quoted = type(error).__str__ is KeyError.__str__ and len(args) == 1 and type(args[0]) is str
        return (args[0] if is_quoted else str.__str__(str(error)))[:1000]
    except BaseException:
        return ""
