"""Memory limits: micro-batches within a token budget, and retries with a halved batch setting when memory runs out.

`rollout_batch_size` limits the rows of a roll-out, `max_tokens_per_micro_batch` the tokens of a forward and backward
pass. The former changes which completions are sampled, but not their distribution; the latter only causes rounding.

On a CPU, glibc's allocator is told which freed memory to keep.
"""

import contextlib
import ctypes
import gc
from collections.abc import Callable, Iterator
from typing import Literal, TypeVar

import psutil
import torch

from grading.base import first_line
from rl.config import Config, ConfigError

T = TypeVar("T")
AUTO_SHRUNK = ("rollout_batch_size", "max_tokens_per_micro_batch")  # settings that are halved when memory runs out

MAX_MEMORY_SHARE = 0.8  # maximum share of the free memory that the roll-out uses
KEEP_FREED_BELOW_HIDDEN = 512  # hidden size below which, on a CPU, freed memory is kept for the whole run


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error means that GPU or host memory ran out. torch has no exception class for the latter."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    messages = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(message in str(error) for message in messages)


def retry_on_oom(
    fn: Callable[[], T],
    config: Config,
    setting: Literal["rollout_batch_size", "max_tokens_per_micro_batch"],
    requested: int,
    minimum: int,
) -> T:
    """Return fn(). If memory runs out, halve the setting for the rest of the run and call fn again.

    Args:
        fn: Function to call. It must start from the beginning at each call.
        requested: Largest value of the setting that this call can use.
        minimum: Smallest value of the setting with which fn can run.

    Raises:
        ConfigError: If memory runs out at the minimum.
    """
    while True:
        try:
            return fn()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            reason = first_line(error)[:200]
        # Outside the except block the exception is released, and with it the tensors held by its frames.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        current = min(getattr(config, setting), requested)
        if current <= minimum:
            raise ConfigError(
                f"out of memory at the smallest possible batch ({setting} {current}): lower max_completion_length (now "
                f"{config.max_completion_length}), set load_in_4bit or gradient_checkpointing to true, or use a smaller "
                f"model; python train.py --dry-run shows what fits. ({reason})"
            )
        setattr(config, setting, max(current // 2, minimum))
        print(
            f"  memory   out of memory: {setting} {current} -> {getattr(config, setting)}, retrying ({reason})",
            flush=True,
        )


def micro_batches(items: list, max_tokens: int, shares_prompts: bool) -> Iterator[list]:
    """Yield batches of items of similar length, each with at most max_tokens including padding, or with a single item.

    Args:
        items: Episodes (prompt_ids and completion_ids), or lists of episodes of one prompt that must stay together.
        shares_prompts: Count a prompt once per batch, and keep completions of a prompt together as far as the budget
            allows. Otherwise every completion has a copy of its prompt.
    """

    def get_episodes(item) -> list:
        return item if isinstance(item, list) else [item]

    def max_width(item) -> int:
        return max(len(episode.completion_ids) for episode in get_episodes(item))

    def get_prompt(item) -> tuple[int, ...]:
        return tuple(get_episodes(item)[0].prompt_ids)

    longest = {}  # length of the longest completion of each prompt
    for item in items:
        longest[get_prompt(item)] = max(longest.get(get_prompt(item), 0), max_width(item))

    def sort_key(item) -> tuple:
        prompt = get_prompt(item)
        return (longest[prompt], prompt, max_width(item)) if shares_prompts else (len(prompt) + max_width(item),)

    def is_too_large(rows: int, width: int, prompts: set) -> bool:
        prompt_width = max(map(len, prompts))
        copies = len(prompts) if shares_prompts else rows
        padded = rows * width + copies * prompt_width
        attended = rows * (width + prompt_width)  # in attention every completion has the keys and values of its prompt
        return padded > max_tokens or attended > 2 * max_tokens

    batch = []
    rows = 0
    width = 0
    prompts = set()
    for item in sorted(items, key=sort_key):
        rows += len(get_episodes(item))
        width = max(width, max_width(item))
        prompts.add(get_prompt(item))
        if batch and is_too_large(rows, width, prompts):
            yield batch
            batch = []
            rows = len(get_episodes(item))
            width = max_width(item)
            prompts = {get_prompt(item)}
        batch.append(item)
    if batch:
        yield batch


def keep_freed_memory() -> None:
    """Let glibc keep freed tensors of up to 32 MB for reuse. Has no effect on other systems.

    Returning memory to Linux after each operation and getting it back costs a seventh to a quarter of the step.
    """
    m_trim_threshold, m_mmap_threshold = -1, -3
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(m_mmap_threshold, 32 * 2**20)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def return_freed_memory(policy) -> None:
    """Return the memory that glibc keeps to Linux. Has no effect with a GPU, on other systems, and for small models.

    Called after each roll-out and each micro-batch: they need blocks of other sizes, and kept ones would add to the peak.
    """
    if policy.device.type == "cpu" and policy.hidden_size >= KEEP_FREED_BELOW_HIDDEN:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def fits(num_bytes: int, device: torch.device) -> bool:
    """Return whether an allocation leaves at least a fifth of the free memory unused."""
    return num_bytes < MAX_MEMORY_SHARE * free_memory(device)


def free_memory(device: torch.device) -> float:
    """Return the free memory in bytes, on a GPU including unused blocks of PyTorch's allocator."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    free, total = torch.cuda.mem_get_info(device)
    reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    allowed = torch.cuda.get_per_process_memory_fraction(device) * total - allocated
    return min(free + reserved - allocated, allowed)
