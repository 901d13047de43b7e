"""Where memory runs out, half as much is done at a time and the work is done again; nothing of a step is lost.

`rollout_batch_size` bounds the rows of a roll-out, `max_tokens_per_micro_batch` the tokens of an update. The latter changes
no result beyond rounding; with other rows other completions are drawn, by the same law.
"""

import gc
from collections.abc import Callable
from typing import Literal, TypeVar

import torch

from rl.config import Config, ConfigError

T = TypeVar("T")
HALVED = ("rollout_batch_size", "max_tokens_per_micro_batch")  # settings that are, where memory runs out


def is_out_of_memory(error: Exception) -> bool:
    """Whether the error says that memory has run out, on the GPU or here. torch has no class for the latter."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    signs = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def within_memory(
    work: Callable[[], T],
    config: Config,
    setting: Literal["rollout_batch_size", "max_tokens_per_micro_batch"],
    needed: int,
    least: int,
) -> T:
    """What work() returns. Where memory runs out, the setting is halved for the rest of the run, and work is done again.

    needed: how much of the setting the work can use; least: what it cannot do without. Raises ConfigError where that is too
    much already. work has to begin anew each time: what it had done before is lost.
    """
    while True:
        try:
            return work()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            first_line = str(error).strip().partition("\n")[0][:200]
        # Here the error is gone, and with it the tensors that its frames held.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        present = min(getattr(config, setting), needed)
        if present <= least:
            raise ConfigError(
                f"out of memory with the least that is done at a time ({setting} {present}): lower max_completion_length, which "
                f"is {config.max_completion_length}, set load_in_4bit or gradient_checkpointing to true, or take a smaller "
                f"model; python train.py --dry-run says what fits. ({first_line})"
            )
        setattr(config, setting, max(present // 2, least))
        print(
            f"  memory   ran out: {setting} {present} -> {getattr(config, setting)}, and again ({first_line})",
            flush=True,
        )
