"""Merging a LoRA into the 16-bit weights under it, and the check that the result is what was trained.

    W' = round(W + s B A)        LoRA, Hu et al., arXiv 2106.09685, section 4.1

The sum is made in fp32, a matrix at a time, and rounded once: peft's own `merge_and_unload` rounds s B A first and then the sum.
Logits are compared in fp32 arithmetic, for which a module's 16-bit weights are widened as long as its forward pass takes: of
an 8B model that needs the 16 GB of its weights and one matrix more.
"""

import contextlib
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import huggingface_hub
import peft
import psutil
import safetensors.torch
import torch
import transformers
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError

from rl.config import ConfigError, RunError, first_line
from rl.run.checkpoint import bring_to_disk, cannot_write

ROUNDING = 1.5  # the logits may differ by so many times what rounding explains (check_explained)


# --- the sum


def lora_layers(model: peft.PeftModel) -> dict[str, LoraLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def check_landed(model: peft.PeftModel, folder: Path) -> int:
    """That every matrix saved in an adapter's folder is in the model, and no other; how many there are.

    Raises ConfigError for one that is not, and for kinds of adapters of which W + s B A is not all.
    """
    settings = model.peft_config["default"]
    extra = [
        name
        for name in ("use_dora", "modules_to_save", "lora_bias", "trainable_token_indices", "target_parameters")
        if getattr(settings, name, None)
    ]
    extra += ["bias"] if getattr(settings, "bias", "none") != "none" else []
    if settings.peft_type != peft.PeftType.LORA or extra:
        raise ConfigError(
            f"{folder} is not a plain LoRA ({', '.join(extra) or settings.peft_type}): it cannot be merged"
        )
    try:
        saved = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{folder}/adapter_model.safetensors cannot be read: {error}") from None
    present = peft.get_peft_model_state_dict(model, adapter_name="default")
    for name in sorted(saved.keys() | present.keys()):
        if name not in present:
            raise ConfigError(f"{folder}: its matrix {name} has no place in the base model: it is of another one")
        if name not in saved or not torch.equal(saved[name].float(), present[name].float().cpu()):
            raise ConfigError(f"{folder}: its matrix {name} is {'not the one' if name in saved else 'not'} in the file")
    return len(saved)


def merged_weight(layer: LoraLayer) -> torch.Tensor:
    """W + s B A of a layer in fp32, in the layout of W: (out, in), or (in, out) where the layer is transposed."""
    return layer.get_base_layer().weight.detach().float() + layer.get_delta_weight("default").float()


@torch.no_grad()
def merge(model: peft.PeftModel) -> tuple[torch.nn.Module, int]:
    """The base model with the LoRA in its weights, in place, and how many matrices changed by it.

    Raises RunError where a sum cannot be written in the weights' dtype, or where rounding takes all of the LoRA away.
    """
    layers, changed = lora_layers(model), 0
    embeddings = model.get_input_embeddings()
    for name, layer in layers.items():
        weight = layer.get_base_layer().weight
        if weight is getattr(embeddings, "weight", None):
            raise RunError(f"{name}: its weights are those of the input embeddings too, which the LoRA is not for")
        rounded = merged_weight(layer).to(weight.dtype)
        if not rounded.isfinite().all():
            raise RunError(f"{name}: W + s B A is not finite in {short_dtype(weight.dtype)}: the LoRA cannot be merged")
        changed += not torch.equal(rounded, weight)
        weight.data.copy_(rounded)
    if not changed:
        raise RunError(f"the LoRA changes none of the {len(layers)} matrices: it is empty, or too small for 16 bits")
    return model.unload(), changed


def mirrored_weight(layer: LoraLayer) -> torch.Tensor:
    """The merged weight in fp32, with its rounding error reversed: W + s B A - E where merging gives W + s B A + E."""
    exact = merged_weight(layer)
    return 2 * exact - exact.to(layer.get_base_layer().weight.dtype).float()


def short_dtype(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}.get(dtype, str(dtype))


# --- the logits


@contextlib.contextmanager
def in_fp32(model: torch.nn.Module, weight_of: Callable[[LoraLayer], torch.Tensor] | None = None) -> Iterator[None]:
    """Within this context every module computes in fp32, with its weights widened while its forward pass lasts.

    weight_of: gives the weight to compute with in place of a LoRA layer's base weight.
    """
    instead = {} if weight_of is None else {layer.get_base_layer(): layer for layer in lora_layers(model).values()}
    narrow: dict[torch.nn.Module, dict[torch.nn.Parameter, torch.Tensor]] = {}

    def widen(module, _):
        weight = weight_of(instead[module]) if module in instead else None
        narrow[module] = {p: p.data for p in module.parameters(recurse=False)}
        for p in narrow[module]:
            p.data = weight if weight is not None and p is module.weight else p.data.float()

    def restore(module, *_):
        for p, data in narrow.pop(module, {}).items():
            p.data = data

    owners = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None]
    hooks = [module.register_forward_pre_hook(widen) for module in owners]
    hooks += [module.register_forward_hook(restore) for module in owners]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module in list(narrow):
            restore(module)


@torch.no_grad()
def logits_of(
    model: torch.nn.Module, texts: list[list[int]], weight_of: Callable[[LoraLayer], torch.Tensor] | None = None
) -> torch.Tensor:
    """Logits (P, V) in fp32 at each of the P places of some texts of token ids, which are computed as one batch."""
    ids = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.long)  # (B, T), padded on the right
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, : len(text)], mask[row, : len(text)] = torch.tensor(text), 1
    model.eval()
    with in_fp32(model, weight_of):
        logits = model(ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False).logits  # (B, T, V)
    return logits[mask.bool().to(logits.device)].float().cpu()


@dataclass
class Difference:
    """Between two sets of logits of the same places."""

    largest: float
    rms: float  # root of the mean square, over places and vocabulary
    same_top: float  # share of the places with the same most likely token

    @classmethod
    def between(cls, a: torch.Tensor, b: torch.Tensor) -> "Difference":
        """a, b: (P, V)"""
        gap = (a - b).abs()
        same = (a.argmax(-1) == b.argmax(-1)).float().mean().item()
        return cls(gap.max().item(), gap.square().mean().sqrt().item(), same)


@dataclass
class Expected:
    """What the merged model is held to: logits of base + LoRA, and by how much others may differ from them."""

    logits: torch.Tensor  # (P, V) of the 16-bit base with the LoRA beside it
    rounding: Difference  # with the rounding errors reversed
    lora: Difference  # without the LoRA

    @classmethod
    def of(cls, model: peft.PeftModel, texts: list[list[int]]) -> "Expected":
        logits = logits_of(model, texts)
        with model.disable_adapter():
            rounding = Difference.between(logits_of(model, texts, mirrored_weight), logits)
            return cls(logits, rounding, Difference.between(logits_of(model, texts), logits))

    def compare(self, logits: torch.Tensor) -> Difference:
        return Difference.between(logits, self.logits)

    def check_explained(self, found: Difference, what: str) -> None:
        """Raise RunError where logits differ by more than the rounding of the weights explains.

        No bound that holds for every model is of use: worst cases multiply through the layers. So it is measured on this
        one. The rounding errors E, which are known, move the logits by J E to first order, and -E moves them by -J E, as
        far. The weights W + s B A - E thus give the size to expect (on the bundled model within 1 %); the factor is for
        the second order. It is the root mean square that is compared, since a largest value has a chance part. A LoRA
        that was left out, or scaled wrongly, shows as far as its effect exceeds that of rounding. The last term is the
        arithmetic of fp32 in another order.
        """
        arithmetic = 1e-5 * self.logits.square().mean().sqrt().item()
        if not found.rms <= ROUNDING * self.rounding.rms + arithmetic:  # nan is no agreement
            raise RunError(
                f"{what} is not what was trained: its logits differ by {found.largest:.2g} at the most (rms {found.rms:.2g}) from "
                f"those of base and LoRA, where rounding explains {self.rounding.largest:.2g} (rms {self.rounding.rms:.2g}) and the "
                f"whole LoRA is {self.lora.largest:.2g} (rms {self.lora.rms:.2g})"
            )


def lost_by_rounding(expected: Expected) -> bool:
    """Whether 16 bits are too coarse for this LoRA: rounding moves the logits half as much as it does, or more."""
    return not math.isfinite(expected.lora.rms) or expected.rounding.rms > expected.lora.rms / 2


# --- files


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `folder` at the end, once it is on the disk. Where that does not come
    to pass, whatever the reason, `folder` stays as it was and nothing of the new one is left.

    Raises RunError where something cannot be written.
    """
    unfinished, replaced = (folder.with_name(f"{folder.name}.{kind}") for kind in ("unfinished", "replaced"))
    try:
        if replaced.exists() and not folder.exists():  # killed between the two renames
            replaced.rename(folder)
        for left in (unfinished, replaced):
            shutil.rmtree(left, ignore_errors=True)
        unfinished.mkdir(parents=True)
        yield unfinished
        for path in [*unfinished.rglob("*"), unfinished]:
            bring_to_disk(path)
        if folder.exists():
            folder.rename(replaced)
        try:
            unfinished.rename(folder)
        except BaseException:
            if replaced.exists() and not folder.exists():
                replaced.rename(folder)
            raise
        bring_to_disk(folder.parent)
    except (OSError, SafetensorError) as error:  # safetensors has its own for a full disk
        raise RunError(cannot_write(folder, error)) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        if folder.exists():
            shutil.rmtree(replaced, ignore_errors=True)


def copy_sentencepiece(base: str, folder: Path) -> None:
    """tokenizer.model of a base that has one: transformers no longer writes it, and llama.cpp's converter looks for it."""
    file = transformers.utils.cached_file(base, "tokenizer.model", _raise_exceptions_for_missing_entries=False)
    if file:
        shutil.copy(file, folder)


def sixteen_bits(base: str) -> torch.dtype:
    """The 16-bit dtype for a base model: fp16 where it was saved so, else bf16. Raises ConfigError where it was quantised."""
    try:
        saved = transformers.AutoConfig.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise ConfigError(f"base model: {base} cannot be read: {first_line(error)}") from error
    if method := getattr(saved, "quantization_config", None):
        method = method.get("quant_method") if isinstance(method, dict) else method.quant_method
        raise ConfigError(
            f"base model: {base} is itself quantised ({method}), and a LoRA is merged into 16-bit weights only: name the "
            "model that it was made from by --base-model"
        )
    return torch.float16 if saved.get_text_config().dtype == torch.float16 else torch.bfloat16


# --- GGUF, by llama.cpp's tools


def find_tools(quantised: bool, llama_cpp: str | None) -> dict[str, list[str]]:
    """The commands that write a GGUF file: "convert", and where it is to be quantised, "quantize".

    llama_cpp: the only folder to look in, before the PATH. Raises ConfigError where one is missing.
    """
    home = Path.home()
    folders = [Path(llama_cpp)] if llama_cpp else [Path("llama.cpp"), home / "llama.cpp", home / ".unsloth/llama.cpp"]

    def find(*names, get):
        places = [folder / part / name for folder in folders for part in ("", "build/bin") for name in names]
        found = [str(place) for place in places if place.is_file()] + [p for p in map(shutil.which, names) if p]
        if not found:
            where = ", ".join(map(str, folders))
            raise ConfigError(f"gguf: {names[0]} of llama.cpp is neither in {where} nor on the PATH: {get}")
        return [sys.executable, found[0]] if found[0].endswith(".py") else [found[0]]

    get = "git clone llama.cpp into one of these and pip install -r llama.cpp/requirements.txt, or leave --gguf out"
    tools = {"convert": find("convert_hf_to_gguf.py", "convert-hf-to-gguf", get=get)}
    if quantised:
        tools["quantize"] = find("llama-quantize", "llama-quantize.exe", get="build llama.cpp, or choose q8_0")
    return tools


def convert(tools: dict[str, list[str]], kind: str, merged: Path, file: Path) -> None:
    """Write a GGUF file of this type from the merged model's folder. Raises RunError with the last line of a tool that fails."""

    def run(name, *arguments, writes):
        command = [*tools[name], *map(str, arguments)]
        try:
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
            )
            output, status = done.stdout, done.returncode
        except OSError as error:
            output, status = str(error), 1
        if status or not writes.is_file():
            last = [line.strip() for line in output.splitlines() if line.strip()][-1:] or [f"exit status {status}"]
            raise RunError(f"gguf: {Path(tools[name][-1]).name} failed: {last[0]}; the merged model is in {merged}")

    first = file if "quantize" not in tools else file.with_name("wide.gguf")
    run("convert", merged, "--outfile", first, "--outtype", kind if first == file else "bf16", writes=first)
    if first != file:
        run("quantize", first, file, kind.upper(), writes=file)
        first.unlink()


def modelfile(name: str, temperature: float, system_prompt: str | None, template_settings: dict) -> str:
    """What `ollama create` reads, beside the GGUF file of this name. template_settings: chat_template_kwargs."""
    system = f'SYSTEM """{system_prompt}"""\n' if system_prompt else ""
    if template_settings:
        system = (
            f"# It was trained with these settings of the chat template: {json.dumps(template_settings)}\n" + system
        )
    return f"""\
# Ollama takes, of the chat templates it knows, the one that is like that in the file. Where there is none, and
# `ollama show --template` says {{{{ .Prompt }}}} alone, write it here as TEMPLATE, in Ollama's form.
FROM ./{name}
PARAMETER temperature {temperature:g}
{system}"""


def reads_gguf() -> bool:
    """Whether the package gguf is here, by which transformers reads such files."""
    return transformers.utils.is_gguf_available()


def unpack(file: Path, merged: Path, folder: str) -> None:
    """Write the weights of a GGUF file, as transformers reads it, into a folder with the tokenizer of the merged model: in
    fp32, in which they are exactly what the file says, where memory has room for that.
    """
    parameters = sum(f.stat().st_size for f in merged.glob("*.safetensors")) / 2
    dtype = torch.float32 if psutil.virtual_memory().available > 6 * parameters else torch.float16
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype)
    except (OSError, ValueError, RuntimeError, KeyError, NotImplementedError) as error:
        raise RunError(
            f"gguf: transformers cannot read {file.name} back, so it is not kept: {first_line(error)}"
        ) from error
    model.hf_quantizer = None  # its weights are plain numbers by now
    del model.config.quantization_config
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        if (merged / name).exists():
            shutil.copy(merged / name, folder)


# --- the Hub


def check_repository(name: str) -> None:
    try:
        huggingface_hub.utils.validate_repo_id(name)
    except huggingface_hub.errors.HFValidationError as error:
        raise ConfigError(f"push_to_hub: {first_line(error)}") from None


def push(folder: Path, name: str, public: bool, api=None) -> str:
    """Upload a folder as a model repository; returns its address. api: stands in for the Hub's in tests.

    Raises RunError where it cannot be, and where a repository that is there is public and this was not asked for.
    """
    api = api or huggingface_hub.HfApi()
    try:
        address = api.create_repo(name, private=not public, exist_ok=True)
        if not public and not api.model_info(name).private:
            raise RunError(
                f"push_to_hub: everybody can read {name}, which is there already: add --public, or another name"
            )
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Merged by Ponder")
    except (OSError, httpx.HTTPError, ValueError) as error:  # no token, no network, no right to it
        raise RunError(
            f"push_to_hub: {name} was not uploaded: {first_line(error)} (log in by: hf auth login); the model stays in {folder}"
        ) from error
    return str(address)
