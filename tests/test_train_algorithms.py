"""Whole runs of every algorithm, dynamic sampling, the curriculum, and incompatible settings."""

import pytest
from conftest import lines, read_rollouts, read_tokens

import train
from data import highest_level
from rl.config import Config, ConfigError

SMALL = "--max-steps 3 --prompts-per-step 6 --num-generations 4 --eval-questions 6 --eval-steps 0 --train-questions 60 --device cpu"


def test_dynamic_sampling_is_capped_and_counted(tmp_path):
    """Groups without variance are not trained on, but logged. The number of refills is limited."""
    train.main(
        [*SMALL.split(), "--dynamic-sampling", "2", "--train-data", "sums", "--output-dir", str(tmp_path / "run")]
    )
    rollouts = read_rollouts(tmp_path / "run")
    for metrics in lines(tmp_path / "run/metrics.jsonl"):
        step_rows = [r for r in rollouts if r["step"] == metrics["step"]]
        groups = [step_rows[i : i + 4] for i in range(0, len(step_rows), 4)]
        trained_groups = [g for g in groups if g[0]["advantage"] is not None]
        assert all(len({r["verdict"] for r in g}) == 2 for g in trained_groups) and len(trained_groups) <= 6
        assert len(groups) - len(trained_groups) == metrics["dynamic_sampling/groups_left_out"]
        assert len(trained_groups) == 6 or metrics["dynamic_sampling/refills"] == 2
        assert 0 <= metrics["dynamic_sampling/refills"] <= 2 and len(groups) >= 6
    assert any(m["dynamic_sampling/refills"] for m in lines(tmp_path / "run/metrics.jsonl"))


def test_steps_without_signal_are_skipped(tmp_path):
    """If all groups are all wrong, dynamic sampling leaves none: the policy is not updated, and the run continues."""
    rewards = tmp_path / "rewards.py"
    rewards.write_text("from grading import reward\n\n@reward\ndef never(completion):\n    return 0.0\n")
    arguments = [*SMALL.split(), "--rewards-file", str(rewards), "--dynamic-sampling", "1"]
    train.main([*arguments, "--output-dir", str(tmp_path / "run")])
    metrics = lines(tmp_path / "run/metrics.jsonl")
    assert len(metrics) == 3 and all(m["updates"] == 0 and m["loss"] == 0 for m in metrics)
    assert all(m["dynamic_sampling/groups_left_out"] == 12 for m in metrics)


def test_curriculum_starts_with_easy_questions(tmp_path):
    arguments = "--train-data big_sums long_sums --curriculum-steps 3"
    train.main([*SMALL.split(), *arguments.split(), "--output-dir", str(tmp_path / "run")])
    terms = {}
    for line in read_rollouts(tmp_path / "run"):
        terms.setdefault(line["step"], set()).add(line["prompt"].count(" + ") + line["prompt"].count(" - ") + 1)
    assert terms[1] <= {2, 3} and terms[2] <= {2, 3, 4} and max(terms[3]) == 5
    assert [highest_level([1, 1, 2, 5], step, 6) for step in (1, 2, 3, 4, 5, 6, 60)] == [1, 1, 2, 2, 5, 5, 5]
    assert highest_level([1, 1, 2, 5], 1, 0) == 5


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"algorithm": "reinforce", "num_iterations": 2}, "algorithm reinforce learns once from each roll-out"),
        ({"algorithm": "a2c", "num_mini_batches": 2}, "algorithm a2c learns once"),
        ({"algorithm": "dpo"}, "beta is 0, but dpo needs it"),
        ({"algorithm": "rloo", "num_generations": 1}, "rloo compares the completions of a group"),
        ({"algorithm": "ppo", "num_generations": 1, "dynamic_sampling": 1}, "dynamic_sampling compares"),
        ({"loss_type": "cispo"}, "epsilon_high is None, but with loss_type cispo"),
        (
            {"loss_type": "sapo", "importance_sampling_level": "sequence"},
            "importance_sampling_level sequence .* loss_type sapo",
        ),
        ({"target_kl": 0.1}, "target_kl ends the epochs early"),
        ({"algorithm": "dpo", "beta": 0.1, "entropy_coef": 0.1}, "entropy_coef .* dpo"),
        ({"gamma": 1.5}, "gamma is 1.5"),
        ({"lam": -0.1}, "lam is -0.1"),
        ({"target_kl": 0.0}, "target_kl is 0"),
        ({"beta_target_kl": 1.0, "beta": 0.1}, "beta_target_kl .* ppo"),
        ({"soft_punish_cache": 256}, "soft_punish_cache (256) must be less than max_completion_length"),
        ({"dynamic_sampling": 1, "control": "random-reward"}, "dynamic_sampling .* control"),
    ],
)
def test_incompatible_settings(settings, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(").replace(")", r"\)")):
        Config(**settings).check()
    Config(algorithm="ppo", num_generations=1).check()
    Config(algorithm="reinforce", num_generations=1, baseline="running").check()


@pytest.mark.parametrize(
    "arguments",
    [
        "--algorithm ppo --num-iterations 2 --num-mini-batches 2 --beta 0.05 --beta-target-kl 0.5 --lam 0.95 --target-kl 0.1",
        "--algorithm ppo --critic head --num-generations 1 --whiten-rewards --bootstrap-truncated --max-completion-length 20",
        "--algorithm ppo --load-in-4bit --gradient-checkpointing --critic-warmup-steps 1 --loss-type cispo --epsilon-high 5",
        "--algorithm a2c --num-mini-batches 1 --missing-eos-penalty 0.5 --entropy-coef 0.01",
        "--algorithm reinforce --num-mini-batches 1 --baseline running --num-generations 1 --gamma 0.99",
        "--algorithm rloo --soft-punish-cache 50 --loss-type sapo",
        "--algorithm reinforce_plus_plus --num-mini-batches 2 --beta 0.01 --kl-estimator k2",
        "--algorithm dpo --beta 0.1 --num-iterations 2",
        "--importance-sampling-level sequence --loss-type grpo --epsilon 3e-4 --epsilon-high 4e-4 --num-mini-batches 2",
        "--reward-funcs correct right_steps --train-data long_sums --algorithm grpo",
        "--reward-funcs correct right_steps --train-data long_sums --algorithm ppo",
    ],
)
def test_every_algorithm_runs(tmp_path, arguments):
    train.main([*SMALL.split(), "--max-steps", "2", *arguments.split(), "--output-dir", str(tmp_path / "run")])
    metrics = lines(tmp_path / "run/metrics.jsonl")
    assert len(metrics) == 2 and all(m["skipped_updates"] == 0 for m in metrics) and metrics[1]["grad_norm"] > 0
    rollouts = read_rollouts(tmp_path / "run")
    assert ("learned_reward" in rollouts[0]) == ("penalty" in arguments or "punish" in arguments)
    tokens = read_tokens(tmp_path / "run")[1]["completions"][0]
    assert ("values" in tokens) == ("ppo" in arguments or "a2c" in arguments)
    assert len(tokens.get("values", tokens["advantages"])) == len(tokens["tokens"])
