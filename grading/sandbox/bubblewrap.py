"""Servers of worker processes inside bubblewrap: no network, no files but /usr, the interpreter and what is named."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from grading.sandbox.workers import Zygote

TEMPORARY_BYTES = 16 * 2**20
OPTIONS = """
--unshare-user --unshare-all --hostname sandbox --uid 1000 --gid 1000 --die-with-parent --new-session --cap-drop ALL
--clearenv --setenv PATH /usr/bin --setenv HOME /tmp --setenv TMPDIR /tmp --setenv LANG C.UTF-8 --setenv PYTHONHASHSEED 0
--ro-bind /usr /usr
"""
FOLDER = "/ponder"  # the folder of the project's files inside the sandbox


def start_server(
    preload: tuple[str, ...],
    modules: Sequence[Path] = (),
    packages: Sequence[str] = (),
    clean: bool = False,
) -> Zygote:
    """Start a server in bubblewrap, with its own process table and a small temporary folder.

    Args:
        preload: Modules that the server imports once.
        modules: Files of the project that the processes may import.
        packages: Folders of installed packages that the processes may import.
        clean: Remove the files that a process leaves behind.

    Raises:
        WorkerError: If the server does not start.
    """
    folder = Path(__file__).parent
    prefixes = {os.path.realpath(p) for p in (sys.base_prefix, sys.base_exec_prefix)} | {sys.base_prefix}
    command = ["bwrap", *OPTIONS.split()]
    for name in ("lib", "lib64", "lib32", "bin"):
        if os.path.islink(f"/{name}"):
            command += ["--symlink", os.readlink(f"/{name}"), f"/{name}"]
        elif os.path.isdir(f"/{name}"):
            command += ["--ro-bind", f"/{name}", f"/{name}"]
    for path in sorted(prefixes):
        if not path.startswith("/usr/") and path != "/usr":
            command += ["--ro-bind", path, path]
    package_folders = []  # at paths of their own: the real ones may be in /tmp, which the sandbox replaces
    for number, package in enumerate(packages):
        package_folders.append(f"/packages/{number}")
        command += ["--ro-bind", os.path.realpath(package), package_folders[-1]]
    for device in ("null", "zero", "urandom", "random"):
        command += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
    for path in [*(folder / name for name in ("zygote.py", "tester.py", "messages.py", "lockdown.py")), *modules]:
        command += ["--ro-bind", str(path), f"{FOLDER}/{path.name}"]
    command += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    command += ["--size", str(TEMPORARY_BYTES), "--tmpfs", "/tmp", "--remount-ro", "/", "--chdir", "/tmp", "--"]
    python = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    path = [*package_folders, FOLDER] if modules else []
    return Zygote(command, f"{FOLDER}/zygote.py", python, ("-S",), preload, path, clean=clean)
