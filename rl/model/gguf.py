"""Models in GGUF files (llama.cpp, Ollama): converted once to a model folder in bf16, which lies beside the file."""

import copy
import os
import shutil
import tempfile
from pathlib import Path

import filelock

from grading.base import first_line
from rl.config import Config, ConfigError


def is_gguf(model: str) -> bool:
    return Path(model).suffix.lower() == ".gguf"


def config_source(model: str) -> dict[str, str]:
    """Return the arguments of `from_pretrained` that read the config of a model: a GGUF file, a folder or a Hub name."""
    if is_gguf(model):
        return {"pretrained_model_name_or_path": str(Path(model).parent), "gguf_file": Path(model).name}
    return {"pretrained_model_name_or_path": model}


def model_folder(model: str) -> str:
    """Return the folder of a GGUF file's model, `FILE.gguf.hf`, and convert the file if it is newer. Raises ConfigError."""
    file = Path(model)
    if not file.is_file():
        raise ConfigError(f"model: the file {file} does not exist")
    # Several processes of a run need the folder at the same time.
    lock = Path(tempfile.gettempdir(), f"{file.name}.lock")
    with filelock.FileLock(lock):
        return _converted(file)


def _converted(file: Path) -> str:
    folder = Path(f"{file}.hf")
    if folder.is_dir() and folder.stat().st_mtime >= file.stat().st_mtime:
        return str(folder)
    unfinished = Path(f"{file}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        convert(file, unfinished)
    except Exception as error:  # the reader of any architecture may raise anything
        shutil.rmtree(unfinished, ignore_errors=True)
        raise ConfigError(
            f"model: {file} cannot be converted: {first_line(error).rstrip('.')}. Train the model that the file was made from: its "
            "name on the Hugging Face Hub, or its folder with config.json and safetensors files"
        ) from error
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    os.utime(folder)
    print(f"Converted {file} to {folder} (bf16), which is used from now on.", flush=True)
    return str(folder)


def convert(file: Path, folder: Path) -> None:
    """Write the model of a GGUF file to a folder, with dequantized weights in bf16."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    source = config_source(str(file))
    dequantized = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    config = copy.deepcopy(dequantized.config)
    del config.quantization_config
    model = type(dequantized)(config).to(torch.bfloat16)
    model.load_state_dict(dequantized.state_dict())
    model.save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    # transformers may read the BOS token as the EOS token.
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(config.eos_token_id)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)


def check_folders(config: Config) -> None:
    """Raise ConfigError if `model` is a folder without a model, or if `adapter` is not a folder with a LoRA."""
    folder = Path(config.model)
    if folder.is_dir() and not (folder / "config.json").is_file():
        files = sorted(folder.glob("*.gguf"))
        hint = f": to train its GGUF file, set model to {files[0]}" if files else ", so it is not a model"
        raise ConfigError(f"model: the folder {folder} has no config.json{hint}")
    if config.adapter and not (Path(config.adapter) / "adapter_config.json").is_file():
        raise ConfigError(
            f"adapter: {config.adapter} is not a saved LoRA: it has no adapter_config.json "
            "(use a folder such as runs/NAME/checkpoints/step_000045)"
        )
