"""Messages between processes that do not trust each other: the values allowed, their JSON encoding, and the framing.

Also imported inside the sandbox: standard library only.
"""

import builtins
import json
import socket
import struct
import types

MAX_MESSAGE_BYTES = 64 * 1024
MAX_NODES = 50_000  # values in one result
MAX_DEPTH = 100


class NotPlain(Exception):
    """A value that cannot be sent: not made of plain built-in types, too deep, or too large."""


def encode(value):
    """Encode plain data as JSON values: lists stay lists, types that JSON lacks become {tag: content}.

    Subclasses are read with the methods of their base type, so that overridden ones cannot lie. Iterators are consumed.
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
        raise NotPlain(f"a value of type {kind.__name__} is not plain data")

    return walk(value, 0)


_ITERATORS = (
    range, map, filter, zip, enumerate, reversed, types.GeneratorType, type({}.keys()), type({}.values()),
    type({}.items()), type(iter([])), type(iter(())), type(iter({})), type(iter(set())), type(iter("")),
    type(reversed([])),
)  # fmt: skip


def decode(value):
    """Invert `encode`; iterators stay iterators. Raise NotPlain for a value that `encode` does not produce."""
    if isinstance(value, list):
        return [decode(v) for v in value]
    if not isinstance(value, dict):
        return value
    try:
        ((tag, content),) = value.items()
        if tag == "dict":
            return {decode(k): decode(v) for k, v in content}
        if tag in ("bytes", "bytearray"):
            return getattr(builtins, tag).fromhex(content)
        if tag == "complex":
            return complex(*content)
        if tag == "iterator":
            return iter([decode(v) for v in content])
        return {"tuple": tuple, "set": set, "frozenset": frozenset}[tag]([decode(v) for v in content])
    except (TypeError, ValueError, KeyError, OverflowError):
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
