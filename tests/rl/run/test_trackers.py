"""Trackers, by fake libraries that stand first on the path, and by tensorboard itself if it is installed.

Whatever a library does, nothing raises, and one line says what was lost.
"""

import json
import math
import os
import sys
import textwrap
import time

import pytest

from rl.run.trackers import WANDB_WAIT, Trackers

FAKE = """
import json, os, sys

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
        {finish}
        keep(finished=True)

def Settings(**settings):
    return settings

def init(**given):
    {init}
    keep(**given)
    return Run()
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run folder; what the fakes keep goes into tmp_path/kept."""
    monkeypatch.syspath_prepend(tmp_path / "fakes")
    monkeypatch.setenv("KEPT", str(tmp_path / "kept"))
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


def kept(run):
    path = run.parent / "kept"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def track(run, names, steps=3, first_step=1):
    """Log some steps, close, and return the warnings."""
    warnings = []
    tracked = Trackers(names, run, {"seed": 3, "model": "data/tiny"}, first_step, warnings.append)
    for step in range(first_step, first_step + steps):
        metrics = {"reward": step / 2, "kl": math.nan, "most": math.inf, "updates": 2, "alarms": []}
        tracked.log(step, {"step": step, **metrics})
    tracked.close()
    tracked.close()  # a second time does nothing
    tracked.log(7, {})
    return warnings


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_metrics_arrive_by_step_without_what_is_no_number(run, name):
    fake(run, name)
    assert track(run, [name]) == []
    first, *steps, last = kept(run)
    assert (first["name"], first["config"]) == ("some-run", {"seed": 3, "model": "data/tiny"})
    assert steps == [{"step": step, "reward": step / 2, "updates": 2} for step in (1, 2, 3)]
    assert last == {"finished": True}


def test_a_resumed_run_continues_the_same_tracked_run(run):
    for name in ("wandb", "trackio"):
        fake(run, name)
        assert track(run, [name]) == track(run, [name], first_step=3) == []
    inits = [line for line in kept(run) if "name" in line]
    assert [line["resume"] for line in inits] == ["allow", "allow", "never", "allow"]
    assert inits[0]["id"] == inits[1]["id"] == (run / "wandb" / "run-id.txt").read_text()
    assert inits[0]["dir"] == str(run)
    other = run.parent / "other-run"
    other.mkdir()
    track(other, ["wandb"])
    assert [line for line in kept(run) if "id" in line][-1]["id"] != inits[0]["id"]


def test_wandb_waits_for_the_network_no_longer_than_the_limit(run):
    fake(run, "wandb")
    assert track(run, ["wandb"]) == []
    settings = kept(run)[0]["settings"]
    assert settings["init_timeout"] == settings["finish_timeout"] == WANDB_WAIT and settings["finish_timeout_raises"]


@pytest.mark.parametrize("name", ["wandb", "trackio", "tensorboard"])
def test_a_library_that_is_missing_is_named_once(run, name, monkeypatch):
    for loaded in [module for module in sys.modules if module.split(".")[0] == name or "utils.tensorboard" in module]:
        monkeypatch.delitem(sys.modules, loaded)
    (run.parent / "fakes" / f"{name}.py").write_text(f"raise ModuleNotFoundError('No module named', name='{name}')")
    (warning,) = track(run, [name])
    assert warning.startswith(f"tracker {name}: not installed (pip install {name}).") and "metrics.jsonl" in warning


@pytest.mark.parametrize(
    "where, what, words",
    [
        ("init", "raise ValueError('no\\nkey')", "failed with ValueError: no key"),
        ("init", "sys.exit(3)", "failed with SystemExit: 3"),
        ("init", "import no_such_part", "failed with ModuleNotFoundError: No module named 'no_such_part'"),
        ("log", "assert self.logged < 3, 'enough'", "failed with AssertionError: enough"),
        ("log", "1 / (3 - self.logged)", "failed with ZeroDivisionError: division by zero"),
        ("log", "sys.exit()", "failed with SystemExit"),
        ("finish", "raise TimeoutError('no network')", "failed with TimeoutError: no network; wandb login first"),
    ],
)
def test_a_library_that_fails_is_named_once_and_left_alone(run, where, what, words):
    fake(run, "wandb", **{where: what})
    fake(run, "trackio")
    warnings = track(run, ["wandb", "trackio"], steps=5)
    assert len(warnings) == 1 and warnings[0].startswith("tracker wandb: ") and words in warnings[0]
    assert "\n" not in warnings[0]
    steps = [line["step"] for line in kept(run) if "step" in line]
    assert all(step in steps for step in range(1, 6))  # trackio has them all
    logged = {"init": 0, "finish": 5}.get(where, 0 if "exit" in what else 2)
    assert len(steps) == 5 + logged


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_ctrl_c_is_not_a_failure_of_the_library(run, where):
    fake(run, "wandb", **{where: "raise KeyboardInterrupt"})
    with pytest.raises(KeyboardInterrupt):
        track(run, ["wandb"])


@pytest.mark.parametrize("ending", ["pass", "raise ValueError"])
def test_a_library_cannot_wait_for_the_terminal(run, ending):
    fake(run, "wandb", init="given['read'] = sys.stdin.read(); " + ending, log=ending)
    before = sys.stdin
    assert len(track(run, ["wandb"])) == (ending != "pass")
    assert sys.stdin is before
    assert ending != "pass" or kept(run)[0]["read"] == ""


def test_tensorboard_itself(run):
    """The values by step; a resumed run replaces those of the steps that it repeats."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert track(run, ["tensorboard"], steps=5) == []
    time.sleep(1.1)  # files are named by the second
    assert track(run, ["tensorboard"], steps=4, first_step=4) == []
    assert len(os.listdir(run / "tensorboard")) == 2
    shown = EventAccumulator(str(run / "tensorboard")).Reload()
    assert shown.Tags()["scalars"] == ["reward", "updates"]
    assert [(e.step, e.value) for e in shown.Scalars("reward")] == [(step, step / 2) for step in range(1, 8)]
