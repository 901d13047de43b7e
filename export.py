"""Merge a trained LoRA into its 16-bit base model, for transformers, vLLM, llama.cpp and Ollama.

python export.py runs/NAME                                        the last checkpoint, into runs/NAME/export/merged
python export.py runs/NAME/checkpoints/step_000045 --gguf q8_0    this checkpoint, with a GGUF file
python export.py runs/NAME --push-to-hub USER/NAME                upload to a private repository (public with --public)
python export.py --help                                           all settings
"""

import sys

from data import DataError
from export.command import main
from grading import RewardError
from rl.config import ConfigError, RunError
from rl.run.process import command_output

if __name__ == "__main__":
    try:
        with command_output():
            main(sys.argv[1:])
    except (ConfigError, DataError, RewardError, RunError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
