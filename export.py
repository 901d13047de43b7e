"""Merge a trained LoRA into its 16-bit base model, for transformers, vLLM, llama.cpp and Ollama.

python export.py runs/NAME                                        its last checkpoint, into runs/NAME/export/merged
python export.py runs/NAME/checkpoints/step_000045 --gguf q8_0    that checkpoint, and a GGUF file
python export.py runs/NAME --push-to-hub USER/NAME                upload it (to a private repository, unless --public)
python export.py --help                                           every setting
"""

import sys

from data import DataError
from export.command import main
from grading import RewardError
from rl.config import ConfigError, RunError

if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")
    try:
        main(sys.argv[1:])
    except (ConfigError, DataError, RewardError, RunError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
