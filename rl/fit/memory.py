"""Prediction of a run's memory by part, computed from the model's dimensions and the settings; nothing is loaded.

    peak = fixed + max(load, weights + LoRA + optimizer + critic + max(roll-out, update))

Only the larger of roll-out and update counts, because one ends before the other begins. Both count for small models on
a CPU, where freed blocks are kept for the whole run and fragment (rl/model/oom.py). The roll-out is computed
from the allocations in rl/model/engine.py and rl/model/sampling.py. The update is computed from the tensors that autograd
saves for the fullest micro-batch in rl/model/decoder.py and rl/model/logprobs.py, on CUDA in Unsloth's layers, or in the
model's own forward pass, run on fake tensors.

On a CPU, the prediction is the resident memory beyond the memory after the imports, within 18 % of measurements in
fp32, within 13 % in bf16. On CUDA, it is the memory allocated by PyTorch, without the CUDA context; this has not been
compared with measurements.
"""

import importlib.util
from dataclasses import dataclass

from rl.config import Config
from rl.fit.cards import MB
from rl.fit.shapes import Shape, saved_activations
from rl.model.engine import CACHE_GROWTH, PREFILL_TOKENS
from rl.model.logprobs import LOGITS_PER_CHUNK
from rl.model.oom import KEEP_FREED_BELOW_HIDDEN, MAX_MEMORY_SHARE

ASSUMED_PROMPT = 256  # tokens of the longest prompt if the questions are unknown
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # per parameter: 4 bits, 8 bits per block of 64, 32 bits per 256 blocks
FIXED_CUDA = 64 * MB  # workspaces of the matrix products
FRAGMENTATION = 1.35  # on a CPU: blocks that are kept during a micro-batch but fit no later tensor (SmolLM2-135M)
FRAGMENTATION_OWN = 1.1  # the same for a model's own forward pass (0.94 to 1.28 with three models)
FIXED_CPU = 90 * MB  # loaded on first use: graders, kernels, the model's classes (94 MB with the tiny model)
TOKENIZER_FACTOR = 14  # resident bytes per byte of tokenizer.json (byte-level BPE of 50,000 and 150,000 tokens)
TOKENIZER_TOKEN_BYTES = 75  # bytes of tokenizer.json per token, as for Qwen


@dataclass
class Prediction:
    """Predicted memory by part, in bytes, and the batch sizes that it assumes."""

    weights: float
    lora: float  # LoRA with its gradients
    optimizer: float
    critic: float  # critic with its gradients and optimizer
    rollout: float
    update: float
    fixed: float
    load: float  # peak while loading, instead of all other parts except `fixed`
    allocator_keeps: bool  # freed blocks are kept, so roll-out and update add up
    rows: int  # rows generated at a time
    rows_requested: int  # rows that would be generated at a time with enough memory
    folds_lora: bool  # the LoRA is folded into scratch weights for the roll-out
    tokens: int  # tokens of a micro-batch in the update
    uses_unsloth: bool  # Unsloth computes the update

    @property
    def peak(self) -> float:
        permanent = self.weights + self.lora + self.optimizer + self.critic
        temporary = self.rollout + self.update if self.allocator_keeps else max(self.rollout, self.update)
        return self.fixed + max(self.load, permanent + temporary)

    @property
    def peak_mb(self) -> float:
        return self.peak / MB


def predict(
    config: Config, shape: Shape, device: str, dtype: str, prompt_length: int, free: float | None = None
) -> Prediction:
    """Predict the memory of a run on a device ("cpu" or "cuda"), in a dtype such as "bfloat16".

    Args:
        prompt_length: Tokens of the longest prompt.
        free: Free bytes before the run allocates anything. With less memory the engine generates fewer rows at a time.
    """
    itemsize = 4 if dtype == "float32" else 2
    is_4bit = config.load_in_4bit or shape.is_4bit
    is_gpu = device == "cuda"
    other_parameters = shape.parameters - shape.linear_parameters  # embedding, head, norms and biases
    weights = shape.linear_parameters * (NF4_BYTES if is_4bit else itemsize) + other_parameters * itemsize
    lora_parameters = shape.lora_parameters(config.lora_r)  # always fp32
    moment_bytes = 8 if config.optim == "adamw_torch" else 2
    frozen = 4 if config.adapter or config.sft_data else 0  # a frozen copy is the reference
    lora = lora_parameters * (8 + frozen)  # weights and gradients
    critic = 0
    if config.has_critic:
        critic = (shape.hidden + 1 + (lora_parameters if config.critic == "adapter" else 0)) * (8 + moment_bytes)
    load = 0
    fixed = FIXED_CUDA
    if not is_gpu:
        load = weights + (shape.file_bytes or 2 * shape.parameters)  # the file stays mapped until it is fully read
        fixed = FIXED_CPU + TOKENIZER_FACTOR * (shape.tokenizer_bytes or TOKENIZER_TOKEN_BYTES * shape.vocabulary)
    if free is not None:
        free = MAX_MEMORY_SHARE * (free - weights - lora - lora_parameters * moment_bytes - critic - fixed)
    rollout, rows, rows_requested, folds_lora = max(
        rollout_bytes(config, shape, is_gpu, itemsize, prompt_length, prompts, group, free)
        for prompts, group in ((config.prompts_per_step, config.num_generations), (config.eval_questions, 1))
    )
    if config.rollout == "vllm":
        rollout = 0  # on the server
    with_unsloth = uses_unsloth(config, shape, device, dtype)
    update = update_bytes(config, shape, is_gpu, with_unsloth, dtype, prompt_length)
    fragmentation = FRAGMENTATION if shape.uses_decoder else FRAGMENTATION_OWN
    keeps_all = not is_gpu and shape.hidden < KEEP_FREED_BELOW_HIDDEN
    return Prediction(
        weights=weights,
        lora=lora,
        optimizer=lora_parameters * moment_bytes,
        critic=critic,
        rollout=rollout,
        update=update if is_gpu or keeps_all else fragmentation * update,
        fixed=fixed,
        load=load,
        allocator_keeps=keeps_all,
        rows=rows,
        rows_requested=rows_requested,
        folds_lora=folds_lora,
        tokens=micro_batch_tokens(config, shape, with_unsloth, prompt_length),
        uses_unsloth=with_unsloth,
    )


def uses_unsloth(config: Config, shape: Shape, device: str, dtype: str) -> bool:
    """Return whether Unsloth computes the update (rl/model/backends.py). With `gpu_memory`, assume it is installed."""
    if device != "cuda" or dtype == "float32" or not shape.uses_decoder or config.backend == "transformers":
        return False
    is_other_machine = config.gpu_memory is not None
    return config.backend == "unsloth" or is_other_machine or importlib.util.find_spec("unsloth") is not None


# --- the roll-out


def rollout_bytes(
    config: Config, shape: Shape, is_gpu: bool, itemsize: int, prompt: int, prompts: int, group: int, free: float | None
) -> tuple[float, int, int, bool]:
    """Return the bytes of a roll-out without the weights, as allocated by rl/model/engine.py.

    Also returns the rows at a time, the rows requested, and whether the LoRA is folded. itemsize: bytes per element.
    """
    length = prompt + config.max_completion_length
    token_bytes = 2 * shape.layers * shape.kv_size * itemsize  # keys and values of a token
    requested = max(min(config.rollout_batch_size, prompts * group), group)
    slots = requested
    scratch = shape.linear_parameters * itemsize if shape.uses_decoder else 0
    if free is not None:
        while slots > group and slots * length * token_bytes >= free:
            slots = max(slots // 2, group)
        if scratch + slots * length * token_bytes >= free:
            scratch = 0
    # Activations of a layer per token, in its feed-forward block or in its attention.
    feed_forward = 4 * shape.intermediate + 2 * shape.hidden
    attention = 2 * shape.hidden + 4 * (shape.query_size + 2 * shape.kv_size)
    forward = itemsize * max(feed_forward, attention)
    # Sampling in fp32: logits, log-probabilities, probabilities, temporaries of the sampling; a sort for top_p.
    logits = slots * shape.vocabulary * 4 * ((5 if is_gpu else 4) + (4 if config.top_p < 1 else 0))
    seen = slots * shape.vocabulary * 5 if config.repetition_penalty != 1 else 0
    first = slots * shape.vocabulary * 4  # the first tokens are sampled from a copy of the prompts' logits
    tokens = min(max(PREFILL_TOKENS, prompt), slots // group * prompt)  # prompt tokens prefilled at a time
    prefill = tokens * (forward + group * shape.kv_size * itemsize)
    # Attention of one token per row: on a CPU the mask, product and softmax of a layer's scores.
    scores = 0 if is_gpu else 3 * slots * shape.heads * length * itemsize
    decode = slots * forward + scores + logits
    cached = length if is_gpu else min(prompt + CACHE_GROWTH, length)  # on a CPU the cache grows, layer by layer
    start = slots * cached * token_bytes + max(prefill, logits + first)
    end = slots * length * token_bytes * (1 if is_gpu or cached == length else 1 + 1 / shape.layers) + decode
    return scratch + seen + max(start, end), slots, requested, scratch > 0


def micro_batch_tokens(config: Config, shape: Shape, with_unsloth: bool, prompt: int) -> int:
    """Return the tokens of the fullest micro-batch: the budget, at least a completion (dpo: two), at most the step."""
    rows = config.prompts_per_step * config.num_generations
    completions = 2 if config.algorithm == "dpo" else 1
    if shape.uses_decoder and not with_unsloth:  # the completions of a group share their prompt
        smallest = prompt + completions * config.max_completion_length
        step = config.prompts_per_step * prompt + rows * config.max_completion_length
    else:
        smallest = completions * (prompt + config.max_completion_length)
        step = rows * (prompt + config.max_completion_length)
    return min(max(config.max_tokens_per_micro_batch, smallest), step)


def update_bytes(config: Config, shape: Shape, is_gpu: bool, with_unsloth: bool, dtype: str, prompt: int) -> float:
    """Return the bytes of forward and backward of the fullest micro-batch, without weights, gradients and optimizer."""
    itemsize = 4 if dtype == "float32" else 2
    length = prompt + config.max_completion_length
    tokens = micro_batch_tokens(config, shape, with_unsloth, prompt)
    hidden = shape.hidden
    inputs = tokens * hidden * itemsize  # inputs of a layer
    if with_unsloth:
        # Per token, with flash attention and no mask. Only two of the checkpointed inputs are on the GPU at a time.
        elements = 5 * hidden + 4 * shape.query_size + 5 * shape.kv_size + 4 * shape.intermediate
        saved = tokens * itemsize * elements
        working = 0
        mask = 0
        checkpoints = 2 * inputs
    else:
        # Saved per token for the backward of a layer: inputs and outputs of the norms; gate, up and their product;
        # packed query, key and value; padded query and output; attention output and log-sum-exp; x A of LoRAs.
        normed = 2 * hidden + (shape.query_size + shape.kv_size if shape.qk_norm else 0)
        norm_itemsize = itemsize if is_gpu else 4  # without a fused kernel the norms save their inputs in fp32
        elements = 2 * hidden + 3 * shape.intermediate + 4 * shape.query_size + 2 * shape.kv_size + 7 * config.lora_r
        saved = tokens * (norm_itemsize * normed + itemsize * elements + 4 * shape.heads)
        # Each completion has a copy of its prompt's keys and values in addition to its own.
        keys = min(2 * tokens, config.prompts_per_step * config.num_generations * length)
        saved += keys * 2 * shape.kv_size * itemsize
        factors = shape.lora_outputs + (0 if itemsize == 4 else shape.lora_inputs)  # scaled B, and A if it is cast
        saved += config.lora_r * itemsize * factors / shape.layers
        working = tokens * itemsize * (3 * shape.intermediate + 3 * hidden)  # gradients of a layer's activations
        mask = tokens * (shape.query_size // shape.kv_size) * length * itemsize
        checkpoints = shape.layers * inputs
    layers = shape.layers * saved
    if not shape.uses_decoder and (activations := saved_activations(shape, dtype, config.lora_r)):
        layers = activations[0] + activations[1] * tokens
        saved = layers / shape.layers
    layer = working
    if config.gradient_checkpointing:
        layers = checkpoints
        layer += saved
    if config.load_in_4bit or shape.is_4bit:
        layer += hidden * shape.intermediate * itemsize  # the largest matrix, dequantized
    # The last hidden states with their gradient, and one chunk of logits and probabilities (rl/model/logprobs.py).
    head = (8 if itemsize == 4 else 12) * min(LOGITS_PER_CHUNK, tokens * shape.vocabulary) + 3 * inputs
    return layers + mask + max(layer, head)
