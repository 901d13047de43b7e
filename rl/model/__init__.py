"""The model: the policy with its LoRA, its forward pass, roll-outs here or on a server, episodes of environments,
log-probabilities, and the exchange between several processes.
"""

import logging

# bitsandbytes, imported by peft, logs an error on some CPUs about an optional kernel that is not needed here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
