"""The memory that a run will need, by part, computed from the model's dimensions and the settings before anything is loaded.

    peak = fixed + max(load, weights + LoRA + optimizer + critic + max(roll-out, update))

Roll-out and update do not add up, since one is over when the other begins. (Small models on a CPU are an exception: for speed,
freed blocks are kept, see `keep_freed_memory` in rl/model/policy.py, in pieces that the other part cannot use.) The sizes are
those of what the code allocates: the roll-out of rl/model/engine.py and rl/model/sampling.py, and in the update what autograd
saves of rl/model/decoder.py and rl/model/logprobs.py for the fullest micro-batch, or on CUDA what Unsloth's layers save.

On a CPU the prediction is of the resident memory above that after the imports. It is within 15 % of measurements. On CUDA it is
of what PyTorch has allocated, without the CUDA context; that has not been measured.
"""

import importlib.util
from dataclasses import dataclass

from rl.config import Config
from rl.fit.cards import MB
from rl.fit.shapes import Shape
from rl.model.engine import CACHE_GROWTH, MAX_MEMORY_SHARE, PREFILL_TOKENS
from rl.model.logprobs import LOGITS_PER_CHUNK
from rl.model.policy import REUSE_FREED_BELOW_HIDDEN

ASSUMED_PROMPT = 256  # tokens, if nothing is known of the questions
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes a parameter: 4 bits, 8 bits for each block of 64, 32 bits for 256 blocks
FIXED_CUDA = 64 * MB  # workspaces of the matrix products
FIXED_CPU = 90 * MB  # loaded on first use: graders, kernels, the model's classes (94 MB with the tiny model)
TOKENIZER = 14  # resident bytes for each byte of tokenizer.json (byte-level BPE of 50,000 and 150,000 tokens)
TOKENIZER_FILE = 75  # bytes of tokenizer.json for each token, as in Qwen's


@dataclass
class Prediction:
    """Bytes by part."""

    weights: float
    lora: float  # with its gradients
    optimizer: float
    critic: float  # with its gradients and optimizer
    rollout: float
    update: float
    fixed: float
    load: float  # while loading, instead of all other parts except `fixed`
    allocator_keeps: bool  # freed blocks are kept, so roll-out and update add up
    rows: int  # of the roll-out at a time
    rows_requested: int  # the same with enough memory
    folded: bool  # the LoRA is folded into scratch weights for the roll-out
    tokens: int  # of the update at a time
    uses_unsloth: bool  # Unsloth computes the update

    @property
    def peak(self) -> float:
        held = self.weights + self.lora + self.optimizer + self.critic
        work = self.rollout + self.update if self.allocator_keeps else max(self.rollout, self.update)
        return self.fixed + max(self.load, held + work)

    @property
    def peak_mb(self) -> float:
        return self.peak / MB


def predict(
    config: Config, shape: Shape, device: str, dtype: str, prompt_length: int, free: float | None = None
) -> Prediction:
    """Predict the memory of a run on a device (cpu or cuda), in a dtype such as bfloat16.

    Args:
        prompt_length: Tokens of the longest prompt.
        free: Free bytes before the run allocates anything. If they are few, the engine rolls out fewer rows at a time.
    """
    width = 4 if dtype == "float32" else 2
    four_bit = config.load_in_4bit or shape.four_bit
    cuda = device == "cuda"
    other_parameters = shape.parameters - shape.linear_parameters  # embedding, head, norms and biases
    weights = shape.linear_parameters * (NF4 if four_bit else width) + other_parameters * width
    trained = shape.lora_parameters(config.lora_r)  # always fp32
    moments = 8 if config.optim == "adamw_torch" else 2
    lora = trained * (12 if config.adapter else 8)  # weights and gradients, and the frozen copy of a given adapter
    critic = 0
    if config.has_critic:
        critic = (shape.hidden + 1 + (trained if config.critic == "adapter" else 0)) * (8 + moments)
    load = 0
    fixed = FIXED_CUDA
    if not cuda:
        load = weights + (shape.file_bytes or 2 * shape.parameters)  # the file stays mapped until all of it is read
        fixed = FIXED_CPU + TOKENIZER * (shape.tokenizer_bytes or TOKENIZER_FILE * shape.vocabulary)
    if free is not None:
        free = MAX_MEMORY_SHARE * (free - weights - lora - trained * moments - critic - fixed)
    rollout, rows, rows_requested, folded = max(
        rollout_bytes(config, shape, cuda, width, prompt_length, prompts, group, free)
        for prompts, group in ((config.prompts_per_step, config.num_generations), (config.eval_questions, 1))
    )
    unsloth = uses_unsloth(config, shape, device, dtype)
    return Prediction(
        weights=weights,
        lora=lora,
        optimizer=trained * moments,
        critic=critic,
        rollout=rollout,
        update=update_bytes(config, shape, cuda, unsloth, width, prompt_length),
        fixed=fixed,
        load=load,
        allocator_keeps=not cuda and shape.hidden < REUSE_FREED_BELOW_HIDDEN,
        rows=rows,
        rows_requested=rows_requested,
        folded=folded,
        tokens=micro_batch_tokens(config, shape, unsloth, prompt_length),
        uses_unsloth=unsloth,
    )


def uses_unsloth(config: Config, shape: Shape, device: str, dtype: str) -> bool:
    """Whether Unsloth computes the update, as rl/model/backends.py decides. With gpu_memory it counts as installed."""
    if device != "cuda" or dtype == "float32" or not shape.uses_decoder or config.backend == "transformers":
        return False
    elsewhere = config.gpu_memory is not None
    return config.backend == "unsloth" or elsewhere or importlib.util.find_spec("unsloth") is not None


# --- the roll-out


def rollout_bytes(
    config: Config, shape: Shape, cuda: bool, width: int, prompt: int, prompts: int, group: int, free: float | None
) -> tuple[float, int, int, bool]:
    """Bytes of a roll-out beside the weights (rl/model/engine.py), its rows, those requested, and if the LoRA is folded."""
    length = prompt + config.max_completion_length
    token = 2 * shape.layers * shape.kv_size * width  # its keys and values
    requested = max(min(config.rollout_batch_size, prompts * group), group)
    slots = requested
    scratch = shape.linear_parameters * width if shape.uses_decoder else 0
    if free is not None:
        while slots > group and slots * length * token >= free:
            slots = max(slots // 2, group)
        if scratch + slots * length * token >= free:
            scratch = 0
    # Activations of a layer for each token, in its feed-forward block or in its attention.
    feed_forward = 4 * shape.intermediate + 2 * shape.hidden
    attention = 2 * shape.hidden + 4 * (shape.query_size + 2 * shape.kv_size)
    forward = width * max(feed_forward, attention)
    # Sampling, fp32: logits, log-probabilities, probabilities, and the temporaries of a draw; a sort for top_p.
    logits = slots * shape.vocabulary * 4 * ((5 if cuda else 4) + (4 if config.top_p < 1 else 0))
    seen = slots * shape.vocabulary * 5 if config.repetition_penalty != 1 else 0
    first = slots * shape.vocabulary * 4  # the first tokens are drawn from a copy of the prompts' logits
    tokens = min(max(PREFILL_TOKENS, prompt), slots // group * prompt)  # prefilled at a time
    prefill = tokens * (forward + group * shape.kv_size * width)
    # Attention over one token a row: on a CPU the scores of a layer, their mask, product and softmax.
    scores = 0 if cuda else 3 * slots * shape.heads * length * width
    decode = slots * forward + scores + logits
    cached = length if cuda else min(prompt + CACHE_GROWTH, length)  # on a CPU the cache grows, layer by layer
    start = slots * cached * token + max(prefill, logits + first)
    end = slots * length * token * (1 if cuda or cached == length else 1 + 1 / shape.layers) + decode
    return scratch + seen + max(start, end), slots, requested, scratch > 0


def micro_batch_tokens(config: Config, shape: Shape, unsloth: bool, prompt: int) -> int:
    """Tokens of the fullest micro-batch: the budget, but at least one completion (in dpo a pair), and at most the step's."""
    rows = config.prompts_per_step * config.num_generations
    completions = 2 if config.algorithm == "dpo" else 1
    if shape.uses_decoder and not unsloth:  # completions of a group share their prompt
        smallest = prompt + completions * config.max_completion_length
        step = config.prompts_per_step * prompt + rows * config.max_completion_length
    else:
        smallest = completions * (prompt + config.max_completion_length)
        step = rows * (prompt + config.max_completion_length)
    return min(max(config.max_tokens_per_micro_batch, smallest), step)


def update_bytes(config: Config, shape: Shape, cuda: bool, unsloth: bool, width: int, prompt: int) -> float:
    """Bytes of the fullest micro-batch, forward and backward, beside weights, gradients and optimizer (rl/update.py)."""
    length = prompt + config.max_completion_length
    tokens = micro_batch_tokens(config, shape, unsloth, prompt)
    hidden = shape.hidden
    inputs = tokens * hidden * width  # of a layer
    if unsloth:
        # Flash attention without a mask. Of the checkpointed inputs two are on the card, the others on the host.
        token = 5 * hidden + 4 * shape.query_size + 5 * shape.kv_size + 4 * shape.intermediate
        saved = tokens * width * token
        working = 0
        mask = 0
        checkpoints = 2 * inputs
    else:
        # Saved for the backward of a layer: inputs and outputs of the norms; gate, its activation, up and their product; of the
        # attention the packed query, key and value, query and output in rows, output and log-sum-exp; x A of each LoRA.
        normed = 2 * hidden + (shape.query_size + shape.kv_size if shape.qk_norm else 0)
        norm_width = width if cuda else 4  # without a fused kernel the norms save their inputs in fp32
        token = 2 * hidden + 4 * shape.intermediate + 4 * shape.query_size + 2 * shape.kv_size + 7 * config.lora_r
        saved = tokens * (norm_width * normed + width * token + 4 * shape.heads)
        # Each completion has a copy of its prompt's keys and values beside its own.
        keys = min(2 * tokens, config.prompts_per_step * config.num_generations * length)
        saved += keys * 2 * shape.kv_size * width
        factors = shape.linear_outputs + (0 if width == 4 else shape.linear_inputs)  # scaled B, and A if it is cast
        saved += config.lora_r * width * factors / shape.layers
        working = tokens * width * (3 * shape.intermediate + 3 * hidden)  # gradients of a layer
        mask = tokens * (shape.query_size // shape.kv_size) * length * width
        checkpoints = shape.layers * inputs
    layers = shape.layers * saved
    layer = working
    if config.gradient_checkpointing:
        layers = checkpoints
        layer += saved
    if config.load_in_4bit or shape.four_bit:
        layer += hidden * shape.intermediate * width  # the largest matrix, dequantized
    # The last hidden states with their gradient, and the head on a chunk of them (rl/model/logprobs.py).
    head = 5 * 4 * min(LOGITS_PER_CHUNK, tokens * shape.vocabulary) + 3 * inputs
    return layers + mask + max(layer, head)
