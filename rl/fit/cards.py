"""GPUs and this machine: the memory available to a run, and a model of the time that a run takes on a GPU.

Torch is imported only on a machine with an NVIDIA driver.
"""

import re
import shutil
from dataclasses import dataclass

from rl.config import Config, ConfigError
from rl.fit.shapes import Shape

MB = 2**20
GB = 2**30
CUDA_CONTEXT = 0.5 * GB  # memory of the CUDA context, which PyTorch does not count
FRAGMENTATION = 1.08  # factor for fragmentation in PyTorch's CUDA allocator
IMPORTS = 0.4 * GB  # resident memory after the imports, on a CPU
EFFICIENCY = 0.5  # assumed share of the roofline, a rule of thumb
MIN_DECODE_STEP = 0.002  # seconds for kernel launches, sampling and host work, for any model
NF4_READ = 0.516  # bytes read per NF4 parameter


@dataclass(frozen=True)
class Card:
    """A GPU as specified by its manufacturer."""

    name: str
    gigabytes: float  # memory as reported by PyTorch
    bandwidth: float  # memory bandwidth, GB/s
    tflops: float  # dense 16-bit matrix products with fp32 accumulation
    bf16: bool = True  # whether it supports bfloat16


# Common cards by memory. Of several cards with the same memory, the most common one comes first.
CARDS = (
    Card("RTX 3050", 6, 168, 13.5),  # the variant with 6 GB
    Card("RTX 2060", 6, 336, 25.8, bf16=False),
    Card("RTX 4060", 8, 272, 30.2),
    Card("RTX 3050", 8, 224, 18.2),
    Card("RTX 3060", 12, 360, 25.5),
    Card("T4", 15, 320, 65, bf16=False),
    Card("RTX 4060 Ti", 16, 288, 44.1),
    Card("RTX 3090", 24, 936, 71),
    Card("RTX 4090", 24, 1008, 165),
)


@dataclass
class Machine:
    """The device that a run must fit on."""

    device: str  # cpu or cuda
    dtype: str
    memory: float  # available memory, bytes
    name: str  # description for messages
    card: Card | None = None  # specification for the time model, if known; a typical card if only the memory is given

    def free(self) -> float:
        """Return the bytes that are free before the run allocates anything."""
        return self.memory - (CUDA_CONTEXT if self.device == "cuda" else IMPORTS)

    def needed(self, peak: float) -> float:
        """Return the bytes of memory needed for a predicted peak, including the overhead of the device."""
        return peak * FRAGMENTATION + CUDA_CONTEXT if self.device == "cuda" else peak + IMPORTS


def find_machine(config: Config) -> Machine:
    """Return a typical card with `gpu_memory` GB if that is set, otherwise this machine. Raises ConfigError."""
    if config.gpu_memory is not None:
        if not config.gpu_memory > 0:
            raise ConfigError(f"gpu_memory is {config.gpu_memory:g}, but must be the memory of a GPU in GB, such as 12")
        dtype = "bfloat16" if config.dtype == "auto" else config.dtype
        card = typical_card(config.gpu_memory, bf16=dtype != "float16")
        return Machine("cuda", dtype, config.gpu_memory * GB, f"a CUDA GPU with {config.gpu_memory:g} GB", card)
    if config.device != "cpu" and shutil.which("nvidia-smi"):  # without a driver, do not spend time on importing torch
        import torch

        if torch.cuda.is_available():
            auto_dtype = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
            dtype = auto_dtype if config.dtype == "auto" else config.dtype
            free, total = torch.cuda.mem_get_info()
            free += CUDA_CONTEXT  # the query itself has created the context
            name = torch.cuda.get_device_name()
            return Machine("cuda", dtype, free, f"{name} with {free / GB:.1f} GB free", known_card(name, total / GB))
    if config.device == "cuda":
        raise ConfigError(
            "device is cuda, but this machine has no NVIDIA GPU: set the memory of a GPU in GB, such as --gpu-memory 12"
        )
    import psutil

    memory = psutil.virtual_memory().available
    dtype = "float32" if config.dtype == "auto" else config.dtype
    return Machine("cpu", dtype, memory, f"the CPU, with {memory / GB:.1f} GB of memory free")


def typical_card(gigabytes: float, bf16: bool) -> Card:
    """Return the smallest known card with at least this much memory, with or without bf16, or the largest one."""
    cards = [card for card in CARDS if card.bf16 == bf16]
    return next((card for card in cards if card.gigabytes >= gigabytes), cards[-1])


def known_card(name: str, gigabytes: float) -> Card | None:
    """Return the card with this driver name, such as "NVIDIA GeForce RTX 3060", or None if it is unknown.

    Laptop GPUs count as unknown, because they are slower than the desktop card of the same name.
    """
    name = re.sub(r"^(NVIDIA |Tesla |GeForce )+", "", name)
    cards = [card for card in CARDS if card.name == name]
    return min(cards, key=lambda card: abs(card.gigabytes - gigabytes), default=None)


# --- the time on a card: modelled, not measured (--probe measures it)
#
# A roofline model: each part takes the time for its bytes at the card's bandwidth or for its arithmetic at the card's
# peak, whichever is longer, divided by EFFICIENCY. The mean completion is assumed to be half of max_completion_length.
# Loading, scoring and saving are not counted, and the update is assumed to use all groups, even those without variance.


def run_seconds(config: Config, shape: Shape, card: Card, prompt: int, prediction) -> tuple[float, float]:
    """Return the seconds per step, and of the whole run with its evaluations. prediction: from rl/fit/memory.py."""
    step = rollout_seconds(config, shape, card, prompt, prediction, config.prompts_per_step, config.num_generations)
    step += update_flops(config, shape, prompt, prediction) / (card.tflops * 1e12 * EFFICIENCY)
    evaluations = 1 + sum(map(config.evaluates_at, range(config.max_steps + 1)))  # one more after the last step
    greedy_and_sampled = 2 * rollout_seconds(config, shape, card, prompt, prediction, config.eval_questions, 1)
    return step, config.max_steps * step + evaluations * greedy_and_sampled


def rollout_seconds(
    config: Config, shape: Shape, card: Card, prompt: int, prediction, prompts: int, group: int
) -> float:
    """Return the seconds of prefill and decode steps. A decode step reads all weights and its rows' keys and values."""
    completions = prompts * group
    longest = config.max_completion_length
    mean = longest / 2
    steps = max(longest, completions * mean / min(prediction.rows, completions))
    rows = completions * mean / steps  # mean number of active rows in a decode step

    weights = shape.linear_parameters
    head = shape.vocabulary * shape.hidden
    weight_bytes = 2
    if (config.load_in_4bit or shape.is_4bit) and not prediction.folds_lora:
        weight_bytes = NF4_READ + 2 * weight_bytes  # the dequantized matrix is written once and read once
    keys_and_values = 2 * shape.layers * shape.kv_size * 2 * rows * (prompt + mean / 2)
    reading = (weights * weight_bytes + head * 2 + keys_and_values) / (card.bandwidth * 1e9)
    computing = 2 * (weights + head) * rows / (card.tflops * 1e12)
    prefill = 2 * weights * prompts * prompt / (card.tflops * 1e12)
    return steps * max(max(reading, computing) / EFFICIENCY, MIN_DECODE_STEP) + prefill / EFFICIENCY


def update_flops(config: Config, shape: Shape, prompt: int, prediction) -> float:
    """Return the FLOPs of an update, per weight and token: 2 forward, 2 backward (LoRA is small), 2 to recompute."""
    rows = config.prompts_per_step * config.num_generations
    completion_tokens = rows * config.max_completion_length / 2
    shares_prompts = shape.uses_decoder and not prediction.uses_unsloth
    prompt_tokens = prompt * (config.prompts_per_step if shares_prompts else rows)
    forward = 2 * shape.linear_parameters * (completion_tokens + prompt_tokens)
    training = forward * (3 if config.gradient_checkpointing else 2)
    head = 2 * shape.vocabulary * shape.hidden * completion_tokens
    flops = config.num_iterations * (training + 3 * head)
    # Log-probabilities without gradients: old policy, except in the first mini-batch, and reference.
    passes = 1 - 1 / config.num_mini_batches
    if config.kl_in_loss or config.algorithm == "dpo":
        passes += 1
    if config.has_critic:
        values = training if config.critic == "adapter" else forward
        flops += config.num_iterations * values + forward  # the values before the update need a forward pass, too
        if config.beta:
            passes = 2
    return flops + passes * (forward + head)
