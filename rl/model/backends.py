"""Device, dtype and backend: Unsloth on a GPU if it is installed, otherwise transformers and peft.

Unsloth patches transformers on import, so it must be imported first: `import_backend` runs before anything else, and
this module does not import transformers at the top. A model loaded by Unsloth is trained through its patched forward
(`unsloth_states`); roll-outs use rl/model/engine.py. Unsloth handles Llama, Qwen2 and Qwen3, transformers the rest.
"""

import contextlib
import functools
import importlib.util
import json
import os
import sys
from pathlib import Path

import torch

# Imported here before Unsloth replaces it with an always reentrant version; logprobs.py and decoder.py need this one.
from torch.utils.checkpoint import checkpoint as checkpoint

from grading.base import first_line
from rl.config import Config, ConfigError
from rl.model.gguf import config_source

# From this hidden size on, bf16 is used on CPUs that are fast in it. Below, conversions cost what the products save.
BF16_HIDDEN = 512
# The linear layers of the families that Unsloth handles, without the head.
LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def choose_device(config: Config) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but torch sees no NVIDIA GPU here: set device to auto or cpu")
    device = "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"
    if device == "cpu" and config.optim != "adamw_torch":
        raise ConfigError(f"optim is {config.optim}, which needs an NVIDIA GPU: set it to adamw_torch")
    if device == "cuda" and "LOCAL_RANK" in os.environ:  # torchrun
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return torch.device(device)


def choose_dtype(config: Config, device: torch.device) -> torch.dtype:
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    if device.type == "cpu":
        return torch.bfloat16 if has_fast_bf16() and hidden_size(config.model) >= BF16_HIDDEN else torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def has_fast_bf16() -> bool:
    """Return whether this CPU multiplies matrices in bf16 by AVX512-BF16 or AMX; other CPUs emulate it."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@functools.cache
def hidden_size(model: str) -> int:
    """Return the hidden size of a model; 0 if its config cannot be read, which is reported when it is loaded."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(**config_source(model)).get_text_config().hidden_size
    except Exception:  # the code of any architecture may raise anything
        return 0


def model_class(model_config):
    """Return the class of transformers that loads a model with this config.

    A multimodal model is loaded as a whole if it has no class of its own for text alone.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForCausalLM if type(model_config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForImageTextToText


def choose_backend(config: Config) -> str:
    """Return "unsloth" or "transformers". Raises ConfigError if `backend: unsloth` cannot be used."""
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
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")  # no download from the Hub for usage statistics
    # Unsloth writes generated trainers, which are not used here; by default into the working directory.
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(Path.home() / ".cache/unsloth_compiled_cache"))
    notes = []
    if "transformers" in sys.modules:
        notes.append(
            "the rewards file imports transformers before Unsloth can patch it: import it inside the reward functions"
        )
    try:
        import unsloth  # noqa: F401
    except Exception as error:  # any incompatibility with this machine
        if is_required:
            raise ConfigError(
                f"backend: Unsloth cannot be imported, set it to transformers: {first_line(error)}"
            ) from error
        config.backend = "transformers"
        notes.append(f"Unsloth cannot be imported, using plain transformers: {first_line(error)}")
    return notes


def describe_precision(config: Config) -> str:
    """Describe device, dtype and backend, as in "cuda in bfloat16 by Unsloth"."""
    device = choose_device(config)
    dtype = str(choose_dtype(config, device)).removeprefix("torch.")
    return f"{device.type} in {dtype}" + (" by Unsloth" if choose_backend(config) == "unsloth" else "")


def make_deterministic(model) -> None:
    """Disable everything that makes two forward passes differ: the probability ratio of the first update must be 1."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):  # applied as a function
                setattr(module, name, 0.0)
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # On CPUs with AVX512-BF16, bitsandbytes repacks the weights permanently in the first forward without
            # gradients (an evaluation), and from then on returns no gradient for its input.
            module.support_avx512bf16_for_cpu = False


# --- Unsloth


def is_for_unsloth(model_config) -> bool:
    """Return whether Unsloth handles a model, given its config. Without a mask, its forward ignores sliding windows."""
    families = ("llama", "qwen2", "qwen3")
    return model_config.model_type in families and not getattr(model_config, "use_sliding_window", False)


def load_with_unsloth(config: Config, dtype: torch.dtype):
    """Load and patch the base model with Unsloth, in 4-bit NF4 with double quantization if `load_in_4bit` is set.

    Raises ConfigError if weights are missing, which would otherwise be initialized randomly.
    """
    from transformers import AutoConfig
    from unsloth import FastLanguageModel

    # Unsloth truncates inputs above max_seq_length with a warning; before that, Policy.encode refuses long prompts.
    context = AutoConfig.from_pretrained(config.model).max_position_embeddings
    model, _ = FastLanguageModel.from_pretrained(
        model_name=config.model,
        max_seq_length=context,
        dtype=dtype,
        load_in_4bit=config.load_in_4bit,
        use_exact_model_name=True,  # not a prequantized copy under another name, which leaves some layers in 16 bits
        use_gradient_checkpointing=checkpointing(config),
        offload_embedding=False,  # the engine reads it on the GPU
        random_state=config.seed,
    )
    if saved := saved_names(config.model):
        refuse_missing_weights(config.model, {name for name, _ in model.named_parameters()} - saved)
    return model


def saved_names(model: str) -> set[str]:
    """Return weight names in a model's safetensors files, in a folder or the Hub cache; empty if there are none."""
    from safetensors import safe_open
    from transformers.utils import cached_file

    def cached(name):
        return cached_file(model, name, local_files_only=True, _raise_exceptions_for_missing_entries=False)

    if index := cached("model.safetensors.index.json"):
        return set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"])
    if file := cached("model.safetensors"):
        with safe_open(file, "pt") as weights:
            return set(weights.keys())
    return set()


def refuse_missing_weights(model: str, names: set[str]) -> None:
    """Raise ConfigError if any weights (given by name) are missing: they would be initialized randomly."""
    if names:
        raise ConfigError(f"model: the weight files of {model} are incomplete: missing {', '.join(sorted(names)[:3])}")


def add_unsloth_lora(model, config: Config, settings):
    """Add a new LoRA with Unsloth's kernels, the same that peft would create from these settings (a LoraConfig)."""
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
    return "unsloth" if config.gradient_checkpointing else False  # "unsloth" offloads the saved inputs to host memory


def set_mode(model, training: bool, uses_unsloth: bool) -> None:
    """Switch a model to training mode, which saves or recomputes activations for the backward, or to inference mode."""
    if uses_unsloth:
        from unsloth import FastLanguageModel

        (FastLanguageModel.for_training if training else FastLanguageModel.for_inference)(model)
    else:
        model.train(training)


def unsloth_states(model, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the last hidden states (B, W, H) of right-padded token ids (B, W), computed by Unsloth's patched forward.

    No mask is passed: attention is causal, and the padding is on the right. No labels are passed: the forward would
    then return no hidden states. On a CPU, Unsloth's forward is the one of transformers.
    """
    if ids.device.type == "cpu":
        return model.get_base_model().get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    checkpoints_needlessly = model.training and not torch.is_grad_enabled()
    with contextlib.ExitStack() as stack:
        if checkpoints_needlessly:  # it would offload states to the host for a backward that never happens
            set_mode(model, False, uses_unsloth=True)
            stack.callback(set_mode, model, True, uses_unsloth=True)
        stack.enter_context(torch.autocast(ids.device.type, dtype))  # as Unsloth's own trainer runs it
        stack.enter_context(hidden_states_as_logits())
        return model(input_ids=ids, use_cache=False).logits


@contextlib.contextmanager
def hidden_states_as_logits():
    """In this context, Unsloth's forward skips the head and returns the last hidden states as `logits`."""
    name = "UNSLOTH_RETURN_HIDDEN_STATES"
    before = os.environ.get(name, "0")
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ[name] = before
