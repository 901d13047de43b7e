"""Start and stop runs from the page. train.py runs as a separate process that outlives the page."""

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
READ_ONLY = "Other machines can reach this page. Serve it at 127.0.0.1 to start and stop runs."


class Launcher:
    """Starts one train.py process at a time.

    The state of a run is read from its folder, so it is still known after the page is reloaded or restarted.
    """

    def __init__(self, runs: Runs):
        self.runs = runs
        self.process: Popen | None = None
        self._lock = threading.Lock()
        self._folder = tempfile.TemporaryDirectory(prefix="ponder-")
        self.log = Path(self._folder.name) / "console.log"

    @property
    def name(self) -> str | None:
        """The name of the most recently started run, whose folder is the last argument of the command."""
        return Path(self.process.args[-1]).name if self.process else None

    def start_command(self, recipe: str, overrides: str) -> list[str]:
        """Return the command that starts a recipe in a new folder. Raises UiError if it or a setting is not allowed."""
        if recipe not in load_recipes():
            raise UiError(f"There is no recipe {recipe!r}. Choose one from the list.")
        stem = Path(recipe).stem
        folder = next(f for n in itertools.count(1) if not (f := self.runs.folder / f"{stem}-{n}").exists())
        output_dir = os.path.relpath(folder, ROOT) if folder.is_relative_to(ROOT) else str(folder)
        return [sys.executable, "train.py", "--config", recipe, *parse_overrides(overrides), "--output-dir", output_dir]

    def resume_command(self, name: str | None, overrides: str) -> list[str]:
        """Return the command that resumes a run. Raises UiError if it has not stopped or a setting is not allowed."""
        run = self.runs.get(name)
        if (status := run.status()) != "stopped":
            raise UiError(f"{run.name} cannot be resumed: it is {status}. Choose a stopped run.")
        return [sys.executable, "train.py", *parse_overrides(overrides), "--resume", str(run.path)]

    def start(self, command: list[str]) -> str:
        """Start a run with this command and return its description. Raises UiError if another run is in progress."""
        with self._lock:
            if (running := self.runs.running()) or self.is_alive():
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
            return f"{self.name} was terminated before training began."
        raise UiError(f"{name or 'The run'} is not running. Choose a running one.")

    def describe(self) -> str:
        """Describe the last start: the command, the state of its process and its last console lines."""
        if self.process is None:
            return "No run yet."
        command = shlex.join(self.process.args)
        if self.is_alive():
            state = f"Running as process {self.process.pid}. The run continues if you close this page."
        else:
            state = f"Ended with exit code {self.process.returncode}. Last lines:"
        return f"{command}\n{state}\n{tail(self.log, 15)}"


def launch_controls(launcher: Launcher, name: gr.Dropdown, timer: gr.Timer) -> gr.Textbox:
    """Build the controls that start, resume and stop runs. Returns the text box that describes the last start."""
    with gr.Accordion("Start or stop a run", open=False) as controls:
        recipe = gr.Dropdown(list(load_recipes()), value="configs/tiny.yaml", label="Recipe")
        description = gr.Textbox(load_recipes()["configs/tiny.yaml"], label="Description", max_lines=12)
        overrides = gr.Textbox(
            label="Other settings", placeholder="--max-steps 20", info="Command-line options of train.py"
        )
        command = gr.Textbox(label="Command", max_lines=4)
        with gr.Row():
            start = gr.Button("Start run", variant="primary")
            resume = gr.Button("Resume selected run")
            stop = gr.Button("Save and stop selected run")
    started = gr.Textbox(label="Started from this page", max_lines=20)

    @shows_errors
    def show_command(recipe: str, overrides: str):
        try:
            command = launcher.start_command(recipe, overrides)
        except UiError as error:
            return gr.skip(), str(error)
        return load_recipes()[recipe], shlex.join(command)

    @shows_errors
    def start_run(recipe: str, overrides: str):
        return launcher.start(launcher.start_command(recipe, overrides)), gr.Timer(2, active=True)

    @shows_errors
    def resume_run(name: str | None, overrides: str):
        return launcher.start(launcher.resume_command(name, overrides)), gr.Timer(2, active=True)

    @shows_errors
    def stop_run(name: str | None):
        return launcher.stop(name)

    outputs = [description, command]
    quiet = {"show_progress": "hidden", "trigger_mode": "always_last"}
    gr.on([controls.expand, recipe.change, overrides.change], show_command, [recipe, overrides], outputs, **quiet)
    start.click(start_run, [recipe, overrides], [started, timer])
    resume.click(resume_run, [name, overrides], [started, timer])
    stop.click(stop_run, name, started)
    return started


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


def load_recipes() -> dict[str, str]:
    """Return the comment at the top of each recipe, by file name."""
    recipes = {}
    for path in sorted(ROOT.glob("configs/*.yaml")):
        comment = itertools.takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
        recipes[f"configs/{path.name}"] = "\n".join(line[1:].removeprefix(" ") for line in comment)
    return recipes
