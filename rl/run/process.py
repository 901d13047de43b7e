"""Stop signals, and console output that survives a closed terminal or pipe."""

import contextlib
import os
import select
import signal
import sys
from pathlib import Path

CLOSED_PIPE_STATUS = 141  # exit status of a process that SIGPIPE has killed


class Stopped(KeyboardInterrupt):
    """Raised to stop the run, on Ctrl-C, on SIGTERM, or because of a STOP file in the run folder."""

    def __init__(self, exit_code: int):
        super().__init__(exit_code)
        self.exit_code = exit_code


class StopSignals:
    """Context manager that handles Ctrl-C and SIGTERM. It ignores SIGHUP, so that a run survives its terminal.

    While `deferred` is True, the first signal only sets `requested`, so that the run can finish and save the current
    step, and a second Ctrl-C raises KeyboardInterrupt. Otherwise, and under torchrun, which sends signals when a process has
    failed, a signal raises Stopped immediately.
    """

    def __init__(self):
        self.deferred = False
        self.requested = False
        self.exit_code = 0
        self.is_of_several = int(os.environ.get("WORLD_SIZE", 1)) > 1  # processes started by torchrun
        self._previous = {}

    def __enter__(self) -> "StopSignals":
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            handler = signal.SIG_IGN if name == "SIGHUP" else self._handle
            with contextlib.suppress(ValueError):  # outside the main thread, signal handlers cannot be set
                if number:
                    self._previous[number] = signal.signal(number, handler)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():  # torchrun repeats its signal while a process cleans up
            signal.signal(number, signal.SIG_IGN if self.is_of_several else handler)

    def _handle(self, number, frame) -> None:
        name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        is_first = not self.requested
        self.requested = True
        self.exit_code = 128 + number
        if not self.deferred or self.is_of_several:  # torchrun waits only 30 seconds
            print(f"\n{name}: stopping", flush=True)
            raise Stopped(self.exit_code)
        if is_first:
            print(
                f"\n{name}: finishing and saving this step (press Ctrl-C again to stop at once and lose it)", flush=True
            )
        elif number == signal.SIGINT:
            raise KeyboardInterrupt


@contextlib.contextmanager
def command_output():
    """Context manager or decorator for a command. It ends silently once its output is closed, as `| head` does.

    Characters that the console cannot show are replaced.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")
    if int(os.environ.get("RANK", 0)):  # of several processes started by torchrun, only the first prints
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
    try:
        yield
    except BrokenPipeError:
        if not is_closed(sys.stdout.fileno()):  # the pipe of a child process
            raise
        sys.exit(CLOSED_PIPE_STATUS)
    finally:
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), sys.stdout.fileno())  # Python flushes the stream again at exit


def is_closed(pipe: int) -> bool:
    """Return whether the reader of a pipe, given by its file descriptor, has closed it."""
    if not hasattr(select, "poll"):  # Windows
        return True
    poll = select.poll()
    poll.register(pipe, 0)
    return bool(poll.poll(0))


class Console:
    """Context manager that copies standard output to a file and makes printing safe after the terminal is closed."""

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
    """Text stream that ignores errors once its terminal or pipe is closed. copy: a file for the same text, or None."""

    def __init__(self, stream, copy):
        self.stream = stream
        self.copy = copy
        self.is_closed = False

    def write(self, text: str) -> int:
        self._try("write", text)
        return len(text)

    def flush(self) -> None:
        self._try("flush")

    def _try(self, method: str, *args) -> None:
        try:
            if not self.is_closed:
                getattr(self.stream, method)(*args)
        except (OSError, ValueError):
            self.is_closed = True
            with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self.stream.fileno())  # Python flushes the stream at exit
        except RuntimeError:  # a signal handler printed during another print
            pass
        if self.copy:
            with contextlib.suppress(OSError, ValueError, RuntimeError):
                getattr(self.copy, method)(*args)

    def __getattr__(self, name):
        return getattr(self.stream, name)
