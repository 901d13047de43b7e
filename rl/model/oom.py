"""Bounded memory: micro-batches under a token budget; out of memory, a setting is halved and the work repeated.

`rollout_batch_size` bounds the rows of a roll-out, `max_tokens_per_micro_batch` the tokens of a forward and backward pass.
The latter changes no result beyond rounding; with other rows other completions are drawn, from the same distribution.
"""

import gc
from collections.abc import Callable, Iterator
from typing import Literal, TypeVar

import torch

from grading.base import first_line
from rl.config import Config, ConfigError

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


def micro_batches(items: list, max_tokens: int, shares_prompts: bool) -> Iterator[list]:
    """Batches of similar length whose padded size stays within max_tokens; at least one item each.

    Args:
        items: episodes (with prompt_ids and completion_ids), or lists of episodes of one prompt that have to stay together.
        shares_prompts: a prompt counts once in a batch, and the completions of one prompt stay side by side as far as
            the budget allows; otherwise each completion has a copy of its prompt.
    """

    def episodes_of(item) -> list:
        return item if isinstance(item, list) else [item]

    def width_of(item) -> int:
        return max(len(episode.completion_ids) for episode in episodes_of(item))

    def prompt_of(item) -> tuple[int, ...]:
        return tuple(episodes_of(item)[0].prompt_ids)

    longest = {}  # the longest completion of each prompt
    for item in items:
        longest[prompt_of(item)] = max(longest.get(prompt_of(item), 0), width_of(item))

    def sort_key(item) -> tuple:
        prompt = prompt_of(item)
        return (longest[prompt], prompt, width_of(item)) if shares_prompts else (len(prompt) + width_of(item),)

    def is_too_large(rows: int, width: int, prompts: set) -> bool:
        prompt_width = max(map(len, prompts))
        copies = len(prompts) if shares_prompts else rows
        padded = rows * width + copies * prompt_width
        attended = rows * (width + prompt_width)  # each completion has the keys and values of its prompt
        return padded > max_tokens or attended > 2 * max_tokens

    batch = []
    rows = 0
    width = 0
    prompts = set()
    for item in sorted(items, key=sort_key):
        rows += len(episodes_of(item))
        width = max(width, width_of(item))
        prompts.add(prompt_of(item))
        if batch and is_too_large(rows, width, prompts):
            yield batch
            batch = []
            rows = len(episodes_of(item))
            width = width_of(item)
            prompts = {prompt_of(item)}
        batch.append(item)
    if batch:
        yield batch
