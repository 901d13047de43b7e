"""rl/algorithms.py (algorithms beyond GRPO) against values computed by hand, limiting cases and properties."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rl import algorithms as alg

NAN = math.nan


def close(result, expected, tolerance=1e-6):
    torch.testing.assert_close(torch.as_tensor(result), torch.tensor(expected), atol=tolerance, rtol=0)


# --- advantages


def test_leave_one_out_by_hand():
    close(alg.leave_one_out_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0]), 4), [2 / 3, -2 / 3, -2 / 3, 2 / 3])
    close(
        alg.leave_one_out_advantages(torch.tensor([3.0, 1.0, NAN, NAN, 5.0, NAN]), 3), [2.0, -2.0, 0.0, 0.0, 0.0, 0.0]
    )
    assert alg.leave_one_out_advantages(torch.tensor([0.1] * 8), 8).abs().max() == 0  # exactly 0


def test_leave_one_out_is_the_scaled_centred_reward():
    rewards = torch.randn(24)
    expected = alg.group_advantages(rewards, 8, "none") * 8 / 7
    close(alg.leave_one_out_advantages(rewards, 8), expected.tolist())


def test_reinforce_by_hand():
    returns = alg.discounted_returns(torch.tensor([[0.0, 0.0, 1.0]]), torch.ones(1, 3, dtype=torch.bool), gamma=0.5)
    close(returns, [[0.25, 0.5, 1.0]])
    mask = torch.tensor([[True, True, False]])
    close(alg.reinforce_advantages(returns, mask, 0.25), [[0.0, 0.25, 0.0]])


def test_running_mean_by_hand():
    assert alg.running_mean(None, torch.tensor([1.0, NAN, 0.0])) == 0.5
    assert alg.running_mean(0.5, torch.tensor([1.0])) == pytest.approx(0.55)
    assert alg.running_mean(0.5, torch.tensor([NAN])) == 0.5 and alg.running_mean(None, torch.tensor([NAN])) is None


def test_token_rewards_by_hand():
    mask = torch.tensor([[True, True, True], [True, True, False]])
    kl = torch.tensor([[0.1, -0.2, 0.3], [0.5, 0.5, 9.0]])
    steps = [[(0, -0.25), (2, 0.5)], []]
    close(
        alg.token_rewards(torch.tensor([1.0, NAN]), steps, mask, kl, 2.0),
        [[-0.2 - 0.25, 0.4, -0.6 + 1.0 + 0.5], [-1.0, -1.0, 0.0]],
    )
    close(alg.token_rewards(torch.tensor([1.0, 2.0]), [[], []], mask, None, 2.0), [[0.0, 0.0, 1.0], [0.0, 2.0, 0.0]])


def test_whitening_by_hand():
    values, mask = torch.tensor([[1.0, 3.0, 100.0]]), torch.tensor([[True, True, False]])
    close(alg.whiten(values, mask), [[-1 / math.sqrt(2), 1 / math.sqrt(2), 0.0]])
    close(alg.whiten(values, mask, shift_mean=False), [[2 - 1 / math.sqrt(2), 2 + 1 / math.sqrt(2), 0.0]])
    close(alg.whiten(values, torch.tensor([[True, False, False]])), [[1.0, 0.0, 0.0]])


def test_whitening_does_not_amplify_rounding_noise():
    """Equal advantages stay near 0 despite an inexact fp32 mean, so that all-right batches are not punished."""
    constant, mask = torch.full((1, 5000), 1.1), torch.ones(1, 5000, dtype=torch.bool)
    assert alg.whiten(constant, mask).abs().max() < 0.01
    lengths = torch.full((100,), 50)
    assert alg.whiten_by_token(torch.full((100,), 1.1), lengths, torch.ones(100, dtype=torch.bool)).abs().max() < 0.01


def test_whitening_by_token_by_hand():
    """Tokens 1, 1, 1, -1: mean 0.5, standard deviation 1. The completion outside the mask keeps 0."""
    advantages, lengths = torch.tensor([1.0, -1.0, 0.0]), torch.tensor([3, 1, 2])
    close(alg.whiten_by_token(advantages, lengths, torch.tensor([True, True, False])), [0.5, -1.5, 0.0])
    close(alg.whiten_by_token(torch.zeros(3), lengths, torch.tensor([True, True, True])), [0.0, 0.0, 0.0])


def test_gae_by_hand():
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.25, 0.5]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    advantages, returns = alg.generalised_advantages(rewards, values, mask, gamma=0.5, lam=0.5)
    # deltas: 0.5*0.25-0.5 = -0.375, 0.5*0.5-0.25 = 0, 1-0.5 = 0.5; A_t = delta_t + 0.25 A_{t+1}
    close(advantages, [[-0.375 + 0.25 * 0.125, 0.125, 0.5]])
    close(returns, [[0.5 - 0.375 + 0.03125, 0.375, 1.0]])


def random_episodes(seed, rows=5, width=9):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, width + 1, (rows,), generator=generator)
    mask = torch.arange(width) < lengths[:, None]
    rewards, values = torch.randn(2, rows, width, generator=generator, dtype=torch.float64)
    return torch.where(mask, rewards, 7.0), torch.where(mask, values, -3.0), mask, lengths


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 1), st.floats(0, 1))
def test_gae_is_the_double_sum(seed, gamma, lam):
    """By definition A_t = sum over l of (gamma lam)^l delta_{t+l}. Values outside the mask have no effect."""
    rewards, values, mask, lengths = random_episodes(seed)
    advantages, returns = alg.generalised_advantages(rewards, values, mask, gamma, lam)
    for i, n in enumerate(lengths.tolist()):
        r, v = rewards[i, :n].tolist(), values[i, :n].tolist() + [0.0]
        deltas = [r[t] + gamma * v[t + 1] - v[t] for t in range(n)]
        expected = [sum((gamma * lam) ** k * deltas[t + k] for k in range(n - t)) for t in range(n)]
        torch.testing.assert_close(advantages[i, :n], torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=1e-9)
        assert not advantages[i, n:].any() and not returns[i, n:].any()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_gae_limits(seed):
    """lam 0 gives the TD error, lam 1 the return minus the value."""
    rewards, values, mask, lengths = random_episodes(seed)
    next_values = torch.cat([values[:, 1:], torch.zeros(5, 1)], 1)
    next_values[torch.arange(5), lengths - 1] = 0.0
    td, _ = alg.generalised_advantages(rewards, values, mask, 0.9, 0.0)
    torch.testing.assert_close(td, torch.where(mask, rewards + 0.9 * next_values - values, 0.0))
    advantages, _ = alg.generalised_advantages(rewards, values, mask, 0.9, 1.0)
    returns = alg.discounted_returns(rewards, mask, 0.9)
    torch.testing.assert_close(advantages, torch.where(mask, returns - values, 0.0))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 4), st.integers(0, 4))
def test_gae_does_not_depend_on_padding(seed, before, after):
    rewards, values, mask, _ = random_episodes(seed)
    padded = [torch.nn.functional.pad(x, (before, after)) for x in (rewards, values, mask)]
    expected = alg.generalised_advantages(rewards, values, mask, 0.9, 0.8)
    for result, unpadded in zip(alg.generalised_advantages(*padded, 0.9, 0.8), expected):
        torch.testing.assert_close(result[:, before : before + 9], unpadded)


def test_gae_bootstraps_from_last_values():
    rewards, values, mask = torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    advantages, _ = alg.generalised_advantages(rewards, values, mask, 0.5, 1.0, last_values=torch.tensor([4.0]))
    close(advantages, [[1.0, 2.0]])


def test_process_advantages_by_hand():
    steps = [[(1, 1.0), (3, 0.0)], [(0, 1.0)]]  # values 1, 0, 1: mean 2/3, deviation 1/sqrt(3)
    high, low = (1 / 3) / (1 / math.sqrt(3) + 1e-4), (-2 / 3) / (1 / math.sqrt(3) + 1e-4)
    first, second = alg.process_advantages(steps, [5, 2], 2)
    close(first, [high + low, high + low, low, low, 0.0], 1e-5)
    close(second, [high, 0.0], 1e-5)
    equal, _ = alg.process_advantages([[(1, 0.1)], [(1, 0.1)]], [2, 2], 2)
    close(equal, [0.0, 0.0])  # equal rewards give no signal
    close(alg.process_advantages([[], []], [2, 1], 2)[0], [0.0, 0.0])


def test_overlong_penalty_by_hand():
    close(alg.overlong_penalty(torch.tensor([10, 80, 90, 100, 120]), 100, 20), [0.0, 0.0, -0.5, -1.0, -1.0])


# --- losses


def test_sequence_ratio_by_hand():
    logprobs, old = torch.tensor([[0.0, -1.0, -9.0]]), torch.tensor([[-1.0, -1.5, 5.0]])
    mask = torch.tensor([[True, True, False]])
    close(alg.sequence_ratio(logprobs, old, mask), [[math.exp(0.75), math.exp(0.75), 1.0]])


def test_cispo_by_hand_and_its_gradient():
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    ratio = (logprobs - torch.tensor([-3.0, -2.0])).exp()  # e^2, 1
    loss = alg.cispo_loss(ratio, logprobs, torch.tensor([1.0, -2.0]), ceiling=5.0)
    close(loss.detach(), [5.0, -4.0])
    loss.sum().backward()
    close(logprobs.grad, [-5.0, 2.0])  # the weight is a constant


def test_sapo_by_hand():
    loss = alg.sapo_loss(torch.tensor([1.0, 1.0, 2.0]), torch.tensor([1.0, -1.0, 1.0]))
    close(loss, [-2.0, 2 / 1.05, -4 / (1 + math.exp(-1))])
    ratio = torch.tensor([1.0], requires_grad=True)
    alg.sapo_loss(ratio, torch.tensor([1.0])).backward()
    close(ratio.grad, [-1.0])  # at r = 1 the gradient equals the gradient of -r A


def test_dpo_by_hand():
    arguments = [torch.tensor([x]) for x in (-1.0, -4.0, -2.0, -3.0)]
    close(alg.dpo_loss(*arguments, beta=0.5), [math.log(1 + math.exp(-0.5 * 2.0))])
    close(alg.dpo_loss(*[torch.tensor([-1.0])] * 4, beta=0.5), [math.log(2)])


def test_preference_signs():
    rewards = torch.tensor([0.0, 1.0, 0.5, 1.0, 1.0, 1.0, NAN, 0.2, 0.1, NAN, NAN, NAN, 0.3, NAN, NAN])
    close(alg.preference_signs(rewards, 3), [-1.0, 1, 0, 0, 0, 0, 0, 1, -1, 0, 0, 0, 0, 0, 0])


def test_value_loss_by_hand():
    values, old, returns = torch.tensor([1.0, 0.1, 0.5]), torch.tensor([0.0, 0.0, 0.0]), torch.tensor([1.0, 1.0, 0.0])
    close(alg.clipped_value_loss(values, old, returns, 0.2), [0.5 * 0.64, 0.5 * 0.81, 0.5 * 0.25])
    close(alg.clipped_value_loss(values, old, returns, None), [0.0, 0.5 * 0.81, 0.5 * 0.25])


def test_explained_variance():
    returns, mask = torch.tensor([0.0, 1.0, 2.0, 50.0]), torch.tensor([True, True, True, False])
    assert alg.explained_variance(returns, returns, mask) == 1.0
    assert alg.explained_variance(torch.full((4,), 0.3), returns, mask) == pytest.approx(0, abs=1e-6)
    noise = 1.1 + 1e-7 * torch.tensor([1.0, -1.0, 1.0, 0.0])
    assert math.isnan(alg.explained_variance(torch.rand(4), noise, mask))  # returns without variance
    assert math.isnan(alg.explained_variance(returns, returns, torch.tensor([True, False, False, False])))
    assert math.isnan(alg.explained_variance(returns, torch.ones(4), mask))


def test_adapted_beta_by_hand():
    assert alg.adapted_beta(0.1, kl=0.2, target=0.1) == pytest.approx(0.102)
    assert alg.adapted_beta(0.1, kl=0.0, target=0.1) == pytest.approx(0.098)
    assert alg.adapted_beta(0.1, kl=0.1, target=0.1) == pytest.approx(0.1)
