"""Trackers, by libraries that are made up and stand first in PYTHONPATH, and by tensorboard itself where it is installed.

Whatever a library does, logging never raises or waits, and one line says what was lost.
"""

import json
import math
import os
import signal
import sys
import textwrap
import time

import pytest

from rl.run import trackers
from rl.run.trackers import Trackers

FAKE = """
import json, os, sys, time

def keep(**what):
    with open(os.environ["KEPT"], "a") as file:
        file.write(json.dumps(what) + "\\n")

class Run:
    logged = 0
    def log(self, metrics, step):
        self.logged += 1
        {log}
        keep(step=step, **metrics)
    def finish(self):
        keep(finished=True)

def init(**given):
    {init}
    keep(**{{name: value for name, value in given.items() if name in ("name", "id", "resume", "dir", "config", "project")}})
    return Run()
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run folder; what the fakes keep goes into tmp_path/kept; the short waits of tests."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fakes"))
    monkeypatch.setenv("KEPT", str(tmp_path / "kept"))
    monkeypatch.setattr(trackers, "PATIENCE", 1.0)
    monkeypatch.setattr(trackers, "LINGER", 1.0)
    for folder in ("fakes", "some-run"):
        (tmp_path / folder).mkdir()
    return tmp_path / "some-run"


def fake(run, name, init="pass", log="pass"):
    (run.parent / "fakes" / f"{name}.py").write_text(textwrap.dedent(FAKE.format(init=init, log=log)))


def kept(run):
    path = run.parent / "kept"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert condition()


def track(run, names, steps=3, first_step=1, settle=True):
    """Log some steps, close, and return the warnings. settle: log on until a tracker that fails has been noticed."""
    warnings = []
    tracked = Trackers(names, run, {"seed": 3, "folder": run}, first_step, warnings.append)
    assert not warnings
    for step in range(first_step, first_step + steps):
        log_at_once(tracked, step)
    if settle:
        wait_until(lambda: log_at_once(tracked, 99) or not tracked.trackers)
    closed(tracked)
    return warnings


def log_at_once(tracked, step):
    started = time.monotonic()
    tracked.log(step, {"step": step, "reward": step / 2, "kl": math.nan, "most": math.inf, "updates": 2, "alarms": []})
    assert time.monotonic() - started < 0.5


def closed(tracked):
    started = time.monotonic()
    tracked.close()
    assert time.monotonic() - started < trackers.PATIENCE + 1
    tracked.close()  # a second time does nothing
    tracked.log(7, {})


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_metrics_arrive_by_step_without_what_is_no_number(run, name):
    fake(run, name)
    assert track(run, [name], settle=False) == []
    first, *steps, last = kept(run)
    assert (first["name"], first["config"]) == ("some-run", {"seed": 3, "folder": str(run)})
    assert steps == [{"step": step, "reward": step / 2, "updates": 2} for step in (1, 2, 3)]
    assert last == {"finished": True}


def test_a_resumed_run_goes_on_in_the_same_tracked_run(run):
    for name in ("wandb", "trackio"):
        fake(run, name)
        assert track(run, [name], settle=False) == track(run, [name], first_step=3, settle=False) == []
    inits = [line for line in kept(run) if "name" in line]
    assert [line["resume"] for line in inits] == ["allow", "allow", "never", "allow"]
    assert inits[0]["id"] == inits[1]["id"] == (run / "wandb" / "run-id.txt").read_text()
    assert inits[0]["dir"] == str(run)
    other = run.parent / "other-run"
    other.mkdir()
    track(other, ["wandb"], settle=False)
    assert [line for line in kept(run) if "id" in line][-1]["id"] != inits[0]["id"]


@pytest.mark.parametrize("name", ["wandb", "trackio", "tensorboard"])
def test_a_library_that_is_missing_is_named_once(run, name):
    (run.parent / "fakes" / f"{name}.py").write_text(f"raise ModuleNotFoundError('No module named', name='{name}')")
    assert track(run, [name]) == [
        f"tracker {name}: not installed (pip install {name}). The run goes on without it; metrics.jsonl has everything"
    ]


@pytest.mark.parametrize(
    "where, what, words",
    [
        ("init", "raise ValueError('no\\nkey')", "failed with ValueError: no key"),
        ("init", "sys.exit(3)", "failed with SystemExit: 3"),
        ("init", "raise KeyboardInterrupt", "failed with KeyboardInterrupt"),
        ("init", "import no_such_part", "does not work, No module named 'no_such_part' (pip install --upgrade wandb)"),
        ("init", "os.abort()", "its process ended with exit code"),
        ("log", "assert self.logged < 3, 'enough'", "failed with AssertionError: enough"),
        ("log", "1 / (3 - self.logged)", "failed with ZeroDivisionError: division by zero"),
    ],
)
def test_a_library_that_fails_is_named_once_and_left_alone(run, where, what, words):
    fake(run, "wandb", **{where: what})
    fake(run, "trackio")
    warnings = []
    tracked = Trackers(["wandb", "trackio"], run, {}, 1, warnings.append)
    for step in (1, 2, 3):
        log_at_once(tracked, step)
    wait_until(lambda: log_at_once(tracked, 4) or warnings)
    closed(tracked)
    assert len(warnings) == 1 and warnings[0].startswith("tracker wandb: ") and words in warnings[0]
    assert "\n" not in warnings[0]
    steps = [line["step"] for line in kept(run) if "step" in line]
    assert steps.count(1) == steps.count(2) == (2 if where == "log" else 1) and steps.count(3) == 1  # trackio has them


@pytest.mark.parametrize("where", ["init", "log"])
def test_a_library_that_hangs_delays_nothing_and_is_gone_soon(run, where):
    fake(run, "wandb", **{where: "time.sleep(1000)"})
    warnings = []
    tracked = Trackers(["wandb"], run, {}, 1, warnings.append)
    child = tracked.trackers[0].child
    for step in range(1, 500):
        tracked.log(step, {"reward": 1.0})
    closed(tracked)
    assert len(warnings) == 1 and "tracker wandb: still busy" in warnings[0] and "WANDB_MODE=offline" in warnings[0]
    wait_until(lambda: child.poll() is not None)  # LINGER


def test_a_slow_end_is_waited_for_by_its_own_process(run, monkeypatch):
    monkeypatch.setattr(trackers, "LINGER", 20.0)
    fake(run, "trackio", log="time.sleep(0.4)")
    warnings = track(run, ["trackio"], steps=4, settle=False)
    assert len(warnings) == 1 and "goes on by itself" in warnings[0]
    wait_until(lambda: kept(run)[-1] == {"finished": True})


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="a process is stopped by a signal of POSIX")
def test_what_a_full_queue_drops_is_counted_and_said_once(run, monkeypatch):
    monkeypatch.setattr(trackers, "WAITING", 3)
    fake(run, "wandb")
    warnings = []
    tracked = Trackers(["wandb"], run, {}, 1, warnings.append)
    child = tracked.trackers[0].child
    wait_until(lambda: kept(run))
    child.send_signal(signal.SIGSTOP)
    try:
        for step in range(400):
            tracked.log(step, {f"metric {i}": 0.5 for i in range(100)})
        closed(tracked)
    finally:
        child.kill()
    assert len(warnings) == 2 and "still busy" in warnings[0] and "steps are missing there" in warnings[1]


def test_what_a_library_prints_asks_and_sets_stays_in_its_process(run, capfd):
    init = "print('hello'); os.system('echo loud'); sys.stderr.write('hm'); sys.exit = sys.excepthook = None"
    fake(
        run,
        "wandb",
        init=init + "; import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); keep(read=sys.stdin.read())",
    )
    before = sys.exit, sys.excepthook, signal.getsignal(signal.SIGINT)
    assert track(run, ["wandb"], settle=False) == []
    assert before == (sys.exit, sys.excepthook, signal.getsignal(signal.SIGINT))
    assert capfd.readouterr() == ("", "") and kept(run)[0] == {"read": ""} and "wandb" not in sys.modules


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="process groups of POSIX")
def test_ctrl_c_does_not_reach_a_tracker(run):
    fake(run, "wandb")
    tracked = Trackers(["wandb"], run, {}, 1, print)
    assert os.getpgid(tracked.trackers[0].child.pid) != os.getpgid(0)
    tracked.close()


def test_no_process_to_be_had(run, monkeypatch):
    def refuse(*args, **kwargs):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(trackers.subprocess, "Popen", refuse)
    warnings = []
    tracked = Trackers(["wandb"], run, {}, 1, warnings.append)
    tracked.log(1, {"reward": 1.0})
    tracked.close()
    assert len(warnings) == 1 and "cannot be started: Resource temporarily unavailable" in warnings[0]


def test_tensorboard_itself(run, monkeypatch):
    """The values by step; a resumed run replaces those of the steps that it repeats."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(trackers, "PATIENCE", 20.0)
    assert track(run, ["tensorboard"], steps=5, settle=False) == []
    time.sleep(1.1)  # files are named by the second
    assert track(run, ["tensorboard"], steps=4, first_step=4, settle=False) == []
    assert len(list((run / "tensorboard").iterdir())) == 2
    shown = EventAccumulator(str(run / "tensorboard")).Reload()
    assert shown.Tags()["scalars"] == ["reward", "updates"]
    assert [(e.step, e.value) for e in shown.Scalars("reward")] == [(step, step / 2) for step in range(1, 8)]
