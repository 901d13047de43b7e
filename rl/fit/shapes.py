"""The dimensions of language models, read from a model that transformers builds without weights.

Torch and transformers are imported only when they are needed.
"""

import functools
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from grading.base import first_line
from rl.config import Config, ConfigError
from rl.model.gguf import config_source

# Configs of common models by their name on the Hub, so that nothing has to be downloaded for them.
KNOWN_MODELS = json.loads((Path(__file__).parent / "models.json").read_text(encoding="utf-8"))

FAKE_LENGTH = 128  # tokens of the rows in `saved_activations`
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
    config: object = field(default=None, compare=False, repr=False)  # of transformers

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
    text = config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    sizes = getattr(text, "intermediate_size", None) or 4 * text.hidden_size  # of each layer, or of all
    tokenizer = folder / "tokenizer.json"
    return Shape(
        parameters=parameters,
        linear_parameters=linear_parameters,
        lora_inputs=sum(p.numel() for name, p in lora.items() if "lora_A" in name),
        lora_outputs=sum(p.numel() for name, p in lora.items() if "lora_B" in name),
        vocabulary=text.vocab_size,
        hidden=text.hidden_size,
        intermediate=max(sizes) if isinstance(sizes, (list, tuple)) else sizes,
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        query_size=text.num_attention_heads * head_dim,
        kv_size=kv_heads * head_dim,
        qk_norm=qk_norm,
        uses_decoder=uses_decoder,
        is_4bit=bool(quantization.get("load_in_4bit")),
        file_bytes=sum(file.stat().st_size for file in folder.glob("*.safetensors")) or None,
        tokenizer_bytes=tokenizer.stat().st_size if tokenizer.is_file() else None,
        config=config,
    )


@functools.cache
def saved_activations(shape: Shape, dtype: str, rank: int) -> tuple[float, float] | None:
    """Return the bytes that autograd saves in a model's own forward pass: a constant, and per token.

    They are counted on fake tensors, which have no data. None: the forward pass does not run on them.
    """
    import torch

    from rl.model.backends import model_class
    from rl.model.lora import add_lora

    with torch.device("meta"):
        model = model_class(shape.config).from_config(shape.config, dtype=getattr(torch, dtype)).requires_grad_(False)
        model = add_lora(model, Config(lora_r=rank)).train().get_base_model().get_decoder()
    try:
        one, four = (_count_saved(model, rows) for rows in (1, 4))
    except Exception:  # the code of any architecture may raise anything
        if dtype == "bfloat16":
            return None
        in_bf16 = saved_activations(shape, "bfloat16", rank)  # experts run on fake tensors in bf16 only
        scale = 2 if dtype == "float32" else 1
        return in_bf16 and (scale * in_bf16[0], scale * in_bf16[1])
    per_token = (four - one) / (3 * FAKE_LENGTH)
    return one - FAKE_LENGTH * per_token, per_token


def _count_saved(model, rows: int) -> int:
    """Return the bytes that autograd saves for the backward pass of this many rows, without parameters."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        tensors = {
            name: torch.empty(p.shape, dtype=p.dtype, requires_grad=p.requires_grad)
            for name, p in model.named_parameters()
        } | {name: torch.empty(b.shape, dtype=b.dtype) for name, b in model.named_buffers()}
        known = {tensor.untyped_storage()._cdata for tensor in tensors.values()}
        saved = {}

        def count(tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in known:
                saved[storage._cdata] = storage  # kept, so that no other storage gets its address
            return tensor

        ids = torch.zeros(rows, FAKE_LENGTH, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            torch.func.functional_call(model, tensors, kwargs={"input_ids": ids, "use_cache": False})
        return sum(storage.nbytes() for storage in saved.values())
