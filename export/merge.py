"""Merge a LoRA into the 16-bit weights of its base model, and compare the logits of the result.

    W' = round(W + s B A)        LoRA, Hu et al., arXiv 2106.09685, section 4.1

The sum is computed in fp32, one matrix at a time, and rounded once; peft's `merge_and_unload` rounds s B A and then the
sum. Logits are computed in fp32 too, module by module, so an 8B model needs little more than the 16 GB of its weights.
"""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError

from grading.base import first_line
from rl.config import ConfigError, RunError
from rl.run.files import describe_write_error, fsync_path

# Bounds on the logit difference between merged model and base with LoRA, relative to the LoRA's effect on the logits.
MAX_SHARE = 0.5  # for the maximum and the root mean square: above it, most of the LoRA is lost in rounding
MAX_RMS = 0.05  # for the root mean square
# The root mean square may exceed MAX_RMS up to this multiple of the rounding errors' share of s B A. For the bundled
# model in bf16 it is 0.2 to 0.3 times that share for trained LoRAs and 0.9 to 1.4 times for random ones. If s is off by
# 10 %, the root mean square is 0.1.
MAX_PER_ROUNDING = 1.5


@torch.no_grad()
def merge_lora(model) -> tuple[torch.nn.Module, float]:
    """Merge the LoRA of a PeftModel into the weights of the base model. Raises RunError if a sum is not finite.

    Returns:
        The base model, and the ratio of the root mean squares of the rounding errors and of s B A (1 if s B A is 0).
    """
    error_sum = delta_sum = 0.0
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A"):
            weight = layer.get_base_layer().weight  # (out, in), or (in, out) in a transposed layer
            delta = layer.get_delta_weight("default").float()
            merged = (weight.float() + delta).to(weight.dtype)
            if not merged.isfinite().all():
                raise RunError(f"{name}: W + s B A is not finite in {weight.dtype}: the LoRA cannot be merged")
            error_sum += (merged.float() - weight.float() - delta).square().sum().item()
            delta_sum += delta.square().sum().item()
            weight.copy_(merged)
    return model.unload(), (error_sum / delta_sum) ** 0.5 if delta_sum else 1.0


def saved_dtype(base: str) -> str:
    """Return the dtype of a saved base model. Raises ConfigError if it cannot be read or is quantized."""
    try:
        base_config = transformers.AutoConfig.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise ConfigError(f"base model: {base} cannot be read (--base-model): {first_line(error)}") from error
    if getattr(base_config, "quantization_config", None):
        raise ConfigError(f"base model: {base} is quantized: name the original 16-bit model with --base-model")
    return str(base_config.get_text_config().dtype).removeprefix("torch.")


@torch.no_grad()
def compute_logits(model: torch.nn.Module, texts: list[list[int]]) -> torch.Tensor:
    """Compute the fp32 logits (T, V) of all T tokens of some texts, given as token ids.

    The weights of each module are converted to fp32 only while it runs.
    """
    dtype = model.dtype

    def widen(module, _):
        module.float()

    def restore(module, *_):
        module.to(dtype)

    hooks = []
    for module in model.modules():
        if any(parameter.dtype == dtype for parameter in module.parameters(recurse=False)):
            hooks += [module.register_forward_pre_hook(widen), module.register_forward_hook(restore)]
    logits = [model(torch.tensor([text], device=model.device), use_cache=False).logits[0].cpu() for text in texts]
    for hook in hooks:
        hook.remove()
    return torch.cat(logits)


def compare_logits(base, trained, merged, rounding: float) -> dict[str, float]:
    """Compare the logits (T, V) of base, base with LoRA, and merged model. Returns the figures for report.json.

    Raises:
        RunError: If `rounding`, the relative error returned by merge_lora, does not explain the difference.
    """
    effect = trained - base
    difference = merged - trained
    largest = difference.abs().max().item()
    largest_effect = effect.abs().max().item()
    rms = (difference.norm() / effect.norm()).item()
    bound = min(MAX_SHARE, max(MAX_RMS, MAX_PER_ROUNDING * rounding))
    if not (largest <= MAX_SHARE * largest_effect and rms <= bound):  # also true if one is nan
        raise RunError(
            f"the merged model is not the trained model: its logits differ by up to {largest:.2g} from base with LoRA, "
            f"which itself changes them by up to {largest_effect:.2g} (root mean square {rms:.1%}, at most {bound:.1%} "
            "allowed); if the LoRA is too small for 16 bits, use base and LoRA unmerged (PeftModel.from_pretrained)"
        )
    return {"merged": largest, "lora": largest_effect, "relative_rms": rms, "rounding": rounding}


@contextlib.contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces `folder` at the end of the context. On an error, `folder` is unchanged."""
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    try:
        repair(folder)
        unfinished.mkdir(parents=True)
        yield unfinished
        for path in [*unfinished.rglob("*"), unfinished]:
            fsync_path(path)
        if folder.exists():
            folder.rename(folder.with_name(f"{folder.name}.replaced"))
        unfinished.rename(folder)
    except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
        raise RunError(describe_write_error(folder, error)) from error
    finally:
        repair(folder)


def repair(folder: Path) -> None:
    """Finish or undo an interrupted replacement of the folder, and remove its temporary folders."""
    replaced = folder.with_name(f"{folder.name}.replaced")
    if replaced.exists() and not folder.exists():
        replaced.rename(folder)
    for leftover in (replaced, folder.with_name(f"{folder.name}.unfinished")):
        shutil.rmtree(leftover, ignore_errors=True)


def unpack_gguf(file: Path, merged: Path, folder: Path) -> None:
    """Load a GGUF file with transformers and save it in fp16, with the merged model's tokenizer, into a folder."""
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float16)
    except (OSError, ValueError, RuntimeError, KeyError, NotImplementedError) as error:
        raise RunError(f"gguf: transformers cannot read {file.name}, so it is not kept: {first_line(error)}") from error
    model.hf_quantizer = None  # its weights are no longer quantized
    del model.config.quantization_config
    model.save_pretrained(folder)
    skip = shutil.ignore_patterns("*.safetensors*", "config.json")  # copies the tokenizer and generation_config.json
    shutil.copytree(merged, folder, ignore=skip, dirs_exist_ok=True)
