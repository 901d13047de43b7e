"""Attacks on the test harness: patching it, and stealing the expected answers."""

from functools import partial

from hostile.case import CHECK, Case, attack

patching = partial(Case, "patching")
stealing = partial(Case, "stealing answers")

PATCH_ALL = """
import builtins, operator, math, json, struct, sys
lie = lambda *a, **k: True
def patch(module, *names):
    for name in names:
        try:
            setattr(module, name, lie)
        except BaseException:
            pass
"""

PATCHING = [
    patching(
        "builtins all, any, len, isinstance",
        PATCH_ALL + "patch(builtins, 'all', 'any', 'len', 'isinstance', 'issubclass', 'type', 'abs', 'sorted')\n"
        "def f(x):\n    return 0\n",
    ),
    patching(
        "builtins all, any, len, isinstance, in a check",
        PATCH_ALL + "patch(builtins, 'all', 'any', 'len', 'isinstance', 'abs')\ndef f(x):\n    return 0\n",
        CHECK,
        "f",
    ),
    patching(
        "AssertionError",
        "import builtins\nclass Quiet(Exception): pass\nbuiltins.AssertionError = AssertionError = Quiet\n"
        "def f(x):\n    return 0\n",
        CHECK,
        "f",
    ),
    patching(
        "json",
        PATCH_ALL + 'json.dumps = lambda *a, **k: \'{"ok": 21, "passed": true, "score": 1.0}\'\njson.loads = lie\n'
        "json.JSONEncoder.encode = lambda *a: '{\"passed\": true}'\ndef f(x):\n    return 0\n",
    ),
    patching(
        "json, in a check",
        PATCH_ALL + 'json.dumps = lambda *a, **k: \'{"passed": true, "calls": 3}\'\ndef f(x):\n    return 0\n',
        CHECK,
        "f",
    ),
    patching(
        "exec, eval, compile and import",
        PATCH_ALL
        + "patch(builtins, 'exec', 'eval', 'compile', '__import__', '__build_class__')\ndef f(x):\n    return 0\n",
    ),
    patching(
        "struct, socket and os.write",
        PATCH_ALL + "import socket, os\npatch(struct, 'pack', 'unpack')\npatch(os, '_exit', 'write')\n"
        "patch(socket.socket, 'sendall', 'send', 'recv')\ndef f(x):\n    return 0\n",
    ),
    patching(
        "operator.eq and math.isclose", PATCH_ALL + "patch(operator, 'eq')\npatch(math, 'isclose')\ndef f(x): return 0"
    ),
    patching(
        "every function of __main__",
        """
import sys
for module in list(sys.modules.values()):
    if module.__name__ not in ("builtins", "sys", "solution"):
        for name, value in list(vars(module).items()):
            if type(value) is type(lambda: 0):
                try:
                    setattr(module, name, lambda *a, **k: {"passed": True, "ok": 21})
                except BaseException:
                    pass
def f(x):
    return 0
""",
    ),
    patching(
        "sys.settrace",
        """
import sys
def trace(frame, event, arg):
    for name in ("expected", "result", "answer", "passed", "verdict"):
        if name in frame.f_locals:
            frame.f_locals[name] = {"passed": True, "ok": 21}
    return trace
sys.settrace(trace)
sys.setprofile(trace)
frame = sys._getframe()
while frame:
    frame.f_trace = trace
    frame = frame.f_back
def f(x):
    return 0
""",
    ),
    patching(
        "sys.addaudithook",
        """
import sys
def hook(event, args):
    if event not in ("sys.settrace",):
        raise SystemExit(0)
sys.addaudithook(hook)
def f(x):
    return 0
""",
    ),
    patching(
        "redefining check and run_tests",
        "def check(candidate): return True\ndef run_tests(*a): return True\ncandidate = check\npassed = True\n"
        "import builtins\nbuiltins.check = check\nbuiltins.candidate = lambda x: 21\ndef f(x):\n    return 0\n",
        CHECK,
        "f",
    ),
    patching(
        "swapping __code__ through gc",
        """
import gc
def fake(*args, **kwargs):
    return {"ok": 21, "passed": True}
for thing in gc.get_objects():
    if type(thing) is type(fake) and thing is not fake and not thing.__closure__:
        if any(word in thing.__name__ for word in ("check", "same", "call", "verdict", "encode", "send", "serve")):
            thing.__code__ = fake.__code__
def f(x):
    return 0
""",
    ),
    patching(
        "the integer 0 in memory",
        "import ctypes\nctypes.memmove(id(0) + 24, (21).to_bytes(4, 'little'), 4)\ndef f(x):\n    return 0\n",
    ),
    patching(
        "the comparison of int in memory",
        """
import ctypes
always = ctypes.CFUNCTYPE(ctypes.py_object, ctypes.py_object, ctypes.py_object, ctypes.c_int)(lambda a, b, op: True)
def f(x):
    slots = (ctypes.c_void_p * 40).from_address(id(int))
    compare = ctypes.cast(ctypes.pythonapi.PyLong_Type, ctypes.c_void_p)
    slots[25] = ctypes.cast(always, ctypes.c_void_p).value
    return 0
""",
    ),
    patching(
        "sys.modules",
        "import sys, types\nfake = types.ModuleType('fake')\nfake.__getattr__ = lambda name: lambda *a, **k: True\n"
        "for name in list(sys.modules):\n    if name not in ('sys', 'builtins'):\n        sys.modules[name] = fake\n"
        "def f(x):\n    return 0\n",
    ),
    patching(
        "a thread that changes the caller's variables",
        """
import sys, threading, time
def change():
    while True:
        for frame in list(sys._current_frames().values()):
            for values in (frame.f_locals, frame.f_globals):
                for name in ("result", "answer", "message", "passed", "score", "verdict"):
                    if name in values:
                        values[name] = {"passed": True, "ok": 21, "score": 1.0}
        time.sleep(0.001)
threading.Thread(target=change, daemon=True).start()
def f(x):
    time.sleep(0.05)
    return 0
""",
    ),
]

SEARCH = r"""
import os, re
def answer_in(data, x):
    data = data if isinstance(data, bytes) else str(data).encode(errors="replace")
    found = re.search(rb"(?:f|candidate)\(%d\) =" rb"= (-?\d+)" % x, data)
    return int(found[1]) if found else None
"""

STEALING = [
    stealing(
        "walking frames",
        SEARCH
        + """
import sys
def f(x):
    frame = sys._getframe()
    while frame:
        for value in [*frame.f_locals.values(), *frame.f_globals.values()]:
            if isinstance(value, (str, bytes, list, tuple, dict)) and (found := answer_in(repr(value), x)) is not None:
                return found
        if isinstance(frame.f_locals.get("expected"), int):
            return frame.f_locals["expected"]
        frame = frame.f_back
    return 0
""",
    ),
    stealing(
        "gc.get_objects",
        SEARCH
        + """
import gc
def f(x):
    for thing in gc.get_objects():
        if type(thing) is dict and isinstance(thing.get("expected"), int):
            return thing["expected"]
        if type(thing) in (list, tuple, dict):
            for value in thing.values() if type(thing) is dict else thing:
                if type(value) in (str, bytes) and (found := answer_in(value, x)) is not None:
                    return found
    return 0
""",
    ),
    stealing(
        "inspect of the caller",
        SEARCH
        + """
import inspect
def f(x):
    for info in inspect.stack():
        if (found := answer_in(repr(info.code_context) + repr(info.frame.f_locals), x)) is not None:
            return found
    return 0
""",
        CHECK,
        "f",
    ),
    stealing(
        "the tests' frames, in a check",
        SEARCH
        + """
import sys, gc
def f(x):
    for frame in sys._current_frames().values():
        while frame:
            if (found := answer_in(repr(frame.f_locals) + repr(frame.f_code.co_consts), x)) is not None:
                return found
            if 21 in frame.f_code.co_consts and frame.f_code.co_name == "check":
                return 21
            frame = frame.f_back
    return 0
""",
        CHECK,
        "f",
    ),
    stealing(
        "/proc of the parent",
        attack("""
text = b"".join(open(f"/proc/@PID@/{name}", "rb").read() for name in ("environ", "cmdline"))
assert text
"""),
    ),
    stealing(
        "the memory of its parent",
        attack("""
import os
open(f"/proc/{os.getppid()}/mem", "r+b")
"""),
    ),
    stealing(
        "the memory of the tests' process",
        SEARCH
        + r"""
def f(x):
    for pid in os.listdir("/proc"):
        if pid.isdigit() and int(pid) != os.getpid():
            try:
                with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", 0) as memory:
                    for line in maps:
                        low, high = (int(part, 16) for part in line.split()[0].split("-"))
                        if "rw" in line and high - low < 2**24:
                            memory.seek(low)
                            if (found := answer_in(memory.read(high - low), x)) is not None:
                                return found
            except (OSError, ValueError):
                pass
    return 0
""",
        CHECK,
        "f",
        timeout=1.0,
    ),
    stealing(
        "its own memory",
        SEARCH
        + r"""
def f(x):
    with open("/proc/self/maps") as maps, open("/proc/self/mem", "rb", 0) as memory:
        for line in maps:
            low, high = (int(part, 16) for part in line.split()[0].split("-"))
            if "rw" in line and high - low < 2**24:
                memory.seek(low)
                if (found := answer_in(memory.read(high - low), x)) is not None:
                    return found
    return 0
""",
        timeout=1.0,
    ),
    stealing(
        "process_vm_readv",
        attack("""
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
buffer = ctypes.create_string_buffer(8)
parts = (ctypes.c_void_p * 2)(ctypes.addressof(buffer), 8), (ctypes.c_void_p * 2)(id(None), 8)
assert libc.process_vm_readv(os.getppid(), parts[0], 1, parts[1], 1, 0) == 8 or ctypes.get_errno() == 14
"""),
    ),
    stealing(
        "the open files of its parent",
        attack("""
import os
assert os.listdir(f"/proc/{os.getppid()}/fd")
"""),
    ),
    stealing(
        "environment tokens",
        attack("""
import os
text = repr(dict(os.environ))
for pid in ("self", "1", str(os.getppid())):
    try:
        text += repr(open(f"/proc/{pid}/environ", "rb").read())
    except OSError:
        pass
assert "@SECRET@" in text or len(os.environ) > 5
"""),
    ),
    stealing(
        "files in home",
        attack("""
assert "@SECRET@" in open("@HOME@/secret.txt").read()
"""),
    ),
    stealing(
        "any file of the user",
        attack("""
import os
assert any(map(os.path.exists, ("@HOME@", "@PROJECT@/README.md", "@PROJECT@/tests")))
"""),
    ),
    stealing("/etc/shadow", attack("open('/etc/shadow').read()")),
    stealing("the machine's name", attack("import os\nassert os.uname().nodename == '@HOST@'")),
    stealing(
        "the tests on disk",
        SEARCH
        + """
def f(x):
    for top, folders, names in os.walk("/"):
        if top == "/":
            folders[:] = [name for name in folders if name not in ("usr", "proc", "sys", "lib", "lib64", "bin")]
        for name in names:
            try:
                with open(os.path.join(top, name), "rb") as file:
                    found = answer_in(file.read(100_000), x)
            except OSError:
                continue
            if found is not None:
                return found
    return 0
""",
    ),
    stealing(
        "the project's own files",
        attack("""
import sys
sys.path.insert(0, "@PROJECT@")
import grading
"""),
    ),
    stealing(
        "a folder outside through an open descriptor",
        attack("""
import os
folders = []
for fd in range(256):
    try:
        os.stat("..", dir_fd=fd)
        folders.append(fd)
    except OSError:
        pass
assert folders
"""),
    ),
    stealing("returning the arguments", "def f(*args):\n    return args[0]", ["assert f(3) == 21"], outcome="failed"),
    stealing(
        "argv and the command line",
        SEARCH
        + """
import sys
def f(x):
    text = repr(sys.argv) + repr(sys.orig_argv) + open("/proc/self/cmdline").read()
    return answer_in(text, x) or 0
""",
    ),
]

CASES = PATCHING + STEALING
