"""Runs that are started and stopped from the page: really, and with commands that are refused."""

import os
import signal
import sys
import time

import filelock
import pytest

pytest.importorskip("gradio")

from watching import followed, until, watched  # noqa: E402

from ui.launch import recipes  # noqa: E402
from ui.runs import Runs, UiError  # noqa: E402

SHORT = (
    "--prompts-per-step 2 --num-generations 2 --eval-questions 4 --eval-steps 0 --save-steps 0 --train-questions 20 "
    "--max-completion-length 16 --log-completions-steps 0 --device cpu"
)


def test_the_command(launcher):
    command = launcher.command("configs/tiny.yaml", "--max-steps 20 --system-prompt 'a b; $(rm) `x` && y'")
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
    assert launcher.command("configs/tiny.yaml", "")[-1] == str(launcher.runs.folder / "tiny-2")
    resumed = ["--max-steps", "30", "--resume", str(launcher.runs.folder / "a")]
    assert launcher.resume_command("a", "--max-steps 30")[2:] == resumed


@pytest.mark.parametrize(
    "recipe, settings, says",
    [
        ("configs/../train.py", "", "no recipe"),
        ("/etc/passwd", "", "no recipe"),
        (None, "", "no recipe"),
        ("configs/tiny.yaml", "--output-dir /tmp/x", "chosen by this page"),
        ("configs/tiny.yaml", "--max-steps 2 --output_dir=..", "chosen by this page"),
        ("configs/tiny.yaml", "--config x.yaml", "chosen by this page"),
        ("configs/tiny.yaml", "--resume=runs/a", "chosen by this page"),
        ("configs/tiny.yaml", "--system-prompt 'a", "Close the quotes"),
    ],
)
def test_commands_that_are_refused(launcher, recipe, settings, says):
    with pytest.raises(UiError, match=says):
        launcher.command(recipe, settings)


def test_what_cannot_be_started_or_stopped(folder, launcher):
    with filelock.FileLock(folder / "a/lock"):
        with pytest.raises(UiError, match="a is running. Stop it first"):
            launcher.start(["never"])
        with pytest.raises(UiError, match="it is running"):
            launcher.resume_command("a", "")
        assert "asked to stop" in launcher.stop("a") and (folder / "a/STOP").exists()
    for name in ("a", None):
        with pytest.raises(UiError, match="is not running"):
            launcher.stop(name)


def test_every_recipe_has_a_header():
    assert "configs/tiny.yaml" in recipes()
    assert all("python train.py" in header for header in recipes().values())


def test_a_run_is_started_watched_found_again_and_stopped(folder, served):
    client = served()
    _, command = client.predict("configs/tiny.yaml", SHORT, api_name="/show_command")
    assert command.endswith(f"--device cpu --output-dir {folder}/tiny-1")
    started, timer = client.predict("configs/tiny.yaml", f"--max-steps 2000 {SHORT}", api_name="/start_run")
    assert started.startswith(command.split(" --prompts")[0]) and timer["active"]
    with pytest.raises(Exception, match="is running. Stop it first"):
        client.predict("configs/tiny.yaml", SHORT, api_name="/start_run")
    found = until(client, lambda f: "Running: step" in f["status"] and "step 0 of" not in f["status"])
    assert found["timer"]["value"] == 2 and "of 2000, about" in found["status"]
    assert os.getsid(pid := int(found["started"].split("process ")[1].split(".")[0])) == pid, "outlives the page"

    again = served()  # the page is loaded anew
    found = watched(again)
    assert found["name"]["value"] == "tiny-1" and "Running" in found["status"] and "step" in found["log"]
    shown = again.predict("tiny-1", 1, "entropy", api_name="/show_step")
    assert len(shown[0]["data"]) == 2 and shown[6].startswith("entropy, in this group") and shown[7]
    with pytest.raises(Exception, match="a is not running"):
        again.predict("a", api_name="/stop_run")
    assert "it ends after the current step, and saves" in again.predict("tiny-1", api_name="/stop_run")
    found = until(client, lambda f: "Stopped before its end" in f["status"] and f["timer"]["value"] == 10)
    assert "ended with exit code 0" in found["started"] and Runs(folder).get("tiny-1").checkpoints()
    assert "step_" in found["log"]


def test_a_wrong_setting_is_shown_with_the_exit_code(folder, served):
    client = served()
    client.predict("configs/tiny.yaml", "--lerning-rate 1", api_name="/start_run")
    found = until(client, lambda f: "exit code" in f["started"])
    assert "exit code 1" in found["started"] and "Did you mean 'learning_rate'?" in found["started"]
    assert not (folder / "tiny-1").exists()


@pytest.mark.slow
def test_a_run_that_is_killed(folder, launcher):
    launcher.start(launcher.command("configs/tiny.yaml", f"--max-steps 2000 {SHORT}"))
    end = time.monotonic() + 60
    while not (folder / "tiny-1/metrics.jsonl").exists() and time.monotonic() < end:
        time.sleep(0.1)
    os.kill(launcher.process.pid, signal.SIGKILL)
    launcher.process.wait()
    assert "ended with exit code -9. Its last lines:\n" in launcher.describe()
    found = followed(launcher, "tiny-1")
    assert found["status"].startswith("Stopped before its end: step")
    assert launcher.resume_command("tiny-1", "")[2] == "--resume"


def test_a_run_that_has_not_begun_is_stopped_by_a_signal(launcher):
    launcher.start([sys.executable, "-c", "import time; time.sleep(60)", "--output-dir", "runs/x"])
    assert "had not begun" in launcher.stop("a"), "the run that is chosen is another one, which is not running"
    assert launcher.process.wait(10) == -signal.SIGTERM
    launcher.start([sys.executable, "-c", "import time; time.sleep(60)", "--resume", str(launcher.runs.folder / "a")])
    assert "had not begun" in launcher.stop("a"), "its lock is not taken yet"
    assert launcher.process.wait(10) == -signal.SIGTERM
