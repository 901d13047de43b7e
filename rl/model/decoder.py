"""The forward pass of Llama, Qwen2 and Qwen3, written out for what their modules cannot do.

Tokens come packed, (N, H), without padding, and the attention is passed in as a function, so that the same layers serve
prefill and decoding over a slot cache (rl/model/engine.py) and the update, where a prompt is computed once for its group
(rl/model/attention.py). For the roll-out `folded` gives a copy with the LoRA folded into scratch weights, and with the matrices
that read the same input fused.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from rl.model.backends import checkpoint

FAMILIES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
CHANGING_ROPE = ("dynamic", "longrope")  # their frequencies depend on the length of the batch
LINEAR_MAPS = ("query_key_value", "output", "gate_up", "down")  # of a Layer

# (layer, q (N, heads, d), k (N, kv heads, d), v the same) -> (N, heads * d)
Attention = Callable[["Layer", torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass
class Layer:
    """One decoder layer: its norms, and its linear maps from (N, in) to (N, out)."""

    index: int
    input_norm: torch.nn.Module
    query_key_value: Callable  # (N, H) -> q (N, heads d), k (N, kv heads d), v the same
    query_norm: torch.nn.Module | None  # over d, as in Qwen3
    key_norm: torch.nn.Module | None
    output: Callable
    scaling: float  # of q . k
    window: int | None  # a token sees so many last ones, itself included; None: all
    post_norm: torch.nn.Module
    gate_up: Callable  # (N, H) -> gate and up, each (N, F)
    activation: Callable
    down: Callable


def unsupported_reason(model) -> str | None:
    """Why this (PEFT) model cannot be run by a Decoder, or None where it can."""
    model = base_of(model)
    if type(model).__name__ not in FAMILIES:
        return f"{type(model).__name__} is not of the Llama, Qwen2 and Qwen3 families"
    rope = model.config.rope_parameters.get("rope_type", "default")
    if rope in CHANGING_ROPE:
        return f"its rotary embedding is of the type {rope}"
    return None


def base_of(model):
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class Decoder:
    """The layers of a model of these families. Reads its weights, and which adapters are on, at every call."""

    def __init__(self, model):
        model = base_of(model)
        config = model.config
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.config, self.embedding, self.norm = config, model.model.embed_tokens, model.model.norm
        self.head = Linears(model.lm_head)
        self.layers = [self._layer(index, layer) for index, layer in enumerate(model.model.layers)]
        self.checkpointing = model.model  # says whether gradient checkpointing is on
        self._cos_sin = None

    def _layer(self, index: int, layer) -> Layer:
        attention, mlp = layer.self_attn, layer.mlp
        return Layer(
            index=index,
            input_norm=layer.input_layernorm,
            query_key_value=Linears(attention.q_proj, attention.k_proj, attention.v_proj),
            query_norm=getattr(attention, "q_norm", None),
            key_norm=getattr(attention, "k_norm", None),
            output=Linears(attention.o_proj),
            scaling=attention.scaling,
            window=getattr(attention, "sliding_window", None),
            post_norm=layer.post_attention_layernorm,
            gate_up=Linears(mlp.gate_proj, mlp.up_proj),
            activation=mlp.act_fn,
            down=Linears(mlp.down_proj),
        )

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.weight.dtype

    def can_fold(self) -> bool:
        """Whether every LoRA is nothing but A and B."""
        return all(is_plain(module) for module in (*self.linear_modules(), *self.head.modules))

    def folded(self) -> "Decoder":
        """A copy whose linear maps are scratch weights, of the computing dtype, with the adapters that are on folded in."""
        scratch = copy.copy(self)
        scratch.layers = []
        for layer in self.layers:
            layer = copy.copy(layer)
            for name in LINEAR_MAPS:
                setattr(layer, name, getattr(layer, name).folded(self.dtype))
            scratch.layers.append(layer)
        scratch.head = self.head.folded(self.dtype)
        return scratch

    def scratch_bytes(self) -> int:
        """What `folded` takes: the linear layers in the computing dtype."""
        return sum(m.in_features * m.out_features for m in self.linear_modules()) * self.dtype.itemsize

    def linear_modules(self) -> list[torch.nn.Module]:
        """Those of all layers, without the head."""
        return [module for layer in self.layers for name in LINEAR_MAPS for module in getattr(layer, name).modules]

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, attend: Attention) -> torch.Tensor:
        """The last hidden states, (N, H), of packed tokens (N,) at these positions of their rows."""
        cos, sin = self.rope(positions)  # (N, 1, d)
        x = self.embedding(ids)  # (N, H)
        recompute = getattr(self.checkpointing, "gradient_checkpointing", False) and torch.is_grad_enabled()
        for layer in self.layers:
            if recompute:
                x = checkpoint(self.run_layer, layer, x, cos, sin, attend, use_reentrant=False)
            else:
                x = self.run_layer(layer, x, cos, sin, attend)
        return norm(self.norm, x)

    def run_layer(self, layer: Layer, x, cos, sin, attend: Attention) -> torch.Tensor:
        projected = layer.query_key_value(norm(layer.input_norm, x))
        query, key, value = (part.unflatten(-1, (-1, self.head_dim)) for part in projected)  # (N, heads, d)
        if layer.query_norm is not None:
            query, key = norm(layer.query_norm, query), norm(layer.key_norm, key)
        attended = attend(layer, rotate(query, cos, sin), rotate(key, cos, sin), value)
        x = x + layer.output(attended)[0]
        gate, up = layer.gate_up(norm(layer.post_norm, x))
        return x + layer.down(layer.activation(gate) * up)[0]

    def rope(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of the rotary embedding at positions (N,), each (N, 1, d), from a table."""
        cos, sin = self._cos_sin
        return cos[positions][:, None], sin[positions][:, None]

    def prepare(self, length: int) -> None:
        """Make the rotary embedding's table for positions below `length`, unless there is one."""
        if self._cos_sin is None or len(self._cos_sin[0]) < length:
            frequencies, scaling = rope_frequencies(self.config, self.embedding.weight.device)  # (d / 2,)
            positions = torch.arange(length, device=frequencies.device).float()
            angles = torch.outer(positions, frequencies).repeat(1, 2)  # (length, d)
            cos, sin = angles.cos() * scaling, angles.sin() * scaling
            sin[:, : self.head_dim // 2] *= -1  # see `rotate`
            self._cos_sin = cos.to(self.dtype), sin.to(self.dtype)


def rope_frequencies(config, device: torch.device) -> tuple[torch.Tensor, float]:
    """Of the rotary embedding (arXiv 2104.09864), fp32 (d / 2,), and what cosines and sines are multiplied with.

    From the settings, not from the model's module: Unsloth puts one there that answers differently.
    """
    rope, size = (
        config.rope_parameters,
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
    )
    kind = rope.get("rope_type", "default")
    if kind != "default":
        return ROPE_INIT_FUNCTIONS[kind](config, device)
    return 1 / rope["rope_theta"] ** (torch.arange(0, size, 2, device=device).float() / size), 1.0


class Linears:
    """Linear modules, with or without a LoRA, that read the same input."""

    def __init__(self, *modules: torch.nn.Module):
        self.modules = modules

    def __call__(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [linear(module, x) for module in self.modules]

    def folded(self, dtype: torch.dtype) -> Callable[[torch.Tensor], tuple[torch.Tensor, ...]]:
        """The same by one matrix, the LoRA folded in: in fp32, and then rounded. Never written back into the model."""
        weights = [folded_weight(module, dtype) for module in self.modules]
        sizes = [len(weight) for weight in weights]
        biases = [plain(module).bias for module in self.modules]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        bias = None if biases[0] is None else torch.cat(biases)
        return lambda x: F.linear(x, weight, bias).split(sizes, -1)


def linear(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What the module gives; a LoRA is added by one kernel, x W^T + (x A^T) (s B)^T, and in the dtype of x."""
    if not hasattr(module, "lora_A") or not is_plain(module):
        return module(x)
    y = module.base_layer(x)
    for a, b, scaling in active_loras(module):
        y = torch.addmm(y, x @ a.to(x.dtype).T, (scaling * b).to(x.dtype).T)
    return y


def is_plain(module: torch.nn.Module) -> bool:
    """Whether it is a linear layer (of numbers, or 4-bit), alone or under LoRAs of nothing but A and B (no DoRA, no bias)."""
    base = plain(module)
    if not isinstance(base, torch.nn.Linear):
        return False
    if not (base.weight.is_floating_point() or hasattr(base.weight, "quant_state")):
        return False
    if not hasattr(module, "lora_A"):
        return True
    simple = not (module.fan_in_fan_out or module.merged_adapters or module.lora_variant)
    return simple and not any(module.lora_bias.values())


def active_loras(module: torch.nn.Module) -> Iterator[tuple[torch.Tensor, torch.Tensor, float]]:
    """A (r, in), B (out, r) and the scaling of every LoRA that is switched on."""
    if not module.disable_adapters:
        for name in module.active_adapters:
            if name in module.lora_A:
                yield module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name]


def plain(module: torch.nn.Module) -> torch.nn.Module:
    """The linear layer itself, without the LoRA around it."""
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def folded_weight(module: torch.nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """The weight (out, in) with the LoRAs that are on folded in. 4-bit weights are dequantised first."""
    weight = plain(module).weight
    if hasattr(weight, "quant_state"):
        import bitsandbytes

        weight = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    if hasattr(module, "lora_A"):
        for a, b, scaling in active_loras(module):
            weight = torch.addmm(weight.float(), b.float(), a.float(), alpha=scaling)
    return weight.detach().to(dtype)


def norm(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """RMSNorm over the last dimension, in fp32."""
    return F.rms_norm(x, (x.shape[-1],), module.weight, module.variance_epsilon)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The rotary embedding of x (N, heads, d): pairs (x[i], x[i + d/2]) turned by their position's angle.

    The first half of sin is negative: it belongs to -x[i + d/2].
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
