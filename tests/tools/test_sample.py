"""Calibrated questions and distilled demonstrations, sampled from the tiny model."""

import json
import subprocess
import sys

import pytest
from conftest import lines

import tools.sample
from data import DataError, load
from data.demonstrations import read_demonstrations
from grading import grade_math
from rl.config import Config
from tools.sample import FEW_SHOT, calibrate, distil, partial_file


@pytest.fixture
def config():
    return Config(max_completion_length=48, device="cpu")


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(tools.sample, "BATCH", 8)


def test_calibrate_keeps_questions_that_are_solved_at_times(tmp_path, config, small_batches):
    out = tmp_path / "calibrated.jsonl"
    text = calibrate(["sums", "words"], 10, config, "train", 12, out)
    rows = load(str(out))
    assert rows and all(0.2 <= row["pass_rate"] <= 0.8 and row["level"] == 1 - row["pass_rate"] for row in rows)
    originals = {row["id"]: row for source in ("sums", "words") for row in load(source, 12)}
    for row in rows:
        assert originals[row["id"]].items() <= (row | {"level": originals[row["id"]]["level"]}).items()
    assert f"{len(rows)} questions solved in 20 to 80 %" in text
    counts = [int(line[12:23]) for line in text.splitlines()[2:9]]
    assert sum(counts) == 24  # every question is in one bin
    assert sum(counts[2:6]) >= len(rows) - counts[5] and not partial_file(out).exists()


def test_every_pass_rate_is_in_one_bin():
    for k in range(1, 41):
        for right in range(k + 1):
            lines = tools.sample.histogram([right / k])
            assert sum(int(line[12:23]) for line in lines) == 1, (right, k)


def test_an_interrupted_calibration_continues(tmp_path, config, small_batches, monkeypatch):
    import rl.rollout

    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    calibrate(["sums"], 8, config, "train", 20, whole)
    calls = []
    original = rl.rollout.rollout_and_score

    def stop_in_the_second_batch(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(rl.rollout, "rollout_and_score", stop_in_the_second_batch)
    with pytest.raises(KeyboardInterrupt):
        calibrate(["sums"], 8, config, "train", 20, out)
    assert len(lines(partial_file(out))) == 8 and not out.exists()
    with partial_file(out).open("a") as file:
        file.write('{"key": 1, "id": "sums')  # a line that a crash cut off
    with pytest.raises(DataError, match="was begun with other questions or settings"):
        calibrate(["sums"], 4, config, "train", 20, out)
    calls.clear()
    monkeypatch.setattr(rl.rollout, "rollout_and_score", lambda *a, **k: calls.append(1) or original(*a, **k))
    calibrate(["sums"], 8, config, "train", 20, out)
    assert len(calls) == 2 and out.read_bytes() == whole.read_bytes()


def test_distil_keeps_right_answers_of_the_model(tmp_path, config):
    out = tmp_path / "demos.jsonl"
    text = distil(["sums"], 6, config, "train", 24, out, keep_right=True)
    demonstrations, _ = read_demonstrations(str(out), [])
    answers = {row["prompt"]: row["answer"] for row in load("sums", 24)}
    assert f"{len(demonstrations)} demonstrations for 24 questions" in text
    assert 0 < len(demonstrations) <= 24 and len({row["prompt"] for row in demonstrations}) == len(demonstrations)
    for row in demonstrations:
        assert grade_math(row["completion"].split("</think>")[-1], answers[row["prompt"]], row["prompt"])[0] == 1


def test_distil_without_keep_right_keeps_all_graded_answers(tmp_path, config):
    out = tmp_path / "demos.jsonl"
    distil(["sums"], 4, config, "train", 8, out, keep_right=False)
    verdicts = [line["verdict"] for line in lines(out)]
    assert set(verdicts) == {"right", "wrong"} and len(verdicts) <= 32


def test_distil_shows_examples_unless_there_is_a_system_prompt(tmp_path, config):
    out = tmp_path / "demos.jsonl"
    distil(["sums"], 4, config, "train", 8, out, keep_right=False)
    assert config.system_prompt == FEW_SHOT
    config.system_prompt = "Be brief."
    distil(["sums"], 4, config, "train", 8, out, keep_right=False)
    assert config.system_prompt == "Be brief."


def test_nothing_to_keep(tmp_path, config):
    config.max_completion_length = 1
    with pytest.raises(DataError, match="none of the 2 answers to each question is right"):
        distil(["sums"], 2, config, "train", 4, tmp_path / "demos.jsonl", keep_right=True)
    with pytest.raises(DataError, match="no question is solved at times but not always: use easier questions"):
        calibrate(["sums"], 2, config, "train", 4, tmp_path / "out.jsonl")


def test_the_command(tmp_path):
    out = tmp_path / "calibrated.jsonl"
    command = f"calibrate sums -n 6 --samples 8 --out {out} --config configs/tiny.yaml --max-completion-length 40 --device cpu"
    result = subprocess.run([sys.executable, "-m", "data", *command.split()], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "8 answers of data/tiny to each of 6 questions" in result.stdout and lines(out)
    error = subprocess.run(
        [sys.executable, "-m", "data", "calibrate", "sums", "--learningrate", "1"], capture_output=True, text=True
    )
    assert error.returncode == 1 and "there is no setting learningrate" in error.stderr
    error = subprocess.run(
        [sys.executable, "-m", "data", "show", "sums", "--model", "x"], capture_output=True, text=True
    )
    assert error.returncode == 2 and "unrecognized arguments: --model x" in error.stderr
    assert json.loads(out.read_text().splitlines()[0])["task"] == "sums"


def test_games_can_be_calibrated_but_not_distilled(tmp_path, monkeypatch):
    """The file has the column `environment`, so that its questions are played."""
    out = tmp_path / "mazes.jsonl"
    game = "environments.py:GuessNumber"
    settings = {"reward_funcs": ["wins"], "max_turns": 5, "max_turn_length": 8, "max_completion_length": 150}
    config = Config(device="cpu", **settings)
    monkeypatch.setattr(tools.sample, "LEAST", 0.0)
    text = calibrate([game], 4, config, "train", 6, out)
    assert "4 answers" in text and all(row["environment"] == game for row in load(str(out)))
    with pytest.raises(DataError, match="for episodes use python -m data demos"):
        distil([game], 4, config, "train", 6, out, keep_right=True)
