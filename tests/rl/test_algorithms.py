"""The mathematics against values worked out by hand, and its properties."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rl import algorithms as A
from rl.config import Config

NAN = math.nan


def close(tensor, expected, tolerance=1e-6):
    torch.testing.assert_close(tensor, torch.tensor(expected), atol=tolerance, rtol=tolerance)


def test_group_advantages_by_hand():
    # Group 1: mean 0.5, deviations +-0.5, variance (4 * 0.25) / 3, std sqrt(1/3) = 0.5773503; group 2 has no variance.
    rewards = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    a = 0.5 / (math.sqrt(1 / 3) + 1e-4)
    close(A.group_advantages(rewards, 4), [a, -a, a, -a, 0.0, 0.0, 0.0, 0.0])
    close(A.group_advantages(rewards, 4, "none"), [0.5, -0.5, 0.5, -0.5, 0.0, 0.0, 0.0, 0.0])
    # The whole batch: mean 0.75, sum of squares 6 * 0.0625 + 2 * 0.5625 = 1.5, std sqrt(1.5 / 7).
    b = 0.5 / (math.sqrt(1.5 / 7) + 1e-4)
    close(A.group_advantages(rewards, 4, "batch"), [b, -b, b, -b, 0.0, 0.0, 0.0, 0.0])
    with pytest.raises(ValueError, match="scale_rewards"):
        A.group_advantages(rewards, 4, "median")


def test_ungraded_completions_leave_the_baseline():
    with_gap = A.group_advantages(torch.tensor([1.0, NAN, 0.0, 0.0]), 4)
    without = A.group_advantages(torch.tensor([1.0, 0.0, 0.0]), 3)
    close(with_gap, [without[0].item(), 0.0, without[1].item(), without[2].item()])
    close(A.group_advantages(torch.tensor([NAN, NAN, 2.0, NAN]), 4), [0.0, 0.0, 0.0, 0.0])


@given(st.floats(-3, 3), st.integers(2, 12), st.sampled_from(["group", "batch", "none"]))
@settings(max_examples=80, deadline=None)
def test_equal_rewards_give_exactly_zero(reward, size, scale):
    """Not a rounding error that the division by 1e-4 would make visible; so that such groups can be skipped."""
    assert not A.group_advantages(torch.tensor([reward] * size), size, scale).any()


@given(st.lists(st.floats(-5, 5, width=32), min_size=4, max_size=4), st.floats(-3, 3, width=32))
@settings(max_examples=50, deadline=None)
def test_advantages_sum_to_zero_and_ignore_a_shift(rewards, shift):
    rewards = torch.tensor(rewards)
    for scale in ("group", "batch", "none"):
        advantages = A.group_advantages(rewards, 4, scale)
        assert abs(advantages.sum().item()) < 1e-3
    assert torch.allclose(
        A.group_advantages(rewards, 4, "none"), A.group_advantages(rewards + shift, 4, "none"), atol=1e-4
    )


def test_groups_that_vary():
    rewards = torch.tensor([1.0, 1.0, 0.0, 1.0, NAN, 2.0, NAN, NAN])
    assert A.has_varied_rewards(rewards, 2).tolist() == [False, True, False, False]


def test_clipped_loss_by_hand():
    ratio = torch.tensor([1.0, 1.5, 0.5, 1.5, 0.5, 6.0])
    advantage = torch.tensor([2.0, 1.0, 1.0, -1.0, -1.0, -1.0])
    # A > 0: r A up to 1.2 A; A < 0: at least 0.8 A in size.
    close(A.clipped_policy_loss(ratio, advantage), [-2.0, -1.2, -0.5, 1.5, 0.8, 6.0])
    close(A.clipped_policy_loss(ratio, advantage, epsilon_high=0.28), [-2.0, -1.28, -0.5, 1.5, 0.8, 6.0])
    close(A.clipped_policy_loss(ratio, advantage, delta=4.0), [-2.0, -1.2, -0.5, 1.5, 0.8, 4.0])


def test_clip_shares_count_only_tokens_that_lose_their_gradient():
    ratio = torch.tensor([[1.5, 1.5, 0.5, 0.5, 1.5]])
    advantage = torch.tensor([[1.0, -1.0, -1.0, 1.0, 1.0]])
    mask = torch.tensor([[True, True, True, True, False]])
    low, high = A.clipped_tokens(ratio, advantage, mask, Config())
    assert (low.item(), high.item()) == (1, 1)
    low, high = A.clipped_tokens(ratio, advantage, mask, Config(loss_type="cispo", epsilon_high=1.4))
    assert (low.item(), high.item()) == (0, 2)  # the ceiling is of the ratio itself, whatever the advantage's sign
    low, high = A.clipped_tokens(ratio, advantage, mask, Config(loss_type="sapo"))
    assert (low.item(), high.item()) == (0, 0)


def test_kl_estimators_by_hand():
    logprobs, reference = torch.tensor([[-1.0, -2.0, -3.0]]), torch.tensor([[-1.5, -2.0, 0.0]])
    mask = torch.tensor([[True, True, False]])
    close(A.kl_divergence(logprobs, reference, mask, "k1"), [[0.5, 0.0, 0.0]])
    close(A.kl_divergence(logprobs, reference, mask, "k2"), [[0.125, 0.0, 0.0]])
    close(A.kl_divergence(logprobs, reference, mask, "k3"), [[math.exp(-0.5) - 0.5, 0.0, 0.0]])


def test_kl_estimators_agree_with_the_divergence_on_average():
    """By enumeration of a small distribution: E[k1] = E[k3] = KL, and the gradient of E[k3 r] is the gradient of KL."""
    logits = torch.tensor([0.3, -0.2, 0.9, 0.1], requires_grad=True)
    reference = torch.log_softmax(torch.tensor([0.5, 0.0, 0.1, -0.3]), 0)
    logprobs = torch.log_softmax(logits, 0)
    exact = (logprobs.exp() * (logprobs - reference)).sum()
    (exact_gradient,) = torch.autograd.grad(exact, logits, retain_graph=True)
    p, mask = logprobs.exp().detach(), torch.ones(4, dtype=torch.bool)
    ratio = A.token_ratio(logprobs, logprobs.detach(), mask)
    gradients = {}
    for name in ("k1", "k3"):
        estimate = A.kl_divergence(logprobs, reference, mask, name)
        assert (p * estimate).sum().item() == pytest.approx(exact.item(), abs=1e-6)
        (gradients[name + " r"],) = torch.autograd.grad((p * estimate * ratio).sum(), logits, retain_graph=True)
        (gradients[name],) = torch.autograd.grad((p * estimate).sum(), logits, retain_graph=True)
    torch.testing.assert_close(gradients["k1 r"], exact_gradient)
    torch.testing.assert_close(gradients["k3 r"], exact_gradient)
    torch.testing.assert_close(gradients["k1"], torch.zeros(4), atol=1e-6, rtol=0)  # why k1 alone is refused
    assert not torch.allclose(gradients["k3"], exact_gradient, atol=1e-3)  # why the correction is the default


def test_no_nan_where_masked():
    """inf * 0: what stands in masked places must not reach the loss or the gradient."""
    logprobs = torch.tensor([[-1.0, -torch.inf]], requires_grad=True)
    old = torch.tensor([[-1.0, torch.inf]])
    mask = torch.tensor([[True, False]])
    ratio = A.token_ratio(logprobs, old, mask)
    loss = A.clipped_policy_loss(ratio, torch.ones(1, 2)) + A.kl_divergence(logprobs, old, mask)
    (torch.where(mask, loss, 0.0) * A.token_weights(mask, "dapo", 1, 1, 8)).sum().backward()
    assert logprobs.grad.tolist() == [[-1.0, 0.0]]


def test_token_weights_by_hand():
    mask = torch.tensor([[True, True, False], [True, True, True]])
    close(A.token_weights(mask, "dapo", 5, 4, 10), [[0.2, 0.2, 0.0], [0.2, 0.2, 0.2]])
    close(A.token_weights(mask, "grpo", 5, 4, 10), [[1 / 8, 1 / 8, 0.0], [1 / 12, 1 / 12, 1 / 12]])
    close(A.token_weights(mask, "dr_grpo", 5, 4, 10), [[1 / 40, 1 / 40, 0.0], [1 / 40, 1 / 40, 1 / 40]])
    nothing = torch.zeros(2, 3, dtype=torch.bool)  # all truncated: 0, not NaN
    for loss_type in ("dapo", "grpo", "dr_grpo"):
        assert A.token_weights(nothing, loss_type, 0, 2, 10).sum() == 0
    with pytest.raises(ValueError, match="loss_type"):
        A.token_weights(mask, "ppo", 5, 4, 10)


@given(st.lists(st.integers(1, 6), min_size=2, max_size=8), st.integers(1, 7), st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_any_split_into_micro_batches_gives_the_same_loss(lengths, size, rng):
    """The loss of a step is the sum over its micro-batches, whatever they are."""
    width = max(lengths)
    losses = torch.tensor([[rng.uniform(-1, 1) for _ in range(width)] for _ in lengths])
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    for loss_type in ("dapo", "grpo", "dr_grpo"):
        step = (loss_type, sum(lengths), len(lengths), 6)
        whole = (losses * A.token_weights(mask, *step)).sum()
        parts = zip(losses.split(size), mask.split(size))
        assert sum((part * A.token_weights(m, *step)).sum() for part, m in parts).item() == pytest.approx(
            whole.item(), abs=1e-6
        )
