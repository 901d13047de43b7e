"""The LoRA of a model: a new one, or one loaded from a folder."""

import contextlib
import re
from pathlib import Path

import peft
import safetensors.torch
from safetensors import SafetensorError

from grading.base import first_line
from rl.config import Config, ConfigError
from rl.model.backends import add_unsloth_lora

# Settings of a saved LoRA that go beyond the matrices A and B on linear layers.
LORA_EXTRAS = ("use_dora", "bias", "lora_bias", "modules_to_save", "layers_to_transform", "target_parameters")

# Modules without a LoRA: encoders of images and sound, which text never reaches; matrices of Mamba layers whose weights
# are read directly, so that a LoRA would be ignored; routers of experts, some of which return more than a product.
WITHOUT_LORA = (
    r"(.*\.)?(vision|visual|audio|multi_modal|embed_vision|embed_audio|connector)[^.]*(\..*)?"
    r"|.*(mamba|mixer)\.(out_proj|dt_proj)|.*\.router"
)


def add_lora(model, config: Config) -> peft.PeftModel:
    """Add a new LoRA. Raises ConfigError if peft does not support the layers of the model."""
    try:
        return peft.get_peft_model(model, lora_settings(config, model))
    except Exception as error:  # whatever the layers of an architecture raise
        raise ConfigError(
            f"model: {config.model} ({model.config.model_type}) cannot be trained, because peft cannot add a LoRA to all "
            f"of its linear layers: choose a model of another family ({first_line(error)})"
        ) from error


def lora_settings(config: Config, model, layers: str | list[str] = "all-linear") -> peft.LoraConfig:
    """Return the settings of a new LoRA on these layers of a model, except WITHOUT_LORA."""
    settings = {"r": config.lora_r, "lora_alpha": config.lora_alpha, "target_modules": layers, "task_type": "CAUSAL_LM"}
    if any(re.fullmatch(WITHOUT_LORA, name) for name, _ in model.named_modules()):
        settings["exclude_modules"] = WITHOUT_LORA
    return peft.LoraConfig(**settings)


def load_adapter(model, config: Config) -> peft.PeftModel:
    """Load a saved LoRA, and its frozen copy as the reference. Raises ConfigError if it does not fit the model."""
    folder = Path(config.adapter)
    try:
        if config.backend == "unsloth":
            saved = peft.PeftConfig.from_pretrained(folder)
            if extras := [name for name in LORA_EXTRAS if getattr(saved, name, None) not in (None, False, "none")]:
                raise ValueError(f"not a plain LoRA ({', '.join(extras)}), set backend to transformers")
            model = add_unsloth_lora(model, config, saved)
        else:
            model = peft.PeftModel.from_pretrained(model, folder, is_trainable=True)
        model.load_adapter(folder, "reference", is_trainable=False)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"adapter: {folder} does not fit {config.model}: {first_line(error)}") from error
    restore_adapter(model, folder)
    model.set_adapter("default")
    return model


def restore_adapter(model: peft.PeftModel, folder: Path) -> None:
    """Load saved weights into the LoRA being trained. Raises ConfigError if they are damaged or have other shapes."""
    try:
        weights = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"adapter: {folder} cannot be read: {first_line(error)}") from error
    expected = peft.get_peft_model_state_dict(model, adapter_name="default")
    if {name: w.shape for name, w in weights.items()} != {name: w.shape for name, w in expected.items()}:
        raise ConfigError(f"adapter: {folder} does not fit {model.config.name_or_path}: its LoRA has different shapes")
    peft.set_peft_model_state_dict(model, weights, adapter_name="default")


def save_adapter(policy, folder: Path) -> None:
    """Save LoRA and tokenizer in the format of peft."""
    policy.model.save_pretrained(folder, selected_adapters=["default"])
    policy.tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def reloaded_adapter(policy, folder: Path):
    """Context manager that activates the LoRA saved in `folder`, read from disk."""
    policy.model.load_adapter(folder, "reloaded", is_trainable=False)
    try:
        with policy.adapter("reloaded"):
            yield
    finally:
        policy.model.delete_adapter("reloaded")
