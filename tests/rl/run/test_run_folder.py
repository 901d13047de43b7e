"""What a run folder refuses, and what it lets through: damaged checkpoints, changes, another run, kills while one resumes."""

import json
import shutil
import signal
import threading
import time
from pathlib import Path

import filelock
import pytest
from running import assert_same, finish, into, last, printed, processes, refused, start, steps_logged

import train
from rl.config import Config, ConfigError
from rl.run.files import sha256
from rl.run.folder import RunFolder, choose_folder

KILL = signal.SIGKILL


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
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "accura')  # the machine was switched off
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
    import rl.model.policy

    save_file(weights, tmp_path / "tiny/model.safetensors", metadata={"format": "pt"})
    load = rl.model.policy.AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        rl.model.policy.AutoModelForCausalLM, "from_pretrained", lambda model, **k: load(str(tmp_path / "tiny"), **k)
    )
    said = refused(copy)
    assert (
        "step_000005 belongs to another base model, or reference adapter, than data/tiny is now" in said
        and "start a new run" in said
    )


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
    assert "the training questions are others" in refused(copy, "--train-questions 31")
    assert "the held-out questions are others: this cannot change" in refused(copy, "--eval-questions 12")
    assert "it ran on cpu in float32, and would now on cpu in float16: this cannot" in refused(copy, "--dtype float16")
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
    assert "metrics.jsonl has" in refused(copy) and "put back what it was" in refused(copy)


def test_names_that_are_no_run(tmp_path, copy):
    assert "is not the folder of a run" in refused(copy, resume=tmp_path / "nothing")
    assert "there is no checkpoint" in refused(copy, resume=copy / "checkpoints/step_000003")


def test_a_run_that_goes_on_keeps_others_out(tmp_path):
    folder = tmp_path / "run"
    process = start(folder, "grpo", more="--max-steps 400 --eval-steps 0")
    while not (folder / "metrics.jsonl").exists():
        time.sleep(0.05)
    with pytest.raises(train.RunError, match="is in use by a run that is still running; to end it: touch"):
        train.main(["--resume", str(folder)])
    with pytest.raises(train.ConfigError, match="exists already: choose another, resume it with --resume"):
        train.main(["--output-dir", str(folder)])
    (folder / "STOP").touch()
    process.join()
    assert process.exitcode == 0


def test_a_stop_that_is_asked_for_while_the_model_loads_is_kept(tmp_path):
    (tmp_path / "STOP").touch()  # of before
    folder = RunFolder(tmp_path, Config(output_dir=str(tmp_path)))
    folder.open()
    assert not (tmp_path / "STOP").exists()
    (tmp_path / "STOP").touch()
    folder.write_settings({}, Path("rewards.py"), 0)
    assert (tmp_path / "STOP").exists()
    folder.close()


def test_a_look_at_the_lock_does_not_keep_a_run_out(tmp_path):
    """The page tries it for a moment to see whether the run goes on."""
    looking = filelock.FileLock(tmp_path / "lock", thread_local=False)
    looking.acquire()
    threading.Timer(0.3, looking.release).start()
    folder = RunFolder(tmp_path, Config(output_dir=str(tmp_path)))
    folder.open()
    folder.close()


def test_a_finished_run_without_checkpoints_keeps_its_logs(copy):
    shutil.rmtree(copy / "checkpoints")
    (copy / "checkpoints").mkdir()
    assert "has 5 steps in its logs, but no checkpoint" in refused(copy)
    (copy / "summary.json").write_text('{"finished": true}')
    assert "has finished, with step 5" in refused(copy)


def test_marks_that_were_not_made_are_made_up(copy):
    """The run was killed between the renaming of a checkpoint and its marks. The best evaluation is that of step 3, whose
    checkpoint is put back."""
    evaluation = copy / "eval/step_000003.jsonl"
    evaluation.write_text(evaluation.read_text().replace('"verdict": "wrong"', '"verdict": "right"'))
    shutil.copytree(copy / "checkpoints/step_000004", copy / "checkpoints/step_000003")
    (copy / "checkpoints/last").write_text("step_000004\n")
    assert finish(copy, "grpo", resume=True, faults={"rl.model.engine:Engine:allocate_peak": (2, KILL)}) == -KILL
    assert finish(copy, "grpo", resume=True, faults={"rl.update:Updater:update": (1, KILL)}) == -KILL
    assert last(copy) == "step_000005" and (copy / "checkpoints/best").read_text() == "step_000003\n"


@pytest.mark.parametrize("nth", [*(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 3, 5, 6)), 4])
def test_killed_while_an_accepted_change_is_written(copy, nth):
    more = "--max-steps 6 --accept-changes"
    status = finish(copy, "grpo", resume=True, more=more, faults={"rl.run.folder::write_atomic": (nth, KILL)})
    assert status == -KILL
    assert finish(copy, "grpo", resume=True, more=more) == 0
    assert "max_steps: 8" in (copy / "config_until_step_000005.yaml").read_text()
    assert "max_steps: 6" in (copy / "config.yaml").read_text() and steps_logged(copy) == 6


def test_what_a_run_was_made_with_is_kept_once(copy):
    for rate in ("1e-3", "5e-4"):
        faults = {"rl.checks::check_memory": (1, KILL)}
        finish(copy, "grpo", resume=True, more=f"--learning-rate {rate} --accept-changes", faults=faults)
    assert "learning_rate: 0.002" in (copy / "config_until_step_000005.yaml").read_text()
    assert "learning_rate: 0.0005" in (copy / "config.yaml").read_text()


@pytest.mark.slow
def test_killed_between_dropping_checkpoints_and_cutting_logs(copy, whole):
    older = str(copy / "checkpoints/step_000004")
    process = processes.Process(
        target=into, args=(f"{copy}.txt", ["--resume", older, "--accept-changes"], {"os::truncate": (1, KILL)})
    )
    process.start()
    process.join()
    assert process.exitcode == -KILL
    assert finish(copy, "grpo", resume=True) == 0
    assert_same(copy, whole("grpo")[0])


def test_evaluations_that_have_changed_are_missed(copy):
    before = copy / "eval/before.jsonl"
    text = before.read_text()
    before.write_text("".join(text.splitlines(keepends=True)[:4]))
    assert "eval/before.jsonl has" in refused(copy)
    before.unlink()
    assert "eval/before.jsonl has 0 of 9 questions" in refused(copy)


def test_what_was_halved_stays_so_and_is_halved_before_the_rehearsal(copy, monkeypatch):
    import rl.checks

    class Seen(Exception):
        pass

    def look(updater, questions, held_out):
        raise Seen(updater.config.rollout_batch_size, updater.config.max_tokens_per_micro_batch)

    state = copy / "checkpoints/step_000005/trainer_state.json"
    state.write_text(
        state.read_text().replace(
            '"rollout_batch_size": 512,\n    "max_tokens_per_micro_batch": 4096\n',
            '"rollout_batch_size": 4,\n    "max_tokens_per_micro_batch": 4096\n',
        )
    )
    sums = state.with_name("SHA256SUMS")
    sums.write_text("".join(f"{sha256(file)}  {file.name}\n" for file in state.parent.iterdir() if file != sums))
    monkeypatch.setattr(rl.checks, "check_memory", look)
    with pytest.raises(Seen, match=r"\(4, 4096\)"):
        train.main(["--resume", str(copy)])
    with pytest.raises(Seen, match=r"\(64, 4096\)"):
        train.main(["--resume", str(copy), "--rollout-batch-size", "64", "--accept-changes"])


def test_a_file_that_cannot_be_read_is_one_line(copy):
    broken = copy / "checkpoints/step_000005/trainer_state.pt"
    broken.unlink()
    broken.mkdir()
    assert "step_000005 cannot be used: " in refused(copy) and "cannot be read: Is a directory" in refused(copy)


def test_two_runs_begun_in_one_second_have_two_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda _: "20260101-000000")  # a clock that stands still, or was set back
    chosen = [RunFolder(choose_folder(Config(), "tiny"), Config()) for _ in range(3)]  # before any of them has begun
    for folder in chosen:
        folder.open()
    names = [folder.path.name for folder in chosen]
    for folder in reversed(chosen):
        folder.close()
    assert names == ["tiny-20260101-000000", "tiny-20260101-000000-2", "tiny-20260101-000000-3"]


def test_a_folder_in_which_no_run_has_begun_can_be_used(tmp_path):
    for name in ("lock", "console.log", "config.yaml.unfinished"):
        (tmp_path / name).touch()
    for name in ("eval", "checkpoints"):
        (tmp_path / name).mkdir()
    assert choose_folder(Config(output_dir=str(tmp_path)), "tiny") == tmp_path
    shutil.copy("rewards.py", tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match="exists already"):
        choose_folder(Config(output_dir=str(tmp_path)), "tiny")
