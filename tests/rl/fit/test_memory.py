"""Memory: the dimensions of models, what a run needs by part, and the prediction against measurements."""

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
NOWHERE = Path("no such folder")
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
    assert shape.four_bit == ("bnb-4bit" in model)


@pytest.mark.parametrize(
    "model", ["someone/Qwen3-40B", "gpt2", "deepseek-ai/DeepSeek-R1-0528-Qwen3-8B", "Qwen/Qwen3", ""]
)
def test_an_unknown_model_is_an_error_that_says_what_to_do(model):
    with pytest.raises(ConfigError, match="not known: name a folder .*Qwen/Qwen3-0.6B.*--probe"):
        find_shape(model)


@pytest.mark.parametrize(
    "family, further",
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
def test_parameters_and_lora_are_those_of_transformers_and_peft(family, further):
    import peft
    import torch
    import transformers

    names = {"GPT2": "gpt2", "GPTNeoX": "gpt_neox", "Gemma3": "gemma3_text"}
    config = transformers.AutoConfig.for_model(names.get(family, family.lower()), **TINY_SHAPE, **further)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    shape = shape_from_config(config, NOWHERE)
    assert shape.parameters == model.num_parameters()
    assert shape.uses_decoder == (family in ("Llama", "Qwen2", "Qwen3"))
    assert shape.qk_norm == (family in ("Qwen3", "Gemma3"))
    model = peft.get_peft_model(model, peft.LoraConfig(r=5, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert shape.lora_parameters(5) == model.get_nb_trainable_parameters()[0]


def test_the_tiny_model(policy):
    shape = find_shape("data/tiny")
    trainable, total = policy.model.get_nb_trainable_parameters()
    assert shape.lora_parameters(16) == trainable
    assert shape.parameters == total - trainable
    assert 2 * shape.parameters < shape.file_bytes < 2.1 * shape.parameters
    assert shape.tokenizer_bytes > 0


def test_folders_without_what_is_needed(tmp_path):
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


def test_a_config_without_weights_is_enough(tmp_path):
    """As of a model in the Hugging Face cache or on the Hub, of any architecture; saved in 4 bits or not."""
    config = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]} | TINY_SHAPE
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = find_shape(str(tmp_path))
    assert shape.file_bytes is None and shape.tokenizer_bytes is None and not shape.four_bit
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert find_shape(str(tmp_path)) == dataclasses.replace(shape, four_bit=True)


# --- the parts, by hand


def on_cuda(config: Config, model: str, prompt: int = 100) -> Prediction:
    return predict(config, known_shape(model), "cuda", "bfloat16", prompt)


@pytest.mark.parametrize(
    "model, gigabytes", [("Qwen/Qwen3-0.6B", 0.54), ("Qwen/Qwen3-1.7B", 1.35), ("Qwen/Qwen3-4B", 2.65)]
)
def test_weights(model, gigabytes):
    shape = known_shape(model)
    assert on_cuda(Config(), model).weights == 2 * shape.parameters
    in_4bit = on_cuda(Config(load_in_4bit=True), model).weights
    assert in_4bit == shape.linear_parameters * NF4_BYTES + (shape.parameters - shape.linear_parameters) * 2
    assert in_4bit == pytest.approx(gigabytes * 1e9, rel=0.02)
    assert on_cuda(Config(), model.replace("Qwen/", "unsloth/") + "-bnb-4bit").weights == in_4bit
    assert predict(Config(), shape, "cpu", "float32", 100).weights == 4 * shape.parameters


@pytest.mark.parametrize("model, token", [("Qwen/Qwen3-0.6B", 114_688), ("Qwen/Qwen3-4B", 147_456)])
def test_keys_and_values(model, token):
    """2 x layers x KV heads x head_dim x 2 bytes: what one more token of each row costs."""
    config = Config(prompts_per_step=4, num_generations=8, max_completion_length=300, eval_questions=1)
    longer = dataclasses.replace(config, max_completion_length=301)
    assert on_cuda(longer, model).rollout - on_cuda(config, model).rollout == 32 * token


def test_lora_and_optimizer():
    """Llama-3.2-1B, rank 16: 16 layers x 16 x (2 x 2048+2048 + 2 x (2048+512) + 3 x (2048+8192)) = 11,272,192."""
    n = 16 * 16 * (2 * 4096 + 2 * 2560 + 3 * 10240)
    assert n == 11_272_192
    found = on_cuda(Config(), "meta-llama/Llama-3.2-1B")
    assert (found.lora, found.optimizer, found.critic) == (8 * n, 8 * n, 0)
    assert on_cuda(Config(adapter="runs/x"), "meta-llama/Llama-3.2-1B").lora == 12 * n
    assert on_cuda(Config(optim="adamw_8bit"), "meta-llama/Llama-3.2-1B").optimizer == 2 * n
    assert on_cuda(Config(algorithm="ppo"), "meta-llama/Llama-3.2-1B").critic == 16 * (n + 2049)
    assert on_cuda(Config(algorithm="ppo", critic="head"), "meta-llama/Llama-3.2-1B").critic == 16 * 2049


def test_the_peak_counts_the_larger_of_rollout_and_update():
    found = on_cuda(Config(), "Qwen/Qwen3-0.6B")
    held = found.weights + found.lora + found.optimizer + found.fixed
    assert found.peak == held + max(found.rollout, found.update)
    assert found.peak_mb == found.peak / 2**20
    found.rollout = 2 * found.update
    assert found.peak == held + found.rollout
    found.allocator_keeps = True  # small models on a CPU
    assert found.peak == held + found.rollout + found.update
    found.load = 10 * found.peak
    assert found.peak == found.fixed + found.load


def test_what_small_models_have_freed_is_kept():
    tiny = find_shape("data/tiny")
    assert predict(Config(), tiny, "cpu", "float32", 100).allocator_keeps
    assert not predict(Config(), tiny, "cuda", "bfloat16", 100).allocator_keeps
    assert not predict(Config(), known_shape("HuggingFaceTB/SmolLM2-135M"), "cpu", "float32", 100).allocator_keeps


def test_where_memory_is_short_the_engine_makes_do():
    """As in rl/model/engine.py: first fewer rows, then no scratch weights."""
    shape, config = known_shape("Qwen/Qwen3-1.7B"), Config(prompts_per_step=32, num_generations=8, eval_questions=1)
    plenty, short = (predict(config, shape, "cuda", "bfloat16", 256, gb * GB) for gb in (80, 10))
    assert plenty.rows == plenty.rows_requested == 256
    assert plenty == predict(config, shape, "cuda", "bfloat16", 256)
    assert 8 <= short.rows < 256
    assert short.rollout < plenty.rollout


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_what_a_layer_keeps_is_what_autograd_keeps(family):
    prompt, length, group = 20, 40, 8
    config = Config(
        prompts_per_step=1,
        num_generations=group,
        max_completion_length=length,
        lora_r=4,
        max_tokens_per_micro_batch=10**4,
    )
    one, three = (kept_by_autograd(family, layers, [[5] * prompt] * group, [[6] * length] * group) for layers in (1, 3))
    few, many = (predict(config, tiny_shape(family, layers), "cpu", "float32", prompt).update for layers in (1, 3))
    assert many - few == pytest.approx(three - one, rel=0.05)


def tiny_shape(family, layers):
    import transformers

    sizes = TINY_SHAPE | {"num_hidden_layers": layers, "head_dim": 12}
    return shape_from_config(transformers.AutoConfig.for_model(family.lower(), **sizes), NOWHERE)


def kept_by_autograd(family, layers, prompts, completions) -> int:
    """Bytes of the storages that are saved for the backward of a model of so many layers, parameters aside."""
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

    def keep(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage  # held, so that no other can come to stand there
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        completion_logprobs(policy, prompts, completions)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(storage.nbytes() for pointer, storage in storages.items() if pointer not in own)


# --- more never needs less

GROWING = {
    "max_tokens_per_micro_batch": st.integers(1, 20000),
    "rollout_batch_size": st.integers(8, 1000),
    "max_completion_length": st.integers(1, 5000),
    "prompts_per_step": st.integers(1, 100),
    "eval_questions": st.integers(1, 1000),
    "lora_r": st.integers(1, 128),
    "prompt": st.integers(1, 5000),
}


@settings(max_examples=300, deadline=None)
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
def test_more_never_needs_less(values, name, more, model, place, algorithm, backend, flag):
    def peak(prompt, **values):
        config = Config(
            algorithm=algorithm, beta=0.1, gradient_checkpointing=flag, load_in_4bit=not flag, backend=backend, **values
        )
        return predict(config, known_shape(model), *place, prompt).peak

    assert peak(**values) <= peak(**values | {name: values[name] + more})


# --- against measurements: runs of train.py on random weights, two steps of short completions and a small evaluation

MEASURED = {  # they differ in vocabulary, depth, width, tying and method
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
def test_within_15_percent_of_what_is_measured(name, tmp_path):
    """On a CPU: resident memory above that after the imports, as a run writes it into its summary."""
    family, sizes, settings = MEASURED[name]
    model = tmp_path / "model"
    save_random_model(model, family, sizes)
    arguments = ["--model", str(model), "--output-dir", str(tmp_path / "run"), *RUN, *settings]
    done = subprocess.run([sys.executable, "train.py", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    memory = json.loads((tmp_path / "run" / "summary.json").read_text())["memory"]
    assert memory["predicted_mb"] == pytest.approx(memory["measured_mb"], rel=0.15), memory
    assert memory["measured_mb"] > 700  # there is something to predict


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
