"""Runs that are started, resumed and stopped from the page, and commands that are refused."""

import os
import signal
import subprocess
import sys
import time

import filelock
import pytest

pytest.importorskip("gradio")

from watching import call, follow_run, wait_until, watch_run  # noqa: E402

from rl.run.reader import Runs  # noqa: E402
from ui import launch  # noqa: E402
from ui.page import UiError  # noqa: E402

SHORT = (
    "--prompts-per-step 2 --num-generations 2 --eval-questions 4 --eval-steps 0 --save-steps 0 --train-questions 20 "
    "--max-completion-length 16 --log-completions-steps 0 --device cpu"
)


FIELDS = "data/tiny", 45, 0.002, 8, 96  # of the recipe


@pytest.fixture
def launcher(page):
    return page.launcher


def test_start_and_resume_commands(launcher):
    command = launcher.start_command("configs/tiny.yaml", "--max-steps 20 --system-prompt 'a b; $(rm) `x` && y'")
    assert command == [
        sys.executable,
        "train.py",
        "--config",
        "configs/tiny.yaml",
        "--max-steps",
        "20",
        "--system-prompt",
        "a b; $(rm) `x` && y",
        "--output-dir",
        str(launcher.runs.folder / "tiny-1"),
    ]
    (launcher.runs.folder / "tiny-1").mkdir()
    assert launcher.start_command("configs/tiny.yaml", "")[-1] == str(launcher.runs.folder / "tiny-2")
    expected = ["--max-steps", "30", "--resume", str(launcher.runs.folder / "a")]
    assert launcher.resume_command("a", "--max-steps 30")[2:] == expected


@pytest.mark.parametrize(
    "recipe, overrides, message",
    [
        ("configs/../train.py", "", "no recipe"),
        ("/etc/passwd", "", "no recipe"),
        (None, "", "no recipe"),
        ("configs/tiny.yaml", "--output-dir /tmp/x", "--output-dir is set by this page"),
        ("configs/tiny.yaml", "--max-steps 2 --output_dir=..", "--output_dir=.. is set by this page"),
        ("configs/tiny.yaml", "--config x.yaml", "--config is set by this page"),
        ("configs/tiny.yaml", "--resume=runs/a", "--resume=runs/a is set by this page"),
        ("configs/tiny.yaml", "--system-prompt 'a", "quotation"),
    ],
)
def test_refuses_unknown_recipes_and_settings_of_the_page(launcher, recipe, overrides, message):
    with pytest.raises(UiError, match=message):
        launcher.start_command(recipe, overrides)


def test_refuses_to_start_a_second_run_or_to_stop_an_idle_one(folder, launcher):
    with filelock.FileLock(folder / "a/lock"):
        with pytest.raises(UiError, match="a is running"):
            launcher.start(["never"])
        with pytest.raises(UiError, match="it is running"):
            launcher.resume_command("a", "")
        assert "stop after the current step" in launcher.stop("a") and (folder / "a/STOP").exists()
    for name in ("a", None):
        with pytest.raises(UiError, match="is not running"):
            launcher.stop(name)


def test_every_recipe_has_a_title():
    titles = launch.recipes()
    assert titles["configs/tiny.yaml"].startswith("The bundled tiny model learns")
    assert all(title and "fits" not in title and "python" not in title for title in titles.values()), (
        "whether it fits depends on this machine"
    )


def test_fields_become_options(launcher):
    assert tuple(launch.fill_fields("configs/tiny.yaml").values()) == FIELDS
    assert launch.join_overrides("configs/tiny.yaml", FIELDS, "--seed 1") == "--seed 1"
    changed = "my model", 10.0, 1e-3, None, 128
    expected = "--model 'my model' --max-steps 10 --learning-rate 0.001 --max-completion-length 128"
    assert launch.join_overrides("configs/tiny.yaml", changed, "") == expected
    command = launch.show_command(launcher, "configs/tiny.yaml", "--seed 1", *changed)["command"]
    assert command.partition(" train.py ")[2].startswith(f"--config configs/tiny.yaml {expected} --seed 1 --output-dir")
    for recipe in launch.recipes():
        assert launch.join_overrides(recipe, tuple(launch.fill_fields(recipe).values()), "") == ""


def test_the_answer_of_the_dry_run_comes_first(page, monkeypatch):
    def run(arguments, **options):
        assert arguments[-1] == "--dry-run" and "--output-dir" not in arguments and arguments[-3:-1] == ["--seed", "1"]
        return subprocess.CompletedProcess(arguments, 0, "model\n\nmemory\n\nIt does not fit.\n\n    --flag 1\n", "")

    monkeypatch.setattr(launch.subprocess, "run", run)
    fits = launch.check(page, False, "configs/tiny.yaml", "--seed 1", *FIELDS)["fits"]
    assert fits == "It does not fit.\n\n    --flag 1\n\nmemory\n\nmodel"
    monkeypatch.setattr(launch.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 0, "help text", ""))
    with pytest.raises(UiError, match="no answer: help text"):
        launch.check(page, False, "configs/tiny.yaml", "--help", *FIELDS)


@pytest.mark.slow
def test_answers_whether_a_run_fits_on_this_machine(page):
    """The answer is that of the dry run here, not that of the recipe's header on another card."""
    fits = launch.check(page, False, "configs/tiny.yaml", "--max-steps 5", *FIELDS)["fits"]
    assert fits.startswith("It fits: ") and "  weights " in fits
    with pytest.raises(UiError, match="learning_rate"):
        launch.check(page, False, "configs/tiny.yaml", "--lerning-rate 1", *FIELDS)
    assert launch.check(page, True, "configs/tiny.yaml", "", *FIELDS) == {}, "there are runs: the form is hidden"


def test_starts_watches_and_stops_a_run_also_after_a_reload(folder, served):
    client = served()
    inputs = "configs/tiny.yaml", SHORT, *FIELDS
    command = client.predict(*inputs, api_name="/show_command")[9]
    assert command.endswith(f"--device cpu --output-dir {folder}/tiny-1")
    started = client.predict("configs/tiny.yaml", f"--max-steps 2000 {SHORT}", *FIELDS, api_name="/start_run")[0]
    assert started.startswith(command.split(" --prompts")[0])
    assert "is running" in client.predict(*inputs, api_name="/start_run")[-1]
    values = wait_until(
        client, lambda v: "Running, step" in str(v.get("progress")) and "step 0 of" not in v["progress"]
    )
    assert values["timer"]["value"] == 2 and "of 2000, about" in values["progress"]
    text = values["launched"]["value"]
    assert os.getsid(pid := int(text.split("process ")[1].split(".")[0])) == pid, "outlives the page"

    reloaded = served()  # a second load of the page
    values = watch_run(reloaded)
    assert values["name"]["value"] == "tiny-1" and "Running" in values["progress"] and "step" in values["log"]
    assert values["runs"]["data"][0][:2] == ["tiny-1", "running"]
    assert "a is not running" in call(reloaded, "/stop_run", "a")["status"]
    assert "stop after the current step" in call(reloaded, "/stop_run", "tiny-1")["status"]
    values = wait_until(client, lambda v: "Stopped early" in str(v.get("progress")) and v["timer"]["value"] == 10)
    assert "exit code 0" in values["launched"]["value"] and Runs(folder).get("tiny-1").checkpoints()
    assert "step_" in values["log"]


def test_shows_the_exit_code_and_the_error_of_a_wrong_setting(folder, served):
    client = served()
    client.predict("configs/tiny.yaml", "--lerning-rate 1", *FIELDS, api_name="/start_run")
    values = wait_until(client, lambda v: "exit code" in str(v["launched"]))
    text = values["launched"]["value"]
    assert "exit code 1" in text and "'learning_rate'" in text and not (folder / "tiny-1").exists()


@pytest.mark.slow
def test_a_killed_run_is_shown_as_stopped_and_can_be_resumed(folder, page):
    launcher = page.launcher
    launcher.start(launcher.start_command("configs/tiny.yaml", f"--max-steps 2000 {SHORT}"))
    end = time.monotonic() + 60
    while not (folder / "tiny-1/metrics.jsonl").exists() and time.monotonic() < end:
        time.sleep(0.1)
    os.kill(launcher.process.pid, signal.SIGKILL)
    launcher.process.wait()
    assert "exit code -9" in launcher.describe()
    assert "tiny-1: Stopped early, step" in follow_run(page, "tiny-1")["progress"]
    assert launcher.resume_command("tiny-1", "")[2] == "--resume"


def test_terminates_a_run_without_a_lock(launcher):
    launcher.start([sys.executable, "-c", "import time; time.sleep(60)", "--output-dir", "runs/x"])
    assert "x is being terminated" in launcher.stop("a"), "the selected run is another one, which is not running"
    assert launcher.process.wait(10) == -signal.SIGTERM
    launcher.start([sys.executable, "-c", "import time; time.sleep(60)", "--resume", str(launcher.runs.folder / "a")])
    assert "a is being terminated" in launcher.stop("a"), "it has no lock yet"
    assert launcher.process.wait(10) == -signal.SIGTERM
