"""The output of --dry-run, and the settings that it suggests to change."""

import dataclasses
import functools
import re

import pytest

from rl.config import Config, ConfigError
from rl.fit.cards import GB, MB, Machine
from rl.fit.dry_run import SMALLER_MODELS, TEMPLATE_TOKENS, advise, dry_run, flag, human, memory_savers
from rl.fit.memory import predict
from rl.fit.shapes import find_shape

known_shape = functools.cache(find_shape)


@pytest.mark.parametrize(
    "model, gigabytes, settings",
    [
        ("Qwen/Qwen3-0.6B", 16, {}),
        ("Qwen/Qwen3-0.6B", 6, {"algorithm": "ppo"}),
        ("unsloth/Qwen3-4B-Base", 12, {"max_completion_length": 1024}),
        ("meta-llama/Llama-3.1-8B", 16, {"max_completion_length": 2048, "gradient_checkpointing": True}),
        ("Qwen/Qwen2.5-1.5B", 8, {"load_in_4bit": True, "max_completion_length": 4096}),
        ("meta-llama/Llama-3.2-3B", 4, {}),
        ("Qwen/Qwen3-1.7B", 3, {"max_completion_length": 2048, "soft_punish_cache": 200}),
    ],
)
def test_suggested_settings_fit_and_each_is_needed(model, gigabytes, settings):
    config = Config(model=model, **settings)
    machine = Machine("cuda", "bfloat16", gigabytes * GB, "a card")

    def needed(changes):
        changed = dataclasses.replace(config, **changes)
        shape = known_shape(changed.model)
        return machine.needed(predict(changed, shape, "cuda", "bfloat16", 256, machine.free()).peak)

    assert needed({}) > machine.memory
    changes = advise(config, known_shape(model), machine, 256)
    assert changes
    assert needed(changes) <= machine.memory
    dataclasses.replace(config, **changes).check()
    for name in changes:
        assert needed({other: value for other, value in changes.items() if other != name}) > machine.memory


def test_suggests_a_smaller_model_if_no_setting_helps():
    text = dry_run(Config(model="Qwen/Qwen3-8B", gpu_memory=3, max_completion_length=2048))
    model = re.search(r"smaller model.* --model (\S+)\.", text)[1]
    assert model in SMALLER_MODELS
    smaller = dry_run(Config(model=model, gpu_memory=3, max_completion_length=2048))
    assert "It fits" in smaller
    too_small = dry_run(Config(model="Qwen/Qwen3-0.6B", gpu_memory=0.6))
    assert "It fits" not in too_small and "--" not in too_small.partition("It does not fit")[2]


def test_values_to_try_least_costly_first():
    """A micro-batch has at least one prompt with a completion, and at least one group is rolled out together."""
    config = Config(max_completion_length=1000, max_tokens_per_micro_batch=8000, rollout_batch_size=100)
    machine = Machine("cuda", "bfloat16", GB, "a card")
    options = memory_savers(config, known_shape("Qwen/Qwen3-0.6B"), machine, 100)
    assert list(options.items()) == [
        ("gradient_checkpointing", [True]),
        ("load_in_4bit", [True]),
        ("optim", ["adamw_8bit"]),
        ("max_tokens_per_micro_batch", [8000, 4000, 2000, 1000, 500, 250]),
        ("rollout_batch_size", [100, 50, 25, 12]),
        ("max_completion_length", [1000, 500, 250, 125]),
    ]
    on_cpu = dataclasses.replace(machine, device="cpu")
    assert "optim" not in memory_savers(config, known_shape("Qwen/Qwen3-0.6B"), on_cpu, 100)


def test_output_names_every_part():
    text = dry_run(Config(model="unsloth/Qwen3-4B-Base", gpu_memory=12, max_completion_length=1024))
    for part in (
        "4,022,468,096 parameters and 33,030,144 LoRA",
        "256 tokens (assumed",
        "12 GB, in bfloat16, with Unsloth",
        "weights      7.49 GB",
        "only the larger of roll-out and update",
        "It does not fit",
        "    --gradient-checkpointing",
    ):
        assert part in text
    assert "critic" not in text and "modelled" not in text
    text = dry_run(Config(model="unsloth/Qwen3-4B-Base", gpu_memory=12, backend="transformers"))
    assert "--gradient-checkpointing --load-in-4bit" in text and "Unsloth" not in text
    text = dry_run(Config(model="unsloth/Qwen3-4B-Base", gpu_memory=80, load_in_4bit=True, algorithm="ppo"), 90)
    assert "90 tokens (the longest)" in text and "critic" in text and "and 4-bit NF4" in text and "It fits: " in text
    assert re.search(
        r"  time       about [0-9,]+ minutes modelled for RTX 4090 \([0-9.]+ s a step\); .*--probe.*\n",
        text,
    )
    assert "float16" in dry_run(Config(model="Qwen/Qwen3-0.6B", gpu_memory=8, dtype="float16"))
    text = dry_run(Config(device="cpu", system_prompt="x" * 30), prompts=["y" * 10, "y" * 60])
    assert f"{30 + TEMPLATE_TOKENS} tokens (the longest, estimated from its 90 characters)" in text
    assert "the CPU, with " in text and "in float32" in text and "It fits: " in text


def test_flag():
    assert flag("load_in_4bit", True) == "--load-in-4bit"
    assert flag("rollout_batch_size", 8) == "--rollout-batch-size 8"


def test_refuses_settings_without_a_usable_gpu():
    with pytest.raises(ConfigError, match="^gpu_memory is -1"):
        dry_run(Config(gpu_memory=-1.0))
    import torch

    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="--gpu-memory 12"):
            dry_run(Config(device="cuda"))


def test_human():
    assert (human(3 * MB).strip(), human(1.5 * GB).strip()) == ("3 MB", "1.50 GB")
