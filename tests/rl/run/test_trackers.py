"""Trackers, tested with fake libraries that shadow the real ones, and with tensorboard itself if it is installed.

A library that fails never stops the run; it gives one warning.
"""

import json
import math
import os
import sys
import textwrap
import time

import pytest

from rl.run.trackers import WANDB_TIMEOUT, Trackers

FAKE = """
import json, os, sys

def record(**values):
    with open(os.environ["RECORDS"], "a") as file:
        file.write(json.dumps(values) + "\\n")

class Run:
    logged = 0
    def log(self, metrics, step):
        self.logged += 1
        {log}
        record(step=step, **metrics)
    def finish(self):
        {finish}
        record(finished=True)

def Settings(**settings):
    return settings

def init(**options):
    {init}
    record(**options)
    return Run()
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run folder. The fake libraries write their records to tmp_path/records."""
    monkeypatch.syspath_prepend(tmp_path / "fakes")
    monkeypatch.setenv("RECORDS", str(tmp_path / "records"))
    for folder in ("fakes", "some-run"):
        (tmp_path / folder).mkdir()
    for name in ("wandb", "trackio"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield tmp_path / "some-run"
    for name in ("wandb", "trackio"):
        sys.modules.pop(name, None)


def fake(run, name, init="pass", log="pass", finish="pass"):
    source = textwrap.dedent(FAKE.format(init=init, log=log, finish=finish))
    (run.parent / "fakes" / f"{name}.py").write_text(source)


def records(run):
    path = run.parent / "records"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def track(run, names, steps=3, first_step=1):
    """Log some steps, close the trackers, and return the warnings."""
    warnings = []
    trackers = Trackers(names, run, {"seed": 3, "model": "data/tiny"}, first_step, warnings.append)
    for step in range(first_step, first_step + steps):
        metrics = {"reward": step / 2, "kl": math.nan, "max": math.inf, "updates": 2, "alarms": []}
        trackers.log(step, {"step": step, **metrics})
    trackers.close()
    trackers.close()  # a second call does nothing
    trackers.log(7, {})
    return warnings


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_finite_numbers_are_logged_by_step(run, name):
    fake(run, name)
    assert track(run, [name]) == []
    first, *steps, last = records(run)
    assert (first["name"], first["config"]) == ("some-run", {"seed": 3, "model": "data/tiny"})
    assert steps == [{"step": step, "reward": step / 2, "updates": 2} for step in (1, 2, 3)]
    assert last == {"finished": True}


def test_a_resumed_run_continues_the_same_tracked_run(run):
    for name in ("wandb", "trackio"):
        fake(run, name)
        assert track(run, [name]) == track(run, [name], first_step=3) == []
    inits = [line for line in records(run) if "name" in line]
    assert [line["resume"] for line in inits] == ["allow", "allow", "never", "allow"]
    assert inits[0]["id"] == inits[1]["id"] == (run / "wandb" / "run-id.txt").read_text()
    assert inits[0]["dir"] == str(run)
    other = run.parent / "other-run"
    other.mkdir()
    track(other, ["wandb"])
    assert [line for line in records(run) if "id" in line][-1]["id"] != inits[0]["id"]


def test_wandb_gets_the_timeout_for_the_network(run):
    fake(run, "wandb")
    assert track(run, ["wandb"]) == []
    settings = records(run)[0]["settings"]
    assert settings["init_timeout"] == settings["finish_timeout"] == WANDB_TIMEOUT and settings["finish_timeout_raises"]


@pytest.mark.parametrize("name", ["wandb", "trackio", "tensorboard"])
def test_a_missing_library_gives_one_warning(run, name, monkeypatch):
    for loaded in [module for module in sys.modules if module.split(".")[0] == name or "utils.tensorboard" in module]:
        monkeypatch.delitem(sys.modules, loaded)
    (run.parent / "fakes" / f"{name}.py").write_text(f"raise ModuleNotFoundError('No module named', name='{name}')")
    (warning,) = track(run, [name])
    assert f"tracker {name}: " in warning and f"pip install {name}" in warning and "metrics.jsonl" in warning


@pytest.mark.parametrize(
    "function, fault, text",
    [
        ("init", "raise ValueError('no\\nkey')", "failed with ValueError: no key"),
        ("init", "sys.exit(3)", "failed with SystemExit: 3"),
        ("init", "import no_such_part", "failed with ModuleNotFoundError: No module named 'no_such_part'"),
        ("log", "assert self.logged < 3, 'enough'", "failed with AssertionError: enough"),
        ("log", "1 / (3 - self.logged)", "failed with ZeroDivisionError: division by zero"),
        ("log", "sys.exit()", "failed with SystemExit"),
        ("finish", "raise TimeoutError('no network')", "failed with TimeoutError: no network; run `wandb login`"),
    ],
)
def test_a_failing_library_gives_one_warning_and_is_dropped(run, function, fault, text):
    fake(run, "wandb", **{function: fault})
    fake(run, "trackio")
    warnings = track(run, ["wandb", "trackio"], steps=5)
    assert len(warnings) == 1 and warnings[0].startswith("tracker wandb: ") and text in warnings[0]
    assert "\n" not in warnings[0]
    steps = [line["step"] for line in records(run) if "step" in line]
    assert all(step in steps for step in range(1, 6))  # trackio has all of them
    num_logged = {"init": 0, "finish": 5}.get(function, 0 if "exit" in fault else 2)
    assert len(steps) == 5 + num_logged


@pytest.mark.parametrize("function", ["init", "log", "finish"])
def test_ctrl_c_is_not_treated_as_a_failure_of_the_library(run, function):
    fake(run, "wandb", **{function: "raise KeyboardInterrupt"})
    with pytest.raises(KeyboardInterrupt):
        track(run, ["wandb"])


@pytest.mark.parametrize("ending", ["pass", "raise ValueError"])
def test_a_library_cannot_wait_for_input(run, ending):
    fake(run, "wandb", init="options['input'] = sys.stdin.read(); " + ending, log=ending)
    before = sys.stdin
    assert len(track(run, ["wandb"])) == (ending != "pass")
    assert sys.stdin is before
    assert ending != "pass" or records(run)[0]["input"] == ""


def test_tensorboard_has_the_values_by_step(run):
    """A resumed run replaces the values of the steps that it repeats."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert track(run, ["tensorboard"], steps=5) == []
    time.sleep(1.1)  # the file names contain the time in seconds
    assert track(run, ["tensorboard"], steps=4, first_step=4) == []
    assert len(os.listdir(run / "tensorboard")) == 2
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["reward", "updates"]
    assert [(e.step, e.value) for e in events.Scalars("reward")] == [(step, step / 2) for step in range(1, 8)]
