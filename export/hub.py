"""The merged model on the Hugging Face Hub: its model card, and the upload."""

import json
from pathlib import Path

import httpx
import huggingface_hub

from export.settings import Source
from grading.base import first_line
from rl.config import ConfigError, RunError

HOW_TO_USE = """

To use it:

    AutoModelForCausalLM.from_pretrained(FOLDER), AutoTokenizer.from_pretrained(FOLDER)      # transformers
    vllm serve FOLDER
    ollama create NAME -f Modelfile      # of a GGUF file, which `python export.py RUN --gguf q8_0` writes
"""


def model_card(source: Source, base: str, accuracy: dict[str, dict] | None = None) -> str:
    """README.md of the merged model. accuracy: `rates` of the held-out questions by model, once they are measured."""
    config = source.config
    base_line = "" if Path(base).is_dir() else f"base_model: {base}\n"  # the Hub accepts only an id
    lines = [f"---\n{base_line}library_name: transformers\npipeline_tag: text-generation\ntags: [ponder]\n---\n"]
    lines.append(f"# {base} with a LoRA merged into it, trained by Ponder\n")
    if source.run:
        state, data = source.state, ", ".join(config.train_data)
        summary = json.loads((source.run / "summary.json").read_text(encoding="utf-8"))
        measured = {"before training": summary["eval"]["before"]}
        measured |= accuracy or {"at the run's last evaluation": state["eval"]}
        lines.append(f"{config.algorithm.upper()}, step {state['step']}, seed {config.seed}, on {data}.")
        lines.append(f"System prompt: {config.system_prompt or 'none'}")
        if config.chat_template_kwargs:
            lines.append(f"Chat template settings (chat_template_kwargs): {json.dumps(config.chat_template_kwargs)}")
        lines.append("\nHeld-out accuracy, greedy:\n")
        lines += [f"* {name}: {rates['accuracy']:.1%} of {rates['n']} questions" for name, rates in measured.items()]
    return "\n".join(lines) + HOW_TO_USE


def check_repository(name: str) -> None:
    """Raise ConfigError if the Hub would not accept this name."""
    try:
        huggingface_hub.utils.validate_repo_id(name)
    except huggingface_hub.errors.HFValidationError as error:
        raise ConfigError(f"push_to_hub: {first_line(error)}") from None


def push(folder: Path, name: str, public: bool, api: huggingface_hub.HfApi | None = None) -> str:
    """Upload a folder as a model repository and return its address.

    Raises:
        RunError: the upload fails, or the repository exists, is public, and `public` is False.
    """
    api = api or huggingface_hub.HfApi()
    try:
        address = api.create_repo(name, private=not public, exist_ok=True)
        if not public and not api.model_info(name).private:
            raise RunError(f"push_to_hub: {name} exists and is public: add --public, or choose another name")
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Merged by Ponder")
    except (OSError, httpx.HTTPError, ValueError) as error:  # no token, no network, no permission
        raise RunError(
            f"push_to_hub: {name} was not uploaded: {first_line(error)} (log in with: hf auth login); the model stays in {folder}"
        ) from error
    return str(address)
