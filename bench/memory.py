"""Memory predicted by `--dry-run` against memory measured by `--probe`, for models with random weights.

    python bench/memory.py                 all models; on a CPU five to ten minutes
    python bench/memory.py qwen3-167m      one of them

Measured is on a CPU the peak of resident memory above that after the imports (Linux), on a GPU what PyTorch allocates at most.
"""

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
}
ON_GPU = dict.fromkeys(("qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "qwen2.5-0.5b", "llama3.2-1b"), LONG)
# fmt: off
FIELDS = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "tie_word_embeddings",
)
SHAPES = {
    "qwen3-0.6b": ("qwen3", 151936, 1024, 3072, 28, 16, 8, 128, True),
    "qwen3-1.7b": ("qwen3", 151936, 2048, 6144, 28, 16, 8, 128, True),
    "qwen3-4b": ("qwen3", 151936, 2560, 9728, 36, 32, 8, 128, True),
    "qwen2.5-0.5b": ("qwen2", 151936, 896, 4864, 24, 14, 2, 64, True),
    "llama3.2-1b": ("llama", 128256, 2048, 8192, 16, 32, 8, 64, True),
    "qwen3-167m": ("qwen3", 151936, 768, 2048, 8, 12, 4, 64, True),
    "llama-129m": ("llama", 8192, 640, 1728, 24, 10, 10, 64, False),
    "qwen2-199m": ("qwen2", 50304, 1536, 4096, 5, 12, 2, 128, True),
    "qwen3-small": ("qwen3", 512, 64, 128, 2, 4, 2, 16, True),  # for dry checks of what is meant for a GPU
}
# fmt: on


def make_random_model(name: str, folder: str, mean_length: int | None = None) -> str:
    """Save a model of a known shape with random bf16 weights and the bundled model's tokenizer; returns the folder.

    Args:
        mean_length: mean length of completions, in tokens. The next token of random weights is nearly uniform, so
            vocabulary / mean_length end-of-sequence tokens give geometric lengths in every trainer. None: there is one such
            token, and nearly all completions reach the limit.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    settings = dict(zip(FIELDS, SHAPES[name]))
    if settings["model_type"] == "qwen2":
        del settings["head_dim"]  # always hidden_size / num_attention_heads
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data/tiny")
    end_ids = [tokenizer.eos_token_id]
    if mean_length:
        vocabulary = settings["vocab_size"]
        end_ids += range(vocabulary - vocabulary // mean_length, vocabulary)
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
    """Two steps of train.py on a model of this shape: MB predicted and measured."""
    with tempfile.TemporaryDirectory() as model:
        make = f"from bench.memory import make_random_model; make_random_model({name!r}, {model!r})"
        run("-c", make)
        output = run("train.py", "--model", model, *COMMON.split(), *settings.split())
    measured, predicted = re.search(r"memory +([\d,]+) MB \D+([\d,]+) MB predicted", output).groups()
    return float(predicted.replace(",", "")), float(measured.replace(",", ""))


def run(*arguments: str) -> str:
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
