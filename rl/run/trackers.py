"""Trackers: a run's metrics, sent to tensorboard, trackio and wandb, whichever `report_to` names.

No tracker may stop, slow or change a run. So each works in a process of its own, this file as a script, that gets the
metrics through a pipe: what a library prints, asks, waits for, sets (signal handlers, sys.exit, atexit) or needs in
memory stays there. One that is not installed or fails is named in one line and left alone; metrics.jsonl has everything.

tensorboard writes into RUN/tensorboard; wandb into RUN/wandb, to be sent or not as `wandb login` and WANDB_MODE say;
trackio into the folder where `trackio show` looks (TRACKIO_DIR). WANDB_PROJECT may replace the project's name, ponder. A
resumed run goes on in the same tracked run; wandb keeps the first values of steps that are repeated, trackio both.
"""

import contextlib
import json
import math
import os
import queue
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from numbers import Real
from pathlib import Path

WAITING = 1000  # steps that may wait for a process that does not read; those beyond are dropped
PATIENCE = 5.0  # seconds that close waits for all of them
LINGER = 120.0  # seconds that a process may go on sending by itself after the run
ADVICE = {"wandb": " (wandb login first, or WANDB_MODE=offline now and wandb sync later)"}


class Trackers:
    """What train.py talks to. No method raises or waits, except that `close` waits up to PATIENCE seconds."""

    def __init__(self, names: list[str], run: Path, settings: dict, first_step: int, warn: Callable[[str], None]):
        """names: of trackers. run: the run folder. settings: shown beside the metrics. first_step: above 1 in a resumed
        run. warn: takes one line, in the caller's thread."""
        self.run, self.warn, self.trackers = run.resolve(), warn, []
        start = {"run": str(self.run), "settings": settings, "first_step": first_step}
        for name in names:
            try:
                self.trackers.append(_Tracker(name, json.dumps(start, default=str)))
            except OSError as error:  # no memory, no processes
                self._lost(name, f"cannot be started: {error.strerror}")

    def log(self, step: int, metrics: dict) -> None:
        """The finite numbers among the metrics of a step."""
        numbers = {
            name: value if isinstance(value, int) else float(value)
            for name, value in metrics.items()
            if isinstance(value, Real) and math.isfinite(value) and name != "step"
        }
        line = json.dumps([step, numbers])
        for tracker in [*self.trackers]:
            if tracker.thread.is_alive():
                tracker.send(line)
            else:
                self._give_up(tracker)

    def close(self) -> None:
        """The end of the metrics. A tracker that is still busy after PATIENCE seconds goes on for LINGER at most."""
        deadline = time.monotonic() + PATIENCE
        for tracker in self.trackers:
            tracker.end(deadline)
        for tracker in [*self.trackers]:
            tracker.thread.join(max(0.0, deadline - time.monotonic()))
            if tracker.thread.is_alive():
                self.warn(
                    f"tracker {tracker.name}: still busy, perhaps for want of a network; it goes on by itself for up to "
                    f"{LINGER:.0f} s{ADVICE.get(tracker.name, '')}. metrics.jsonl has everything"
                )
            else:
                self._give_up(tracker)
            if tracker.dropped:
                self.warn(
                    f"tracker {tracker.name}: was too slow, {tracker.dropped} steps are missing there; metrics.jsonl has "
                    "everything"
                )
        self.trackers = []

    def _give_up(self, tracker: "_Tracker") -> None:
        """It has ended: as it should, or with a reason."""
        self.trackers.remove(tracker)
        if tracker.reason:
            self._lost(tracker.name, tracker.reason)

    def _lost(self, name: str, reason: str) -> None:
        self.warn(f"tracker {name}: {reason}. The run goes on without it; metrics.jsonl has everything")


class _Tracker:
    """The process of one tracker, and the thread that feeds it: a pipe to a process that does not read blocks."""

    def __init__(self, name: str, start: str):
        self.name, self.dropped, self.reason = name, 0, ""
        self.lines = queue.Queue(WAITING)
        # Away from the terminal's Ctrl-C, and (-P) from folders of this project that are named like a library.
        self.child = subprocess.Popen(
            [sys.executable, "-P", __file__, name, str(LINGER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.thread = threading.Thread(target=self._feed, name=f"tracker {name}", daemon=True)
        self.send(start)
        self.thread.start()

    def send(self, line: str) -> None:
        """Queue a line; counted as dropped where too many wait."""
        try:
            self.lines.put_nowait(line)
        except queue.Full:
            self.dropped += 1

    def end(self, deadline: float) -> None:
        with contextlib.suppress(queue.Full):  # then the pipe ends with the run
            self.lines.put(None, timeout=max(0.0, deadline - time.monotonic()))

    def _feed(self) -> None:
        """Send the lines until the end, or until the process has gone; `reason` then says why, if it failed."""
        with contextlib.suppress(OSError), self.child.stdin as pipe:
            while (line := self.lines.get()) is not None:
                pipe.write(line.encode() + b"\n")
                pipe.flush()
        self.reason = self.child.stdout.read().decode(errors="replace")
        if self.child.wait() and not self.reason:
            self.reason = f"its process ended with exit code {self.child.returncode}"
        self.child.stdout.close()


# --- The process of a tracker. Each function opens one, and returns what logs a step and what ends it.


def tensorboard(run: Path, settings: dict, first_step: int):
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(run / "tensorboard"))

    def add(step, **what):
        writer.add_event(Event(wall_time=time.time(), step=step, **what))
        writer.flush()

    if first_step > 1:  # hides what an earlier file has from this step on
        add(first_step, session_log=SessionLog(status=SessionLog.START))

    def log(step, metrics):
        add(step, summary=Summary(value=[Summary.Value(tag=k, simple_value=v) for k, v in metrics.items()]))

    return log, writer.close


def trackio(run: Path, settings: dict, first_step: int):
    import trackio

    resume = "allow" if first_step > 1 else "never"
    tracked = trackio.init(project="ponder", name=run.name, config=settings, resume=resume)
    return lambda step, metrics: tracked.log(metrics, step=step), tracked.finish


def wandb(run: Path, settings: dict, first_step: int):
    import wandb

    kept = run / "wandb" / "run-id.txt"
    if not kept.exists():
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(uuid.uuid4().hex[:12])
    tracked = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "ponder"), name=run.name, id=kept.read_text().strip(), resume="allow",
        dir=str(run), config=settings,
    )  # fmt: skip
    return lambda step, metrics: tracked.log(metrics, step=step), tracked.finish


def main(name: str, linger: float) -> None:
    """Read the start and then [step, metrics], a line of JSON each, from stdin; write the reason of a failure to stdout."""
    lines, reasons = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    for standard in (0, 1, 2):  # nothing to read, and nobody to talk to
        os.dup2(os.open(os.devnull, os.O_RDWR), standard)
    if hasattr(os, "nice"):
        os.nice(10)  # the run comes first
    received = queue.SimpleQueue()

    def receive():
        for line in lines:
            received.put(json.loads(line))
        received.put(None)
        time.sleep(linger)
        os._exit(1)

    threading.Thread(target=receive, daemon=True).start()
    reason = ""
    try:
        start = received.get()
        log, finish = {"tensorboard": tensorboard, "trackio": trackio, "wandb": wandb}[name](
            Path(start["run"]), start["settings"], start["first_step"]
        )
        while (item := received.get()) is not None:
            log(*item)
        finish()
    except ModuleNotFoundError as error:
        reason = f"not installed (pip install {name})"
        if error.name != name:
            reason = f"does not work, {error} (pip install --upgrade {name})"
    except BaseException as error:  # SystemExit too
        reason = f"failed with {type(error).__name__}: {' '.join(str(error).split())[:300]}{ADVICE.get(name, '')}"
    reasons.write(reason)
    reasons.flush()
    os._exit(bool(reason))  # libraries may wait for the network once more at the exit


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
