"""The merge of a LoRA into 16-bit weights: the sum, and the check that its result is what was trained."""

import peft
import pytest
import safetensors.torch
import torch
from conftest import fill_lora

from export import merge
from rl.config import ConfigError, RunError
from rl.model.policy import load_policy, save_adapter

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
    merged, changed = merge.merge(model)
    assert merged.linear.weight.tolist() == [[2.0, 1.0], [3.5, 3.5]]  # + 2 [[0.5, -0.5], [0.25, -0.25]]
    assert changed == 1 and isinstance(merged.linear, torch.nn.Linear)


def test_the_sum_is_rounded_once():
    """1 + 2 x 0.001953125 lies halfway between two bf16 numbers, 2 x 0.00196 more: the sum of halves would round down."""
    exact = 1 + 2 * 0.00196
    merged, _ = merge.merge(toy([[1.0, 1.0], [1.0, 1.0]], a=[[0.00196, 0.0]], b=[[1.0], [0.0]], dtype=torch.bfloat16))
    assert merged.linear.weight[0, 0].item() == torch.tensor(exact).bfloat16().item() == 1.0078125
    assert merged.linear.weight[1].tolist() == [1.0, 1.0]


def test_the_mirrored_weights_have_the_rounding_error_reversed():
    layer = merge.lora_layers(toy([[1.0, 1.0], [1.0, 1.0]], [[0.003, 0.0]], [[1.0], [0.0]], torch.bfloat16)).popitem()[
        1
    ]
    exact = merge.merged_weight(layer)
    torch.testing.assert_close(
        merge.mirrored_weight(layer) - exact, exact - exact.bfloat16().float(), rtol=0, atol=1e-7
    )


def test_a_merge_in_fp32_is_that_of_peft(config):
    policy = load_policy(config)
    fill_lora(policy, 0.02)
    state = {name: w.clone() for name, w in policy.model.state_dict().items()}
    mine = {name: w.clone() for name, w in merge.merge(policy.model)[0].state_dict().items()}
    other = load_policy(config).model
    other.load_state_dict(state)
    theirs = other.merge_and_unload().state_dict()
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=0, atol=1e-6)


def test_what_merges_into_nothing_or_into_infinity_is_refused():
    with pytest.raises(RunError, match="changes none of the 1 matrices"):
        merge.merge(toy([[1.0, 2.0], [3.0, 4.0]], a=[[1.0, -1.0]], b=[[0.0], [0.0]]))
    with pytest.raises(RunError, match="changes none"):
        merge.merge(toy([[1.0, 2.0], [3.0, 4.0]], a=[[1e-4, 1e-4]], b=[[1.0], [1.0]], dtype=torch.bfloat16))
    with pytest.raises(RunError, match="linear: W . s B A is not finite in fp16"):
        merge.merge(toy([[1.0, 2.0], [3.0, 4.0]], a=[[6e4, 0.0]], b=[[1.0], [0.0]], dtype=torch.float16))


def test_a_lora_that_is_not_whole_or_of_another_kind_is_refused(in_bf16, tmp_path):
    save_adapter(in_bf16, tmp_path)
    assert merge.check_landed(in_bf16.model, tmp_path) == 56
    weights = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    first = min(weights)
    for changed, message in (
        (weights | {"base_model.model.other.lora_A.weight": torch.ones(2)}, "has no place in the base model"),
        (weights | {first: weights[first] + 1}, "is not the one in the file"),
        ({name: w for name, w in weights.items() if name != first}, "is not in the file"),
    ):
        safetensors.torch.save_file(changed, tmp_path / "adapter_model.safetensors")
        with pytest.raises(ConfigError, match=message):
            merge.check_landed(in_bf16.model, tmp_path)
    in_bf16.model.peft_config["default"].use_dora = True
    with pytest.raises(ConfigError, match="not a plain LoRA .use_dora."):
        merge.check_landed(in_bf16.model, tmp_path)


# --- the logits


def test_logits_are_those_of_fp32_arithmetic_over_16_bit_weights(in_bf16, config):
    config.dtype = "float32"
    wide = load_policy(config)
    wide.model.load_state_dict(in_bf16.model.state_dict())
    before = {name: p.detach().clone() for name, p in in_bf16.model.named_parameters()}
    logits = merge.logits_of(in_bf16.model, TEXTS)
    alone = [wide.model(torch.tensor([text])).logits[0] for text in TEXTS]  # without padding
    torch.testing.assert_close(logits, torch.cat(alone).detach(), rtol=1e-4, atol=1e-4)
    assert all(p.dtype == before[name].dtype and p.equal(before[name]) for name, p in in_bf16.model.named_parameters())


@pytest.mark.parametrize("scale", [0.0, 0.5, 0.9, 2.0])
def test_a_lora_left_out_or_wrongly_scaled_is_caught(in_bf16, scale):
    expected = merge.Expected.of(in_bf16.model, TEXTS)
    for layer in merge.lora_layers(in_bf16.model).values():
        layer.scaling["default"] *= scale
    if scale:
        merged = merge.merge(in_bf16.model)[0]
    else:
        merged = in_bf16.model.unload()
    found = expected.compare(merge.logits_of(merged, TEXTS))
    with pytest.raises(RunError, match="the model is not what was trained: its logits differ by"):
        expected.check_explained(found, "the model")


@pytest.mark.parametrize("size", [0.05, 0.02, 0.002, 0.0002])
def test_a_right_merge_is_as_far_off_as_rounding_explains(in_bf16, size):
    fill_lora(in_bf16, size)
    expected = merge.Expected.of(in_bf16.model, TEXTS)
    found = expected.compare(merge.logits_of(merge.merge(in_bf16.model)[0], TEXTS))
    expected.check_explained(found, "the model")
    assert 0.8 < found.rms / expected.rounding.rms < 1.25
    assert merge.lost_by_rounding(expected) == (size < 0.001)


def test_logits_that_are_no_numbers_are_caught(in_bf16):
    expected = merge.Expected.of(in_bf16.model, TEXTS)
    with pytest.raises(RunError):
        expected.check_explained(expected.compare(expected.logits * float("nan")), "the model")
