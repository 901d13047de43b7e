"""Starts and stops runs from the page: train.py as a process of its own, which goes on without the page."""

import itertools
import os
import re
import shlex
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import gradio as gr

from ui.runs import Runs, UiError, said, tail

ROOT = Path(__file__).resolve().parent.parent
ELSEWHERE = "This page is open to others: start and stop runs on the machine itself."


class Launcher:
    """train.py as a process of its own, one at a time. What it is known by lies in the run folder, so that a run is found
    again when the page has been reloaded or restarted."""

    def __init__(self, runs: Runs):
        self.runs, self._lock = runs, threading.Lock()
        self.process: subprocess.Popen | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="ponder-")
        self.log = Path(self._folder.name) / "console.log"

    @property
    def name(self) -> str | None:
        """Of the run folder, with which each command ends."""
        return Path(self.process.args[-1]).name if self.process else None

    def command(self, recipe: str, overrides: str) -> list[str]:
        """Raises UiError for a recipe or settings that are not to be."""
        if recipe not in recipes():
            raise UiError(f"There is no recipe {recipe!r}. Choose one of the list.")
        stem = Path(recipe).stem
        folder = next(f for n in itertools.count(1) if not (f := self.runs.folder / f"{stem}-{n}").exists())
        shown = os.path.relpath(folder, ROOT) if folder.is_relative_to(ROOT) else str(folder)
        return [sys.executable, "train.py", "--config", recipe, *settings(overrides), "--output-dir", shown]

    def resume_command(self, name: str | None, overrides: str) -> list[str]:
        """Raises UiError for a run that was not stopped, or settings that are not to be."""
        if (run := self.runs.get(name)).status() != "stopped":
            raise UiError(f"{run.name} is not to be gone on with: it is {run.status()}. Choose one that was stopped.")
        return [sys.executable, "train.py", *settings(overrides), "--resume", str(run.path)]

    def start(self, command: list[str]) -> str:
        """Raises UiError where another run is under way."""
        with self._lock:
            if (busy := self.runs.running()) or self.alive():
                raise UiError(f"{busy[0] if busy else self.name} is running, and has the machine. Stop it first.")
            with self.log.open("wb") as log:
                self.process = subprocess.Popen(
                    command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                    start_new_session=True, env=os.environ | {"PYTHONUNBUFFERED": "1"},
                )  # fmt: skip
        return self.words()

    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def stop(self, name: str | None) -> str:
        """By a STOP file; one that was started and has not begun to train, by a signal. Says what it did. Raises UiError."""
        if name and (run := self.runs.get(name)).status() == "running":
            run.file("STOP").touch()
            return f"{name} has been asked to stop: it ends after the step it is at, and saves."
        if self.alive() and (name == self.name or self.name not in self.runs.names()):
            self.process.terminate()
            return f"{self.name} had not begun: it has been ended."
        raise UiError(f"{name or 'Nothing'} is not running. Choose a run that is.")

    def words(self) -> str:
        """What was started last, and what has become of it."""
        if self.process is None:
            return "nothing yet"
        command = shlex.join(self.process.args)
        if self.alive():
            pid = self.process.pid
            return f"{command}\nruns as process {pid}. It goes on when this page is closed.\n{tail(self.log, 5)}"
        return f"{command}\nended with exit code {self.process.returncode}. Its last lines:\n{tail(self.log, 15)}"


def launch_controls(launcher: Launcher, name: gr.Dropdown, timer: gr.Timer) -> gr.Textbox:
    """Start, go on and stop. Returns the box that says what became of the last start."""
    with gr.Accordion("Start or stop a run", open=False) as controls:
        recipe = gr.Dropdown(list(recipes()), value="configs/tiny.yaml", label="Recipe")
        about = gr.Textbox(recipes()["configs/tiny.yaml"], label="About it", max_lines=12)
        overrides = gr.Textbox(label="Other settings", placeholder="--max-steps 20", info="as on the command line")
        command = gr.Textbox(label="The command", max_lines=4)
        with gr.Row():
            start = gr.Button("Start it", variant="primary")
            go_on = gr.Button("Go on with the run above")
            stop = gr.Button("Stop the run above: it saves")
    became = gr.Textbox(label="Started from this page", max_lines=20)

    @said
    def show_command(recipe: str, overrides: str):
        try:
            command = launcher.command(recipe, overrides)
            return recipes()[recipe], shlex.join(command)
        except UiError as error:
            return gr.skip(), str(error)

    @said
    def start_run(recipe: str, overrides: str):
        return launcher.start(launcher.command(recipe, overrides)), gr.Timer(2, active=True)

    @said
    def resume_run(name: str | None, overrides: str):
        return launcher.start(launcher.resume_command(name, overrides)), gr.Timer(2, active=True)

    @said
    def stop_run(name: str | None):
        return launcher.stop(name)

    shown = {"show_progress": "hidden", "trigger_mode": "always_last"}
    gr.on(
        [controls.expand, recipe.change, overrides.change], show_command, [recipe, overrides], [about, command], **shown
    )
    start.click(start_run, [recipe, overrides], [became, timer])
    go_on.click(resume_run, [name, overrides], [became, timer])
    stop.click(stop_run, name, became)
    return became


def settings(overrides: str) -> list[str]:
    """As arguments. Raises UiError for what the controls choose."""
    try:
        arguments = shlex.split(overrides or "")
    except ValueError as error:
        raise UiError(f"The other settings cannot be read: {error}. Close the quotes.") from None
    for argument in arguments:
        if re.match("--(config|resume|output[-_]dir)(=|$)", argument):
            raise UiError(f"{argument} is chosen by this page. Leave it out of the other settings.")
    return arguments


def recipes() -> dict[str, str]:
    """The comment that each recipe begins with."""
    found = {}
    for path in sorted(ROOT.glob("configs/*.yaml")):
        comment = itertools.takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
        found[f"configs/{path.name}"] = "\n".join(line[1:].removeprefix(" ") for line in comment)
    return found
