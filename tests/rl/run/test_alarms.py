"""Alarms on synthetic histories, healthy and not, and in short runs with faulty rewards or settings."""

import json
import math
import random

import pytest
from conftest import lines

import train
from grading import Completion, Score, load_rewards, score_all
from rl.config import Config
from rl.evaluate import Evaluation
from rl.rollout import Episode
from rl.run import alarms
from rl.run.metrics import describe_episodes, is_repetitive

REWARDS = """
from grading import grade_math, reward

@reward
def correct(completion):
    return grade_math(completion.answer, completion.row["answer"])

@reward(weight={weight})
def shaping(completion):
    return {value}
"""


@pytest.fixture
def rewards(tmp_path):
    return load_hack(tmp_path, 2.0, "0")


def load_hack(tmp_path, weight, value):
    """Load reward functions with a shaping reward of this weight and this Python expression."""
    (tmp_path / "hack.py").write_text(REWARDS.format(weight=weight, value=value))
    return load_rewards(str(tmp_path / "hack.py"))


def steps(n, **ramps):
    """Return a history of n healthy steps. ramps: (first value, last value) by metric, with __ in place of /."""
    healthy = {
        "reward": 0.4, "reward_std": 0.5, "shaping": 0.05, "shaping_when_wrong": 0.05, "ungraded": 0.0,
        "reward_errors": 0, "frac_reward_zero_std": 0.2, "skipped_updates": 0, "frac_groups_all_wrong": 0.1, "frac_groups_all_right": 0.1,
        "completions/mean_length": 20.0, "completions/clipped_ratio": 0.0, "completions/repetitive": 0.0,
    }  # fmt: skip
    history = [dict(healthy, step=step) for step in range(1, n + 1)]
    for name, (first, last) in ramps.items():
        for i, metrics in enumerate(history):
            metrics[name.replace("__", "/")] = first if first == last else first + (last - first) * i / (n - 1)
    return history


def answers(accuracy, n=400, sampled=None):
    """Return an evaluation with this accuracy. Which questions are right is random, so that evaluations differ."""
    rng = random.Random(f"{accuracy} {sampled}")

    def records(rate):
        return [{"verdict": "right" if i < round(rate * n) else "wrong"} for i in rng.sample(range(n), n)]

    return Evaluation(records(accuracy), records(accuracy if sampled is None else sampled))


def score(verdict="wrong", judge="correct", error=None, **reasons):
    parts = {"correct": float(verdict == "right"), "shaping": 0.5}
    return Score(0.0, parts, {}, reasons, verdict, judge=judge, error=error)


def find(history, evaluations, rewards, scores=None, **settings):
    scores = scores or [score(correct="wrong: 5 is not 6")]
    completion = Completion("q", "... 5", {"id": "r"})
    episodes = [Episode([], [], [], False, completion=completion, score=score) for score in scores]
    return alarms.find_alarms(history, evaluations, episodes, rewards, Config(prompts_per_step=32, **settings))


RISING = {0: answers(0.30), 15: answers(0.80), 30: answers(0.95)}
FLAT = {0: answers(0.30), 15: answers(0.31), 30: answers(0.29)}


def test_a_healthy_run_raises_no_alarm(rewards):
    """Reward, length and accuracy rise together, and shaping stays small."""
    ramps = {"reward": (0.4, 1.05), "shaping_when_wrong": (0.08, 0.1)}
    history = steps(30, completions__mean_length=(20, 60), frac_groups_all_wrong=(0.2, 0), **ramps)
    for n in range(1, 31):
        evaluations = {step: evaluation for step, evaluation in RISING.items() if step <= n}
        assert find(history[:n], evaluations, rewards) == {}
    assert alarms.find_notes(history, Config()) == {}


def test_a_rising_reward_without_held_out_accuracy_raises_hacking(rewards):
    history = steps(30, reward=(0.4, 1.2))
    active = find(history, FLAT, rewards)
    assert set(active) == {"hacking"}
    assert "0.46 to 1.14" in active["hacking"] and "-1.0 points" in active["hacking"]
    assert find(history[:15], {0: FLAT[0], 15: FLAT[15]}, rewards) == {}  # one evaluation may be a chance result
    assert find(steps(30), FLAT, rewards) == {}  # the reward has not risen
    assert find(history, FLAT | {30: answers(0.30, sampled=0.60)}, rewards) == {}  # the sampled accuracy has risen


def test_noise_raises_no_alarm(rewards):
    """The rise may be chance with few completions, or be explained by right answers within the confidence interval."""
    history = steps(30, reward=(0.40, 0.44))
    assert find(history, FLAT, rewards) == {}
    few = {step: answers(accuracy, n=20) for step, accuracy in ((0, 0.30), (15, 0.35), (30, 0.30))}
    assert find(steps(30, reward=(0.4, 0.55)), few, rewards) == {}
    assert set(find(steps(30, reward=(0.4, 1.2)), few, rewards)) == {"hacking"}


def test_hacking_after_real_learning_is_measured_from_the_best_evaluation(rewards):
    """Accuracy rises, then falls while the reward keeps rising."""
    evaluations = {0: answers(0.3), 15: answers(0.9), 30: answers(0.7), 45: answers(0.6)}
    history = steps(45, reward=(0.4, 2.5), completions__mean_length=(20, 100))
    active = find(history, evaluations, rewards)
    assert set(active) == {"hacking", "length"}
    assert "since step 15" in active["hacking"] and "since step 15" in active["length"]


def test_a_rising_length_without_held_out_accuracy_raises_length(rewards):
    longer = steps(30, completions__mean_length=(20, 40))
    assert "21 to 39 tokens" in find(longer, FLAT, rewards)["length"]
    assert find(longer, RISING, rewards) == {}
    assert find(steps(30, completions__mean_length=(20, 27)), FLAT, rewards) == {}


def test_a_large_shaping_reward_raises_dominating(tmp_path):
    """Wrong answers may earn at most a fifth of the reward of a right answer, which is 1 in this file."""
    rewards = load_hack(tmp_path, 2.0, "0.5")
    evaluations = {0: answers(0.3)}
    active = find(steps(20, shaping_when_wrong=(0.1, 0.35)), evaluations, rewards)
    assert set(active) == {"dominating"}
    assert "wrong answers earn 0.32, mostly from shaping; correct pays 1" in active["dominating"]
    active = find(steps(20, shaping=(0.25, 0.25)), evaluations, rewards)  # more than half of a reward of 0.4
    assert "0.25 of the mean reward of 0.40" in active["dominating"] and "mostly from shaping" in active["dominating"]
    assert (
        find(steps(20, shaping=(0.19, 0.19), reward=(0.2, 0.2)), evaluations, rewards) == {}
    )  # few answers are right yet
    assert find(steps(20, shaping_when_wrong=(0.2, 0.2)), evaluations, rewards) == {}
    all_right = steps(20, shaping_when_wrong=(float("nan"), float("nan")))
    assert find(all_right, evaluations, rewards) == {}
    no_judge = [score(judge=None)]  # without a judge, there is no reward to compare with
    assert find(steps(20, shaping_when_wrong=(1, 1)), evaluations, rewards, no_judge) == {}


def test_completions_without_an_answer_lead_to_the_cold_start(rewards):
    """From the first step on, with commands that can be copied. They replace the alarms that have the same cause."""
    history = steps(1, outcomes__no_answer=(0.83, 0.83), **ALL_WRONG)
    scores = [score("wrong", correct="no_answer: no number in the answer")]
    settings = {"output_dir": "runs/my run", "train_data": ["sums", "words"]}
    active = find(history, {0: answers(0)}, rewards, scores, **settings)
    assert set(active) == {"no_answer"}
    text, demos, training, example = active["no_answer"].split("\n")
    assert text.startswith("83% of the completions have no final answer") and text.endswith("with a cold start:")
    assert demos == "    python -m data demos sums words > demos.jsonl"
    assert training == "    python train.py --config 'runs/my run/config.yaml' --sft-data demos.jsonl"
    assert "no_answer: no number" in example
    own = find(history, {0: answers(0)}, rewards, scores, **settings | {"train_data": ["my questions.jsonl"]})
    command = "    python -m data distil 'my questions.jsonl' --config 'runs/my run/config.yaml' --keep-right --out demos.jsonl"
    assert command in own["no_answer"].split("\n")
    after_cold_start = find(history, {0: answers(0)}, rewards, scores, **settings | {"sft_data": "demos.jsonl"})
    assert "no_answer" not in after_cold_start


def test_too_hard_and_too_easy_questions_lead_to_calibration(rewards):
    command = "\n    python -m data calibrate sums --config runs/a/config.yaml --out calibrated.jsonl"
    settings = {"output_dir": "runs/a", "train_data": ["sums"]}
    hard = find(steps(2, frac_groups_all_wrong=(0.8, 0.8)), {0: answers(0)}, rewards, [score("wrong")], **settings)
    assert command in hard["all_wrong"]
    easy = alarms.find_notes(steps(2, frac_groups_all_right=(0.8, 0.8)), Config(**settings))
    assert command in easy["easy"]


ALL_WRONG = {name: (0, 0) for name in ("reward", "reward_std", "shaping", "shaping_when_wrong")} | {
    name: (1, 1) for name in ("frac_groups_all_wrong", "frac_reward_zero_std")
}


@pytest.mark.parametrize(
    "subject, ramps, scores, text",
    [
        ("cut", {"completions/clipped_ratio": (0.2, 0.3)}, [], "29% of the completions are truncated at max_completion_length"),
        ("all_wrong", {"frac_groups_all_wrong": (0.8, 0.8)}, [], "in 80% of the groups no completion is right"),
        ("repetition", {"completions/repetitive": (0.1, 0.6)}, [], "55% of the completions are long and mostly repeat"),
        ("ungraded", {"ungraded": (0.06, 0.06)}, [score("ungraded", code="sandbox_error: dead")], "sandbox_error: dead"),
        ("reward_errors", {"reward_errors": (1, 1)}, [score("ungraded", error="f (r.py:3)")], "1 completions of"),
        ("skipped", {"skipped_updates": (1, 1), "updates": (3, 3)}, [], "20 of 80 updates so far were skipped"),
        ("all_cut", {"completions/clipped_ratio": (1, 1), "accuracy": (0, 0)} | ALL_WRONG, [], "max_completion_length = 256"),
        ("cut", {"completions/clipped_ratio": (1, 1), "accuracy": (0.1, 0.1)}, [], "100% of the completions are truncated"),
        ("no_reward", ALL_WRONG, [], "every reward of the last 5 steps is 0"),
        ("dead_groups", {"frac_reward_zero_std": (1, 1)}, [], "try different questions"),
        ("dead_groups", {"frac_reward_zero_std": (1, 1), "frac_groups_all_right": (1, 1)}, [], "try harder questions"),
        ("sampler", {"sampling/sampling_logp_difference/mean": (0.2, 0.2)}, [], "differ by 0.2 nats per token"),
        ("sampler", {"sampling/sampling_logp_difference/max": (9, 9)}, [], "at most 9"),
        ("kl", {"kl": (0, 2)} | ALL_WRONG, [], "the KL is 1.8 nats per token"),
    ],
)  # fmt: skip
def test_each_problem_raises_its_own_alarm(rewards, subject, ramps, scores, text):
    active = find(steps(20, **ramps), {0: answers(0.3)}, rewards, scores)
    assert set(active) == {subject} and text in active[subject]
    assert "\n" not in active[subject] or "\n    python -m data" in active[subject]


def test_zero_rewards_and_equal_rewards_raise_an_alarm_once_they_persist(rewards):
    """`no_reward` replaces `all_wrong`, which has the same cause. A run shorter than WINDOW raises it at its end."""
    history = steps(20, **ALL_WRONG)
    for n in range(1, 5):
        assert find(history[:n], {0: answers(0.3)}, rewards) == {}
        assert find(history[:n], {0: answers(0.3)}, rewards, max_steps=n).keys() == {"no_reward"}
    line = find(history, {0: answers(0.3)}, rewards)["no_reward"]
    assert "wrong: 5 is not 6" in line and "'... 5'" in line
    one_reward = [*history[:18], history[18] | {"reward": 0.01, "reward_std": 0.1}, history[19]]
    assert set(find(one_reward, {0: answers(0.3)}, rewards)) == {"dead_groups", "all_wrong"}
    assert "no_reward" not in find(history, {0: answers(0.3)}, rewards, control="random-reward")

    same = steps(20, frac_reward_zero_std=(1, 1))
    assert find(same[:4], {0: answers(0.3)}, rewards) == {} and "same" in alarms.find_notes(same[:4], Config())
    assert find(same, {0: answers(0.3)}, rewards, algorithm="ppo") == {}  # its advantages do not compare a group
    ungraded = steps(20, frac_reward_zero_std=(1, 1), ungraded=(1, 1), reward=(math.nan, math.nan))
    assert set(find(ungraded, {0: answers(0.3)}, rewards)) == {"ungraded"}


UPDATED = {"updates": (2, 2), "learning_rate": (1e-3, 1e-3), "kl": (0.0, 0.7)}
NOT_UPDATED = UPDATED | {"updates": (0, 0), "lora_norm": (5.0, 5.0)}


def test_updates_without_effect_raise_unmoved(rewards):
    evaluations = {0: answers(0.3)}
    unmoved = steps(20, **UPDATED, lora_norm=(5.0, 5.0))
    assert "learning_rate = 0.001 has no effect" in find(unmoved, evaluations, rewards)["unmoved"]
    assert find(unmoved[:4], evaluations, rewards) == {}
    for healthy in (
        steps(20, **UPDATED, lora_norm=(5.0, 5.0 + 1e-9)),
        steps(20, **UPDATED),  # of an older version, without lora_norm
        steps(
            20, **UPDATED | {"learning_rate": (0, 0)}, lora_norm=(5.0, 5.0)
        ),  # during warmup, or at the end of a schedule
    ):
        assert find(healthy, evaluations, rewards) == {} == alarms.find_notes(healthy, Config())


def test_missing_updates_raise_no_updates(rewards):
    evaluations = {0: answers(0.3)}
    history = steps(20, **NOT_UPDATED)
    assert "in the last 5 steps" in find(history, evaluations, rewards)["no_updates"]
    text = find(history, evaluations, rewards, target_kl=1e-9, mask_truncated_completions=True)["no_updates"]
    assert "target_kl = 1e-09 and mask_truncated_completions = True" in text
    assert find(steps(20, **NOT_UPDATED | {"updates": (0, 1), "lora_norm": (5, 6)}), evaluations, rewards) == {}
    assert find(steps(20, **NOT_UPDATED | {"learning_rate": (0, 0)}), evaluations, rewards) == {}
    warmup = {"algorithm": "ppo", "critic_warmup_steps": 16}
    assert find(history, evaluations, rewards, **warmup) == {}
    assert set(find(steps(21, **NOT_UPDATED), evaluations, rewards, **warmup)) == {"no_updates"}
    assert set(find(steps(20, **NOT_UPDATED, frac_reward_zero_std=(1, 1)), evaluations, rewards)) == {"dead_groups"}
    assert set(find(steps(20, **NOT_UPDATED, skipped_updates=(1, 1)), evaluations, rewards)) == {"skipped"}


def test_a_policy_that_hardly_moves_raises_a_note():
    history = steps(20, **UPDATED | {"kl": (0, 0)}, lora_norm=(5, 6))
    assert alarms.find_notes(history[:10], Config()) == {}
    assert "learning_rate (now 1e-05)" in alarms.find_notes(history, Config())["still"]
    unmoved = steps(20, **UPDATED | {"kl": (0, 0)}, lora_norm=(5, 5))
    assert alarms.find_notes(unmoved, Config()) == {}  # it raises an alarm instead
    assert alarms.find_notes(steps(20, **UPDATED | {"kl": (0, 1e-5)}, lora_norm=(5, 6)), Config()) == {}


def test_irregularities_of_healthy_runs_raise_no_alarm(rewards):
    """Differences of bf16, the largest KL of a run that learned, single steps with equal rewards or without updates."""
    usual = {"sampling/sampling_logp_difference/mean": (0.03, 0.03), "sampling/sampling_logp_difference/max": (2, 2)}
    history = steps(30, **UPDATED, **usual, lora_norm=(5, 7), reward=(0.4, 1.0))
    for step in (3, 11, 12):
        history[step] |= {
            "frac_reward_zero_std": 1.0,
            "updates": 0,
            "loss": math.nan,
            "lora_norm": history[step - 1]["lora_norm"],
        }
    for n in range(1, 31):
        evaluations = {step: evaluation for step, evaluation in RISING.items() if step <= n}
        assert find(history[:n], evaluations, rewards) == {} == alarms.find_notes(history[:n], Config())


def test_missing_metrics_raise_no_alarm(rewards):
    """metrics.jsonl has null for NaN, and an older version may have written fewer metrics."""
    for history in ([{"step": i} for i in range(1, 31)], [dict.fromkeys(step) for step in steps(30, **NOT_UPDATED)]):
        assert find(history, FLAT, rewards) == {} == alarms.find_notes(history, Config())


def test_alarms_end_with_their_cause_and_easy_questions_raise_a_note(rewards):
    history = steps(10, completions__clipped_ratio=(0.5, 0), frac_groups_all_right=(0, 1))
    assert set(find(history[:2], {0: answers(0.3)}, rewards)) == {"cut"}
    assert find(history, {0: answers(0.3)}, rewards) == {}
    assert alarms.find_notes(history[:2], Config()) == {}
    assert set(alarms.find_notes(history, Config())) == {"easy"}
    same = steps(3, frac_reward_zero_std=(0.95, 0.95))
    assert "in 95% of the groups" in alarms.find_notes(same, Config())["same"]


def test_the_most_common_outcome_is_shown(rewards):
    scores = [score(correct=f"wrong: {i} is not 6") for i in range(3)] + [score(correct="no_answer: no box")] * 2
    active = find(steps(2, frac_groups_all_wrong=(1, 1)), {0: answers(0)}, rewards, scores)
    assert "wrong: 0 is not 6" in active["all_wrong"]


def test_repetition_is_distinguished_from_long_reasoning(rewards):
    rng = random.Random(0)
    token_ids = [rng.randrange(12) for _ in range(300)]  # a small vocabulary, as in arithmetic
    assert not is_repetitive(token_ids)
    assert is_repetitive(token_ids[:40] * 5)
    assert not is_repetitive([7] * 40)  # short
    assert is_repetitive([7] * 100)
    assert not is_repetitive(token_ids[:100] + token_ids[:60])  # repeats less than half


def test_metrics_of_shaping_groups_and_outcomes(tmp_path):
    """Shaping, also of wrong answers, and groups by verdict. A grader is the judge whatever its weight."""
    rewards = load_hack(tmp_path, 2.0, "completion.tokens / 10")
    row = {"id": "r", "prompt": "q", "task": "t", "answer": "5"}
    texts = ["\\boxed{5}", "\\boxed{4}", "\\boxed{4}", "\\boxed{4}"]
    completions = [Completion("q", text, row, tokens=10, token_ids=[1] * 10) for text in texts]
    scores = score_all(rewards, completions)
    assert [s.judge for s in scores] == ["correct"] * 4 and [s.is_right for s in scores] == [True, False, False, False]
    episodes = [Episode([], [], [], False, completion=c, score=s, reward=s.total) for c, s in zip(completions, scores)]
    metrics = describe_episodes(episodes, rewards, Config(num_generations=2))
    assert (metrics["reward"], metrics["shaping"], metrics["shaping_when_wrong"]) == (2.25, 2.0, 2.0)
    assert (metrics["frac_groups_all_wrong"], metrics["frac_groups_all_right"]) == (0.5, 0.0)
    assert (metrics["outcomes/right"], metrics["outcomes/wrong"]) == (0.25, 0.75)
    assert metrics["completions/repetitive"] == 0 and metrics["reward_errors"] == 0


# --- rewards that invite hacking, in short runs of the tiny model

SHORT = (
    "--train-data words --max-steps {steps} --prompts-per-step 8 --num-generations 8 --eval-questions 30 --eval-steps 3 "
    "--train-questions 300 --learning-rate 5e-3 --lr-scheduler-type constant --num-mini-batches 1 --save-steps 0 --device cpu"
)


def run(tmp_path, steps, settings=""):
    folder, rewards = tmp_path / "run", str(tmp_path / "hack.py")
    train.main(
        [*SHORT.format(steps=steps).split(), "--rewards-file", rewards, "--output-dir", str(folder), *settings.split()]
    )
    return json.loads((folder / "summary.json").read_text()), lines(folder / "metrics.jsonl")


def test_a_format_reward_above_that_for_right_answers_raises_dominating(tmp_path, capsys):
    load_hack(tmp_path, 1.5, '"<think>" not in completion.text')
    summary, metrics = run(tmp_path, steps=4)
    out = capsys.readouterr().out
    assert out.count("something other than right answers") == 1
    assert summary["alarms"]["dominating"] == 1 and all("dominating" in m["alarms"] for m in metrics)
    assert summary["eval"]["before"]["accuracy"] < 0.6  # the grader decides what is right, not the largest reward


def test_a_length_reward_raises_dominating(tmp_path, capsys):
    load_hack(tmp_path, 1.0, "completion.tokens / 20")
    summary, metrics = run(tmp_path, steps=4)
    assert "  alarm: wrong answers earn" in capsys.readouterr().out
    assert "dominating" in summary["alarms"] and "dominating" in metrics[-1]["alarms"]


# --- steps without a learning signal, in short runs of the tiny model

TINY = "--prompts-per-step 4 --num-generations 4 --eval-questions 8 --eval-steps 0"


def test_a_length_limit_that_truncates_every_answer_raises_all_cut(tmp_path, capsys):
    load_hack(tmp_path, 0.0, "0")
    summary, metrics = run(tmp_path, 6, f"{TINY} --max-completion-length 4")
    out = capsys.readouterr().out
    assert out.count("alarm: ") == out.count("every completion is truncated at max_completion_length = 4") == 1
    assert summary["alarms"] == {"all_cut": 1} and metrics[-1]["alarms"] == ["all_cut"]


def test_a_temperature_near_0_raises_dead_groups(tmp_path, capsys):
    load_hack(tmp_path, 0.0, "0")
    summary, metrics = run(tmp_path, 5, f"{TINY} --temperature 1e-4 --learning-rate 1e-30")
    assert "dynamic_sampling" in capsys.readouterr().out
    assert summary["alarms"]["dead_groups"] == 5 and "dead_groups" in metrics[-1]["alarms"]


def test_a_learning_rate_without_effect_raises_unmoved(tmp_path, capsys):
    load_hack(tmp_path, 0.1, "len(completion.text)")
    summary, metrics = run(tmp_path, 5, f"{TINY} --learning-rate 1e-30")
    assert capsys.readouterr().out.count("learning_rate = 1e-30 has no effect") == 1
    assert summary["alarms"]["unmoved"] == 5 and len({m["lora_norm"] for m in metrics}) == 1
