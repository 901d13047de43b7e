"""Call reward functions written for TRL as TRL does, so that they work unchanged.

    def correctness(prompts, completions, answer, **kwargs) -> list[float]: ...

They get the keyword arguments that their signature accepts: prompts, completions, completion_ids, every column of the
rows (one value per completion), trainer_state (global_step, max_steps), log_extra(column, values), log_metric(name, value).
They return one value per completion, as a list, a generator, a NumPy array or a tensor.

In TRL the dataset determines whether completions are chat messages or plain text. Here it is detected: the first call
passes messages, `[{"role": "assistant", "content": text}]` for each completion, that record whether they are read. If one
is read, the function always gets messages. If none is, or if the call raises before that, the function is called again
with plain text, and always gets text.
"""

import math
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass

from grading.base import Completion, RewardFunction, to_number


@dataclass
class TrainerState:
    """The part of TRL's trainer state that reward functions use."""

    global_step: int  # optimizer steps done
    max_steps: int | None


class Log:
    """Collects the values that a function logs in one call."""

    def __init__(self, num_completions: int):
        self.num_completions = num_completions
        self.extra = {}
        self.metrics = {}

    def log_extra(self, column: str, values: list) -> None:
        """Log one value per completion, saved as a column next to the completions in the run folder."""
        values = [to_number(value) for value in values]
        if len(values) != self.num_completions:
            raise ValueError(f"log_extra('{column}'): {len(values)} values for {self.num_completions} completions")
        self.extra[column] = values

    def log_metric(self, name: str, value: float) -> None:
        """Log a metric of this step. Values logged under the same name are averaged."""
        value = float(value)
        if not math.isfinite(value):
            raise ValueError(f"log_metric('{name}'): {value} is not a finite number")
        self.metrics.setdefault(name, []).append(value)


async def call(f: RewardFunction, completions: list[Completion], max_steps: int | None) -> tuple[object, Log]:
    """Call a batch function and return its result and the log of the call. Sets `f.style` if it is unknown."""
    for style in [f.style] if f.style else ["chat", "text"]:
        is_final = f.style is not None or style == "text"
        message_type = type("Message", (_Message,), {})
        log = Log(len(completions))
        try:
            values = f.function(**_arguments(f, completions, message_type if style == "chat" else None, log, max_steps))
            if f.is_async:
                values = await values
            values = _to_list(values)  # a generator reads the messages only here
        except Exception:
            if is_final or message_type.was_read:
                raise
            continue
        if is_final or message_type.was_read:
            break
    f.style = style
    return values, log


def _to_list(values):
    """Return a tensor, array, generator or other ordered iterable as a list, as TRL does; other values unchanged."""
    if getattr(values, "ndim", 1) == 2 and values.shape[1] == 1:  # one column, such as the output of a regression
        values = values.reshape(-1)
    if hasattr(values, "tolist"):
        return values.tolist()
    if isinstance(values, (str, bytes, Mapping, Set)) or not isinstance(values, Iterable):
        return values
    return list(values)


def _arguments(
    f: RewardFunction, completions: list[Completion], message_type: type | None, log: Log, max_steps: int | None
) -> dict:
    """Return the keyword arguments of a call.

    Args:
        message_type: The type of the chat messages; None for plain text.
    """
    if message_type:
        texts = [[message_type(m) for m in messages_of(c)] for c in completions]
        prompts = []
        for c in completions:
            prompt = c.row.get("prompt", c.prompt)
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            prompts.append([message_type(m) for m in messages])
    else:
        texts = [c.text for c in completions]
        prompts = [c.prompt for c in completions]
    columns = dict.fromkeys(column for c in completions for column in c.row)
    if "prompt" not in f.parameters:  # passed as prompts
        columns.pop("prompt", None)
    available = {column: [c.row.get(column) for c in completions] for column in columns} | {
        "prompts": prompts,
        "completions": texts,
        "completion_ids": [c.token_ids for c in completions],
        "trainer_state": TrainerState(max(0, completions[0].step - 1), max_steps),
        "log_extra": log.log_extra,
        "log_metric": log.log_metric,
    }
    if any(c.environment for c in completions):
        available["environments"] = [c.environment for c in completions]
    accepts_all = any(p.kind is p.VAR_KEYWORD for p in f.parameters.values())
    return {name: value for name, value in available.items() if accepts_all or name in f.parameters}


def messages_of(completion: Completion) -> list[dict]:
    """Return a completion as chat messages. The replies of an environment have the role "tool"."""
    if not completion.turns:
        return [{"role": "assistant", "content": completion.text}]
    messages = []
    for turn in completion.turns:
        messages.append({"role": "assistant", "content": turn.text})
        if turn.reply:
            messages.append({"role": "tool", "content": turn.reply})
    return messages


def _tracked(name: str):
    """Return a dict method that also sets `was_read` on the type of the message."""
    method = getattr(dict, name)

    def tracked(self, *args):
        type(self).was_read = True
        return method(self, *args)

    return tracked


class _Message(dict):
    """A chat message. Its type records whether any message of the type has been read."""

    was_read = False
    __getitem__, get, pop, keys, values, items, __iter__ = map(
        _tracked, ("__getitem__", "get", "pop", "keys", "values", "items", "__iter__")
    )
