"""Merging a LoRA into the 16-bit weights under it, and comparing the logits of the result.

    W' = round(W + s B A)        LoRA, Hu et al., arXiv 2106.09685, section 4.1

The sum is computed in fp32, one matrix at a time, and rounded once; peft's `merge_and_unload` rounds s B A first and then
the sum. Logits are computed in fp32 too, module by module, so an 8B model needs the 16 GB of its weights and little more.
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

# Bounds for the difference of the merged model's logits from those of base and LoRA, as shares of the LoRA's effect on them.
MAX_SHARE = 0.5  # of the largest one, and of the root mean square: beyond it most of the LoRA is lost in rounding
MAX_RMS = 0.05
# The root mean square may be more if it is below this multiple of the rounding errors' share of s B A. In bf16 on the bundled
# model it is 0.2 to 0.3 times that share for trained LoRAs, 0.9 to 1.4 times for random ones, and 0.1 if s is wrong by 10 %.
MAX_PER_ROUNDING = 1.5


@torch.no_grad()
def merge_lora(model) -> tuple[torch.nn.Module, float]:
    """Merge the LoRA of a PeftModel into the base model's weights. Raises RunError if a sum is not finite.

    Returns the base model, and the root mean square of the rounding errors as a share of that of s B A.
    """
    errors = total = 0.0
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A"):
            weight = layer.get_base_layer().weight  # (out, in), or (in, out) in a transposed layer
            delta = layer.get_delta_weight("default").float()
            merged = (weight.float() + delta).to(weight.dtype)
            if not merged.isfinite().all():
                raise RunError(f"{name}: W + s B A is not finite in {weight.dtype}: the LoRA cannot be merged")
            errors += (merged.float() - weight.float() - delta).square().sum().item()
            total += delta.square().sum().item()
            weight.copy_(merged)
    return model.unload(), (errors / total) ** 0.5 if total else 1.0


def saved_dtype(base: str) -> str:
    """The dtype that a base model was saved in. Raises ConfigError if it cannot be read, or is quantized."""
    try:
        saved = transformers.AutoConfig.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise ConfigError(f"base model: {base} cannot be read (--base-model): {first_line(error)}") from error
    if getattr(saved, "quantization_config", None):
        raise ConfigError(f"base model: {base} is quantized: name the original 16-bit model with --base-model")
    return str(saved.get_text_config().dtype).removeprefix("torch.")


@torch.no_grad()
def compute_logits(model: torch.nn.Module, texts: list[list[int]]) -> torch.Tensor:
    """Logits (T, V) at all T tokens of texts of token ids, in fp32: each module's weights are widened while it runs."""
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
    """Figures on three models' logits (T, V). Raises RunError if `rounding` (of merge_lora) does not explain a difference."""
    effect = trained - base
    difference = merged - trained
    largest = difference.abs().max().item()
    largest_effect = effect.abs().max().item()
    rms = (difference.norm() / effect.norm()).item()
    bound = min(MAX_SHARE, max(MAX_RMS, MAX_PER_ROUNDING * rounding))
    if not (largest <= MAX_SHARE * largest_effect and rms <= bound):  # also if one is nan
        raise RunError(
            f"the merged model is not what was trained: its logits differ by up to {largest:.2g} from those of base and LoRA, "
            f"which changes them by up to {largest_effect:.2g} (root mean square: {rms:.1%}, but at most {bound:.1%} is rounding); "
            "if the LoRA is too small for 16 bits, use base and LoRA as they are (PeftModel.from_pretrained)"
        )
    return {"merged": largest, "lora": largest_effect, "relative_rms": rms, "rounding": rounding}


@contextlib.contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Give a folder to write into, which replaces `folder` at the end of the context; on an error `folder` stays as it was."""
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
    except (OSError, SafetensorError) as error:  # safetensors raises its own error if the disk is full
        raise RunError(describe_write_error(folder, error)) from error
    finally:
        repair(folder)


def repair(folder: Path) -> None:
    """Finish or undo a replacement of the folder that was interrupted, and remove what it left."""
    replaced = folder.with_name(f"{folder.name}.replaced")
    if replaced.exists() and not folder.exists():
        replaced.rename(folder)
    for left in (replaced, folder.with_name(f"{folder.name}.unfinished")):
        shutil.rmtree(left, ignore_errors=True)


def unpack_gguf(file: Path, merged: Path, folder: Path) -> None:
    """Write a GGUF file as transformers reads it, in fp16, into a folder with the merged model's tokenizer."""
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float16)
    except (OSError, ValueError, RuntimeError, KeyError, NotImplementedError) as error:
        raise RunError(f"gguf: transformers cannot read {file.name}, so it is not kept: {first_line(error)}") from error
    model.hf_quantizer = None  # its weights are plain numbers now
    del model.config.quantization_config
    model.save_pretrained(folder)
    rest = shutil.ignore_patterns("*.safetensors*", "config.json")  # tokenizer and generation_config.json are copied
    shutil.copytree(merged, folder, ignore=rest, dirs_exist_ok=True)
