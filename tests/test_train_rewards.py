"""What a run does where a reward function fails, and what it says of its rewards: control, warnings, best completions."""

import json
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import episodes_of, lines, marked, rollouts_of
from test_train import SMALL, own_files, run

import train
from data import QuestionSampler, load_questions
from grading import Completion, RewardError, Score
from rl.algorithms import group_advantages
from rl.config import Config
from rl.rollout import Episode, set_rewards
from rl.run import report


def coin_flips(n, seed, step):
    """The rewards that a control learns from."""
    episodes = marked(episodes_of(*[1] * n), [0.0] * n)
    set_rewards(episodes, Config(control="random-reward", seed=seed), step)
    return [episode.reward for episode in episodes]


def raising_on_one_row(tmp_path, held_out=False):
    """The files of a person whose reward fails on one question: one asked in step 2, or one that is held out."""
    arguments = [str(argument) for argument in own_files(tmp_path)]
    settings = Config(train_data=[arguments[1]], train_questions=30, eval_questions=12)
    train_rows, eval_rows, _ = load_questions(settings)
    questions = [SimpleNamespace(row=row) for row in train_rows]
    drawn = QuestionSampler(questions, 0, seed=0).take(7, step=1)
    row = eval_rows[-1] if held_out else drawn[6].row
    path = tmp_path / "my_rewards.py"
    fault = f"    return 1 / (completion.row['id'] != {row['id']!r})"
    path.write_text(path.read_text() + f"\n\n@reward(weight=0.1)\ndef rare(completion):\n{fault}\n")
    return arguments, row


def test_a_reward_that_raises_in_training(tmp_path):
    """The run stops with function, line and row, keeps what it has, and says how to see the failure again."""
    arguments, row = raising_on_one_row(tmp_path)
    command = [sys.executable, "train.py", *SMALL.split(), *arguments, "--output-dir", str(tmp_path / "run")]
    failed = subprocess.run(command, capture_output=True, text=True)
    assert failed.returncode == 1 and f"'rare' (my_rewards.py:15), row {row['id']}: ZeroDivisionError" in failed.stderr
    assert failed.stderr.count("\n") == 1
    assert len(lines(tmp_path / "run/metrics.jsonl")) == 1  # what was done is kept, whole
    assert len(rollouts_of(tmp_path / "run")) == 24
    assert "Stopped after step 1 of 3" in failed.stdout and "To resume: python train.py" in failed.stdout
    (kept,) = lines(tmp_path / "run/failed.jsonl")
    assert (kept["step"], kept["prompt_id"], kept["row"]["gold"]) == (2, row["id"], row["gold"])

    again = failed.stderr.strip().rpartition(" python ")[2].split()
    assert (
        again
        == "-m grading self-test MY --rescore RUN/failed.jsonl".replace("MY", arguments[3])
        .replace("RUN", str(tmp_path / "run"))
        .split()
    )
    seen = subprocess.run([sys.executable, *again], capture_output=True, text=True)
    assert seen.returncode == 1 and "'rare' (my_rewards.py:15)" in seen.stderr

    mended = tmp_path / "my_rewards.py"
    mended.write_text(mended.read_text().replace("return 1 / (", "return 1 * ("))
    train.main(["--resume", str(tmp_path / "run"), "--accept-changes"])
    assert [m["step"] for m in lines(tmp_path / "run/metrics.jsonl")] == [1, 2, 3]


def test_a_reward_that_raises_in_an_evaluation(tmp_path):
    arguments, row = raising_on_one_row(tmp_path, held_out=True)
    with pytest.raises(RewardError, match=f"row {row['id']}: ZeroDivisionError.* --rescore .*failed.jsonl"):
        run(tmp_path / "run", *arguments)
    assert lines(tmp_path / "run/failed.jsonl")[0]["prompt_id"] == row["id"]


def test_reward_errors_skip_goes_on(tmp_path, capsys):
    """The completions of that row take no part in learning, are counted, and an alarm says so."""
    arguments, row = raising_on_one_row(tmp_path)
    folder = run(tmp_path / "run", *arguments, "--reward-errors", "skip")
    metrics, rollouts = lines(folder / "metrics.jsonl"), rollouts_of(folder)
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


def test_trl_functions_see_groups_together_and_their_logs_are_kept(tmp_path):
    """Completions end in any order; a TRL function gets them in the order of the questions, as in TRL."""
    arguments = [str(argument) for argument in own_files(tmp_path)]
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
    metrics, rollouts = lines(folder / "metrics.jsonl"), rollouts_of(folder)
    assert [m["metrics/together/mean"] for m in metrics] == [1, 1, 1]
    assert [r["extra"]["ids"] for r in rollouts] == [r["tokens"] for r in rollouts]


# --- what a run says of itself


def test_the_control_learns_from_coin_flips_alone(tmp_path, capsys):
    """Reproducible; advantages come from the flips; accuracy and evaluations stay real."""
    settings = "--control random-reward --max-steps 2 --log-completions-steps 2".split()
    first, again = run(tmp_path / "first", *settings), run(tmp_path / "again", *settings)
    out = capsys.readouterr().out
    assert out.count("CONTROL: learning from random rewards") == 2 * (1 + 2 + 1)  # at the start, each step, at the end
    assert out.count("highest rewards of step 2:") == 2
    rollouts = rollouts_of(first)
    assert rollouts == rollouts_of(again)
    weights = "checkpoints/step_000002/adapter_model.safetensors"
    assert (first / weights).read_bytes() == (again / weights).read_bytes()
    for step in (1, 2):
        of_step = [r for r in rollouts if r["step"] == step]
        flips = coin_flips(24, 0, step)
        assert [r["learned_reward"] for r in of_step] == flips and set(flips) == {0.0, 1.0}
        advantages = group_advantages(torch.tensor(flips), 4).tolist()
        assert [r["advantage"] for r in of_step] == pytest.approx(advantages)
        assert [r["reward"] for r in of_step] != flips  # the file's own reward is kept beside
        assert all(
            r["reward"] == pytest.approx(r["rewards"]["format"] * 0.1 + (r["verdict"] == "right")) for r in of_step
        )
    assert coin_flips(1000, 0, 1) != coin_flips(1000, 1, 1)
    assert 420 < sum(coin_flips(1000, 0, 1)) < 580
    assert json.loads((first / "summary.json").read_text())["control"] == "random-reward"
    assert yaml.safe_load((first / "config.yaml").read_text())["control"] == "random-reward"


def test_unprotected_code_stands_in_every_line(tmp_path, capsys, monkeypatch):
    given = {}
    monkeypatch.setattr(train.sandbox, "start", lambda *settings: given.update(settings=settings))
    monkeypatch.setattr(train.sandbox, "available", lambda: ("monty", "unprotected"))
    settings = "--train-data sums --max-steps 1 --code-timeout 2.5 --unsafe-run-model-code"
    run(tmp_path / "run", *settings.split())
    assert given["settings"] == (2.5, True)
    warned = [line for line in capsys.readouterr().out.split("\n") if "UNSAFE: model-written code" in line]
    assert len(warned) == 3 and "step 1/1" in warned[1]


def test_the_two_highest_rewards_are_printed_short_and_safe():
    """Different texts, whatever else is tied; nothing of a model's text reaches the terminal's controls."""
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
