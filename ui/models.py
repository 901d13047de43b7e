"""The base model that answers the questions of the page, and the LoRAs of the checkpoints beside it.

One base is loaded at a time. The base and the checkpoints share its weights: every decode step of a side is made with its own
LoRA switched on, or with none for the base. Two settings of a run are not used: its backend (transformers loads the base, the
engine is this project's) and the adapter that it may have started from (the base is the model without a LoRA).
"""

import contextlib
import dataclasses
import gc
import itertools
from pathlib import Path

import torch
from safetensors import SafetensorError

from rl.config import Config, ConfigError
from rl.fit.shapes import find_shape
from rl.model.engine import Engine
from rl.model.hf_generate import HFGenerate
from rl.model.policy import REUSE_FREED_BELOW_HIDDEN, load_policy
from rl.model.sampling import Sampling
from ui.runs import Runs, UiError
from ui.turns import Turn

ADAPTERS = 6  # checkpoints that stay loaded beside the base
SMALL = 1e9  # parameters of a model that may answer from the CPU while a run holds the card


class Models:
    """Used by one thread."""

    def __init__(self, runs: Runs):
        self.runs = runs
        self.policy = None
        self.base: tuple | None = None  # identifies what is loaded
        self.adapters: dict[tuple, str] = {}  # names in the model, the one that was used last at the end
        self.active: str | None = "default"  # the adapter that is switched on
        self.numbers = itertools.count(1)
        self.threads = torch.get_num_threads()

    # --- a side

    def settings(self, run: str | None) -> tuple[Config, tuple]:
        """The settings with which the base of a run is loaded (None: the bundled model), and what identifies this base."""
        config = self.runs.get(run).config if run else Config()
        device = self.device(config)
        dtype = "auto" if device == "cpu" and config.device != "cpu" else config.dtype
        plain = {"adapter": None, "backend": "transformers", "optim": "adamw_torch", "gradient_checkpointing": False}
        config = dataclasses.replace(config, device=device, dtype=dtype, **plain)
        return config, (config.model, config.load_in_4bit, config.dtype, config.device)

    def device(self, config: Config) -> str:
        """cpu or cuda. Raises UiError if a run holds the card and the model is too large for the CPU."""
        if config.device == "cpu" or not torch.cuda.is_available():
            return "cpu"
        run = self.run_on_card()
        if run and find_shape(config.model).parameters > SMALL:
            raise UiError(
                f"{run} is training on the card, and {config.model} is too large to answer from the CPU. Wait for its end, or "
                "stop it in the tab Watch: it saves."
            )
        return "cpu" if run else "cuda"

    def run_on_card(self) -> str | None:
        for name in self.runs.running():
            with contextlib.suppress(UiError, ConfigError, OSError):
                if self.runs.get(name).config.device != "cpu":
                    return name
        return None

    @torch.no_grad()
    def put_question(self, turn: Turn, in_use: set[str]) -> None:
        """Load the LoRA of a side and prepare its answer. in_use: adapters that have to stay loaded."""
        ask, config = turn.ask, turn.config
        policy = dataclasses.replace(
            self.policy, system_prompt=config.system_prompt, chat_template_kwargs=config.chat_template_kwargs
        )
        turn.adapter = self.adapter(*turn.side, in_use) if turn.side else None
        prompt = policy.encode_prompt(turn.messages)
        room = (policy.context_length or 2**31) - len(prompt)
        if room <= 0:
            raise UiError(
                f"The question with the chat so far has {len(prompt):,} tokens, and the model reads {policy.context_length:,} "
                "at most, with its answer. Start a new chat, or shorten the question."
            )
        self.switch(turn.adapter)  # first: the engine may fold it into scratch weights of its own
        sampling = Sampling(ask.temperature, top_p=ask.top_p)
        generator = torch.Generator(policy.device).manual_seed(ask.seed)
        rollout = policy, [prompt], ask.samples, min(ask.max_tokens, room), sampling, generator, ask.samples
        turn.engine = Engine(*rollout) if policy.decoder else None  # without an engine the answer comes as a whole
        turn.steps = turn.engine.steps() if turn.engine else HFGenerate(*rollout).run()
        turn.policy = policy
        turn.completion_prefix = policy.completion_prefix(turn.messages)

    @torch.no_grad()
    def step(self, turn: Turn) -> None:
        """One decode step; on CUDA a few."""
        self.switch(turn.adapter)
        turn.ended |= next(turn.steps)

    # --- the base

    def load(self, config: Config, base: tuple) -> None:
        self.unload()
        self.policy = load_policy(config)
        self.base = base
        # A second thread slows a small model down, twenty times if a run trains on the same cores.
        is_small = self.policy.model.config.get_text_config().hidden_size < REUSE_FREED_BELOW_HIDDEN
        torch.set_num_threads(1 if is_small else self.threads)

    def unload(self) -> None:
        self.policy = self.base = None
        self.adapters = {}
        self.active = "default"
        self.free()

    def free(self) -> None:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def make_way(self) -> None:
        """Unload if a run trains on the card: it gets the memory that an idle page holds."""
        if self.policy and self.policy.device.type == "cuda" and self.run_on_card():
            self.unload()

    # --- the LoRAs

    def switch(self, adapter: str | None) -> None:
        """Switch this LoRA on; None: all off."""
        if adapter == self.active:
            return
        model = self.policy.model
        self.active = adapter
        if adapter is None:
            model.base_model.disable_adapter_layers()
        else:
            model.base_model.enable_adapter_layers()
            model.set_adapter(adapter, inference_mode=True)

    def adapter(self, run: str, checkpoint: str, in_use: set[str]) -> str:
        """The name in the model of the LoRA of a checkpoint, loaded if necessary. Raises UiError or ConfigError."""
        found = self.runs.get(run)
        if checkpoint not in (names := found.checkpoints()):
            raise UiError(f"{run} has no checkpoint {checkpoint!r}. It has {', '.join(names) or 'none yet'}.")
        weights = found.file(f"checkpoints/{checkpoint}/adapter_model.safetensors")
        if not weights.is_file():
            raise ConfigError(f"adapter: {weights.parent} has no adapter_model.safetensors: choose another checkpoint")
        key = weights, weights.stat().st_mtime_ns
        name = self.adapters.pop(key, None) or self.load_adapter(weights.parent, in_use)
        self.adapters[key] = name
        return name

    def load_adapter(self, folder: Path, in_use: set[str]) -> str:
        """Load a LoRA beside the others; if there are many, drop those that were not used for the longest time."""
        model = self.policy.model
        name = f"checkpoint{next(self.numbers)}"
        self.switch("default")
        for key, old in list(self.adapters.items()):
            if len(self.adapters) >= ADAPTERS and old not in in_use:
                model.delete_adapter(self.adapters.pop(key))
        try:
            result = model.load_adapter(folder, name, torch_device=str(self.policy.device))
            if result.missing_keys or result.unexpected_keys:
                raise ValueError("some of its matrices have no counterpart")
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            if name in model.peft_config:
                model.delete_adapter(name)
            why = " ".join(str(error).split())[:300] or type(error).__name__
            raise ConfigError(f"adapter: {folder} cannot be put on {model.config.name_or_path}: {why}") from error
        return name
