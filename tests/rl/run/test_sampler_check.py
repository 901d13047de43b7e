"""The check before a run that the roll-out samples from the trained policy: it passes, and it detects differences."""

import pytest
import torch

from rl.config import ConfigError
from rl.model import decoder
from rl.model.hf_generate import HFGenerate
from rl.model.policy import Question, load_policy
from rl.run.checks import MAX_DIFFERENCE, TARGET_SHIFT, check_sampler

QUESTIONS = ["What is 3 + 4 + 5?", "Compute 9 - 2 + 1.", "1 + 1 = ?"]


def run_check(policy, max_completion_length=24):
    policy.max_completion_length = max_completion_length
    return check_sampler(policy, [Question({}, policy.encode_prompt(question)) for question in QUESTIONS])


def lora_weights(policy):
    return {name: p.detach().clone() for name, p in policy.model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("start", ["new", "noise"])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", MAX_DIFFERENCE)])
def test_passes_and_restores_the_policy(policy, config, dtype, tolerance, start):
    config.dtype = dtype
    if start == "new":
        policy = load_policy(config)
    before = lora_weights(policy)
    before_decoder = policy.decoder
    agreement = run_check(policy)
    assert agreement.shift >= TARGET_SHIFT
    assert max(agreement.sampler, agreement.model_forward) <= tolerance * agreement.shift
    assert policy.decoder is before_decoder
    assert all(torch.equal(p, before[name]) for name, p in lora_weights(policy).items())
    assert all(p.requires_grad for name, p in policy.model.named_parameters() if "lora_" in name)


def test_completions_of_one_token(policy):
    assert run_check(policy, max_completion_length=1).shift >= TARGET_SHIFT and policy.decoder


def test_4_bit_weights(config):
    config.load_in_4bit = True
    policy = load_policy(config)
    assert run_check(policy).sampler < 1e-4 and policy.decoder


def without_loras(module):
    return iter(())


def test_detects_a_roll_out_without_the_lora(policy, monkeypatch):
    """The policy falls back to the model's own forward pass."""
    folded_weight = decoder.folded_weight

    def without_lora(module, dtype):
        with monkeypatch.context() as patch:
            patch.setattr(decoder, "active_loras", without_loras)
            return folded_weight(module, dtype)

    monkeypatch.setattr(decoder, "folded_weight", without_lora)
    assert run_check(policy).sampler < 1e-4 and policy.decoder is None


def test_falls_back_if_the_forward_pass_is_wrong(policy, monkeypatch):
    """Sampler and trainer agree with each other, but not with the model."""
    monkeypatch.setattr(decoder, "rotate", lambda x, cos, sin: x)
    assert run_check(policy).model_forward < 1e-4 and policy.decoder is None
    assert "differs from it by" in policy.fallback_reason


def test_stops_if_no_path_samples_from_the_policy(policy, monkeypatch):
    complete = HFGenerate.complete

    def without_lora(self, indices):
        with policy.model.disable_adapter():
            return complete(self, indices)

    policy.decoder = None
    before = lora_weights(policy)
    monkeypatch.setattr(HFGenerate, "complete", without_lora)
    with pytest.raises(ConfigError, match="does not sample from the trained policy: .* nats/token"):
        run_check(policy)
    assert all(torch.equal(p, before[name]) for name, p in lora_weights(policy).items())
