"""AdamW with a learning-rate schedule, gradient clipping, fp16 loss scaling, and skipping of non-finite gradients."""

import math
import warnings

import torch
import transformers

from rl.config import Config, ConfigError
from rl.model.oom import is_out_of_memory
from rl.model.policy import Policy


class Optimizer:
    """AdamW over one set of parameters, with a learning-rate schedule, gradient clipping and, in fp16, loss scaling."""

    def __init__(self, parameters: list[torch.nn.Parameter], learning_rate: float, policy: Policy, config: Config):
        self.parameters = parameters
        self.max_grad_norm = config.max_grad_norm
        self.adamw = make_adamw(parameters, learning_rate, config)
        updates = config.max_steps * config.num_iterations * config.num_mini_batches
        self.schedule = transformers.get_scheduler(
            {"constant": "constant_with_warmup"}.get(config.lr_scheduler_type, config.lr_scheduler_type),
            self.adamw,
            math.ceil(config.warmup_ratio * updates),
            updates,
        )
        # Only fp16 gradients underflow without scaling.
        self.scaler = torch.amp.GradScaler(policy.device.type, enabled=policy.dtype == torch.float16)
        self.scaler.scale(torch.zeros(1, device=policy.device))  # under torchrun, a process may have no loss to scale

    @property
    def learning_rate(self) -> float:
        return self.adamw.param_groups[0]["lr"]

    def backward(self, loss: torch.Tensor) -> None:
        self.scaler.scale(loss).backward()

    def step(self) -> float | None:
        """Apply and clear the gradients. Return the unclipped norm: nan if not finite (no update), None if no grads."""
        norm = None
        if any(p.grad is not None for p in self.parameters):
            self.scaler.unscale_(self.adamw)
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm).item()
            if math.isfinite(norm):
                try:
                    self.scaler.step(self.adamw)
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    raise ConfigError(  # no retry: some parameters may have been updated already
                        "out of memory in the optimizer's step: lower lora_r or max_tokens_per_micro_batch, or set "
                        "optim to adamw_8bit"
                    ) from error
            self.scaler.update()
        self.skip_step()
        return norm if norm is None or math.isfinite(norm) else math.nan

    def zero_grad(self) -> None:
        self.adamw.zero_grad(set_to_none=True)

    def skip_step(self) -> None:
        """Clear the gradients and advance the learning-rate schedule."""
        self.zero_grad()
        with warnings.catch_warnings():  # torch warns if the schedule advances without an optimizer step
            warnings.simplefilter("ignore", UserWarning)
            self.schedule.step()

    def state_dict(self) -> dict:
        return {name: getattr(self, name).state_dict() for name in ("adamw", "schedule", "scaler")}

    def load_state_dict(self, state: dict) -> None:
        """Restore a state, but keep the current settings of learning rate and weight decay, which may have changed."""
        group = self.adamw.param_groups[0]
        settings = {name: group[name] for name in ("initial_lr", "weight_decay")}
        self.adamw.load_state_dict(state["adamw"])
        self.schedule.load_state_dict(state["schedule"] | {"base_lrs": self.schedule.base_lrs})
        self.scaler.load_state_dict(state["scaler"])
        if getattr(self.adamw, "is_paged", False):  # load_state_dict has moved the state to unpaged memory
            for p, moments in self.adamw.state.items():
                for name in ("state1", "state2"):
                    paged = self.adamw.get_state_buffer(p, dtype=moments[name].dtype)
                    moments[name] = paged.copy_(moments[name])
        group = self.adamw.param_groups[0]
        group.update(settings, lr=settings["initial_lr"] * self.schedule.lr_lambdas[0](self.schedule.last_epoch))


def make_adamw(parameters: list[torch.nn.Parameter], learning_rate: float, config: Config) -> torch.optim.Optimizer:
    settings = {"lr": learning_rate, "weight_decay": config.weight_decay}
    if config.optim == "adamw_torch":
        return torch.optim.AdamW(parameters, **settings)
    import bitsandbytes

    adamw = bitsandbytes.optim.AdamW8bit if config.optim == "adamw_8bit" else bitsandbytes.optim.PagedAdamW8bit
    return adamw(parameters, **settings)
