"""Runs that are killed or stopped go on as if nothing had been; damaged checkpoints are refused."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from running import SHORT, assert_same, finish, printed, start

import train

KILL = signal.SIGKILL


MOMENTS = {
    "in the evaluation before": {"rl.evaluate::evaluate": (1, KILL)},
    "in a roll-out": {"rl.engine:Engine:step": (400, KILL)},
    "while scoring": {"rl.evaluate:Marking:results": (5, KILL)},
    "in an update": {"rl.optimizer:Optimizer:step": (7, KILL)},
    "between the logs": {"rl.run:RunFolder:append": (9, KILL)},
    "in an evaluation": {"rl.evaluate::evaluate": (2, KILL)},
    "while a checkpoint is written": {"torch::save": (2, KILL)},
    "before it is renamed": {"rl.checkpoint::bring_to_disk": (30, KILL)},
    "before it is marked": {"rl.checkpoint:Checkpoints:mark": (2, KILL)},
    "while old ones are removed": {"rl.checkpoint:Checkpoints:prune": (3, KILL)},
    "in the final evaluation": {"rl.evaluate::evaluate": (4, KILL)},
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_a_moment_and_resumed(tmp_path, whole, moment):
    folder = tmp_path / "run"
    assert finish(folder, "grpo", faults=MOMENTS[moment]) == -KILL
    assert finish(folder, "grpo", resume=True) == 0
    assert_same(folder, whole("grpo")[0])


@pytest.mark.parametrize("method", ["ppo", "running"])
def test_other_methods_killed_and_resumed(tmp_path, whole, method):
    """In an update after the third checkpoint, then, resumed, in a roll-out."""
    folder = tmp_path / "run"
    assert finish(folder, method, faults={"rl.update:Updater:update": (7, KILL)}) == -KILL
    assert finish(folder, method, faults={"rl.engine:Engine:step": (60, KILL)}, resume=True) == -KILL
    assert finish(folder, method, resume=True) == 0
    assert_same(folder, whole(method)[0])


def steps_logged(folder):
    metrics = folder / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


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


def last(folder):
    return (folder / "checkpoints/last").read_text().strip()


@pytest.mark.parametrize(
    "function, nth, sign, step",
    [
        ("rl.engine:Engine:step", 200, signal.SIGTERM, None),  # a roll-out is dropped
        ("rl.evaluate:Marking:results", 5, signal.SIGINT, 2),  # of step 3: two evaluations and two steps came before
        ("rl.optimizer:Optimizer:step", 9, signal.SIGINT, 3),  # an update is finished: the first of step 3
        ("torch::save", 2, signal.SIGTERM, 4),  # a checkpoint, too
    ],
)  # fmt: skip
def test_a_stopped_run_goes_on_as_if_nothing_had_been(tmp_path, whole, function, nth, sign, step):
    folder, status = stopped(tmp_path, function, nth, sign)
    assert status == 128 + sign
    said = printed(folder)
    assert f"To go on: python train.py --resume {folder}" in said and "Traceback" not in said
    assert (step is None or last(folder) == f"step_{step:06d}") and last(folder)[-1] in said
    assert ("is finished and saved first" in said) == (function in ("rl.optimizer:Optimizer:step", "torch::save"))
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


def ctrl_c_twice(*_):
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)


def test_a_second_ctrl_c_leaves_the_step(tmp_path, whole):
    """In the update of step 4, of which only some mini-batches have been learned: the checkpoint is that of step 2."""
    folder, status = stopped(tmp_path, "rl.update:Updater:policy_step", 14, ctrl_c_twice)
    assert status == 130 and last(folder) == "step_000003" or last(folder) == "step_000002"
    assert finish(folder, "grpo", resume=True) == 0
    assert_same(folder, whole("grpo")[0])


# --- damaged, changed, in use


@pytest.fixture(scope="session")
def halfway(tmp_path_factory):
    """A run that was stopped after step 5, with the checkpoints of steps 4 and 5."""
    folder = tmp_path_factory.mktemp("halfway") / "run"
    assert finish(folder, "grpo", faults={"rl.optimizer:Optimizer:step": (17, signal.SIGTERM)}) == 143
    assert last(folder) == "step_000005"
    return folder


@pytest.fixture
def copy(halfway, tmp_path):
    return Path(shutil.copytree(halfway, tmp_path / "run"))


def refused(folder, more="", resume=None):
    """What --resume says where it refuses; the folder stays as it was."""

    def contents():
        return {
            str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name not in ("console.log", "lock")
        }

    before = contents()
    with pytest.raises((train.ConfigError, train.RunError, train.RewardError)) as error:
        train.main(["--resume", str(resume or folder), *more.split()])
    assert contents() == before
    assert "\n" not in str(error.value)
    return str(error.value)


def cut(file):
    file.write_bytes(file.read_bytes()[:-100])


def empty(file):
    file.write_bytes(b"")


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("harm", [cut, empty, flip, Path.unlink])
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "trainer_state.pt", "trainer_state.json", "SHA256SUMS"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_offered(copy, harm, name):
    newest, older = (copy / f"checkpoints/step_00000{step}" for step in (5, 4))
    harm(newest / name)
    said = refused(copy)
    assert f"{newest} cannot be used: " in said and f"python train.py --resume {older}" in said
    if name != "SHA256SUMS":
        assert name in said


def test_the_offered_checkpoint_works(copy, whole):
    flip(copy / "checkpoints/step_000005/trainer_state.pt")
    assert finish(copy, "grpo", resume=True) == 1
    offered = printed(copy).rpartition("--resume ")[2].strip()
    train.main(["--resume", offered])
    assert_same(copy, whole("grpo")[0])


def test_a_checkpoint_of_another_model_is_refused(copy, tmp_path, monkeypatch):
    """The base model was made anew under the same name: same shapes, other weights. An older checkpoint does not fit either."""
    from safetensors.torch import load_file, save_file

    shutil.copytree("data/tiny", tmp_path / "tiny")
    weights = load_file(tmp_path / "tiny/model.safetensors")
    weights["model.norm.weight"][3] += 0.5
    import rl.policy

    save_file(weights, tmp_path / "tiny/model.safetensors", metadata={"format": "pt"})
    load = rl.policy.AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        rl.policy.AutoModelForCausalLM, "from_pretrained", lambda model, **k: load(str(tmp_path / "tiny"), **k)
    )
    said = refused(copy)
    assert "step_000005 belongs to another base model than data/tiny is now" in said and "start a new run" in said


def test_a_checkpoint_without_its_optimizer_is_of_an_older_version(copy):
    newest = copy / "checkpoints/step_000005"
    for name in ("SHA256SUMS", "trainer_state.pt"):
        (newest / name).unlink()
    assert f"without the optimizer (to begin a new run with it: --adapter {newest})" in refused(copy)


def test_what_has_changed_is_named_and_has_to_be_confirmed(copy, capsys):
    said = refused(copy, "--learning-rate 1e-3 --eval-steps 4")
    assert "learning_rate 0.002 -> 0.001; eval_steps 3 -> 4" in said and "--accept-changes" in said
    assert "seed 0 -> 1: this cannot change" in refused(copy, "--seed 1 --accept-changes")
    assert "lora_r 16 -> 8: this cannot change" in refused(copy, "--lora-r 8")
    assert "the questions are others" in refused(copy, "--train-questions 31")
    assert "leave --config, --output-dir" in refused(copy, "--output-dir elsewhere")
    train.main(["--resume", str(copy), "--learning-rate", "1e-3", "--max-steps", "6", "--accept-changes"])
    said = capsys.readouterr().out
    assert "note     changed since step_000005: learning_rate 0.002 -> 0.001" in said
    metrics = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == [1, 2, 3, 4, 5, 6]
    assert metrics[5]["learning_rate"] == pytest.approx(1e-3 / 6)  # the last of six steps of the linear schedule
    assert "learning_rate: 0.001" in (copy / "config.yaml").read_text()
    assert "learning_rate: 0.002" in (copy / "config_until_step_000005.yaml").read_text()
    # It has finished now.
    assert "has finished, with step 6" in refused(copy)


def test_a_changed_reward_file_is_named(copy, tmp_path):
    changed = tmp_path / "mine.py"
    changed.write_text(Path("rewards.py").read_text() + "\n# changed\n")
    said = refused(copy, f"--rewards-file {changed}")
    assert f"{changed} is not what the run was scored with (its copy: {copy / 'rewards.py'})" in said
    moved = tmp_path / "moved.py"
    shutil.copy("rewards.py", moved)
    train.main(["--resume", str(copy), "--rewards-file", str(moved)])  # the same text elsewhere is no change


def test_an_older_checkpoint_drops_later_ones_only_where_that_is_confirmed(copy, whole):
    older = copy / "checkpoints/step_000004"
    assert "step_000005 came after step_000004 and would be lost" in refused(copy, resume=older)
    train.main(["--resume", str(older), "--accept-changes"])
    assert_same(copy, whole("grpo")[0])


def test_lines_that_are_gone_are_missed(copy):
    text = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(text[:3]))
    assert "metrics.jsonl has" in refused(copy) and "put the lines back" in refused(copy)


def test_names_that_are_no_run(tmp_path, copy):
    assert "is not the folder of a run" in refused(copy, resume=tmp_path / "nothing")
    assert "there is no checkpoint" in refused(copy, resume=copy / "checkpoints/step_000003")


def test_a_run_that_goes_on_keeps_others_out(tmp_path):
    folder = tmp_path / "run"
    process = start(folder, "grpo", more="--max-steps 400 --eval-steps 0")
    while not (folder / "metrics.jsonl").exists():
        time.sleep(0.05)
    with pytest.raises(train.RunError, match="is in use by a run that goes on; to end that one: touch"):
        train.main(["--resume", str(folder)])
    with pytest.raises(train.ConfigError, match="exists already: choose another, go on with it by --resume"):
        train.main(["--output-dir", str(folder)])
    (folder / "STOP").touch()
    process.join()
    assert process.exitcode == 0


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
    from rl.evaluate import best_of

    def of(greedy, sampled):
        return {"accuracy": greedy, "accuracy_sampled": sampled}

    assert best_of({0: of(0.5, 0.9), 10: of(0.6, 0.1), 20: of(0.6, 0.2), 30: of(0.6, 0.2)}) == 20
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
