"""Trackers for the metrics of a run, as listed in `report_to`. A tracker that fails is dropped with a warning.

tensorboard writes to RUN/tensorboard. wandb writes to RUN/wandb and uploads according to `wandb login` and WANDB_MODE.
trackio writes to the folder that `trackio show` reads. The project is "ponder"; for wandb, WANDB_PROJECT
overrides it. A resumed run continues its tracked run.
"""

import contextlib
import math
import os
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

WANDB_TIMEOUT = 30.0  # seconds that wandb may wait for the network, at the start and at the end of a run
ADVICE = {"wandb": "; run `wandb login` first, or set WANDB_MODE=offline and run `wandb sync` later"}


class Trackers:
    """The trackers of one run. If a tracker raises, it is dropped and `warn` is called with a message.

    first_step: the first step to log; above 1, the run is resumed.
    """

    def __init__(self, names: list[str], run: Path, settings: dict, first_step: int, warn: Callable[[str], None]):
        self.warn = warn
        self.trackers = {}
        for name in names:
            with self._guard(name):
                self.trackers[name] = OPENERS[name](run.resolve(), settings, first_step)

    def log(self, step: int, metrics: dict) -> None:
        """Send the finite numbers among the metrics of a step."""
        numbers = {k: x for k, x in metrics.items() if k != "step" and isinstance(x, (int, float)) and math.isfinite(x)}
        for name, tracker in list(self.trackers.items()):
            with self._guard(name):
                tracker.log(numbers, step=step)

    def close(self) -> None:
        for name in list(self.trackers):
            with self._guard(name):
                self.trackers.pop(name).finish()

    @contextlib.contextmanager
    def _guard(self, name: str):
        """Drop the tracker if it fails in this context. Standard input is empty, so that it cannot prompt the user."""
        stdin = sys.stdin
        try:
            with open(os.devnull) as sys.stdin:
                yield
        except (Exception, SystemExit) as error:
            self.trackers.pop(name, None)
            reason = f"failed with {type(error).__name__}: {' '.join(str(error).split())[:300]}{ADVICE.get(name, '')}"
            if isinstance(error, ModuleNotFoundError) and error.name == name:
                reason = f"not installed (pip install {name})"
            self.warn(f"tracker {name}: {reason}. The run continues without it; metrics.jsonl has all metrics")
        finally:
            sys.stdin = stdin


class TensorBoard:
    def __init__(self, run: Path, settings: dict, first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(run / "tensorboard", purge_step=first_step if first_step > 1 else None)
        self.finish = self.writer.close

    def log(self, metrics: dict, step: int) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()


def open_trackio(run: Path, settings: dict, first_step: int):
    import trackio

    return trackio.init(project="ponder", name=run.name, config=settings, resume="allow" if first_step > 1 else "never")


def open_wandb(run: Path, settings: dict, first_step: int):
    import wandb

    file = run / "wandb/run-id.txt"
    file.parent.mkdir(exist_ok=True)
    if not file.exists():
        file.write_text(uuid.uuid4().hex[:12])
    limits = {"init_timeout": WANDB_TIMEOUT, "finish_timeout": WANDB_TIMEOUT, "finish_timeout_raises": True}
    options = {"resume": "allow", "dir": str(run), "settings": wandb.Settings(console="off", quiet=True, **limits)}
    project = os.environ.get("WANDB_PROJECT", "ponder")
    return wandb.init(project=project, name=run.name, id=file.read_text().strip(), config=settings, **options)


OPENERS = {"tensorboard": TensorBoard, "trackio": open_trackio, "wandb": open_wandb}
