"""The critic of PPO: the value of a state, on the same base model as the policy.

With `critic: adapter` it is a LoRA of its own and a linear head on the last hidden state; with `critic: head` only the
head, on the policy's hidden states, from which it sends no gradient back. Actor, critic and reference are one set of
base weights.
"""

import contextlib

import torch

from rl.config import Config
from rl.model.decoder import Decoder
from rl.model.logprobs import completion_states
from rl.model.policy import Policy, lora_settings


class Critic:
    """V(s_t) of every token of a completion. The head is fp32 and begins at zero: every value is 0 before the first update."""

    def __init__(self, policy: Policy, config: Config):
        self.policy = policy
        self.has_adapter = config.critic == "adapter"
        size = policy.model.config.get_text_config().hidden_size
        self.head = torch.nn.Linear(size, 1, device=policy.device, dtype=torch.float32)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)
        self.parameters = list(self.head.parameters())
        if self.has_adapter:
            policy.model.add_adapter("critic", lora_settings(config))
            policy.model.set_adapter("critic")
            self.parameters += [p for name, p in policy.model.named_parameters() if ".critic." in name]
            policy.model.set_adapter("default")
            if policy.decoder:  # the critic's LoRA may be on layers that had none before
                policy.decoder = Decoder(policy.model)

    @contextlib.contextmanager
    def active(self):
        """Within this context the model is the critic's trunk, its LoRA trainable and the policy's not."""
        if not self.has_adapter:
            yield
            return
        self.policy.model.set_adapter("critic")
        try:
            yield
        finally:
            self.policy.model.set_adapter("default")

    def values(self, prompts: list[list[int]], completions: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """The value before each completion token and after the last one, (B, C + 1) fp32, and the tokens' mask (B, C).

        V_t is read from the hidden state from which token t is predicted. To be called within `active`.
        """
        with torch.set_grad_enabled(self.has_adapter and torch.is_grad_enabled()):
            states, mask = completion_states(self.policy, prompts, completions)
        return self.head(states.float()).squeeze(-1), mask
