"""Runs with failing reward functions, and output about rewards: control run, warnings, best completions."""

import json
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import lines, make_episodes, read_rollouts, with_rewards
from test_train import SMALL, run, write_custom_files

import train
from data import QuestionSampler, load_questions
from grading import Completion, RewardError, Score
from rl.algorithms import group_advantages
from rl.config import Config
from rl.rollout import Episode, set_rewards
from rl.run import report


def coin_flips(n, seed, step):
    """Return the training rewards of a control run."""
    episodes = with_rewards(make_episodes(*[1] * n), [0.0] * n)
    set_rewards(episodes, Config(control="random-reward", seed=seed), step)
    return [episode.reward for episode in episodes]


def write_failing_reward(tmp_path, held_out=False):
    """Write questions and a reward function that fails on one of them: one of step 2, or a held-out one."""
    arguments = [str(argument) for argument in write_custom_files(tmp_path)]
    settings = Config(train_data=[arguments[1]], train_questions=30, eval_questions=12)
    train_rows, eval_rows, _ = load_questions(settings)
    questions = [SimpleNamespace(row=row) for row in train_rows]
    drawn = QuestionSampler(questions, 0, seed=0).take(7, step=1)
    row = eval_rows[-1] if held_out else drawn[6].row
    path = tmp_path / "my_rewards.py"
    fault = f"    return 1 / (completion.row['id'] != {row['id']!r})"
    path.write_text(path.read_text() + f"\n\n@reward(weight=0.1)\ndef rare(completion):\n{fault}\n")
    return arguments, row


def test_reward_error_in_training(tmp_path):
    """The run stops with function, line and row, keeps its results, and prints how to reproduce the failure."""
    arguments, row = write_failing_reward(tmp_path)
    command = [sys.executable, "train.py", *SMALL.split(), *arguments, "--output-dir", str(tmp_path / "run")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1 and f"'rare' (my_rewards.py:15), row {row['id']}: ZeroDivisionError" in result.stderr
    assert result.stderr.count("\n") == 1
    assert len(lines(tmp_path / "run/metrics.jsonl")) == 1  # the finished step is complete
    assert len(read_rollouts(tmp_path / "run")) == 24
    assert "step 1 of 3" in result.stdout and "python train.py" in result.stdout
    (record,) = lines(tmp_path / "run/failed.jsonl")
    assert (record["step"], record["prompt_id"], record["row"]["gold"]) == (2, row["id"], row["gold"])

    rescore = result.stderr.strip().rpartition(": python ")[2].split()
    assert (
        rescore
        == "-m grading self-test MY --rescore RUN/failed.jsonl".replace("MY", arguments[3])
        .replace("RUN", str(tmp_path / "run"))
        .split()
    )
    rescored = subprocess.run([sys.executable, *rescore], capture_output=True, text=True)
    assert rescored.returncode == 1 and "'rare' (my_rewards.py:15)" in rescored.stderr

    path = tmp_path / "my_rewards.py"
    path.write_text(path.read_text().replace("return 1 / (", "return 1 * ("))
    train.main(["--resume", str(tmp_path / "run"), "--accept-changes"])
    assert [m["step"] for m in lines(tmp_path / "run/metrics.jsonl")] == [1, 2, 3]


def test_reward_error_in_an_evaluation(tmp_path):
    arguments, row = write_failing_reward(tmp_path, held_out=True)
    with pytest.raises(RewardError, match=f"row {row['id']}: ZeroDivisionError.* --rescore .*failed.jsonl"):
        run(tmp_path / "run", *arguments)
    assert lines(tmp_path / "run/failed.jsonl")[0]["prompt_id"] == row["id"]


def test_reward_errors_skip_continues(tmp_path, capsys):
    """The completions of the failing row are excluded from training, counted, and reported by an alarm."""
    arguments, row = write_failing_reward(tmp_path)
    folder = run(tmp_path / "run", *arguments, "--reward-errors", "skip")
    metrics, rollouts = lines(folder / "metrics.jsonl"), read_rollouts(folder)
    assert [m["reward_errors"] for m in metrics] == [0, 4, 0] and "reward_errors" in metrics[1]["alarms"]
    assert metrics[1]["outcomes/reward_error"] == pytest.approx(4 / 24)
    left_out = [r for r in rollouts if r["prompt_id"] == row["id"]]
    assert len(left_out) == 4 and {(r["verdict"], r["reward"], r["advantage"]) for r in left_out} == {
        ("ungraded", None, 0)
    }
    assert "  alarm: 4 completions of this step were left out: reward function 'rare' (" in capsys.readouterr().out
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["alarms"]["reward_errors"] == 2 and summary["reward_errors"] == 4
    assert not (folder / "failed.jsonl").exists()


def test_trl_functions_get_groups_in_order_and_their_logs_are_saved(tmp_path):
    """Completions end in any order, but a TRL function gets them in the order of the questions, as in TRL."""
    arguments = [str(argument) for argument in write_custom_files(tmp_path)]
    path = tmp_path / "my_rewards.py"
    trl = """
        @reward(weight=0.1)
        def trl_style(prompts, completions, completion_ids, log_metric, log_extra, **kwargs):
            groups = [prompts[i : i + 4] for i in range(0, len(prompts), 4)]
            log_metric("together", sum(all(p == group[0] for p in group) for group in groups) / len(groups))
            log_extra("ids", [len(ids) for ids in completion_ids])
            return [0.0] * len(completions)
        """
    path.write_text(path.read_text() + textwrap.dedent(trl))
    folder = run(tmp_path / "run", *arguments)
    metrics, rollouts = lines(folder / "metrics.jsonl"), read_rollouts(folder)
    assert [m["metrics/together/mean"] for m in metrics] == [1, 1, 1]
    assert [r["extra"]["ids"] for r in rollouts] == [r["tokens"] for r in rollouts]


# --- output


def test_control_run_learns_from_coin_flips(tmp_path, capsys):
    """The run is reproducible. Advantages come from the flips, accuracy and evaluations from the real rewards."""
    settings = "--control random-reward --max-steps 2 --log-completions-steps 2".split()
    first = run(tmp_path / "first", *settings)
    again = run(tmp_path / "again", *settings)
    out = capsys.readouterr().out
    assert out.count("CONTROL: learning from random rewards") == 2 * (1 + 2 + 1)  # at the start, each step, at the end
    assert out.count("highest rewards of step 2:") == 2
    rollouts = read_rollouts(first)
    assert rollouts == read_rollouts(again)
    weights = "checkpoints/step_000002/adapter_model.safetensors"
    assert (first / weights).read_bytes() == (again / weights).read_bytes()
    for step in (1, 2):
        step_rows = [r for r in rollouts if r["step"] == step]
        flips = coin_flips(24, 0, step)
        assert [r["learned_reward"] for r in step_rows] == flips and set(flips) == {0.0, 1.0}
        advantages = group_advantages(torch.tensor(flips), 4).tolist()
        assert [r["advantage"] for r in step_rows] == pytest.approx(advantages)
        assert [r["reward"] for r in step_rows] != flips  # the reward of the file is logged separately
        assert all(
            r["reward"] == pytest.approx(r["rewards"]["format"] * 0.1 + (r["verdict"] == "right")) for r in step_rows
        )
    assert coin_flips(1000, 0, 1) != coin_flips(1000, 1, 1)
    assert 420 < sum(coin_flips(1000, 0, 1)) < 580
    assert json.loads((first / "summary.json").read_text())["control"] == "random-reward"
    assert yaml.safe_load((first / "config.yaml").read_text())["control"] == "random-reward"


def test_unprotected_code_is_warned_of_in_every_line(tmp_path, capsys, monkeypatch):
    calls = {}
    monkeypatch.setattr(train.sandbox, "start", lambda *settings: calls.update(settings=settings))
    monkeypatch.setattr(train.sandbox, "available", lambda: ("monty", "unprotected"))
    settings = "--train-data sums --max-steps 1 --code-timeout 2.5 --unsafe-run-model-code"
    run(tmp_path / "run", *settings.split())
    assert calls["settings"] == (2.5, True)
    warned = [line for line in capsys.readouterr().out.split("\n") if "UNSAFE: model-written code" in line]
    assert len(warned) == 3 and "step 1/1" in warned[1]


def test_highest_rewards_are_printed_shortened_and_sanitised():
    """The texts differ, even if rewards are tied. Control characters of the model do not reach the terminal."""
    texts = ["a", "a", "\x1b[2Jb\nc", "z" * 5000, "ungraded"]
    totals = [1.0, 1.0, 1.1, 0.5, float("nan")]
    completions = [Completion("What?", text, {}, tokens=len(text)) for text in texts]
    scores = [Score(total, {"correct": 1.0, "other": None}, {}, {}, "right") for total in totals]
    episodes = [Episode([], [], [], False, completion=c, score=s) for c, s in zip(completions, scores)]
    printed = report.highest_rewards(7, episodes)
    assert printed.split("\n") == [
        "  highest rewards of step 7:",
        "    1.10 (correct 1), right, 7 tokens",
        "      question: What?",
        "      answer:   [2Jb",
        "                c",
        "    1.00 (correct 1), right, 1 tokens",
        "      question: What?",
        "      answer:   a",
    ]
    assert len(report.highest_rewards(7, episodes[3:])) < 700
