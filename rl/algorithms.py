"""The mathematics of GRPO as pure functions on tensors.

Shapes: N completions in a step, B in a micro-batch, C the longest completion of a micro-batch. A mask is True on the
tokens of a completion, its first end-of-sequence token included. r is the ratio pi / pi_old of a token.

Sources: GRPO, arXiv 2402.03300; PPO, arXiv 1707.06347; DAPO, arXiv 2503.14476; Dr. GRPO, arXiv 2503.20783; the KL
estimators k1, k2, k3, http://joschu.net/blog/kl-approx.html; two-sided clipping, arXiv 2505.07291.
"""

import torch

ADVANTAGE_EPSILON = 1e-4  # keeps the division by a standard deviation finite; TRL's value
MAX_LOG_RATIO = 20.0  # beyond it exp() would leave the range of fp32 sums


def group_advantages(rewards: torch.Tensor, num_generations: int, scale_rewards: str = "group") -> torch.Tensor:
    """Advantages A = (R - mean of the group) / (standard deviation + 1e-4), GRPO's critic-free baseline.

    rewards: (N,), groups of num_generations in a row; nan marks an ungraded completion, which leaves its group's mean
    and deviation and gets A = 0. scale_rewards: divide by the deviation of the "group", of the whole "batch" (both with
    n - 1), or by nothing ("none", Dr. GRPO). Returns (N,).
    """
    grouped = rewards.view(-1, num_generations)  # (P, G)
    graded = ~grouped.isnan()
    count = graded.sum(1, keepdim=True)
    # From the group's first graded reward, so that equal rewards give exactly 0, not a rounding error over 1e-4.
    grouped = grouped - grouped.gather(1, graded.int().argmax(1, keepdim=True))
    mean = grouped.nansum(1, keepdim=True) / count.clamp(min=1)
    centred = torch.where(graded, grouped - mean, 0.0)  # (P, G)
    if scale_rewards == "group":
        deviation = (centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
        centred = centred / (deviation + ADVANTAGE_EPSILON)
    elif scale_rewards == "batch":
        values = rewards[~rewards.isnan()]
        deviation = values.std() if len(values) > 1 else rewards.new_zeros(())
        centred = centred / (deviation + ADVANTAGE_EPSILON)
    elif scale_rewards != "none":
        raise ValueError(f"scale_rewards is {scale_rewards!r}: expected group, batch or none")
    return centred.view(-1)


def groups_without_variance(rewards: torch.Tensor, num_generations: int) -> float:
    """Share of groups whose rewards are all the same: they teach nothing. rewards: (N,), nan where ungraded."""
    grouped = rewards.view(-1, num_generations)
    highest = grouped.nan_to_num(nan=-torch.inf).amax(1)
    lowest = grouped.nan_to_num(nan=torch.inf).amin(1)
    return (highest - lowest <= 1e-8).float().mean().item()


def token_ratio(logprobs: torch.Tensor, old_logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """r = exp(log pi - log pi_old) (B, C), the log-ratio clamped to +-20; 1 where masked, so that no inf * 0 arises."""
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def clipped_policy_loss(
    ratio: torch.Tensor,
    advantages: torch.Tensor,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
) -> torch.Tensor:
    """PPO's clipped loss of each token: -min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A), (B, C).

    epsilon_high defaults to epsilon; DAPO's clip-higher sets it larger. delta bounds r from above in the unclipped
    branch (two-sided clipping), which limits the loss where A < 0 and r is large.
    """
    clipped = ratio.clamp(1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high))
    if delta is not None:
        ratio = ratio.clamp(max=delta)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def kl_divergence(
    logprobs: torch.Tensor, reference_logprobs: torch.Tensor, mask: torch.Tensor, estimator: str = "k3"
) -> torch.Tensor:
    """An estimate of KL(pi || pi_ref) at each sampled token, (B, C), 0 where masked.

    k1 = log pi - log pi_ref; k2 = k1^2 / 2; k3 = exp(-k1) + k1 - 1. All are exactly 0 where the two agree.
    """
    k1 = torch.where(mask, logprobs - reference_logprobs, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if estimator == "k1":
        return k1
    if estimator == "k2":
        return k1.square() / 2
    if estimator == "k3":
        return torch.exp(-k1) + k1 - 1
    raise ValueError(f"kl_estimator is {estimator!r}: expected k1, k2 or k3")


def token_weights(
    mask: torch.Tensor, loss_type: str, num_tokens: int, num_sequences: int, max_completion_length: int
) -> torch.Tensor:
    """The weight of each token in the loss, (B, C): the loss is sum(weight * token loss), however it is split.

    num_tokens and num_sequences belong to the WHOLE optimizer step, not to the micro-batch, so the gradient is the
    same for every split. dapo: 1 / num_tokens. grpo: 1 / (length of the sequence * num_sequences). dr_grpo:
    1 / (num_sequences * max_completion_length). num_sequences counts masked-out completions, num_tokens does not.
    """
    if loss_type == "dapo":
        return mask / max(num_tokens, 1)
    if loss_type == "grpo":
        return mask / (mask.sum(1, keepdim=True).clamp(min=1) * max(num_sequences, 1))
    if loss_type == "dr_grpo":
        return mask / (max(num_sequences, 1) * max_completion_length)
    raise ValueError(f"loss_type is {loss_type!r}: expected dapo, grpo or dr_grpo")


def clip_shares(
    ratio: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, epsilon: float, epsilon_high: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of tokens whose gradient the clipping took: (below 1 - epsilon with A < 0, above with A > 0)."""
    high = 1 + (epsilon if epsilon_high is None else epsilon_high)
    return ((ratio < 1 - epsilon) & (advantages < 0) & mask).sum(), ((ratio > high) & (advantages > 0) & mask).sum()
