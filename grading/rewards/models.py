"""Reward models: use any Hugging Face sequence-classification model as a reward function, next to rule-based rewards.

    helpful = reward_model("some-org/some-reward-model", weight=0.2, sigmoid=True)      # a Hub id, or a folder

Prompt and completion are formatted with the model's chat template, or as a text pair if it has none. Inputs that exceed
its context are truncated from the left, the prompt first; the reason says so. A reward model predicts human preference,
not correctness: it adds to the reward, but never decides whether a completion is right (`ModelReward`).
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
    """The entry of a reward model in a reward file. It never decides whether a completion is right."""

    reads_row = False
    is_model = True

    @property
    def line(self) -> int:
        return self.function.line


class RewardModel:
    """A sequence-classification model as a batch reward function with TRL's signature. Loaded at the first call.

    Args:
        model: Hugging Face Hub id, or a folder.
        name: Name of the reward function. Defaults to the last part of `model`.
        weight, when: As in @reward; weight 0 makes it a metric.
        label: For a model with several labels, the name or number of the label whose probability is the reward.
        sigmoid: Map an unbounded raw score to 0..1.
        answer_only: Pass only the text after </think> to the model.
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
        caller = sys._getframe(1)  # the reward file, recorded as the place of definition
        self.line = caller.f_lineno
        self.__module__ = caller.f_globals.get("__name__", "")
        self.__name__ = re.sub(r"\W+", "_", name or Path(self.model).resolve().name).strip("_")
        self.reward = ModelReward(self.__name__, self, float(weight), when, style="chat")

    def __call__(self, prompts: list, completions: list) -> list[tuple[float, str]]:
        """Return (value, reason) for each completion; the reason is "" unless the input was truncated.

        Raises RewardError if the model cannot be loaded or `label` is not one of its labels.
        """
        import torch

        tokenizer, model = _load(self.model)
        output = self._output_index(model.config)
        texts = [prompt_text(text) for text in completions]
        if self.answer_only:
            texts = [Completion("", text, {}).answer for text in texts]
        rows, reasons = _encode(tokenizer, model, prompts, texts)
        # Decoders take the score at the last non-padding token: without a padding token, rows cannot be padded.
        can_pad = tokenizer.pad_token_id is not None
        batch_size = BATCH_SIZE if can_pad else 1
        values = [0.0] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))  # longest first
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            inputs = tokenizer.pad([rows[i] for i in batch], padding=can_pad, return_tensors="pt").to(model.device)
            with torch.inference_mode():
                logits = model(**inputs).logits.float()  # (B, labels)
            for i, value in zip(batch, self._scores(logits, model.config)[:, output].tolist()):
                values[i] = value
        return list(zip(values, reasons))

    @property
    def is_unbounded(self) -> bool:
        """True if the reward is a raw score without bounds. Loads the model."""
        return not self.sigmoid and _outputs_raw_scores(_load(self.model)[1].config)

    def _scores(self, logits, config):
        """Turn logits (B, labels) into raw scores or probabilities."""
        if _outputs_raw_scores(config):
            return logits.sigmoid() if self.sigmoid else logits
        return logits.sigmoid() if config.problem_type == "multi_label_classification" else logits.softmax(-1)

    def _output_index(self, config) -> int:
        """Return the index of the output that is the reward."""
        labels = {int(number): str(name) for number, name in config.id2label.items()}
        if len(labels) == 1 and self.label is None:
            return 0
        for number, name in labels.items():
            if self.label in (name, number):
                return number
        raise RewardError(
            f"reward_model: label is {self.label!r}, but must name a label of {self.model}, or be omitted if there is "
            f"only one. Its labels: {', '.join(map(repr, labels.values()))}.{did_you_mean(self.label, labels.values())}"
        )


reward_model = RewardModel  # the name used in reward files


def _outputs_raw_scores(config) -> bool:
    """Return True if the model's outputs are scores, not class logits."""
    return len(config.id2label) == 1 or config.problem_type == "regression"


@functools.cache
def _load(name: str):
    """Load the tokenizer and the model once per process, on CUDA (in bf16 if supported) or else the CPU."""
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
    except Exception as error:  # raised by transformers, the Hub client or safetensors
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RewardError(f"reward_model: {name} cannot be loaded as a sequence classifier: {reason}") from error
    if missing := sorted(loading["missing_keys"]):  # transformers has initialized these randomly
        raise RewardError(f"reward_model: {name} has no trained classification head: its weights lack {missing[0]}")
    tokenizer.pad_token_id = model.config.get_text_config().pad_token_id
    return tokenizer, model.to(device).eval()


def _encode(tokenizer, model, prompts: list, texts: list[str]) -> tuple[list[dict[str, list[int]]], list[str]]:
    """Tokenize rows, truncated to the model's context. Return the inputs and, for each row, "" or why it was truncated.

    Tokenizers cannot truncate the prompt before the completion, so this is done here.
    """
    if tokenizer.chat_template:
        chats = [[{"role": "user", "content": prompt}] if isinstance(prompt, str) else [*prompt] for prompt in prompts]
        chats = [[*chat, {"role": "assistant", "content": text}] for chat, text in zip(chats, texts)]
        rendered = tokenizer.apply_chat_template(chats, tokenize=False)
        encoded = tokenizer(rendered, add_special_tokens=False)  # the template adds its own
    else:
        prompts = [p if isinstance(p, str) else "\n\n".join(message["content"] for message in p) for p in prompts]
        encoded = tokenizer(prompts, texts)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or -1
    limit = min(tokenizer.model_max_length, context if context > 0 else sys.maxsize)
    names = [name for name in encoded if name in inspect.signature(model.forward).parameters]
    rows = []
    reasons = []
    for i, ids in enumerate(encoded["input_ids"]):
        sequence_ids = encoded.sequence_ids(i)  # 0 for the prompt, 1 for the completion, None for special tokens
        removable = sorted((sequence, index) for index, sequence in enumerate(sequence_ids) if sequence is not None)
        removed = {index for _, index in removable[: max(0, len(ids) - limit)]}
        remaining = [index for index in range(len(ids)) if index not in removed]
        rows.append({name: [encoded[name][i][index] for index in remaining] or [0] for name in names})
        reasons.append(f"truncated: {len(removed)} of {len(ids)} tokens exceed the context" if removed else "")
    return rows, reasons
