"""Merging a LoRA into 16-bit weights: the sum, and the comparison of logits."""

import peft
import pytest
import torch
import transformers
from conftest import fill_lora
from peft.tuners.lora import LoraLayer

from export import merge
from rl.config import RunError
from rl.model.policy import load_policy

TEXTS = [[5, 9, 30, 41, 17, 60], [8, 22, 13]]


@pytest.fixture
def bf16_policy(config):
    """The tiny model in bfloat16, with a LoRA that changes its outputs."""
    config.dtype = "bfloat16"
    policy = load_policy(config)
    fill_lora(policy, 0.02)
    return policy


def lora_layers(model):
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


# --- the sum


class Toy(torch.nn.Module):
    """One linear layer."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.linear = torch.nn.Linear(2, 2, bias=False, dtype=dtype)


def make_toy(weight, a, b, dtype=torch.float32):
    """Return a linear layer with these weights and a LoRA of rank 1 with scale s = 2."""
    model = peft.get_peft_model(Toy(dtype), peft.LoraConfig(r=1, lora_alpha=2, target_modules=["linear"]))
    (layer,) = lora_layers(model)
    layer.get_base_layer().weight.data = torch.tensor(weight, dtype=dtype)
    layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = torch.tensor(a), torch.tensor(b)
    return model


def test_merge_equals_hand_calculation():
    model = make_toy([[1.0, 2.0], [3.0, 4.0]], a=[[1.0, -1.0]], b=[[0.5], [0.25]])
    merged, rounding = merge.merge_lora(model)
    assert rounding == 0
    assert merged.linear.weight.tolist() == [[2.0, 1.0], [3.5, 3.5]]  # + 2 [[0.5, -0.5], [0.25, -0.25]]
    assert isinstance(merged.linear, torch.nn.Linear)


def test_sum_is_rounded_once():
    """1 + 2 x 0.001953125 is halfway between two bf16 numbers and 2 x 0.00196 is more; rounding it first rounds down."""
    exact = 1 + 2 * 0.00196
    model = make_toy([[1.0, 1.0], [1.0, 1.0]], a=[[0.00196, 0.0]], b=[[1.0], [0.0]], dtype=torch.bfloat16)
    merged, rounding = merge.merge_lora(model)
    assert rounding == pytest.approx((1.0078125 - exact) / (exact - 1), rel=1e-4)
    assert merged.linear.weight[0, 0].item() == torch.tensor(exact).bfloat16().item() == 1.0078125
    assert merged.linear.weight[1].tolist() == [1.0, 1.0]


def test_merge_in_fp32_equals_peft(config):
    policy = load_policy(config)
    fill_lora(policy, 0.02)
    state = {name: w.clone() for name, w in policy.model.state_dict().items()}
    merged = {name: w.clone() for name, w in merge.merge_lora(policy.model)[0].state_dict().items()}
    other = load_policy(config).model
    other.load_state_dict(state)
    peft_merged = other.merge_and_unload().state_dict()
    assert merged.keys() == peft_merged.keys()
    for name in merged:
        torch.testing.assert_close(merged[name], peft_merged[name], rtol=0, atol=1e-6)


def test_refuses_a_merge_that_overflows():
    with pytest.raises(RunError, match="linear: W . s B A is not finite in torch.float16"):
        merge.merge_lora(make_toy([[1.0, 2.0], [3.0, 4.0]], a=[[6e4, 0.0]], b=[[1.0], [0.0]], dtype=torch.float16))


def test_dtype_of_sharded_weights_and_of_files_without_safetensors(tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained("data/tiny", dtype="float16")
    model.save_pretrained(tmp_path, max_shard_size="500KB")
    assert len(merge.weight_files(str(tmp_path))) > 1 and merge.merge_dtype(str(tmp_path)) == ("float16", True)
    for file in tmp_path.glob("*.safetensors*"):
        file.unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert merge.merge_dtype(str(tmp_path)) == ("float16", False)


# --- the logits


def test_logits_are_computed_in_fp32_from_16_bit_weights(bf16_policy, config):
    config.dtype = "float32"
    fp32_policy = load_policy(config)
    fp32_policy.model.load_state_dict(bf16_policy.model.state_dict())
    before = {name: p.detach().clone() for name, p in bf16_policy.model.named_parameters()}
    logits = merge.compute_logits(bf16_policy.model, TEXTS)
    expected = [fp32_policy.model(torch.tensor([text])).logits[0] for text in TEXTS]  # without padding
    torch.testing.assert_close(logits, torch.cat(expected).detach(), rtol=1e-4, atol=1e-4)
    assert all(
        p.dtype == before[name].dtype and p.equal(before[name]) for name, p in bf16_policy.model.named_parameters()
    )


def compare_merged(policy, scale=1.0):
    """Merge with the scale of the LoRA multiplied by a factor, and compare the logits."""
    texts = [
        policy.encode_prompt(f"What is {a} + {a + 3}?")
        + policy.tokenizer.encode(
            f"<think>{a}+{a + 3}={2 * a + 3}</think>\\boxed{{{2 * a + 3}}}", add_special_tokens=False
        )
        for a in (2, 5, 9, 11)
    ]
    trained = merge.compute_logits(policy.model, texts)
    with policy.model.disable_adapter():
        base = merge.compute_logits(policy.model, texts)
    for layer in lora_layers(policy.model):
        layer.scaling["default"] *= scale
    model, rounding = merge.merge_lora(policy.model)
    return merge.compare_logits(base, trained, merge.compute_logits(model, texts), rounding)


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("size", [0.2, 0.05, 0.02, 0.005, 0.002])
def test_accepts_a_correct_merge(bf16_policy, size, seed):
    """Even a LoRA of which a fifth is lost in rounding is accepted."""
    fill_lora(bf16_policy, size, seed)
    figures = compare_merged(bf16_policy)
    assert 0 < figures["merged"] < 0.2 and figures["merged"] < 0.5 * figures["lora"]
    assert figures["rounding"] < 0.21
    assert figures["relative_rms"] < max(0.04, 1.4 * figures["rounding"])  # well below the bound


@pytest.mark.parametrize("scale", [0.0, 0.5, 0.9, 1.1, 2.0])
@pytest.mark.parametrize("size", [0.2, 0.05, 0.02, 0.01])
def test_refuses_a_missing_or_wrongly_scaled_lora(bf16_policy, scale, size):
    fill_lora(bf16_policy, size)
    with pytest.raises(RunError, match="the merged model is not the trained model"):
        compare_merged(bf16_policy, scale)


@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0])
def test_refuses_a_wrongly_scaled_small_lora(bf16_policy, scale):
    fill_lora(bf16_policy, 0.005)
    with pytest.raises(RunError, match="the merged model is not the trained model"):
        compare_merged(bf16_policy, scale)


@pytest.mark.parametrize("size", [0.0, 0.0001])
def test_refuses_a_lora_that_is_empty_or_lost_in_rounding(bf16_policy, size):
    fill_lora(bf16_policy, size)
    with pytest.raises(RunError, match="the LoRA is too small for 16 bits"):
        compare_merged(bf16_policy)


def test_refuses_logits_that_are_not_finite():
    base = torch.randn(4, 5)
    with pytest.raises(RunError):
        merge.compare_logits(base, base + 1, base + torch.nan, 0.01)
