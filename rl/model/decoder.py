"""A forward pass for Llama and its close relatives that runs on packed tokens and takes the attention as an argument.

Tokens are packed, (T, H), without padding. Because attention is a function, the same layers serve prefill and decoding
over a slot cache (rl/model/engine.py) and the update, which computes a prompt once for its group
(rl/model/attention.py). For roll-outs, `folded` returns a copy with the LoRA folded into scratch weights and with the
matrices that read the same input fused. Shapes: T packed tokens, F feed-forward size, d head size, r LoRA rank.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers.activations import SiLUActivation
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from rl.model.backends import checkpoint

FAMILIES = tuple(
    f"{name}ForCausalLM" for name in ("Llama", "Qwen2", "Qwen3", "Mistral", "Ministral", "Ministral3", "SeedOss")
)
CHANGING_ROPE = ("dynamic", "longrope")  # unsupported: their frequencies depend on the length of the batch
SILU = (torch.nn.SiLU, SiLUActivation)
LINEAR_MAPS = ("query_key_value", "output", "gate_up", "down")  # fields of Layer

# (layer, query (T, heads, d), key (T, kv heads, d), value (T, kv heads, d)) -> (T, heads * d)
Attention = Callable[["Layer", torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass
class Layer:
    """One decoder layer: its norms, and its linear maps from (T, in) to (T, out)."""

    index: int
    input_norm: torch.nn.Module
    query_key_value: Callable  # (T, H) -> query (T, heads d), key and value (T, kv heads d)
    query_norm: torch.nn.Module | None  # over d, as in Qwen3
    key_norm: torch.nn.Module | None
    output: Callable
    scaling: float  # factor of the dot products of queries and keys
    window: int | None  # number of last tokens that a token attends to, itself included; None: all
    post_norm: torch.nn.Module
    gate_up: Callable  # (T, H) -> gate and up, each (T, F)
    gated: Callable  # activation(gate) * up
    down: Callable


def unsupported_reason(model) -> str | None:
    """Return why a Decoder cannot run this (PEFT) model, or None if it can."""
    model = base_model(model)
    if type(model).__name__ not in FAMILIES:
        return f"{type(model).__name__} is none of {', '.join(FAMILIES)}"
    rope = model.config.rope_parameters.get("rope_type", "default")
    if rope in CHANGING_ROPE:
        return f"its rotary embedding has the unsupported type {rope}"
    return None


def base_model(model):
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class Decoder:
    """The layers of a model of FAMILIES. Every call uses its current weights and its active adapters."""

    def __init__(self, model):
        model = base_model(model)
        config = model.config
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.config = config
        self.embedding = model.model.embed_tokens
        self.norm = model.model.norm
        self.head = Linears(model.lm_head)
        self.layers = [self._layer(index, layer) for index, layer in enumerate(model.model.layers)]
        self.inner_model = model.model  # has the flag `gradient_checkpointing`
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
            window=getattr(attention, "sliding_window", getattr(self.config, "sliding_window", None)),
            post_norm=layer.post_attention_layernorm,
            gate_up=Linears(mlp.gate_proj, mlp.up_proj),
            gated=SwiGLU.apply if isinstance(mlp.act_fn, SILU) else lambda gate, up: mlp.act_fn(gate) * up,
            down=Linears(mlp.down_proj),
        )

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.weight.dtype

    def can_fold(self) -> bool:
        """Return whether all adapters are plain LoRAs."""
        return all(is_plain(module) for module in (*self.linear_modules(), *self.head.modules))

    def folded(self) -> "Decoder":
        """Return a copy whose linear maps use scratch weights in the compute dtype, with active adapters folded in."""
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
        """Return the memory of `folded` in bytes: the linear layers in the compute dtype."""
        return sum(m.in_features * m.out_features for m in self.linear_modules()) * self.dtype.itemsize

    def linear_modules(self) -> list[torch.nn.Module]:
        """Return the linear modules of all layers, without the head."""
        return [module for layer in self.layers for name in LINEAR_MAPS for module in getattr(layer, name).modules]

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, attend: Attention) -> torch.Tensor:
        """Return the last hidden states (T, H) of packed token ids (T,) at these positions (T,) in their rows."""
        cos, sin = self.rope(positions)  # (T, 1, d)
        x = self.embedding(ids)  # (T, H)
        recompute = getattr(self.inner_model, "gradient_checkpointing", False) and torch.is_grad_enabled()
        for layer in self.layers:
            if recompute:
                x = checkpoint(self.run_layer, layer, x, cos, sin, attend, use_reentrant=False)
            else:
                x = self.run_layer(layer, x, cos, sin, attend)
        return norm(self.norm, x)

    def run_layer(self, layer: Layer, x, cos, sin, attend: Attention) -> torch.Tensor:
        projected = layer.query_key_value(norm(layer.input_norm, x))
        query, key, value = (part.unflatten(-1, (-1, self.head_dim)) for part in projected)  # (T, heads, d)
        if layer.query_norm is not None:
            query, key = norm(layer.query_norm, query), norm(layer.key_norm, key)
        attended = attend(layer, rotate(query, cos, sin), rotate(key, cos, sin), value)
        x = x + layer.output(attended)[0]
        gate, up = layer.gate_up(norm(layer.post_norm, x))
        return x + layer.down(layer.gated(gate, up))[0]

    def rope(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Look up cosines and sines of the rotary embedding at positions (T,), each (T, 1, d)."""
        cos, sin = self._cos_sin
        return cos[positions][:, None], sin[positions][:, None]

    def prepare(self, length: int) -> None:
        """Compute the rotary embedding's table for positions below `length`, unless it already covers them."""
        if self._cos_sin is None or len(self._cos_sin[0]) < length:
            frequencies, scaling = rope_frequencies(self.config, self.embedding.weight.device)  # (d / 2,)
            positions = torch.arange(length, device=frequencies.device).float()
            angles = torch.outer(positions, frequencies).repeat(1, 2)  # (length, d)
            cos, sin = angles.cos() * scaling, angles.sin() * scaling
            sin[:, : self.head_dim // 2] *= -1  # for `rotate`
            self._cos_sin = cos.to(self.dtype), sin.to(self.dtype)


def rope_frequencies(config, device: torch.device) -> tuple[torch.Tensor, float]:
    """Return the rotary embedding's frequencies (arXiv 2104.09864), fp32 (d / 2,), and the factor of cosines and sines.

    They are computed from the config: Unsloth replaces the model's rotary module by one that behaves differently.
    """
    rope = config.rope_parameters
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kind = rope.get("rope_type", "default")
    if kind != "default":
        return ROPE_INIT_FUNCTIONS[kind](config, device)
    return 1 / rope["rope_theta"] ** (torch.arange(0, size, 2, device=device).float() / size), 1.0


class Linears:
    """Linear modules that read the same input, with or without a LoRA."""

    def __init__(self, *modules: torch.nn.Module):
        self.modules = modules

    def __call__(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [linear(module, x) for module in self.modules]

    def folded(self, dtype: torch.dtype) -> Callable[[torch.Tensor], tuple[torch.Tensor, ...]]:
        """Return an equivalent function that multiplies by one matrix, into which the LoRAs are folded in fp32.

        The model's own weights are not changed.
        """
        weights = [folded_weight(module, dtype) for module in self.modules]
        sizes = [len(weight) for weight in weights]
        biases = [base_layer(module).bias for module in self.modules]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        bias = None if biases[0] is None else torch.cat(biases)
        return lambda x: F.linear(x, weight, bias).split(sizes, -1)


def linear(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Apply a linear module. A plain LoRA is added by one kernel, x W^T + (x A^T) (s B)^T, in the dtype of x."""
    if not hasattr(module, "lora_A") or not is_plain(module):
        return module(x)
    y = module.base_layer(x)
    for a, b, scaling in active_loras(module):
        y = torch.addmm(y, x @ a.to(x.dtype).T, (scaling * b).to(x.dtype).T)
    return y


def is_plain(module: torch.nn.Module) -> bool:
    """Return whether a module is a linear layer (float or 4-bit), alone or with LoRAs without DoRA and bias."""
    base = base_layer(module)
    if not isinstance(base, torch.nn.Linear):
        return False
    if not (base.weight.is_floating_point() or hasattr(base.weight, "quant_state")):
        return False
    if not hasattr(module, "lora_A"):
        return True
    simple = not (module.fan_in_fan_out or module.merged_adapters or module.lora_variant)
    return simple and not any(module.lora_bias.values())


def active_loras(module: torch.nn.Module) -> Iterator[tuple[torch.Tensor, torch.Tensor, float]]:
    """Yield A (r, in), B (out, r) and the scaling of every active LoRA."""
    if not module.disable_adapters:
        for name in module.active_adapters:
            if name in module.lora_A:
                yield module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name]


def base_layer(module: torch.nn.Module) -> torch.nn.Module:
    """Return the linear layer without the LoRA around it."""
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def folded_weight(module: torch.nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """Return the weight (out, in) with the active LoRAs folded in. 4-bit weights are dequantized first."""
    weight = base_layer(module).weight
    if hasattr(weight, "quant_state"):
        import bitsandbytes

        weight = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    if hasattr(module, "lora_A"):
        for a, b, scaling in active_loras(module):
            weight = torch.addmm(weight.float(), b.float(), a.float(), alpha=scaling)
    return weight.detach().to(dtype)


def norm(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Apply RMSNorm over the last dimension, in fp32."""
    return F.rms_norm(x, (x.shape[-1],), module.weight, module.variance_epsilon)


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up (arXiv 2002.05202). Only the inputs are saved for the backward: autograd would save silu(gate), too."""

    @staticmethod
    def forward(ctx, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradient * up, gate), F.silu(gate).mul_(gradient)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply the rotary embedding to x (T, heads, d): rotate each pair (x[i], x[i + d/2]) by the angle of its position.

    The first half of sin is negative, because it multiplies -x[i + d/2].
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
