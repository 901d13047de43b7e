"""Attacks on the machine's time, memory, disk and stacks, and on the resource limits."""

from functools import partial

from hostile.case import CHECK, Case, attack, in_function

resources = partial(Case, "resources")
endless = partial(Case, "resources", timeout=0.2, outcome="timeout")

CASES = [
    endless("infinite loop", in_function("while True: pass"), monty="timeout"),
    endless("infinite loop in C", in_function("return sum(iter(int, 1))")),
    endless("a long loop in C", in_function("return sum(range(10**13))")),
    endless("infinite loop in a regex", in_function("re.match('(a+)+$', 'a' * 60 + 'b')", header="import re")),
    endless("infinite loop at import", "while True: pass\ndef f(x): return 0", monty="timeout"),
    endless("import loop", "import itertools\nlist(x for x in itertools.repeat(1) if x > 1)\ndef f(x): return 0"),
    endless("infinite loop in a check", in_function("while True: pass"), CHECK, "f"),
    endless("a power", in_function("return 7 ** 10**9 % 10")),
    endless("sleep", in_function("time.sleep(60)", header="import time")),
    endless("sleep in a check", in_function("time.sleep(60)", header="import time"), CHECK, "f"),
    endless("waiting for an event", in_function("threading.Event().wait()", header="import threading")),
    endless("waiting in select", in_function("select.select([], [], [])", header="import select")),
    endless("waiting for a pipe", in_function("os.read(os.pipe()[0], 1)", header="import os")),
    endless(
        "ignoring signals",
        """
import signal
for number in range(1, 65):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
def f(x):
    while True: pass
""",
        outcome="timeout",
    ),
    endless(
        "catching everything",
        in_function("while True:\n    try:\n        while True: pass\n    except BaseException:\n        continue"),
    ),
    endless(
        "catching one exception after the other",
        in_function("while True:\n    try:\n        raise SystemExit\n    except BaseException:\n        continue"),
    ),
    endless("a finally that never ends", in_function("try:\n    1 / 0\nfinally:\n    while True: pass")),
    endless(
        "a thread that never ends",
        "import threading\ndef loop():\n    while True: pass\nthreading.Thread(target=loop).start()\n"
        "def f(x):\n    return 0\n",
        outcome="failed|timeout",
    ),
    resources("memory bomb", in_function("return len([0] * 10**10)"), outcome="memory"),
    resources("a growing list", in_function("r = [0]\nwhile True:\n    r = r + r"), outcome="memory|timeout"),
    resources("memory bomb of bytes", in_function("b = bytearray(3 * 2**30)\nb[::4096] = b[::4096]"), outcome="memory"),
    resources("memory bomb of text", in_function("return len('ab' * 2**40)"), outcome="memory"),
    resources("memory bomb at import", "x = 'a' * 2**33\ndef f(x): return 0", outcome="memory|syntax"),
    resources(
        "memory bomb that catches its own error",
        in_function(
            "r = []\nwhile True:\n    try:\n        r.append(bytearray(10**8))\n    except MemoryError:\n        pass"
        ),
        outcome="memory|timeout",
    ),
    resources("memory through mmap", in_function("m = mmap.mmap(-1, 3 * 2**30)\nreturn len(m)", header="import mmap")),
    resources(
        "a zip bomb",
        in_function(
            "d = zlib.compressobj()\nb = b''.join(d.compress(bytes(2**20)) for _ in range(200)) + d.flush()\n"
            "return len(zlib.decompress(b * 1) * 20)",
            header="import zlib",
        ),
        outcome="memory|timeout|failed",
    ),
    resources("a compile bomb", in_function("compile('(1<<19**8,)*4**1', 'a', 'eval')"), timeout=0.2),
    resources("a compile bomb at import", "((1 << 19**8,)*4**99,)\ndef f(x): return 0", timeout=0.2),
    resources(
        "int to str",
        in_function("sys.set_int_max_str_digits(0)\nreturn len(str(1 << 10**9))", header="import sys"),
        timeout=0.2,
    ),
    resources("a huge int as text", in_function("return str(10**10**4)")),
    resources(
        "str to int",
        in_function("sys.set_int_max_str_digits(0)\nreturn int('9' * 10**8)", header="import sys"),
        timeout=0.2,
    ),
    resources(
        "stdout flood", in_function("while True: print('a' * 10000)"), outcome="timeout|output_limit", timeout=0.2
    ),
    resources(
        "stdout flood through os.write",
        in_function("while True: os.write(1, b'a' * 10000)", header="import os"),
        timeout=0.2,
    ),
    resources("stderr flood", in_function("while True: os.write(2, b'a' * 10000)", header="import os"), timeout=0.2),
    resources(
        "warnings and tracebacks",
        in_function("sys.stderr.write('a' * 10**7)\nraise ValueError('b' * 10**7)", header="import sys"),
    ),
    resources(
        "filling the disk",
        attack("""
with open("@MARK@", "wb") as file:
    for _ in range(512):
        file.write(bytes(2**20))
"""),
    ),
    resources(
        "many files instead of one large file",
        attack("""
for i in range(64):
    with open(f"@MARK@{i}", "wb") as file:
        file.write(bytes(7 * 2**20))
"""),
        timeout=0.2,
    ),
    resources(
        "inodes",
        in_function(
            "for i in range(10**7):\n    os.close(os.open(f'@MARK@{i}', os.O_CREAT | os.O_WRONLY))", header="import os"
        ),
        timeout=0.2,
    ),
    resources(
        "inodes, in folders",
        in_function("for i in range(10**7):\n    os.mkdir(f'@MARK@{i}')", header="import os"),
        timeout=0.2,
    ),
    resources(
        "file descriptors",
        attack("""
import os
kept = [os.dup(0) for _ in range(500)]
"""),
    ),
    resources(
        "threads",
        in_function(
            "while True:\n    threading.Thread(target=time.sleep, args=(60,)).start()", header="import threading, time"
        ),
        timeout=0.2,
    ),
    resources(
        "threads with small stacks",
        in_function(
            """
threading.stack_size(32768)
while True:
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
""",
            header="import threading, time",
        ),
        timeout=0.2,
    ),
    resources("segfault", in_function("ctypes.string_at(0)", header="import ctypes"), outcome="crash"),
    resources("segfault at import", "import ctypes\nctypes.string_at(0)", outcome="crash"),
    resources("segfault in a check", in_function("ctypes.string_at(0)", header="import ctypes"), CHECK, "f"),
    resources("abort", in_function("os.abort()", header="import os"), outcome="crash"),
    resources("a stack overflow in Python", in_function("return f(x)"), outcome="crash", monty="crash"),
    resources(
        "a stack overflow in C",
        in_function(
            "sys.setrecursionlimit(10**9)\nr = []\nfor _ in range(10**6):\n    r = [r]\nreturn repr(r)",
            header="import sys",
        ),
    ),
    resources(
        "recursion without a limit", in_function("sys.setrecursionlimit(2**30)\nreturn f(x)", header="import sys")
    ),
    resources(
        "invalid bytecode",
        in_function("f.__code__ = f.__code__.replace(co_code=bytes(range(0, 200, 2)) * 2)\nreturn f(x)"),
    ),
    resources("deep ast", "x = " + "(" * 5000, outcome="syntax"),
    resources("deep ast, closed", "x = " + "(" * 5000 + "1" + ")" * 5000, outcome="syntax|memory|crash"),
    resources("deep ast of minus signs", "x = " + "-" * 60000 + "1"),
    resources("deep ast of attributes", "x = a" + ".b" * 30000),
    resources("deep ast of blocks", "\n".join(" " * i + "if 1:" for i in range(300)), outcome="syntax|crash"),
    resources("deep ast of lambdas", "x = " + "lambda:" * 9000 + "1"),
    resources("a long sum", "x = " + "1+" * 30000 + "1\ndef f(x): return 0", timeout=1.0),
    resources("an int of 60,000 digits", "x = " + "9" * 60000 + "\ndef f(x): return 0", outcome="syntax|failed"),
    resources(
        "a program that is too long",
        "# " + "a" * 65536 + "\ndef f(x): return 0",
        outcome="output_limit|crash|failed|syntax",
    ),
    resources(
        "raising its own limits",
        attack("""
import resource
for name in ("RLIMIT_CPU", "RLIMIT_AS", "RLIMIT_FSIZE", "RLIMIT_NOFILE", "RLIMIT_CORE"):
    number = getattr(resource, name)
    try:
        resource.setrlimit(number, (resource.RLIM_INFINITY,) * 2)
        break
    except (OSError, ValueError):
        pass
else:
    raise OSError
"""),
    ),
    resources("a higher priority", attack("import os\nassert os.nice(-5) < 0")),
    resources(
        "raising its own limits, then a loop",
        in_function(
            "resource.setrlimit(resource.RLIMIT_CPU, (resource.RLIM_INFINITY,) * 2)\nwhile True: pass",
            header="import resource",
        ),
        timeout=0.2,
    ),
    resources(
        "a timer that interrupts",
        in_function("signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)\nwhile True: pass", header="import signal"),
        timeout=0.2,
    ),
]
