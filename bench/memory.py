"""Memory predicted by --dry-run's arithmetic against memory measured, for runs of train.py on random weights.

    python bench/memory.py              on a CPU: three models of 100 to 350 million parameters, five to ten minutes
    python bench/memory.py qwen3        one of them

Each run is a process of its own: two steps of short completions and a small evaluation. On a CPU measured is the peak of
resident memory above that after the imports (Linux); on CUDA, where the models have the shapes of six known ones and 4-bit
weights, what PyTorch has allocated at most.
"""

import argparse
import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

COMMON = (
    "--max-steps 2 --prompts-per-step 2 --num-generations 4 --max-completion-length 48 --max-tokens-per-micro-batch 512 "
    "--eval-questions 8 --eval-steps 0 --train-questions 100 --train-data sums --control random-reward"
).split()
ON_CPU = {  # model type, dimensions, further settings; they differ in vocabulary, depth, width, tying and method
    "qwen3": ("qwen3", (151936, 768, 2048, 8, 12, 4, 64, True), []),
    "llama": ("llama", (8192, 640, 1728, 24, 10, 10, 64, False), ["--algorithm", "ppo", "--gradient-checkpointing"]),
    "qwen2": ("qwen2", (50304, 1536, 4096, 5, 12, 2, 128, True), ["--lora-r", "32"]),
}
REHEARSAL = (
    "qwen3",
    (512, 64, 128, 2, 4, 2, 16, True),
)  # of bench/gpu_check.py: so small that nothing can be said of it
ON_CUDA = (
    "Qwen/Qwen3-0.6B", "Qwen/Qwen3-1.7B", "Qwen/Qwen3-4B", "Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-1.5B",
    "meta-llama/Llama-3.2-1B",
)  # fmt: skip
CUDA_SETTINGS = (
    "--load-in-4bit --prompts-per-step 8 --num-generations 8 --max-completion-length 256 "
    "--max-tokens-per-micro-batch 8192 --eval-questions 32"
).split()


def dimensions(name: str) -> tuple[str, tuple]:
    """Model type, and vocabulary, hidden, intermediate, layers, heads, KV heads, head_dim, tied."""
    if name == "rehearsal":
        return REHEARSAL
    if name in ON_CPU:
        return ON_CPU[name][:2]
    from rl.fit.shapes import KNOWN

    s = KNOWN[name]
    kind = "qwen3" if s.qk_norm else "qwen2" if s.biases else "llama"
    return kind, (s.vocabulary, s.hidden, s.intermediate, s.layers, s.heads, s.kv_heads, s.head_dim, s.tied)


def make_model(name: str, folder: Path) -> None:
    """Random bf16 weights with the tiny model's tokenizer."""
    import torch
    import transformers

    kind, sizes = dimensions(name)
    family = {"qwen3": "Qwen3", "qwen2": "Qwen2", "llama": "Llama"}[kind]
    names = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
    settings = dict(zip([*names.split(), "head_dim", "tie_word_embeddings"], sizes))
    if kind == "qwen2":
        del settings["head_dim"]  # always hidden_size / num_attention_heads
    tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / "data" / "tiny")
    config = getattr(transformers, f"{family}Config")(
        **settings,
        max_position_embeddings=4096,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    transformers.utils.logging.disable_progress_bar()
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = getattr(transformers, f"{family}ForCausalLM")(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def resident(name: str) -> float:
    """A line of /proc/self/status in MB: VmRSS, or VmHWM for the peak (ru_maxrss may be that of the parent process)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def run(arguments: list[str]) -> dict:
    """Train with these arguments in this process: MB measured and predicted."""
    import torch

    import train

    cuda = torch.cuda.is_available()
    # On a CPU what the imports take is not counted; on CUDA Unsloth is to be imported before them.
    for module in (
        ()
        if cuda
        else ("tqdm", "rl.critic", "rl.evaluate", "rl.model.policy", "rl.rollout", "rl.run.folder", "rl.update")
    ):
        importlib.import_module(module)
    before = resident("VmRSS")
    train.main(arguments)
    measured = torch.cuda.max_memory_allocated() / 2**20 if cuda else resident("VmHWM") - before
    prediction = predicted(arguments, cuda)
    return {"measured": measured, "peak": prediction.peak_mb} | {
        name: value / 2**20 for name, value in vars(prediction).items() if isinstance(value, float)
    }


def predicted(arguments: list[str], cuda: bool, free: float | None = None):
    """The prediction of rl/fit/memory.py for these arguments of train.py. free: bytes that the run finds, None: enough."""
    from transformers import AutoTokenizer

    from data import load_questions
    from rl.fit.memory import predict
    from rl.fit.shapes import find_shape
    from rl.model.backends import choose_device, choose_dtype
    from rl.run.read_config import read_config

    config, _ = read_config(arguments, default_file="configs/tiny.yaml")
    train_rows, eval_rows, _ = load_questions(
        config.train_data, config.eval_data, config.train_questions, config.eval_questions, config.columns, config.seed
    )
    tokenizer = AutoTokenizer.from_pretrained(config.model)

    def tokens(row):
        messages = [{"role": "user", "content": row["prompt"]}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return len(tokenizer.encode(text, add_special_tokens=False))

    dtype = str(choose_dtype(config, choose_device(config))).removeprefix("torch.")
    longest = max(map(tokens, train_rows + eval_rows))
    return predict(config, find_shape(config.model), "cuda" if cuda else "cpu", dtype, longest, free)


def measure(name: str, settings: list[str]) -> dict:
    """Make the model, and train it, in processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        model = f"{folder}/model"
        command = [sys.executable, __file__]
        subprocess.run([*command, "--make", name, model], check=True)
        arguments = ["--model", model, "--output-dir", f"{folder}/run", *COMMON, *settings]
        done = subprocess.run([*command, "--run", *arguments], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{name}: {done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        return json.loads(done.stdout.splitlines()[-1])


def cases(names: list[str]) -> dict[str, list[str]]:
    """Further settings by the model's name."""
    if shutil.which("nvidia-smi"):
        return {name: CUDA_SETTINGS for name in names or ON_CUDA}
    return {name: ON_CPU[name][2] for name in names or ON_CPU}


def main():
    if sys.argv[1:2] == ["--make"]:
        return make_model(sys.argv[2], Path(sys.argv[3]))
    if sys.argv[1:2] == ["--run"]:
        return print(json.dumps(run(sys.argv[2:])))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="all where none is named", metavar="MODEL")
    names = parser.parse_args().models
    print(f"{platform.machine()}, {os.cpu_count()} cores; train.py {' '.join(COMMON)}\n")
    print("| model | further settings | predicted, MB | measured, MB | ratio |\n|---|---|---|---|---|")
    for name, settings in cases(names).items():
        found = measure(name, settings)
        ratio = found["peak"] / found["measured"]
        print(
            f"| {name} | {' '.join(settings)} | {found['peak']:,.0f} | {found['measured']:,.0f} | {ratio:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
