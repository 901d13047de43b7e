"""The merge of a LoRA into 16-bit weights: the sum, and the comparison of logits."""

import peft
import pytest
import torch
from conftest import fill_lora

from export import merge
from rl.config import ConfigError, RunError
from rl.model.policy import load_policy

TEXTS = [[5, 9, 30, 41, 17, 60], [8, 22, 13]]


@pytest.fixture
def in_bf16(config):
    """The tiny model in its 16 bits with a LoRA that does something."""
    config.dtype = "bfloat16"
    policy = load_policy(config)
    fill_lora(policy, 0.02)
    return policy


# --- the sum


class Toy(torch.nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.embeddings = torch.nn.Embedding(2, 2)
        self.linear = torch.nn.Linear(2, 2, bias=False, dtype=dtype)

    def get_input_embeddings(self):
        return self.embeddings


def toy(weight, a, b, dtype=torch.float32):
    """W with a LoRA of rank 1 and s = 2."""
    model = peft.get_peft_model(Toy(dtype), peft.LoraConfig(r=1, lora_alpha=2, target_modules=["linear"]))
    layer = merge.lora_layers(model)["base_model.model.linear"]
    layer.get_base_layer().weight.data = torch.tensor(weight, dtype=dtype)
    layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = torch.tensor(a), torch.tensor(b)
    return model


def test_a_merge_worked_out_by_hand():
    model = toy([[1.0, 2.0], [3.0, 4.0]], a=[[1.0, -1.0]], b=[[0.5], [0.25]])
    merged = merge.merge_lora(model)
    assert merged.linear.weight.tolist() == [[2.0, 1.0], [3.5, 3.5]]  # + 2 [[0.5, -0.5], [0.25, -0.25]]
    assert isinstance(merged.linear, torch.nn.Linear)


def test_the_sum_is_rounded_once():
    """1 + 2 x 0.001953125 lies halfway between two bf16 numbers, 2 x 0.00196 more: the sum of halves would round down."""
    exact = 1 + 2 * 0.00196
    model = toy([[1.0, 1.0], [1.0, 1.0]], a=[[0.00196, 0.0]], b=[[1.0], [0.0]], dtype=torch.bfloat16)
    merged = merge.merge_lora(model)
    assert merged.linear.weight[0, 0].item() == torch.tensor(exact).bfloat16().item() == 1.0078125
    assert merged.linear.weight[1].tolist() == [1.0, 1.0]


def test_a_merge_in_fp32_is_that_of_peft(config):
    policy = load_policy(config)
    fill_lora(policy, 0.02)
    state = {name: w.clone() for name, w in policy.model.state_dict().items()}
    mine = {name: w.clone() for name, w in merge.merge_lora(policy.model).state_dict().items()}
    other = load_policy(config).model
    other.load_state_dict(state)
    theirs = other.merge_and_unload().state_dict()
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=0, atol=1e-6)


def test_what_merges_into_nothing_or_into_infinity_is_refused():
    with pytest.raises(RunError, match="changes none of the 1 matrices"):
        merge.merge_lora(toy([[1.0, 2.0], [3.0, 4.0]], a=[[1.0, -1.0]], b=[[0.0], [0.0]]))
    with pytest.raises(RunError, match="changes none"):
        merge.merge_lora(toy([[1.0, 2.0], [3.0, 4.0]], a=[[1e-4, 1e-4]], b=[[1.0], [1.0]], dtype=torch.bfloat16))
    with pytest.raises(RunError, match="linear: W . s B A is not finite in torch.float16"):
        merge.merge_lora(toy([[1.0, 2.0], [3.0, 4.0]], a=[[6e4, 0.0]], b=[[1.0], [0.0]], dtype=torch.float16))


def test_a_lora_that_shares_the_input_embeddings_is_refused():
    model = toy([[1.0, 2.0], [3.0, 4.0]], a=[[1.0, -1.0]], b=[[0.5], [0.25]])
    model.get_input_embeddings().weight = merge.lora_layers(model)["base_model.model.linear"].get_base_layer().weight
    with pytest.raises(RunError, match="linear shares its weights with the input embeddings"):
        merge.merge_lora(model)


def test_an_adapter_of_another_kind_is_refused(in_bf16):
    merge.check_plain_lora(in_bf16.model)
    in_bf16.model.peft_config["default"].use_dora = True
    with pytest.raises(ConfigError, match="not a plain LoRA .use_dora."):
        merge.check_plain_lora(in_bf16.model)


# --- the logits


def test_logits_are_those_of_fp32_arithmetic_over_16_bit_weights(in_bf16, config):
    config.dtype = "float32"
    wide = load_policy(config)
    wide.model.load_state_dict(in_bf16.model.state_dict())
    before = {name: p.detach().clone() for name, p in in_bf16.model.named_parameters()}
    logits = merge.compute_logits(in_bf16.model, TEXTS)
    alone = [wide.model(torch.tensor([text])).logits[0] for text in TEXTS]  # without padding
    torch.testing.assert_close(logits, torch.cat(alone).detach(), rtol=1e-4, atol=1e-4)
    assert all(p.dtype == before[name].dtype and p.equal(before[name]) for name, p in in_bf16.model.named_parameters())


def compared(policy, merged):
    """The arguments of check_difference. merged: a function that makes the merged model of the policy's."""
    trained = merge.compute_logits(policy.model, TEXTS)
    with policy.model.disable_adapter():
        lora_effect = merge.largest_difference(trained, merge.compute_logits(policy.model, TEXTS))
    return merge.largest_difference(merge.compute_logits(merged(policy.model), TEXTS), trained), lora_effect


@pytest.mark.parametrize("size", [0.05, 0.02, 0.002, 0.0002])
def test_a_right_merge_passes(in_bf16, size):
    """Down to a LoRA whose effect is hardly larger than that of rounding."""
    fill_lora(in_bf16, size)
    difference, lora_effect = compared(in_bf16, merge.merge_lora)
    assert 0 < difference < 0.1 < lora_effect or size == 0.0002
    merge.check_difference(difference, lora_effect)


@pytest.mark.parametrize("scale", [0.0, 2.0, 3.0])
def test_a_lora_left_out_or_wrongly_scaled_is_refused(in_bf16, scale):
    def wrongly_merged(model):
        for layer in merge.lora_layers(model).values():
            layer.scaling["default"] *= scale
        return merge.merge_lora(model) if scale else model.unload()

    with pytest.raises(RunError, match="the merged model is not what was trained: its logits differ by"):
        merge.check_difference(*compared(in_bf16, wrongly_merged))


def test_logits_that_are_not_finite_are_refused():
    with pytest.raises(RunError):
        merge.check_difference(float("nan"), 1.0)
