"""The dimensions of language models, read from a model that transformers builds without weights.

Torch and transformers are imported only when they are needed.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from grading.base import first_line
from rl.config import Config, ConfigError
from rl.model.gguf import config_source

# Configs of common models by their name on the Hub, so that nothing has to be downloaded for them.
KNOWN_MODELS = json.loads((Path(__file__).parent / "models.json").read_text(encoding="utf-8"))

OTHER_FORMATS = r"-(gguf|awq|gptq|fp8|mlx|int4|int8)\b"


@dataclass(frozen=True)
class Shape:
    """Dimensions of a decoder-only language model that determine its memory and speed."""

    parameters: int
    linear_parameters: int  # weights of the linear layers except the head, which NF4 quantizes
    lora_inputs: int  # sum of the input sizes of the matrices that the LoRA adapts
    lora_outputs: int  # sum of their output sizes
    vocabulary: int
    hidden: int
    intermediate: int  # size of the feed-forward block
    layers: int
    heads: int
    query_size: int  # heads x head size
    kv_size: int  # key-value heads x head size
    qk_norm: bool  # queries and keys are normalized, as in Qwen3
    uses_decoder: bool  # supported by rl/model/decoder.py
    is_4bit: bool  # saved in 4 bits
    file_bytes: int | None = None  # size of the safetensors files, if the model is a folder
    tokenizer_bytes: int | None = None  # size of tokenizer.json, if the model is a folder

    def lora_parameters(self, rank: int) -> int:
        """Return the number of parameters of a LoRA: A (rank, in) and B (out, rank) for each matrix."""
        return rank * (self.lora_inputs + self.lora_outputs)


def find_shape(model: str) -> Shape:
    """Return the shape of a model: a folder, or found in the Hugging Face cache, models.json or the Hub, in this order.

    At most a config.json is downloaded. Raises ConfigError if there is none, or if transformers cannot build the model.
    """
    from transformers import AutoConfig

    folder = Path(model)
    try:
        try:
            config = AutoConfig.from_pretrained(**config_source(model), local_files_only=True, trust_remote_code=False)
        except OSError:
            if folder.exists():
                raise
            settings = known_config(model)
            if settings:
                config = AutoConfig.for_model(**settings)
            else:
                config = AutoConfig.from_pretrained(model, trust_remote_code=False)
        return shape_from_config(config, folder)
    except Exception as error:  # the code of any architecture may raise anything
        raise ConfigError(
            f"model: the dimensions of {model} are unknown: use a folder with its config.json or one of "
            f"{', '.join(KNOWN_MODELS)} (any owner and suffix), or measure with --probe ({first_line(error)})"
        ) from error


def known_config(model: str) -> dict | None:
    """Return the config of a model from models.json, or None. Owner and suffixes such as -Instruct are ignored.

    Formats that cannot be trained are unknown: they are other files, although their names end like those of variants.
    """
    if re.search(OTHER_FORMATS, model.lower()):
        return None
    name = re.sub(r"^meta-|-(math|coder)(?=-)", "", model.rpartition("/")[2].lower())
    for known_model, config in KNOWN_MODELS.items():
        if re.fullmatch(re.escape(known_model.partition("/")[2].lower()) + r"(-.*)?", name):
            return config | {"quantization_config": {"load_in_4bit": name.endswith("bnb-4bit")}}
    return None


def shape_from_config(config, folder: Path) -> Shape:
    """Return the shape of the model with this transformers config. folder: its files, if they are local."""
    import torch
    from transformers.pytorch_utils import Conv1D

    from rl.model.backends import model_class
    from rl.model.decoder import unsupported_reason
    from rl.model.lora import add_lora

    with torch.device("meta"):
        model = model_class(config).from_config(config)
    head = model.get_output_embeddings()
    linear = [m for m in model.modules() if isinstance(m, (torch.nn.Linear, Conv1D)) and m is not head]
    parameters = model.num_parameters()
    linear_parameters = sum(layer.weight.numel() for layer in linear)
    uses_decoder = unsupported_reason(model) is None
    qk_norm = any(name.endswith("q_norm") for name, _ in model.named_modules())
    with torch.device("meta"):
        lora = dict(add_lora(model, Config(lora_r=1)).named_parameters())  # of rank 1: each A has the size of its input
    quantization = getattr(config, "quantization_config", None) or {}
    config = config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    sizes = getattr(config, "intermediate_size", None) or 4 * config.hidden_size  # of each layer, or of all
    tokenizer = folder / "tokenizer.json"
    return Shape(
        parameters=parameters,
        linear_parameters=linear_parameters,
        lora_inputs=sum(p.numel() for name, p in lora.items() if "lora_A" in name),
        lora_outputs=sum(p.numel() for name, p in lora.items() if "lora_B" in name),
        vocabulary=config.vocab_size,
        hidden=config.hidden_size,
        intermediate=max(sizes) if isinstance(sizes, (list, tuple)) else sizes,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        query_size=config.num_attention_heads * head_dim,
        kv_size=kv_heads * head_dim,
        qk_norm=qk_norm,
        uses_decoder=uses_decoder,
        is_4bit=bool(quantization.get("load_in_4bit")),
        file_bytes=sum(file.stat().st_size for file in folder.glob("*.safetensors")) or None,
        tokenizer_bytes=tokenizer.stat().st_size if tokenizer.is_file() else None,
    )
