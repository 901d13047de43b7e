"""Values per token for one group of a step: tokens/000012.json for the page, and two metrics."""

import torch

from rl import algorithms
from rl.model.logprobs import completion_logprobs
from rl.rollout import Episode
from rl.run.metrics import mean
from rl.update import Updater, prompt_and_completion_ids


@torch.no_grad()
def inspect_tokens(updater: Updater, episodes: list[Episode]) -> dict:
    """Compute values per token for the group with the largest mean |advantage|, under the policy before its update.

    Returns:
        `prompt_id`, and a dict for each of the group's `completions` with lists of one value per token: tokens,
        logprobs, sampler_logprobs, advantages, entropy, kl, with a critic also values, and in episodes of several turns
        is_sampled, which is False for the tokens of an environment.
    """
    policy = updater.policy

    def total_advantage(group: list[Episode]) -> float:
        return sum(e.advantages.abs().mean().item() for e in group if e.advantages is not None)

    group = max(updater.groups(episodes), key=total_advantage)
    by_episode = {}

    def inspect() -> None:
        for batch in updater.micro_batches(group):
            logprobs, mask, entropy = completion_logprobs(
                policy, *prompt_and_completion_ids(batch), with_entropy=True
            )  # (B, C)
            with policy.reference():
                reference, _, _ = completion_logprobs(policy, *prompt_and_completion_ids(batch))
            kl = algorithms.kl_divergence(logprobs, reference, mask, "k3")
            for i, episode in enumerate(batch):
                by_episode[id(episode)] = describe(episode, logprobs[i], entropy[i], kl[i])

    def describe(episode: Episode, logprobs, entropy, kl) -> dict:
        n = len(episode.completion_ids)  # the rest is padding
        advantages = torch.zeros(n) if episode.advantages is None else episode.advantages
        columns = {
            "tokens": [policy.tokenizer.decode([token]) for token in episode.completion_ids],
            "logprobs": rounded(logprobs[:n]),
            "sampler_logprobs": rounded(torch.tensor(episode.sampler_logprobs)),
            "advantages": rounded(advantages),
            "entropy": rounded(entropy[:n]),
            "kl": rounded(kl[:n]),
        }
        if episode.is_sampled is not None:
            columns["is_sampled"] = episode.is_sampled
        if episode.values is not None:
            columns["values"] = rounded(episode.values[:n])
        return columns

    updater.retry_on_oom(inspect, group)
    return {
        "prompt_id": group[0].completion.row["id"],
        "completions": [by_episode[id(episode)] for episode in group],
    }


def describe_tokens(tokens: dict) -> dict[str, float]:
    """Return the metrics of the inspected group, before the update.

    `kl` is the mean k3 estimate of the KL from the reference. `sampling_logp_difference` is the absolute difference of
    the sampler's and the trainer's log-probabilities, which should be equal. If the update computes these metrics over
    all completions, its values replace them: `kl` if beta is set, the difference in bf16 and fp16.
    """
    differences = []
    kl = []
    for c in tokens["completions"]:
        flags = c.get("is_sampled") or [True] * len(c["tokens"])
        differences += [abs(a - b) for a, b, flag in zip(c["logprobs"], c["sampler_logprobs"], flags) if flag]
        kl += [value for value, flag in zip(c["kl"], flags) if flag]
    return {
        "kl": mean(kl),
        "sampling/sampling_logp_difference/mean": mean(differences),
        "sampling/sampling_logp_difference/max": max(differences),
    }


def rounded(values: torch.Tensor) -> list[float]:
    return [round(value, 5) for value in values.tolist()]
