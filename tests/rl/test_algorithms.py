"""rl/algorithms.py (GRPO and its losses) against values computed by hand, and its properties."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rl import algorithms as alg
from rl.config import Config

NAN = math.nan


def close(tensor, expected, tolerance=1e-6):
    torch.testing.assert_close(tensor, torch.tensor(expected), atol=tolerance, rtol=tolerance)


def test_group_advantages_by_hand():
    # Group 1: mean 0.5, deviations +-0.5, variance (4 * 0.25) / 3, std sqrt(1/3) = 0.5773503; group 2 has no variance.
    rewards = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    a = 0.5 / (math.sqrt(1 / 3) + 1e-4)
    close(alg.group_advantages(rewards, 4), [a, -a, a, -a, 0.0, 0.0, 0.0, 0.0])
    close(alg.group_advantages(rewards, 4, "none"), [0.5, -0.5, 0.5, -0.5, 0.0, 0.0, 0.0, 0.0])
    # The whole batch: mean 0.75, sum of squares 6 * 0.0625 + 2 * 0.5625 = 1.5, std sqrt(1.5 / 7).
    b = 0.5 / (math.sqrt(1.5 / 7) + 1e-4)
    close(alg.group_advantages(rewards, 4, "batch"), [b, -b, b, -b, 0.0, 0.0, 0.0, 0.0])
    with pytest.raises(ValueError, match="scale_rewards"):
        alg.group_advantages(rewards, 4, "median")


def test_ungraded_completions_are_excluded_from_their_group():
    with_nan = alg.group_advantages(torch.tensor([1.0, NAN, 0.0, 0.0]), 4)
    graded = alg.group_advantages(torch.tensor([1.0, 0.0, 0.0]), 3)
    close(with_nan, [graded[0].item(), 0.0, graded[1].item(), graded[2].item()])
    close(alg.group_advantages(torch.tensor([NAN, NAN, 2.0, NAN]), 4), [0.0, 0.0, 0.0, 0.0])


@given(st.floats(-3, 3), st.integers(2, 12), st.sampled_from(["group", "batch", "none"]))
@settings(max_examples=80, deadline=None)
def test_equal_rewards_give_exactly_zero(reward, size, scale):
    """A rounding error would be amplified by the division by 1e-4, and such groups could not be skipped."""
    assert not alg.group_advantages(torch.tensor([reward] * size), size, scale).any()


@given(st.lists(st.floats(-5, 5, width=32), min_size=4, max_size=4), st.floats(-3, 3, width=32))
@settings(max_examples=50, deadline=None)
def test_advantages_sum_to_zero_and_do_not_depend_on_a_shift(rewards, shift):
    rewards = torch.tensor(rewards)
    for scale in ("group", "batch", "none"):
        advantages = alg.group_advantages(rewards, 4, scale)
        assert abs(advantages.sum().item()) < 1e-3
    assert torch.allclose(
        alg.group_advantages(rewards, 4, "none"), alg.group_advantages(rewards + shift, 4, "none"), atol=1e-4
    )


def test_has_varied_rewards():
    rewards = torch.tensor([1.0, 1.0, 0.0, 1.0, NAN, 2.0, NAN, NAN])
    assert alg.has_varied_rewards(rewards, 2).tolist() == [False, True, False, False]


def test_clipped_loss_by_hand():
    ratio = torch.tensor([1.0, 1.5, 0.5, 1.5, 0.5, 6.0])
    advantage = torch.tensor([2.0, 1.0, 1.0, -1.0, -1.0, -1.0])
    # A > 0: r A is at most 1.2 A. A < 0: |r A| is at least 0.8 |A|.
    close(alg.clipped_policy_loss(ratio, advantage), [-2.0, -1.2, -0.5, 1.5, 0.8, 6.0])
    close(alg.clipped_policy_loss(ratio, advantage, epsilon_high=0.28), [-2.0, -1.28, -0.5, 1.5, 0.8, 6.0])
    close(alg.clipped_policy_loss(ratio, advantage, delta=4.0), [-2.0, -1.2, -0.5, 1.5, 0.8, 4.0])


def test_clipped_tokens_are_those_without_gradient():
    ratio = torch.tensor([[1.5, 1.5, 0.5, 0.5, 1.5]])
    advantage = torch.tensor([[1.0, -1.0, -1.0, 1.0, 1.0]])
    mask = torch.tensor([[True, True, True, True, False]])
    low, high = alg.clipped_tokens(ratio, advantage, mask, Config())
    assert (low.item(), high.item()) == (1, 1)
    low, high = alg.clipped_tokens(ratio, advantage, mask, Config(loss_type="cispo", epsilon_high=1.4))
    assert (low.item(), high.item()) == (0, 2)  # the ceiling applies to the ratio, for either sign of the advantage
    low, high = alg.clipped_tokens(ratio, advantage, mask, Config(loss_type="sapo"))
    assert (low.item(), high.item()) == (0, 0)


def test_kl_estimators_by_hand():
    logprobs, reference = torch.tensor([[-1.0, -2.0, -3.0]]), torch.tensor([[-1.5, -2.0, 0.0]])
    mask = torch.tensor([[True, True, False]])
    close(alg.kl_divergence(logprobs, reference, mask, "k1"), [[0.5, 0.0, 0.0]])
    close(alg.kl_divergence(logprobs, reference, mask, "k2"), [[0.125, 0.0, 0.0]])
    close(alg.kl_divergence(logprobs, reference, mask, "k3"), [[math.exp(-0.5) - 0.5, 0.0, 0.0]])


def test_kl_estimators_are_unbiased():
    """Over all tokens of a small vocabulary: E[k1] = E[k3] = KL, and the gradient of E[k3 r] is the gradient of KL."""
    logits = torch.tensor([0.3, -0.2, 0.9, 0.1], requires_grad=True)
    reference = torch.log_softmax(torch.tensor([0.5, 0.0, 0.1, -0.3]), 0)
    logprobs = torch.log_softmax(logits, 0)
    exact = (logprobs.exp() * (logprobs - reference)).sum()
    (exact_gradient,) = torch.autograd.grad(exact, logits, retain_graph=True)
    p, mask = logprobs.exp().detach(), torch.ones(4, dtype=torch.bool)
    ratio = alg.token_ratio(logprobs, logprobs.detach(), mask)
    gradients = {}
    for name in ("k1", "k3"):
        estimate = alg.kl_divergence(logprobs, reference, mask, name)
        assert (p * estimate).sum().item() == pytest.approx(exact.item(), abs=1e-6)
        (gradients[name + " r"],) = torch.autograd.grad((p * estimate * ratio).sum(), logits, retain_graph=True)
        (gradients[name],) = torch.autograd.grad((p * estimate).sum(), logits, retain_graph=True)
    torch.testing.assert_close(gradients["k1 r"], exact_gradient)
    torch.testing.assert_close(gradients["k3 r"], exact_gradient)
    # Config refuses k1 without the ratio, and use_bias_correction_kl is on by default:
    torch.testing.assert_close(gradients["k1"], torch.zeros(4), atol=1e-6, rtol=0)
    assert not torch.allclose(gradients["k3"], exact_gradient, atol=1e-3)


def test_masked_positions_cause_no_nan():
    """Infinite values outside the mask must not turn the loss or the gradient into nan (inf * 0)."""
    logprobs = torch.tensor([[-1.0, -torch.inf]], requires_grad=True)
    old = torch.tensor([[-1.0, torch.inf]])
    mask = torch.tensor([[True, False]])
    ratio = alg.token_ratio(logprobs, old, mask)
    loss = alg.clipped_policy_loss(ratio, torch.ones(1, 2)) + alg.kl_divergence(logprobs, old, mask)
    (torch.where(mask, loss, 0.0) * alg.token_weights(mask, "dapo", 1, 1, 8)).sum().backward()
    assert logprobs.grad.tolist() == [[-1.0, 0.0]]


def test_token_weights_by_hand():
    mask = torch.tensor([[True, True, False], [True, True, True]])
    close(alg.token_weights(mask, "dapo", 5, 4, 10), [[0.2, 0.2, 0.0], [0.2, 0.2, 0.2]])
    close(alg.token_weights(mask, "grpo", 5, 4, 10), [[1 / 8, 1 / 8, 0.0], [1 / 12, 1 / 12, 1 / 12]])
    close(alg.token_weights(mask, "dr_grpo", 5, 4, 10), [[1 / 40, 1 / 40, 0.0], [1 / 40, 1 / 40, 1 / 40]])
    empty = torch.zeros(2, 3, dtype=torch.bool)  # all completions truncated: 0, not nan
    for loss_type in ("dapo", "grpo", "dr_grpo"):
        assert alg.token_weights(empty, loss_type, 0, 2, 10).sum() == 0
    with pytest.raises(ValueError, match="loss_type"):
        alg.token_weights(mask, "ppo", 5, 4, 10)


@given(st.lists(st.integers(1, 6), min_size=2, max_size=8), st.integers(1, 7), st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_loss_does_not_depend_on_micro_batches(lengths, size, rng):
    """The loss of a step is the sum over its micro-batches, for every split."""
    width = max(lengths)
    losses = torch.tensor([[rng.uniform(-1, 1) for _ in range(width)] for _ in lengths])
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    for loss_type in ("dapo", "grpo", "dr_grpo"):
        step = (loss_type, sum(lengths), len(lengths), 6)
        whole = (losses * alg.token_weights(mask, *step)).sum()
        parts = zip(losses.split(size), mask.split(size))
        assert sum((part * alg.token_weights(m, *step)).sum() for part, m in parts).item() == pytest.approx(
            whole.item(), abs=1e-6
        )
