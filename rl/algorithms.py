"""Policy-gradient algorithms as pure functions on tensors: advantages, returns, losses and KL estimates.

Shapes: N completions of a step, B rows of a micro-batch, C completion tokens, G completions of a group. A mask is True
on the tokens of a completion, including its first end-of-sequence token. The ratio r is pi / pi_old of a token.
"""

import math

import torch

ADVANTAGE_EPSILON = 1e-4  # keeps the division by a standard deviation finite; TRL's value
VARIANCE_FLOOR = 1e-8  # keeps the division by the square root of a variance finite
MAX_LOG_RATIO = 20.0  # nats; keeps sums of exp(log-ratio) in the range of fp32

StepRewards = list[tuple[int, float]]  # process rewards of one completion: (index of the step's last token, value)


def group_advantages(rewards: torch.Tensor, num_generations: int, scale_rewards: str = "group") -> torch.Tensor:
    """Return the advantages of GRPO (arXiv 2402.03300), (N,): A = (R - group mean) / (standard deviation + 1e-4).

    Args:
        rewards: (N,), ordered by group. Completions with nan are ungraded: excluded from their group, with A = 0.
        scale_rewards: Divide by the standard deviation (with n - 1) of the "group" or of the whole "batch", or do not
            divide: "none", as in Dr. GRPO (arXiv 2503.20783).
    """
    grouped = rewards.view(-1, num_generations)  # (N / G, G)
    graded = ~grouped.isnan()
    count = graded.sum(1, keepdim=True)
    # Shift by the group's first graded reward, so that equal rewards give exactly 0, not a rounding error over 1e-4.
    grouped = grouped - grouped.gather(1, graded.int().argmax(1, keepdim=True))
    mean = grouped.nansum(1, keepdim=True) / count.clamp(min=1)
    centred = torch.where(graded, grouped - mean, 0.0)  # (N / G, G)
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
    """Return the advantages of RLOO (arXiv 2402.14740), (N,): A_i = R_i - mean of the G - 1 other rewards of the group.

    Ungraded completions (nan in rewards, (N,)) are excluded from their group and get A = 0, as does a lone graded one.
    """
    grouped = rewards.view(-1, num_generations)  # (N / G, G)
    graded = ~grouped.isnan()
    count = graded.sum(1, keepdim=True)
    grouped = grouped - grouped.gather(1, graded.int().argmax(1, keepdim=True))  # equal rewards give exactly 0
    others = (grouped.nansum(1, keepdim=True) - grouped) / (count - 1).clamp(min=1)
    return torch.where(graded & (count > 1), grouped - others, 0.0).view(-1)


def running_mean(mean: float | None, values: torch.Tensor, decay: float = 0.9) -> float | None:
    """Return the exponential running mean, updated with the mean of values. nan is ignored; None means no value yet."""
    values = values[~values.isnan()]
    if len(values) == 0:
        return mean
    return values.mean().item() if mean is None else decay * mean + (1 - decay) * values.mean().item()


def whiten(values: torch.Tensor, mask: torch.Tensor, shift_mean: bool = True) -> torch.Tensor:
    """Whiten the values in the mask: (x - mean) / sqrt(variance + 1e-8). All others become 0. Accepts any shape.

    With shift_mean=False the mean is added back. The 1e-8 keeps rounding noise among equal values from being amplified.
    """
    selected = values[mask]
    if len(selected) < 2:
        return torch.where(mask, values, 0.0)
    mean = selected.mean()
    whitened = (values - mean) / (selected.var() + VARIANCE_FLOOR).sqrt()
    return torch.where(mask, whitened if shift_mean else whitened + mean, 0.0)


def whiten_by_token(advantages: torch.Tensor, lengths: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Whiten advantages, (N,), over the tokens of the batch, as in REINFORCE++ with baseline (arXiv 2501.03262).

    mask: (N,), False for completions that are ungraded or masked out of the loss: they are excluded and get 0.
    """
    by_token = advantages[mask].repeat_interleave(lengths[mask])  # (tokens,)
    if not by_token.any():
        return torch.zeros_like(advantages)
    return torch.where(mask, (advantages - by_token.mean()) / (by_token.var() + VARIANCE_FLOOR).sqrt(), 0.0)


def generalised_advantages(
    rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    gamma: float = 1.0,
    lam: float = 1.0,
    last_values: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the advantages and returns of GAE (arXiv 1506.02438), (N, C) each, before any whitening.

    delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lam A_{t+1}, return_t = A_t + V_t.

    Args:
        rewards, values: (N, C); V_t is the value of the state before action t.
        mask: (N, C), True on actions; all other positions are skipped, so padding has no effect.
        last_values: (N,), values after the last actions: 0 (default) for episodes that ended, V to bootstrap.
    """
    advantages = torch.zeros_like(values)
    next_advantages = torch.zeros_like(values[:, 0])  # A_{t+1}
    next_values = torch.zeros_like(next_advantages) if last_values is None else last_values.to(values)  # V_{t+1}
    for t in range(values.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + gamma * next_values - values[:, t]
        next_advantages = torch.where(mask[:, t], delta + gamma * lam * next_advantages, next_advantages)
        next_values = torch.where(mask[:, t], values[:, t], next_values)
        advantages[:, t] = torch.where(mask[:, t], next_advantages, 0.0)
    return advantages, torch.where(mask, advantages + values, 0.0)


def discounted_returns(rewards: torch.Tensor, mask: torch.Tensor, gamma: float = 1.0) -> torch.Tensor:
    """Return G_t = sum over k of gamma^k r_{t+k}, (N, C): the returns of GAE with lam = 1 and values of 0."""
    return generalised_advantages(rewards, torch.zeros_like(rewards), mask, gamma)[1]


def reinforce_advantages(
    returns: torch.Tensor, mask: torch.Tensor, baseline: torch.Tensor | float = 0.0
) -> torch.Tensor:
    """Return the advantages of REINFORCE (Williams 1992), (N, C): A_t = G_t - b, with b a number or of shape (N, 1)."""
    return torch.where(mask, returns - baseline, 0.0)


def token_rewards(
    outcome: torch.Tensor, steps: list[StepRewards], mask: torch.Tensor, kl: torch.Tensor | None, beta: float
) -> torch.Tensor:
    """Return PPO's rewards, (N, C): r_t = -beta k1_t + 1[t is the last token] R + process rewards of steps ending at t.

    outcome: R, (N,); nan counts as 0. kl: k1, (N, C), or None.
    """
    rewards = torch.zeros(mask.shape) if kl is None else torch.where(mask, -beta * kl, 0.0)
    last = (mask * torch.arange(mask.shape[1])).amax(1)  # (N,)
    rewards[torch.arange(len(mask)), last] += outcome.nan_to_num(nan=0.0)
    for row, step_rewards in enumerate(steps):
        for position, value in step_rewards:
            rewards[row, position] += value
    return rewards


def process_advantages(steps: list[StepRewards], lengths: list[int], num_generations: int) -> list[torch.Tensor]:
    """Return GRPO's advantages under process supervision (arXiv 2402.03300), (C,) for each completion.

    A token's advantage is the sum of the normalised rewards of the steps that end at or after it. All step rewards of
    a group are normalised together, regardless of `scale_rewards`: (value - mean) / (standard deviation + 1e-4).
    """
    advantages = [torch.zeros(n) for n in lengths]
    for start in range(0, len(steps), num_generations):
        group = range(start, min(start + num_generations, len(steps)))
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
    """Return DAPO's soft overlong punishment, (N,): 0 up to max_length - cache tokens, falling to -1 at max_length."""
    return ((max_length - cache - lengths) / cache).clamp(-1.0, 0.0)


def has_varied_rewards(rewards: torch.Tensor, num_generations: int) -> torch.Tensor:
    """Return for each group whether its rewards differ, (N / G,) bool. nan in rewards, (N,), is ignored."""
    grouped = rewards.view(-1, num_generations)
    highest = grouped.nan_to_num(nan=-torch.inf).max(1).values
    lowest = grouped.nan_to_num(nan=torch.inf).min(1).values
    return highest > lowest


def token_ratio(logprobs: torch.Tensor, old_logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return r = exp(log pi - log pi_old), (B, C), with the log-ratio clamped to +-20; 1 outside the mask."""
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def clipped_policy_loss(
    ratio: torch.Tensor,
    advantages: torch.Tensor,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
) -> torch.Tensor:
    """Return PPO's clipped token loss (arXiv 1707.06347), (B, C): -min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A).

    Args:
        epsilon_high: Defaults to epsilon; larger in DAPO's clip-higher (arXiv 2503.14476).
        delta: Upper bound of r in the unclipped term, effective if A < 0 (two-sided clipping, arXiv 2505.07291).
    """
    clipped = ratio.clamp(1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high))
    if delta is not None:
        ratio = ratio.clamp(max=delta)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def sequence_ratio(logprobs: torch.Tensor, old_logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return GSPO's ratio (arXiv 2507.18071), (B, C): exp(mean of log pi - log pi_old) at every token of a completion.

    The gradient flows to each token with weight 1 / length. The ratio is 1 outside the mask.
    """
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    mean = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)  # (B, 1)
    return torch.where(mask, mean.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp().expand_as(log_ratio), 1.0)


def cispo_loss(ratio: torch.Tensor, logprobs: torch.Tensor, advantages: torch.Tensor, ceiling: float) -> torch.Tensor:
    """Return CISPO's token loss (arXiv 2506.13585), (B, C): -sg[min(r, ceiling)] A log pi.

    Only the weight is clipped, so that no token loses its gradient.
    """
    return -ratio.detach().clamp(max=ceiling) * advantages * logprobs


def sapo_loss(
    ratio: torch.Tensor, advantages: torch.Tensor, tau_positive: float = 1.0, tau_negative: float = 1.05
) -> torch.Tensor:
    """Return SAPO's token loss (arXiv 2511.20347), (B, C): -sigmoid(tau (r - 1)) 4 / tau A, a soft gate, not a clip."""
    tau = torch.where(advantages > 0, tau_positive, tau_negative)
    return -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * advantages


def dpo_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    reference_chosen: torch.Tensor,
    reference_rejected: torch.Tensor,
    beta: float,
) -> torch.Tensor:
    """Return DPO's loss (arXiv 2305.18290), (pairs,), from the log-probabilities of whole completions, (pairs,) each.

    -log sigmoid(beta ((log pi - log pi_ref)(chosen) - (log pi - log pi_ref)(rejected)))
    """
    margin = (chosen - reference_chosen) - (rejected - reference_rejected)
    return -torch.nn.functional.logsigmoid(beta * margin)


def preference_signs(rewards: torch.Tensor, num_generations: int) -> torch.Tensor:
    """Return the signs of DPO's pairs, (N,): 1 for the best completion of a group, -1 for the worst, 0 for the others.

    Groups with equal rewards have no pair. Ungraded completions (nan in rewards, (N,)) are never part of a pair.
    """
    signs = torch.zeros(len(rewards))
    for start in range(0, len(rewards), num_generations):
        group = rewards[start : start + num_generations]
        best, worst = group.nan_to_num(nan=-torch.inf).argmax(), group.nan_to_num(nan=torch.inf).argmin()
        if group[best] > group[worst]:
            signs[start + best], signs[start + worst] = 1.0, -1.0
    return signs


def clipped_value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, cliprange: float | None = 0.2
) -> torch.Tensor:
    """Return PPO's token value loss, (B, C): 0.5 max((V - R)^2, (clip(V, V_old +- cliprange) - R)^2).

    R is the return of each token. With cliprange=None the loss is not clipped.
    """
    loss = (values - returns).square()
    if cliprange is not None:
        clipped = torch.maximum(torch.minimum(values, old_values + cliprange), old_values - cliprange)
        loss = torch.maximum(loss, (clipped - returns).square())
    return 0.5 * loss


def explained_variance(values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> float:
    """Return 1 - Var(returns - values) / Var(returns) over the mask: 1 if perfect, 0 if no better than a constant."""
    values, returns = values[mask], returns[mask]
    if len(returns) < 2 or returns.var() < VARIANCE_FLOOR:
        return math.nan
    return (1 - (returns - values).var() / returns.var()).item()


def adapted_beta(beta: float, kl: float, target: float, rate: float = 0.1) -> float:
    """Return the next beta of the adaptive KL controller of Ziegler et al. (arXiv 1909.08593)."""
    return beta * (1 + rate * min(max(kl / target - 1, -0.2), 0.2))


def policy_loss(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, config
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the token loss of the configured `loss_type` and the ratio of `importance_sampling_level`, (B, C) each."""
    is_sequence_level = config.importance_sampling_level == "sequence"
    ratio = (sequence_ratio if is_sequence_level else token_ratio)(logprobs, old_logprobs, mask)
    if config.loss_type == "cispo":
        return cispo_loss(ratio, logprobs, advantages, config.epsilon_high), ratio
    if config.loss_type == "sapo":
        return sapo_loss(ratio, advantages, config.sapo_temperature_pos, config.sapo_temperature_neg), ratio
    return clipped_policy_loss(ratio, advantages, config.epsilon, config.epsilon_high, config.delta), ratio


def kl_divergence(
    logprobs: torch.Tensor, reference_logprobs: torch.Tensor, mask: torch.Tensor, estimator: str = "k3"
) -> torch.Tensor:
    """Estimate KL(pi || pi_ref) at each sampled token, (B, C), 0 outside the mask (joschu.net/blog/kl-approx.html).

    k1 = log pi - log pi_ref; k2 = k1^2 / 2; k3 = exp(-k1) + k1 - 1. All are exactly 0 if pi = pi_ref.
    """
    k1 = torch.where(mask, logprobs - reference_logprobs, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if estimator == "k1":
        return k1
    if estimator == "k2":
        return k1.square() / 2
    if estimator == "k3":
        return torch.exp(-k1) + k1 - 1
    raise ValueError(f"kl_estimator is {estimator!r}: expected k1, k2 or k3")


def truncated_importance_weights(
    old_logprobs: torch.Tensor, sampler_logprobs: torch.Tensor, cap: float
) -> torch.Tensor:
    """Return min(pi_old / pi_sampler, cap) of each token, (B, C).

    Truncated importance sampling, as in IMPALA (arXiv 1802.01561), corrects for different kernels or rounded weights of
    the sampler. old_logprobs are computed by the trainer before the first update.
    """
    return (old_logprobs - sampler_logprobs).clamp(-20, 20).exp().clamp(max=cap)


def token_weights(
    mask: torch.Tensor, loss_type: str, num_tokens: int, num_sequences: int, max_completion_length: int
) -> torch.Tensor:
    """Return the weight of each token in the loss, (B, C): loss = sum(weight * token loss).

    dapo, cispo: 1 / num_tokens. grpo, sapo: 1 / (completion length * num_sequences). dr_grpo: 1 / (num_sequences *
    max_completion_length). Both counts cover the WHOLE optimizer step, so that the gradient does not depend on the
    micro-batches. num_sequences includes completions that are masked out of the loss; num_tokens does not.
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
    """Count the tokens whose gradient is clipped: (r < 1 - epsilon and A < 0, r > 1 + epsilon_high and A > 0).

    For cispo, count the tokens whose weight is at the ceiling: (0, count). sapo does not clip: (0, 0).
    """
    if config.loss_type == "sapo":
        return mask.new_zeros(()), mask.new_zeros(())
    if config.loss_type == "cispo":
        return mask.new_zeros(()), ((ratio > config.epsilon_high) & (advantages != 0) & mask).sum()
    high = 1 + (config.epsilon if config.epsilon_high is None else config.epsilon_high)
    low = 1 - config.epsilon
    return ((ratio < low) & (advantages < 0) & mask).sum(), ((ratio > high) & (advantages > 0) & mask).sum()
