"""The policy: log-probabilities against a slow reference, the LoRA, 4-bit weights, chat templates and end tokens."""

import json
import os

import bitsandbytes
import pytest
import safetensors.torch
import torch
from conftest import copy_tiny, fill_lora, vectors

from rl.config import Config, ConfigError
from rl.fit.shapes import find_shape
from rl.model.logprobs import completion_logprobs
from rl.model.lora import reloaded_adapter, restore_adapter, save_adapter
from rl.model.policy import (
    choose_device,
    load_policy,
    make_deterministic,
)
from rl.update import Updater


def rowwise_logprobs(policy, prompt, completion, temperature):
    """Compute the log-probabilities and entropies of a single row in fp32, without padding: the slow reference."""
    with torch.no_grad():
        logits = policy.model(input_ids=torch.tensor([prompt + completion])).logits[0].float()
    table = torch.log_softmax(logits / temperature, -1)[len(prompt) - 1 : -1]  # (C, V)
    return table[range(len(completion)), completion], -(table.exp() * table).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_and_entropy_equal_a_row_by_row_forward(policy, episodes, temperature):
    policy.temperature = temperature
    prompts = [e.prompt_ids for e in episodes]
    completions = [e.completion_ids for e in episodes]
    logprobs, mask, entropy = completion_logprobs(policy, prompts, completions, with_entropy=True)
    assert logprobs.shape == mask.shape == entropy.shape == (16, max(map(len, completions)))
    for i, completion in enumerate(completions):
        expected, expected_entropy = rowwise_logprobs(policy, prompts[i], completion, temperature)
        n = len(completion)
        torch.testing.assert_close(logprobs[i, :n], expected, atol=3e-5, rtol=0)  # logits reach 50 at temperature 0.6
        torch.testing.assert_close(entropy[i, :n], expected_entropy, atol=1e-5, rtol=0)
        assert mask[i].tolist() == [True] * n + [False] * (mask.shape[1] - n)
        assert not logprobs[i, n:].any() and not entropy[i, n:].any()


def test_mask_depends_on_lengths_and_not_on_token_ids(policy):
    """A completion may contain the padding token, and its end token is part of it."""
    (eos,) = policy.eos_ids
    completions = [[policy.pad_id, 20, eos], [eos]]
    _, mask, _ = completion_logprobs(policy, [[4, 40], [4, 41]], completions)
    assert mask.tolist() == [[True, True, True], [True, False, False]]


def test_sampler_and_scorer_agree(policy, episodes):
    logprobs, _, _ = completion_logprobs(policy, [e.prompt_ids for e in episodes], [e.completion_ids for e in episodes])
    for row, episode in zip(logprobs, episodes):
        sampled = torch.tensor(episode.sampler_logprobs)
        torch.testing.assert_close(row[: len(sampled)], sampled, atol=1e-4, rtol=0)


def test_lora_is_on_every_linear_layer_and_nothing_else_trains(policy):
    linear = [name for name, m in policy.model.named_modules() if type(m) is torch.nn.Linear and "lora_" not in name]
    without = [name for name in linear if not name.endswith(".base_layer")]
    assert len(linear) == 4 * 7 + 1 and without == ["base_model.model.lm_head"]
    trained = [name for name, p in policy.model.named_parameters() if p.requires_grad]
    assert len(trained) == 4 * 7 * 2 and all("lora_" in name for name in trained)


def test_reference_is_the_base_model(policy):
    """Without its adapter the policy equals a model loaded without one."""
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained("data/tiny", dtype=torch.float32)
    ids = torch.tensor([policy.encode_prompt("What is 3 + 4?")])
    with torch.no_grad():
        expected = base(input_ids=ids).logits
        with policy.reference():
            torch.testing.assert_close(policy.model(input_ids=ids).logits, expected)
        assert not torch.allclose(policy.model(input_ids=ids).logits, expected, atol=1e-2)


def test_dropout_is_disabled(policy, tmp_path, config):
    """Two forward passes in training mode are equal, even if the configs of model and LoRA have dropout."""
    save_adapter(policy, tmp_path / "a")
    lora = json.loads((tmp_path / "a/adapter_config.json").read_text())
    (tmp_path / "a/adapter_config.json").write_text(json.dumps(lora | {"lora_dropout": 0.5}))
    config.model = copy_tiny(tmp_path / "m", config={"attention_dropout": 0.5})
    config.adapter = str(tmp_path / "a")
    policy = load_policy(config)
    policy.model.train()
    batch = [[4, 30, 31, 32]], [[33, 34, 35]]
    assert torch.equal(completion_logprobs(policy, *batch)[0], completion_logprobs(policy, *batch)[0])


def test_functional_dropout_is_disabled_too(policy):
    layer = policy.model.base_model.model.model.layers[0]
    layer.hidden_dropout = 0.3  # an attribute, as in OPT and others
    make_deterministic(policy.model)
    assert layer.hidden_dropout == 0.0


def test_reloaded_adapter_gives_the_saved_logits(policy, tmp_path):
    prompt = torch.tensor([policy.encode_prompt("What is 3 + 4?")])
    with torch.no_grad():
        saved_logits = policy.model(input_ids=prompt).logits
        save_adapter(policy, tmp_path / "step_1")
        fill_lora(policy, 0.0)
        with reloaded_adapter(policy, tmp_path / "step_1"):
            torch.testing.assert_close(policy.model(input_ids=prompt).logits, saved_logits)
        assert not torch.allclose(policy.model(input_ids=prompt).logits, saved_logits, atol=1e-2)
    assert all(p.requires_grad for name, p in policy.model.named_parameters() if "lora_" in name)
    assert "reloaded" not in policy.model.peft_config
    files = {path.name for path in (tmp_path / "step_1").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= files


def test_policy_that_starts_from_an_adapter_has_its_frozen_copy_as_reference(policy, tmp_path, config):
    save_adapter(policy, tmp_path / "a")
    config.adapter = str(tmp_path / "a")
    reloaded = load_policy(config)
    prompt = torch.tensor([policy.encode_prompt("What is 3 + 4?")])
    with torch.no_grad():
        before = policy.model(input_ids=prompt).logits
        torch.testing.assert_close(reloaded.model(input_ids=prompt).logits, before)
        fill_lora(reloaded, 0.05, seed=7)
        with reloaded.reference():
            torch.testing.assert_close(reloaded.model(input_ids=prompt).logits, before)
        assert not torch.allclose(reloaded.model(input_ids=prompt).logits, before, atol=1e-2)
    trained = [name for name, p in reloaded.model.named_parameters() if p.requires_grad]
    assert trained and all(".default." in name for name in trained)


def test_refuses_an_adapter_of_another_model(policy, tmp_path, config):
    save_adapter(policy, tmp_path / "a")
    from transformers import AutoConfig, AutoModelForCausalLM

    small = AutoConfig.from_pretrained("data/tiny", hidden_size=64)
    AutoModelForCausalLM.from_config(small).save_pretrained(tmp_path / "m")
    policy.tokenizer.save_pretrained(tmp_path / "m")
    config.adapter = str(tmp_path / "a")
    config.model = str(tmp_path / "m")
    with pytest.raises(ConfigError, match="^adapter: .* does not fit"):
        load_policy(config)


@pytest.mark.parametrize("damage", ["cut short", "a matrix is missing", "no file"])
def test_refuses_a_damaged_adapter(policy, tmp_path, config, damage):
    """At the start of a run and when a checkpoint is restored, so that training never continues with random weights."""
    save_adapter(policy, tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    if damage == "cut short":
        weights.write_bytes(weights.read_bytes()[:100_000])
    elif damage == "no file":
        weights.unlink()
    else:
        tensors = safetensors.torch.load_file(weights)
        del tensors[next(iter(tensors))]
        safetensors.torch.save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(ConfigError, match="^adapter: [^\n]+$"):
        restore_adapter(policy.model, tmp_path)
    config.adapter = str(tmp_path)
    with pytest.raises(ConfigError, match="^adapter: [^\n]+$"):
        load_policy(config)


# --- 4-bit


def test_4bit_gives_every_lora_matrix_a_gradient_after_an_evaluation(config):
    """On a CPU with AVX512-BF16, bitsandbytes would repack weights in a no-grad forward, and lose input gradients."""
    config.load_in_4bit = True
    policy = load_policy(config)
    layers = [m for m in policy.model.modules() if type(m) is bitsandbytes.nn.Linear4bit]
    assert len(layers) == 4 * 7 and not any(layer.support_avx512bf16_for_cpu for layer in layers)
    fill_lora(policy, 0.02)
    batch = [policy.encode_prompt("What is 3 + 4?")], [[20, 21, 22]]

    def gradients():
        policy.model.zero_grad()
        policy.model.train()
        completion_logprobs(policy, *batch)[0].sum().backward()
        return {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.requires_grad}

    fresh = gradients()
    policy.model.eval()
    with torch.no_grad():
        completion_logprobs(policy, *batch)
    after_evaluation = gradients()
    assert len(fresh) == 4 * 7 * 2 and all(g.abs().max() > 0 for g in fresh.values())
    for name, gradient in fresh.items():
        torch.testing.assert_close(after_evaluation[name], gradient, msg=name)


def test_4bit_logits_and_gradients_equal_those_of_the_dequantized_weights(config):
    """NF4 is far closer to the same weights dequantized to fp32 than these are to the original weights."""
    config.load_in_4bit = True
    quantized = load_policy(config)
    config.load_in_4bit = False
    original = load_policy(config)
    dequantized = load_policy(config)
    modules = dict(dequantized.model.named_modules())
    for name, module in quantized.model.named_modules():
        if type(module) is bitsandbytes.nn.Linear4bit:
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            modules[name].weight.data = weight.float().view(modules[name].weight.shape)
    batch = [quantized.encode_prompt("Compute 9 - 2 + 1.")], [[20, 21, 22]]

    def logits_and_gradients(policy):
        fill_lora(policy, 0.02)
        logprobs = completion_logprobs(policy, *batch)[0]
        logprobs.sum().backward()
        with torch.no_grad():
            logits = policy.model(input_ids=torch.tensor(batch[0])).logits
        return logits, vectors(p.grad for p in policy.trainable_parameters())

    for a, b, c in zip(*map(logits_and_gradients, (quantized, dequantized, original))):
        assert (a - b).norm() < 1e-4 * b.norm()
        assert (b - c).norm() > 100 * (a - b).norm()


# --- damaged weights


@pytest.mark.parametrize("damage", ["truncated", "pointer", "missing", "shape"])
def test_refuses_damaged_weights(tmp_path, config, damage):
    """They would otherwise be random numbers."""
    config.model = copy_tiny(tmp_path / "m", config={"vocab_size": 256} if damage == "shape" else {})
    weights = tmp_path / "m/model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:100_000])
    elif damage == "pointer":
        weights.write_text("version 1\noid sha256:0\nsize 3\n")
    elif damage == "missing":
        tensors = safetensors.torch.load_file(weights)
        del tensors["model.layers.2.mlp.up_proj.weight"]
        safetensors.torch.save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(ConfigError, match="model: ") as error:
        load_policy(config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("place", ["LoRA", "forward"])
def test_whatever_an_architecture_raises_is_a_one_line_error(tmp_path, config, monkeypatch, place):
    from transformers import AutoTokenizer, CohereConfig, CohereForCausalLM

    def fail(*_, **__):
        raise KeyError("no such\nlayer")

    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64, "hidden_size": 64}
    CohereForCausalLM(CohereConfig(**sizes, vocab_size=300, num_hidden_layers=1, eos_token_id=1)).save_pretrained(
        tmp_path
    )
    AutoTokenizer.from_pretrained("data/tiny").save_pretrained(tmp_path)
    config.model = str(tmp_path)
    if place == "LoRA":
        monkeypatch.setattr("rl.model.policy.peft.get_peft_model", fail)
    else:
        monkeypatch.setattr(CohereForCausalLM, "forward", fail)
    with pytest.raises(ConfigError, match="^model: .* .cohere. cannot be trained.* LoRA") as error:
        load_policy(config)
    assert "\n" not in str(error.value)


# --- GGUF files


def test_gguf_files_that_cannot_be_read_say_what_to_do(tmp_path, config):
    config.model = str(tmp_path / "missing.gguf")
    with pytest.raises(ConfigError, match="^model: the file .*missing.gguf does not exist$"):
        load_policy(config)
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"GGUF, but not really")
    config.model = str(file)
    with pytest.raises(ConfigError, match="^model: .*broken.gguf cannot be converted: .* Train the model") as error:
        load_policy(config)
    assert "\n" not in str(error.value)
    config.model = str(tmp_path)
    with pytest.raises(ConfigError, match="no config.json: to train its GGUF file, set model to .*broken.gguf$"):
        load_policy(config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.gguf"]  # no half-written folder
    with pytest.raises(ConfigError, match="^model: the dimensions of .*broken.gguf are unknown"):
        find_shape(str(file))


def test_a_gguf_file_is_converted_once_and_again_if_it_is_newer(tmp_path, config, monkeypatch):
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"GGUF")
    converted = []

    def convert(file, folder):
        converted.append(file)
        copy_tiny(folder)

    monkeypatch.setattr("rl.model.gguf.convert", convert)
    for _ in range(2):
        config.model = str(file)
        load_policy(config)
        assert config.model == f"{file}.hf"
    assert len(converted) == 1
    os.utime(file, (2**32, 2**32))
    config.model = str(file)
    load_policy(config)
    assert len(converted) == 2


# --- errors before anything is loaded


def test_refuses_missing_models_and_adapters(tmp_path):
    with pytest.raises(ConfigError, match="^model: data/tinny .* data/tiny?"):
        load_policy(Config(model="data/tinny"))
    with pytest.raises(ConfigError, match="^model: no-such-org/no-model [^\n]+$"):
        load_policy(Config(model="no-such-org/no-model"))
    with pytest.raises(ConfigError, match="^model: .* config.json"):
        load_policy(Config(model=str(tmp_path)))
    with pytest.raises(ConfigError, match="^adapter: .* adapter_config.json"):
        load_policy(Config(adapter=str(tmp_path)))


def test_refuses_settings_that_need_a_gpu():
    with pytest.raises(ConfigError, match="^device is cuda, .* NVIDIA GPU"):
        choose_device(Config(device="cuda"))
    with pytest.raises(ConfigError, match="^optim is adamw_8bit, .* NVIDIA GPU"):
        choose_device(Config(optim="adamw_8bit"))


def test_fp16_uses_loss_scaling(config):
    config.dtype = "float16"
    assert Updater(load_policy(config), None, config).optimizer.scaler.is_enabled()
    config.dtype = "float32"
    assert not Updater(load_policy(config), None, config).optimizer.scaler.is_enabled()
