"""The command `python export.py`."""

import shutil
from pathlib import Path

import tyro

from export.gguf import find_tools
from export.settings import Settings, find_source, load_held_out
from grading import sandbox
from rl.config import Config, RunError

DESCRIPTION = "Merge a trained LoRA into its 16-bit base model, for transformers, vLLM, llama.cpp and Ollama."


def main(arguments: list[str]) -> None:
    """Run the command. Raises ConfigError, DataError, RewardError or RunError with a one-line message."""
    kind = tyro.conf.PositionalRequiredArgs[Settings]
    settings = tyro.cli(kind, args=arguments, prog="export.py", description=DESCRIPTION)
    source = find_source(Path(settings.path))
    tools = find_tools(settings.gguf, settings.llama_cpp) if settings.gguf else None
    sandbox.start(source.config.code_timeout, source.config.unsafe_run_model_code)  # forks: before torch is imported
    rows, rewards = load_held_out(source, settings.eval_questions)

    from rl.model.policy import check_model  # imports torch; --help and the checks above need none, and are fast

    check_model(Config(model=settings.base_model or source.config.model, device=settings.device))
    from export.pipeline import Export

    export = Export(source, settings)
    try:
        export.merge()
        if tools:
            export.convert(tools)
        if rows:
            export.evaluate(rows, rewards)
        if settings.push_to_hub:
            export.upload()
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        raise RunError("the GPU is out of memory: --device cpu uses the memory of the machine instead") from error
    finally:
        shutil.rmtree(export.unpacked, ignore_errors=True)
