"""The model: the policy with its LoRA, its forward pass, the roll-out engine, episodes of environments, and log-probabilities."""

import logging

# bitsandbytes, imported by peft, logs an error on some CPUs about an optional kernel that is not needed here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
