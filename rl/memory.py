"""How much memory a run will need, by part, worked out from the model's dimensions and the settings before anything is loaded.

    peak = fixed + max(load, weights + LoRA + optimizer + critic + max(roll-out, update))

Roll-out and update do not add: the one is over when the other begins. The sizes are those of what the code makes: the roll-out
of rl/engine.py and rl/sampling.py, and in the update what autograd keeps of rl/decoder.py and rl/logprobs.py for the fullest
micro-batch. On a CPU the prediction is of resident memory above that after the imports, and has been measured
(bench/memory.py, within 15 %). On CUDA it is of what PyTorch has allocated, without the CUDA context; that has not been
measured. Imports no torch.
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rl.config import Config, ConfigError

MB, GB = 2**20, 2**30
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes a parameter: 4 bits, a scale in 8 bits for 64, one in 32 bits for 256 of these
LOGITS_AT_A_TIME = 2**24  # as in rl/logprobs.py, which imports torch
PREFILL_TOKENS = 16384  # as in rl/engine.py
GROWTH = 64  # the same
SHARE_THAT_FITS = 0.8  # of the free memory, as in rl/engine.py
CONTEXT = 0.5 * GB  # of CUDA, outside of what PyTorch counts
FRAGMENTATION = 1.08  # of PyTorch's allocator on CUDA
FIXED_CUDA = 64 * MB  # workspaces of the matrix products
IMPORTS = 0.4 * GB  # resident after the imports, on a CPU
FIXED_CPU = 90 * MB  # what is loaded when first used: questions, graders, kernels, the model's classes
TOKENIZER = 20  # resident bytes for each byte of tokenizer.json
ASSUMED_PROMPT = 256  # tokens, where nothing is known
CHARACTERS_A_TOKEN = 3
TEMPLATE_TOKENS = 32  # what a chat template adds to a question


# --- the model's dimensions


@dataclass(frozen=True)
class Shape:
    """The dimensions of a decoder-only language model, as far as memory depends on them."""

    vocabulary: int  # V
    hidden: int  # H
    intermediate: int  # F, of the feed-forward part
    layers: int  # L
    heads: int
    kv_heads: int
    head_dim: int  # d
    tied: bool  # the head is the embedding
    biases: int = 0  # elements, a layer
    qk_norm: bool = False  # a norm over each head's query and key, as in Qwen3
    four_bit: bool = False  # saved in 4 bits
    own_decoder: bool = True  # Llama, Qwen2, Qwen3: rl/decoder.py knows it
    file_bytes: int | None = None  # of the weights on the disk; None: two a parameter
    tokenizer_bytes: int | None = None  # of tokenizer.json; None: 75 a token, as in Qwen's

    @property
    def query_size(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.kv_heads * self.head_dim

    def maps(self) -> list[tuple[int, int]]:
        """(in, out) of a layer's linear maps: query, key, value, output, gate, up, down."""
        h, f, q, kv = self.hidden, self.intermediate, self.query_size, self.kv_size
        return [(h, q), (h, kv), (h, kv), (q, h), (h, f), (h, f), (f, h)]

    def linear_parameters(self) -> int:
        """Of all layers' linear maps, without biases and without the head."""
        return self.layers * sum(i * o for i, o in self.maps())

    def other_parameters(self) -> int:
        """Embedding, head, norms and biases."""
        norms = 2 * self.hidden + (2 * self.head_dim if self.qk_norm else 0)
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return embeddings + self.layers * (norms + self.biases) + self.hidden

    def parameters(self) -> int:
        return self.linear_parameters() + self.other_parameters()

    def lora_parameters(self, rank: int) -> int:
        """Of a LoRA on every linear map: A (rank, in) and B (out, rank)."""
        return self.layers * rank * sum(i + o for i, o in self.maps())


def _known(family, vocabulary, hidden, intermediate, layers, heads, kv_heads, head_dim, tied) -> Shape:
    shape = Shape(vocabulary, hidden, intermediate, layers, heads, kv_heads, head_dim, tied)
    if family == "qwen2":
        return dataclasses.replace(shape, biases=shape.query_size + 2 * shape.kv_size)
    return dataclasses.replace(shape, qk_norm=family == "qwen3")


# fmt: off
KNOWN = {  # by the name without owner and suffixes, in lower case
    "qwen2.5-0.5b": _known("qwen2", 151936, 896, 4864, 24, 14, 2, 64, True),
    "qwen2.5-1.5b": _known("qwen2", 151936, 1536, 8960, 28, 12, 2, 128, True),
    "qwen2.5-3b": _known("qwen2", 151936, 2048, 11008, 36, 16, 2, 128, True),
    "qwen2.5-7b": _known("qwen2", 152064, 3584, 18944, 28, 28, 4, 128, False),
    "qwen3-0.6b": _known("qwen3", 151936, 1024, 3072, 28, 16, 8, 128, True),
    "qwen3-1.7b": _known("qwen3", 151936, 2048, 6144, 28, 16, 8, 128, True),
    "qwen3-4b": _known("qwen3", 151936, 2560, 9728, 36, 32, 8, 128, True),
    "qwen3-8b": _known("qwen3", 151936, 4096, 12288, 36, 32, 8, 128, False),
    "llama-3.2-1b": _known("llama", 128256, 2048, 8192, 16, 32, 8, 64, True),
    "llama-3.2-3b": _known("llama", 128256, 3072, 8192, 28, 24, 8, 128, True),
    "llama-3.1-8b": _known("llama", 128256, 4096, 14336, 32, 32, 8, 128, False),
    "smollm2-135m": _known("llama", 49152, 576, 1536, 30, 9, 3, 64, True),
    "smollm2-360m": _known("llama", 49152, 960, 2560, 32, 15, 5, 64, True),
    "smollm2-1.7b": _known("llama", 49152, 2048, 8192, 24, 32, 32, 64, True),
    "tinyllama-1.1b": _known("llama", 32000, 2048, 5632, 22, 32, 4, 64, False),
    "deepseek-r1-distill-qwen-1.5b": _known("qwen2", 151936, 1536, 8960, 28, 12, 2, 128, False),
    "deepseek-r1-distill-qwen-7b": _known("qwen2", 152064, 3584, 18944, 28, 28, 4, 128, False),
}
# fmt: on


def find_shape(model: str) -> Shape:
    """The dimensions of a model in a folder, in the Hugging Face cache, or known by its name. Raises ConfigError."""
    folder = Path(model)
    if not folder.is_dir():
        import huggingface_hub

        try:
            cached = huggingface_hub.try_to_load_from_cache(model, "config.json")
        except ValueError:  # not a name the Hub could have
            cached = None
        if not isinstance(cached, str):
            return known_shape(model)
        folder = Path(cached).parent
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"model: the folder {model} has no config.json, so it is not a model") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"model: {folder / 'config.json'} cannot be read: {error}") from None
    shape = shape_of(settings, model)
    weights = [path.stat().st_size for path in folder.glob("*.safetensors")]
    tokenizer = folder / "tokenizer.json"
    return dataclasses.replace(
        shape,
        file_bytes=sum(weights) or None,
        tokenizer_bytes=tokenizer.stat().st_size if tokenizer.is_file() else None,
    )


def known_shape(model: str) -> Shape:
    """The dimensions by the model's name; owner and suffixes such as -Instruct do not matter. Raises ConfigError."""
    name = re.sub(r"^meta-|-(math|coder)(?=-)", "", model.rpartition("/")[2].lower())
    for known, shape in KNOWN.items():
        if re.fullmatch(re.escape(known) + r"(-.*)?", name):
            return dataclasses.replace(shape, four_bit=name.endswith("bnb-4bit"))
    raise ConfigError(
        f"model: the dimensions of {model} are not known: name a folder with its config.json, or one of "
        f"{', '.join(KNOWN)} (any owner and suffix), or measure it with --probe, which downloads it"
    )


def shape_of(settings: dict, model: str) -> Shape:
    """The dimensions that a config.json has. Raises ConfigError where it lacks some."""
    settings = settings.get("text_config") or settings
    try:
        hidden, heads = settings["hidden_size"], settings["num_attention_heads"]
        kv_heads = settings.get("num_key_value_heads") or heads
        shape = Shape(
            vocabulary=settings["vocab_size"],
            hidden=hidden,
            intermediate=settings["intermediate_size"],
            layers=settings["num_hidden_layers"],
            heads=heads,
            kv_heads=kv_heads,
            head_dim=settings.get("head_dim") or hidden // heads,
            tied=settings.get("tie_word_embeddings", False),
            qk_norm=settings.get("model_type") == "qwen3",
            four_bit=bool((settings.get("quantization_config") or {}).get("load_in_4bit")),
            own_decoder=settings.get("model_type") in ("llama", "qwen2", "qwen3"),
        )
    except KeyError as error:
        raise ConfigError(
            f"model: the config.json of {model} has no {error.args[0]}, from which its memory is predicted: "
            "measure it with --probe"
        ) from None
    of_qkv = shape.query_size + 2 * shape.kv_size
    biases = 0
    if settings.get("model_type") == "qwen2":
        biases = of_qkv
    elif settings.get("attention_bias"):
        biases = of_qkv + hidden
    if settings.get("mlp_bias"):
        biases += 2 * shape.intermediate + hidden
    return dataclasses.replace(shape, biases=biases)


# --- the prediction


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
    rows: int  # of the roll-out at a time

    @property
    def peak(self) -> float:
        held = self.weights + self.lora + self.optimizer + self.critic
        return self.fixed + max(self.load, held + max(self.rollout, self.update))

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
    critic = shape.hidden + 1 + (trained if config.critic == "adapter" else 0) if config.has_critic else 0
    part = Prediction(
        weights=weights,
        lora=trained * (12 if config.adapter else 8),  # weights and gradients, and the frozen copy of a given adapter
        optimizer=trained * moments,
        critic=critic * (8 + moments),
        rollout=0,
        update=update_bytes(config, shape, cuda, width, four_bit, prompt_length),
        fixed=FIXED_CUDA,
        load=0,
        rows=0,
    )
    if not cuda:  # its file stays mapped until all of it is read
        part.load = weights + (shape.file_bytes or 2 * shape.parameters())
        size = shape.vocabulary * 75 if shape.tokenizer_bytes is None else shape.tokenizer_bytes
        part.fixed = FIXED_CPU + TOKENIZER * size
    if free is not None:
        free = SHARE_THAT_FITS * (free - part.weights - part.lora - part.optimizer - part.critic - part.fixed)
    asked = [(config.prompts_per_step, config.num_generations), (config.eval_questions, 1)]
    found = [rollout_bytes(config, shape, cuda, width, prompt_length, *questions, free) for questions in asked]
    part.rollout, part.rows = max(found)[0], found[0][1]
    return part


def rollout_bytes(
    config: Config, shape: Shape, cuda: bool, width: int, prompt: int, prompts: int, group: int, free: float | None
) -> tuple[float, int]:
    """What a roll-out of `prompts` questions takes beside the weights, and its rows at a time (rl/engine.py)."""
    length = prompt + config.max_completion_length
    token = 2 * shape.layers * shape.kv_size * width  # its keys and values
    slots = max(min(config.rollout_batch_size, prompts * group), group)
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
    at_once = min(max(1, PREFILL_TOKENS // prompt), slots // group)  # prompts
    prefill = at_once * prompt * forward_bytes(shape, width) + at_once * group * prompt * shape.kv_size * width
    # Attention over one token a row: the CPU's scores of a layer, mask, product and softmax.
    scores = 0 if cuda else 3 * slots * shape.heads * length * width
    decode = slots * forward_bytes(shape, width) + scores + logits
    begun = length if cuda else min(prompt + GROWTH, length)  # on a CPU the cache grows, layer by layer
    begin = slots * begun * token + max(prefill, logits + first)
    end = slots * length * token * (1 if cuda or begun == length else 1 + 1 / shape.layers) + decode
    return scratch + seen + max(begin, end), slots


def forward_bytes(shape: Shape, width: int) -> float:
    """What a layer has at hand for each token without gradients: in its feed-forward part, or in its attention."""
    feed_forward = 4 * shape.intermediate + 2 * shape.hidden
    return width * max(feed_forward, 2 * shape.hidden + 4 * (shape.query_size + 2 * shape.kv_size))


def update_bytes(config: Config, shape: Shape, cuda: bool, width: int, four_bit: bool, prompt: int) -> float:
    """What the fullest micro-batch takes, forward and backward, beside weights, gradients and optimizer (rl/update.py)."""
    completion, rows = config.max_completion_length, config.prompts_per_step * config.num_generations
    length = prompt + completion
    item = length + completion if config.algorithm == "dpo" else length  # a pair stays together
    prompts = config.prompts_per_step if shape.own_decoder else rows  # how often a prompt is computed
    tokens = min(max(config.max_tokens_per_micro_batch, item), rows * completion + prompts * prompt)
    keys = min(2 * tokens, rows * length)  # each completion has its prompt's keys and values beside its own

    h, f, q, kv, rank = shape.hidden, shape.intermediate, shape.query_size, shape.kv_size, config.lora_r
    normed = 2 * h + (q + kv if shape.qk_norm else 0)  # what norms read: kept in fp32 where no kernel does it in one
    norm_width = width if cuda else 4
    # Kept for the backward of a layer, each token: what the norms read and give; gate, its activation, up and their
    # product; query, key and value as they are packed, query in rows, attended in rows and packed; x A of each LoRA.
    kept = tokens * (norm_width * normed + width * (2 * h + 4 * f + 4 * q + 2 * kv + 7 * rank) + 4 * shape.heads)
    kept += keys * 2 * kv * width
    kept += rank * sum((o if width == 4 else i + o) for i, o in shape.maps()) * width  # scaled B, and A where it is cast
    working = tokens * width * (3 * f + 3 * h)  # gradients of a layer
    mask = tokens * (shape.heads // shape.kv_heads) * length * width
    if config.gradient_checkpointing:
        layers = shape.layers * tokens * h * width  # their inputs
        layer = kept + working
    else:
        layers, layer = shape.layers * kept, working
    if four_bit:
        layer += h * f * width  # the largest matrix, dequantised
    head = 5 * 4 * min(LOGITS_AT_A_TIME, tokens * shape.vocabulary) + 3 * tokens * h * width
    return layers + mask + max(layer, head)
