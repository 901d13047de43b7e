"""Confidence intervals against published values and by simulation, and the records of an evaluation."""

import random

import pytest
from tqdm import tqdm

from grading import load_rewards, score_all
from rl.config import Config
from rl.evaluate import Evaluation, paired_gain, rates, wilson_interval
from rl.model.policy import Question
from rl.rollout import StreamingScorer
from rl.run import report


def test_wilson_interval_by_hand():
    # Newcombe (1998), table I, method 3: 81 of 263, 15 of 148, 0 of 20, 1 of 29
    assert wilson_interval(81, 263) == pytest.approx([0.2553, 0.3662], abs=1e-4)
    assert wilson_interval(15, 148) == pytest.approx([0.0624, 0.1605], abs=1e-4)
    assert wilson_interval(0, 20) == pytest.approx([0.0, 0.1611], abs=1e-4)
    assert wilson_interval(1, 29) == pytest.approx([0.0061, 0.1718], abs=1e-4)


def verdicts(bits):
    return [{"verdict": "right" if bit else "wrong"} for bit in bits]


def test_paired_gain_by_hand():
    gain = paired_gain(verdicts([1, 0, 0, 0]), verdicts([0, 1, 1, 0]))
    assert (gain["accuracy"], gain["fixed"], gain["broke"], gain["n"]) == (0.25, 2, 1, 4)
    # (2 + 1) / 6 and (1 + 1) / 6: difference 1/6, half width 1.96 sqrt((5/6 - 1/36) / 6)
    half = 1.959964 * ((5 / 6 - 1 / 36) / 6) ** 0.5
    assert gain["ci95"] == pytest.approx([1 / 6 - half, 1 / 6 + half])
    unchanged = paired_gain(verdicts([1] * 50), verdicts([1] * 50))
    assert unchanged["accuracy"] == 0 and unchanged["ci95"][0] < 0 < unchanged["ci95"][1]


def test_paired_interval_coverage():
    """About 95 % of repeated experiments: accuracy 30 % before and 80 % after, on dependent answers."""
    rng = random.Random(0)
    covered = 0
    n = 120
    for _ in range(600):
        hardness = [rng.random() for _ in range(n)]
        gain = paired_gain(verdicts([h < 0.3 for h in hardness]), verdicts([h < 0.8 for h in hardness]))
        low, high = gain["ci95"]
        covered += low <= 0.5 <= high
    assert 0.92 <= covered / 600 <= 0.99


def test_streamed_scores_are_in_the_order_of_the_roll_out(policy, episodes):
    rows = [{"id": f"r{i}", "task": "t", "prompt": q, "answer": "12"} for i, q in enumerate(["a", "b", "c", "d"])]
    rewards = load_rewards("rewards.py")
    questions = [Question(row, [4]) for row in rows]
    progress = tqdm(total=16, disable=True)
    counts = []
    progress.update = counts.append
    scorer = StreamingScorer(policy, questions, rewards, 3, progress)
    order = random.Random(0).sample(range(16), 16)
    for start in range(0, 16, 5):
        scorer.add({index: episodes[index] for index in order[start : start + 5]})
    scores = scorer.results()
    completions = [episode.completion for episode in episodes]
    assert counts == [5, 5, 5, 1]
    for completion, episode in zip(completions, episodes, strict=True):
        assert completion.row == rows[episode.group] and completion.token_ids == episode.completion_ids
        assert (completion.text, completion.step) == (policy.decode(episode.completion_ids), 3)
    expected = score_all(rewards, completions)
    assert [(s.total, s.parts, s.reasons) for s in scores] == [(s.total, s.parts, s.reasons) for s in expected]
    assert len({s.total for s in scores}) > 1


def test_gain_over():
    before = Evaluation(verdicts([1, 0, 0, 0]), verdicts([0, 0, 0, 0]))
    after = Evaluation(verdicts([0, 1, 1, 0]), verdicts([1, 1, 1, 0]))
    gain = after.gain_over(before)
    assert (gain["accuracy"], gain["accuracy_sampled"], after.accuracy) == (0.25, 0.75, 0.5)
    assert gain["ci95_sampled"] == paired_gain(before.sampled, after.sampled)["ci95"]


def test_rates_and_gains_need_no_texts():
    records = [answer("right", True) | {"completion": "2"}, answer("wrong", False) | {"completion": "3"}]
    evaluation = Evaluation(records, records[::-1])
    shortened = evaluation.without_texts()
    assert shortened.summary() == evaluation.summary() and shortened.gain_over(evaluation) == evaluation.gain_over(
        shortened
    )
    assert "completion" not in shortened.greedy[0] and "completion" in evaluation.greedy[0]


def answer(verdict, thinks, tokens=10, reward=1.0, task="sums"):
    return {"verdict": verdict, "thinks": thinks, "tokens": tokens, "reward": reward, "task": task}


def test_rates():
    records = [
        answer("right", True),
        answer("wrong", True, 30, 0.0),
        answer("wrong", False),
        answer("ungraded", False, 2, None),
    ]
    result = rates(records)
    assert result["accuracy"] == 0.25 and result["thinking"] == 0.5 and result["accuracy_when_thinking"] == 0.5
    assert result["mean_length"] == 13 and result["reward"] == pytest.approx(2 / 3) and result["ungraded"] == 1
    assert rates([answer("right", False)])["accuracy_when_thinking"] is None


def test_time_left_counts_steps_and_evaluations():
    seconds = {"rollout": 12.0, "update": 8.0, "eval": 9.0, "setup": 99.0}
    config = Config(max_steps=40, eval_steps=10)
    # 20 steps took 20 s, three evaluations (0, 10, 20) 9 s: 20 more steps and two evaluations
    assert report.seconds_left(20, config, seconds) == pytest.approx(20 + 6)
    assert report.seconds_left(40, config, seconds) == pytest.approx(9 / 5)
