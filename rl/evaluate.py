"""Evaluation: how often the policy is right on held-out questions, with intervals that say how sure that is.

Every question is answered twice: greedily, and once sampled at the training temperature. The same questions before and
after training make a paired comparison, whose interval is narrower than that of two separate rates.
"""

import math
from dataclasses import dataclass

import torch

from grading import Rewards
from rl.config import Config
from rl.model.policy import Policy, Question
from rl.model.sampling import Sampling
from rl.rollout import Episode, rollout_and_score

Z95 = 1.959964  # the normal quantile of a 95 % interval
EVAL_SEED = 12345  # of the sampled answers: the same in every evaluation
SAMPLED_FIELDS = ("completion", "verdict", "thinks", "finish_reason", "tokens", "reward", "rewards", "reasons")
RATED_FIELDS = ("task", "verdict", "thinks", "tokens", "reward")  # all that rates and gains are computed from


@dataclass
class Evaluation:
    """The answers of one evaluation: a record for each question, in the order of the held-out questions."""

    greedy: list[dict]
    sampled: list[dict]

    def lines(self) -> list[dict]:
        """One line a question, for the run folder: the greedy answer, and the sampled one under `sampled`."""
        return [g | {"sampled": {k: s[k] for k in SAMPLED_FIELDS}} for g, s in zip(self.greedy, self.sampled)]

    @classmethod
    def from_lines(cls, lines: list[dict]) -> "Evaluation":
        return cls(lines, [line | line["sampled"] for line in lines])

    def without_texts(self) -> "Evaluation":
        """A copy that keeps only what rates and gains are computed from: long runs have many evaluations."""

        def shortened(records: list[dict]) -> list[dict]:
            return [{name: record[name] for name in RATED_FIELDS} for record in records]

        return Evaluation(shortened(self.greedy), shortened(self.sampled))

    def summary(self) -> dict:
        """Accuracy and the like over all questions, and under `tasks` for each task."""
        tasks = dict.fromkeys(record["task"] for record in self.greedy)
        return self._rates(None) | {"tasks": {task: self._rates(task) for task in tasks}}

    def _rates(self, task: str | None) -> dict:
        greedy = [record for record in self.greedy if task in (None, record["task"])]
        sampled = [record for record in self.sampled if task in (None, record["task"])]
        return rates(greedy) | {f"{name}_sampled": value for name, value in rates(sampled).items() if name != "n"}

    @property
    def accuracy(self) -> float:
        return share_right(self.greedy)

    @property
    def accuracy_sampled(self) -> float:
        return share_right(self.sampled)

    def gain_over(self, before: "Evaluation") -> dict:
        """The paired gain since another evaluation of the same questions, greedy and sampled."""
        greedy = paired_gain(before.greedy, self.greedy)
        sampled = paired_gain(before.sampled, self.sampled)
        return greedy | {"accuracy_sampled": sampled["accuracy"], "ci95_sampled": sampled["ci95"]}


def share_right(records: list[dict]) -> float:
    return sum(record["verdict"] == "right" for record in records) / len(records)


def evaluate(policy: Policy, questions: list[Question], rewards: Rewards, config: Config, step: int) -> Evaluation:
    """Answer every question greedily and sampled, and grade the answers with the reward functions.

    Raises RewardError if a reward function fails.
    """
    greedy = answer(policy, questions, rewards, config, step, temperature=0.0)
    sampled = answer(policy, questions, rewards, config, step, config.temperature)
    return Evaluation(greedy, sampled)


def answer(
    policy: Policy, questions: list[Question], rewards: Rewards, config: Config, step: int, temperature: float
) -> list[dict]:
    """One record a question, answered at this temperature; 0 is greedy."""
    generator = torch.Generator(policy.device).manual_seed(EVAL_SEED)
    episodes = rollout_and_score(
        policy, questions, 1, Sampling(temperature), generator, rewards, config, step, label="evaluation"
    )
    return [record(episode) for episode in episodes]


def best_step(evaluations: dict[int, Evaluation]) -> int:
    """The step with the highest greedy accuracy; of equals the one with the highest sampled accuracy, then the first."""

    def rank(step: int) -> tuple:
        return evaluations[step].accuracy, evaluations[step].accuracy_sampled, -step

    return max(evaluations, key=rank)


def record(episode: Episode) -> dict:
    """One answered question as it is written into eval/*.jsonl."""
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
    }


def rates(records: list[dict]) -> dict:
    """Accuracy with its interval, share that thinks, accuracy among those, mean length and reward of some records."""
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
    """Wilson's 95 % score interval of a rate (E. B. Wilson, JASA 22, 1927)."""
    p, z2 = successes / n, Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return [max(0.0, centre - half), min(1.0, centre + half)]


def paired_gain(before: list[dict], after: list[dict]) -> dict:
    """The difference of two accuracies on the same questions with its 95 % interval.

    The interval is Bonett and Price's adjusted Wald interval for paired proportions (J. Educ. Behav. Stat. 37, 2012),
    which holds its level for small samples and at the extremes.
    """
    n = len(before)
    fixed = sum(b["verdict"] != "right" and a["verdict"] == "right" for b, a in zip(before, after))
    broke = sum(b["verdict"] == "right" and a["verdict"] != "right" for b, a in zip(before, after))
    p, q = (fixed + 1) / (n + 2), (broke + 1) / (n + 2)
    half = Z95 * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    return {
        "accuracy": (fixed - broke) / n,
        "ci95": [max(-1.0, p - q - half), min(1.0, p - q + half)],
        "fixed": fixed,
        "broke": broke,
        "n": n,
    }
