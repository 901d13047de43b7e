"""Starts and stops runs from the page: train.py as a process of its own, which outlives the page."""

import itertools
import os
import re
import shlex
import sys
import tempfile
import threading
from pathlib import Path
from subprocess import DEVNULL, STDOUT, Popen

import gradio as gr

from ui.runs import Runs, UiError, shows_errors, tail

ROOT = Path(__file__).resolve().parent.parent
READ_ONLY = "This page is open to others: start and stop runs on the machine itself."


class Launcher:
    """Starts one train.py at a time. Its state is read from the run folder, so that a run is found again after the page
    was reloaded or restarted."""

    def __init__(self, runs: Runs):
        self.runs = runs
        self.process: Popen | None = None
        self._lock = threading.Lock()
        self._folder = tempfile.TemporaryDirectory(prefix="ponder-")
        self.log = Path(self._folder.name) / "console.log"

    @property
    def name(self) -> str | None:
        """The name of the run that was started last: its folder is the last argument of each command."""
        return Path(self.process.args[-1]).name if self.process else None

    def command(self, recipe: str, overrides: str) -> list[str]:
        """The command that starts a recipe in a new folder. Raises UiError if the recipe or a setting is not allowed."""
        if recipe not in recipes():
            raise UiError(f"There is no recipe {recipe!r}. Choose one of the list.")
        stem = Path(recipe).stem
        folder = next(f for n in itertools.count(1) if not (f := self.runs.folder / f"{stem}-{n}").exists())
        shown = os.path.relpath(folder, ROOT) if folder.is_relative_to(ROOT) else str(folder)
        return [sys.executable, "train.py", "--config", recipe, *settings(overrides), "--output-dir", shown]

    def resume_command(self, name: str | None, overrides: str) -> list[str]:
        """Raises UiError if the run has not stopped early or a setting is not allowed."""
        run = self.runs.get(name)
        if (status := run.status()) != "stopped":
            raise UiError(f"{run.name} cannot be resumed: it is {status}. Choose a run that was stopped.")
        return [sys.executable, "train.py", *settings(overrides), "--resume", str(run.path)]

    def start(self, command: list[str]) -> str:
        """Raises UiError if another run is in progress."""
        with self._lock:
            if (running := self.runs.running()) or self.alive():
                raise UiError(f"{running[0] if running else self.name} is running. Stop it first.")
            with self.log.open("wb") as log:
                how = {"stdin": DEVNULL, "stdout": log, "stderr": STDOUT, "start_new_session": True}
                self.process = Popen(command, cwd=ROOT, env=os.environ | {"PYTHONUNBUFFERED": "1"}, **how)
        return self.describe()

    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def stop(self, name: str | None) -> str:
        """Stop a run by a STOP file; one that has not taken its lock yet, by a signal. Raises UiError if none is running."""
        if name and (run := self.runs.get(name)).status() == "running":
            run.file("STOP").touch()
            return f"{name} has been asked to stop: it ends after the current step, and saves."
        if self.alive() and (name == self.name or self.name not in self.runs.names()):
            self.process.terminate()
            return f"{self.name} had not begun: it has been ended."
        raise UiError(f"{name or 'Nothing'} is not running. Choose a run that is.")

    def describe(self) -> str:
        """The command that was started last, and its state."""
        if self.process is None:
            return "nothing yet"
        command = shlex.join(self.process.args)
        if self.alive():
            state = f"runs as process {self.process.pid}. It continues when this page is closed."
        else:
            state = f"ended with exit code {self.process.returncode}. Its last lines:"
        return f"{command}\n{state}\n{tail(self.log, 15)}"


def launch_controls(launcher: Launcher, name: gr.Dropdown, timer: gr.Timer) -> gr.Textbox:
    """Build the controls that start, resume and stop runs. Returns the box with the state of the last start."""
    with gr.Accordion("Start or stop a run", open=False) as controls:
        recipe = gr.Dropdown(list(recipes()), value="configs/tiny.yaml", label="Recipe")
        about = gr.Textbox(recipes()["configs/tiny.yaml"], label="About it", max_lines=12)
        overrides = gr.Textbox(label="Other settings", placeholder="--max-steps 20", info="as on the command line")
        command = gr.Textbox(label="The command", max_lines=4)
        with gr.Row():
            start = gr.Button("Start it", variant="primary")
            resume = gr.Button("Resume the run above")
            stop = gr.Button("Stop the run above: it saves")
    started = gr.Textbox(label="Started from this page", max_lines=20)

    @shows_errors
    def show_command(recipe: str, overrides: str):
        try:
            command = launcher.command(recipe, overrides)
        except UiError as error:
            return gr.skip(), str(error)
        return recipes()[recipe], shlex.join(command)

    @shows_errors
    def start_run(recipe: str, overrides: str):
        return launcher.start(launcher.command(recipe, overrides)), gr.Timer(2, active=True)

    @shows_errors
    def resume_run(name: str | None, overrides: str):
        return launcher.start(launcher.resume_command(name, overrides)), gr.Timer(2, active=True)

    @shows_errors
    def stop_run(name: str | None):
        return launcher.stop(name)

    shown = [about, command]
    quiet = {"show_progress": "hidden", "trigger_mode": "always_last"}
    gr.on([controls.expand, recipe.change, overrides.change], show_command, [recipe, overrides], shown, **quiet)
    start.click(start_run, [recipe, overrides], [started, timer])
    resume.click(resume_run, [name, overrides], [started, timer])
    stop.click(stop_run, name, started)
    return started


def settings(overrides: str) -> list[str]:
    """The other settings as arguments. Raises UiError for those that the page chooses itself."""
    try:
        arguments = shlex.split(overrides or "")
    except ValueError as error:
        raise UiError(f"The other settings cannot be read: {error}. Close the quotes.") from None
    for argument in arguments:
        if re.match("--(config|resume|output[-_]dir)(=|$)", argument):
            raise UiError(f"{argument} is chosen by this page. Leave it out of the other settings.")
    return arguments


def recipes() -> dict[str, str]:
    """The recipes by file name, each with the comment at its beginning."""
    found = {}
    for path in sorted(ROOT.glob("configs/*.yaml")):
        comment = itertools.takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
        found[f"configs/{path.name}"] = "\n".join(line[1:].removeprefix(" ") for line in comment)
    return found
