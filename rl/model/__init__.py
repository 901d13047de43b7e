"""The model: the policy with its LoRA, its forward pass, its sampling engine, and log-probabilities."""

import logging

# On some CPUs bitsandbytes, which peft imports, reports that an optional kernel is not installed. It is not needed.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
