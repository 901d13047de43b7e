"""Out of memory: halve the batch setting and repeat the work, so that nothing of a step is lost.

`rollout_batch_size` bounds the rows of a roll-out, `max_tokens_per_micro_batch` the tokens of a forward and backward pass.
The latter changes no result beyond rounding; with other rows other completions are drawn, from the same distribution.
"""

import gc
from collections.abc import Callable
from typing import Literal, TypeVar

import torch

from rl.config import Config, ConfigError, first_line

T = TypeVar("T")
AUTO_SHRUNK = ("rollout_batch_size", "max_tokens_per_micro_batch")  # settings that are halved when memory runs out


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out, on the GPU or on the host. torch has no exception class for the latter."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    signs = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def retry_on_oom(
    fn: Callable[[], T],
    config: Config,
    setting: Literal["rollout_batch_size", "max_tokens_per_micro_batch"],
    requested: int,
    minimum: int,
) -> T:
    """Return fn(). If memory runs out, halve the setting for the rest of the run and call fn again.

    Args:
        fn: has to start from the beginning at each call.
        requested: how much of the setting this work can use.
        minimum: how much of it the work needs at least.

    Raises:
        ConfigError: memory runs out at the minimum.
    """
    while True:
        try:
            return fn()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            reason = first_line(error)[:200]
        # The exception is gone here, and with it the tensors that its frames held.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        present = min(getattr(config, setting), requested)
        if present <= minimum:
            raise ConfigError(
                f"out of memory at the smallest possible batch ({setting} {present}): lower max_completion_length (now "
                f"{config.max_completion_length}), set load_in_4bit or gradient_checkpointing to true, or take a smaller "
                f"model; python train.py --dry-run says what fits. ({reason})"
            )
        setattr(config, setting, max(present // 2, minimum))
        print(
            f"  memory   out of memory: {setting} {present} -> {getattr(config, setting)}, retrying ({reason})",
            flush=True,
        )
