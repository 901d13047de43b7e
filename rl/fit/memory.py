"""How much memory a run will need, by part, worked out from the model's dimensions and the settings before anything is loaded.

    peak = fixed + max(load, weights + LoRA + optimizer + critic + max(roll-out, update))

Roll-out and update do not add: the one is over when the other begins. (Small models on a CPU are an exception: for the
sake of speed what the one has freed is kept, `keep_freed_memory` in rl/model/policy.py, in pieces that the other cannot use.)
The sizes are those of what the code makes: the roll-out of rl/model/engine.py and rl/model/sampling.py, and in the update what
autograd keeps of rl/model/decoder.py and rl/model/logprobs.py for the fullest micro-batch, or on CUDA by Unsloth what its layers
keep. On a CPU the prediction is of resident memory above that after the imports, and has been measured (bench/memory.py,
within 15 %). On CUDA it is of what PyTorch has allocated, without the CUDA context; that has not been measured. Imports no
torch.
"""

import dataclasses
import importlib.util
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from rl.config import Config
from rl.fit.cards import GB, MB, Machine, find_machine
from rl.fit.shapes import KNOWN, Shape, find_shape
from rl.fit.timing import time_line

NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes a parameter: 4 bits, 8 bits more for 64, and 32 bits for 256 of these
LOGITS_AT_A_TIME = 2**24  # as in rl/model/logprobs.py, which imports torch
PREFILL_TOKENS = 16384  # as in rl/model/engine.py
GROWTH = 64  # the same
SHARE_THAT_FITS = 0.8  # of the free memory, as in rl/model/engine.py
FIXED_CUDA = 64 * MB  # workspaces of the matrix products
KEPT_BELOW = 512  # hidden size: on a CPU, what models below it have freed is kept
FIXED_CPU = 90 * MB  # what is loaded when first used: graders, kernels, the model's classes (with the tiny model 94 MB)
TOKENIZER = 14  # resident bytes for each byte of tokenizer.json (byte-level BPE of 50,000 and 150,000 tokens)
ASSUMED_PROMPT = 256  # tokens, where nothing is known
CHARACTERS_A_TOKEN = 3
LEAST_COMPLETION = 64  # tokens; shorter ones are not proposed
TEMPLATE_TOKENS = 32  # what a chat template adds to a question


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
    load: float  # while loading, instead of all others but `fixed`
    kept: bool  # what has been freed is kept: roll-out and update add
    rows: int  # of the roll-out at a time
    rows_wanted: int  # the same, were there room enough
    folded: bool  # there is room for scratch weights of the roll-out
    tokens: int  # of the update at a time
    by_unsloth: bool  # who makes the update

    @property
    def peak(self) -> float:
        held = self.weights + self.lora + self.optimizer + self.critic
        work = self.rollout + self.update if self.kept else max(self.rollout, self.update)
        return self.fixed + max(self.load, held + work)

    @property
    def peak_mb(self) -> float:
        return self.peak / MB


def predict(
    config: Config, shape: Shape, device: str, dtype: str, prompt_length: int, free: float | None = None
) -> Prediction:
    """The memory of a run. device: cpu or cuda; dtype: float32, bfloat16 or float16; prompt_length: of the longest, tokens.

    free: bytes that the engine will find free beside what it holds itself; where they are few it makes do with less. None: enough.
    """
    width = 4 if dtype == "float32" else 2
    four_bit = config.load_in_4bit or shape.four_bit
    cuda = device == "cuda"
    weights = shape.linear_parameters() * (NF4 if four_bit else width) + shape.other_parameters() * width
    trained = shape.lora_parameters(config.lora_r)  # always fp32
    moments = 8 if config.optim == "adamw_torch" else 2
    lora = trained * (12 if config.adapter else 8)  # weights and gradients, and the frozen copy of a given adapter
    critic = 0
    if config.has_critic:
        critic = (shape.hidden + 1 + (trained if config.critic == "adapter" else 0)) * (8 + moments)
    load, fixed = 0, FIXED_CUDA
    if not cuda:
        load = weights + (shape.file_bytes or 2 * shape.parameters())  # the file stays mapped until all of it is read
        fixed = FIXED_CPU + TOKENIZER * (shape.tokenizer_bytes or 75 * shape.vocabulary)
    if free is not None:
        free = SHARE_THAT_FITS * (free - weights - lora - trained * moments - critic - fixed)
    asked = (config.prompts_per_step, config.num_generations), (config.eval_questions, 1)
    rollouts = [rollout_bytes(config, shape, cuda, width, prompt_length, *questions, free) for questions in asked]
    rollout, rows, rows_wanted, folded = max(rollouts)
    unsloth = by_unsloth(config, shape, device, dtype)
    if unsloth:
        update = unsloth_update_bytes(config, shape, width, four_bit, prompt_length)
    else:
        update = update_bytes(config, shape, cuda, width, four_bit, prompt_length)
    return Prediction(
        weights=weights,
        lora=lora,
        optimizer=trained * moments,
        critic=critic,
        rollout=rollout,
        update=update,
        fixed=fixed,
        load=load,
        kept=not cuda and shape.hidden < KEPT_BELOW,
        rows=rows,
        rows_wanted=rows_wanted,
        folded=folded,
        tokens=micro_batch_tokens(config, prompt_length, shape.own_decoder and not unsloth),
        by_unsloth=unsloth,
    )


def by_unsloth(config: Config, shape: Shape, device: str, dtype: str) -> bool:
    """Whether Unsloth makes the update, as in rl/model/backends.py. For a card that is not here it counts as installed."""
    if device != "cuda" or dtype == "float32" or not shape.own_decoder or config.backend == "transformers":
        return False
    elsewhere = config.gpu_memory is not None
    return config.backend == "unsloth" or elsewhere or importlib.util.find_spec("unsloth") is not None


def rollout_bytes(
    config: Config, shape: Shape, cuda: bool, width: int, prompt: int, prompts: int, group: int, free: float | None
) -> tuple[float, int, int, bool]:
    """What a roll-out of `prompts` questions takes beside the weights (rl/model/engine.py).

    Then its rows at a time, those wanted, and whether there are scratch weights.
    """
    length = prompt + config.max_completion_length
    token = 2 * shape.layers * shape.kv_size * width  # its keys and values
    slots = wanted = max(min(config.rollout_batch_size, prompts * group), group)
    scratch = shape.linear_parameters() * width if shape.own_decoder else 0
    if free is not None:
        while slots > group and slots * length * token >= free:
            slots = max(slots // 2, group)
        if scratch + slots * length * token >= free:
            scratch = 0
    # Sampling, fp32: logits, log-probabilities, probabilities, and what the draw makes of these; a sort for top_p.
    logits = slots * shape.vocabulary * 4 * ((5 if cuda else 4) + (4 if config.top_p < 1 else 0))
    seen = slots * shape.vocabulary * 5 if config.repetition_penalty != 1 else 0
    first = slots * shape.vocabulary * 4  # the first tokens are drawn from a copy of the prompts' logits
    tokens = min(max(PREFILL_TOKENS, prompt), slots // group * prompt)  # of the prompts that are prefilled at a time
    prefill = tokens * forward_bytes(shape, width) + tokens * group * shape.kv_size * width
    # Attention over one token a row: the CPU's scores of a layer, mask, product and softmax.
    scores = 0 if cuda else 3 * slots * shape.heads * length * width
    decode = slots * forward_bytes(shape, width) + scores + logits
    begun = length if cuda else min(prompt + GROWTH, length)  # on a CPU the cache grows, layer by layer
    begin = slots * begun * token + max(prefill, logits + first)
    end = slots * length * token * (1 if cuda or begun == length else 1 + 1 / shape.layers) + decode
    return scratch + seen + max(begin, end), slots, wanted, scratch > 0


def forward_bytes(shape: Shape, width: int) -> float:
    """What a layer has at hand for each token without gradients: in its feed-forward part, or in its attention."""
    feed_forward = 4 * shape.intermediate + 2 * shape.hidden
    return width * max(feed_forward, 2 * shape.hidden + 4 * (shape.query_size + 2 * shape.kv_size))


def least_tokens(config: Config, prompt: int, shared: bool = True) -> int:
    """Of a micro-batch: one completion behind its prompt, or in dpo, where they stay together, a pair."""
    completions = 2 if config.algorithm == "dpo" else 1
    return prompt * (1 if shared else completions) + config.max_completion_length * completions


def micro_batch_tokens(config: Config, prompt: int, shared: bool) -> int:
    """Of the fullest micro-batch: what the budget allows, if the step has as many. shared: a group computes its prompt once."""
    rows = config.prompts_per_step * config.num_generations
    of_step = rows * config.max_completion_length + (config.prompts_per_step if shared else rows) * prompt
    return min(max(config.max_tokens_per_micro_batch, least_tokens(config, prompt, shared)), of_step)


def unsloth_update_bytes(config: Config, shape: Shape, width: int, four_bit: bool, prompt: int) -> float:
    """As update_bytes, where Unsloth computes the hidden states: rows padded to the longest, flash attention, no mask.

    With gradient_checkpointing the layers' inputs wait in the host's memory, and two of them are on the card.
    """
    tokens = micro_batch_tokens(config, prompt, shared=False)
    h, f, q, kv = shape.hidden, shape.intermediate, shape.query_size, shape.kv_size
    layer = width * tokens * (5 * h + 4 * q + 5 * kv + 4 * f)
    dequantised = h * f * width if four_bit else 0  # the largest matrix
    head = hidden_and_head_bytes(shape, tokens, width)
    if config.gradient_checkpointing:
        return 2 * tokens * h * width + max(layer + dequantised, head)
    return shape.layers * layer + max(dequantised, head)


def hidden_and_head_bytes(shape: Shape, tokens: int, width: int) -> float:
    """The last hidden states with their gradient, and the head on a chunk of them (rl/model/logprobs.py)."""
    return 5 * 4 * min(LOGITS_AT_A_TIME, tokens * shape.vocabulary) + 3 * tokens * shape.hidden * width


def update_bytes(config: Config, shape: Shape, cuda: bool, width: int, four_bit: bool, prompt: int) -> float:
    """What the fullest micro-batch takes, forward and backward, beside weights, gradients and optimizer (rl/update.py)."""
    length = prompt + config.max_completion_length
    tokens = micro_batch_tokens(config, prompt, shape.own_decoder)
    # Each completion has its prompt's keys and values beside its own.
    keys = min(2 * tokens, config.prompts_per_step * config.num_generations * length)

    h, f, q, kv, rank = shape.hidden, shape.intermediate, shape.query_size, shape.kv_size, config.lora_r
    normed = 2 * h + (q + kv if shape.qk_norm else 0)  # what norms read: kept in fp32 where no kernel does it in one
    norm_width = width if cuda else 4
    # Kept for the backward of a layer, each token: what the norms read and give; gate, its activation, up and their
    # product; query, key and value as they are packed, query in rows, attended in rows and packed; x A of each LoRA.
    kept = tokens * (norm_width * normed + width * (2 * h + 4 * f + 4 * q + 2 * kv + 7 * rank) + 4 * shape.heads)
    kept += keys * 2 * kv * width
    kept += rank * width * sum(o if width == 4 else i + o for i, o in shape.maps())  # scaled B, and A where it is cast
    working = tokens * width * (3 * f + 3 * h)  # gradients of a layer
    mask = tokens * (shape.heads // shape.kv_heads) * length * width
    if config.gradient_checkpointing:
        layers = shape.layers * tokens * h * width  # their inputs
        layer = kept + working
    else:
        layers, layer = shape.layers * kept, working
    if four_bit:
        layer += h * f * width  # the largest matrix, dequantised
    return layers + mask + max(layer, hidden_and_head_bytes(shape, tokens, width))


# --- the dry run


def dry_run(config: Config, prompt_length: int | None = None, prompts: Iterable[str] = ()) -> str:
    """The text of --dry-run: parameters, memory by part, whether it fits, and else what to change.

    prompt_length: of the longest prompt in tokens, where it is known; else it is estimated from the texts in `prompts`, and
    without these assumed. Raises ConfigError for a model whose dimensions cannot be found.
    """
    shape, machine = find_shape(config.model), find_machine(config)
    longest, how = prompt_length, "the longest"
    if longest is None:
        characters = max(map(len, prompts), default=0)
        longest, how = ASSUMED_PROMPT, "assumed, since the questions are not known"
        if characters:
            characters += len(config.system_prompt or "")
            longest = -(-characters // CHARACTERS_A_TOKEN) + TEMPLATE_TOKENS
            how = f"the longest, estimated from its {characters:,} characters"
    found = predict(config, shape, machine.device, machine.dtype, longest, machine.free())
    trained = shape.lora_parameters(config.lora_r)
    four_bit = config.load_in_4bit or shape.four_bit
    rows = str(found.rows) if found.rows == found.rows_wanted else f"{found.rows} (wanted: {found.rows_wanted})"
    lines = [
        "Dry run: arithmetic, nothing was loaded.",
        f"  model      {config.model}, {shape.parameters():,} parameters; {trained:,} more are trained (LoRA)",
        f"  prompts    {longest} tokens ({how}); completions up to {config.max_completion_length}",
        f"  runs on    {machine.name}, in {machine.dtype}{' and 4-bit NF4' if four_bit else ''}{', by Unsloth' if found.by_unsloth else ''}",
        "",
        f"  weights    {size(found.weights)}",
        f"  LoRA       {size(found.lora)}   with its gradients",
        f"  optimizer  {size(found.optimizer)}   {config.optim}",
        f"  critic     {size(found.critic)}   with gradients and optimizer" if config.has_critic else "",
        f"  roll-out   {size(found.rollout)}   {rows} rows at a time",
        f"  update     {size(found.update)}   {found.tokens:,} tokens at a time",
        f"  fixed      {size(found.fixed)}",
        f"  loading    {size(found.load)}   instead of all of these" if found.load else "",
    ]
    text = "\n".join(line for i, line in enumerate(lines) if line or i == 4)  # the one between the two tables
    needed = machine.needed(found.peak)
    beside = "the CUDA context and 8 % for fragmentation" if machine.device == "cuda" else "the imports"
    counts = (
        "small models keep what they free: roll-out and update add" if found.kept else "roll-out and update do not add"
    )
    text += f"\n  peak       {size(found.peak)}   {counts}"
    text += f"\n  needed     {size(needed)}   with {beside}\n"
    if needed <= machine.memory:
        text += time_line(config, shape, machine, longest, found)
    text += "\n"
    if not shape.own_decoder:
        text += "This architecture runs through its own forward, for which these are rough figures.\n"
    if needed <= machine.memory:
        return text + f"It fits: {needed / GB:.1f} of {machine.memory / GB:.1f} GB."
    text += f"It does not fit: {needed / GB:.1f} GB are needed, and there are {machine.memory / GB:.1f}.\n"
    advice = advise(config, shape, machine, longest)
    if advice is None:
        return text + "Nothing that could be changed makes it fit, not even the smallest model known here."
    changes, needed = advice
    return text + f"With these settings it does, in {needed / GB:.1f} GB:\n\n    {flags(changes)}"


def size(of: float) -> str:
    return f"{of / GB:6.2f} GB" if of >= GB else f"{of / MB:6.0f} MB"


def flags(changes: dict) -> str:
    """Settings as they are written on the command line."""
    names = {name: "--" + name.replace("_", "-") for name in changes}
    return " ".join(names[name] if value is True else f"{names[name]} {value}" for name, value in changes.items())


def advise(config: Config, shape: Shape, machine: Machine, prompt: int) -> tuple[dict, float] | None:
    """The fewest settings to change so that the run fits, and the bytes needed then; None where nothing helps.

    What costs least is tried first: time and precision, then shorter completions, then smaller models.
    """
    length = config.max_completion_length
    shortest = max(min(LEAST_COMPLETION, length), config.soft_punish_cache + 1)
    while length >= shortest:
        shorter = {} if length == config.max_completion_length else {"max_completion_length": length}
        if found := fitting(dataclasses.replace(config, **shorter), shape, machine, prompt):
            return found[0] | shorter, found[1]
        length //= 2
    of_owner = [name for name in KNOWN if name.partition("/")[0] == config.model.partition("/")[0]]
    for names in (of_owner, [name for name in KNOWN if name.startswith("Qwen/")]):
        for name in sorted(names, key=lambda name: -KNOWN[name].parameters()):
            smaller = KNOWN[name].parameters() < shape.parameters()
            if smaller and (found := fitting(config, KNOWN[name], machine, prompt)):
                return {"model": name} | found[0], found[1]
    return None


def fitting(config: Config, shape: Shape, machine: Machine, prompt: int) -> tuple[dict, float] | None:
    """The smallest set of the milder changes with which it fits, and the bytes needed then; None where none does."""
    options = mild_changes(config, shape, machine, prompt)
    for count in range(len(options) + 1):
        for names in itertools.combinations(options, count):
            for values in itertools.product(*(options[name] for name in names)):
                changes = dict(zip(names, values))
                changed = dataclasses.replace(config, **changes)
                found = predict(changed, shape, machine.device, machine.dtype, prompt, machine.free())
                if machine.needed(found.peak) <= machine.memory:
                    return changes, machine.needed(found.peak)
    return None


def mild_changes(config: Config, shape: Shape, machine: Machine, prompt: int) -> dict[str, list]:
    """Values to try of settings whose price is time or precision, the mildest first."""
    options = {}
    if not (config.load_in_4bit or shape.four_bit):
        options["load_in_4bit"] = [True]
    if not config.gradient_checkpointing:
        options["gradient_checkpointing"] = [True]
    shared = shape.own_decoder and not by_unsloth(config, shape, machine.device, machine.dtype)
    least = least_tokens(config, prompt, shared)  # less than one item helps nothing
    options["max_tokens_per_micro_batch"] = list(halved(config.max_tokens_per_micro_batch, least))
    options["rollout_batch_size"] = list(halved(config.rollout_batch_size, config.num_generations))
    if machine.device == "cuda" and config.optim == "adamw_torch":
        options["optim"] = ["adamw_8bit"]
    return {name: values for name, values in options.items() if values}


def halved(value: int, least: int) -> Iterator[int]:
    """Half of it, a quarter, ..., and at last the least."""
    while value > least:
        value = max(value // 2, least)
        yield value
