"""A reward model as a reward function: any Hugging Face sequence-classification model, beside rule-based rewards.

    from grading import reward_model

    helpful = reward_model("some-org/some-reward-model", weight=0.2, sigmoid=True)      # an id on the Hub, or a folder

The model reads the row's prompt, as its data has it, and the completion: through its tokenizer's chat template, or as a
text pair where there is none. One output is a raw score without bounds, sigmoid=True brings it to 0..1; of several
labels, label= names the one whose probability counts. What does not fit the model's context is cut from the left of the
prompt, and then from the left of the completion, whose end, the answer, stays; the reason says so.

A reward model has learnt what people like, not what is true: its value enters the reward and never says whether a
completion is right (`ModelReward`). torch and transformers are imported, and the model loaded, at the first completion.
"""

import functools
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path

from grading.base import RewardError, RewardFunction, did_you_mean, prompt_text


class ModelReward(RewardFunction):
    """How a reward model counts in a reward file: as an opinion, which never judges what is right."""

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
    """A sequence-classification model as a reward function of the file that calls this; weight 0 makes it a metric.

    model: an id on the Hugging Face Hub, or a folder. name: the reward function's, by default the last part of `model`.
    weight, when: as in @reward. label: of a model with several, the name or number of the good one. sigmoid: of a raw
    score. answer_only: the model reads what stands after </think>, not the thinking. batch_size: rows in one pass.
    Raises RewardError for a folder that holds no model; what else is wrong with a model, its first call raises.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise RewardError(f"reward_model: {model} is no folder of a model: it holds no config.json")
        name, model = name or folder.resolve().name, str(folder)
    elif not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) or model.startswith("."):
        raise RewardError(
            f"reward_model: there is no folder {model}, and it is no id of a model on the Hub (OWNER/NAME)"
        )
    if batch_size < 1:
        raise RewardError(f"reward_model: batch_size is {batch_size}, expected a number from 1")
    function = RewardModel(model, label, sigmoid, answer_only, batch_size)
    function.__name__ = re.sub(r"\W+", "_", name or model.rpartition("/")[2]).strip("_")
    caller = sys._getframe(1)  # the reward file, as whose own function it counts
    function.__module__, function.line = caller.f_globals.get("__name__", ""), caller.f_lineno
    function.reward = ModelReward(function.__name__, function, float(weight), when, style="chat")
    return function


class RewardModel:
    """A batch function of a reward file (as in TRL): the scores of completions. Made by `reward_model`."""

    def __init__(self, model: str, label: str | int | None, sigmoid: bool, answer_only: bool, batch_size: int):
        self.model, self.label, self.sigmoid = model, label, sigmoid
        self.answer_only, self.batch_size = answer_only, batch_size

    @property
    def is_unbounded(self) -> bool:
        """Whether it gives a raw score. Loads the model."""
        return not self.sigmoid and _is_raw(_load(self.model)[1].config)

    def __call__(self, prompts: list, completions: list) -> list[tuple[float, str]]:
        """The value of each completion, with a reason where it was cut. Prompts, completions: text or chat messages.

        Raises RewardError for a model that cannot be loaded, has no trained head, or lacks the label.
        """
        tokenizer, model = _load(self.model)
        output = self._output(model.config)
        texts = [text if isinstance(text, str) else prompt_text(text) for text in completions]
        if self.answer_only:
            texts = [_answer(text) for text in texts]
        rows, reasons = _encode(tokenizer, model, prompts, texts)
        values = [0.0] * len(rows)
        order = sorted(
            range(len(rows)), key=lambda i: -len(rows[i]["input_ids"])
        )  # longest first: memory fails at once
        for first in range(0, len(order), self.batch_size):
            places = order[first : first + self.batch_size]
            logits = _logits(model, [rows[i] for i in places])  # (B, labels)
            if not _is_raw(model.config):
                is_multi = model.config.problem_type == "multi_label_classification"
                logits = logits.sigmoid() if is_multi else logits.softmax(-1)
            elif self.sigmoid:
                logits = logits.sigmoid()
            for place, value in zip(places, logits[:, output].tolist()):
                values[place] = value
        return list(zip(values, reasons))

    def _output(self, config) -> int:
        """The output that counts."""
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
        found = [number for number, name in labels.items() if self.label in (name, number)]
        if not found:
            hint = did_you_mean(self.label, labels.values())
            raise RewardError(f"reward_model: {self.model} has no label {self.label!r}, only {listed}.{hint}")
        if self.sigmoid and not _is_raw(config):
            raise RewardError(f"reward_model: {self.model} gives a probability with label=: leave out sigmoid=")
        return found[0]


def _is_raw(config) -> bool:
    """Whether the outputs are scores, not classes."""
    return len(config.id2label) == 1 or config.problem_type == "regression"


def _answer(text: str) -> str:
    """What stands after the thinking; "" where it never ends."""
    _, closed, answer = text.rpartition("</think>")
    return "" if "<think>" in text and not closed else answer.strip()


@functools.cache
def _load(name: str):
    """The tokenizer and the model, on CUDA (in bf16 where it has that) or else the CPU; once in a process."""
    import torch
    import transformers
    from safetensors import SafetensorError
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    has_bf16 = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            name, dtype=torch.bfloat16 if has_bf16 else torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RewardError(f"reward_model: {name} cannot be loaded as a sequence classifier: {first_line}") from error
    if loading["missing_keys"]:  # they would be random numbers
        missing = ", ".join(sorted(loading["missing_keys"])[:3])
        raise RewardError(
            f"reward_model: {name} has no trained classification head, its weights lack {missing}: name a model that "
            "was trained as a sequence classifier"
        )
    return tokenizer, model.to(device).eval()


def _encode(tokenizer, model, prompts: list, texts: list[str]) -> tuple[list[dict[str, list[int]]], list[str]]:
    """The model's inputs for each row, as long as its context at most, and a reason where that cut something."""
    if tokenizer.chat_template:
        chats = [
            [{"role": "user", "content": p}] if isinstance(p, str) else [dict(message) for message in p]
            for p in prompts
        ]
        chats = [[*chat, {"role": "assistant", "content": text}] for chat, text in zip(chats, texts)]
        rendered = tokenizer.apply_chat_template(chats, tokenize=False)
        encoded = tokenizer(rendered, add_special_tokens=False)  # the template writes its own
    else:
        prompts = [p if isinstance(p, str) else "\n\n".join(message["content"] for message in p) for p in prompts]
        encoded = tokenizer(prompts, texts)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    limit = min(tokenizer.model_max_length, context if context > 0 else sys.maxsize)
    taken = inspect.signature(model.forward).parameters
    names = [name for name in encoded if name in taken and name != "attention_mask"]
    rows, reasons = [], []
    for i, ids in enumerate(encoded["input_ids"]):
        places = range(len(ids)) if len(ids) <= limit else _fitting(encoded.sequence_ids(i), limit)
        cut = len(ids) - len(places)
        reasons.append(f"cut: the reward model does not see {cut} of {len(ids)} tokens" if cut else "")
        rows.append({name: [encoded[name][i][place] for place in places] or [0] for name in names})
    return rows, reasons


def _fitting(parts: list[int | None], limit: int) -> list[int]:
    """The places of the tokens that stay: prompt (part 0), then completion (part 1) give way from their left."""
    by_part = sorted((part, place) for place, part in enumerate(parts) if part is not None)
    dropped = {place for _, place in by_part[: len(parts) - limit]}
    return [place for place in range(len(parts)) if place not in dropped]


def _logits(model, rows: list[dict[str, list[int]]]):
    """The outputs for rows of different lengths, fp32 on the CPU, (B, labels).

    Rows are padded on the right. A decoder reads its score at the last token that is not the padding token, and refuses
    a batch where its config names none: then it is a token that ends none of the rows.
    """
    import torch

    config = model.config.get_text_config()
    pad_id, is_missing = config.pad_token_id, config.pad_token_id is None
    if is_missing:
        ends = {row["input_ids"][-1] for row in rows}
        pad_id = next(i for i in range(len(ends) + 1) if i not in ends)
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    width = int(lengths.max())
    inputs = {
        name: torch.tensor(
            [row[name] + [pad_id if name == "input_ids" else 0] * (width - len(row[name])) for row in rows]
        )
        for name in rows[0]
    }  # (B, T)
    inputs["attention_mask"] = (torch.arange(width) < lengths[:, None]).long()
    try:
        config.pad_token_id = pad_id
        with torch.inference_mode():
            logits = model(**{name: values.to(model.device) for name, values in inputs.items()}).logits
    finally:
        if is_missing:
            config.pad_token_id = None
    return logits.float().cpu()
