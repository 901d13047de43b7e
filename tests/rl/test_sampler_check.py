"""The check before a run that the roll-out samples from the policy that is trained: it passes, and it can fail."""

import pytest
import torch

from rl.checks import MAX_DIFFERENCE, TARGET_SHIFT, check_sampler
from rl.config import ConfigError
from rl.model import decoder
from rl.model.hf_generate import HFGenerate
from rl.model.policy import Question, load_policy

QUESTIONS = ["What is 3 + 4 + 5?", "Compute 9 - 2 + 1.", "1 + 1 = ?"]


def checked(policy, max_completion_length=24):
    policy.max_completion_length = max_completion_length
    return check_sampler(policy, [Question({}, policy.encode_prompt(question)) for question in QUESTIONS])


def lora(policy):
    return {name: p.detach().clone() for name, p in policy.model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("start", ["new", "noise"])
@pytest.mark.parametrize("dtype, within", [("float32", 1e-5), ("bfloat16", MAX_DIFFERENCE)])
def test_it_passes_and_leaves_the_policy_as_it_was(policy, config, dtype, within, start):
    config.dtype = dtype
    if start == "new":
        policy = load_policy(config)
    before, written_out = lora(policy), policy.decoder
    found = checked(policy)
    assert found.shift >= TARGET_SHIFT and max(found.sampler, found.model_forward) <= within * found.shift
    assert policy.decoder is written_out
    assert all(torch.equal(p, before[name]) for name, p in lora(policy).items())
    assert all(p.requires_grad for name, p in policy.model.named_parameters() if "lora_" in name)


def test_a_run_of_one_token(policy):
    assert checked(policy, max_completion_length=1).shift >= TARGET_SHIFT and policy.decoder


def test_4_bit_weights(config):
    config.load_in_4bit = True
    policy = load_policy(config)
    assert checked(policy).sampler < 1e-4 and policy.decoder


def without_loras(module):
    return iter(())


def test_a_roll_out_that_leaves_out_the_lora_is_noticed(policy, monkeypatch):
    """As in well-known trainers, silently: here the engine is given up for the model's own forward."""
    folded_weight = decoder.folded_weight

    def base_alone(module, dtype):
        with monkeypatch.context() as patch:
            patch.setattr(decoder, "active_loras", without_loras)
            return folded_weight(module, dtype)

    monkeypatch.setattr(decoder, "folded_weight", base_alone)
    assert checked(policy).sampler < 1e-4 and policy.decoder is None


def test_a_forward_pass_that_is_not_the_models_is_given_up(policy, monkeypatch):
    """Sampler and trainer agree with each other, and are wrong together."""
    monkeypatch.setattr(decoder, "rotate", lambda x, cos, sin: x)
    assert checked(policy).model_forward < 1e-4 and policy.decoder is None
    assert "differs from it by" in policy.fallback_reason


def test_where_no_path_samples_from_the_policy_the_run_stops(policy, monkeypatch):
    complete = HFGenerate.complete

    def base_alone(self, prompts):
        with policy.model.disable_adapter():
            return complete(self, prompts)

    policy.decoder, before = None, lora(policy)
    monkeypatch.setattr(HFGenerate, "complete", base_alone)
    with pytest.raises(ConfigError, match="does not sample from the trained policy: .* nats/token"):
        checked(policy)
    assert all(torch.equal(p, before[name]) for name, p in lora(policy).items())
