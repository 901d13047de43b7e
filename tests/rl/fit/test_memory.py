"""Memory: the dimensions of models, the memory of a run by part, and the prediction against measurements."""

import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import bare_policy
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.config import Config, ConfigError
from rl.fit.cards import GB
from rl.fit.memory import NF4_BYTES, Prediction, predict
from rl.fit.shapes import KNOWN_MODELS, find_shape, shape_from_config

TINY_SHAPE = dict(
    vocab_size=101,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)
NO_FOLDER = Path("no such folder")
known_shape = functools.cache(find_shape)

# --- dimensions


@pytest.mark.parametrize(
    "model, parameters",
    [
        ("Qwen/Qwen3-0.6B", 596_049_920),
        ("unsloth/Qwen3-1.7B-unsloth-bnb-4bit", 1_720_574_976),
        ("unsloth/Qwen3-4B-Base", 4_022_468_096),
        ("Qwen/Qwen3-4B-Instruct-2507", 4_022_468_096),
        ("Qwen/Qwen3-8B", 8_190_735_360),
        ("Qwen/Qwen2.5-0.5B-Instruct", 494_032_768),
        ("Qwen/Qwen2.5-Math-1.5B", 1_543_714_304),
        ("Qwen/Qwen2.5-3B", 3_085_938_688),
        ("Qwen/Qwen2.5-Coder-7B-Instruct", 7_615_616_512),
        ("meta-llama/Llama-3.2-1B", 1_235_814_400),
        ("unsloth/Llama-3.2-3B-Instruct", 3_212_749_824),
        ("unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit", 8_030_261_248),
        ("HuggingFaceTB/SmolLM2-135M", 134_515_008),
        ("HuggingFaceTB/SmolLM2-360M-Instruct", 361_821_120),
        ("HuggingFaceTB/SmolLM2-1.7B", 1_711_376_384),
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", 1_100_048_384),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", 1_777_088_000),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", 7_615_616_512),
    ],
)
def test_known_models_have_their_published_parameters(model, parameters):
    shape = known_shape(model)
    assert shape.parameters == parameters
    assert shape.is_4bit == ("bnb-4bit" in model)


@pytest.mark.parametrize(
    "model",
    [
        "someone/Qwen3-40B",
        "gpt2",
        "deepseek-ai/DeepSeek-R1-0528-Qwen3-8B",
        "Qwen/Qwen3",
        "",
        # formats that cannot be trained
        "unsloth/Qwen3-4B-GGUF",
        "Qwen/Qwen3-8B-AWQ",
        "Qwen/Qwen3-8B-FP8",
        "mlx-community/Qwen3-4B-MLX-4bit",
    ],
)
def test_error_for_an_unknown_model_names_the_alternatives(model):
    with pytest.raises(ConfigError, match="^model: .*config.json.*Qwen/Qwen3-0.6B.*--probe"):
        find_shape(model)


@pytest.mark.parametrize(
    "family, settings",
    [
        ("Llama", {}),
        ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("Qwen2", {"tie_word_embeddings": True}),
        ("Qwen3", {"head_dim": 20}),
        ("Qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
        ("Mistral", {"head_dim": 16}),
        ("Phi3", {"pad_token_id": 0}),
        ("GPTNeoX", {}),
        ("GPT2", {}),
        ("Gemma3", {"head_dim": 16}),
    ],
)
def test_parameter_counts_equal_those_of_transformers_and_peft(family, settings):
    import peft
    import torch
    import transformers

    names = {"GPT2": "gpt2", "GPTNeoX": "gpt_neox", "Gemma3": "gemma3_text"}
    config = transformers.AutoConfig.for_model(names.get(family, family.lower()), **TINY_SHAPE, **settings)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    shape = shape_from_config(config, NO_FOLDER)
    assert shape.parameters == model.num_parameters()
    assert shape.uses_decoder == (family in ("Llama", "Mistral", "Qwen2", "Qwen3"))
    assert shape.qk_norm == (family in ("Qwen3", "Gemma3"))
    model = peft.get_peft_model(model, peft.LoraConfig(r=5, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert shape.lora_parameters(5) == model.get_nb_trainable_parameters()[0]


def test_shape_of_the_tiny_model(policy):
    shape = find_shape("data/tiny")
    trainable, total = policy.model.get_nb_trainable_parameters()
    assert shape.lora_parameters(16) == trainable
    assert shape.parameters == total - trainable
    assert 2 * shape.parameters < shape.file_bytes < 2.1 * shape.parameters
    assert shape.tokenizer_bytes > 0


def test_refuses_folders_without_a_usable_config(tmp_path):
    with pytest.raises(ConfigError, match="config.json"):
        find_shape(str(tmp_path))
    (tmp_path / "config.json").write_text('{"n_embd": 8}')
    with pytest.raises(ConfigError, match="--probe.*model_type"):
        find_shape(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(ConfigError, match="--probe.*num_attention_heads"):
        find_shape(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not a valid JSON"):
        find_shape(str(tmp_path))


def test_shape_needs_no_weights(tmp_path):
    """A config.json is enough, as for a model on the Hub, for any architecture, saved in 4 bits or not."""
    config = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]} | TINY_SHAPE
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = find_shape(str(tmp_path))
    assert shape.file_bytes is None and shape.tokenizer_bytes is None and not shape.is_4bit
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert find_shape(str(tmp_path)) == dataclasses.replace(shape, is_4bit=True)


# --- the parts, computed by hand


def predict_on_cuda(config: Config, model: str, prompt: int = 100) -> Prediction:
    return predict(config, known_shape(model), "cuda", "bfloat16", prompt)


@pytest.mark.parametrize(
    "model, gigabytes", [("Qwen/Qwen3-0.6B", 0.54), ("Qwen/Qwen3-1.7B", 1.35), ("Qwen/Qwen3-4B", 2.65)]
)
def test_weights(model, gigabytes):
    shape = known_shape(model)
    assert predict_on_cuda(Config(), model).weights == 2 * shape.parameters
    in_4bit = predict_on_cuda(Config(load_in_4bit=True), model).weights
    assert in_4bit == shape.linear_parameters * NF4_BYTES + (shape.parameters - shape.linear_parameters) * 2
    assert in_4bit == pytest.approx(gigabytes * 1e9, rel=0.02)
    assert predict_on_cuda(Config(), model.replace("Qwen/", "unsloth/") + "-bnb-4bit").weights == in_4bit
    assert predict(Config(), shape, "cpu", "float32", 100).weights == 4 * shape.parameters


@pytest.mark.parametrize("model, token", [("Qwen/Qwen3-0.6B", 114_688), ("Qwen/Qwen3-4B", 147_456)])
def test_keys_and_values(model, token):
    """One more token per row costs 2 x layers x KV heads x head_dim x 2 bytes."""
    config = Config(prompts_per_step=4, num_generations=8, max_completion_length=300, eval_questions=1)
    longer = dataclasses.replace(config, max_completion_length=301)
    assert predict_on_cuda(longer, model).rollout - predict_on_cuda(config, model).rollout == 32 * token


def test_lora_and_optimizer():
    """Llama-3.2-1B, rank 16: 16 layers x 16 x (2 x 2048+2048 + 2 x (2048+512) + 3 x (2048+8192)) = 11,272,192."""
    n = 16 * 16 * (2 * 4096 + 2 * 2560 + 3 * 10240)
    assert n == 11_272_192
    prediction = predict_on_cuda(Config(), "meta-llama/Llama-3.2-1B")
    assert (prediction.lora, prediction.optimizer, prediction.critic) == (8 * n, 8 * n, 0)
    assert predict_on_cuda(Config(adapter="runs/x"), "meta-llama/Llama-3.2-1B").lora == 12 * n
    assert predict_on_cuda(Config(optim="adamw_8bit"), "meta-llama/Llama-3.2-1B").optimizer == 2 * n
    assert predict_on_cuda(Config(algorithm="ppo"), "meta-llama/Llama-3.2-1B").critic == 16 * (n + 2049)
    assert predict_on_cuda(Config(algorithm="ppo", critic="head"), "meta-llama/Llama-3.2-1B").critic == 16 * 2049


def test_peak_counts_the_larger_of_rollout_and_update():
    prediction = predict_on_cuda(Config(), "Qwen/Qwen3-0.6B")
    permanent = prediction.weights + prediction.lora + prediction.optimizer + prediction.fixed
    assert prediction.peak == permanent + max(prediction.rollout, prediction.update)
    assert prediction.peak_mb == prediction.peak / 2**20
    prediction.rollout = 2 * prediction.update
    assert prediction.peak == permanent + prediction.rollout
    prediction.allocator_keeps = True  # small models on a CPU
    assert prediction.peak == permanent + prediction.rollout + prediction.update
    prediction.load = 10 * prediction.peak
    assert prediction.peak == prediction.fixed + prediction.load


def test_allocator_keeps_freed_memory_of_small_models_on_a_cpu():
    tiny = find_shape("data/tiny")
    assert predict(Config(), tiny, "cpu", "float32", 100).allocator_keeps
    assert not predict(Config(), tiny, "cuda", "bfloat16", 100).allocator_keeps
    assert not predict(Config(), known_shape("HuggingFaceTB/SmolLM2-135M"), "cpu", "float32", 100).allocator_keeps


def test_predicts_fewer_rows_if_memory_is_short():
    """As in rl/model/engine.py, first with fewer rows, then without scratch weights."""
    shape = known_shape("Qwen/Qwen3-1.7B")
    config = Config(prompts_per_step=32, num_generations=8, eval_questions=1)
    large, small = (predict(config, shape, "cuda", "bfloat16", 256, gb * GB) for gb in (80, 10))
    assert large.rows == large.rows_requested == 256
    assert large == predict(config, shape, "cuda", "bfloat16", 256)
    assert 8 <= small.rows < 256
    assert small.rollout < large.rollout


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_saved_memory_of_a_layer_equals_what_autograd_saves(family):
    prompt, length, group = 20, 40, 8
    config = Config(
        prompts_per_step=1,
        num_generations=group,
        max_completion_length=length,
        lora_r=4,
        max_tokens_per_micro_batch=10**4,
    )
    prompts, completions = [[5] * prompt] * group, [[6] * length] * group
    one, three = (saved_by_autograd(family, layers, prompts, completions) for layers in (1, 3))
    predicted_one, predicted_three = (
        predict(config, tiny_shape(family, layers), "cpu", "float32", prompt).update for layers in (1, 3)
    )
    assert predicted_three - predicted_one == pytest.approx(three - one, rel=0.05)


def tiny_shape(family, layers):
    import transformers

    sizes = TINY_SHAPE | {"num_hidden_layers": layers, "head_dim": 12}
    return shape_from_config(transformers.AutoConfig.for_model(family.lower(), **sizes), NO_FOLDER)


def saved_by_autograd(family, layers, prompts, completions) -> int:
    """Return the bytes of the tensors that autograd saves for the backward of a model, without its parameters."""
    import peft
    import torch
    import transformers

    from rl.model.decoder import Decoder
    from rl.model.logprobs import completion_logprobs

    settings = getattr(transformers, f"{family}Config")(**TINY_SHAPE | {"num_hidden_layers": layers, "head_dim": 12})
    model = getattr(transformers, f"{family}ForCausalLM")(settings)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    policy = bare_policy(model, decoder=Decoder(model))
    storages = {}

    def record(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage  # keeps it alive, so that its address is not reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        completion_logprobs(policy, prompts, completions)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(storage.nbytes() for pointer, storage in storages.items() if pointer not in parameters)


# --- larger settings never need less memory

GROWING = {
    "max_tokens_per_micro_batch": st.integers(1, 20000),
    "rollout_batch_size": st.integers(8, 1000),
    "max_completion_length": st.integers(1, 5000),
    "prompts_per_step": st.integers(1, 100),
    "eval_questions": st.integers(1, 1000),
    "lora_r": st.integers(1, 128),
    "prompt": st.integers(1, 5000),
}


@settings(max_examples=15, deadline=None)
@given(
    st.fixed_dictionaries(GROWING),
    st.sampled_from(sorted(GROWING)),
    st.integers(1, 3000),
    st.sampled_from(sorted(KNOWN_MODELS)),
    st.sampled_from([("cpu", "float32"), ("cuda", "bfloat16")]),
    st.sampled_from(["grpo", "ppo", "dpo"]),
    st.sampled_from(["unsloth", "transformers"]),
    st.booleans(),
)
def test_larger_settings_never_need_less_memory(
    values, name, increase, model, device_and_dtype, algorithm, backend, flag
):
    def peak(prompt, **values):
        config = Config(
            algorithm=algorithm, beta=0.1, gradient_checkpointing=flag, load_in_4bit=not flag, backend=backend, **values
        )
        return predict(config, known_shape(model), *device_and_dtype, prompt).peak

    assert peak(**values) <= peak(**values | {name: values[name] + increase})


# --- against measurements: runs of train.py on random weights, two steps of short completions and a small evaluation

MEASURED = {  # models that differ in vocabulary, depth, width, tied embeddings and algorithm
    "qwen3": ("qwen3", (151936, 768, 2048, 8, 12, 4, 64, True), []),
    "llama": ("llama", (8192, 640, 1728, 24, 10, 10, 64, False), ["--algorithm", "ppo", "--gradient-checkpointing"]),
    "qwen2": ("qwen2", (50304, 1536, 4096, 5, 12, 2, 128, True), ["--lora-r", "32"]),
}
RUN = (
    "--max-steps 2 --prompts-per-step 2 --num-generations 4 --max-completion-length 48 --max-tokens-per-micro-batch 512 "
    "--eval-questions 8 --eval-steps 0 --train-questions 100 --train-data sums --control random-reward"
).split()


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("name", MEASURED)
def test_prediction_is_within_15_percent_of_the_measurement(name, tmp_path):
    """Compares the resident memory on a CPU beyond the memory after the imports, as in the summary of a run."""
    family, sizes, settings = MEASURED[name]
    model = tmp_path / "model"
    save_random_model(model, family, sizes)
    arguments = ["--model", str(model), "--output-dir", str(tmp_path / "run"), *RUN, *settings]
    result = subprocess.run([sys.executable, "train.py", *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    memory = json.loads((tmp_path / "run" / "summary.json").read_text())["memory"]
    assert memory["predicted_mb"] == pytest.approx(memory["measured_mb"], rel=0.15), memory
    assert memory["measured_mb"] > 700  # large enough for a meaningful comparison


def save_random_model(folder, family, sizes):
    """Save random bf16 weights with the tiny model's tokenizer."""
    import torch
    import transformers

    names = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads".split()
    dimensions = dict(zip([*names, "head_dim", "tie_word_embeddings"], sizes))
    if family == "qwen2":
        del dimensions["head_dim"]  # always hidden_size / num_attention_heads
    tokenizer = transformers.AutoTokenizer.from_pretrained("data/tiny")
    dimensions |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = transformers.AutoConfig.for_model(family, **dimensions, max_position_embeddings=4096)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
