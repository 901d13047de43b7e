"""Merging a LoRA into the 16-bit weights under it, and comparing the logits of the result.

    W' = round(W + s B A)        LoRA, Hu et al., arXiv 2106.09685, section 4.1

The sum is computed in fp32, one matrix at a time, and rounded once; peft's `merge_and_unload` rounds s B A first and then
the sum. Logits are computed in fp32 too, module by module, so an 8B model needs the 16 GB of its weights and little more.
"""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import peft
import psutil
import torch
import transformers
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError

from grading.base import first_line
from rl.config import ConfigError, RunError
from rl.run.files import describe_write_error, fsync_path

# Settings of a saved adapter that make it more than A and B on linear layers.
OTHER_LORAS = ("use_dora", "modules_to_save", "bias", "lora_bias", "trainable_token_indices", "target_parameters")
MAX_DIFFERENCE = 0.5  # of merged and trained logits, as a share of what the LoRA changes them by


# --- the sum


def check_plain_lora(model: peft.PeftModel) -> None:
    """Raise ConfigError if the adapter is more than W + s B A."""
    settings = model.peft_config["default"]
    extra = [name for name in OTHER_LORAS if getattr(settings, name, None) not in (None, False, "none")]
    if settings.peft_type != peft.PeftType.LORA or extra:
        kind = ", ".join(extra) or settings.peft_type
        raise ConfigError(f"adapter: it is not a plain LoRA ({kind}) and cannot be merged")


def lora_layers(model: peft.PeftModel) -> dict[str, LoraLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


@torch.no_grad()
def merge_lora(model: peft.PeftModel) -> torch.nn.Module:
    """Merge the LoRA into the base model's weights in place and return the base model.

    Raises RunError if a sum is not finite in the weights' dtype, or if rounding removes the whole LoRA.
    """
    layers = lora_layers(model)
    embeddings = model.get_input_embeddings().weight
    is_changed = False
    for name, layer in layers.items():
        weight = layer.get_base_layer().weight  # (out, in), or (in, out) in a transposed layer
        if weight is embeddings:
            raise RunError(f"{name} shares its weights with the input embeddings, which the LoRA was not trained on")
        merged = (weight.float() + layer.get_delta_weight("default").float()).to(weight.dtype)
        if not merged.isfinite().all():
            raise RunError(f"{name}: W + s B A is not finite in {weight.dtype}: the LoRA cannot be merged")
        is_changed |= not torch.equal(merged, weight)
        weight.copy_(merged)
    if not is_changed:
        raise RunError(f"the LoRA changes none of the {len(layers)} matrices: it is empty, or too small for 16 bits")
    return model.unload()


def merge_dtype(base: str) -> torch.dtype:
    """The 16-bit dtype to merge in: fp16 if the base model was saved in it, else bf16.

    Raises ConfigError if the base model cannot be read, or is itself quantized.
    """
    try:
        saved = transformers.AutoConfig.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise ConfigError(f"base model: {base} cannot be read: {first_line(error)}") from error
    if quantization := getattr(saved, "quantization_config", None):
        method = quantization["quant_method"] if isinstance(quantization, dict) else quantization.quant_method
        raise ConfigError(
            f"base model: {base} is quantized ({method}), and a LoRA can be merged only into 16-bit weights: name the "
            "original model with --base-model"
        )
    return torch.float16 if saved.get_text_config().dtype == torch.float16 else torch.bfloat16


# --- logits


@torch.no_grad()
def compute_logits(model: torch.nn.Module, texts: list[list[int]]) -> torch.Tensor:
    """Logits (T, V) in fp32 at all T tokens of some texts of token ids, computed as one right-padded batch.

    Every module computes in fp32: its weights are widened for the duration of its forward pass.
    """
    ids = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.long, device=model.device)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.tensor(text)
        mask[row, : len(text)] = 1

    dtype = model.dtype

    def widen(module, _):
        module.float()

    def restore(module, *_):
        module.to(dtype)

    hooks = []
    for module in model.modules():
        if any(parameter.dtype == dtype for parameter in module.parameters(recurse=False)):
            hooks += [module.register_forward_pre_hook(widen), module.register_forward_hook(restore)]
    model.eval()
    logits = model(ids, attention_mask=mask, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return logits[mask.bool()].float().cpu()


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def check_difference(difference: float, lora_effect: float) -> None:
    """Raise RunError if the merged model is too far from the trained one.

    difference is the largest one between their logits, lora_effect the largest one between the logits with and without the
    LoRA.
    """
    if not difference <= MAX_DIFFERENCE * lora_effect:  # also if it is nan
        raise RunError(
            f"the merged model is not what was trained: its logits differ by up to {difference:.2g} from those of base and "
            f"LoRA, and the LoRA changes them by up to {lora_effect:.2g}; if the LoRA is too small for 16 bits, use base and "
            "LoRA as they are (PeftModel.from_pretrained)"
        )


# --- folders of models


@contextlib.contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Give a folder to write into, which replaces `folder` when the context ends and everything is on the disk.

    If that fails for any reason, `folder` stays as it was. Raises RunError if something cannot be written.
    """
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # left by an export that was killed
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        for path in [*unfinished.rglob("*"), unfinished]:
            fsync_path(path)
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    except (OSError, SafetensorError) as error:  # safetensors raises its own error if the disk is full
        raise RunError(describe_write_error(folder, error)) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def copy_sentencepiece(base: str, folder: Path) -> None:
    """Copy the base's tokenizer.model, if any: transformers no longer writes it, and llama.cpp's converter needs it."""
    file = transformers.utils.cached_file(base, "tokenizer.model", _raise_exceptions_for_missing_entries=False)
    if file:
        shutil.copy(file, folder)


def unpack_gguf(file: Path, merged: Path, folder: Path) -> None:
    """Write the weights of a GGUF file, as transformers reads it, into a folder with the merged model's tokenizer.

    They are written in fp32, which holds exactly what the file says, or in fp16 if memory is short. Raises RunError if
    transformers cannot read the file.
    """
    parameters = sum(weights.stat().st_size for weights in merged.glob("*.safetensors")) / 2
    dtype = torch.float32 if psutil.virtual_memory().available > 6 * parameters else torch.float16
    shutil.rmtree(folder, ignore_errors=True)  # left by an export that was killed
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype)
    except (OSError, ValueError, RuntimeError, KeyError, NotImplementedError) as error:
        raise RunError(
            f"gguf: transformers cannot read {file.name} back, so it is not kept: {first_line(error)}"
        ) from error
    model.hf_quantizer = None  # its weights are plain numbers now
    del model.config.quantization_config
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        if (merged / name).exists():
            shutil.copy(merged / name, folder)
