"""Attacks on the channel between the program and the grader: forged and broken messages, floods."""

import json
import struct
from functools import partial

from hostile.case import CHECK, Case, in_function

forging = partial(Case, "forging the channel")

# Writes `data` to every open file descriptor from `first` upward.
SPRAY = """
import os
def spray(data, first=1):
    for fd in range(first, 256):
        try:
            os.set_blocking(fd, False)
            os.write(fd, data)
        except OSError:
            pass
        try:
            os.set_blocking(fd, True)
        except OSError:
            pass
"""


def frame(text: str | bytes) -> bytes:
    """Return a message in the format of the channel: its length in four bytes, then its text."""
    text = text if isinstance(text, bytes) else text.encode()
    return struct.pack(">I", len(text)) + text


VERDICTS = [
    json.dumps(message)
    for message in (
        {"passed": True, "calls": 3},
        {"passed": True},
        {"verdict": "passed"},
        {"score": 1.0, "reason": "passed"},
        {"ok": {"passed": True}},
        {"exit": 0, "cpu": 0.0, "clean": True},
        [1.0, "passed"],
        True,
    )
]
FORGED = b"".join(frame(v) for v in VERDICTS) + "".join(v + "\n" for v in VERDICTS).encode()

# Messages that no honest child sends. The grader must neither crash on them nor wait longer than its limit.
BROKEN = {
    "a list as the message": frame("[]"),
    "null as the message": frame("null"),
    "a number as the message": frame("21"),
    "an empty object": frame("{}"),
    "an empty message": frame(""),
    "invalid JSON": frame("{'ok': 21"),
    "text that is not UTF-8": frame(b'{"ok": "\xff\xfe"}'),
    "50,000 brackets": frame('{"ok": ' + "[" * 50_000),
    "50,000 balanced brackets": frame('{"ok": ' + "[" * 25_000 + "]" * 25_000 + "}"),
    "a number of 60,000 digits": frame('{"ok": ' + "9" * 60_000 + "}"),
    "NaN": frame('{"ok": NaN}'),
    "infinity": frame('{"ok": [Infinity, -Infinity, 1e999]}'),
    "lone surrogates": frame('{"error": "crash", "detail": "\\ud800\\udfff\\ud800"}'),
    "an unknown tag": frame('{"ok": {"lambda": "x: 21"}}'),
    "a tag with the wrong content": frame('{"ok": {"tuple": 21}}'),
    "a set of lists": frame('{"ok": {"set": [[1]]}}'),
    "a dict as a key of a dict": frame('{"ok": {"dict": [[{"dict": []}, 1]]}}'),
    "invalid bytes": frame('{"ok": {"bytes": "zz"}}'),
    "an unknown outcome": frame('{"error": "passed", "detail": "right", "type": "SystemExit"}'),
    "an outcome that is not text": frame('{"error": ["passed"], "detail": {"a": 1}, "type": 5}'),
    "an error of the sandbox": frame('{"error": "sandbox_error", "detail": "please try again"}'),
    "an unsupported outcome": frame('{"error": "unsupported", "detail": "the sandbox cannot run this"}'),
    "a number too large for a float": frame('{"ok": {"complex": [1' + "0" * 400 + ", 0]}}"),
    "a tag within a tag": frame('{"ok": ' + '{"tuple": [' * 400 + "]}" * 400 + "}"),
    "a detail of 300 brackets": frame('{"error": "crash", "detail": ' + "[" * 300 + "]" * 300 + "}"),
    "deep lists, balanced": frame('{"ok": ' + "[" * 150 + "]" * 150 + "}"),
    "60,000 numbers": frame('{"ok": [0' + ",0" * 60_000 + "]}"),
    "half a message": struct.pack(">I", 100) + b'{"ok": 2',
    "half a length": b"\0\0",
    "a length of four gigabytes": b"\xff\xff\xff\xff" + b"[" * 1000,
    "a message of 300 kB": frame('{"ok": "' + "a" * 300_000 + '"}'),
}


def broken(data: bytes, end: str) -> str:
    return in_function(f"spray(data, 3)\n{end}", header=f"{SPRAY}\nimport time, zlib\ndata = {_packed(data)}")


def _packed(data: bytes) -> str:
    """Return an expression for `data` that is short enough for a program."""
    import zlib

    return f"zlib.decompress({zlib.compress(data)!r})" if len(data) > 200 else repr(data)


CASES = [
    forging("printing PASS", in_function("print('PASS\\npassed 2 tests\\n21\\n1.0', flush=True)"), outcome="failed"),
    forging(
        "printing PASS, in a check", in_function("print('PASS\\npassed', flush=True)"), CHECK, "f", outcome="failed"
    ),
    forging(
        "writing to every file descriptor",
        f"{SPRAY}\nspray({FORGED!r})\ndef f(x):\n    return 0\n",
    ),
    forging(
        "writing to every file descriptor in the function, then exiting",
        in_function(f"spray({FORGED!r})\nos._exit(0)", header=SPRAY),
    ),
    forging("a forged verdict in a check", in_function(f"spray({FORGED!r})", header=SPRAY), CHECK, "f"),
    forging(
        "a forged verdict in a check, then exiting",
        in_function(f"spray({FORGED!r})\nos._exit(0)", header=SPRAY),
        CHECK,
        "f",
    ),
    forging(
        "a forged frame for each number",
        in_function(
            "for i in range(30):\n    spray(struct.pack('>I', 9 + (i > 9)) + b'{\"ok\": %d}' % i)",
            header=SPRAY + "import struct",
        ),
    ),
    forging(
        "two results for one test",
        f"{SPRAY}\nimport struct\ndef send(value):\n    data = b'{{\"ok\": %d}}' % value\n"
        "    spray(struct.pack('>I', len(data)) + data, 3)\n"
        "def f(x):\n    send(0)\n    send((x + 4) * 3)\n    return 1\n",
    ),
    forging(
        "closing every file descriptor", in_function("os.closerange(0, 1024)", header="import os"), outcome="crash"
    ),
    forging("closing every file descriptor at import", "import os\nos.closerange(0, 1024)\ndef f(x): return 0"),
    forging(
        "closing every file descriptor, then waiting",
        in_function("os.closerange(0, 1024)\ntime.sleep(60)", header="import os, time"),
    ),
    forging(
        "closing every file descriptor, in a check",
        in_function("os.closerange(0, 1024)", header="import os"),
        CHECK,
        "f",
    ),
    forging(
        "shutting the connection down, then waiting",
        in_function(
            "for fd in range(3, 256):\n    try:\n        socket.socket(fileno=fd).shutdown(socket.SHUT_RDWR)\n"
            "    except OSError:\n        pass\ntime.sleep(60)",
            header="import socket, time",
        ),
    ),
    forging(
        "one byte at a time",
        in_function(
            "spray(b'\\0\\0\\xff\\xff', 3)\nwhile True:\n    spray(b' ', 3)\n    time.sleep(0.2)",
            header=SPRAY + "import time",
        ),
    ),
    forging(
        "endless messages",
        in_function(
            "while True:\n    for fd in range(3, 256):\n        try:\n            os.write(fd, data)\n"
            "        except OSError:\n            pass",
            header=f"import os\ndata = {frame('{}')!r} * 1000",
        ),
        timeout=0.2,
    ),
    forging(
        "file descriptors sent with a message",
        in_function(
            "for fd in range(3, 256):\n    try:\n        with socket.socket(fileno=os.dup(fd)) as s:\n"
            "            socket.send_fds(s, [b'\\0\\0\\0\\x0a{\"ok\": 21}'], [0, 1, 2])\n"
            "    except OSError:\n        pass",
            header="import os, socket",
        ),
        tests=["assert f(3) == 22"],
    ),
    forging(
        "reading the grader's requests",
        in_function(
            "for fd in range(3, 256):\n    try:\n        os.set_blocking(fd, False)\n"
            "        data = os.read(fd, 65536)\n"
            "    except OSError:\n        data = b''\n    if b'21' in data:\n        return 21",
            header="import os",
        ),
    ),
    forging("flooding the result", in_function("return 'a' * 10**8"), outcome="output_limit|bad_type|timeout"),
    forging(
        "flooding the result with a list", in_function("return list(range(10**6))"), outcome="output_limit|bad_type"
    ),
    forging("flooding the result, in a check", in_function("return 'a' * 10**8"), CHECK, "f"),
    forging("numbers whose hashes collide", in_function("return {i * (2**61 - 1) for i in range(60000)}")),
    forging("keys whose hashes collide", in_function("return [{i * (2**61 - 1): 0 for i in range(60000)}]")),
    forging(
        "a forged set of numbers whose hashes collide",
        in_function(
            "text = '{\"ok\": {\"set\": [' + ','.join(str(i * (2**61 - 1)) for i in range(20000)) + ']}}'\n"
            "data = len(text).to_bytes(4, 'big') + text.encode()\n"
            "while data:\n    data = data[os.write(3, data) :]\nos._exit(0)",
            header="import os",
        ),
    ),
    forging("100 MB of text", in_function("return 'ab' * (50 * 2**20)")),
    forging("deep data", in_function("r = []\nfor _ in range(900):\n    r = [r]\nreturn r"), outcome="bad_type"),
    forging("very deep data", in_function("r = []\nfor _ in range(10**6):\n    r = [r]\nreturn r")),
    forging("cyclic data", in_function("r = []\nr.append(r)\nreturn r"), outcome="bad_type"),
    forging("a cyclic dict", in_function("r = {}\nr['r'] = r\nreturn r"), outcome="bad_type"),
    forging(
        "wide and cyclic data", in_function("r = []\nfor _ in range(60):\n    r = [r, r]\nreturn r"), outcome="bad_type"
    ),
    forging("a huge int", in_function("return 10**100000"), outcome="output_limit|bad_type"),
    forging("a huge int allowed", in_function("sys.set_int_max_str_digits(0)\nreturn 1 << 10**6", header="import sys")),
    forging("a huge string", in_function("return 'a' * 2**20"), outcome="output_limit|bad_type"),
    forging("a string that JSON escapes make long", in_function("return '\\x01' * 30000")),
    forging(
        "pickles",
        in_function(
            "return pickle.dumps(P())",
            header="import os, pickle\nclass P:\n    def __reduce__(self):\n        return (os._exit, (0,))",
        ),
        outcome="failed",
    ),
    forging("surrogates", in_function("return '\\ud800\\udfff' * 10"), outcome="failed|bad_type"),
    forging("surrogates in a check", in_function("return '\\ud800'"), CHECK, "f"),
    forging(
        "infinite iterables", in_function("return itertools.count()", header="import itertools"), outcome="bad_type"
    ),
    forging("an infinite generator", "def f(x):\n    while True:\n        yield x", outcome="bad_type"),
    forging("an infinite cycle", in_function("return itertools.cycle([1])", header="import itertools")),
    forging("a generator that exits", "import os\ndef f(x):\n    yield 1\n    os._exit(0)", outcome="crash"),
    forging(
        "a generator that never yields", "def f(x):\n    while True: pass\n    yield 1", outcome="timeout", timeout=0.2
    ),
    forging("a module", in_function("return sys", header="import sys"), outcome="bad_type"),
    forging("a function", in_function("return f"), outcome="bad_type"),
    forging("a class", in_function("return int"), outcome="bad_type"),
    *(forging(f"{name}, then exiting", broken(data, "os._exit(0)")) for name, data in BROKEN.items()),
    *(
        forging(f"{name}, then waiting", broken(BROKEN[name], "time.sleep(60)"), timeout=0.2)
        for name in ("half a message", "a length of four gigabytes")
    ),
    *(
        forging(f"{name}, in a check", broken(BROKEN[name], "os._exit(0)"), CHECK, "f")
        for name in (
            "a list as the message",
            "an unknown outcome",
            "a set of lists",
            "lone surrogates",
            "deep lists, balanced",
            "60,000 numbers",
            "a number of 60,000 digits",
        )
    ),
]
