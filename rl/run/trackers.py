"""Trackers: a run's metrics, sent to tensorboard, trackio and wandb, whichever `report_to` names.

No tracker may stop a run: one that is not installed or fails costs one line, and metrics.jsonl has everything. tensorboard
writes into RUN/tensorboard; wandb into RUN/wandb, and uploads as `wandb login` and WANDB_MODE say; trackio into the folder
that `trackio show` reads. WANDB_PROJECT replaces the project's name, ponder. A resumed run continues the same tracked run.
"""

import contextlib
import json
import math
import os
import signal
import sys
import uuid
from collections.abc import Callable, Iterator
from numbers import Real
from pathlib import Path

WANDB_WAIT = 30.0  # seconds that wandb may wait for the network, at the start and at the end of a run
ADVICE = {"wandb": "; wandb login first, or WANDB_MODE=offline now and wandb sync later"}


class Trackers:
    """The trackers of one run. No method raises because of a tracker."""

    def __init__(self, names: list[str], run: Path, settings: dict, first_step: int, warn: Callable[[str], None]):
        """Open the trackers.

        Args:
            names: of trackers.
            run: the run folder.
            settings: shown beside the metrics.
            first_step: the next step; above 1 in a resumed run.
            warn: takes one line of text.
        """
        self.warn = warn
        self.trackers = {}
        settings = json.loads(json.dumps(settings, default=str))
        for name in names:
            with self._guard(name):
                self.trackers[name] = TRACKERS[name](run.resolve(), settings, first_step)

    def log(self, step: int, metrics: dict) -> None:
        """Send the finite numbers among the metrics of a step."""
        numbers = {
            name: value if isinstance(value, int) else float(value)
            for name, value in metrics.items()
            if isinstance(value, Real) and math.isfinite(value) and name != "step"
        }
        for name, tracker in list(self.trackers.items()):
            with self._guard(name):
                tracker.log(numbers, step=step)

    def close(self) -> None:
        for name, tracker in list(self.trackers.items()):
            with self._guard(name):
                tracker.finish()
        self.trackers.clear()

    @contextlib.contextmanager
    def _guard(self, name: str) -> Iterator[None]:
        """Drop the tracker if it fails in this context. It cannot ask for input or keep signal handlers of its own."""
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        stdin = sys.stdin
        try:
            with open(os.devnull) as sys.stdin:
                yield
        except (Exception, SystemExit) as error:
            self.trackers.pop(name, None)
            reason = f"failed with {type(error).__name__}: {' '.join(str(error).split())[:300]}{ADVICE.get(name, '')}"
            if isinstance(error, ModuleNotFoundError) and error.name == name:
                reason = f"not installed (pip install {name})"
            self.warn(f"tracker {name}: {reason}. The run continues without it; metrics.jsonl has everything")
        finally:
            sys.stdin = stdin
            for number, handler in handlers.items():
                if signal.getsignal(number) is not handler:
                    signal.signal(number, handler)


class TensorBoard:
    def __init__(self, run: Path, settings: dict, first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(run / "tensorboard", purge_step=first_step if first_step > 1 else None)

    def log(self, metrics: dict, step: int) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def finish(self) -> None:
        self.writer.close()


def open_trackio(run: Path, settings: dict, first_step: int):
    import trackio

    return trackio.init(project="ponder", name=run.name, config=settings, resume="allow" if first_step > 1 else "never")


def open_wandb(run: Path, settings: dict, first_step: int):
    import wandb

    run_id = run / "wandb/run-id.txt"
    if not run_id.exists():
        run_id.parent.mkdir(exist_ok=True)
        run_id.write_text(uuid.uuid4().hex[:12])
    limits = {"init_timeout": WANDB_WAIT, "finish_timeout": WANDB_WAIT, "finish_timeout_raises": True}
    return wandb.init(
        project=os.environ.get("WANDB_PROJECT", "ponder"),
        name=run.name,
        id=run_id.read_text().strip(),
        resume="allow",
        dir=str(run),
        config=settings,
        settings=wandb.Settings(console="off", quiet=True, **limits),
    )


TRACKERS = {"tensorboard": TensorBoard, "trackio": open_trackio, "wandb": open_wandb}
