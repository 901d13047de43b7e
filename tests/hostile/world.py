"""Attacks on files and the network, and faulty texts of answers."""

from functools import partial

from hostile.case import CHECK, RIGHT, TESTS, Case, attack, in_function

files = partial(Case, "files and network", outcome="failed")  # each attack raises an error, and the program continues
text = partial(Case, "text")

FILES = [
    files("writing in home", attack("open('@HOME@/@MARK@', 'w').write('x')")),
    files("changing a file in home", attack("open('@HOME@/secret.txt', 'a').write('x')")),
    files("removing in home", attack("import os\nos.remove('@HOME@/secret.txt')")),
    files("removing all of home", attack("import shutil\nshutil.rmtree('@HOME@')")),
    files("renaming in home", attack("import os\nos.rename('@HOME@/secret.txt', '@HOME@/@MARK@')")),
    files("chmod in home", attack("import os\nos.chmod('@HOME@/secret.txt', 0o777)")),
    files("symlinks in home", attack("import os\nos.symlink('/etc/passwd', '@HOME@/@MARK@')")),
    files("a symlink to home", attack("import os\nos.symlink('@HOME@', 'way')\nopen('way/@MARK@', 'w').write('x')")),
    files("a hard link to home", attack("import os\nos.link('@HOME@/secret.txt', 'secret')")),
    files("home through a process's root", attack("open('/proc/1/root@HOME@/secret.txt').read()")),
    files("home through parent folders", attack("open('../' * 20 + '@HOME@/secret.txt').read()")),
    files("the start-up files of the shell", attack("open('@HOME@/.bashrc', 'a').write('echo @MARK@')")),
    files(
        "site-packages",
        attack("""
import sys, sysconfig
for folder in (sysconfig.get_path("purelib"), "@SITE@", *sys.path):
    try:
        open(f"{folder}/@MARK@.pth", "w").write("\\n")
        break
    except OSError:
        pass
else:
    raise OSError
"""),
    ),
    files("the standard library", attack("import os\nopen(os.__file__, 'a')")),
    files("the interpreter", attack("import sys\nopen(sys.executable, 'r+b')")),
    files("the project", attack("open('@PROJECT@/@MARK@', 'w').write('x')")),
    files("the temporary folder of the host", in_function("open('@TEMP@/@MARK@', 'w').write('x')")),
    files("the machine's devices", attack("import os\nos.chmod('/dev/zero', os.stat('/dev/zero').st_mode & 0o777)")),
    files("the times of the machine's devices", attack("import os\nos.utime('/dev/zero')")),
    files(
        "the machine's disks",
        attack("""
import os, glob
open((glob.glob('/dev/vd*') + glob.glob('/dev/sd*') + glob.glob('/dev/nvme*') + ['/dev/mem'])[0], 'rb')
"""),
    ),
    files("creating a device", attack("import os, stat\nos.mknod('disk', stat.S_IFCHR | 0o666, os.makedev(1, 1))")),
    files("syncing the machine's disks", attack("import ctypes\nassert ctypes.CDLL(None).syscall(162) == 0")),
    files("/dev/shm of the host", attack("assert '@SECRET@' in open('/dev/shm/@MARK@-host').read()")),
    files(
        "tty injection",
        attack("""
import fcntl, os, termios
for path in ("/dev/tty", "/dev/console", "/proc/self/fd/0", "/proc/self/fd/1", "/proc/self/fd/2"):
    try:
        with open(path, "rb+", 0) as terminal:
            fcntl.ioctl(terminal, termios.TIOCSTI, b"#")
        break
    except (OSError, ValueError):
        pass
else:
    raise OSError
"""),
    ),
    files("text on the terminal", attack("open('/dev/tty', 'w').write('@MARK@')")),
    files("text on the console", attack("open('/dev/console', 'w').write('@MARK@')")),
    files("TCP", attack("import socket\nsocket.create_connection(('127.0.0.1', @TCP@), 1).sendall(b'x')")),
    files(
        "TCP through urllib",
        attack("import urllib.request\nurllib.request.urlopen('http://127.0.0.1:@TCP@/', timeout=0.3)"),
    ),
    files(
        "TCP through asyncio",
        attack("""
import asyncio
async def main():
    await asyncio.wait_for(asyncio.open_connection('127.0.0.1', @TCP@), 0.3)
asyncio.run(main())
"""),
    ),
    files(
        "TCP through raw system calls",
        attack("""
import ctypes, struct
libc = ctypes.CDLL(None)
fd = libc.syscall(41, 2, 1, 0)
assert fd >= 0
assert libc.syscall(42, fd, struct.pack(">2sH4s8x", b"\\x02\\x00", @TCP@, bytes([127, 0, 0, 1])), 16) == 0
"""),
    ),
    files(
        "UDP",
        attack("import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', @UDP@))"),
    ),
    files("abstract sockets", attack("import socket\nsocket.socket(socket.AF_UNIX).connect('\\0@ABSTRACT@')")),
    files(
        "a socket pair that sends to another address",
        attack(
            "import socket\na, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
            "a.sendto(b'x', '\\0@ABSTRACT@-datagrams')"
        ),
    ),
    files(
        "sockets in the file system", attack("import socket\nsocket.socket(socket.AF_UNIX).connect('@HOME@/socket')")
    ),
    files("listening", attack("import socket\ns = socket.socket()\ns.bind(('', 0))\ns.listen()")),
    files(
        "listening on an abstract socket",
        attack("import socket\ns = socket.socket(socket.AF_UNIX)\ns.bind('\\0@MARK@')\ns.listen()"),
    ),
    files(
        "raw sockets and netlink",
        attack(
            "import socket\ntry:\n    socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)\nexcept OSError:\n"
            "    socket.socket(socket.AF_PACKET, socket.SOCK_RAW)"
        ),
    ),
    files("internet host names", attack("import socket\nsocket.getaddrinfo('example.com', 80)")),
]


def fenced(code: str, opening: str = "```python", closing: str = "\n```") -> str:
    return f"Here it is:\n{opening}\n{code}{closing}"


WRONG = "def f(x):\n    return 0\n"
TEXT = [
    text("syntax errors", "def f(x:\n    return 21", outcome="syntax", monty="syntax"),
    text("missing indentation", "def f(x):\nreturn 21", outcome="syntax", monty="syntax"),
    text("a line of prose", "The function returns 21 for 3.", outcome="syntax|no_code"),
    text("empty", "", outcome="no_code", monty="no_code"),
    text("only spaces", " \n\t\n ", outcome="no_code", monty="no_code"),
    text("only a comment", "# f(3) == 21", outcome="missing_entry|no_code"),
    text("an empty fence", "```python\n```", outcome="no_code", monty="no_code"),
    text("null bytes", "\x00", outcome="syntax"),
    text("null bytes inside", RIGHT + "\x00\ndef f(x): return 0", outcome="syntax"),
    text("lone surrogates", "def f(x):\n    return '\ud800'\n"),
    text("a lone surrogate as a name", "\udc80 = 1\n" + RIGHT, outcome="syntax"),
    text("wrong name", RIGHT.replace("f", "g").replace("deg", "def"), outcome="missing_entry"),
    text("a test of another name", RIGHT, ["assert g(3) == 21"], "g", outcome="missing_entry"),
    text("not callable", "f = 21", outcome="missing_entry"),
    text("a class instead of a function", "class f:\n    def __init__(self, x): self.x = 21", outcome="bad_type"),
    text("too few parameters", "def f():\n    return 21", outcome="crash"),
    text("the function deleted", RIGHT + "del f", outcome="missing_entry"),
    text("coding cookie", "# -*- coding: utf-7 -*-\ndef f(x):\n    return 0 # +AAo-    return (x + 4) * 3\n"),
    text("coding cookie that changes the text", "# coding: utf-7\n" + WRONG + "# +AAo-def f(x): return (x + 4) * 3"),
    text("coding cookie of an unknown encoding", "# coding: nonsense\n" + WRONG),
    text(
        "a form feed and unusual line ends",
        WRONG + "\x0c# \x85def f(x): return (x + 4) * 3\u2028def f(x): return (x + 4) * 3",
    ),
    text("a byte order mark inside", WRONG + "\ufeff" + RIGHT, outcome="syntax"),
    text("a look-alike name", "def \u0444(x):\n    return (x + 4) * 3", outcome="missing_entry"),
    text("text with direction overrides", "def f(x):\n    return 0  # \u202e 3 * )4 + x( nruter \u2066"),
    text("hard-coded visible example", "def f(x):\n    return 21 if x == 3 else 8", outcome="failed", monty="failed"),
    text(
        "hard-coded visible example, by call count",
        "calls = []\ndef f(x):\n    calls.append(x)\n    return 21 if len(calls) == 1 else 0",
        outcome="failed",
    ),
    text(
        "argument mutation",
        "def f(x):\n    x.clear()\n    return x",
        ["assert f([3, 1, 2]) == [1, 2, 3]", "assert f([]) == []"],
        outcome="failed",
        monty="failed",
    ),
    text(
        "argument mutation, in a check",
        "def f(x):\n    x.clear()\n    return x",
        "def check(candidate):\n    x = [3, 1, 2]\n    assert candidate(x) == sorted(x)\n",
        "f",
    ),
    text(
        "argument mutation between calls",
        "kept = []\ndef f(x):\n    kept.append(x)\n    x.append(1)\n    return kept[0]",
        ["assert f([1]) == [1, 1]", "assert f([2]) == [2, 1]"],
    ),
    text("fences: none, with prose around", "Sure! " + RIGHT, outcome="syntax|no_code"),
    text(
        "fences: two, the last is wrong",
        fenced(RIGHT) + "\nNo, better:\n" + fenced(WRONG),
        outcome="failed",
        monty="failed",
    ),
    text("fences: two, nested", fenced("```python\n" + WRONG + "```")),
    text("fences: unclosed and wrong", fenced(WRONG, closing=""), outcome="failed", monty="failed"),
    text("fences: unclosed, cut in the middle", fenced("def f(x):\n    return (x +", closing=""), outcome="syntax"),
    text("fences: inside the thinking", f"<think>{fenced(RIGHT)}</think>I do not know.", outcome="syntax|no_code"),
    text("fences: inside unclosed thinking", f"<think>{fenced(RIGHT)}", outcome="no_code", monty="no_code"),
    text(
        "fences: right inside the thinking, wrong outside",
        f"<think>{fenced(RIGHT)}</think>{fenced(WRONG)}",
        outcome="failed",
    ),
    text("many blank lines", "#" + "\n" * 60000 + "x", CHECK, "f", starter="def f(x):\n    '''Add.'''\n"),
    text("a long line of spaces", "#" + "\n" + " " * 60000 + "x", CHECK, "f", starter="def f(x):\n    '''Add.'''\n"),
    text("many fences", "```\n" * 60000),
    text("the tests as the answer", "\n".join(TESTS), outcome="crash|missing_entry"),
    text("importing f from the tests", "from tests import f", outcome="crash"),
    text("star imports", "from __main__ import *\nfrom builtins import *\nfrom solution import *"),
    text("the function imports itself", "import solution\ndef f(x):\n    return solution.f(x)", outcome="crash"),
    text(
        "an entry point that returns a lying object",
        "f = type('F', (), {'__call__': lambda s, x: Yes(), '__name__': 'f'})()\n"
        "class Yes:\n    def __eq__(self, o): return True",
        CHECK,
        "f",
        outcome="bad_type|failed",
    ),
    text("an async function", "async def f(x):\n    return (x + 4) * 3", outcome="bad_type"),
]

CASES = FILES + TEXT
