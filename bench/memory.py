"""Compare the memory predicted by `--dry-run` with the memory measured by `--probe`, for models with random weights.

    python bench/memory.py                 all models; takes five to ten minutes on a CPU
    python bench/memory.py qwen3-167m      one model

On a CPU (Linux), the measured value is the peak of resident memory minus the resident memory after the imports. On a
GPU, it is the peak of the memory allocated by PyTorch.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMON = "--probe --train-data sums --train-questions 100 --eval-questions 8 --control random-reward"
SHORT = "--prompts-per-step 2 --num-generations 4 --max-completion-length 48 --max-tokens-per-micro-batch 512"
LONG = "--prompts-per-step 8 --max-completion-length 256 --max-tokens-per-micro-batch 8192 --load-in-4bit"
ON_CPU = {
    "qwen3-167m": SHORT,
    "llama-129m": f"{SHORT} --algorithm ppo --gradient-checkpointing",
    "qwen2-199m": f"{SHORT} --lora-r 32",
    "qwen3.5-104m": SHORT,  # a hybrid
    "olmoe-202m": SHORT,  # a mixture of experts
    "gemma2-121m": SHORT,  # its head caps the logits
}
ON_GPU = dict.fromkeys(("Qwen/Qwen3-0.6B", "Qwen/Qwen3-1.7B", "Qwen/Qwen3-4B", "meta-llama/Llama-3.2-1B"), LONG)
# fmt: off
FIELDS = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "tie_word_embeddings",
)
SMALL_SHAPES = {  # in addition to rl/fit/models.json
    "qwen3-167m": ("qwen3", 151936, 768, 2048, 8, 12, 4, 64, True),
    "llama-129m": ("llama", 8192, 640, 1728, 24, 10, 10, 64, False),
    "qwen2-199m": ("qwen2", 50304, 1536, 4096, 5, 12, 2, 128, True),  # head_dim is always hidden_size / heads
    "qwen3-small": ("qwen3", 512, 64, 128, 2, 4, 2, 16, True),  # for testing the GPU benchmarks on a CPU
}
# fmt: on
OTHER_SHAPES = {
    "qwen3.5-104m": dict(zip(FIELDS, ("qwen3_5_text", 65536, 768, 2048, 8, 6, 2, 128, True)))
    | {"linear_num_key_heads": 8, "linear_num_value_heads": 8, "linear_key_head_dim": 64, "linear_value_head_dim": 64},
    "olmoe-202m": dict(zip(FIELDS, ("olmoe", 50304, 768, 512, 8, 12, 4, 64, True))) | {"num_experts": 16},
    "gemma2-121m": dict(zip(FIELDS, ("gemma2", 65536, 768, 3072, 8, 6, 3, 128, True))),
}


def make_random_model(name: str, folder: str, mean_length: int | None = None) -> str:
    """Save a model of a known shape with random bf16 weights and the tokenizer of the bundled model.

    Args:
        name: Key of SMALL_SHAPES or rl/fit/models.json.
        folder: Folder to save the model in.
        mean_length: Mean length of completions in tokens. Random weights sample the next token nearly uniformly, so
            vocabulary / mean_length end-of-sequence tokens give geometrically distributed lengths in every trainer.
            With None there is one such token, and nearly all completions reach the limit.

    Returns:
        The folder.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    known = json.loads((ROOT / "rl/fit/models.json").read_text(encoding="utf-8"))
    small = {small: dict(zip(FIELDS, shape)) for small, shape in SMALL_SHAPES.items()}
    settings = (known | small | OTHER_SHAPES)[name]
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data/tiny")
    end_ids = [tokenizer.eos_token_id]
    if mean_length:
        vocab_size = settings["vocab_size"]
        end_ids += range(vocab_size - vocab_size // mean_length, vocab_size)
    special = {"eos_token_id": end_ids, "pad_token_id": tokenizer.pad_token_id}
    config = AutoConfig.for_model(**settings, **special, max_position_embeddings=40_960)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.generation_config = GenerationConfig(**special)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def measure(name: str, settings: str) -> tuple[float, float]:
    """Probe train.py on a model of this shape. Returns the predicted and the measured memory in MB."""
    with tempfile.TemporaryDirectory() as model:
        code = f"from bench.memory import make_random_model; make_random_model({name!r}, {model!r})"
        run("-c", code)
        output = run("train.py", "--model", model, *COMMON.split(), *settings.split())
    measured, predicted = re.search(r"memory +([\d,]+) MB \D+([\d,]+) MB predicted", output).groups()
    return float(predicted.replace(",", "")), float(measured.replace(",", ""))


def run(*arguments: str) -> str:
    """Run Python with these arguments in the project folder and return its standard output."""
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    models = ON_GPU if shutil.which("nvidia-smi") else ON_CPU
    names = sys.argv[1:] or list(models)
    if not set(names) <= set(models):
        sys.exit(f"usage: python bench/memory.py [{' | '.join(models)} ...]")
    print(f"{platform.machine()}, {os.cpu_count()} cores; train.py {COMMON}\n")
    print("| model | further settings | predicted, MB | measured, MB | ratio |\n|---|---|---|---|---|")
    for name in names:
        predicted, measured = measure(name, models[name])
        ratio = f"{predicted / measured:.2f}"
        print(f"| {name} | {models[name]} | {predicted:,.0f} | {measured:,.0f} | {ratio} |", flush=True)
