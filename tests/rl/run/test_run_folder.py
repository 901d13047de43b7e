"""Run folders: damaged checkpoints, changed settings and files, locks, and kills during a resume."""

import json
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import filelock
import pytest
from running import (
    assert_same,
    count_logged_steps,
    finish,
    last_checkpoint,
    processes,
    read_output,
    resume_error,
    start,
    work_with_output,
)

import train
from grading import load_rewards
from rl.config import Config, ConfigError
from rl.run.checkpoint import Checkpoint, run_provenance
from rl.run.files import sha256
from rl.run.folder import RunFolder, choose_folder

KILL = signal.SIGKILL


@pytest.fixture(scope="session")
def halfway(tmp_path_factory):
    """A run that was stopped after step 5, with checkpoints of steps 4 and 5."""
    folder = tmp_path_factory.mktemp("halfway") / "run"
    assert finish(folder, "grpo", faults={"rl.optimizer:Optimizer:step": (17, signal.SIGTERM)}) == 143
    assert last_checkpoint(folder) == "step_000005"
    return folder


@pytest.fixture
def copy(halfway, tmp_path):
    return Path(shutil.copytree(halfway, tmp_path / "run"))


def truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


def empty(file):
    file.write_bytes(b"")


def flip_bit(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, empty, flip_bit, Path.unlink])
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "trainer_state.pt", "trainer_state.json", "SHA256SUMS"])
def test_refuses_a_damaged_checkpoint_and_suggests_the_previous_one(copy, damage, name):
    newest, older = (copy / f"checkpoints/step_00000{step}" for step in (5, 4))
    damage(newest / name)
    message = resume_error(copy)
    assert f"{newest} cannot be used: " in message and f"python train.py --resume {older}" in message
    if name != "SHA256SUMS":
        assert name in message


def test_resumes_from_the_suggested_checkpoint(copy, uninterrupted_run):
    flip_bit(copy / "checkpoints/step_000005/trainer_state.pt")
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "accura')  # a line cut off by a crash
    assert finish(copy, "grpo", resume=True) == 1
    suggested = read_output(copy).rpartition("--resume ")[2].strip()
    train.main(["--resume", suggested])
    assert_same(copy, uninterrupted_run("grpo")[0])


def test_refuses_a_checkpoint_of_a_different_base_model(copy, tmp_path, monkeypatch):
    """The base model was replaced under the same name, with the same shapes and different weights."""
    from safetensors.torch import load_file, save_file

    shutil.copytree("data/tiny", tmp_path / "tiny")
    weights = load_file(tmp_path / "tiny/model.safetensors")
    weights["model.norm.weight"][3] += 0.5
    from transformers import AutoModelForCausalLM

    save_file(weights, tmp_path / "tiny/model.safetensors", metadata={"format": "pt"})
    load = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda model, **k: load(str(tmp_path / "tiny"), **k))
    message = resume_error(copy)
    assert "data/tiny" in message and "step_000005" in message and "start a new run" in message


def test_refuses_a_checkpoint_without_optimizer_state(copy):
    """An older version wrote such checkpoints."""
    newest = copy / "checkpoints/step_000005"
    for name in ("SHA256SUMS", "trainer_state.pt"):
        (newest / name).unlink()
    message = resume_error(copy)
    assert "without the optimizer" in message and f"--adapter {newest}" in message


def test_refuses_changes_that_are_not_accepted_and_names_them(copy, capsys):
    message = resume_error(copy, "--learning-rate 1e-3 --eval-steps 4")
    assert "learning_rate 0.002 -> 0.001; eval_steps 3 -> 4" in message and "--accept-changes" in message
    assert "seed 0 -> 1: this cannot change" in resume_error(copy, "--seed 1 --accept-changes")
    assert "lora_r 16 -> 8: this cannot change" in resume_error(copy, "--lora-r 8")
    assert "the training questions have changed" in resume_error(copy, "--train-questions 31")
    assert "the held-out questions have changed: this cannot change" in resume_error(copy, "--eval-questions 12")
    assert "cpu in float32 -> cpu in float16: this cannot change" in resume_error(copy, "--dtype float16")
    assert "--output-dir" in resume_error(copy, "--output-dir elsewhere")
    train.main(["--resume", str(copy), "--learning-rate", "1e-3", "--max-steps", "6", "--accept-changes"])
    output = capsys.readouterr().out
    assert "note     changed since step_000005: learning_rate 0.002 -> 0.001" in output
    metrics = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == [1, 2, 3, 4, 5, 6]
    assert metrics[5]["learning_rate"] == pytest.approx(1e-3 / 6)  # the last of six steps of the linear schedule
    assert "learning_rate: 0.001" in (copy / "config.yaml").read_text()
    assert "learning_rate: 0.002" in (copy / "config_until_step_000005.yaml").read_text()
    # The run has finished now.
    assert "has finished at step 6" in resume_error(copy)


def test_refuses_a_changed_reward_file_and_accepts_a_moved_one(copy, tmp_path):
    changed = tmp_path / "mine.py"
    changed.write_text(Path("rewards.py").read_text() + "\n# changed\n")
    message = resume_error(copy, f"--rewards-file {changed}")
    assert f"{changed} differs" in message and f"{copy / 'rewards.py'}" in message
    moved = tmp_path / "moved.py"
    shutil.copy("rewards.py", moved)
    train.main(["--resume", str(copy), "--rewards-file", str(moved)])  # a copy with the same content is no change


def test_refuses_to_delete_newer_checkpoints_without_accept_changes(copy, uninterrupted_run):
    older = copy / "checkpoints/step_000004"
    message = resume_error(copy, resume=older)
    assert "newer than step_000004 would be deleted" in message and "step_000005" in message
    train.main(["--resume", str(older), "--accept-changes"])
    assert_same(copy, uninterrupted_run("grpo")[0])


def test_refuses_to_resume_with_missing_lines_of_metrics(copy):
    text = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(text[:3]))
    assert "metrics.jsonl has" in resume_error(copy) and "resume from an older checkpoint" in resume_error(copy)


def test_refuses_paths_that_are_no_run_or_checkpoint(tmp_path, copy):
    assert "is not the folder of a run" in resume_error(copy, resume=tmp_path / "nothing")
    assert "there is no checkpoint" in resume_error(copy, resume=copy / "checkpoints/step_000003")


def test_an_active_run_locks_its_folder(tmp_path):
    folder = tmp_path / "run"
    process = start(folder, "grpo", more="--max-steps 400 --eval-steps 0")
    while not (folder / "metrics.jsonl").exists():
        time.sleep(0.05)
    with pytest.raises(train.RunError, match="is in use .* touch .*STOP"):
        train.main(["--resume", str(folder)])
    with pytest.raises(train.ConfigError, match="exists already: .* --resume"):
        train.main(["--output-dir", str(folder)])
    (folder / "STOP").touch()
    process.join()
    assert process.exitcode == 0


def test_a_stop_file_created_while_the_model_loads_is_kept(tmp_path):
    (tmp_path / "STOP").touch()  # of an earlier run
    folder = RunFolder(tmp_path, Config(output_dir=str(tmp_path)))
    folder.open()
    assert not (tmp_path / "STOP").exists()
    (tmp_path / "STOP").touch()
    folder.write_settings({}, Path("rewards.py"), 0)
    assert (tmp_path / "STOP").exists()
    folder.close()


def test_modules_that_the_reward_file_imports_are_copied_and_checked(tmp_path):
    user = tmp_path / "user"
    (user / "checks").mkdir(parents=True)
    (user / "checks" / "__init__.py").write_text("def pay(c): return 0.5\n")
    (user / "unused.py").write_text("")
    (user / "mine.py").write_text(
        "from grading import reward\nfrom checks import pay\n@reward\ndef f(c): return pay(c)\n"
    )
    rewards = load_rewards(str(user / "mine.py"))
    folder = RunFolder(tmp_path / "run", Config(output_dir=str(tmp_path / "run")))
    folder.open()
    folder.write_settings({}, rewards.path, 0)
    provenance = run_provenance({"rewards_file": "mine.py"}, rewards.path, [], [], "cpu") | {"model": ""}
    checkpoint = Checkpoint(tmp_path / "step_000001", 1, {"made": provenance}, {})
    assert folder.checkpoints.check_provenance(checkpoint, provenance, False) == []
    (user / "checks" / "__init__.py").write_text("def pay(c): return 1.0\n")
    changed = run_provenance({"rewards_file": "mine.py"}, rewards.path, [], [], "cpu") | {"model": ""}
    with pytest.raises(train.ConfigError, match="checks/__init__.py, which the reward file imports, differs from"):
        folder.checkpoints.check_provenance(checkpoint, changed, False)
    folder.close()
    assert sorted(path.name for path in folder.path.rglob("*.py")) == ["__init__.py", "rewards.py"]
    assert load_rewards(str(folder.path / "rewards.py")).functions[0].function(None) == 0.5  # the copy of the run


def test_an_imported_module_with_the_name_of_the_copy_is_refused(tmp_path):
    (tmp_path / "rewards.py").write_text("def pay(c): return 0.5\n")
    (tmp_path / "mine.py").write_text(
        "from rewards import pay\nfrom grading import reward\n@reward\ndef f(c): return pay(c)\n"
    )
    loaded = sys.modules.pop("rewards", None)  # in a new process, no other module has this name
    try:
        rewards = load_rewards(str(tmp_path / "mine.py"))
        folder = RunFolder(tmp_path / "run", Config(output_dir=str(tmp_path / "run")))
        folder.open()
        with pytest.raises(train.ConfigError, match="mine.py imports .*rewards.py, but .*: rename rewards.py"):
            folder.write_settings({}, rewards.path, 0)
        folder.close()
    finally:
        sys.modules.pop("rewards", None)
        if loaded:
            sys.modules["rewards"] = loaded


def test_a_run_waits_for_a_lock_that_is_held_briefly(tmp_path):
    """The page acquires the lock for a moment to see whether a run is active."""
    page_lock = filelock.FileLock(tmp_path / "lock", thread_local=False)
    page_lock.acquire()
    threading.Timer(0.3, page_lock.release).start()
    folder = RunFolder(tmp_path, Config(output_dir=str(tmp_path)))
    folder.open()
    folder.close()


def test_refuses_to_delete_the_logs_of_a_run_without_checkpoints(copy):
    shutil.rmtree(copy / "checkpoints")
    (copy / "checkpoints").mkdir()
    assert "logs of 5 steps but no checkpoint" in resume_error(copy)
    (copy / "summary.json").write_text('{"finished": true}')
    assert "has finished at step 5" in resume_error(copy)


def test_a_resumed_run_restores_checkpoints_last_and_best(copy):
    """The run was killed after it renamed a checkpoint and before it updated the files. Step 3 has the best evaluation."""
    evaluation = copy / "eval/step_000003.jsonl"
    evaluation.write_text(evaluation.read_text().replace('"verdict": "wrong"', '"verdict": "right"'))
    shutil.copytree(copy / "checkpoints/step_000004", copy / "checkpoints/step_000003")
    (copy / "checkpoints/last").write_text("step_000004\n")
    assert finish(copy, "grpo", resume=True, faults={"rl.model.engine:Engine:allocate_peak": (2, KILL)}) == -KILL
    assert finish(copy, "grpo", resume=True, faults={"rl.update:Updater:update": (1, KILL)}) == -KILL
    assert last_checkpoint(copy) == "step_000005" and (copy / "checkpoints/best").read_text() == "step_000003\n"


@pytest.mark.parametrize("nth", [*(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 3, 5, 6)), 4])
def test_resumes_after_a_kill_while_an_accepted_change_is_written(copy, nth):
    more = "--max-steps 6 --accept-changes"
    status = finish(copy, "grpo", resume=True, more=more, faults={"rl.run.folder::write_atomic": (nth, KILL)})
    assert status == -KILL
    assert finish(copy, "grpo", resume=True, more=more) == 0
    assert "max_steps: 8" in (copy / "config_until_step_000005.yaml").read_text()
    assert "max_steps: 6" in (copy / "config.yaml").read_text() and count_logged_steps(copy) == 6


def test_the_original_settings_are_backed_up_once(copy):
    for rate in ("1e-3", "5e-4"):
        faults = {"rl.run.checks::check_memory": (1, KILL)}
        finish(copy, "grpo", resume=True, more=f"--learning-rate {rate} --accept-changes", faults=faults)
    assert "learning_rate: 0.002" in (copy / "config_until_step_000005.yaml").read_text()
    assert "learning_rate: 0.0005" in (copy / "config.yaml").read_text()


@pytest.mark.slow
def test_resumes_after_a_kill_between_deleting_checkpoints_and_truncating_logs(copy, uninterrupted_run):
    older = str(copy / "checkpoints/step_000004")
    process = processes.Process(
        target=work_with_output,
        args=(f"{copy}.txt", ["--resume", older, "--accept-changes"], {"os::truncate": (1, KILL)}),
    )
    process.start()
    process.join()
    assert process.exitcode == -KILL
    assert finish(copy, "grpo", resume=True) == 0
    assert_same(copy, uninterrupted_run("grpo")[0])


def test_refuses_to_resume_with_missing_answers_of_an_evaluation(copy):
    before = copy / "eval/before.jsonl"
    text = before.read_text()
    before.write_text("".join(text.splitlines(keepends=True)[:4]))
    assert "eval/before.jsonl has" in resume_error(copy)
    before.unlink()
    assert "eval/before.jsonl has 0 of 9 questions" in resume_error(copy)


def test_halved_settings_are_restored_before_the_memory_check(copy, monkeypatch):
    import rl.run.checks

    class Settings(Exception):
        pass

    def report_settings(updater, questions, held_out):
        raise Settings(updater.config.rollout_batch_size, updater.config.max_tokens_per_micro_batch)

    state = copy / "checkpoints/step_000005/trainer_state.json"
    state.write_text(
        state.read_text().replace(
            '"rollout_batch_size": 512,\n    "max_tokens_per_micro_batch": 4096\n',
            '"rollout_batch_size": 4,\n    "max_tokens_per_micro_batch": 4096\n',
        )
    )
    sums = state.with_name("SHA256SUMS")
    sums.write_text("".join(f"{sha256(file)}  {file.name}\n" for file in state.parent.iterdir() if file != sums))
    monkeypatch.setattr(rl.run.checks, "check_memory", report_settings)
    with pytest.raises(Settings, match=r"\(4, 4096\)"):
        train.main(["--resume", str(copy)])
    with pytest.raises(Settings, match=r"\(64, 4096\)"):
        train.main(["--resume", str(copy), "--rollout-batch-size", "64", "--accept-changes"])


def test_an_unreadable_file_is_reported_in_one_line(copy):
    broken = copy / "checkpoints/step_000005/trainer_state.pt"
    broken.unlink()
    broken.mkdir()
    assert "step_000005 cannot be used: " in resume_error(copy) and "cannot be read: Is a directory" in resume_error(
        copy
    )


def test_runs_started_in_the_same_second_get_different_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda _: "20260101-000000")  # always the same second
    folders = [RunFolder(choose_folder(Config(), "tiny"), Config()) for _ in range(3)]  # chosen before any is created
    for folder in folders:
        folder.open()
    names = [folder.path.name for folder in folders]
    for folder in reversed(folders):
        folder.close()
    assert names == ["tiny-20260101-000000", "tiny-20260101-000000-2", "tiny-20260101-000000-3"]


def test_accepts_a_folder_in_which_no_run_has_started(tmp_path):
    for name in ("lock", "console.log", "config.yaml.unfinished"):
        (tmp_path / name).touch()
    for name in ("eval", "checkpoints"):
        (tmp_path / name).mkdir()
    assert choose_folder(Config(output_dir=str(tmp_path)), "tiny") == tmp_path
    shutil.copy("rewards.py", tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match="exists already"):
        choose_folder(Config(output_dir=str(tmp_path)), "tiny")
