"""The critic of PPO and A2C: a value function that shares the base model with the policy.

`critic: adapter` is a separate LoRA with a linear head on the last hidden state. `critic: head` is the head alone, on
the policy's hidden states, without a gradient to them. Actor, critic and reference share one set of base weights.
"""

import contextlib

import torch

from rl.config import Config, ConfigError
from rl.model.decoder import Decoder
from rl.model.logprobs import completion_states
from rl.model.lora import lora_settings
from rl.model.policy import Policy, hidden_states


class Critic:
    """Predicts V(s_t) for each token of a completion. The fp32 head is initialised to 0, so all values start at 0."""

    def __init__(self, policy: Policy, config: Config):
        if not policy.decoder and hidden_states(policy.model, [1, 2]) is None:
            raise ConfigError(
                f"algorithm: {config.algorithm} needs hidden states, and the forward pass of "
                f"{policy.model.config.model_type} returns none: use an algorithm without a critic, such as grpo"
            )
        self.policy = policy
        self.has_adapter = config.critic == "adapter"
        self.head = torch.nn.Linear(policy.hidden_size, 1, device=policy.device, dtype=torch.float32)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)
        self.parameters = list(self.head.parameters())
        if self.has_adapter:
            policy.model.add_adapter("critic", lora_settings(config, policy.model))
            policy.model.set_adapter("critic")
            self.parameters += [p for name, p in policy.model.named_parameters() if ".critic." in name]
            policy.model.set_adapter("default")
            if policy.decoder:  # the critic's LoRA may cover layers that the policy's does not
                policy.decoder = Decoder(policy.model)

    @contextlib.contextmanager
    def active(self):
        """Activate the critic's LoRA instead of the policy's and make it trainable. Does nothing for `critic: head`."""
        if not self.has_adapter:
            yield
            return
        self.policy.model.set_adapter("critic")
        try:
            yield
        finally:
            self.policy.model.set_adapter("default")

    def values(self, prompts: list[list[int]], completions: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the values before each completion token and after the last one, (B, C + 1) fp32, and the mask, (B, C).

        V_t is computed from the hidden state that predicts token t. Call within `active`.
        """
        with torch.set_grad_enabled(self.has_adapter and torch.is_grad_enabled()):
            states, mask = completion_states(self.policy, prompts, completions)
        return self.head(states.float()).squeeze(-1), mask
