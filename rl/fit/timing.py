"""How many minutes a run will take on a card: a model of it, not a measurement (--probe measures).

Each part takes what its bytes take at the memory's bandwidth or its arithmetic at the card's peak, whichever is longer
(a roofline), and twice that: half of the limit is a rule of thumb for what such programs reach. Completions are taken as
half of max_completion_length on average. What is not counted: loading, scoring, saving, and groups without variance, which the
update leaves out. Imports no torch.
"""

from rl.config import Config
from rl.fit.cards import Card, Machine
from rl.fit.shapes import Shape

REACHED = 0.5  # of the limit
LEAST_DECODE_STEP = 0.002  # seconds, however small the model: launches of kernels, sampling, the host
NF4_DEQUANTISED = 0.516  # bytes a parameter that are read; the result is written, and read by the product


def time_line(config: Config, shape: Shape, machine: Machine, prompt: int, found) -> str:
    """A line of --dry-run on the time; "" for a CPU or a card whose speed is not known here.

    prompt: tokens. found: the Prediction of memory, which says how many rows are rolled out at a time.
    """
    if machine.card is None:
        return ""
    step, whole = seconds(config, shape, machine.card, prompt, found)
    minutes, a_step = f"{max(whole / 60, 1):,.0f}", f"{step:.0f} s" if step >= 10 else f"{step:.1f} s"
    return f"  time       about {minutes} minutes modelled for {machine.card.name} ({a_step} a step); measure it with --probe\n"


def seconds(config: Config, shape: Shape, card: Card, prompt: int, found) -> tuple[float, float]:
    """Of a step, and of the run with its evaluations."""
    step = rollout_seconds(config, shape, card, prompt, found, config.prompts_per_step, config.num_generations)
    step += update_flops(config, shape, prompt, found) / (card.tflops * 1e12 * REACHED)
    evaluations = 1 + sum(map(config.evaluates_at, range(config.max_steps + 1)))  # and the one at the end
    greedy_and_sampled = 2 * rollout_seconds(config, shape, card, prompt, found, config.eval_questions, 1)
    return step, config.max_steps * step + evaluations * greedy_and_sampled


def rollout_seconds(config: Config, shape: Shape, card: Card, prompt: int, found, prompts: int, group: int) -> float:
    """Of a roll-out: the prompts once, then decode steps, of which each reads all weights and the rows' keys and values."""
    width, longest = 2, config.max_completion_length
    weights, head = shape.linear_parameters(), shape.vocabulary * shape.hidden
    completions, mean = prompts * group, longest / 2
    steps = max(longest, completions * mean / min(found.rows, completions))
    rows = completions * mean / steps  # that live, on average
    of_weights = width
    if (config.load_in_4bit or shape.four_bit) and not found.folded:
        of_weights = NF4_DEQUANTISED + 2 * width
    keys = 2 * shape.layers * shape.kv_size * width * rows * (prompt + mean / 2)
    reading = (weights * of_weights + head * width + keys) / (card.bandwidth * 1e9)
    computing = 2 * (weights + head) * rows / (card.tflops * 1e12)
    prefill = 2 * weights * prompts * prompt / (card.tflops * 1e12)
    return steps * max(max(reading, computing) / REACHED, LEAST_DECODE_STEP) + prefill / REACHED


def update_flops(config: Config, shape: Shape, prompt: int, found) -> float:
    """Of a step's update: 2 a parameter and token forward, 2 backward (the LoRA is small), 2 where layers are recomputed."""
    rows, mean = config.prompts_per_step * config.num_generations, config.max_completion_length / 2
    prompts = rows if found.by_unsloth or not shape.own_decoder else config.prompts_per_step
    forward = 2 * shape.linear_parameters() * (rows * mean + prompts * prompt)
    training = forward * (3 if config.gradient_checkpointing else 2)
    head = 2 * shape.vocabulary * shape.hidden * rows * mean
    epochs = config.num_iterations
    later = 1 - 1 / config.num_mini_batches  # what the old policy must be asked for, apart from the first mini-batch
    passes = later + (config.kl_in_loss or config.algorithm == "dpo")
    flops = epochs * (training + 3 * head)
    if config.has_critic:
        of_critic = training if config.critic == "adapter" else forward
        flops += epochs * of_critic + forward  # and the values of before the update
        passes = 2 if config.beta else later
    return flops + passes * (forward + head)
