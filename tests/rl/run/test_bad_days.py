"""Fault injection: a run continues or stops with a clear message; it never trains on wrong values or loses saved data."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from running import SHORT, assert_same, finish, read_output, result
from safetensors.torch import load_file

import train
from rl.config import Config, ConfigError
from rl.model.oom import retry_on_oom
from rl.model.policy import Question
from rl.update import Updater

OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation")


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# --- out of memory


def test_the_batch_setting_is_halved_down_to_the_minimum(capsys):
    config = Config(rollout_batch_size=512)
    sizes = []

    def work():
        sizes.append(config.rollout_batch_size)
        if config.rollout_batch_size > 8:
            raise OUT_OF_MEMORY
        return "done"

    assert retry_on_oom(work, config, "rollout_batch_size", requested=100, minimum=8) == "done"
    assert sizes == [512, 50, 25, 12, 8] and config.rollout_batch_size == 8
    assert "rollout_batch_size 100 -> 50" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="out of memory .*rollout_batch_size.* max_completion_length"):
        retry_on_oom(out_of_memory, config, "rollout_batch_size", requested=100, minimum=8)


@pytest.mark.parametrize(
    "error, is_memory",
    [
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("shape mismatch"), False),
        (KeyError("out of memory"), False),
    ],
)  # fmt: skip
def test_only_memory_errors_are_retried(error, is_memory):
    config = Config()
    calls = []

    def work():
        calls.append(1)
        if len(calls) == 1:
            raise error

    if is_memory:
        retry_on_oom(work, config, "max_tokens_per_micro_batch", 10**6, 10)
    else:
        with pytest.raises(type(error)):
            retry_on_oom(work, config, "max_tokens_per_micro_batch", 10**6, 10)
    assert len(calls) == 1 + is_memory


def test_a_real_memory_error_on_a_cpu_is_recognized():
    config = Config(max_tokens_per_micro_batch=2**46)
    sizes = []

    def work():
        sizes.append(config.max_tokens_per_micro_batch)
        if config.max_tokens_per_micro_batch > 1000:
            torch.empty(config.max_tokens_per_micro_batch)
        return True

    assert retry_on_oom(work, config, "max_tokens_per_micro_batch", 2**46, 1)
    assert 2**46 in sizes and sizes[-1] < 2**46


@pytest.mark.parametrize("algorithm", ["grpo", "ppo", "dpo"])
def test_the_gradient_is_the_same_after_a_retry_on_out_of_memory(policy, config, monkeypatch, algorithm):
    """Memory runs out in the second micro-batch, after the gradient of the first has been accumulated."""
    from conftest import Rewards, with_rewards

    import rl.critic
    import rl.update
    from rl.advantages import Advantages
    from rl.model.sampling import Sampling
    from rl.rollout import rollout

    config.algorithm = algorithm
    config.max_tokens_per_micro_batch = 10**6
    config.beta = 0.1
    generator = torch.Generator().manual_seed(0)
    prompts = [policy.encode_prompt(q) for q in ("1 + 1 = ?", "What is 3 + 4 + 5?", "Compute 9 - 2 + 1.", "2 + 2 = ?")]
    episodes = rollout(policy, prompts, 4, 24, Sampling(), generator, 16)
    critic = rl.critic.Critic(policy, config) if algorithm == "ppo" else None
    updater = Updater(policy, critic, config)
    name = "critic_optimizer" if critic else "optimizer"
    updater.fill_values(episodes)
    Advantages(policy, Rewards, config).compute(with_rewards(episodes, [1.0, 0.0, 0.0, 1.0] * 4))
    gradients = []

    def record_gradient(self):
        gradients.append(torch.cat([p.grad.flatten().clone() for p in self.parameters if p.grad is not None]))
        self.zero_grad()
        return 1.0

    monkeypatch.setattr(rl.optimizer.Optimizer, "step", record_gradient)
    expected = updater.update(episodes)
    for e in episodes:
        e.old_logprobs = e.reference_logprobs = None
    if algorithm == "ppo":
        updater.fill_values(episodes)
    config.max_tokens_per_micro_batch = 200
    score = rl.update.completion_logprobs
    calls = []

    def failing(*args, **kwargs):
        calls.append(torch.is_grad_enabled())
        if sum(calls) == 2 and calls[-1]:
            raise OUT_OF_MEMORY
        return score(*args, **kwargs)

    monkeypatch.setattr(rl.update, "completion_logprobs", failing)
    retried = updater.update(episodes)
    assert config.max_tokens_per_micro_batch < 200 and sum(calls) > 3 and name
    half = len(gradients) // 2
    assert half >= 1
    for before, after in zip(gradients[:half], gradients[half:], strict=True):
        torch.testing.assert_close(after, before, atol=1e-6, rtol=1e-4)
    for metric in ("loss", "entropy", "clip_ratio/region_mean", "policy/approxkl_avg"):
        assert retried[metric] == pytest.approx(expected[metric], abs=1e-6, nan_ok=True)


def test_out_of_memory_in_a_roll_out_loses_no_step(tmp_path, uninterrupted_run):
    """The questions are the same, and the halved settings are kept for the rest of the run."""
    folder = tmp_path / "run"
    assert finish(folder, "grpo", faults={"rl.model.engine:Engine:step": (250, OUT_OF_MEMORY)}) == 0
    assert "rollout_batch_size 9 -> 4" in read_output(folder)
    for file, key in (("checkpoints/step_000008/trainer_state.json", "shrunk"), ("summary.json", "memory")):
        settings = json.loads((folder / file).read_text())
        settings = settings[key]
        assert settings["rollout_batch_size"] == 4 and settings["max_tokens_per_micro_batch"] == 4096
    assert [m["step"] for m in metrics(folder)] == list(range(1, 9))
    rollouts, expected = (
        [json.loads(line) for file in sorted((run / "rollouts").iterdir()) for line in file.read_text().splitlines()]
        for run in (folder, uninterrupted_run("grpo")[0])
    )
    assert [sum(r["step"] == step for r in rollouts) for step in range(1, 9)] == [16] * 8
    assert [r["prompt_id"] for r in rollouts] == [r["prompt_id"] for r in expected]


def test_out_of_memory_in_an_update_changes_no_result_beyond_rounding(tmp_path, uninterrupted_run):
    folder = tmp_path / "run"
    assert finish(folder, "grpo", faults={"rl.update::completion_logprobs": (12, OUT_OF_MEMORY)}) == 0
    assert "out of memory: max_tokens_per_micro_batch" in read_output(folder)
    first = metrics(folder)[0]
    expected = metrics(uninterrupted_run("grpo")[0])[0]
    for name in ("reward", "loss", "grad_norm", "entropy", "kl"):
        assert first[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5)
    assert [m["step"] for m in metrics(folder)] == list(range(1, 9))


def out_of_memory(*_, **__):
    raise OUT_OF_MEMORY


def test_a_batch_that_cannot_fit_is_reported_at_the_start(tmp_path, monkeypatch):
    import rl.model.engine

    monkeypatch.setattr(rl.model.engine.Engine, "allocate_peak", out_of_memory)
    with pytest.raises(ConfigError, match="out of memory .*rollout_batch_size 4"):
        train.main([*SHORT.split(), "--output-dir", str(tmp_path / "run")])


def test_the_memory_check_leaves_the_policy_unchanged(policy, config):
    from conftest import vectors

    from rl.critic import Critic
    from rl.run.checks import check_memory

    config.algorithm = "ppo"
    critic = Critic(policy, config)
    updater = Updater(policy, critic, config)
    before = vectors(policy.model.parameters())
    questions = [Question({}, policy.encode_prompt(q)) for q in ("1 + 1 = ?", "What is 3 + 4 + 5?")]
    torch.manual_seed(5)
    expected = torch.get_rng_state()
    check_memory(updater, questions, questions)
    assert torch.equal(vectors(policy.model.parameters()), before) and torch.equal(torch.get_rng_state(), expected)
    assert all(p.grad is None for p in policy.model.parameters()) and not updater.optimizer.adamw.state
    assert (config.rollout_batch_size, config.max_tokens_per_micro_batch) == (512, 8192)


# --- NaN


def nan_once(logprobs, *_):
    nan = logprobs * float("nan")
    return nan, nan.detach()


def test_an_update_with_a_nan_loss_is_skipped_and_counted(tmp_path):
    """The second mini-batch of step 3 has a NaN loss: its update is skipped, and an alarm reports it."""
    folder = tmp_path / "run"
    assert finish(folder, "grpo", faults={"rl.algorithms::policy_loss": (10, nan_once)}) == 0
    skipped = [m["skipped_updates"] for m in metrics(folder)]
    assert sum(skipped) == 1 and metrics(folder)[skipped.index(1)]["updates"] == 3
    assert "  alarm: 1 of " in read_output(folder) and "were skipped" in read_output(folder)
    weights = load_file(folder / "checkpoints/step_000008/adapter_model.safetensors")
    assert all(w.isfinite().all() for w in weights.values())


# --- killed processes


def kill_children(scorer):
    """Kill every child process: the sandboxes and the graders' workers."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    return scorer.scoring.results()


def test_killed_sandboxes_and_workers_change_no_reward(tmp_path, uninterrupted_run):
    folder = tmp_path / "run"
    assert finish(folder, "grpo", faults={"rl.rollout:StreamingScorer:results": (4, kill_children)}) == 0
    assert_same(folder, uninterrupted_run("grpo")[0])


def test_a_failing_tracker_does_not_change_the_run(tmp_path, uninterrupted_run):
    folder = tmp_path / "run"
    faults = {"rl.run.trackers:TensorBoard:__init__": (1, RuntimeError("broken"))}
    assert finish(folder, "grpo", more="--report-to tensorboard wandb", faults=faults) == 0
    assert "tracker tensorboard: failed with RuntimeError: broken" in read_output(folder)
    actual = result(folder)
    expected = result(uninterrupted_run("grpo")[0])
    assert actual["metrics"] == expected["metrics"] and actual["adapter"] == expected["adapter"]


# --- disks and folders


@pytest.fixture
def small_disk(tmp_path):
    """A mounted disk of a few megabytes, and a function that remounts it with other options."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        os.name != "posix"
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4500k", "tmpfs", disk], capture_output=True).returncode
    ):
        pytest.skip("mounting a disk is not permitted")

    def remount(options):
        command = ["mount", "-o", f"remount,{options}", disk]
        for _ in range(50):  # a killed process may still have a file open
            if subprocess.run(command, capture_output=True).returncode == 0:
                return
            time.sleep(0.2)
        subprocess.run(command, check=True)

    yield disk, remount
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk_stops_the_run_which_resumes_once_there_is_space(small_disk, uninterrupted_run):
    disk, remount = small_disk
    folder = disk / "run"
    assert finish(folder, "grpo") == 1
    output = Path(f"{folder}.txt").read_text()
    assert "cannot be written: the disk is full" in output
    assert "step_000004" in output and f"To resume: python train.py --resume {folder}" in output
    assert "Traceback" not in output
    subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=folder / "checkpoints/step_000002", check=True)
    remount("size=64m")
    assert finish(folder, "grpo", resume=True) == 0
    assert_same(folder, uninterrupted_run("grpo")[0])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_an_unwritable_log_stops_the_run(tmp_path, monkeypatch):
    from rl.run.folder import RunFolder

    write_settings = RunFolder.write_settings

    def fill_disk(run, *args):
        (run.path / "metrics.jsonl").symlink_to("/dev/full")
        write_settings(run, *args)

    monkeypatch.setattr(RunFolder, "write_settings", fill_disk)
    with pytest.raises(train.RunError, match="metrics.jsonl .*No space left on device"):
        train.main([*SHORT.split(), "--output-dir", str(tmp_path / "run")])


def test_a_read_only_folder_stops_the_run_at_the_start(small_disk, tmp_path, uninterrupted_run):
    disk, remount = small_disk
    folder = disk / "run"
    remount("size=64m")
    assert finish(folder, "grpo", faults={"rl.optimizer:Optimizer:step": (9, signal.SIGTERM)}) == 143
    remount("ro")
    with pytest.raises(train.RunError, match="Read-only file system$"):
        train.main(["--resume", str(folder)])
    with pytest.raises(ConfigError, match="output_dir: .*other .*Read-only file system$"):
        train.main([*SHORT.split(), "--output-dir", str(disk / "other")])
    remount("rw")
    assert finish(folder, "grpo", resume=True) == 0
    assert_same(folder, uninterrupted_run("grpo")[0])


def test_a_checkpoint_that_cannot_be_written_leaves_the_others_intact(tmp_path, monkeypatch, policy):
    from rl.run.checkpoint import Checkpoints

    (tmp_path / "checkpoints").mkdir()
    checkpoints = Checkpoints(tmp_path, keep=1)
    first = checkpoints.save(1, policy, "card", {}, {}, best=0)
    for error in (
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("PytorchStreamWriter failed writing file"),
    ):
        with monkeypatch.context() as patch, pytest.raises(train.RunError, match="step_000002"):
            patch.setattr(torch, "save", raising(error))
            checkpoints.save(2, policy, "card", {}, {}, best=2)
        assert [p.name for p in (tmp_path / "checkpoints").iterdir() if p.is_dir()] == [first.name]
        assert checkpoints.marked("last") == first


def raising(error):
    def raises(*_, **__):
        raise error

    return raises


# --- closed terminals


@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX terminal")
def test_a_run_survives_its_terminal(tmp_path, uninterrupted_run):
    import pty

    folder = tmp_path / "run"
    main, terminal = pty.openpty()
    arguments = [*SHORT.split(), *"--num-mini-batches 2 --num-iterations 2 --save-total-limit 2".split()]
    process = subprocess.Popen(
        [sys.executable, "train.py", *arguments, "--output-dir", str(folder)],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    os.close(terminal)
    output = b""
    while b"step 2/8" not in output:
        output += os.read(main, 4096)
    os.close(main)  # closes the terminal
    assert process.wait(120) == 0
    log = (folder / "console.log").read_text()
    assert "step 8/8" in log and "python ui/app.py" in log
    assert [m["step"] for m in metrics(folder)] == list(range(1, 9))


@pytest.mark.slow
def test_a_run_survives_a_closed_pipe(tmp_path):
    folder = tmp_path / "run"
    command = f"{sys.executable} train.py {SHORT} --max-steps 3 --output-dir {folder} | head -n 2"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert len(metrics(folder)) == 3 and "python ui/app.py" in (folder / "console.log").read_text()


def test_out_of_memory_in_the_optimizer_is_reported_in_one_line(policy, episodes, config, monkeypatch):
    updater = Updater(policy, None, config)
    monkeypatch.setattr(updater.optimizer.adamw, "step", out_of_memory)
    with pytest.raises(ConfigError, match="out of memory .*optimizer.*lora_r"):
        updater.update(episodes)
