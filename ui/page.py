"""What all pages share. Imports neither torch nor gradio."""

import threading
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data import DataError
from grading import RewardError
from grading.base import first_line
from rl.config import ConfigError, RunError
from rl.run.reader import Runs

IMPORT_LOCK = threading.Lock()


class UiError(Exception):
    """An error to show on the page. Its message names the problem and the remedy."""


@dataclass
class Page:
    """The objects and settings that all pages share."""

    runs: Runs
    worker: Any
    editable: bool  # whether the reward file can be edited, and runs can be started, stopped, renamed and deleted
    rewards_file: Path
    launcher: Any = None  # ui/launch.py
    sessions: dict = field(default_factory=dict)  # chats by the ID of the browser tab (ui/chat.py)


def import_models() -> None:
    """Import the packages that load models.

    Call this before a thread uses them: two threads that import transformers at the same time get incomplete modules.
    """
    with IMPORT_LOCK:
        import rl.evaluate  # noqa: F401


def describe_error(error: BaseException) -> str:
    """Return the message of an error to show on the page. The traceback of an unexpected error is printed."""
    if isinstance(error, (UiError, ConfigError, DataError, RewardError, RunError)):
        return str(error)
    traceback.print_exception(error)
    return f"Unexpected error: {type(error).__name__}: {first_line(error)}. The traceback is in the terminal."
