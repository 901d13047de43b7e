"""The dimensions of language models, from a config.json or by a known name, and what follows from them. Imports no torch."""

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path

from rl.config import ConfigError


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
    own_decoder: bool = True  # Llama, Qwen2, Qwen3: rl/model/decoder.py knows it
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
KNOWN = {  # by the name on the Hub; any owner and suffix will do
    "Qwen/Qwen2.5-0.5B": _known("qwen2", 151936, 896, 4864, 24, 14, 2, 64, True),
    "Qwen/Qwen2.5-1.5B": _known("qwen2", 151936, 1536, 8960, 28, 12, 2, 128, True),
    "Qwen/Qwen2.5-3B": _known("qwen2", 151936, 2048, 11008, 36, 16, 2, 128, True),
    "Qwen/Qwen2.5-7B": _known("qwen2", 152064, 3584, 18944, 28, 28, 4, 128, False),
    "Qwen/Qwen3-0.6B": _known("qwen3", 151936, 1024, 3072, 28, 16, 8, 128, True),
    "Qwen/Qwen3-1.7B": _known("qwen3", 151936, 2048, 6144, 28, 16, 8, 128, True),
    "Qwen/Qwen3-4B": _known("qwen3", 151936, 2560, 9728, 36, 32, 8, 128, True),
    "Qwen/Qwen3-8B": _known("qwen3", 151936, 4096, 12288, 36, 32, 8, 128, False),
    "meta-llama/Llama-3.2-1B": _known("llama", 128256, 2048, 8192, 16, 32, 8, 64, True),
    "meta-llama/Llama-3.2-3B": _known("llama", 128256, 3072, 8192, 28, 24, 8, 128, True),
    "meta-llama/Llama-3.1-8B": _known("llama", 128256, 4096, 14336, 32, 32, 8, 128, False),
    "HuggingFaceTB/SmolLM2-135M": _known("llama", 49152, 576, 1536, 30, 9, 3, 64, True),
    "HuggingFaceTB/SmolLM2-360M": _known("llama", 49152, 960, 2560, 32, 15, 5, 64, True),
    "HuggingFaceTB/SmolLM2-1.7B": _known("llama", 49152, 2048, 8192, 24, 32, 32, 64, True),
    "TinyLlama/TinyLlama-1.1B": _known("llama", 32000, 2048, 5632, 22, 32, 4, 64, False),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": _known("qwen2", 151936, 1536, 8960, 28, 12, 2, 128, False),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": _known("qwen2", 152064, 3584, 18944, 28, 28, 4, 128, False),
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
        if re.fullmatch(re.escape(known.partition("/")[2].lower()) + r"(-.*)?", name):
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
