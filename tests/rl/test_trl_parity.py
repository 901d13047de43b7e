"""Advantages, losses and gradients against TRL: its trainers' methods and ours on the same random numbers, in fp64.

TRL's formulas are inside its trainers. Its methods are therefore called on a stub trainer with only the attributes that
they read, and ours (`Updater.backward`) with a policy that returns given log-probabilities. TRL 1.15 has no PPO (GAE,
whitening, value loss, adaptive KL weight), REINFORCE, REINFORCE++, process rewards, nor the estimators k1 and k2 in the
loss. test_family.py and test_algorithms.py check these against values computed by hand.

Intended differences: at sequence level TRL counts clipped sequences (here: tokens), its metric `kl` is the corrected
estimate (here: the uncorrected one), and its entropy bonus is a mean over the tokens of a micro-batch (here: weighted
like the loss).
"""

from collections import Counter, defaultdict
from dataclasses import dataclass
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from rl import algorithms as alg
from rl.config import Config
from rl.model.logprobs import completion_logprobs
from rl.rollout import Episode
from rl.update import Updater

trl = pytest.importorskip("trl", reason="TRL is not installed, so nothing to compare with: pip install trl==1.15.0")

ROWS, GROUP, WIDTH = 12, 4, 9
ACCELERATOR = SimpleNamespace(
    device=torch.device("cpu"),
    num_processes=1,
    process_index=0,
    sync_gradients=True,
    gather=lambda x: x,
    gather_for_metrics=lambda x: x,
    reduce=lambda x, reduction: x,
)


def stub_trainer(metrics=None, **attributes) -> SimpleNamespace:
    """Return a trainer with these attributes and the ones that every method reads."""
    model = torch.nn.Identity()  # in training mode
    model.is_gradient_checkpointing = False
    return SimpleNamespace(
        accelerator=ACCELERATOR,
        model=model,
        aux_loss_enabled=False,
        use_vllm=False,
        _metrics=defaultdict(lambda: defaultdict(list)) if metrics is None else metrics,
        **attributes,
    )


def close(result, expected, tolerance=1e-6):
    torch.testing.assert_close(result, expected, atol=tolerance, rtol=0, check_dtype=False)


@dataclass
class Numbers:
    """Inputs of one optimizer step, (ROWS, WIDTH) if not stated otherwise. Padding is filled with random values."""

    logprobs: torch.Tensor
    old: torch.Tensor
    reference: torch.Tensor
    entropies: torch.Tensor
    mask: torch.Tensor
    advantages: torch.Tensor  # (ROWS,), or (ROWS, WIDTH) with one for each token
    truncated: torch.Tensor  # (ROWS,), completions that mask_truncated_completions removes from the loss


def draw(seed: int, drift=0.4, by_token=False, mask_truncated=False) -> Numbers:
    """Draw random inputs. drift: standard deviation of log pi - log pi_old; ratios exceed both clipping bounds."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    logprobs = -normal(ROWS, WIDTH).exp()
    lengths = torch.randint(1, WIDTH + 1, (ROWS,), generator=generator)
    lengths[3] = WIDTH
    advantages = normal(ROWS, WIDTH) if by_token else normal(ROWS)
    advantages[5] = 0.0
    return Numbers(
        logprobs,
        old=logprobs + drift * normal(ROWS, WIDTH),
        reference=logprobs + 0.5 * normal(ROWS, WIDTH),
        entropies=normal(ROWS, WIDTH).abs(),
        mask=torch.arange(WIDTH) < lengths[:, None],
        advantages=advantages,
        truncated=torch.rand(ROWS, generator=generator) < (0.3 if mask_truncated else 0.0),
    )


def run_trl(numbers: Numbers, config: Config, micro_batches: int):
    """Return TRL's loss, gradients w.r.t. log-probabilities and entropies, and metrics of the last micro-batch."""
    leaf = numbers.logprobs.clone().requires_grad_()
    entropies = numbers.entropies.clone().requires_grad_()
    mask = (numbers.mask & ~numbers.truncated[:, None]).long()
    metrics = defaultdict(lambda: defaultdict(list))
    total = 0.0
    for part in torch.arange(ROWS).chunk(micro_batches):
        trainer = stub_trainer(
            metrics,
            args=SimpleNamespace(
                delta=config.delta,
                use_bias_correction_kl=config.use_bias_correction_kl,
                sapo_temperature_pos=config.sapo_temperature_pos,
                sapo_temperature_neg=config.sapo_temperature_neg,
                steps_per_generation=micro_batches,
            ),
            loss_type=config.loss_type,
            importance_sampling_level=config.importance_sampling_level,
            beta=config.beta,
            epsilon_low=config.epsilon,
            epsilon_high=config.epsilon if config.epsilon_high is None else config.epsilon_high,
            max_completion_length=config.max_completion_length,
            entropy_coef=config.entropy_coef,
            _entropy_bonus_enabled=config.entropy_coef > 0,
            use_adaptive_entropy=False,
            top_entropy_quantile=1.0,
            off_policy_mask_threshold=None,
            current_gradient_accumulation_steps=micro_batches,
            _get_per_token_logps_and_entropies=lambda *_, part=part, **__: (leaf[part], entropies[part], None),
        )
        inputs = {
            "prompt_ids": torch.zeros(len(part), 1, dtype=torch.long),
            "prompt_mask": torch.ones(len(part), 1, dtype=torch.long),
            "completion_ids": torch.zeros(len(part), WIDTH, dtype=torch.long),
            "completion_mask": mask[part],
            "advantages": numbers.advantages[part],
            "old_per_token_logps": numbers.old[part],
            "ref_per_token_logps": numbers.reference[part],
            "num_items_in_batch": mask.sum(),
        }
        loss = trl.GRPOTrainer._compute_loss(trainer, None, inputs)
        loss.backward()
        total += loss.item()
    return total, leaf.grad, entropies.grad, {name: values[-1] for name, values in metrics["train"].items()}


def run_ours(numbers: Numbers, config: Config):
    """Return the loss of our update, the same gradients, and the sums over tokens."""
    leaf = numbers.logprobs.clone().requires_grad_()
    entropies = numbers.entropies.clone().requires_grad_()
    by_token = numbers.advantages.view(ROWS, -1).expand(ROWS, WIDTH)
    episodes = [
        Episode(
            group=i // GROUP,
            prompt_ids=[i],
            completion_ids=[0] * n,
            sampler_logprobs=[],
            truncated=is_truncated,
            in_loss=not is_truncated,
            advantages=by_token[i, :n],
            old_logprobs=numbers.old[i, :n],
            reference_logprobs=numbers.reference[i, :n],
        )
        for i, (n, is_truncated) in enumerate(zip(numbers.mask.sum(1).tolist(), numbers.truncated.tolist()))
    ]

    def logprobs(policy, prompts, completions, with_entropy=False):
        rows = torch.tensor([prompt[0] for prompt in prompts])
        mask = numbers.mask[rows, : max(map(len, completions))]
        values = [torch.where(mask, x[rows, : mask.shape[1]], 0.0) for x in (leaf, entropies)]
        return values[0], mask, values[1]

    updater = object.__new__(Updater)
    updater.config = config
    device = torch.device("cpu")
    updater.policy = SimpleNamespace(
        device=device, dtype=torch.float32, shares_prompts=False, hidden_size=64, server=None
    )
    updater.optimizer = SimpleNamespace(backward=lambda loss: loss.backward())
    totals = Counter()
    with mock.patch("rl.update.completion_logprobs", logprobs):
        (updater.backward_pairs if config.algorithm == "dpo" else updater.backward)(episodes, totals)
    return totals["loss"], leaf.grad, entropies.grad, totals


SEQUENCE = {"importance_sampling_level": "sequence", "epsilon": 0.03, "epsilon_high": 0.04}
CASES = {  # settings, and arguments of `draw`
    "grpo": ({"loss_type": "grpo"}, {}),
    "grpo, kl": ({"loss_type": "grpo", "beta": 0.1}, {}),
    "dapo, clip-higher": ({"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28}, {}),
    "dapo, kl uncorrected": ({"loss_type": "dapo", "beta": 0.3, "use_bias_correction_kl": False}, {}),
    "dapo, truncated masked": ({"loss_type": "dapo", "beta": 0.1}, {"mask_truncated": True}),
    "grpo, truncated masked": ({"loss_type": "grpo"}, {"mask_truncated": True}),
    "one update per roll-out": ({"loss_type": "dapo", "beta": 0.1, "num_iterations": 1}, {"drift": 0.0}),
    "one advantage per token": ({"loss_type": "dapo"}, {"by_token": True}),  # ppo, process rewards
    "two-sided clipping": ({"loss_type": "dapo", "delta": 1.5}, {}),
    "dr_grpo": ({"loss_type": "dr_grpo", "max_completion_length": 2 * WIDTH}, {"mask_truncated": True}),
    "gspo": ({"loss_type": "grpo"} | SEQUENCE, {"drift": 0.1}),
    "gspo, dapo": ({"loss_type": "dapo", "delta": 1.2} | SEQUENCE, {"drift": 0.1, "mask_truncated": True}),
    "gspo, kl": ({"loss_type": "grpo", "beta": 0.1, "use_bias_correction_kl": False} | SEQUENCE, {"drift": 0.1}),
    "gspo, kl corrected": ({"loss_type": "grpo", "beta": 0.1} | SEQUENCE, {"drift": 0.1}),
    "cispo": ({"loss_type": "cispo", "epsilon_high": 1.3}, {"mask_truncated": True}),
    "cispo, kl": ({"loss_type": "cispo", "epsilon_high": 5.0, "beta": 0.05}, {}),
    "sapo": ({"loss_type": "sapo"}, {"mask_truncated": True}),
    "sapo, kl": ({"loss_type": "sapo", "sapo_temperature_pos": 0.7, "sapo_temperature_neg": 2.0, "beta": 0.1}, {}),
}


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_losses(case, parts):
    """Every loss type with its gradient and metrics. TRL splits micro-batches by row, Ponder by length and tokens."""
    settings, draw_arguments = CASES[case]
    config = Config(**{"num_iterations": 2, "max_tokens_per_micro_batch": 25 if parts > 1 else 8192} | settings)
    config.check()
    for seed in range(3):
        numbers = draw(seed, **draw_arguments)
        loss, gradient, _, metrics = run_trl(numbers, config, parts)
        our_loss, our_gradient, _, totals = run_ours(numbers, config)
        assert our_loss == pytest.approx(loss, abs=1e-6)
        close(our_gradient, gradient)
        assert gradient.abs().max() > 1e-3  # the comparison is not trivial
        if parts == 1 and config.importance_sampling_level == "token":
            tokens = (numbers.mask & ~numbers.truncated[:, None]).sum().item()
            for name, key in (("clipped_low", "clip_ratio/low_mean"), ("clipped_high", "clip_ratio/high_mean")):
                if key in metrics:
                    assert totals[name] == pytest.approx(metrics[key] * tokens)
                    assert totals[name] > 0 or config.on_policy
            if config.beta and not config.use_bias_correction_kl:
                assert totals["kl"] == pytest.approx(metrics["kl"] * tokens)


def test_entropy_bonus():
    config = Config(num_iterations=2, loss_type="dapo", entropy_coef=0.02)
    numbers = draw(2, mask_truncated=True)
    loss, *gradients, _ = run_trl(numbers, config, 1)
    our_loss, *our_gradients, _ = run_ours(numbers, config)
    assert our_loss == pytest.approx(loss, abs=1e-6)
    for our_gradient, gradient in zip(our_gradients, gradients):  # w.r.t. log-probabilities and entropies
        close(our_gradient, gradient)


def test_dpo():
    """The sigmoid loss of the best and the worst completion of each group, and its gradient."""
    config = Config(algorithm="dpo", beta=0.3, num_generations=2)
    for seed in range(3):
        numbers = draw(seed)
        numbers.advantages = torch.tensor([1.0, -1.0] * (ROWS // 2))
        order = torch.cat([torch.arange(0, ROWS, 2), torch.arange(1, ROWS, 2)])  # TRL: all chosen, then all rejected
        leaf = numbers.logprobs.clone().requires_grad_()
        zeros = torch.zeros(ROWS, WIDTH)

        def model(values, zeros=zeros, numbers=numbers, order=order):
            masked = torch.where(numbers.mask, values, 0.0)[order]  # TRL returns 0 at positions without label
            return lambda **_: SimpleNamespace(log_probs=masked, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())

        trainer = stub_trainer(
            ref_model=model(numbers.reference),
            args=SimpleNamespace(gradient_checkpointing_kwargs=None),
            beta=config.beta,
            loss_types=["sigmoid"],
            loss_weights=[1.0],
            f_divergence_type="reverse_kl",
            use_weighting=False,
            precompute_ref_logps=False,
            ld_alpha=None,
            _total_train_tokens=0,
            _tp_size=1,
        )
        mask = torch.cat([torch.zeros(ROWS, 1), numbers.mask[order]], 1).long()  # after one prompt token
        inputs = {"input_ids": mask, "attention_mask": mask, "completion_mask": mask}
        loss = trl.DPOTrainer._compute_loss(trainer, model(leaf), inputs, return_outputs=False)
        loss.backward()
        our_loss, our_gradient, _, totals = run_ours(numbers, config)
        assert our_loss == pytest.approx(loss.item(), abs=1e-6)
        close(our_gradient, leaf.grad)
        assert totals["margin"] / totals["pairs"] == pytest.approx(trainer._metrics["train"]["rewards/margins"][0])


def score_rollout(trainer_class, rewards: torch.Tensor, numbers: Numbers | None = None, **settings):
    """Return TRL's output and metrics of a roll-out with these rewards. nan: no reward function applied.

    Completions consist of the token 5 and, unless truncated, of the end-of-sequence token 1 at the end.
    """
    rows = len(rewards)
    lengths = numbers.mask.sum(1).tolist() if numbers else [3] * rows
    truncated = numbers.truncated.tolist() if numbers else [False] * rows
    ids = [[5] * (n - 1) + [5 if is_truncated else 1] for n, is_truncated in zip(lengths, truncated)]
    is_rloo = trainer_class is trl.RLOOTrainer
    rest = (None, {}, None, None)
    zeros = torch.zeros(rows, max(lengths))
    # TRL first reads the old, then the reference log-probabilities.
    scores = iter([numbers.old, numbers.reference] if numbers else [zeros])
    trainer = stub_trainer(
        ref_model=object(),
        args=SimpleNamespace(
            per_device_train_batch_size=rows,
            steps_per_generation=1,
            gradient_accumulation_steps=1,
            gradient_checkpointing_kwargs=None,
        ),
        _tokenizer=SimpleNamespace(pad_token_id=0),
        eos_token_ids=[1],
        pad_to_multiple_of=None,
        tools=None,
        environments=None,
        environment_factories=None,
        log_multimodal=False,
        reward_funcs=[None],
        reward_func_names=["reward"],
        reward_weights=torch.ones(1, dtype=rewards.dtype),
        reward_clip_range=None,
        multi_objective_aggregation="sum_then_normalize",
        normalize_advantages=False,
        num_generations=GROUP,
        num_iterations=1,
        _generate=lambda _: (
            ([[7]] * rows, ids, [""] * rows) if is_rloo else ([[7]] * rows, ids, None, [""] * rows, *rest)
        ),
        _calculate_rewards=lambda *_: rewards[:, None].clone(),
        _get_per_token_logps_and_entropies=lambda *_, **__: (next(scores), None, None),
        _logs=defaultdict(list) | {"rewards": defaultdict(list)},
        _pending_extra_logs={},
        _pending_metrics={},
        **{"beta": 0.0, "scale_rewards": "group", "mask_truncated_completions": False} | settings,
    )
    output = trainer_class._generate_and_score_completions(trainer, [{"prompt": ""}] * rows)
    return output, {name: values[-1] for name, values in trainer._metrics["train"].items()}


def draw_rewards(seed: int, ungraded: bool) -> torch.Tensor:
    """Draw six groups of rewards: one equal, one binary; if ungraded, others with one graded reward and with none."""
    rewards = torch.randn(6, GROUP, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rewards[1] = 0.1
    rewards[2] = torch.tensor([1.0, 0.0, 0.0, 1.0])
    if ungraded:
        rewards[0, 2] = rewards[3, :3] = rewards[4] = torch.nan
    return rewards.view(-1)


@pytest.mark.parametrize("ungraded", [False, True])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_advantages(scale, ungraded):
    for seed in range(3):
        rewards = draw_rewards(seed, ungraded)
        output, metrics = score_rollout(trl.GRPOTrainer, rewards, scale_rewards=scale)
        close(alg.group_advantages(rewards, GROUP, scale), output["advantages"])
        if scale != "batch" and not ungraded:
            zero_std = 1 - alg.has_varied_rewards(rewards, GROUP).float().mean().item()
            assert metrics["frac_reward_zero_std"] == pytest.approx(zero_std)


@pytest.mark.parametrize("ungraded", [False, True])
def test_leave_one_out_advantages(ungraded):
    for seed in range(3):
        rewards = draw_rewards(seed, ungraded)
        output, _ = score_rollout(trl.RLOOTrainer, rewards)
        close(alg.leave_one_out_advantages(rewards, GROUP), output["advantages"])


def test_kl_in_the_reward():
    """PPO's token rewards add up to the completion reward of TRL's RLOO, R - beta * sum of k1."""
    for seed in range(3):
        numbers = draw(seed)
        outcome = draw_rewards(seed, False)[:ROWS]
        output, metrics = score_rollout(trl.RLOOTrainer, outcome, numbers, beta=0.2)
        kl = alg.kl_divergence(numbers.old, numbers.reference, numbers.mask, "k1")
        rewards = alg.token_rewards(outcome, [[]] * ROWS, numbers.mask, kl, 0.2)
        returns = alg.discounted_returns(rewards, numbers.mask)[:, 0]
        close(alg.leave_one_out_advantages(returns, GROUP), output["advantages"])
        assert metrics["kl"] == pytest.approx((kl.sum() / numbers.mask.sum()).item())


def test_rloo_loss_on_policy():
    """TRL clips the loss of whole sequences. Before the first update its gradient is the one of dr_grpo times L_max."""
    config = Config(algorithm="rloo", loss_type="dr_grpo", max_completion_length=WIDTH)
    numbers = draw(0, drift=0.0)
    leaf = numbers.logprobs.clone().requires_grad_()
    trainer = stub_trainer(
        epsilon_low=0.2,
        epsilon_high=0.2,
        _get_per_token_logps_and_entropies=lambda *_, **__: (leaf, numbers.entropies, None),
    )
    ids = torch.zeros(ROWS, WIDTH, dtype=torch.long)
    inputs = {name: ids for name in ("prompt_ids", "prompt_mask", "completion_ids")}
    inputs["completion_mask"] = numbers.mask.long()
    inputs["old_logps"] = (numbers.logprobs * numbers.mask).sum(1)
    trl.RLOOTrainer._compute_loss(trainer, None, inputs | {"advantages": numbers.advantages}).backward()
    _, our_gradient, _, _ = run_ours(numbers, config)
    close(our_gradient * WIDTH, leaf.grad)


def test_mask_truncated_completions():
    """TRL's mask and number of tokens with mask_truncated_completions agree with `draw`."""
    numbers = draw(0, mask_truncated=True)
    assert 0 < numbers.truncated.sum() < ROWS
    output, _ = score_rollout(trl.GRPOTrainer, draw_rewards(0, False)[:ROWS], numbers, mask_truncated_completions=True)
    mask = numbers.mask & ~numbers.truncated[:, None]
    assert torch.equal(output["completion_mask"].bool(), mask)
    assert output["num_items_in_batch"] == mask.sum()


def test_overlong_penalty():
    from trl.rewards import get_soft_overlong_punishment

    expected = get_soft_overlong_punishment(max_completion_len=50, soft_punish_cache=13)([[0] * n for n in range(70)])
    close(alg.overlong_penalty(torch.arange(70), 50, 13), torch.tensor(expected))


def test_logprobs_and_entropies(policy):
    """A padded batch of the tiny model at temperature 0.7 against TRL's functions on the logits of single rows."""
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    policy.temperature = 0.7
    policy.model.double()  # so that a row does not depend on its batch; completion_logprobs computes in fp32
    prompts = [[5, 6, 7, 8, 9], [10], [11, 12]]
    completions = [[20, 21], [22, 23, 24, 25, 26, 27], [28]]
    with torch.no_grad():
        logprobs, mask, entropies = completion_logprobs(policy, prompts, completions, with_entropy=True)
        for i, (prompt, completion) in enumerate(zip(prompts, completions)):
            logits = policy.model(torch.tensor([prompt + completion])).logits[:, len(prompt) - 1 : -1]
            expected = selective_log_softmax(logits, torch.tensor([completion]), temperature=0.7)
            close(logprobs[i][mask[i]], expected[0], 1e-5)
            close(entropies[i][mask[i]], entropy_from_logits(logits / 0.7)[0], 1e-5)
