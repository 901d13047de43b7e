"""The process of a run and its surroundings: signals, a STOP file, and a terminal that goes away."""

import contextlib
import os
import signal
import sys
from pathlib import Path


class Stopped(KeyboardInterrupt):
    """The run was asked to stop: by Ctrl-C, by SIGTERM, or by a STOP file in the run folder."""

    def __init__(self, asked: str, exit_code: int):
        super().__init__(asked)
        self.exit_code = exit_code


class Stopping:
    """Ends the run between two steps. As a context manager it takes the signals, and gives them back at the end.

    A roll-out is dropped at once, since it can be repeated; a step that has begun to learn is finished first (`hold` to
    `release`), unless Ctrl-C comes a second time.
    """

    def __init__(self):
        self.file: Path | None = None  # once the run folder is known
        self.asked = ""  # by what
        self.exit_code = 0
        self.held = False
        self._before = {}

    def __enter__(self):
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            handler = signal.SIG_IGN if name == "SIGHUP" else self._on_signal
            with contextlib.suppress(ValueError):  # not in the main thread: the signals stay as they are
                if number:
                    self._before[number] = signal.signal(number, handler)
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number, frame):
        first, self.asked = not self.asked, "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        self.exit_code = 128 + number
        if not self.held:
            print(f"\n{self.asked}: stopping", flush=True)
            raise Stopped(self.asked, self.exit_code)
        if first:
            print(f"\n{self.asked}: finishing and saving first (Ctrl-C again: back to the last checkpoint)", flush=True)
        elif number == signal.SIGINT:
            raise KeyboardInterrupt

    def hold(self) -> None:
        """From here on a first signal waits, whatever came before."""
        self.held, self.asked = True, ""

    def release(self) -> None:
        """Up to here. Raises Stopped where the run has been asked to stop, or a STOP file lies in its folder."""
        self.held = False
        if self.file and self.file.exists():
            self.asked, self.exit_code = "the STOP file", 0
            with contextlib.suppress(OSError):
                self.file.unlink()
        if self.asked:
            raise Stopped(self.asked, self.exit_code)


class Console:
    """What is printed goes to the terminal, for as long as there is one, and into a file. To be used as a context."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self):
        self.file = self.path.open("a", encoding="utf-8", errors="replace")
        self.before = sys.stdout, sys.stderr
        sys.stdout = Lines(sys.stdout, self.file)
        sys.stderr = Lines(sys.stderr, None)

    def __exit__(self, *_):
        sys.stdout, sys.stderr = self.before
        with contextlib.suppress(OSError):
            self.file.close()


class Lines:
    """A text stream that goes on without its terminal or pipe once that is closed. copy: a file that gets the same text."""

    def __init__(self, stream, copy):
        self.stream, self.copy, self.is_lost = stream, copy, False

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
                os.dup2(nowhere.fileno(), self.stream.fileno())  # what it still holds is written there at the end
        except RuntimeError:  # a signal's handler prints while something is being printed
            pass
        if self.copy:
            with contextlib.suppress(OSError, ValueError, RuntimeError):
                getattr(self.copy, method)(*args)

    def __getattr__(self, name):
        return getattr(self.stream, name)
