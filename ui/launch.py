"""Start and stop runs from the page. train.py runs as a separate process that outlives the page."""

import contextlib
import itertools
import os
import re
import shlex
import subprocess
import sys
import tempfile
import threading
from functools import partial
from pathlib import Path
from subprocess import DEVNULL, STDOUT, Popen

import gradio as gr

from rl.run.read_config import read_yaml
from rl.run.reader import Runs, tail
from ui.page import Page, UiError
from ui.view import View, status_line

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_RECIPE = "configs/tiny.yaml"
FIELDS = {  # the settings changed most often: name -> label
    "model": "Model (folder or Hub id)",
    "max_steps": "Training steps",
    "learning_rate": "Learning rate",
    "num_generations": "Completions per question",
    "max_completion_length": "Maximum completion length (tokens)",
}
DRY_RUN_SECONDS = 120
END_SECONDS = 5


class Launcher:
    """Starts one train.py process at a time.

    The state of a run is read from its folder, so it is still known after the page is reloaded or restarted.
    """

    def __init__(self, runs: Runs):
        self.runs = runs
        self.process: Popen | None = None
        self._lock = threading.Lock()
        self._folder = tempfile.TemporaryDirectory(prefix="ponder-")
        self.folder = Path(self._folder.name)  # for exported files; removed with the process
        self.log = self.folder / "console.log"

    @property
    def name(self) -> str | None:
        """The name of the most recently started run, whose folder is the last argument of the command."""
        return Path(self.process.args[-1]).name if self.process else None

    def start_command(self, recipe: str, overrides: str) -> list[str]:
        """Return the command that starts a recipe in a new folder. Raises UiError if it or a setting is not allowed."""
        if recipe not in recipes():
            raise UiError(f"There is no recipe {recipe!r}. Choose one from the list.")
        stem = Path(recipe).stem
        folder = next(f for n in itertools.count(1) if not (f := self.runs.folder / f"{stem}-{n}").exists())
        output_dir = os.path.relpath(folder, ROOT) if folder.is_relative_to(ROOT) else str(folder)
        return [sys.executable, "train.py", "--config", recipe, *parse_overrides(overrides), "--output-dir", output_dir]

    def resume_command(self, name: str | None, overrides: str = "") -> list[str]:
        """Return the command that resumes a run. Raises UiError if it has not stopped or a setting is not allowed."""
        run = self.runs.get(name)
        if (status := run.status()) != "stopped":
            raise UiError(f"{run.name} cannot be resumed: it is {status}. Choose a stopped run.")
        return [sys.executable, "train.py", *parse_overrides(overrides), "--resume", str(run.path)]

    def start(self, command: list[str]) -> str:
        """Start a run with this command and return its description. Raises UiError if another run is in progress."""
        with self._lock:
            running = self.runs.running()
            if not running and self.is_alive():  # it has saved its last checkpoint, and is about to end
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(END_SECONDS)
            if running or self.is_alive():
                raise UiError(f"{running[0] if running else self.name} is running. Stop it first.")
            with self.log.open("wb") as log:
                options = {"stdin": DEVNULL, "stdout": log, "stderr": STDOUT, "start_new_session": True}
                self.process = Popen(command, cwd=ROOT, env=os.environ | {"PYTHONUNBUFFERED": "1"}, **options)
        return self.describe()

    def is_alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def stop(self, name: str | None) -> str:
        """Stop a run with a STOP file, or with SIGTERM if it has no lock yet. Raises UiError if it is not running."""
        if name and (run := self.runs.get(name)).status() == "running":
            run.file("STOP").touch()
            return f"{name} will save a checkpoint and stop after the current step."
        if self.is_alive() and (name == self.name or self.name not in self.runs.names()):
            self.process.terminate()
            return f"{self.name} is being terminated. Training had not begun."
        raise UiError(f"{name or 'The run'} is not running. Choose a running one.")

    def describe(self) -> str:
        """Describe the last start: the command, the state of its process and its last console lines."""
        if self.process is None:
            return ""
        command = shlex.join(self.process.args)
        if self.is_alive():
            return f"{command}\nRunning as process {self.process.pid}. The run continues if you close this page."
        return f"{command}\nEnded with exit code {self.process.returncode}. Last lines:\n{tail(self.log, 15)}"


# --- recipes and settings


def recipes() -> dict[str, str]:
    """Return the first paragraph of the comment at the top of each recipe, by file name."""
    titles = {}
    for path in sorted(ROOT.glob("configs/*.yaml")):
        comment = itertools.takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
        text = "\n".join(line[1:].strip() for line in comment)
        titles[f"configs/{path.name}"] = text.partition("\n\n")[0].replace("\n", " ")
    return titles


def parse_overrides(overrides: str) -> list[str]:
    """Split the other settings into command-line arguments. Raises UiError for arguments that the page itself sets."""
    try:
        arguments = shlex.split(overrides or "")
    except ValueError as error:
        raise UiError(f"Cannot parse the other settings: {error}. Close the quotes.") from None
    for argument in arguments:
        if re.match("--(config|resume|output[-_]dir)(=|$)", argument):
            raise UiError(f"{argument} is set by this page. Remove it from the other settings.")
    return arguments


def join_overrides(recipe: str, values: tuple, other: str) -> str:
    """Return the command-line arguments for the fields that differ from the recipe, and the other settings."""
    config = read_yaml(recipe)
    arguments = []
    for name, value in zip(FIELDS, values):
        default = getattr(config, name)
        value = int(value) if isinstance(default, int) and value is not None else value
        if value not in (None, "", default):
            arguments += [f"--{name.replace('_', '-')}", str(value)]
    return " ".join([shlex.join(arguments), other or ""]).strip()


def dry_run(command: list[str]) -> str:
    """Return the answer of --dry-run for a command that starts a run: whether it fits on this machine, and why."""
    arguments = [*command[:-2], "--dry-run"]  # without the output folder
    try:
        result = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=DRY_RUN_SECONDS)
    except subprocess.TimeoutExpired:
        raise UiError(f"The dry run took more than {DRY_RUN_SECONDS} s. Run it in a terminal.") from None
    model, *parts = result.stdout.strip().split("\n\n")
    if result.returncode or len(parts) < 2:
        raise UiError(result.stderr.strip() or f"The dry run gave no answer: {result.stdout[:500]}")
    memory, *answer = parts
    return "\n\n".join([*answer, memory, model])


# --- the form


def fill_fields(recipe: str) -> dict:
    """Put the values of a recipe into the fields."""
    config = read_yaml(recipe)
    return {name: getattr(config, name) for name in FIELDS}


def show_command(launcher: Launcher, recipe: str, other: str, *fields) -> dict:
    return {"command": shlex.join(launcher.start_command(recipe, join_overrides(recipe, fields, other)))}


def check(page: Page, is_first_run: bool, recipe: str, other: str, *fields) -> dict:
    """Answer whether the run fits on this machine. is_first_run: the form is hidden if there are runs."""
    if is_first_run and page.runs.names():
        return {}
    return {"fits": dry_run(page.launcher.start_command(recipe, join_overrides(recipe, fields, other)))}


def start_run(launcher: Launcher, recipe: str, other: str, *fields) -> dict:
    return {"started": launcher.start(launcher.start_command(recipe, join_overrides(recipe, fields, other)))}


def build_form(page: Page, opened, is_first_run: bool) -> None:
    """Build the form that starts a run. opened: the event at which the form appears."""
    view = View(started=gr.Textbox(label="Started", visible=False))
    choices = [(f"{Path(file).stem}: {text}", file) for file, text in recipes().items()]
    view["recipe"] = gr.Dropdown(choices, value=DEFAULT_RECIPE, label="1. Recipe (model, data and algorithm)")
    defaults = fill_fields(DEFAULT_RECIPE)
    with gr.Row():
        for name, label in FIELDS.items():
            kind = gr.Textbox if name == "model" else gr.Number
            view[name] = kind(defaults[name], label=label, min_width=150)
    view["other"] = gr.Textbox(label="Other settings: options of train.py", placeholder="--seed 1 --learning-rate 1e-3")
    options = {"interactive": False, "elem_classes": "console"}
    view["fits"] = gr.Textbox(
        label="2. Does it fit on this machine?", lines=2, max_lines=10, placeholder="Computing ...", **options
    )
    view["command"] = gr.Textbox(label="Command", max_lines=3, **options)
    start = gr.Button("3. Start", variant="primary")
    view["status"] = status_line("start-status")
    inputs = f"recipe other {' '.join(FIELDS)}"
    changes = [view[name].change for name in inputs.split()]
    latest = {"trigger_mode": "always_last"}
    view.on([view["recipe"].input], fill_fields, "recipe")
    view.on([opened, *changes], partial(show_command, page.launcher), inputs, "command", **latest)
    progress = {"show_progress": "full", "show_progress_on": view["fits"]}
    view.on([opened, *changes], partial(check, page, is_first_run), inputs, "fits", **latest, **progress)
    event = view.on(start.click, partial(start_run, page.launcher), inputs)
    event.then(None, view["started"], None, js="started => { if (started) location.href = 'watch' }")
