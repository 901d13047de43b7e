"""A reward model as a reward function: any Hugging Face sequence-classification model, beside rule-based rewards.

    helpful = reward_model("some-org/some-reward-model", weight=0.2, sigmoid=True)      # an id on the Hub, or a folder

The model reads the row's prompt and the completion: through its tokenizer's chat template, or as a text pair if it has none.
Tokens beyond its context are cut from the left, the prompt first; the reason says so. A reward model has learned what people
like, not what is true: its value enters the reward and never decides whether a completion is right (`ModelReward`).
"""

import functools
import inspect
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from grading.base import Completion, RewardError, RewardFunction, did_you_mean, prompt_text

BATCH_SIZE = 16  # completions in one forward pass


class ModelReward(RewardFunction):
    """A reward model in a reward file; it never judges what is right."""

    reads_row = False
    is_model = True

    @property
    def line(self) -> int:
        return self.function.line


class RewardModel:
    """A sequence-classification model as a batch reward function, as in TRL. It is loaded at the first call.

    Args:
        model: an id on the Hugging Face Hub, or a folder.
        name: of the reward function; default: the last part of `model`.
        weight, when: as in @reward; weight 0 makes it a metric.
        label: name or number of the label whose probability is the reward, for a model with several.
        sigmoid: bring a raw score, which has no bounds, to 0..1.
        answer_only: the model reads only what follows </think>.
    """

    def __init__(
        self,
        model: str,
        *,
        name: str | None = None,
        weight: float = 1.0,
        when: str | Callable | None = None,
        label: str | int | None = None,
        sigmoid: bool = False,
        answer_only: bool = False,
    ):
        self.model = os.path.expanduser(model)
        self.label = label
        self.sigmoid = sigmoid
        self.answer_only = answer_only
        caller = sys._getframe(1)  # the reward file: the function counts as defined there
        self.line = caller.f_lineno
        self.__module__ = caller.f_globals.get("__name__", "")
        self.__name__ = re.sub(r"\W+", "_", name or Path(self.model).resolve().name).strip("_")
        self.reward = ModelReward(self.__name__, self, float(weight), when, style="chat")

    def __call__(self, prompts: list, completions: list) -> list[tuple[float, str]]:
        """The value of each completion, and why it was cut if it was. Raises RewardError if the model cannot be used."""
        import torch

        tokenizer, model = _load(self.model)
        output = self._output(model.config)
        texts = [prompt_text(text) for text in completions]
        if self.answer_only:
            texts = [Completion("", text, {}).answer for text in texts]
        rows, reasons = _encode(tokenizer, model, prompts, texts)
        # Decoders read the score at the last token that is not padding: without a padding token, nothing may be padded.
        can_pad = tokenizer.pad_token_id is not None
        batch_size = BATCH_SIZE if can_pad else 1
        values = [0.0] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))  # the largest batch first
        for first in range(0, len(order), batch_size):
            batch = order[first : first + batch_size]
            inputs = tokenizer.pad([rows[i] for i in batch], padding=can_pad, return_tensors="pt").to(model.device)
            with torch.inference_mode():
                logits = model(**inputs).logits.float()  # (B, labels)
            for i, value in zip(batch, self._scores(logits, model.config)[:, output].tolist()):
                values[i] = value
        return list(zip(values, reasons))

    @property
    def is_unbounded(self) -> bool:
        """Whether it gives a raw score. Loads the model."""
        return not self.sigmoid and _is_raw(_load(self.model)[1].config)

    def _scores(self, logits, config):
        if _is_raw(config):
            return logits.sigmoid() if self.sigmoid else logits
        return logits.sigmoid() if config.problem_type == "multi_label_classification" else logits.softmax(-1)

    def _output(self, config) -> int:
        """The index of the output that counts."""
        labels = {int(number): str(name) for number, name in config.id2label.items()}
        if len(labels) == 1 and self.label is None:
            return 0
        for number, name in labels.items():
            if self.label in (name, number):
                return number
        raise RewardError(
            f"reward_model: label is {self.label!r}, but must name the good label of {self.model}, or be left out if there is "
            f"only one: {', '.join(map(repr, labels.values()))}.{did_you_mean(self.label, labels.values())}"
        )


reward_model = RewardModel  # its name in reward files


def _is_raw(config) -> bool:
    """Whether the outputs are scores, not classes."""
    return len(config.id2label) == 1 or config.problem_type == "regression"


@functools.cache
def _load(name: str):
    """The tokenizer and the model, on CUDA (in bf16 if it is supported) or else the CPU; once in a process."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    has_bf16 = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = torch.bfloat16 if has_bf16 else torch.float32
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side="right")
        model, loading = AutoModelForSequenceClassification.from_pretrained(name, dtype=dtype, output_loading_info=True)
    except Exception as error:  # of transformers, the Hub, safetensors
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RewardError(f"reward_model: {name} cannot be loaded as a sequence classifier: {reason}") from error
    if missing := sorted(loading["missing_keys"]):  # they would be random numbers
        raise RewardError(f"reward_model: {name} has no trained classification head, its weights lack {missing[0]}")
    tokenizer.pad_token_id = model.config.get_text_config().pad_token_id
    return tokenizer, model.to(device).eval()


def _encode(tokenizer, model, prompts: list, texts: list[str]) -> tuple[list[dict[str, list[int]]], list[str]]:
    """The inputs of each row, cut to the model's context (no tokenizer cuts the prompt first), and why a row was cut."""
    if tokenizer.chat_template:
        chats = [[{"role": "user", "content": prompt}] if isinstance(prompt, str) else [*prompt] for prompt in prompts]
        chats = [[*chat, {"role": "assistant", "content": text}] for chat, text in zip(chats, texts)]
        rendered = tokenizer.apply_chat_template(chats, tokenize=False)
        encoded = tokenizer(rendered, add_special_tokens=False)  # the template writes its own
    else:
        prompts = [p if isinstance(p, str) else "\n\n".join(message["content"] for message in p) for p in prompts]
        encoded = tokenizer(prompts, texts)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or -1
    limit = min(tokenizer.model_max_length, context if context > 0 else sys.maxsize)
    names = [name for name in encoded if name in inspect.signature(model.forward).parameters]
    rows = []
    reasons = []
    for i, ids in enumerate(encoded["input_ids"]):
        parts = encoded.sequence_ids(i)  # 0 for the prompt, 1 for the completion, None for special tokens
        removable = sorted((part, place) for place, part in enumerate(parts) if part is not None)
        removed = {place for _, place in removable[: max(0, len(ids) - limit)]}
        kept = [place for place in range(len(ids)) if place not in removed]
        rows.append({name: [encoded[name][i][place] for place in kept] or [0] for name in names})
        reasons.append(f"cut: the reward model does not see {len(removed)} of {len(ids)} tokens" if removed else "")
    return rows, reasons
