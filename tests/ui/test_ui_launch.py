"""Runs that are started, resumed and stopped from the page, and commands that are refused."""

import os
import signal
import sys
import time

import filelock
import pytest

pytest.importorskip("gradio")

from watching import follow_run, wait_until, watch_run  # noqa: E402

from ui.launch import load_recipes  # noqa: E402
from ui.runs import Runs, UiError  # noqa: E402

SHORT = (
    "--prompts-per-step 2 --num-generations 2 --eval-questions 4 --eval-steps 0 --save-steps 0 --train-questions 20 "
    "--max-completion-length 16 --log-completions-steps 0 --device cpu"
)


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


def test_every_recipe_has_a_header():
    assert "configs/tiny.yaml" in load_recipes()
    assert all("python train.py" in header for header in load_recipes().values())


def test_starts_watches_and_stops_a_run_also_after_a_reload(folder, served):
    client = served()
    _, command = client.predict("configs/tiny.yaml", SHORT, api_name="/show_command")
    assert command.endswith(f"--device cpu --output-dir {folder}/tiny-1")
    started, timer = client.predict("configs/tiny.yaml", f"--max-steps 2000 {SHORT}", api_name="/start_run")
    assert started.startswith(command.split(" --prompts")[0]) and timer["active"]
    with pytest.raises(Exception, match="is running"):
        client.predict("configs/tiny.yaml", SHORT, api_name="/start_run")
    values = wait_until(client, lambda v: "Running: step" in v["status"] and "step 0 of" not in v["status"])
    assert values["timer"]["value"] == 2 and "of 2000, about" in values["status"]
    assert os.getsid(pid := int(values["started"].split("process ")[1].split(".")[0])) == pid, "outlives the page"

    reloaded = served()  # a second load of the page
    values = watch_run(reloaded)
    assert values["name"]["value"] == "tiny-1" and "Running" in values["status"] and "step" in values["log"]
    outputs = reloaded.predict("tiny-1", 1, "entropy", api_name="/show_step")
    assert len(outputs[0]["data"]) == 2 and outputs[7].startswith("entropy: ") and outputs[8]
    with pytest.raises(Exception, match="a is not running"):
        reloaded.predict("a", api_name="/stop_run")
    assert "stop after the current step" in reloaded.predict("tiny-1", api_name="/stop_run")
    values = wait_until(client, lambda v: "Stopped early" in v["status"] and v["timer"]["value"] == 10)
    assert "exit code 0" in values["started"] and Runs(folder).get("tiny-1").checkpoints()
    assert "step_" in values["log"]


def test_shows_the_exit_code_and_the_error_of_a_wrong_setting(folder, served):
    client = served()
    client.predict("configs/tiny.yaml", "--lerning-rate 1", api_name="/start_run")
    values = wait_until(client, lambda v: "exit code" in v["started"])
    assert "exit code 1" in values["started"] and "'learning_rate'" in values["started"]
    assert not (folder / "tiny-1").exists()


@pytest.mark.slow
def test_a_killed_run_is_shown_as_stopped_and_can_be_resumed(folder, launcher):
    launcher.start(launcher.start_command("configs/tiny.yaml", f"--max-steps 2000 {SHORT}"))
    end = time.monotonic() + 60
    while not (folder / "tiny-1/metrics.jsonl").exists() and time.monotonic() < end:
        time.sleep(0.1)
    os.kill(launcher.process.pid, signal.SIGKILL)
    launcher.process.wait()
    assert "exit code -9" in launcher.describe()
    values = follow_run(launcher, "tiny-1")
    assert values["status"].startswith("Stopped early: step")
    assert launcher.resume_command("tiny-1", "")[2] == "--resume"


def test_terminates_a_run_without_a_lock(launcher):
    launcher.start([sys.executable, "-c", "import time; time.sleep(60)", "--output-dir", "runs/x"])
    assert "x was terminated" in launcher.stop("a"), "the selected run is another one, which is not running"
    assert launcher.process.wait(10) == -signal.SIGTERM
    launcher.start([sys.executable, "-c", "import time; time.sleep(60)", "--resume", str(launcher.runs.folder / "a")])
    assert "a was terminated" in launcher.stop("a"), "it has no lock yet"
    assert launcher.process.wait(10) == -signal.SIGTERM
