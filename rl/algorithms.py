"""The mathematics of the policy-gradient family as pure functions on tensors: advantages, losses, divergences.

Shapes: N completions in a step, B in a micro-batch, C the longest completion of a micro-batch. A mask is True on the
tokens of a completion, its first end-of-sequence token included. r is the ratio pi / pi_old of a token.

Sources: GRPO, arXiv 2402.03300; PPO, arXiv 1707.06347; DAPO, arXiv 2503.14476; Dr. GRPO, arXiv 2503.20783; the KL
estimators k1, k2, k3, http://joschu.net/blog/kl-approx.html; two-sided clipping, arXiv 2505.07291; GAE, arXiv 1506.02438;
RLOO, arXiv 2402.14740; REINFORCE++, arXiv 2501.03262; GSPO, arXiv 2507.18071; CISPO, arXiv 2506.13585; SAPO, arXiv
2511.20347; DPO, arXiv 2305.18290; REINFORCE, Williams 1992; process supervision, DeepSeekMath, arXiv 2402.03300.
"""

import math

import torch

ADVANTAGE_EPSILON = 1e-4  # keeps the division by a standard deviation finite; TRL's value
VARIANCE_FLOOR = 1e-8  # the same under a variance
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


def leave_one_out_advantages(rewards: torch.Tensor, num_generations: int) -> torch.Tensor:
    """RLOO: A_i = R_i - (sum of the others' R) / (G - 1), the mean of the rest of the group as the baseline.

    rewards: (N,), nan where ungraded: such a completion leaves its group and gets A = 0, as does one that is alone.
    """
    grouped = rewards.view(-1, num_generations)  # (P, G)
    graded = ~grouped.isnan()
    count = graded.sum(1, keepdim=True)
    grouped = grouped - grouped.gather(1, graded.int().argmax(1, keepdim=True))  # equal rewards give exactly 0
    others = (grouped.nansum(1, keepdim=True) - grouped) / (count - 1).clamp(min=1)
    return torch.where(graded & (count > 1), grouped - others, 0.0).view(-1)


def running_mean(mean: float | None, values: torch.Tensor, decay: float = 0.9) -> float | None:
    """The exponential running mean after one more step; None before the first. nan are left out."""
    values = values[~values.isnan()]
    if len(values) == 0:
        return mean
    return values.mean().item() if mean is None else decay * mean + (1 - decay) * values.mean().item()


def whiten(values: torch.Tensor, mask: torch.Tensor, shift_mean: bool = True) -> torch.Tensor:
    """(x - mean) / sqrt(variance + 1e-8) over the mask, 0 elsewhere; without shift_mean the mean stays. Any shape.

    The floor under the variance keeps rounding noise among equal values what it is.
    """
    chosen = values[mask]
    if len(chosen) < 2:
        return torch.where(mask, values, 0.0)
    mean = chosen.mean()
    whitened = (values - mean) / (chosen.var() + VARIANCE_FLOOR).sqrt()
    return torch.where(mask, whitened if shift_mean else whitened + mean, 0.0)


def whiten_by_token(advantages: torch.Tensor, lengths: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """REINFORCE++ with baseline: the advantages of completions (N,) whitened over all tokens of the batch, (N,).

    counted: (N,) bool; the others (ungraded, or masked out of the loss) stay out of it and get 0.
    """
    by_token = advantages[counted].repeat_interleave(lengths[counted])  # (tokens,)
    if not by_token.any():
        return torch.zeros_like(advantages)
    return torch.where(counted, (advantages - by_token.mean()) / (by_token.var() + VARIANCE_FLOOR).sqrt(), 0.0)


def generalised_advantages(
    rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    gamma: float = 1.0,
    lam: float = 1.0,
    last_values: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """GAE: delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lam A_{t+1}. Returns (advantages, returns), (B, T).

    rewards, values: (B, T), V_t the value of the state before action t. mask: True on actions; a masked step passes the
    carry and the next value through unchanged, so padding changes nothing. last_values: (B,) the value after the last
    action, 0 by default: an episode that ended; at a cut one may bootstrap. returns = A + V, before any whitening.
    """
    advantages = torch.zeros_like(values)
    carry = torch.zeros_like(values[:, 0])  # A_{t+1}
    following = torch.zeros_like(carry) if last_values is None else last_values.to(values)  # V_{t+1}
    for t in range(values.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + gamma * following - values[:, t]
        carry = torch.where(mask[:, t], delta + gamma * lam * carry, carry)
        following = torch.where(mask[:, t], values[:, t], following)
        advantages[:, t] = torch.where(mask[:, t], carry, 0.0)
    return advantages, torch.where(mask, advantages + values, 0.0)


def discounted_returns(rewards: torch.Tensor, mask: torch.Tensor, gamma: float = 1.0) -> torch.Tensor:
    """REINFORCE's G_t = sum over k of gamma^k r_{t+k}, (B, T): GAE with lam = 1 and no values."""
    return generalised_advantages(rewards, torch.zeros_like(rewards), mask, gamma)[1]


def reinforce_advantages(
    returns: torch.Tensor, mask: torch.Tensor, baseline: torch.Tensor | float = 0.0
) -> torch.Tensor:
    """REINFORCE: A_t = G_t - b, (B, T), with the returns of `discounted_returns` and a baseline b that is one number or (B, 1)."""
    return torch.where(mask, returns - baseline, 0.0)


def token_rewards(
    outcome: torch.Tensor,
    steps: list[list[tuple[int, float]]],
    mask: torch.Tensor,
    kl: torch.Tensor | None,
    beta: float,
) -> torch.Tensor:
    """PPO's r_t = -beta k1_t + 1[t is the last token] R + the process rewards of steps that end at t, (B, C).

    outcome: R, (B,), nan counts as 0. steps: for each completion (token index, value). kl: k1 of each token, (B, C), or None.
    """
    rewards = torch.zeros(mask.shape) if kl is None else torch.where(mask, -beta * kl, 0.0)
    last = mask.sum(1) - 1
    rewards[torch.arange(len(mask)), last] += outcome.nan_to_num(nan=0.0)
    for row, found in enumerate(steps):
        for position, value in found:
            rewards[row, position] += value
    return rewards


def process_advantages(
    steps: list[list[tuple[int, float]]], lengths: list[int], num_generations: int
) -> list[torch.Tensor]:
    """Process supervision in GRPO: the advantage of a token is the sum of the normalised rewards of the steps at or after it.

    steps: for each completion (token index, value). Whatever scale_rewards says, the values are normalised over all of a
    group's: (value - mean) / (standard deviation + 1e-4). lengths: tokens of each completion. Returns one (C,) tensor for each.
    """
    advantages = [torch.zeros(n) for n in lengths]
    for first in range(0, len(steps), num_generations):
        group = range(first, min(first + num_generations, len(steps)))
        values = torch.tensor([value for i in group for _, value in steps[i]])
        if len(values) < 2:
            continue
        centred = values - values[0]  # equal values give exactly 0
        normalised = iter(((centred - centred.mean()) / (centred.std() + ADVANTAGE_EPSILON)).tolist())
        for i in group:
            for position, _ in steps[i]:
                advantages[i][: position + 1] += next(normalised)
    return advantages


def overlong_penalty(lengths: torch.Tensor, max_length: int, cache: int) -> torch.Tensor:
    """DAPO's soft overlong punishment: 0 up to max_length - cache, then falling to -1 at max_length. (N,) tokens."""
    return ((max_length - cache - lengths) / cache).clamp(-1.0, 0.0)


def varied_groups(rewards: torch.Tensor, num_generations: int) -> torch.Tensor:
    """Whether the rewards of a group differ, (P,) bool: else it teaches nothing. rewards: (N,), nan where ungraded."""
    grouped = rewards.view(-1, num_generations)
    highest = grouped.nan_to_num(nan=-torch.inf).max(1).values
    lowest = grouped.nan_to_num(nan=torch.inf).min(1).values
    return highest > lowest


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


def sequence_ratio(logprobs: torch.Tensor, old_logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """GSPO's ratio of a whole completion, exp(mean of log pi - log pi_old), the same at each of its tokens, (B, C).

    Its gradient goes through all of them, each with weight 1 / length. 1 where masked.
    """
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    mean = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)  # (B, 1)
    return torch.where(mask, mean.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp().expand_as(log_ratio), 1.0)


def cispo_loss(ratio: torch.Tensor, logprobs: torch.Tensor, advantages: torch.Tensor, ceiling: float) -> torch.Tensor:
    """CISPO: -sg[min(r, ceiling)] A log pi of each token, (B, C): the weight is clipped, no token loses its gradient."""
    return -ratio.detach().clamp(max=ceiling) * advantages * logprobs


def sapo_loss(
    ratio: torch.Tensor, advantages: torch.Tensor, positive: float = 1.0, negative: float = 1.05
) -> torch.Tensor:
    """SAPO: -sigmoid(tau (r - 1)) 4 / tau A of each token, (B, C), a soft gate in place of the clip; tau by the sign of A."""
    tau = torch.where(advantages > 0, positive, negative)
    return -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * advantages


def dpo_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    reference_chosen: torch.Tensor,
    reference_rejected: torch.Tensor,
    beta: float,
) -> torch.Tensor:
    """DPO: -log sigmoid(beta ((log pi - log pi_ref)(chosen) - (log pi - log pi_ref)(rejected))), (pairs,).

    Each argument: the summed log-probabilities of a completion, (pairs,).
    """
    margin = (chosen - reference_chosen) - (rejected - reference_rejected)
    return -torch.nn.functional.logsigmoid(beta * margin)


def preference_signs(rewards: torch.Tensor, num_generations: int) -> torch.Tensor:
    """DPO's pairs: 1 for the best completion of each group whose rewards differ, -1 for its worst, 0 for all others, (N,).

    rewards: (N,), nan where ungraded: such a completion is never chosen.
    """
    signs = torch.zeros(len(rewards))
    for first in range(0, len(rewards), num_generations):
        group = rewards[first : first + num_generations]
        best, worst = group.nan_to_num(nan=-torch.inf).argmax(), group.nan_to_num(nan=torch.inf).argmin()
        if group[best] > group[worst]:
            signs[first + best], signs[first + worst] = 1.0, -1.0
    return signs


def clipped_value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, cliprange: float | None = 0.2
) -> torch.Tensor:
    """PPO's value loss of each token, 0.5 max((V - R)^2, (clip(V, V_old +- cliprange) - R)^2), (B, C). None: no clipping."""
    loss = (values - returns).square()
    if cliprange is not None:
        clipped = torch.maximum(torch.minimum(values, old_values + cliprange), old_values - cliprange)
        loss = torch.maximum(loss, (clipped - returns).square())
    return 0.5 * loss


def explained_variance(values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over the mask: 1 is a perfect critic, 0 no better than a constant."""
    values, returns = values[mask], returns[mask]
    if len(returns) < 2 or returns.var() < VARIANCE_FLOOR:
        return math.nan
    return (1 - (returns - values).var() / returns.var()).item()


def adapted_beta(beta: float, kl: float, target: float, rate: float = 0.1) -> float:
    """A KL weight that follows a target (Ziegler et al., arXiv 1909.08593): beta (1 + rate clip(kl / target - 1, -0.2, 0.2))."""
    return beta * (1 + rate * min(max(kl / target - 1, -0.2), 0.2))


def policy_loss(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, config
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of each token, (B, C), by the settings `loss_type`, `importance_sampling_level` and the like, and its ratio."""
    by_sequence = config.importance_sampling_level == "sequence"
    ratio = (sequence_ratio if by_sequence else token_ratio)(logprobs, old_logprobs, mask)
    if config.loss_type == "cispo":
        return cispo_loss(ratio, logprobs, advantages, config.epsilon_high), ratio
    if config.loss_type == "sapo":
        return sapo_loss(ratio, advantages, config.sapo_temperature_pos, config.sapo_temperature_neg), ratio
    return clipped_policy_loss(ratio, advantages, config.epsilon, config.epsilon_high, config.delta), ratio


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


def truncated_importance_weights(old: torch.Tensor, sampled: torch.Tensor, cap: float) -> torch.Tensor:
    """min(pi_old / pi_sampler, cap) for each token, (B, C): what the sampler drew too often counts less.

    old: log-probabilities by the trainer before the first update, sampled: those of the sampler, whose kernels or rounded
    weights differ. Truncated importance sampling, as for off-policy actors in IMPALA (arXiv 1802.01561).
    """
    return (old - sampled).clamp(-20, 20).exp().clamp(max=cap)


def token_weights(
    mask: torch.Tensor, loss_type: str, num_tokens: int, num_sequences: int, max_completion_length: int
) -> torch.Tensor:
    """The weight of each token in the loss, (B, C): the loss is sum(weight * token loss), however it is split.

    num_tokens and num_sequences belong to the WHOLE optimizer step, not to the micro-batch, so the gradient is the
    same for every split. dapo, cispo: 1 / num_tokens. grpo, sapo: 1 / (length of the sequence * num_sequences). dr_grpo:
    1 / (num_sequences * max_completion_length). num_sequences counts masked-out completions, num_tokens does not.
    """
    if loss_type in ("dapo", "cispo"):
        return mask / max(num_tokens, 1)
    if loss_type in ("grpo", "sapo"):
        return mask / (mask.sum(1, keepdim=True).clamp(min=1) * max(num_sequences, 1))
    if loss_type == "dr_grpo":
        return mask / (max(num_sequences, 1) * max_completion_length)
    raise ValueError(f"loss_type is {loss_type!r}: expected dapo, cispo, grpo, sapo or dr_grpo")


def clipped_tokens(
    ratio: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, config
) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of tokens whose gradient the clipping took: (below 1 - epsilon with A < 0, above with A > 0).

    Of cispo, which takes none: (0, tokens whose weight it holds at the ceiling). sapo clips nothing.
    """
    if config.loss_type == "sapo":
        return mask.new_zeros(()), mask.new_zeros(())
    if config.loss_type == "cispo":
        return mask.new_zeros(()), ((ratio > config.epsilon_high) & (advantages != 0) & mask).sum()
    high = 1 + (config.epsilon if config.epsilon_high is None else config.epsilon_high)
    low = 1 - config.epsilon
    return ((ratio < low) & (advantages < 0) & mask).sum(), ((ratio > high) & (advantages > 0) & mask).sum()
