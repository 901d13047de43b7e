"""The policy: a language model with a LoRA on every linear layer, and its tokenizer.

With the LoRA enabled the model is the policy, with it disabled the reference, so both share one set of weights. The
model is loaded by Unsloth or by transformers and peft (rl/model/backends.py), optionally in 4-bit NF4 by bitsandbytes.
"""

import contextlib
import ctypes
import difflib
from dataclasses import dataclass
from pathlib import Path

import jinja2
import peft
import safetensors.torch
import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig

from grading.base import first_line
from rl.config import Config, ConfigError
from rl.model.backends import (
    LINEAR_LAYERS,
    add_unsloth_lora,
    choose_device,
    choose_dtype,
    import_backend,
    is_for_unsloth,
    load_with_unsloth,
    refuse_missing_weights,
    set_mode,
)
from rl.model.decoder import Decoder, unsupported_reason

# Hidden size below which, on a CPU, freed memory is kept for later tensors (`keep_freed_memory`).
REUSE_FREED_BELOW_HIDDEN = 512
# Settings of a saved LoRA that go beyond the matrices A and B on linear layers.
LORA_EXTRAS = ("use_dora", "bias", "lora_bias", "modules_to_save", "layers_to_transform", "target_parameters")


@dataclass
class Question:
    """A data row with its encoded prompt."""

    row: dict
    prompt_ids: list[int]
    completion_prefix: str = (
        ""  # beginning of the completion that the chat template adds to the prompt, such as "<think>"
    )


@dataclass
class Policy:
    """A model with its LoRA and tokenizer, and the settings for prompts and completions."""

    model: peft.PeftModel
    tokenizer: transformers.PreTrainedTokenizerBase
    device: torch.device
    dtype: torch.dtype
    eos_ids: frozenset[int]  # every token that ends a completion
    pad_id: int
    temperature: float
    system_prompt: str | None
    chat_template_kwargs: dict
    starts_from_adapter: bool  # training continues a saved LoRA, whose frozen copy "reference" is the reference
    decoder: Decoder | None  # the packed forward pass; None: the model's own forward is used
    uses_unsloth: bool = False  # loaded by Unsloth and trained through its forward
    fallback_reason: str | None = None  # why there is no decoder
    plain_head: bool = True  # logits are exactly the head's product with the last hidden state
    max_completion_length: int = 256  # tokens
    entropy_gradient: bool = False  # the loss has an entropy term

    @property
    def head(self) -> torch.nn.Module:
        return self.model.get_output_embeddings()

    @property
    def vocabulary(self) -> int:
        """The number of logits."""
        return self.head.out_features

    @property
    def context_length(self) -> int | None:
        """The model's maximum sequence length in tokens. Unsloth truncates inputs above its max_seq_length."""
        limits = [getattr(self.model.config.get_text_config(), "max_position_embeddings", None)]
        if self.uses_unsloth:
            limits.append(getattr(self.model, "max_seq_length", None))
        return min(filter(None, limits), default=None)

    @property
    def shares_prompts(self) -> bool:
        """Whether the update computes a prompt once for its group, which only `decoder` can do."""
        return self.decoder is not None and not self.uses_unsloth

    def trainable_parameters(self) -> list[torch.nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    @contextlib.contextmanager
    def training(self):
        """Context manager that puts the model into training mode, and into inference mode on exit."""
        set_mode(self.model, True, self.uses_unsloth)
        try:
            yield
        finally:
            set_mode(self.model, False, self.uses_unsloth)

    def reference(self):
        """Context manager that turns the model into the reference: without a LoRA, or with the one it started from."""
        return self.adapter("reference") if self.starts_from_adapter else self.model.disable_adapter()

    @contextlib.contextmanager
    def adapter(self, name: str):
        """Context manager that activates another LoRA in place of the one being trained."""
        self.model.set_adapter(name, inference_mode=True)
        try:
            yield
        finally:
            self.model.set_adapter("default")

    def render_prompt(self, prompt: str | list[dict]) -> str:
        """Apply the chat template to the system prompt and the prompt, and add the generation prompt.

        Without a chat template, return the text of the messages only.
        """
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if self.system_prompt:
            messages = [{"role": "system", "content": self.system_prompt}, *messages]
        if not self.tokenizer.chat_template:
            return "\n\n".join(message["content"] for message in messages)
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **self.chat_template_kwargs
        )

    def encode_prompt(self, prompt: str | list[dict]) -> list[int]:
        """Return the token ids of a rendered prompt. A chat template writes its own BOS token, so none is added."""
        text = self.render_prompt(prompt)
        return self.tokenizer.encode(text, add_special_tokens=not self.tokenizer.chat_template)

    def encode(self, rows: list[dict]) -> list[Question]:
        """Encode data rows. Raises ConfigError if a prompt cannot be encoded or leaves no room for a completion."""
        questions = []
        for row in rows:
            try:
                prompt_ids = self.encode_prompt(row["prompt"])
                completion_prefix = self.completion_prefix(row["prompt"])
            except (jinja2.TemplateError, ValueError, TypeError) as error:
                raise ConfigError(f"row {row['id']}: the prompt cannot be encoded: {first_line(error)}") from error
            if not prompt_ids:
                raise ConfigError(
                    f"row {row['id']}: the prompt has no tokens: check the tokenizer in {self.tokenizer.name_or_path}"
                )
            questions.append(Question(row, prompt_ids, completion_prefix))
        longest = max(questions, key=lambda question: len(question.prompt_ids))
        length = len(longest.prompt_ids)
        needed = length + self.max_completion_length
        if self.context_length and needed > self.context_length:
            raise ConfigError(
                f"max_completion_length: row {longest.row['id']} needs {needed} tokens (prompt {length}, completion "
                f"{self.max_completion_length}), but the model's context is {self.context_length}: lower the setting"
            )
        return questions

    def completion_prefix(self, prompt: str | list[dict]) -> str:
        """Return the start of the thinking that the chat template adds to a prompt: "<think>" and a newline, or ""."""
        text = self.render_prompt(prompt)
        return text[text.rindex("<think>") :] if text.rstrip().endswith("<think>") else ""

    def decode(self, completion_ids: list[int]) -> str:
        """Return the text of a completion without its end token. Thinking tags are kept, even as special tokens."""
        if completion_ids and completion_ids[-1] in self.eos_ids:
            completion_ids = completion_ids[:-1]
        return self.tokenizer.decode(completion_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def load_policy(config: Config) -> Policy:
    """Load model, tokenizer and LoRA. Raises ConfigError if the model or the adapter cannot be used."""
    check_folders(config)
    import_backend(config)
    device = choose_device(config)
    dtype = choose_dtype(config, device)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        model_config = AutoConfig.from_pretrained(config.model)
        uses_unsloth = config.backend == "unsloth" and is_for_unsloth(model_config)
        tokenizer = AutoTokenizer.from_pretrained(config.model)
        model = load_with_unsloth(config, dtype) if uses_unsloth else load_with_transformers(config, device, dtype)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        matches = difflib.get_close_matches(config.model, [] if Path(config.model).exists() else ["data/tiny"], n=1)
        reason = f"did you mean {matches[0]}?" if matches else first_line(error)
        place = "" if Path(config.model).exists() else " (it is not a local folder)"
        raise ConfigError(f"model: {config.model} cannot be loaded{place}: {reason}") from error
    config.backend = "unsloth" if uses_unsloth else "transformers"
    if device.type == "cpu":
        keep_freed_memory(model.config.get_text_config().hidden_size)
    eos_ids = find_eos_ids(tokenizer, model)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    # Drop the model's own sampling settings (such as top_k): they must affect neither roll-outs nor exports.
    model.generation_config = GenerationConfig(eos_token_id=sorted(eos_ids), pad_token_id=pad_id)

    torch.manual_seed(config.seed)  # for the random initialization of the LoRA
    if config.adapter:
        model = load_adapter(model, config)
    elif uses_unsloth:
        model = add_unsloth_lora(model, config, lora_settings(config, LINEAR_LAYERS))
    else:
        model = peft.get_peft_model(model, lora_settings(config))
    make_deterministic(model)
    set_mode(model, False, uses_unsloth)
    fallback_reason = unsupported_reason(model)
    return Policy(
        model=model,
        tokenizer=tokenizer,
        device=device,
        dtype=dtype,
        eos_ids=eos_ids,
        pad_id=pad_id,
        temperature=config.temperature,
        system_prompt=config.system_prompt,
        chat_template_kwargs=config.chat_template_kwargs,
        max_completion_length=config.max_completion_length,
        starts_from_adapter=config.adapter is not None,
        decoder=None if fallback_reason else Decoder(model),
        uses_unsloth=uses_unsloth,
        fallback_reason=fallback_reason,
        plain_head=not fallback_reason or has_plain_head(model),
        entropy_gradient=config.entropy_coef > 0,
    )


def check_folders(config: Config) -> None:
    """Raise ConfigError if `model` is a folder without a model, or if `adapter` is not a folder with a LoRA."""
    if Path(config.model).is_dir() and not (Path(config.model) / "config.json").is_file():
        raise ConfigError(f"model: the folder {config.model} has no config.json, so it is not a model")
    if config.adapter and not (Path(config.adapter) / "adapter_config.json").is_file():
        raise ConfigError(
            f"adapter: {config.adapter} is not a saved LoRA: it has no adapter_config.json "
            "(use a folder such as runs/NAME/checkpoints/step_000045)"
        )


def load_with_transformers(config: Config, device: torch.device, dtype: torch.dtype):
    """Load the base model and freeze it. Raises ConfigError if weights are missing."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    model, loading = AutoModelForCausalLM.from_pretrained(
        config.model,
        dtype=dtype,
        device_map={"": device},
        quantization_config=quantization if config.load_in_4bit else None,
        output_loading_info=True,
    )
    refuse_missing_weights(config.model, loading["missing_keys"])
    model.requires_grad_(False)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def lora_settings(config: Config, layers: str | list[str] = "all-linear") -> peft.LoraConfig:
    return peft.LoraConfig(r=config.lora_r, lora_alpha=config.lora_alpha, target_modules=layers, task_type="CAUSAL_LM")


def make_deterministic(model) -> None:
    """Disable everything that makes two forward passes differ: the probability ratio of the first update must be 1."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):  # applied as a function
                setattr(module, name, 0.0)
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # On CPUs with AVX512-BF16, bitsandbytes repacks the weights permanently in the first forward without
            # gradients (an evaluation), and from then on returns no gradient for its input.
            module.support_avx512bf16_for_cpu = False


def load_adapter(model, config: Config) -> peft.PeftModel:
    """Load a saved LoRA, and its frozen copy as the reference. Raises ConfigError if it does not fit the model."""
    folder = Path(config.adapter)
    try:
        if config.backend == "unsloth":
            saved = peft.PeftConfig.from_pretrained(folder)
            if extras := [name for name in LORA_EXTRAS if getattr(saved, name, None) not in (None, False, "none")]:
                raise ValueError(f"not a plain LoRA ({', '.join(extras)}), set backend to transformers")
            model = add_unsloth_lora(model, config, saved)
        else:
            model = peft.PeftModel.from_pretrained(model, folder, is_trainable=True)
        model.load_adapter(folder, "reference", is_trainable=False)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"adapter: {folder} does not fit {config.model}: {first_line(error)}") from error
    restore_adapter(model, folder)
    model.set_adapter("default")
    return model


def restore_adapter(model: peft.PeftModel, folder: Path) -> None:
    """Load saved weights into the LoRA being trained. Raises ConfigError if they are damaged or have other shapes."""
    try:
        weights = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"adapter: {folder} cannot be read: {first_line(error)}") from error
    expected = peft.get_peft_model_state_dict(model, adapter_name="default")
    if {name: w.shape for name, w in weights.items()} != {name: w.shape for name, w in expected.items()}:
        raise ConfigError(f"adapter: {folder} does not fit {model.config.name_or_path}: its LoRA has different shapes")
    peft.set_peft_model_state_dict(model, weights, adapter_name="default")


def keep_freed_memory(hidden_size: int) -> None:
    """Set the size up to which glibc keeps freed tensors for reuse. Has no effect on other systems.

    Small models: 32 MB, because returning memory to Linux and getting it back costs a seventh of the step.
    Larger models: 1 MB. That costs up to a tenth of the step, but kept blocks would fragment and be a third of the peak.
    """
    m_trim_threshold, m_mmap_threshold = -1, -3
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(m_mmap_threshold, (32 if hidden_size < REUSE_FREED_BELOW_HIDDEN else 1) * 2**20)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


@torch.no_grad()
def has_plain_head(model) -> bool:
    """Return whether the logits are the head's product with the last hidden state. Some models cap or scale them."""
    ids = torch.arange(1, 9, device=model.device)[None]
    hidden = model.get_base_model().get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    return torch.allclose(
        model.get_output_embeddings()(hidden), model(input_ids=ids, use_cache=False).logits, rtol=1e-3
    )


def find_eos_ids(tokenizer, model) -> frozenset[int]:
    """Return the end-of-sequence tokens of tokenizer, model and generation_config, and the end-of-turn token.

    The last one is needed for base models such as Qwen3-4B-Base: none of the three sources lists the <|im_end|> of its
    chat template, so the model would continue after it up to the maximum length.
    """
    ids = {find_end_of_turn(tokenizer)}
    for source in (tokenizer, model.config, model.config.get_text_config(), model.generation_config):
        eos = getattr(source, "eos_token_id", None)
        ids.update(eos if isinstance(eos, (list, tuple)) else [eos])
    ids.discard(None)
    if not ids:
        raise ConfigError("the model has no end-of-sequence token: set eos_token in its tokenizer_config.json")
    return frozenset(ids)


def find_end_of_turn(tokenizer) -> int | None:
    """Return the special token that the chat template puts directly after an answer, or None."""
    if not tokenizer.chat_template:
        return None
    answer = "xyzzy"
    try:
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:  # a template may raise anything; encoding the prompts will report it
        return None
    ids = tokenizer(text.rpartition(answer)[2].strip(), add_special_tokens=False).input_ids
    added_tokens = tokenizer.added_tokens_decoder
    return ids[0] if ids and ids[0] in added_tokens and added_tokens[ids[0]].special else None


def save_adapter(policy: Policy, folder: Path) -> None:
    """Save LoRA and tokenizer in the format of peft."""
    policy.model.save_pretrained(folder, selected_adapters=["default"])
    policy.tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def reloaded_adapter(policy: Policy, folder: Path):
    """Context manager that activates the LoRA saved in `folder`, read from disk."""
    policy.model.load_adapter(folder, "reloaded", is_trainable=False)
    try:
        with policy.adapter("reloaded"):
            yield
    finally:
        policy.model.delete_adapter("reloaded")
