"""Runs that are killed or stopped go on as if nothing had been."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT
from running import SHORT, assert_same, finish, last, printed, refused, start, step_files, steps_logged

import train

KILL = signal.SIGKILL


MOMENTS = {
    "in the evaluation before": {"rl.evaluate::evaluate": (1, KILL)},
    "in a roll-out": {"rl.model.engine:Engine:step": (400, KILL)},
    "while scoring": {"rl.rollout:StreamingScorer:results": (5, KILL)},
    "in an update": {"rl.optimizer:Optimizer:step": (7, KILL)},
    "between the logs": {"rl.run.folder:RunFolder:append_metrics": (3, KILL)},
    "in an evaluation": {"rl.evaluate::evaluate": (2, KILL)},
    "while a checkpoint is written": {"torch::save": (2, KILL)},
    "before it is renamed": {"rl.run.checkpoint::fsync_path": (30, KILL)},
    "before it is marked": {"rl.run.checkpoint:Checkpoints:mark": (2, KILL)},
    "while old ones are removed": {"rl.run.checkpoint:Checkpoints:prune": (3, KILL)},
    "in the final evaluation": {"rl.evaluate::evaluate": (4, KILL)},
}


QUICK = ("while a checkpoint is written",)


@pytest.mark.parametrize("moment", [m if m in QUICK else pytest.param(m, marks=pytest.mark.slow) for m in MOMENTS])
def test_killed_at_a_moment_and_resumed(tmp_path, whole, moment):
    folder = tmp_path / "run"
    assert finish(folder, "grpo", faults=MOMENTS[moment]) == -KILL
    assert finish(folder, "grpo", resume=True) == 0
    assert_same(folder, whole("grpo")[0])


@pytest.mark.parametrize("method", ["ppo", pytest.param("running", marks=pytest.mark.slow)])
def test_other_methods_killed_and_resumed(tmp_path, whole, method):
    """In an update after the third checkpoint."""
    folder = tmp_path / "run"
    assert finish(folder, method, faults={"rl.update:Updater:update": (7, KILL)}) == -KILL
    assert finish(folder, method, resume=True) == 0
    assert_same(folder, whole(method)[0])


@pytest.mark.slow
def test_killed_resumed_and_killed_again(tmp_path, whole):
    """Once more in a roll-out."""
    folder = tmp_path / "run"
    assert finish(folder, "ppo", faults={"rl.update:Updater:update": (7, KILL)}) == -KILL
    assert finish(folder, "ppo", faults={"rl.model.engine:Engine:step": (60, KILL)}, resume=True) == -KILL
    assert finish(folder, "ppo", resume=True) == 0
    assert_same(folder, whole("ppo")[0])


@pytest.mark.slow
def test_a_run_from_an_adapter_keeps_its_reference(tmp_path, whole):
    """The adapter that a run began with is its reference, also after it was resumed."""
    more = f"--adapter {whole('grpo')[0] / 'checkpoints/step_000008'} --beta 0.1"
    expected, folder = tmp_path / "whole", tmp_path / "run"
    assert finish(expected, "grpo", more=more) == 0
    assert finish(folder, "grpo", more=more, faults={"rl.optimizer:Optimizer:step": (25, KILL)}) == -KILL
    assert finish(folder, "grpo", resume=True) == 0
    assert_same(folder, expected)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["grpo", "ppo"])
def test_killed_at_twenty_random_moments(tmp_path, whole, method):
    """Each time resumed; a run that was killed before it had a folder is begun again. The moments are spread evenly over the
    steps, the time before the first one and that after the last one."""
    expected, seconds = whole(method)
    rng, at_steps = random.Random(method), []
    while len(at_steps) < 20:
        folder = tmp_path / f"run{len(at_steps)}"
        process, logged = start(folder, method), rng.randrange(9)
        while process.is_alive() and logged > steps_logged(folder):
            time.sleep(0.01)
        process.join(rng.uniform(0, seconds / 8 if logged else seconds / 2))
        process.kill()
        process.join()
        if process.exitcode == -KILL:
            at_steps.append(steps_logged(folder))
            assert finish(folder, method, resume=(folder / "config.yaml").exists()) == 0
            assert_same(folder, expected)
        shutil.rmtree(folder)
    print(f"{method}: killed after steps {sorted(at_steps)}")


# --- stopped


def stopped(tmp_path, function, nth, sign, method="grpo"):
    folder = tmp_path / "run"
    return folder, finish(folder, method, faults={function: (nth, sign)})


@pytest.mark.parametrize(
    "function, nth, sign, step",
    [
        pytest.param("rl.model.engine:Engine:step", 200, signal.SIGTERM, None, marks=pytest.mark.slow),  # in a roll-out
        pytest.param("rl.rollout:StreamingScorer:results", 5, signal.SIGINT, 3, marks=pytest.mark.slow),  # of step 3: two for the evaluation before, two steps
        pytest.param("rl.optimizer:Optimizer:step", 9, signal.SIGINT, 3, marks=pytest.mark.slow),  # the first of step 3
        ("torch::save", 2, signal.SIGTERM, 4),  # in the checkpoint of step 4
    ],
)  # fmt: skip
def test_a_stopped_run_goes_on_as_if_nothing_had_been(tmp_path, whole, function, nth, sign, step):
    folder, status = stopped(tmp_path, function, nth, sign)
    assert status == 128 + sign
    said = printed(folder)
    assert f"To resume: python train.py --resume {folder}" in said and "Traceback" not in said
    assert (step is None or last(folder) == f"step_{step:06d}") and last(folder)[-1] in said
    assert "finishing and saving this step" in said
    assert finish(folder, "grpo", resume=True) == 0
    assert_same(folder, whole("grpo")[0])


def test_a_stop_file_ends_the_run_after_its_step(tmp_path, whole):
    folder = tmp_path / "run"
    process = start(folder, "grpo")
    while not (folder / "metrics.jsonl").exists():
        time.sleep(0.05)
    (folder / "STOP").touch()
    process.join()
    assert process.exitcode == 0 and "Stopped after step" in printed(folder)
    assert not (folder / "STOP").exists()
    assert finish(folder, "grpo", resume=True) == 0
    assert_same(folder, whole("grpo")[0])


def ctrl_c_twice(*_, **__):
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.slow
def test_a_second_ctrl_c_leaves_the_step(tmp_path, whole):
    """In the update of step 4, of which only some mini-batches have been learned: the checkpoint is that of step 2."""
    folder, status = stopped(tmp_path, "rl.update:Updater:policy_step", 14, ctrl_c_twice)
    assert status == 130 and last(folder) in ("step_000002", "step_000003")
    assert finish(folder, "grpo", resume=True) == 0
    assert_same(folder, whole("grpo")[0])


# --- what an independent look at it found


def test_a_stop_without_other_checkpoints_saves_its_step(tmp_path):
    folder = tmp_path / "run"
    faults = {"rl.model.engine:Engine:step": (330, signal.SIGINT)}
    assert finish(folder, "grpo", faults=faults, more="--save-steps 0 --eval-steps 0") == 130
    assert int(last(folder)[-6:]) == steps_logged(folder) > 0
    assert "Ctrl-C: finishing and saving this step" in printed(folder)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == steps_logged(folder) and summary["completions"] == 16 * summary["steps"]


@pytest.mark.slow
def test_a_second_ctrl_c_in_an_evaluation_repeats_its_step(tmp_path, whole):
    """In the evaluation of step 3; the checkpoint is that of step 2."""
    folder = tmp_path / "run"
    faults = {"rl.evaluate::answer": (3, ctrl_c_twice)}  # two for the evaluation before
    assert finish(folder, "grpo", faults=faults) == 130
    assert last(folder) == "step_000002" and not (folder / "eval/step_000003.jsonl").exists()
    assert finish(folder, "grpo", resume=True) == 0
    assert_same(folder, whole("grpo")[0])


@pytest.mark.slow
def test_settings_that_json_does_not_know_are_kept(tmp_path):
    (tmp_path / "dated.yaml").write_text("chat_template_kwargs: {date_string: 2026-01-02}\n")
    folder, more = tmp_path / "run", f"--config {tmp_path / 'dated.yaml'} --max-steps 4"
    assert finish(folder, "grpo", more=more, faults={"rl.optimizer:Optimizer:step": (13, signal.SIGTERM)}) == 143
    assert finish(folder, "grpo", resume=True) == 0


@pytest.mark.slow
def test_killed_at_the_very_start_the_same_command_begins_anew(tmp_path, whole):
    folder = tmp_path / "run"
    assert finish(folder, "grpo", faults={"rl.run.folder:RunFolder:write_settings": (1, KILL)}) == -KILL
    assert folder.exists() and not (folder / "config.yaml").exists()
    assert finish(folder, "grpo") == 0
    assert_same(folder, whole("grpo")[0])


@pytest.mark.slow
def test_another_starting_adapter_is_refused(tmp_path, whole):
    from safetensors.torch import load_file, save_file

    adapter = shutil.copytree(whole("grpo")[0] / "checkpoints/step_000008", tmp_path / "adapter")
    folder = tmp_path / "run"
    faults = {"rl.optimizer:Optimizer:step": (9, signal.SIGTERM)}
    assert finish(folder, "grpo", more=f"--adapter {adapter} --beta 0.1", faults=faults) == 143
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({name: 3 * w for name, w in weights.items()}, adapter / "adapter_model.safetensors")
    assert "belongs to another base model, or reference adapter" in refused(folder)


RANDOM_REWARD = """
import random
import numpy
from grading import reward

@reward
def chance(completion):
    return random.random() + numpy.random.rand()
"""


@pytest.mark.slow
def test_rewards_left_to_chance_are_the_same_in_a_resumed_run(tmp_path):
    """Their generators are seeded, and their states kept."""
    (tmp_path / "mine.py").write_text(RANDOM_REWARD)
    more = f"--rewards-file {tmp_path / 'mine.py'} --max-steps 4 --eval-steps 0"
    assert finish(tmp_path / "whole", "grpo", more=more) == 0
    folder = tmp_path / "run"
    for faults in ({"rl.evaluate::evaluate": (1, KILL)}, {"rl.optimizer:Optimizer:step": (11, KILL)}):
        assert (
            finish(folder, "grpo", more="" if folder.exists() else more, resume=folder.exists(), faults=faults) == -KILL
        )
    assert finish(folder, "grpo", resume=True) == 0
    assert step_files(folder) == step_files(tmp_path / "whole")


def test_a_probe_keeps_nothing_and_tells_no_tracker(tmp_path, monkeypatch, capsys):
    import rl.run.trackers

    started = []
    monkeypatch.setattr(rl.run.trackers, "Trackers", lambda names, *_: started.append(names))
    monkeypatch.chdir(ROOT)
    before = set(Path("runs").glob("*"))
    train.main([*SHORT.split(), "--probe", "--report-to", "wandb"])
    said = capsys.readouterr().out
    assert (
        "Probed: 2 steps, nothing is kept." in said and "MB predicted" in said and "8 steps and 4 evaluations" in said
    )
    assert not started and set(Path("runs").glob("*")) == before


# --- the end before its time


def test_early_stopping_ends_the_run_and_keeps_the_best(tmp_path, capsys):
    """A learning rate of 0 brings no new best: the third evaluation after step 2 is one too many."""
    folder = tmp_path / "run"
    settings = f"{SHORT} --learning-rate 0 --eval-steps 1 --early-stopping 3 --save-steps 0"
    assert finish(folder, "grpo", more=settings, faults={"rl.evaluate::evaluate": (5, KILL)}) == -KILL  # the final one
    assert finish(folder, "grpo", resume=True) == 0
    assert "Stopped early: no evaluation after step 0 was better, of 4." in printed(folder)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 3 and summary["finished"] and summary["eval"]["gain"]["fixed"] == 0
    assert "unmoved" not in summary["alarms"]  # a learning rate of 0 is meant
    assert not (folder / "checkpoints/best").exists()
    assert last(folder) == "step_000003" and "has finished, with step 3" in refused(folder)


def test_the_best_checkpoint_is_that_of_the_highest_held_out_accuracy(tmp_path, monkeypatch):
    """And it is kept, however old. Greedy accuracy decides, then sampled accuracy, then the earlier step."""
    import rl.evaluate
    from rl.evaluate import best_step

    def of(greedy, sampled):
        return SimpleNamespace(accuracy=greedy, accuracy_sampled=sampled)

    assert best_step({0: of(0.5, 0.9), 10: of(0.6, 0.1), 20: of(0.6, 0.2), 30: of(0.6, 0.2)}) == 20
    accuracies = iter([0, 3, 1, 1, 1, 1, 1, 1, 1])
    evaluate = rl.evaluate.evaluate

    def decided(*args):
        answers, right = evaluate(*args), next(accuracies)
        for i, record in enumerate(answers.greedy):
            record["verdict"] = "right" if i < right else "wrong"
        return answers

    monkeypatch.setattr(rl.evaluate, "evaluate", decided)
    folder = tmp_path / "run"
    train.main([*SHORT.split(), "--eval-steps", "1", "--save-total-limit", "1", "--output-dir", str(folder)])
    kept = sorted(path.name for path in folder.glob("checkpoints/step_*"))
    assert kept == ["step_000001", "step_000008"]
    assert (folder / "checkpoints/best").read_text() == "step_000001\n"
