"""Where the model runs and which libraries load it: Unsloth on a GPU where it is installed, else transformers and peft.

Unsloth patches transformers when it is imported, so it has to come before it: `import_backend` is called first of all, and
nothing here imports transformers at the top. What it loads is trained through its own patched forward (`unsloth_states`);
the roll-out is that of rl/model/engine.py. Llama, Qwen2 and Qwen3 go through Unsloth, other families through transformers.
"""

import contextlib
import importlib.util
import json
import os
import sys
from pathlib import Path

import torch

# Taken before Unsloth puts one of its own in this place, which is always reentrant: rl/model/logprobs.py and rl/model/decoder.py need this.
from torch.utils.checkpoint import checkpoint as checkpoint

from grading.base import first_line
from rl.config import Config, ConfigError

# Of the families that go through Unsloth, without the head.
LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def choose_device(config: Config) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but torch sees no NVIDIA GPU here: set device to auto or cpu")
    device = "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"
    if device == "cpu" and config.optim != "adamw_torch":
        raise ConfigError(f"optim is {config.optim}, which needs an NVIDIA GPU: set it to adamw_torch")
    return torch.device(device)


def choose_dtype(config: Config, device: torch.device) -> torch.dtype:
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def choose_backend(config: Config) -> str:
    """unsloth or transformers. Raises ConfigError if `backend: unsloth` cannot be used."""
    device = choose_device(config)
    is_installed = importlib.util.find_spec("unsloth") is not None
    is_fp32_on_gpu = device.type == "cuda" and choose_dtype(config, device) == torch.float32
    if config.backend == "auto":
        return "unsloth" if is_installed and device.type == "cuda" and not is_fp32_on_gpu else "transformers"
    if config.backend == "unsloth" and not is_installed:
        raise ConfigError(
            "backend is unsloth, which is not installed: pip install -r requirements.txt, or set backend to transformers"
        )
    if config.backend == "unsloth" and is_fp32_on_gpu:
        raise ConfigError(
            "backend unsloth computes in bfloat16 or float16: set dtype to auto, or backend to transformers"
        )
    return config.backend


def import_backend(config: Config) -> list[str]:
    """Import the backend, before anything imports transformers, and set config.backend to its name. Returns notes.

    Raises ConfigError if `backend: unsloth` cannot be imported.
    """
    is_required = config.backend == "unsloth"
    config.backend = choose_backend(config)
    if config.backend == "transformers" or "unsloth" in sys.modules:
        return []
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")  # it would fetch a file from the Hub to be counted
    # It writes trainers that nothing here uses into a folder of the working directory.
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(Path.home() / ".cache/unsloth_compiled_cache"))
    notes = []
    if "transformers" in sys.modules:
        notes.append(
            "the rewards file imports transformers before Unsloth can patch it: import it within the functions"
        )
    try:
        import unsloth  # noqa: F401
    except Exception as error:  # anything that does not fit on this machine
        if is_required:
            raise ConfigError(
                f"backend: Unsloth cannot be imported, set it to transformers: {first_line(error)}"
            ) from error
        config.backend = "transformers"
        notes.append(f"Unsloth cannot be imported, plain transformers is used: {first_line(error)}")
    return notes


def describe_precision(config: Config) -> str:
    """Device, dtype and backend in words: "cuda in bfloat16 by Unsloth"."""
    device = choose_device(config)
    dtype = str(choose_dtype(config, device)).removeprefix("torch.")
    return f"{device.type} in {dtype}" + (" by Unsloth" if choose_backend(config) == "unsloth" else "")


# --- what is Unsloth's own


def is_for_unsloth(model_config) -> bool:
    """Whether a model (its config) is trained through Unsloth: without a mask its forward knows no sliding window."""
    families = ("llama", "qwen2", "qwen3")
    return model_config.model_type in families and not getattr(model_config, "use_sliding_window", False)


def load_with_unsloth(config: Config, dtype: torch.dtype):
    """The base model as Unsloth loads and patches it: in 4-bit NF4 with double quantisation where asked for.

    Raises ConfigError where weights are missing: they would be random numbers.
    """
    from transformers import AutoConfig
    from unsloth import FastLanguageModel

    # Inputs above max_seq_length are cut with a warning; Policy.encode refuses what is longer than the context before.
    context = AutoConfig.from_pretrained(config.model).max_position_embeddings
    model, _ = FastLanguageModel.from_pretrained(
        model_name=config.model,
        max_seq_length=context,
        dtype=dtype,
        load_in_4bit=config.load_in_4bit,
        use_exact_model_name=True,  # not a ready-made 4-bit copy under another name, in which some layers are left in 16 bits
        use_gradient_checkpointing=checkpointing(config),
        offload_embedding=False,  # the engine reads it where it is
        random_state=config.seed,
    )
    if saved := saved_names(config.model):
        refuse_missing_weights(config.model, {name for name, _ in model.named_parameters()} - saved)
    return model


def saved_names(model: str) -> set[str]:
    """The names of the weights in a model's safetensors files, of a folder or in the Hub's cache; empty without such files."""
    from safetensors import safe_open
    from transformers.utils import cached_file

    def find(name):
        return cached_file(model, name, local_files_only=True, _raise_exceptions_for_missing_entries=False)

    if index := find("model.safetensors.index.json"):
        return set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"])
    if file := find("model.safetensors"):
        with safe_open(file, "pt") as opened:
            return set(opened.keys())
    return set()


def refuse_missing_weights(model: str, names: set[str]) -> None:
    """Raise ConfigError if there are names of weights that the files lack: they would be random numbers."""
    if names:
        raise ConfigError(f"model: the weights of {model} lack {', '.join(sorted(names)[:3])}: the files are not whole")


def add_unsloth_lora(model, config: Config, settings):
    """A new LoRA as get_peft_model of peft makes it from these settings (a LoraConfig), over Unsloth's kernels."""
    from unsloth import FastLanguageModel

    names = ("r", "lora_alpha", "target_modules", "use_rslora", "rank_pattern", "alpha_pattern")
    return FastLanguageModel.get_peft_model(
        model,
        lora_dropout=0.0,
        bias="none",
        use_gradient_checkpointing=checkpointing(config),
        random_state=config.seed,
        **{name: getattr(settings, name) for name in names},
    )


def checkpointing(config: Config) -> str | bool:
    return "unsloth" if config.gradient_checkpointing else False  # "unsloth": what is kept goes to the host's memory


def set_mode(model, training: bool, uses_unsloth: bool) -> None:
    """Training mode, in which layers keep or recompute what the backward needs, or the mode in which a model answers."""
    if uses_unsloth:
        from unsloth import FastLanguageModel

        (FastLanguageModel.for_training if training else FastLanguageModel.for_inference)(model)
    else:
        model.train(training)


def unsloth_states(model, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The last hidden states (B, T, H) of right-padded rows of token ids (B, T), through the forward that Unsloth trains by.

    Without a mask: what stands right of a token is not seen by it, and padding stands right of all. Without labels, or
    there would be no states. Unsloth's forward on a CPU is transformers' own.
    """
    if ids.device.type == "cpu":
        return model.get_base_model().get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    recomputes_in_vain = model.training and not torch.is_grad_enabled()
    with contextlib.ExitStack() as around:
        if recomputes_in_vain:  # its checkpointing would move states to the host for a backward that never comes
            set_mode(model, False, uses_unsloth=True)
            around.callback(set_mode, model, True, uses_unsloth=True)
        around.enter_context(torch.autocast(ids.device.type, dtype))  # as Unsloth's own trainer runs it
        around.enter_context(states_in_place_of_logits())
        return model(input_ids=ids, use_cache=False).logits


@contextlib.contextmanager
def states_in_place_of_logits():
    """Within this context Unsloth's forward does not apply the head, and gives the last hidden states as `logits`."""
    name = "UNSLOTH_RETURN_HIDDEN_STATES"
    before, os.environ[name] = os.environ.get(name, "0"), "1"
    try:
        yield
    finally:
        os.environ[name] = before
