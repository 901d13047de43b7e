"""The update: gradients do not depend on micro-batches, masks work, and rewarded completions become likelier."""

import copy
import io
import math
import subprocess
import sys
from collections import Counter

import pytest
import torch
from conftest import ROOT, fill_lora, with_rewards

from rl import algorithms
from rl.model.logprobs import completion_logprobs
from rl.model.oom import micro_batches
from rl.model.policy import load_policy
from rl.optimizer import Optimizer
from rl.rollout import Episode
from rl.run.token_log import inspect_tokens
from rl.update import Updater


def gradient(policy, episodes, config):
    """Return the gradient of one optimizer step as a flat vector, and the totals."""
    policy.model.zero_grad()
    updater = Updater(policy, None, config)
    totals = Counter()
    if not config.on_policy:
        updater.fill_logprobs(episodes, "old_logprobs")
    if config.beta:
        with policy.reference():
            updater.fill_logprobs(episodes, "reference_logprobs")
    updater.backward(episodes, totals)
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in policy.trainable_parameters()]
    return torch.cat([g.flatten() for g in grads]), totals


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_gradient_does_not_depend_on_micro_batches(policy, episodes, config, loss_type, beta):
    config.loss_type, config.beta, config.max_tokens_per_micro_batch = loss_type, beta, 10**6
    whole, totals = gradient(policy, episodes, config)
    assert whole.abs().max() > 1e-4
    for budget in (1, 150, 400):
        config.max_tokens_per_micro_batch = budget
        parts, part_totals = gradient(policy, episodes, config)
        torch.testing.assert_close(parts, whole, atol=1e-6, rtol=0)
        assert part_totals["loss"] == pytest.approx(totals["loss"], abs=1e-5)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
def test_loss_matches_the_papers(policy, episodes, config, loss_type):
    """Against a slow implementation of the definitions, one completion at a time."""
    config.loss_type = loss_type
    vector, _ = gradient(policy, episodes, config)
    policy.model.zero_grad()
    tokens = sum(len(e.completion_ids) for e in episodes)
    loss = 0.0
    for e in episodes:
        logprobs, _, _ = completion_logprobs(policy, [e.prompt_ids], [e.completion_ids])
        terms = -(torch.exp(logprobs[0] - logprobs[0].detach()) * e.advantages)
        loss = (
            loss
            + {
                "dapo": terms.sum() / tokens,
                "grpo": terms.mean() / len(episodes),
                "dr_grpo": terms.sum() / (len(episodes) * config.max_completion_length),
            }[loss_type]
        )
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in policy.trainable_parameters()])
    torch.testing.assert_close(vector, expected, atol=1e-6, rtol=0)


def test_completions_without_gradient_are_skipped_but_counted(policy, episodes, config, monkeypatch):
    """Completions with advantage 0 and no KL skip the forward pass, but the divisor counts them: same gradient."""
    forwarded = []

    def spy(policy, prompts, completions, with_entropy=False):
        forwarded.extend(completions)
        return completion_logprobs(policy, prompts, completions, with_entropy)

    monkeypatch.setattr("rl.update.completion_logprobs", spy)
    vector, _ = gradient(policy, episodes, config)
    assert len(forwarded) == 12  # the third group has advantage 0
    nonzero = copy.deepcopy(episodes)
    for episode in nonzero[8:12]:
        episode.advantages = torch.full_like(episode.advantages, 1e-12)
    complete, _ = gradient(policy, nonzero, config)
    assert len(forwarded) == 12 + 16
    torch.testing.assert_close(vector, complete, atol=1e-7, rtol=0)
    config.beta = 0.1
    forwarded.clear()
    gradient(policy, episodes, config)
    assert len(forwarded) == 32  # with a KL term all completions contribute: reference pass and update


def test_masked_completions_count_as_sequences_but_not_as_tokens(policy, episodes, config):
    """With mask_truncated_completions, dapo divides by the remaining tokens, and grpo by all sequences."""
    truncated = copy.deepcopy(episodes)
    for episode in truncated[4:]:
        episode.in_loss = False
    config.loss_type = "dapo"
    unmasked, _ = gradient(policy, truncated[:4], config)
    masked, _ = gradient(policy, truncated, config)
    torch.testing.assert_close(masked, unmasked, atol=1e-6, rtol=0)
    config.loss_type = "grpo"
    unmasked, _ = gradient(policy, truncated[:4], config)
    masked, _ = gradient(policy, truncated, config)
    torch.testing.assert_close(masked, unmasked / 4, atol=1e-6, rtol=0)
    for episode in truncated:
        episode.in_loss = False
    empty, totals = gradient(policy, truncated, config)
    assert not empty.any() and totals["loss"] == 0.0


def test_kl_is_exactly_zero_at_step_0(episodes, config):
    policy = load_policy(config)  # the LoRA's B matrices are zero
    config.beta = 0.1
    updater = Updater(policy, None, config)
    with policy.reference():
        updater.fill_logprobs(episodes, "reference_logprobs")
    inspected = inspect_tokens(updater, with_rewards(episodes, [0.0] * 16))
    assert all(kl == 0.0 for row in inspected["completions"] for kl in row["kl"])
    _, totals = gradient(policy, episodes, config)
    assert totals["kl"] == 0.0


def test_old_logprobs_precede_the_first_update(policy, episodes, config):
    """With several epochs the ratio differs from 1 after the first update, and clipping starts."""
    config.num_iterations, config.learning_rate = 4, 0.02
    metrics = Updater(policy, None, config).update(episodes)
    expected = 8 * [False] + 4 * [True] + 4 * [False]  # the third group has advantage 0
    assert [e.old_logprobs is None for e in episodes] == expected
    episodes = episodes[:8] + episodes[12:]
    current, _, _ = completion_logprobs(policy, [e.prompt_ids for e in episodes], [e.completion_ids for e in episodes])
    old = torch.cat([e.old_logprobs for e in episodes])
    sampled = torch.tensor([p for e in episodes for p in e.sampler_logprobs])
    torch.testing.assert_close(old, sampled, atol=1e-4, rtol=0)
    assert (torch.cat([row[: len(e.completion_ids)] for row, e in zip(current, episodes)]) - old).abs().max() > 0.05
    assert metrics["clip_ratio/region_mean"] > 0


@pytest.mark.parametrize("num_mini_batches", [1, 2])
def test_on_policy_needs_no_extra_pass_for_old_logprobs(policy, episodes, config, num_mini_batches, monkeypatch):
    """The first mini-batch gets its old_logprobs from its own forward pass. Only later ones need two passes."""
    forwarded = []

    def spy(policy, prompts, completions, with_entropy=False):
        forwarded.extend(completions)
        return completion_logprobs(policy, prompts, completions, with_entropy)

    monkeypatch.setattr("rl.update.completion_logprobs", spy)
    config.num_mini_batches = num_mini_batches
    updater = Updater(policy, None, config)
    metrics = updater.update(episodes)
    later = [] if num_mini_batches == 1 else list(first_mini_batches(episodes, config))[1]
    contributing = [e for e in episodes if e.advantages.any()]
    assert len(forwarded) == len(contributing) + sum(any(e is other for other in later) for e in contributing)
    assert all(e.old_logprobs is not None for e in contributing)
    if num_mini_batches == 1:
        assert metrics["clip_ratio/region_mean"] == 0
    assert metrics["grad_norm"] > 0


def first_mini_batches(episodes, config):
    """Return the mini-batches of the first epoch."""
    updater = object.__new__(Updater)
    updater.config = config
    updater.generator = torch.Generator().manual_seed(config.seed)
    return updater.mini_batches(episodes)


def test_mini_batches_are_whole_groups_and_cover_all_episodes(policy, episodes, config):
    config.num_mini_batches = 3
    parts = list(Updater(policy, None, config).mini_batches(episodes))
    assert sorted(len(part) for part in parts) == [4, 4, 8]
    assert sorted(id(e) for part in parts for e in part) == sorted(map(id, episodes))
    assert all(len({e.group for e in part[i : i + 4]}) == 1 for part in parts for i in range(0, len(part), 4))


def test_one_step_makes_rewarded_completions_likelier(policy, config):
    prompt = policy.encode_prompt("What is 3 + 4 + 5?")
    good, bad = ([*policy.tokenizer.encode(text, add_special_tokens=False)] for text in ("yes", "no!"))
    episodes = []
    for ids in (good, bad, bad, good):
        episodes.append(Episode(prompt, ids, [0.0] * 3, False))
    advantages = algorithms.group_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0]), 4)
    for episode, advantage in zip(episodes, advantages.tolist()):
        episode.advantages = torch.full((3,), advantage)

    def probabilities():
        with torch.no_grad():
            return completion_logprobs(policy, [prompt] * 2, [good, bad])[0].sum(1)

    before = probabilities()
    Updater(policy, None, config).update(episodes)
    change = probabilities() - before
    assert change[0] > 0.01 and change[0] > change[1]


def test_non_finite_gradient_is_skipped(policy, episodes, config):
    before = torch.cat([p.detach().flatten().clone() for p in policy.trainable_parameters()])
    broken = copy.deepcopy(episodes)
    broken[0].advantages = torch.full_like(broken[0].advantages, math.inf)
    updater = Updater(policy, None, config)
    metrics = updater.update(broken)
    after = torch.cat([p.detach().flatten() for p in policy.trainable_parameters()])
    assert metrics["skipped_updates"] == 1 and torch.equal(after, before)
    assert updater.update(episodes)["skipped_updates"] == 0
    assert not torch.equal(torch.cat([p.detach().flatten() for p in policy.trainable_parameters()]), before)


def test_fp16_trains_with_a_scaled_loss(config, episodes):
    """Gradients that would underflow in fp16 keep their size."""
    exact = load_policy(config)
    fill_lora(exact, 0.02)
    config.dtype = "float16"
    policy = load_policy(config)
    fill_lora(policy, 0.02)
    for episode in episodes:
        episode.advantages = episode.advantages * 1e-4
    before = Updater(exact, None, config).update(episodes)
    metrics = Updater(policy, None, config).update(episodes)
    assert metrics["skipped_updates"] == 0
    assert metrics["grad_norm"] == pytest.approx(before["grad_norm"], rel=0.1)


def test_truncated_importance_weights(policy, episodes, config):
    """The loss is weighted by min(pi_old / pi_sampler, cap) of each token, except in fp32."""
    uncorrected, _ = gradient(policy, episodes, config)
    for episode in episodes:
        logprobs, _, _ = completion_logprobs(policy, [episode.prompt_ids], [episode.completion_ids])
        episode.sampler_logprobs = (logprobs[0].detach() - math.log(1.5)).tolist()  # pi_old is 1.5 times the sampler's
    torch.testing.assert_close(gradient(policy, episodes, config)[0], uncorrected)
    policy.dtype = torch.bfloat16  # the model stays in fp32, so that values are exact
    for cap, factor in ((2.0, 1.5), (1.2, 1.2), (0.0, 1.0)):
        config.importance_sampling_cap = cap
        corrected, totals = gradient(policy, episodes, config)
        torch.testing.assert_close(corrected, factor * uncorrected, atol=1e-6, rtol=1e-4)
        if cap:
            metrics = Updater(policy, None, config).metrics(totals, 0.0)
            assert metrics["sampling/importance_sampling_ratio/mean"] == pytest.approx(factor, rel=1e-4)
            assert metrics["sampling/sampling_logp_difference/max"] == pytest.approx(math.log(1.5), abs=1e-4)


def test_max_logp_difference_is_over_all_optimizer_steps(policy, episodes, config):
    policy.dtype, config.num_mini_batches, config.learning_rate = torch.bfloat16, 2, 0.0
    for i, episode in enumerate(episodes):
        logprobs, _, _ = completion_logprobs(policy, [episode.prompt_ids], [episode.completion_ids])
        episode.sampler_logprobs = (logprobs[0].detach() - 0.5 - 0.01 * i).tolist()
    metrics = Updater(policy, None, config).update(episodes)
    assert metrics["sampling/sampling_logp_difference/max"] == pytest.approx(0.65, abs=1e-3)


def test_gradients_are_clipped_and_the_schedule_warms_up(policy, episodes, config):
    config.max_grad_norm, config.warmup_ratio, config.max_steps = 1e-9, 0.5, 4
    updater = Updater(policy, None, config)
    rates = [updater.update(episodes)["learning_rate"] for _ in range(4)]
    assert rates == pytest.approx([0, 5e-4, 1e-3, 1e-3])
    config.lr_scheduler_type, config.warmup_ratio = "linear", 0.0
    updater = Updater(policy, None, config)
    assert [updater.update(episodes)["learning_rate"] for _ in range(4)] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])


def test_micro_batches_stay_within_the_budget_and_are_complete():
    rows = [Episode([1] * p, [2] * c, [], False) for p, c in [(3, 9), (5, 1), (2, 2), (8, 8), (30, 30), (1, 1)]]
    for budget in (1, 16, 40, 1000):
        batches = list(micro_batches(rows, budget, shares_prompts=False))
        assert sorted(id(e) for batch in batches for e in batch) == sorted(map(id, rows))
        for batch in batches:
            widest = max(len(e.prompt_ids) for e in batch) + max(len(e.completion_ids) for e in batch)
            assert len(batch) == 1 or widest * len(batch) <= budget
    assert len(list(micro_batches(rows, 1000, shares_prompts=False))) == 1


def test_micro_batches_count_a_shared_prompt_once_and_keep_groups_together():
    groups = [[Episode([g] * 20, [2] * n, [], False) for n in lengths] for g, lengths in enumerate([(3, 9), (4, 4)])]
    rows = [e for pair in zip(*groups) for e in pair]  # interleaved
    (batch,) = micro_batches(rows, 4 * 9 + 2 * 20, shares_prompts=True)  # four completions and two prompts
    assert [e.prompt_ids[0] for e in batch] == [1, 1, 0, 0]
    assert [len(b) for b in micro_batches(rows, 4 * 9 + 2 * 20 - 1, shares_prompts=True)] == [3, 1]
    assert [len(b) for b in micro_batches(rows, 2 * 9 + 20, shares_prompts=True)] == [2, 2]
    assert len(list(micro_batches(rows, 2 * 9 + 20, shares_prompts=False))) == 4
    # A long prompt counts once, but its keys and values are needed for each completion, which limits the rows, too.
    long_prompts = [Episode([1] * 1000, [2] * 10, [], False) for _ in range(64)]
    assert max(len(batch) for batch in micro_batches(long_prompts, 4000, shares_prompts=True)) == 2 * 4000 // 1010


def test_inspect_tokens_returns_one_value_per_token(policy, episodes, config):
    config.max_tokens_per_micro_batch = 60  # several forward passes; the order is preserved
    for episode in episodes[4:8]:
        episode.advantages = 2 * episode.advantages
    rows = inspect_tokens(Updater(policy, None, config), with_rewards(episodes, [0.0] * 16))["completions"]
    assert len(rows) == 4  # the group with the largest advantages
    for row, episode in zip(rows, episodes[4:8]):
        assert {len(row[name]) for name in ("tokens", "logprobs", "advantages", "entropy", "kl")} == {
            len(episode.completion_ids)
        }
        assert row["logprobs"] == pytest.approx(episode.sampler_logprobs, abs=1e-3)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported")
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit", "paged_adamw_8bit"])
def test_optimizer_resumes_exactly(policy, config, optim):
    """The state is saved to a file, with the schedule. Learning rate and weight decay follow the settings."""
    config.optim, config.lr_scheduler_type, config.warmup_ratio = optim, "cosine", 0.2

    def parameters():
        generator = torch.Generator().manual_seed(1)
        return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((64, 128), (32, 8))]

    def steps(optimizer, start, end):
        for step in range(start, end):
            generator = torch.Generator().manual_seed(step)
            for p in optimizer.parameters:
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()

    uninterrupted = Optimizer(parameters(), 1e-2, policy, config)
    steps(uninterrupted, 0, 10)
    interrupted = Optimizer(parameters(), 1e-2, policy, config)
    steps(interrupted, 0, 5)
    file = io.BytesIO()
    torch.save(interrupted.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    resumed = Optimizer([torch.nn.Parameter(p.detach().clone()) for p in interrupted.parameters], 1e-2, policy, config)
    resumed.load_state_dict(state)
    assert resumed.learning_rate == interrupted.learning_rate
    steps(resumed, 5, 10)
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters, uninterrupted.parameters, strict=True))
    assert resumed.learning_rate == uninterrupted.learning_rate

    config.weight_decay = 0.1
    changed = Optimizer(parameters(), 2e-2, policy, config)
    changed.load_state_dict(state)
    assert changed.learning_rate == pytest.approx(2 * interrupted.learning_rate)
    assert changed.adamw.param_groups[0]["weight_decay"] == 0.1


FREE_MEMORY = """
import sys, types
import psutil, torch
from rl.model.oom import keep_freed_memory, return_freed_memory

keep_freed_memory()
blocks = [torch.ones(2**18 * 4) for _ in range(100)]  # 4 MB each
del blocks
before = psutil.Process().memory_info().rss
return_freed_memory(types.SimpleNamespace(device=torch.device("cpu"), hidden_size=int(sys.argv[1])))
print((before - psutil.Process().memory_info().rss) // 2**20)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
@pytest.mark.parametrize("hidden_size, is_returned", [(576, True), (128, False)])
def test_memory_of_freed_tensors_is_kept_and_then_returned(hidden_size, is_returned):
    result = subprocess.run(
        [sys.executable, "-c", FREE_MEMORY, str(hidden_size)], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert (int(result.stdout) > 300) == is_returned
