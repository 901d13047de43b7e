"""A run that is killed or stopped and then resumed gives the same result as an uninterrupted run."""

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
from running import (
    SHORT,
    assert_same,
    count_logged_steps,
    finish,
    last_checkpoint,
    read_output,
    resume_error,
    start,
    step_files,
)

import train

KILL = signal.SIGKILL


MOMENTS = {
    "in the first evaluation": {"rl.evaluate::evaluate": (1, KILL)},
    "in a roll-out": {"rl.model.engine:Engine:step": (400, KILL)},
    "while scoring": {"rl.rollout:StreamingScorer:results": (5, KILL)},
    "in an update": {"rl.optimizer:Optimizer:step": (7, KILL)},
    "between two logs": {"rl.run.folder:RunFolder:append_metrics": (3, KILL)},
    "in an evaluation": {"rl.evaluate::evaluate": (2, KILL)},
    "while a checkpoint is written": {"torch::save": (2, KILL)},
    "before it is renamed": {"rl.run.checkpoint::fsync_path": (30, KILL)},
    "before it is marked": {"rl.run.checkpoint:Checkpoints:mark": (2, KILL)},
    "while old checkpoints are removed": {"rl.run.checkpoint:Checkpoints:prune": (3, KILL)},
    "in the final evaluation": {"rl.evaluate::evaluate": (4, KILL)},
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_resumes_after_a_kill_at_any_moment(tmp_path, uninterrupted_run, moment):
    folder = tmp_path / "run"
    assert finish(folder, "grpo", faults=MOMENTS[moment]) == -KILL
    assert finish(folder, "grpo", resume=True) == 0
    assert_same(folder, uninterrupted_run("grpo")[0])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ppo", "running"])
def test_other_methods_resume_after_a_kill(tmp_path, uninterrupted_run, method):
    """The run is killed in an update after the third checkpoint."""
    folder = tmp_path / "run"
    assert finish(folder, method, faults={"rl.update:Updater:update": (7, KILL)}) == -KILL
    assert finish(folder, method, resume=True) == 0
    assert_same(folder, uninterrupted_run(method)[0])


@pytest.mark.slow
def test_resumes_after_two_kills(tmp_path, uninterrupted_run):
    """The run is killed in an update, and after resuming in a roll-out."""
    folder = tmp_path / "run"
    assert finish(folder, "ppo", faults={"rl.update:Updater:update": (7, KILL)}) == -KILL
    assert finish(folder, "ppo", faults={"rl.model.engine:Engine:step": (60, KILL)}, resume=True) == -KILL
    assert finish(folder, "ppo", resume=True) == 0
    assert_same(folder, uninterrupted_run("ppo")[0])


@pytest.mark.slow
def test_a_run_from_an_adapter_keeps_its_reference(tmp_path, uninterrupted_run):
    """The adapter that a run started from is its reference, also after resuming."""
    more = f"--adapter {uninterrupted_run('grpo')[0] / 'checkpoints/step_000008'} --beta 0.1"
    expected = tmp_path / "whole"
    folder = tmp_path / "run"
    assert finish(expected, "grpo", more=more) == 0
    assert finish(folder, "grpo", more=more, faults={"rl.optimizer:Optimizer:step": (25, KILL)}) == -KILL
    assert finish(folder, "grpo", resume=True) == 0
    assert_same(folder, expected)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["grpo", "ppo", "episodes"])
def test_resumes_after_a_kill_at_twenty_random_moments(tmp_path, uninterrupted_run, method):
    """The moments are spread evenly over the steps and the times before the first and after the last step.

    A run that was killed before it wrote config.yaml is started again.
    """
    expected, seconds = uninterrupted_run(method)
    rng = random.Random(method)
    kill_steps = []
    while len(kill_steps) < 20:
        folder = tmp_path / f"run{len(kill_steps)}"
        process = start(folder, method)
        min_steps = rng.randrange(9)
        while process.is_alive() and min_steps > count_logged_steps(folder):
            time.sleep(0.01)
        process.join(rng.uniform(0, seconds / 8 if min_steps else seconds / 2))
        process.kill()
        process.join()
        if process.exitcode == -KILL:
            kill_steps.append(count_logged_steps(folder))
            assert finish(folder, method, resume=(folder / "config.yaml").exists()) == 0
            assert_same(folder, expected)
        shutil.rmtree(folder)
    print(f"{method}: killed after steps {sorted(kill_steps)}")


# --- stop requests


def run_with_fault(tmp_path, function, nth, fault, method="grpo"):
    folder = tmp_path / "run"
    return folder, finish(folder, method, faults={function: (nth, fault)})


@pytest.mark.parametrize(
    "function, nth, signal_number, step",
    [
        pytest.param("rl.model.engine:Engine:step", 200, signal.SIGTERM, None, marks=pytest.mark.slow),  # in a roll-out
        pytest.param("rl.rollout:StreamingScorer:results", 5, signal.SIGINT, 3, marks=pytest.mark.slow),  # in step 3: the first evaluation makes two calls, each step one
        pytest.param("rl.optimizer:Optimizer:step", 9, signal.SIGINT, 3, marks=pytest.mark.slow),  # the first call in step 3
        ("torch::save", 2, signal.SIGTERM, 4),  # in the checkpoint of step 4
    ],
)  # fmt: skip
def test_a_signal_stops_the_run_after_its_step_and_the_run_resumes(
    tmp_path, uninterrupted_run, function, nth, signal_number, step
):
    folder, status = run_with_fault(tmp_path, function, nth, signal_number)
    assert status == 128 + signal_number
    output = read_output(folder)
    assert f"To resume: python train.py --resume {folder}" in output and "Traceback" not in output
    assert (step is None or last_checkpoint(folder) == f"step_{step:06d}") and last_checkpoint(folder)[-1] in output
    assert "finishing and saving this step" in output
    assert finish(folder, "grpo", resume=True) == 0
    assert_same(folder, uninterrupted_run("grpo")[0])


def test_a_stop_file_stops_the_run_after_its_step_and_the_run_resumes(tmp_path, uninterrupted_run):
    folder = tmp_path / "run"
    process = start(folder, "grpo")
    while not (folder / "metrics.jsonl").exists():
        time.sleep(0.05)
    (folder / "STOP").touch()
    process.join()
    assert process.exitcode == 0 and "Stopped after step" in read_output(folder)
    assert not (folder / "STOP").exists()
    assert finish(folder, "grpo", resume=True) == 0
    assert_same(folder, uninterrupted_run("grpo")[0])


def ctrl_c_twice(*_, **__):
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.slow
def test_a_second_ctrl_c_abandons_the_step_and_the_run_resumes(tmp_path, uninterrupted_run):
    """Ctrl-C comes twice in the update of step 4, after some of its mini-batches."""
    folder, status = run_with_fault(tmp_path, "rl.update:Updater:policy_step", 14, ctrl_c_twice)
    assert status == 130 and last_checkpoint(folder) in ("step_000002", "step_000003")
    assert finish(folder, "grpo", resume=True) == 0
    assert_same(folder, uninterrupted_run("grpo")[0])


# --- special cases


def test_a_stopped_run_without_other_checkpoints_saves_its_step(tmp_path):
    folder = tmp_path / "run"
    faults = {"rl.model.engine:Engine:step": (330, signal.SIGINT)}
    assert finish(folder, "grpo", faults=faults, more="--save-steps 0 --eval-steps 0") == 130
    assert int(last_checkpoint(folder)[-6:]) == count_logged_steps(folder) > 0
    assert "Ctrl-C: finishing and saving this step" in read_output(folder)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == count_logged_steps(folder) and summary["completions"] == 16 * summary["steps"]


@pytest.mark.slow
def test_a_resumed_run_repeats_the_step_after_ctrl_c_twice_in_an_evaluation(tmp_path, uninterrupted_run):
    """Ctrl-C comes twice in the evaluation of step 3; the last checkpoint is that of step 2."""
    folder = tmp_path / "run"
    faults = {"rl.evaluate::answer": (3, ctrl_c_twice)}  # the first evaluation makes two calls
    assert finish(folder, "grpo", faults=faults) == 130
    assert last_checkpoint(folder) == "step_000002" and not (folder / "eval/step_000003.jsonl").exists()
    assert finish(folder, "grpo", resume=True) == 0
    assert_same(folder, uninterrupted_run("grpo")[0])


@pytest.mark.slow
def test_resumes_with_settings_without_a_json_type(tmp_path):
    (tmp_path / "dated.yaml").write_text("chat_template_kwargs: {date_string: 2026-01-02}\n")
    folder, more = tmp_path / "run", f"--config {tmp_path / 'dated.yaml'} --max-steps 4"
    assert finish(folder, "grpo", more=more, faults={"rl.optimizer:Optimizer:step": (13, signal.SIGTERM)}) == 143
    assert finish(folder, "grpo", resume=True) == 0


@pytest.mark.slow
def test_a_run_killed_before_its_first_file_can_be_started_again(tmp_path, uninterrupted_run):
    folder = tmp_path / "run"
    assert finish(folder, "grpo", faults={"rl.run.folder:RunFolder:write_settings": (1, KILL)}) == -KILL
    assert folder.exists() and not (folder / "config.yaml").exists()
    assert finish(folder, "grpo") == 0
    assert_same(folder, uninterrupted_run("grpo")[0])


@pytest.mark.slow
def test_refuses_to_resume_with_a_changed_starting_adapter(tmp_path, uninterrupted_run):
    from safetensors.torch import load_file, save_file

    adapter = shutil.copytree(uninterrupted_run("grpo")[0] / "checkpoints/step_000008", tmp_path / "adapter")
    folder = tmp_path / "run"
    faults = {"rl.optimizer:Optimizer:step": (9, signal.SIGTERM)}
    assert finish(folder, "grpo", more=f"--adapter {adapter} --beta 0.1", faults=faults) == 143
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({name: 3 * w for name, w in weights.items()}, adapter / "adapter_model.safetensors")
    assert "reference adapter" in resume_error(folder)


RANDOM_REWARD = """
import random
import numpy
from grading import reward

@reward
def chance(completion):
    return random.random() + numpy.random.rand()
"""


@pytest.mark.slow
def test_random_rewards_are_the_same_in_a_resumed_run(tmp_path):
    """The generators of python and numpy are seeded, and checkpoints save their states."""
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


def test_a_probe_saves_nothing_and_starts_no_tracker(tmp_path, monkeypatch, capsys):
    from rl.run import session

    started = []

    class RecordedTrackers(session.Trackers):
        def __init__(self, names, *rest):
            started.append(names)
            super().__init__(names, *rest)

    monkeypatch.setattr(session, "Trackers", RecordedTrackers)
    monkeypatch.chdir(ROOT)
    before = set(Path("runs").glob("*"))
    train.main([*SHORT.split(), "--probe", "--report-to", "wandb"])
    output = capsys.readouterr().out
    assert "Probe of 2 steps" in output and "MB predicted" in output
    assert "8 steps" in output and "4 evaluations" in output
    assert started == [[]] and set(Path("runs").glob("*")) == before


# --- early stopping and the best checkpoint


def test_early_stopping_ends_the_run_and_keeps_the_best(tmp_path, capsys):
    """With a learning rate of 0 no evaluation is a new best, so the run stops after the third one."""
    folder = tmp_path / "run"
    settings = f"{SHORT} --learning-rate 0 --eval-steps 1 --early-stopping 3 --save-steps 0"
    assert (
        finish(folder, "grpo", more=settings, faults={"rl.evaluate::evaluate": (5, KILL)}) == -KILL
    )  # in the final evaluation
    assert finish(folder, "grpo", resume=True) == 0
    assert "Stopped early: no evaluation after step 0 was better (4 evaluations)" in read_output(folder)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 3 and summary["finished"] and summary["eval"]["gain"]["fixed"] == 0
    assert "unmoved" not in summary["alarms"]  # a learning rate of 0 raises no alarm
    assert not (folder / "checkpoints/best").exists()
    assert last_checkpoint(folder) == "step_000003" and "has finished at step 3" in resume_error(folder)


def test_the_checkpoint_with_the_highest_held_out_accuracy_is_best_and_is_kept(tmp_path, monkeypatch):
    """Greedy accuracy decides, then sampled accuracy, then the earlier step."""
    import rl.evaluate
    from rl.evaluate import best_step

    def rates(greedy, sampled):
        return SimpleNamespace(accuracy=greedy, accuracy_sampled=sampled)

    assert best_step({0: rates(0.5, 0.9), 10: rates(0.6, 0.1), 20: rates(0.6, 0.2), 30: rates(0.6, 0.2)}) == 20
    counts = iter([0, 3, 1, 1, 1, 1, 1, 1, 1])
    evaluate = rl.evaluate.evaluate

    def evaluate_with_count(*args):
        answers = evaluate(*args)
        num_right = next(counts)
        for i, record in enumerate(answers.greedy):
            record["verdict"] = "right" if i < num_right else "wrong"
        return answers

    monkeypatch.setattr(rl.evaluate, "evaluate", evaluate_with_count)
    folder = tmp_path / "run"
    train.main([*SHORT.split(), "--eval-steps", "1", "--save-total-limit", "1", "--output-dir", str(folder)])
    checkpoints = sorted(path.name for path in folder.glob("checkpoints/step_*"))
    assert checkpoints == ["step_000001", "step_000008"]
    assert (folder / "checkpoints/best").read_text() == "step_000001\n"
