"""Graphics cards and this machine: the memory that a run may use, and the time that it takes on a card.

Torch is imported only on a machine with an NVIDIA driver.
"""

import re
import shutil
from dataclasses import dataclass

from rl.config import Config, ConfigError
from rl.fit.shapes import Shape

MB = 2**20
GB = 2**30
CONTEXT = 0.5 * GB  # of CUDA, not counted by PyTorch
FRAGMENTATION = 1.08  # of PyTorch's allocator on CUDA
IMPORTS = 0.4 * GB  # resident after the imports, on a CPU
EFFICIENCY = 0.5  # share of the roofline that such programs reach: a rule of thumb
MIN_DECODE_STEP = 0.002  # seconds, however small the model: kernel launches, sampling, the host
NF4_READ = 0.516  # bytes of a parameter in NF4


@dataclass(frozen=True)
class Card:
    """A card as its manufacturer specifies it."""

    name: str
    gigabytes: float  # as PyTorch sees them
    bandwidth: float  # of its memory, GB/s
    tflops: float  # dense 16-bit matrix products with fp32 accumulation
    bf16: bool = True


# Common cards. Of several with the same memory the most usual one comes first.
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
    """The memory that a run has to fit into."""

    device: str  # cpu or cuda
    dtype: str
    memory: float  # bytes
    name: str
    card: Card | None = None  # if its speed is known; for a card given by its memory, a usual one

    def free(self) -> float:
        """Free bytes that the roll-out engine sees before the run allocates anything."""
        return self.memory - (CONTEXT if self.device == "cuda" else IMPORTS)

    def needed(self, peak: float) -> float:
        """Bytes of memory that a run with this predicted peak needs."""
        return peak * FRAGMENTATION + CONTEXT if self.device == "cuda" else peak + IMPORTS


def find_machine(config: Config) -> Machine:
    """Return the card of `gpu_memory` GB if that is set, else this machine. Raises ConfigError."""
    if config.gpu_memory is not None:
        if not config.gpu_memory > 0:
            raise ConfigError(f"gpu_memory is {config.gpu_memory:g}, but is that of the card in GB, such as 12")
        dtype = "bfloat16" if config.dtype == "auto" else config.dtype
        card = usual_card(config.gpu_memory, bf16=dtype != "float16")
        return Machine("cuda", dtype, config.gpu_memory * GB, f"a CUDA card of {config.gpu_memory:g} GB", card)
    if config.device != "cpu" and shutil.which("nvidia-smi"):  # without a driver, importing torch would be wasted time
        import torch

        if torch.cuda.is_available():
            auto = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
            dtype = auto if config.dtype == "auto" else config.dtype
            free, total = torch.cuda.mem_get_info()
            free += CONTEXT  # allocated by this very query
            name = torch.cuda.get_device_name()
            return Machine("cuda", dtype, free, f"{name} with {free / GB:.1f} GB free", known_card(name, total / GB))
    if config.device == "cuda":
        raise ConfigError("device is cuda, but no NVIDIA GPU is seen here: name a card's memory, --gpu-memory 12")
    import psutil

    memory = psutil.virtual_memory().available
    dtype = "float32" if config.dtype == "auto" else config.dtype
    return Machine("cpu", dtype, memory, f"the CPU, with {memory / GB:.1f} GB of memory free")


def usual_card(gigabytes: float, bf16: bool) -> Card:
    """The smallest known card with at least this much memory, with or without bf16, or the largest one."""
    cards = [card for card in CARDS if card.bf16 == bf16]
    return next((card for card in cards if card.gigabytes >= gigabytes), cards[-1])


def known_card(name: str, gigabytes: float) -> Card | None:
    """The card with the driver's name for it, such as "NVIDIA GeForce RTX 3060", or None.

    A laptop's card is slower than the desktop card of the same name, and is not known.
    """
    name = re.sub(r"^(NVIDIA |Tesla |GeForce )+", "", name)
    cards = [card for card in CARDS if card.name == name]
    return min(cards, key=lambda card: abs(card.gigabytes - gigabytes), default=None)


# --- the time on a card: modelled, not measured (--probe measures)
#
# Each part takes what its bytes take at the card's bandwidth or its arithmetic at the card's peak, whichever is longer (a
# roofline), divided by EFFICIENCY. The mean completion is taken to be half of max_completion_length. Loading, scoring and saving
# are not counted, nor is it that groups without variance are left out of the update.


def run_seconds(config: Config, shape: Shape, card: Card, prompt: int, prediction) -> tuple[float, float]:
    """Return the seconds of a step, and of the run with its evaluations. prediction: that of rl/fit/memory.py."""
    step = rollout_seconds(config, shape, card, prompt, prediction, config.prompts_per_step, config.num_generations)
    step += update_flops(config, shape, prompt, prediction) / (card.tflops * 1e12 * EFFICIENCY)
    evaluations = 1 + sum(map(config.evaluates_at, range(config.max_steps + 1)))  # one more after the last step
    greedy_and_sampled = 2 * rollout_seconds(config, shape, card, prompt, prediction, config.eval_questions, 1)
    return step, config.max_steps * step + evaluations * greedy_and_sampled


def rollout_seconds(
    config: Config, shape: Shape, card: Card, prompt: int, prediction, prompts: int, group: int
) -> float:
    """Seconds of a prefill and of decode steps, each of which reads all weights and the keys and values of its rows."""
    completions = prompts * group
    longest = config.max_completion_length
    mean = longest / 2
    steps = max(longest, completions * mean / min(prediction.rows, completions))
    rows = completions * mean / steps  # alive in a decode step, on average

    weights = shape.linear_parameters
    head = shape.vocabulary * shape.hidden
    weight_bytes = 2
    if (config.load_in_4bit or shape.four_bit) and not prediction.folded:
        weight_bytes = NF4_READ + 2 * weight_bytes  # the dequantized matrix is written, and read by the product
    keys_and_values = 2 * shape.layers * shape.kv_size * 2 * rows * (prompt + mean / 2)
    reading = (weights * weight_bytes + head * 2 + keys_and_values) / (card.bandwidth * 1e9)
    computing = 2 * (weights + head) * rows / (card.tflops * 1e12)
    prefill = 2 * weights * prompts * prompt / (card.tflops * 1e12)
    return steps * max(max(reading, computing) / EFFICIENCY, MIN_DECODE_STEP) + prefill / EFFICIENCY


def update_flops(config: Config, shape: Shape, prompt: int, prediction) -> float:
    """Operations of a step's update: 2 a parameter and token forward, 2 backward (LoRA is small), 2 for a recomputation."""
    rows = config.prompts_per_step * config.num_generations
    completion_tokens = rows * config.max_completion_length / 2
    shares_prompts = shape.uses_decoder and not prediction.uses_unsloth
    prompt_tokens = prompt * (config.prompts_per_step if shares_prompts else rows)
    forward = 2 * shape.linear_parameters * (completion_tokens + prompt_tokens)
    training = forward * (3 if config.gradient_checkpointing else 2)
    head = 2 * shape.vocabulary * shape.hidden * completion_tokens
    flops = config.num_iterations * (training + 3 * head)
    # Log-probabilities without gradients: of the old policy, except in the first mini-batch, and of the reference.
    passes = 1 - 1 / config.num_mini_batches
    if config.kl_in_loss or config.algorithm == "dpo":
        passes += 1
    if config.has_critic:
        values = training if config.critic == "adapter" else forward
        flops += config.num_iterations * values + forward  # and the values before the update
        if config.beta:
            passes = 2
    return flops + passes * (forward + head)
