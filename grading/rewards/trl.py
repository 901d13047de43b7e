"""Reward functions written for TRL, called as TRL calls them, so that they work unchanged.

    def correctness(prompts, completions, answer, **kwargs) -> list[float]: ...

They get, by name and as far as their signature takes it: prompts, completions, completion_ids, every column of the rows
(one value for each completion), trainer_state (global_step, max_steps), log_extra(column, values), log_metric(name, value).

TRL hands over chat messages or plain text, as the data set has it; here the function shows which it wants. At its first call
it gets messages, `[{"role": "assistant", "content": text}]` for each completion, that note whether anybody looks into them.
Where one was looked into, the function gets messages from then on. Where none was, or where the call raised before, the call
is made once more with plain text, and so it stays.
"""

import math
from dataclasses import dataclass

from grading.base import Completion, RewardFunction


@dataclass
class TrainerState:
    """What TRL functions read of the trainer."""

    global_step: int  # optimizer steps done
    max_steps: int | None


class Log:
    """Takes what a function logs in one call with n completions."""

    def __init__(self, n: int):
        self.n, self.extra, self.metrics = n, {}, {}

    def log_extra(self, column: str, values: list) -> None:
        """A column of its own beside the completions in the run folder: one value for each of them."""
        values = list(values)
        if len(values) != self.n:
            raise ValueError(f"log_extra('{column}'): {len(values)} values for {self.n} completions")
        self.extra[column] = values

    def log_metric(self, name: str, value: float) -> None:
        """A number of this step; the mean counts where a name is logged several times."""
        value = float(value)
        if not math.isfinite(value):
            raise ValueError(f"log_metric('{name}'): {value} is not a finite number")
        self.metrics.setdefault(name, []).append(value)


async def call(f: RewardFunction, completions: list[Completion], max_steps: int | None) -> tuple[object, Log]:
    """What a batch function returns for the completions, and what it logged. Sets `f.style` if it is unknown."""
    for style in [f.style] if f.style else ["chat", "text"]:
        is_settled = f.style is not None or style == "text"
        message = type("Message", (_Message,), {})
        log = Log(len(completions))
        try:
            values = f.function(**_arguments(f, completions, message if style == "chat" else None, log, max_steps))
            if f.is_async:
                values = await values
        except Exception:
            if is_settled or message.was_read:
                raise
            continue
        if is_settled or message.was_read:
            break
    f.style = style
    return values, log


def _arguments(
    f: RewardFunction, completions: list[Completion], message: type | None, log: Log, max_steps: int | None
) -> dict:
    """The arguments of a call, by name.

    Args:
        message: The type of the chat messages; None for text.
    """
    if message:
        texts = [[message(role="assistant", content=c.text)] for c in completions]
        prompts = []
        for c in completions:
            prompt = c.row.get("prompt", c.prompt)
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            prompts.append([message(m) for m in messages])
    else:
        texts = [c.text for c in completions]
        prompts = [c.prompt for c in completions]
    columns = dict.fromkeys(column for c in completions for column in c.row)
    if "prompt" not in f.parameters:  # it is in prompts
        columns.pop("prompt", None)
    offered = {column: [c.row.get(column) for c in completions] for column in columns} | {
        "prompts": prompts,
        "completions": texts,
        "completion_ids": [c.token_ids for c in completions],
        "trainer_state": TrainerState(max(0, completions[0].step - 1), max_steps),
        "log_extra": log.log_extra,
        "log_metric": log.log_metric,
    }
    takes_any = any(p.kind is p.VAR_KEYWORD for p in f.parameters.values())
    return {name: value for name, value in offered.items() if takes_any or name in f.parameters}


def _noting(name: str):
    method = getattr(dict, name)

    def noting(self, *args):
        type(self).was_read = True
        return method(self, *args)

    return noting


class _Message(dict):
    """A chat message. Its type notes whether any message of that type was looked into."""

    was_read = False
    __getitem__, get, pop, keys, values, items, __iter__ = map(
        _noting, ("__getitem__", "get", "pop", "keys", "values", "items", "__iter__")
    )
