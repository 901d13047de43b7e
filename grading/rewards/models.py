"""A reward model as a reward function: any Hugging Face sequence-classification model, beside rule-based rewards.

    from grading import reward_model

    helpful = reward_model("some-org/some-reward-model", weight=0.2, sigmoid=True)      # an id on the Hub, or a folder

The model reads the row's prompt and the completion: through its tokenizer's chat template, or as a text pair if it has none.
Tokens beyond the model's context are cut from the left of the prompt, then from the left of the completion, whose end has
the answer; the reason says so. One output is a raw score without bounds, which sigmoid=True brings to 0..1; of several
labels, label= names the one whose probability counts.

A reward model has learned what people like, not what is true: its value enters the reward and never decides whether a
completion is right (`ModelReward`). The model is loaded, and torch and transformers are imported, at the first completion.
"""

import functools
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path

from grading.base import Completion, RewardError, RewardFunction, did_you_mean, prompt_text


class ModelReward(RewardFunction):
    """A reward model in a reward file; it never judges what is right."""

    sees_row = False
    is_model = True

    @property
    def line(self) -> int:
        return self.function.line


def reward_model(
    model: str,
    *,
    name: str | None = None,
    weight: float = 1.0,
    when: str | Callable | None = None,
    label: str | int | None = None,
    sigmoid: bool = False,
    answer_only: bool = False,
    batch_size: int = 16,
) -> "RewardModel":
    """A sequence-classification model as a reward function of the file that calls this.

    Args:
        model: an id on the Hugging Face Hub, or a folder.
        name: of the reward function; default: the last part of `model`.
        weight, when: as in @reward; weight 0 makes it a metric.
        label: name or number of the good label, for a model with several.
        sigmoid: apply it to a raw score.
        answer_only: the model reads only what follows </think>.
        batch_size: completions in one forward pass.

    Raises:
        RewardError: the folder holds no model. The first call raises it for other faults of a model.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise RewardError(f"reward_model: {model} is not the folder of a model: it holds no config.json")
        name = name or folder.resolve().name
        model = str(folder)
    elif not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) or model.startswith("."):
        raise RewardError(
            f"reward_model: there is no folder {model}, and it is not the id of a model on the Hub (OWNER/NAME)"
        )
    if batch_size < 1:
        raise RewardError(f"reward_model: batch_size is {batch_size}, expected a number from 1")
    function = RewardModel(model, label, sigmoid, answer_only, batch_size)
    function.__name__ = re.sub(r"\W+", "_", name or model.rpartition("/")[2]).strip("_")
    caller = sys._getframe(1)  # the reward file: the function counts as defined there
    function.__module__, function.line = caller.f_globals.get("__name__", ""), caller.f_lineno
    function.reward = ModelReward(function.__name__, function, float(weight), when, style="chat")
    return function


class RewardModel:
    """A batch reward function (as in TRL) that returns a model's scores. Made by `reward_model`."""

    def __init__(self, model: str, label: str | int | None, sigmoid: bool, answer_only: bool, batch_size: int):
        self.model, self.label, self.sigmoid = model, label, sigmoid
        self.answer_only, self.batch_size = answer_only, batch_size

    @property
    def is_unbounded(self) -> bool:
        """Whether it gives a raw score. Loads the model."""
        return not self.sigmoid and _is_raw(_load(self.model)[1].config)

    def __call__(self, prompts: list, completions: list) -> list[tuple[float, str]]:
        """The value of each completion, with a reason if it was cut. Prompts and completions: text or chat messages.

        Raises RewardError if the model cannot be loaded, has no trained head, or lacks the label.
        """
        import torch

        tokenizer, model = _load(self.model)
        config = model.config
        output = self._output(config)
        texts = [prompt_text(text) for text in completions]
        if self.answer_only:
            texts = [Completion("", text, {}).answer for text in texts]
        rows, reasons = _encode(tokenizer, model, prompts, texts)
        # Decoders read the score at the last token that is not padding, so without a padding token nothing may be padded.
        batch_size = 1 if config.get_text_config().pad_token_id is None else self.batch_size
        lengths = [len(row["input_ids"]) for row in rows]
        order = sorted(
            range(len(rows)), key=lengths.__getitem__, reverse=True
        )  # runs out of memory at once, if it does
        values = [0.0] * len(rows)
        for first in range(0, len(order), batch_size):
            batch = order[first : first + batch_size]
            with torch.inference_mode():
                logits = model(**_pad([rows[i] for i in batch], model)).logits.float()  # (B, labels)
            if not _is_raw(config):
                is_multi = config.problem_type == "multi_label_classification"
                logits = logits.sigmoid() if is_multi else logits.softmax(-1)
            elif self.sigmoid:
                logits = logits.sigmoid()
            for i, value in zip(batch, logits[:, output].tolist()):
                values[i] = value
        return list(zip(values, reasons))

    def _output(self, config) -> int:
        """The index of the output that counts."""
        labels = {int(number): str(name) for number, name in config.id2label.items()}
        if len(labels) == 1:
            if self.label is not None:
                raise RewardError(
                    f"reward_model: {self.model} has one output, a score, and no labels: leave out label="
                )
            return 0
        listed = ", ".join(f"'{name}'" for name in list(labels.values())[:20]) + (", ..." if len(labels) > 20 else "")
        if self.label is None:
            raise RewardError(
                f"reward_model: {self.model} has {len(labels)} labels: say with label= which one is good: {listed}"
            )
        matches = [number for number, name in labels.items() if self.label in (name, number)]
        if not matches:
            hint = did_you_mean(self.label, labels.values())
            raise RewardError(f"reward_model: {self.model} has no label {self.label!r}, only {listed}.{hint}")
        if self.sigmoid and not _is_raw(config):
            raise RewardError(f"reward_model: {self.model} gives a probability with label=: leave out sigmoid=")
        return matches[0]


def _is_raw(config) -> bool:
    """Whether the outputs are scores, not classes."""
    return len(config.id2label) == 1 or config.problem_type == "regression"


@functools.cache
def _load(name: str):
    """The tokenizer and the model, on CUDA (in bf16 if it is supported) or else the CPU; once in a process."""
    import torch
    import transformers
    from safetensors import SafetensorError

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    has_bf16 = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        model, loading = transformers.AutoModelForSequenceClassification.from_pretrained(
            name, dtype=torch.bfloat16 if has_bf16 else torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RewardError(f"reward_model: {name} cannot be loaded as a sequence classifier: {reason}") from error
    if loading["missing_keys"]:  # they would be random numbers
        missing = ", ".join(sorted(loading["missing_keys"])[:3])
        raise RewardError(
            f"reward_model: {name} has no trained classification head, its weights lack {missing}: name a model that "
            "was trained as a sequence classifier"
        )
    return tokenizer, model.to(device).eval()


def _encode(tokenizer, model, prompts: list, texts: list[str]) -> tuple[list[dict[str, list[int]]], list[str]]:
    """The model's inputs for each row, cut to its context, and a reason for each row that was cut.

    The tokenizer's own truncation cannot cut the prompt first and then the completion.
    """
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
    names = [
        name for name in encoded if name in inspect.signature(model.forward).parameters and name != "attention_mask"
    ]
    rows, reasons = [], []
    for i, ids in enumerate(encoded["input_ids"]):
        parts = encoded.sequence_ids(i)  # 0 for the prompt, 1 for the completion, None for special tokens
        removable = sorted((part, place) for place, part in enumerate(parts) if part is not None)
        removed = {place for _, place in removable[: max(0, len(ids) - limit)]}
        kept = [place for place in range(len(ids)) if place not in removed]
        rows.append({name: [encoded[name][i][place] for place in kept] or [0] for name in names})
        reasons.append(f"cut: the reward model does not see {len(removed)} of {len(ids)} tokens" if removed else "")
    return rows, reasons


def _pad(rows: list[dict[str, list[int]]], model):
    """The rows as one right-padded batch of tensors (B, T) on the model's device, with their attention mask."""
    from torch import tensor
    from torch.nn.utils.rnn import pad_sequence

    padding = {"input_ids": model.config.get_text_config().pad_token_id or 0}  # other inputs: 0
    rows = [row | {"attention_mask": [1] * len(row["input_ids"])} for row in rows]
    return {
        name: pad_sequence([tensor(row[name]) for row in rows], True, padding.get(name, 0)).to(model.device)
        for name in rows[0]
    }
