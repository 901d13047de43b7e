"""The dimensions of language models, taken from a model that transformers builds without weights.

Torch and transformers are imported only when a model is measured.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from grading.base import first_line
from rl.config import ConfigError

# The dimensions of common models by their name on the Hub, so that nothing is downloaded for them.
KNOWN = json.loads((Path(__file__).parent / "models.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Shape:
    """Dimensions of a decoder-only language model, as far as its memory and speed depend on them."""

    parameters: int
    linear_parameters: int  # weights of the linear layers except the head: NF4 quantizes them, LoRA adapts them
    linear_inputs: int  # the input sizes of these layers, summed
    linear_outputs: int  # their output sizes, summed
    vocabulary: int
    hidden: int
    intermediate: int  # of the feed-forward block
    layers: int
    heads: int
    query_size: int
    kv_size: int  # of the keys, and of the values
    qk_norm: bool  # queries and keys are normalized, as in Qwen3
    uses_decoder: bool  # Llama, Qwen2, Qwen3: rl/model/decoder.py supports it
    four_bit: bool  # saved in 4 bits
    file_bytes: int | None = None  # of the safetensors files of a folder
    tokenizer_bytes: int | None = None  # of its tokenizer.json

    def lora_parameters(self, rank: int) -> int:
        """Parameters of a LoRA on every linear layer: A (rank, in) and B (out, rank)."""
        return rank * (self.linear_inputs + self.linear_outputs)


def find_shape(model: str) -> Shape:
    """Return the shape of a model in a folder, in the Hugging Face cache, in models.json, or on the Hub, in this order.

    Only a config.json is downloaded. Raises ConfigError if there is none, or if transformers cannot build the model.
    """
    from transformers import AutoConfig

    folder = Path(model)
    try:
        try:
            config = AutoConfig.from_pretrained(model, local_files_only=True, trust_remote_code=False)
        except OSError:
            if folder.is_dir():
                raise
            known = known_config(model)
            if known:
                config = AutoConfig.for_model(**known)
            else:
                config = AutoConfig.from_pretrained(model, trust_remote_code=False)
        return measure(config, folder)
    except Exception as error:  # the code of any architecture may raise anything
        raise ConfigError(
            f"model: the dimensions of {model} are not known: name a folder with its config.json, or one of "
            f"{', '.join(KNOWN)} (any owner and suffix), or measure it with --probe ({first_line(error)})"
        ) from error


def known_config(model: str) -> dict | None:
    """The config of a model in models.json. Its owner and suffixes such as -Instruct do not matter."""
    name = re.sub(r"^meta-|-(math|coder)(?=-)", "", model.rpartition("/")[2].lower())
    for known, config in KNOWN.items():
        if re.fullmatch(re.escape(known.partition("/")[2].lower()) + r"(-.*)?", name):
            return config | {"quantization_config": {"load_in_4bit": name.endswith("bnb-4bit")}}
    return None


def measure(config, folder: Path) -> Shape:
    """Return the shape of the model with this transformers config, whose files may be in a folder."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    from rl.model.decoder import unsupported_reason

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    linear = [m for m in model.modules() if isinstance(m, (torch.nn.Linear, Conv1D)) and m is not head]
    outputs = sum(layer.nf if isinstance(layer, Conv1D) else layer.out_features for layer in linear)
    quantization = getattr(config, "quantization_config", None) or {}
    config = config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    tokenizer = folder / "tokenizer.json"
    return Shape(
        parameters=model.num_parameters(),
        linear_parameters=sum(layer.weight.numel() for layer in linear),
        linear_inputs=sum(sum(layer.weight.shape) for layer in linear) - outputs,
        linear_outputs=outputs,
        vocabulary=config.vocab_size,
        hidden=config.hidden_size,
        intermediate=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        query_size=config.num_attention_heads * head_dim,
        kv_size=kv_heads * head_dim,
        qk_norm=any(name.endswith("q_norm") for name, _ in model.named_modules()),
        uses_decoder=unsupported_reason(model) is None,
        four_bit=bool(quantization.get("load_in_4bit")),
        file_bytes=sum(file.stat().st_size for file in folder.glob("*.safetensors")) or None,
        tokenizer_bytes=tokenizer.stat().st_size if tokenizer.is_file() else None,
    )
