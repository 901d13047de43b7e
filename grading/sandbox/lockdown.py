"""Restrictions on a process before it runs a model's program: resource limits and, on Linux, a system call filter.

The kernel's seccomp filter refuses what no honest small program needs: new processes, other programs, sockets, signals
to other processes, tracing, shared memory, mounts, keys, kernel modules. Threads, socket pairs and files stay allowed.
The filter cannot be removed. Standard library only: this file is also imported inside the sandbox.
"""

import ctypes
import errno
import functools
import os
import platform
import struct
import sys

MEBIBYTE = 2**20
MEMORY_BYTES = 1024 * MEBIBYTE
FILE_BYTES = 8 * MEBIBYTE

# Refused system calls with their numbers on x86-64 and arm64 (None: does not exist there).
_REFUSED = {
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281), "ptrace": (101, 117),
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "pidfd_open": (434, 434), "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "process_madvise": (440, 440), "kcmp": (312, 272),
    "socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201), "accept": (43, 202),
    "accept4": (288, 242), "shmget": (29, 194), "shmat": (30, 196), "shmctl": (31, 195), "semget": (64, 190),
    "semop": (65, 193), "semctl": (66, 191), "msgget": (68, 186), "msgsnd": (69, 189), "msgrcv": (70, 188),
    "msgctl": (71, 187), "mq_open": (240, 180), "memfd_create": (319, 279), "memfd_secret": (447, 447),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "unshare": (272, 97),
    "setns": (308, 268), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442), "bpf": (321, 280),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427), "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104),
    "kexec_file_load": (320, 294), "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225), "acct": (163, 89),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171), "clock_adjtime": (305, 266),
    "sethostname": (170, 161), "setdomainname": (171, 162), "setpriority": (141, 140), "ioprio_set": (251, 30),
    "sched_setscheduler": (144, 119), "sched_setattr": (314, 274), "sched_setaffinity": (203, 122), "syslog": (103, 116),
    "quotactl": (179, 60), "personality": (135, 92), "mknod": (133, None), "mknodat": (259, 33), "ioperm": (173, None),
    "iopl": (172, None), "modify_ldt": (154, None), "vmsplice": (278, 75), "fanotify_init": (300, 262),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "migrate_pages": (256, 238), "move_pages": (279, 239),
    "mbind": (237, 235), "set_mempolicy": (238, 237), "vhangup": (153, 58), "chmod": (90, None), "fchmod": (91, 52),
    "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None), "lchown": (94, None), "fchown": (93, 55),
    "fchownat": (260, 54), "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "utime": (132, None),
    "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88), "sync": (162, 81), "syncfs": (306, 267),
}  # fmt: skip

# Also refused if may_write is False: changes to files, and socket pairs, which could send to another address.
_WRITES = {
    "unlink": (87, None), "unlinkat": (263, 35), "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276),
    "mkdir": (83, None), "mkdirat": (258, 34), "rmdir": (84, None), "link": (86, None), "linkat": (265, 37),
    "symlink": (88, None), "symlinkat": (266, 36), "truncate": (76, 45), "socketpair": (53, 199),
    "creat": (85, None), "openat2": (437, 437), "fallocate": (285, 47), "copy_file_range": (326, 285),
}  # fmt: skip

_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_CLONE, _CLONE3, _OPEN, _OPENAT = (56, 220), (435, 435), (2, None), (257, 56)
_PRLIMIT, _FCNTL, _IOCTL = (302, 261), (72, 25), (16, 29)
_CLONE_THREAD = 0x10000
_SIGNAL_BY_FCNTL = (8, 10, 15)  # F_SETOWN, F_SETSIG, F_SETOWN_EX: signal any process when a file is ready
_SIGNAL_BY_IOCTL = (0x8901, 0x8902, 0x5412)  # FIOSETOWN, SIOCSPGRP; TIOCSTI: inject terminal input
_X32 = 0x40000000  # the bit that marks calls of the 32-bit variant of x86-64
_LOAD, _JUMP_EQUAL, _JUMP_GREATER_EQUAL, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_WORD_NUMBER, _WORD_ARCH, _WORD_ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data (little-endian)


def can_filter() -> bool:
    """Return True if this machine can filter system calls: Linux on x86-64 or arm64."""
    return sys.platform == "linux" and platform.machine() in _AUDIT_ARCH


def limit_resources(cpu_seconds: int | None, memory_bytes: int = MEMORY_BYTES, nice: int = 0) -> None:
    """Set hard limits that the process cannot raise again. cpu_seconds=None: no limit on processor time."""
    import resource  # missing on Windows, which imports this file but starts no children

    def limit(name, value):
        hard = resource.getrlimit(name)[1]
        resource.setrlimit(name, (min(value, hard),) * 2 if hard != resource.RLIM_INFINITY else (value, value))

    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_FSIZE, FILE_BYTES)
    limit(resource.RLIMIT_NOFILE, 64)
    if cpu_seconds is not None:
        limit(resource.RLIMIT_CPU, cpu_seconds)
    if sys.platform == "linux":  # macOS does not enforce it, and refuses small values
        limit(resource.RLIMIT_AS, memory_bytes)
    if nice:
        os.nice(nice)


def hide_memory() -> None:
    """Prevent other processes of this user from reading this one's memory or files through /proc."""
    if sys.platform == "linux":
        set_dumpable = 4
        ctypes.CDLL(None).prctl(set_dumpable, 0, 0, 0, 0)


def refuse_system_calls(may_write: bool = True) -> None:
    """Install the filter. may_write=False also makes the file system read-only. Raise OSError if the kernel refuses."""
    program = _filter(list(_AUDIT_ARCH).index(platform.machine()), may_write)
    buffer = ctypes.create_string_buffer(program)
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    set_no_new_privs, set_seccomp, mode_filter = 38, 22, 2
    if libc.prctl(set_no_new_privs, 1, 0, 0, 0) or libc.prctl(set_seccomp, mode_filter, header, 0, 0):
        raise OSError(ctypes.get_errno(), "the kernel refused the seccomp filter")


def prepare() -> None:
    """Do once, before forking, what each child would have to do: import modules and build the filters."""
    import resource  # noqa: F401

    if can_filter():
        for may_write in (True, False):
            _filter(list(_AUDIT_ARCH).index(platform.machine()), may_write)


@functools.cache
def _filter(column: int, may_write: bool) -> bytes:
    """Return the filter as classic BPF instructions: (code, jump if true, jump if false, value)."""

    def instruction(code, value, if_true=0, if_false=0):
        return struct.pack("HBBI", code, if_true, if_false, value)

    refuse = instruction(_RETURN, _ERRNO | errno.EPERM)
    allow = instruction(_RETURN, _ALLOW)

    def filter_by_argument(call, argument, test, values, when_true, when_false):
        """Decide on one system call by whether an argument (its lower 32 bits) passes a test with any of the values."""
        if call[column] is None:
            return []
        tests = [part for value in values for part in (instruction(test, value, 0, 1), when_true)]
        load = instruction(_LOAD, _WORD_ARGUMENTS + 8 * argument)
        return [instruction(_JUMP_EQUAL, call[column], 0, len(tests) + 2), load, *tests, when_false]

    program = [
        instruction(_LOAD, _WORD_ARCH),
        instruction(_JUMP_EQUAL, list(_AUDIT_ARCH.values())[column], 1, 0),
        instruction(_RETURN, _KILL),
        instruction(_LOAD, _WORD_NUMBER),
    ]
    if column == 0:
        program += [instruction(_JUMP_GREATER_EQUAL, _X32, 0, 1), instruction(_RETURN, _KILL)]
    refused = list(_REFUSED.values())
    program += filter_by_argument(_CLONE, 0, _JUMP_ANY_BIT, [_CLONE_THREAD], allow, refuse)
    program += filter_by_argument(_PRLIMIT, 0, _JUMP_ANY_BIT, [0xFFFFFFFF], refuse, allow)  # pid 0 is the caller
    program += filter_by_argument(_FCNTL, 1, _JUMP_EQUAL, _SIGNAL_BY_FCNTL, refuse, allow)
    program += filter_by_argument(_IOCTL, 1, _JUMP_EQUAL, _SIGNAL_BY_IOCTL, refuse, allow)
    program += [
        instruction(_JUMP_EQUAL, _CLONE3[column], 0, 1),
        instruction(_RETURN, _ERRNO | errno.ENOSYS),  # its flags cannot be read; the C library falls back to clone
    ]
    if not may_write:
        refused += _WRITES.values()
        writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
        program += filter_by_argument(_OPEN, 1, _JUMP_ANY_BIT, [writing], refuse, allow)
        program += filter_by_argument(_OPENAT, 2, _JUMP_ANY_BIT, [writing], refuse, allow)
    for numbers in refused:
        if numbers[column] is not None:
            program += [instruction(_JUMP_EQUAL, numbers[column], 0, 1), refuse]
    return b"".join([*program, allow])
