"""Memory: the dimensions of models, what a run needs by part, and what --dry-run says and advises."""

import dataclasses
import importlib.util
import re
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.config import Config, ConfigError
from rl.fit import memory
from rl.fit.cards import GB, MB, Machine
from rl.fit.memory import NF4, advise, dry_run, predict, update_bytes
from rl.fit.shapes import KNOWN, find_shape, known_shape, shape_of

TINY_SHAPE = dict(
    vocab_size=101, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2
)  # fmt: skip

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
    assert shape.parameters() == parameters
    assert shape.four_bit == ("bnb-4bit" in model)


@pytest.mark.parametrize(
    "model", ["someone/Qwen3-40B", "gpt2", "deepseek-ai/DeepSeek-R1-0528-Qwen3-8B", "Qwen/Qwen3", ""]
)
def test_an_unknown_model_is_an_error_that_says_what_to_do(model):
    with pytest.raises(ConfigError, match="not known: name a folder .*Qwen/Qwen3-0.6B.*--probe"):
        known_shape(model)


@pytest.mark.parametrize(
    "family, further",
    [
        ("Llama", {}),
        ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("Qwen2", {"tie_word_embeddings": True}),
        ("Qwen3", {"head_dim": 20}),
        ("Qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
        ("Mistral", {"head_dim": 16}),
    ],
)
def test_parameters_and_lora_are_those_of_transformers_and_peft(family, further):
    import peft
    import torch
    import transformers

    config = getattr(transformers, f"{family}Config")(**TINY_SHAPE, **further)
    with torch.device("meta"):
        model = getattr(transformers, f"{family}ForCausalLM")(config)
    shape = shape_of(config.to_dict(), family)
    assert shape.parameters() == model.num_parameters()
    assert shape.own_decoder == (family != "Mistral")
    model = peft.get_peft_model(model, peft.LoraConfig(r=5, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert shape.lora_parameters(5) == model.get_nb_trainable_parameters()[0]


def test_the_tiny_model(policy):
    shape = find_shape("data/tiny")
    trainable, total = policy.model.get_nb_trainable_parameters()
    assert shape.lora_parameters(16) == trainable
    assert shape.parameters() == total - trainable
    assert 2 * shape.parameters() < shape.file_bytes < 2.1 * shape.parameters()
    assert shape.tokenizer_bytes > 0


def test_folders_without_what_is_needed(tmp_path):
    with pytest.raises(ConfigError, match="has no config.json"):
        find_shape(str(tmp_path))
    (tmp_path / "config.json").write_text('{"n_embd": 8}')
    with pytest.raises(ConfigError, match="has no hidden_size.*--probe"):
        find_shape(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        find_shape(str(tmp_path))


# --- the parts, by hand


def on_cuda(config: Config, model: str, prompt: int = 100) -> memory.Prediction:
    return predict(config, known_shape(model), "cuda", "bfloat16", prompt)


@pytest.mark.parametrize(
    "model, gigabytes", [("Qwen/Qwen3-0.6B", 0.54), ("Qwen/Qwen3-1.7B", 1.35), ("Qwen/Qwen3-4B", 2.65)]
)
def test_weights(model, gigabytes):
    shape = known_shape(model)
    assert on_cuda(Config(), model).weights == 2 * shape.parameters()
    in_4bit = on_cuda(Config(load_in_4bit=True), model).weights
    assert in_4bit == shape.linear_parameters() * NF4 + shape.other_parameters() * 2
    assert in_4bit == pytest.approx(gigabytes * 1e9, rel=0.02)
    assert on_cuda(Config(), model.replace("Qwen/", "unsloth/") + "-bnb-4bit").weights == in_4bit
    assert predict(Config(), shape, "cpu", "float32", 100).weights == 4 * shape.parameters()


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
    found.kept = True  # small models on a CPU
    assert found.peak == held + found.rollout + found.update
    found.load = 10 * found.peak
    assert found.peak == found.fixed + found.load


def test_what_small_models_have_freed_is_kept():
    tiny = find_shape("data/tiny")
    assert predict(Config(), tiny, "cpu", "float32", 100).kept
    assert not predict(Config(), tiny, "cuda", "bfloat16", 100).kept
    assert not predict(Config(), known_shape("HuggingFaceTB/SmolLM2-135M"), "cpu", "float32", 100).kept


def test_where_memory_is_short_the_engine_makes_do():
    """As in rl/model/engine.py: first fewer rows, then no scratch weights."""
    shape, config = known_shape("Qwen/Qwen3-1.7B"), Config(prompts_per_step=32, num_generations=8, eval_questions=1)
    plenty, short = (predict(config, shape, "cuda", "bfloat16", 256, gb * GB) for gb in (80, 10))
    assert plenty.rows == plenty.rows_wanted == 256
    assert plenty == predict(config, shape, "cuda", "bfloat16", 256)
    assert 8 <= short.rows < 256
    assert short.rollout < plenty.rollout


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_what_a_layer_keeps_is_what_autograd_keeps(family):
    prompt, length, group = 20, 40, 8
    config = Config(
        prompts_per_step=1, num_generations=group, max_completion_length=length, lora_r=4, max_tokens_per_micro_batch=10**4
    )  # fmt: skip
    one, three = (kept_by_autograd(family, layers, [[5] * prompt] * group, [[6] * length] * group) for layers in (1, 3))
    shapes = (dataclasses.replace(shape_of(TINY_SHAPE | {"model_type": family.lower()}, ""), layers=n) for n in (1, 3))
    few, many = (update_bytes(config, shape, False, 4, False, prompt) for shape in shapes)
    assert many - few == pytest.approx(three - one, rel=0.05)


def kept_by_autograd(family, layers, prompts, completions) -> int:
    """Bytes of the storages that are saved for the backward of a model of so many layers, parameters aside."""
    import peft
    import torch
    import transformers

    from rl.model.decoder import Decoder
    from rl.model.logprobs import completion_logprobs
    from rl.model.policy import Policy

    settings = getattr(transformers, f"{family}Config")(**TINY_SHAPE | {"num_hidden_layers": layers, "head_dim": 12})
    model = getattr(transformers, f"{family}ForCausalLM")(settings)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    policy = Policy(
        model=model, tokenizer=None, device=torch.device("cpu"), dtype=torch.float32, eos_ids=frozenset({1}), pad_id=0,
        temperature=1.0, system_prompt=None, chat_template_kwargs={}, continues_adapter=False, decoder=Decoder(model),
    )  # fmt: skip
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage  # held, so that no other can come to stand there
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        completion_logprobs(policy, prompts, completions)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(storage.nbytes() for pointer, storage in storages.items() if pointer not in own)


def test_the_sizes_that_torch_keeps_from_being_imported_are_those_of_the_code():
    from rl.model import engine, logprobs

    assert memory.LOGITS_AT_A_TIME == logprobs.LOGITS_AT_A_TIME
    assert (memory.PREFILL_TOKENS, memory.GROWTH) == (engine.PREFILL_TOKENS, engine.GROWTH)


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
    st.sampled_from(sorted(KNOWN)),
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
        return predict(config, KNOWN[model], *place, prompt).peak

    assert peak(**values) <= peak(**values | {name: values[name] + more})


# --- the dry run


@pytest.mark.parametrize(
    "model, gigabytes, further",
    [
        ("Qwen/Qwen3-0.6B", 16, {}),
        ("Qwen/Qwen3-0.6B", 6, {"algorithm": "ppo"}),
        ("unsloth/Qwen3-4B-Base", 12, {"max_completion_length": 1024}),
        ("meta-llama/Llama-3.1-8B", 16, {"max_completion_length": 2048, "gradient_checkpointing": True}),
        ("Qwen/Qwen2.5-1.5B", 8, {"load_in_4bit": True, "max_completion_length": 4096}),
        ("meta-llama/Llama-3.2-3B", 4, {}),
        ("Qwen/Qwen3-8B", 3, {"max_completion_length": 2048}),
    ],
)
def test_the_advice_fits_and_every_part_of_it_is_needed(model, gigabytes, further):
    config, machine = Config(model=model, **further), Machine("cuda", "bfloat16", gigabytes * GB, "a card")

    def needed(changes):
        changed = dataclasses.replace(config, **changes)
        shape = known_shape(changed.model)
        return machine.needed(predict(changed, shape, "cuda", "bfloat16", 256, machine.free()).peak)

    assert needed({}) > machine.memory
    changes, promised = advise(config, known_shape(model), machine, 256)
    assert changes
    assert needed(changes) == promised <= machine.memory
    dataclasses.replace(config, **changes).check()
    for name in changes:
        assert needed({other: value for other, value in changes.items() if other != name}) > machine.memory


def test_advice_for_a_machine_where_nothing_fits():
    config = Config(model="Qwen/Qwen3-0.6B", gpu_memory=0.6)
    assert "Nothing that could be changed makes it fit" in dry_run(config)


def test_no_advice_below_one_completion():
    """A micro-batch holds one completion behind its prompt at least, and one group at least is rolled out together."""
    config = Config(max_completion_length=1000, max_tokens_per_micro_batch=8000, rollout_batch_size=100)
    machine = Machine("cuda", "bfloat16", GB, "a card")
    options = memory.mild_changes(config, known_shape("Qwen/Qwen3-0.6B"), machine, 100)
    assert options["max_tokens_per_micro_batch"] == [4000, 2000, 1100]
    assert options["rollout_batch_size"] == [50, 25, 12, 8]
    on_cpu = dataclasses.replace(machine, device="cpu")
    assert "optim" in options and "optim" not in memory.mild_changes(config, KNOWN["Qwen/Qwen3-0.6B"], on_cpu, 100)


def test_the_text():
    text = dry_run(Config(model="unsloth/Qwen3-4B-Base", gpu_memory=12, max_completion_length=1024))
    for part in (
        "4,022,468,096 parameters; 33,030,144 more are trained (LoRA)",
        "256 tokens (assumed",
        "a CUDA card of 12 GB, in bfloat16, by Unsloth",
        "weights      7.49 GB",
        "roll-out and update do not add",
        "It does not fit",
        "    --gradient-checkpointing",
    ):
        assert part in text
    assert "critic" not in text and "modelled" not in text
    text = dry_run(Config(model="unsloth/Qwen3-4B-Base", gpu_memory=12, backend="transformers"))
    assert "--load-in-4bit --gradient-checkpointing" in text and "Unsloth" not in text
    text = dry_run(Config(model="unsloth/Qwen3-4B-Base", gpu_memory=80, load_in_4bit=True, algorithm="ppo"), 90)
    assert "90 tokens (the longest)" in text and "critic" in text and "and 4-bit NF4" in text and "It fits: " in text
    assert re.search(
        r"  time       about [0-9,]+ minutes modelled for RTX 4090 \([0-9.]+ s a step\); measure it with --probe\n",
        text,
    )
    assert "float16" in dry_run(Config(model="Qwen/Qwen3-0.6B", gpu_memory=8, dtype="float16"))
    text = dry_run(Config(device="cpu", system_prompt="x" * 30), prompts=["y" * 10, "y" * 60])
    assert f"{30 + memory.TEMPLATE_TOKENS} tokens (the longest, estimated from its 90 characters)" in text
    assert "the CPU, with " in text and "in float32" in text and "It fits: " in text


def test_flags():
    changes = {"load_in_4bit": True, "rollout_batch_size": 8, "model": "Qwen/Qwen3-0.6B"}
    assert memory.flags(changes) == "--load-in-4bit --rollout-batch-size 8 --model Qwen/Qwen3-0.6B"


def test_settings_that_name_no_machine():
    with pytest.raises(ConfigError, match="gpu_memory is -1"):
        dry_run(Config(gpu_memory=-1.0))
    import torch

    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="--gpu-memory 12"):
            dry_run(Config(device="cuda"))


def test_it_answers_at_once_and_without_torch():
    program = (
        "import sys; from rl.config import Config; from rl.fit.memory import dry_run\n"
        "print(dry_run(Config(model='Qwen/Qwen3-8B', gpu_memory=3)))\n"
        "assert 'torch' not in sys.modules"
    )
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "With these settings" in done.stdout
    assert time.perf_counter() - started < 10


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("name", ["qwen3", "llama", "qwen2"])
def test_within_15_percent_of_what_is_measured(name):
    import torch

    if torch.cuda.is_available():
        pytest.skip("these models are for a CPU")
    spec = importlib.util.spec_from_file_location("bench_memory", "bench/memory.py")
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    found = bench.measure(name, bench.ON_CPU[name][2])
    assert found["peak"] == pytest.approx(found["measured"], rel=0.15), found
    assert found["measured"] > 700  # MB: there is something to predict


def test_the_benchmark_has_a_help():
    done = subprocess.run([sys.executable, "bench/memory.py", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "ten minutes" in done.stdout


def test_size():
    assert (memory.size(3 * MB).strip(), memory.size(1.5 * GB).strip()) == ("3 MB", "1.50 GB")
