"""The process of a run: stop signals, and output that survives its terminal."""

import contextlib
import os
import signal
import sys
from pathlib import Path


class Stopped(KeyboardInterrupt):
    """The run was asked to stop: by Ctrl-C, by SIGTERM, or by a STOP file in the run folder."""

    def __init__(self, exit_code: int):
        super().__init__(exit_code)
        self.exit_code = exit_code


class StopSignals:
    """Handles Ctrl-C and SIGTERM, as a context manager. SIGHUP is ignored: a run outlives its terminal.

    While `deferred`, the first signal only sets `requested`, so that the present step can be finished and saved; a second
    Ctrl-C raises KeyboardInterrupt. Otherwise a signal raises Stopped at once.
    """

    def __init__(self):
        self.deferred = False
        self.requested = False
        self.exit_code = 0
        self._previous = {}

    def __enter__(self) -> "StopSignals":
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            handler = signal.SIG_IGN if name == "SIGHUP" else self._handle
            with contextlib.suppress(ValueError):  # not in the main thread: the signals stay as they are
                if number:
                    self._previous[number] = signal.signal(number, handler)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number, frame) -> None:
        name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        is_first = not self.requested
        self.requested = True
        self.exit_code = 128 + number
        if not self.deferred:
            print(f"\n{name}: stopping", flush=True)
            raise Stopped(self.exit_code)
        if is_first:
            print(
                f"\n{name}: finishing and saving this step (Ctrl-C again: stop at once, this step is lost)", flush=True
            )
        elif number == signal.SIGINT:
            raise KeyboardInterrupt


class Console:
    """Copies everything printed into a file, and keeps printing harmless once the terminal is closed. A context manager."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> "Console":
        self.file = self.path.open("a", encoding="utf-8", errors="replace")
        self.streams = sys.stdout, sys.stderr
        sys.stdout = Tee(sys.stdout, self.file)
        sys.stderr = Tee(sys.stderr, None)
        return self

    def __exit__(self, *_) -> None:
        sys.stdout, sys.stderr = self.streams
        with contextlib.suppress(OSError):
            self.file.close()


class Tee:
    """A text stream that continues without its terminal or pipe once that is closed. copy: a file that gets the same text."""

    def __init__(self, stream, copy):
        self.stream = stream
        self.copy = copy
        self.is_lost = False

    def write(self, text: str) -> int:
        self._try("write", text)
        return len(text)

    def flush(self) -> None:
        self._try("flush")

    def _try(self, method: str, *args) -> None:
        try:
            if not self.is_lost:
                getattr(self.stream, method)(*args)
        except (OSError, ValueError):
            self.is_lost = True
            with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self.stream.fileno())  # its buffer is flushed there at exit
        except RuntimeError:  # a signal handler prints while something is being printed
            pass
        if self.copy:
            with contextlib.suppress(OSError, ValueError, RuntimeError):
                getattr(self.copy, method)(*args)

    def __getattr__(self, name):
        return getattr(self.stream, name)
