"""Saves log-probabilities and gradients of one backend.

Usage: python tests/gpu/backend_side.py BACKEND MODEL FILE [load_in_4bit]
It runs as a separate process, because Unsloth must be imported before transformers and patches it permanently.
"""

import sys

from conftest import fill_lora

from rl.config import Config
from rl.model.backends import import_backend

PROMPTS = [[4, 30, 31, 32], [5, 40], [4, 30, 31, 32]]
COMPLETIONS = [[33, 34, 35, 36] * 8, [41, 42] * 8, [37, 38, 39] * 8]


def main(backend: str, model: str, file: str, *options: str) -> None:
    config = Config(model=model, backend=backend, load_in_4bit="load_in_4bit" in options)
    import_backend(config)
    import torch

    from rl.model.logprobs import completion_logprobs
    from rl.model.policy import load_policy

    policy = load_policy(config)
    fill_lora(policy, 0.02)
    with policy.training():
        logprobs, mask, _ = completion_logprobs(policy, PROMPTS, COMPLETIONS)
        logprobs[mask].mean().backward()
    gradients = {name: p.grad.float().cpu() for name, p in policy.model.named_parameters() if p.grad is not None}
    torch.save({"logprobs": logprobs[mask].detach().cpu(), "gradients": gradients}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
