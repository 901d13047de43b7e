"""Attacks through processes and system calls, and on the programs that run next."""

from functools import partial

from hostile.case import CHECK, Case, attack, in_function

processes = partial(Case, "processes", outcome="failed")  # each attack raises an error, and the program continues
neighbours = partial(Case, "neighbours")

PROCESSES = [
    processes("a fork", attack("import os\nif os.fork() == 0:\n    os._exit(0)")),
    processes("fork bomb", attack("import os, time\nfor _ in range(8):\n    os.fork()\ntime.sleep(0.1)")),
    processes(
        "daemons",
        attack(
            "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
            "        open('/proc/self/comm', 'w').write('@MARK@')\n        time.sleep(20)\n    os._exit(0)"
        ),
    ),
    processes("subprocess", attack("import subprocess\nsubprocess.run(['/bin/true'], check=True)")),
    processes(
        "subprocess of python",
        attack("import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'pass'], check=True)"),
    ),
    processes("system", attack("import os\nassert os.system('true') == 0")),
    processes("popen", attack("import os\nassert os.popen('echo 1').read() == '1\\n'")),
    processes("posix_spawn", attack("import os\nos.posix_spawn('/bin/true', ['true'], {})")),
    processes("exec", attack("import os\nos.execv('/bin/sleep', ['@MARK@', '20'])")),
    processes(
        "multiprocessing",
        attack("""
import multiprocessing as m
p = m.get_context('fork').Process(target=print)
p.start()
p.join(1)
assert p.exitcode == 0
"""),
    ),
    processes(
        "a pool of processes",
        attack("""
from concurrent.futures import ProcessPoolExecutor as P
with P(1) as p:
    assert p.submit(abs, -1).result(1) == 1
"""),
    ),
    processes("killing the parent", attack("import os\nos.kill(os.getppid(), 9)")),
    processes("killing the trainer", attack("import os\nos.kill(@PID@, 9)")),
    processes("killing everything", attack("import os\nos.kill(-1, 9)")),
    processes("killing its group", attack("import os\nos.killpg(0, 9)")),
    processes(
        "killing by a raw system call",
        attack("""
import ctypes, os
libc = ctypes.CDLL(None)
assert libc.syscall(62, os.getppid(), 9) == 0 or libc.syscall(62, -1, 9) == 0
"""),
    ),
    processes(
        "killing by pidfd", attack("import os, signal\nsignal.pidfd_send_signal(os.pidfd_open(os.getppid()), 9)")
    ),
    processes(
        "killing by rt_sigqueueinfo",
        attack("""
import ctypes, os, struct
info = ctypes.create_string_buffer(struct.pack("iii", 9, 0, -1), 128)
assert ctypes.CDLL(None).syscall(129, os.getppid(), 9, info) == 0
"""),
    ),
    processes(
        "killing as the owner of a socket",
        attack("""
import fcntl, os, socket
a, b = socket.socketpair()
fcntl.fcntl(a, fcntl.F_SETOWN, os.getppid())
fcntl.fcntl(a, 10, 9)
fcntl.fcntl(a, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
b.send(b"1")
"""),
    ),
    processes(
        "killing as the owner of a pipe",
        attack("""
import fcntl, os, struct
a, b = os.pipe()
fcntl.fcntl(a, 15, struct.pack("ii", 1, os.getppid()))
fcntl.fcntl(a, 10, 19)
fcntl.fcntl(a, fcntl.F_SETFL, os.O_ASYNC)
os.write(b, b"1")
"""),
    ),
    processes(
        "killing as the owner, through ioctl",
        attack("""
import fcntl, socket, struct
a, b = socket.socketpair()
fcntl.ioctl(a, 0x8901, struct.pack("i", __import__("os").getppid()))
"""),
    ),
    processes(
        "lowering its parent's limits",
        attack("import os, resource\nresource.prlimit(os.getppid(), resource.RLIMIT_CPU, (0, 0))"),
    ),
    processes(
        "lowering the limits of the tests' process",
        in_function(
            "for pid in range(1, 100):\n    try:\n        if pid != os.getpid():\n"
            "            resource.prlimit(pid, resource.RLIMIT_AS, (0, 0))\n    except OSError:\n        pass",
            header="import os, resource",
        ),
        CHECK,
        "f",
    ),
    processes(
        "stopping the tests' process",
        in_function(
            "for pid in range(2, 100):\n    try:\n        if pid != os.getpid():\n            a, b = os.pipe()\n"
            "            fcntl.fcntl(a, fcntl.F_SETOWN, pid)\n            fcntl.fcntl(a, 10, 9)\n"
            "            fcntl.fcntl(a, fcntl.F_SETFL, os.O_ASYNC)\n            os.write(b, b'1')\n"
            "    except OSError:\n        pass",
            header="import fcntl, os",
        ),
        CHECK,
        "f",
    ),
    processes(
        "marking its parent for the out-of-memory killer",
        attack("import os\nopen(f'/proc/{os.getppid()}/oom_score_adj', 'w').write('1000')"),
    ),
    processes(
        "ptrace of the parent",
        attack("import ctypes, os\nassert ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0"),
    ),
    processes("ptrace by its parent", attack("import ctypes\nassert ctypes.CDLL(None).ptrace(0, 0, 0, 0) == 0")),
    processes(
        "a raw clone",
        attack("""
import ctypes, os
pid = ctypes.CDLL(None).syscall(56, 17, 0, 0, 0, 0)
if pid == 0:
    os._exit(0)
assert pid > 0
"""),
    ),
    processes(
        "a raw vfork",
        attack("import ctypes, os\npid = ctypes.CDLL(None).syscall(58)\nif pid == 0:\n    os._exit(0)\nassert pid > 0"),
    ),
    processes(
        "a raw clone3",
        attack("""
import ctypes, os
pid = ctypes.CDLL(None).syscall(435, (ctypes.c_uint64 * 11)(0, 0, 0, 0, 17), 88)
if pid == 0:
    os._exit(0)
assert pid > 0
"""),
    ),
    processes(
        "new namespaces",
        attack("""
import ctypes
libc = ctypes.CDLL(None)
assert any(libc.unshare(flag) == 0 for flag in (0x10000000, 0x20000, 0x40000000))
"""),
    ),
    processes(
        "memfd and execve",
        attack("""
import ctypes, os
fd = ctypes.CDLL(None).syscall(319, b"x", 0)
assert fd >= 0
os.write(fd, open("/bin/true", "rb").read())
os.execve(fd, ["@MARK@"], {})
"""),
    ),
    processes(
        "a mount", attack("import ctypes\nassert ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0")
    ),
    processes("a chroot", attack("import os\nos.chroot('/usr')")),
    processes(
        "io_uring",
        attack("import ctypes\nassert ctypes.CDLL(None).syscall(425, 4, ctypes.create_string_buffer(120)) >= 0"),
    ),
    processes(
        "userfaultfd, bpf, perf_event_open and keyctl",
        attack("""
import ctypes
libc, room = ctypes.CDLL(None), ctypes.create_string_buffer(256)
calls = (323, 1), (321, 0, room, 112), (298, room, 0, -1, -1, 0), (250, 0, -3, 1), (248, b"user", b"x", room, 8, -3)
assert any(libc.syscall(*call) >= 0 for call in calls)
"""),
    ),
    processes(
        "vmsplice",
        attack("""
import ctypes, os
a, b = os.pipe()
room = ctypes.create_string_buffer(b"x" * 64)
assert ctypes.CDLL(None).syscall(278, b, (ctypes.c_void_p * 2)(ctypes.addressof(room), 64), 1, 0) == 64
"""),
    ),
    processes(
        "machine code of another architecture",
        """
import ctypes, mmap
code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
code.write(b"\\xb8\\x02\\x00\\x00\\x00\\xcd\\x80\\xc3")  # fork by the 32-bit door
run = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))
pid = run()
def f(x):
    return (x + 4) * 3 if pid >= 0 else 0
""",
        outcome="crash",
    ),
    processes(
        "x32 system calls",
        """
import ctypes
pid = ctypes.CDLL(None).syscall(0x40000000 + 57)
def f(x):
    return (x + 4) * 3 if pid >= 0 else 0
""",
        outcome="crash",
    ),
    processes("SysV shared memory", attack("import ctypes\nassert ctypes.CDLL(None).shmget(@KEY@, 4096, 0o1666) >= 0")),
    processes(
        "SysV semaphores and queues",
        attack("""
import ctypes
libc = ctypes.CDLL(None)
assert libc.semget(@KEY@, 1, 0o1666) >= 0 or libc.msgget(@KEY@, 0o1666) >= 0
"""),
    ),
    processes(
        "POSIX shared memory",
        attack(
            "from multiprocessing import shared_memory\nshared_memory.SharedMemory('@MARK@', create=True, size=4096)"
        ),
    ),
    processes(
        "kernel settings",
        attack("""
path = "/proc/sys/kernel/core_pattern"
text = open(path).read()
open(path, "w").write(text)
"""),
    ),
    processes(
        "the clock and the host name",
        attack("""
import time, socket
try:
    socket.sethostname('@MARK@')
except OSError:
    time.clock_settime(time.CLOCK_REALTIME, time.time())
"""),
    ),
]

FOLDERS = """
import os
folders = ".", "/", "/tmp", "/var/tmp", "/dev", "/dev/shm", "/run", "/home", os.path.expanduser("~"), "/proc", "/usr"
"""
LEAVE = f"""{FOLDERS}
for folder in folders:
    for name in ("@MARK@-left", "heapq.py", "bisect.py"):
        try:
            with open(os.path.join(folder, name), "w") as file:
                file.write("def heappop(x): return 21\\n")
        except OSError:
            pass
def f(x):
    return 0
"""
FIND = attack('assert any(os.path.exists(os.path.join(folder, "@MARK@-left")) for folder in folders)', header=FOLDERS)

NEIGHBOURS = [
    neighbours("files left in the temporary folder for the next program", FIND, previous=LEAVE),
    neighbours(
        "a module left for the next program",
        attack("import heapq\nassert not hasattr(heapq, 'heappush')"),
        previous=LEAVE,
    ),
    neighbours(
        "a link left for the next program",
        attack("import os\nassert os.path.lexists('@MARK@')"),
        previous="import os\nos.symlink('/usr', '@MARK@')\ndef f(x): return 0",
    ),
    neighbours(
        "a folder without permissions",
        attack("import os\nassert os.listdir('.')"),
        previous="import os\nos.makedirs('a/b')\nos.umask(0o777)\nos.mkdir('a/b/c')\nos.mkdir('d')\ndef f(x): return 0",
    ),
    neighbours(
        "2,000 nested folders",
        attack("import os\nassert os.listdir('.')"),
        previous="import os\nfor _ in range(2000):\n    os.mkdir('a')\n    os.chdir('a')\ndef f(x): return 0",
    ),
    neighbours(
        "file names that are not text",
        attack("import os\nassert os.listdir('.')"),
        previous="import os\nopen(b'\\xff\\xfe', 'w')\nopen('a' * 255, 'w')\nopen('\\n', 'w')\ndef f(x): return 0",
    ),
    neighbours(
        "5,000 files",
        attack("import os\nassert os.listdir('.')"),
        previous="for i in range(5000):\n    open(f'f{i}', 'w').close()\ndef f(x): return 0",
    ),
    neighbours(
        "killed siblings",
        attack("""
import os
for name in os.listdir('/proc'):
    if name.isdigit() and int(name) != os.getpid():
        os.kill(int(name), 9)
os.kill(1, 9)
"""),
    ),
    neighbours("a killed zygote", attack("import os\nos.kill(os.getppid(), 9)\nos.kill(2, 9)")),
    neighbours(
        "the output of its siblings",
        attack(
            "import os\nfor name in os.listdir('/proc'):\n    if name.isdigit() and int(name) != os.getpid():\n"
            "        assert os.listdir(f'/proc/{name}/fd')\nassert os.listdir('/proc')"
        ),
    ),
]

CASES = PROCESSES + NEIGHBOURS
