"""Evaluation: how often the policy is right on held-out questions, with intervals that say how sure that is.

Every question is answered twice: greedily, and once sampled at the training temperature. The same questions before and
after make a paired comparison, whose interval is narrower than that of two separate rates.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from grading import Completion, Rewards, Score, Scoring, prompt_text
from rl.config import Config, RunError
from rl.model.oom import within_memory
from rl.model.policy import Policy, reloaded_adapter
from rl.model.sampling import Sampling
from rl.rollout import Episode, rollout

Z95 = 1.959964  # the normal quantile of a 95 % interval
EVAL_SEED = 12345  # of the sampled answers: the same for every evaluation


class Marking:
    """Scores completions as they end, while the roll-out goes on with the others.

    rows: the data rows, by an episode's `question`. on_finished is told how many completions have just ended.
    """

    def __init__(
        self,
        policy: Policy,
        rows: list[dict],
        rewards: Rewards,
        step: int,
        on_finished: Callable[[int], None] = lambda n: None,
    ):
        self.policy, self.rows, self.step, self.on_finished = policy, rows, step, on_finished
        self.openings = [policy.opened_thinking(row["prompt"]) for row in rows]
        self.completions: dict[int, Completion] = {}  # by place in the roll-out's result
        self._scoring = Scoring(rewards)

    def add(self, ended: dict[int, Episode]) -> None:
        """Episodes that have just ended, by their place in the roll-out's result."""
        for place, episode in ended.items():
            self.completions[place] = self.to_completion(episode)
            self._scoring.add(self.completions[place], place)
        self.on_finished(len(ended))

    def to_completion(self, episode: Episode) -> Completion:
        """The episode as reward functions see it, with what a template had already written of the thinking."""
        row = self.rows[episode.question]
        return Completion(
            prompt=prompt_text(row["prompt"]),
            text=self.openings[episode.question] + self.policy.decode(episode.completion_ids),
            row=row,
            tokens=len(episode.completion_ids),
            token_ids=episode.completion_ids,
            truncated=episode.truncated,
            step=self.step,
        )

    def results(self) -> tuple[list[Completion], list[Score]]:
        """All completions in the roll-out's order, and their scores. Raises RewardError where a reward function fails."""
        scores = self._scoring.results()
        return [self.completions[place] for place in range(len(scores))], scores


def marked_rollout(
    policy: Policy,
    rows: list[dict],
    prompts: list[list[int]],
    num_generations: int,
    sampling: Sampling,
    generator: torch.Generator,
    rewards: Rewards,
    config: Config,
    step: int,
    on_finished: Callable[[int], None] = lambda n: None,
) -> tuple[list[Episode], Marking]:
    """Roll out, with what marks the completions as they end. Where memory runs out, all of it is done again with fewer rows:
    to keep what had ended would favour short completions.

    rows, prompts: of the questions, as data and as token ids. on_finished is told how many completions have just ended.
    """
    before = generator.get_state()
    started: list[Marking] = []

    def work():
        if started:
            generator.set_state(before)
            on_finished(-len(started[-1].completions))
        started.append(Marking(policy, rows, rewards, step, on_finished))
        return rollout(
            policy, prompts, num_generations, config.max_completion_length, sampling, generator,
            config.rollout_batch_size, started[-1].add,
        )  # fmt: skip

    asked = len(prompts) * num_generations
    return within_memory(work, config, "rollout_batch_size", asked, num_generations), started[-1]


@dataclass
class Answers:
    """One evaluation: a record for each question, in the order of the held-out rows."""

    greedy: list[dict]
    sampled: list[dict]

    def lines(self) -> list[dict]:
        """One line a question, for the run folder: the greedy answer, and the sampled one beside it."""
        return [g | {"sampled": {k: s[k] for k in ANSWER_FIELDS}} for g, s in zip(self.greedy, self.sampled)]

    @classmethod
    def from_lines(cls, lines: list[dict]) -> "Answers":
        """What `lines` has written."""
        return cls(lines, [line | line["sampled"] for line in lines])

    def summary(self) -> dict:
        """Accuracy and the like over all questions, and under `tasks` for each task."""
        tasks = dict.fromkeys(record["task"] for record in self.greedy)

        def of(task):
            greedy = [r for r in self.greedy if task in (None, r["task"])]
            sampled = [r for r in self.sampled if task in (None, r["task"])]
            return rates(greedy) | {f"{name}_sampled": value for name, value in rates(sampled).items() if name != "n"}

        return of(None) | {"tasks": {task: of(task) for task in tasks}}

    @property
    def accuracy(self) -> float:
        return sum(r["verdict"] == "right" for r in self.greedy) / len(self.greedy)

    def verdicts(self) -> "Answers":
        """The verdicts alone, which is all that `gain_over` needs."""
        return Answers(*([{"verdict": r["verdict"]} for r in records] for records in (self.greedy, self.sampled)))

    def gain_over(self, before: "Answers") -> dict:
        """The paired gain since another evaluation of the same questions, greedy and sampled."""
        gain, sampled = paired_gain(before.greedy, self.greedy), paired_gain(before.sampled, self.sampled)
        return gain | {"accuracy_sampled": sampled["accuracy"], "ci95_sampled": sampled["ci95"]}


ANSWER_FIELDS = ("completion", "verdict", "thinks", "finish_reason", "tokens", "reward", "rewards", "reasons")


def evaluate(
    policy: Policy,
    rows: list[dict],
    prompts: list[list[int]],
    rewards: Rewards,
    config: Config,
    step: int,
    on_finished: Callable[[int], None] = lambda n: None,
) -> Answers:
    """Answer every held-out question greedily and sampled, and judge the answers by the reward file.

    prompts: the rows' prompts as token ids.
    """
    asked = policy, rows, prompts, rewards, config, step
    return Answers(answer(*asked, 0.0, on_finished), answer(*asked, config.temperature, on_finished))


def answer(
    policy: Policy,
    rows: list[dict],
    prompts: list[list[int]],
    rewards: Rewards,
    config: Config,
    step: int,
    temperature: float,
    on_finished: Callable[[int], None] = lambda n: None,
) -> list[dict]:
    """One record a question, answered at this temperature; 0 is greedily."""
    generator = torch.Generator(policy.device).manual_seed(EVAL_SEED)
    _, marking = marked_rollout(
        policy, rows, prompts, 1, Sampling(temperature), generator, rewards, config, step, on_finished
    )
    return [record(*scored) for scored in zip(*marking.results())]


def check_saved(policy: Policy, folder: Path, prompts: list[list[int]], config: Config) -> tuple[int, int]:
    """Ask some of the prompts of the policy in memory, of its LoRA read back from `folder`, and of the reference.

    Returns how many were asked, and how many of them the reference answers otherwise. Raises RunError where what was saved
    is not what is in memory.
    """
    probes = prompts[:: max(1, len(prompts) // 16)]

    def greedy_answers():
        generator, cut = torch.Generator(policy.device), config.max_completion_length

        def work():
            return rollout(policy, probes, 1, cut, Sampling(0), generator, config.rollout_batch_size)

        answers = within_memory(work, config, "rollout_batch_size", len(probes), 1)
        return [episode.completion_ids for episode in answers]

    in_memory = greedy_answers()
    with reloaded_adapter(policy, folder):
        if greedy_answers() != in_memory:
            raise RunError(f"{folder}, read back, answers otherwise than the policy in memory: do not use it")
    with policy.reference():
        return len(probes), sum(a != b for a, b in zip(in_memory, greedy_answers(), strict=True))


def best_of(evaluations: dict[int, dict]) -> int:
    """The step with the highest greedy accuracy, of equals the one with the highest sampled accuracy, then the first.

    evaluations: summaries by step.
    """
    return max(
        evaluations, key=lambda step: (evaluations[step]["accuracy"], evaluations[step]["accuracy_sampled"], -step)
    )


def record(completion: Completion, score: Score) -> dict:
    """One answered question as it is written into eval/*.jsonl."""
    row = completion.row
    return {
        "id": row["id"],
        "task": row["task"],
        "question": completion.prompt,
        "expected": row.get("tests") if row.get("answer") is None else row["answer"],
        "completion": completion.text,
        "verdict": score.verdict,
        "thinks": bool(completion.thinking),
        "finish_reason": "length" if completion.truncated else "stop",
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
