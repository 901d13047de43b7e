"""Evaluation: accuracy of the policy on held-out questions, with confidence intervals.

Every question is answered twice: greedily, and sampled at the training temperature. All evaluations use the same
questions, so that the interval of the paired gain is narrower than the intervals of two separate rates.
"""

import math
from dataclasses import dataclass

import torch

from grading import Rewards
from rl.config import Config
from rl.model import distributed
from rl.model.policy import Policy, Question
from rl.model.sampling import Sampling
from rl.rollout import Episode, rollout_and_score

Z95 = 1.959964  # normal quantile of a 95 % confidence interval
EVAL_SEED = 12345  # seed of the sampled answers, the same in every evaluation
SAMPLED_FIELDS = ("completion", "verdict", "thinks", "finish_reason", "tokens", "reward", "rewards", "reasons", "turns")
METRIC_FIELDS = ("task", "verdict", "thinks", "tokens", "reward")  # the fields that rates and gains are computed from


@dataclass
class Evaluation:
    """The answers of one evaluation: one record per question, in the order of the held-out questions."""

    greedy: list[dict]
    sampled: list[dict]

    def lines(self) -> list[dict]:
        """Return one dict per question for the run folder: the greedy answer, with the sampled one under `sampled`."""
        return [g | {"sampled": {k: s[k] for k in SAMPLED_FIELDS if k in s}} for g, s in zip(self.greedy, self.sampled)]

    @classmethod
    def from_lines(cls, lines: list[dict]) -> "Evaluation":
        return cls(lines, [line | line["sampled"] for line in lines])

    def without_texts(self) -> "Evaluation":
        """Return a copy with only the `METRIC_FIELDS`, which saves memory in runs with many evaluations."""

        def metric_fields(records: list[dict]) -> list[dict]:
            return [{name: record[name] for name in METRIC_FIELDS} for record in records]

        return Evaluation(metric_fields(self.greedy), metric_fields(self.sampled))

    def summary(self) -> dict:
        """Return accuracy and other rates over all questions, and under `tasks` for each task."""
        tasks = dict.fromkeys(record["task"] for record in self.greedy)
        return self._rates(None) | {"tasks": {task: self._rates(task) for task in tasks}}

    def _rates(self, task: str | None) -> dict:
        greedy = [record for record in self.greedy if task in (None, record["task"])]
        sampled = [record for record in self.sampled if task in (None, record["task"])]
        return rates(greedy) | {f"{name}_sampled": value for name, value in rates(sampled).items() if name != "n"}

    @property
    def accuracy(self) -> float:
        return fraction_right(self.greedy)

    @property
    def accuracy_sampled(self) -> float:
        return fraction_right(self.sampled)

    def gain_over(self, before: "Evaluation") -> dict:
        """Return the paired gain over an earlier evaluation of the same questions, greedy and sampled."""
        greedy = paired_gain(before.greedy, self.greedy)
        sampled = paired_gain(before.sampled, self.sampled)
        return greedy | {"accuracy_sampled": sampled["accuracy"], "ci95_sampled": sampled["ci95"]}


def fraction_right(records: list[dict]) -> float:
    return sum(record["verdict"] == "right" for record in records) / len(records)


def evaluate(policy: Policy, questions: list[Question], rewards: Rewards, config: Config, step: int) -> Evaluation:
    """Answer every question greedily and sampled, and grade the answers (RewardError if a reward function fails)."""
    greedy = answer(policy, questions, rewards, config, step, temperature=0.0)
    sampled = answer(policy, questions, rewards, config, step, config.temperature)
    return Evaluation(greedy, sampled)


def answer(
    policy: Policy, questions: list[Question], rewards: Rewards, config: Config, step: int, temperature: float
) -> list[dict]:
    """Answer every question at a temperature (0 is greedy), and return one record per question."""
    generator = torch.Generator(policy.device).manual_seed(distributed.own_seed(EVAL_SEED))
    episodes = rollout_and_score(
        policy, questions, 1, Sampling(temperature), generator, rewards, config, step, label="evaluation"
    )
    return [record(episode) for episode in episodes]


def best_step(evaluations: dict[int, Evaluation]) -> int:
    """Return the step with the highest greedy accuracy. Ties: the higher sampled accuracy, then the earlier step."""

    def rank(step: int) -> tuple:
        return evaluations[step].accuracy, evaluations[step].accuracy_sampled, -step

    return max(evaluations, key=rank)


def record(episode: Episode) -> dict:
    """Return an answered question as a record of eval/*.jsonl."""
    completion = episode.completion
    score = episode.score
    row = completion.row
    return {
        "id": row["id"],
        "task": row["task"],
        "question": completion.prompt,
        "expected": row.get("tests") if row.get("answer") is None else row["answer"],
        "completion": completion.text,
        "verdict": score.verdict,
        "thinks": bool(completion.thinking),
        "finish_reason": episode.finish_reason,
        "tokens": completion.tokens,
        "reward": None if math.isnan(score.total) else round(score.total, 6),
        "rewards": score.parts,
        "reasons": score.reasons,
    } | ({"turns": [{"text": t.text, "reply": t.reply} for t in completion.turns]} if completion.turns else {})


def rates(records: list[dict]) -> dict:
    """Return accuracy with its interval, fraction and accuracy of thinking answers, mean length and mean reward."""
    n = len(records)
    right = sum(r["verdict"] == "right" for r in records)
    thinking = [r for r in records if r["thinks"]]
    totals = [r["reward"] for r in records if r["reward"] is not None]
    return {
        "n": n,
        "accuracy": right / n,
        "ci95": wilson_interval(right, n),
        "thinking": len(thinking) / n,
        "accuracy_when_thinking": sum(r["verdict"] == "right" for r in thinking) / len(thinking) if thinking else None,
        "mean_length": sum(r["tokens"] for r in records) / n,
        "reward": sum(totals) / len(totals) if totals else None,
        "ungraded": sum(r["verdict"] == "ungraded" for r in records),
    }


def wilson_interval(successes: int, n: int) -> list[float]:
    """Return Wilson's 95 % score interval of a rate (E. B. Wilson, JASA 22, 1927)."""
    p = successes / n
    z2 = Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half_width = Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return [max(0.0, centre - half_width), min(1.0, centre + half_width)]


def paired_gain(before: list[dict], after: list[dict]) -> dict:
    """Return the difference of two accuracies on the same questions, with its 95 % interval.

    The interval is Bonett and Price's adjusted Wald interval for paired proportions (J. Educ. Behav. Stat. 37, 2012),
    whose coverage is close to nominal in small samples and for extreme proportions.
    """
    n = len(before)
    fixed = sum(b["verdict"] != "right" and a["verdict"] == "right" for b, a in zip(before, after))
    broke = sum(b["verdict"] == "right" and a["verdict"] != "right" for b, a in zip(before, after))
    p, q = (fixed + 1) / (n + 2), (broke + 1) / (n + 2)
    half_width = Z95 * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    return {
        "accuracy": (fixed - broke) / n,
        "ci95": [max(-1.0, p - q - half_width), min(1.0, p - q + half_width)],
        "fixed": fixed,
        "broke": broke,
        "n": n,
    }
