"""Resources of this machine that a hostile program might reach, with canaries that show whether one did."""

import os
import secrets
import socket
import sysconfig
import tempfile
from contextlib import ExitStack
from pathlib import Path

from hostile.case import MARK

PROJECT = Path(__file__).resolve().parents[2]


class Host:
    """Canaries: files in a home, a secret in the environment, listeners. Set it up before the sandbox starts."""

    def __init__(self, home: Path):
        self.home = home
        self.secret = secrets.token_hex(8)
        self.sockets = {}
        self.stack = ExitStack()

    def __enter__(self) -> "Host":
        (self.home / "secret.txt").write_text(self.secret)
        (self.home / ".bashrc").write_text("")
        os.environ["PONDER_CANARY"] = self.secret
        for kind, family, type_, address in (
            ("TCP", socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)),
            ("UDP", socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0)),
            ("abstract", socket.AF_UNIX, socket.SOCK_STREAM, f"\0{MARK}-host"),
            ("abstract datagrams", socket.AF_UNIX, socket.SOCK_DGRAM, f"\0{MARK}-host-datagrams"),
            ("file", socket.AF_UNIX, socket.SOCK_STREAM, str(self.home / "socket")),
        ):
            self.sockets[kind] = listener = self.stack.enter_context(socket.socket(family, type_))
            listener.bind(address)
            listener.setblocking(False)
            if type_ == socket.SOCK_STREAM:
                listener.listen()
        self.shared = Path("/dev/shm") / f"{MARK}-host"
        self.shared.write_text(self.secret)
        self.before = self._state()
        return self

    def __exit__(self, *_) -> None:
        self.stack.close()
        self.shared.unlink()
        del os.environ["PONDER_CANARY"]

    def placeholders(self) -> dict[str, str]:
        """Return the values of the placeholders in a program's text."""
        return {
            "@HOME@": str(self.home),
            "@SECRET@": self.secret,
            "@MARK@": MARK,
            "@PID@": str(os.getpid()),
            "@PROJECT@": str(PROJECT),
            "@TEMP@": tempfile.gettempdir(),
            "@SITE@": sysconfig.get_path("purelib"),
            "@HOST@": os.uname().nodename,
            "@KEY@": str(_KEY),
            "@ABSTRACT@": f"{MARK}-host",
            "@TCP@": str(self.sockets["TCP"].getsockname()[1]),
            "@UDP@": str(self.sockets["UDP"].getsockname()[1]),
        }

    def fill(self, text: str) -> str:
        for name, value in self.placeholders().items():
            text = text.replace(name, value)
        return text

    def traces(self) -> list[str]:
        """Return what programs have changed, reached or left behind since the start; empty if nothing."""
        now = self._state()
        changes = [f"{name} is {now[name]}, not {old}" for name, old in self.before.items() if now[name] != old]
        for kind, listener in self.sockets.items():
            try:
                listener.recv(1) if listener.type == socket.SOCK_DGRAM else listener.accept()
            except BlockingIOError:
                continue
            changes.append(f"the {kind} listener was reached")
        return changes

    def _state(self) -> dict[str, object]:
        """Return the state that may not change: the home, everything with the mark, and the machine's devices."""
        files = {p.name: (p.lstat().st_mode, p.lstat().st_nlink, p.lstat().st_size) for p in self.home.iterdir()}
        folders = (
            PROJECT,
            tempfile.gettempdir(),
            sysconfig.get_path("purelib"),
            "/dev/shm",
            "/dev/mqueue",
            "/",
            Path.home(),
        )
        marked = [
            str(p) for folder in map(Path, folders) if folder.is_dir() for p in folder.iterdir() if MARK in p.name
        ]
        devices = {name: (os.stat(name).st_mode, os.stat(name).st_mtime_ns) for name in ("/dev/full", "/dev/zero")}
        return {
            "home": files,
            "the secret": (self.home / "secret.txt").read_text(),
            "marked files": marked,
            "marked processes": _marked_processes(),
            "SysV objects": _marked_objects(),
            "devices": devices,
        }


_KEY = 0x50000000 + os.getpid()  # key of SysV objects


def _marked_processes() -> list[str]:
    names = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if MARK in (process / "comm").read_text() or MARK.encode() in (process / "cmdline").read_bytes():
                names.append(process.name)
        except OSError:  # the process has just ended
            pass
    return names


def _marked_objects() -> list[str]:
    """Return SysV segments, semaphores and queues with the key that the programs use."""
    tables = (Path("/proc/sysvipc") / name for name in ("shm", "sem", "msg"))
    lines = [line for table in tables if table.exists() for line in table.read_text().splitlines()]
    return [line for line in lines if line.split()[0] == str(_KEY)]
