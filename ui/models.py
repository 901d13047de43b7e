"""The base model and the LoRA adapters of checkpoints that answer questions on the page.

One base model is loaded at a time. All sides share its weights: each decode step runs with the side's own adapter
active, or with none for the base. Two settings of a run are ignored: its backend (transformers loads the model, our
engine generates) and the adapter that it may have started from (the base is the model without any LoRA).
"""

import contextlib
import dataclasses
import gc
import itertools
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError

from rl.config import Config, ConfigError, RunError
from rl.fit.shapes import find_shape
from rl.model.engine import Engine
from rl.model.hf_generate import HFGenerate
from rl.model.oom import KEEP_FREED_BELOW_HIDDEN
from rl.model.policy import load_policy
from rl.model.sampling import Sampling
from rl.run.reader import Runs
from ui.page import UiError
from ui.turns import Turn

MAX_ROWS = 64  # completions generated at the same time
MAX_ADAPTERS = 6  # checkpoints that stay loaded with the base model
MAX_CPU_PARAMETERS = 1e9  # largest model that may run on the CPU while a run trains on the GPU


class Models:
    """The loaded base model and its adapters. Not thread-safe."""

    def __init__(self, runs: Runs):
        self.runs = runs
        self.policy = None
        self.base_key: tuple | None = None  # identifies the loaded base model
        self.adapters: dict[tuple, str] = {}  # (weights file, mtime) -> adapter name, least recently used first
        self.active: str | None = "default"  # the active adapter
        self.counter = itertools.count(1)
        self.default_threads = torch.get_num_threads()

    # --- sides

    def settings(self, run: str | None) -> tuple[Config, tuple]:
        """Return the settings for loading a run's base model (None: the bundled model), and a key of that model."""
        config = self.runs.get(run).config if run else Config()
        device = self.choose_device(config)
        dtype = "auto" if device == "cpu" and config.device != "cpu" else config.dtype
        fixed = {
            "adapter": None,
            "backend": "transformers",
            "optim": "adamw_torch",
            "gradient_checkpointing": False,
            "rollout": "local",
        }
        config = dataclasses.replace(config, device=device, dtype=dtype, **fixed)
        return config, (config.model, config.load_in_4bit, config.dtype, config.device)

    def choose_device(self, config: Config) -> str:
        """Return "cpu" or "cuda". Raise UiError if a run trains on the GPU and the model is too large for the CPU."""
        if config.device == "cpu" or not torch.cuda.is_available():
            return "cpu"
        run = self.run_on_gpu()
        if run and find_shape(config.model).parameters > MAX_CPU_PARAMETERS:
            raise UiError(
                f"{run} is training on the GPU, and {config.model} is too large to run on the CPU. Wait until the run "
                "ends, or stop it on the Watch page (it saves a checkpoint first)."
            )
        return "cpu" if run else "cuda"

    def run_on_gpu(self) -> str | None:
        """Return the name of a run that is training on the GPU, if any."""
        for name in self.runs.running():
            with contextlib.suppress(RunError, ConfigError, OSError):
                if self.runs.get(name).config.device != "cpu":
                    return name
        return None

    @torch.no_grad()
    def start_answer(self, turn: Turn, in_use: set[str | None]) -> None:
        """Load the adapter of a side and prepare generation. in_use: adapters that must stay loaded."""
        request = turn.request
        config = turn.config
        policy = dataclasses.replace(
            self.policy,
            system_prompt=request.system_prompt or config.system_prompt,
            chat_template_kwargs=config.chat_template_kwargs,
        )
        turn.adapter = self.get_adapter(*turn.side, in_use) if turn.side else None
        prompts = [policy.encode_prompt(messages) for messages in turn.conversations]
        longest = max(map(len, prompts))
        room = (policy.context_length or 2**31) - longest
        if room <= 0:
            raise UiError(
                f"The chat with this question has {longest:,} tokens, which leaves no room for an answer: the "
                f"context length of the model is {policy.context_length:,}. Start a new chat or shorten the question."
            )
        self.activate(turn.adapter)  # before Engine(), which may fold the adapter into its scratch weights
        sampling = Sampling(request.temperature, top_p=request.top_p)
        generator = torch.Generator(policy.device).manual_seed(request.seed)
        limits = request.samples, min(request.max_tokens, room), sampling, generator, MAX_ROWS
        turn.engine = Engine(policy, prompts, *limits) if policy.decoder else None  # HFGenerate does not stream
        steps = turn.engine.steps() if turn.engine else HFGenerate(policy, prompts, *limits).run()
        turn.steps = self.with_adapter(turn.adapter, steps)
        turn.policy = policy
        turn.prompt = policy.render_prompt(turn.conversations[0])
        turn.prefixes = [policy.completion_prefix(messages) for messages in turn.conversations]

    def with_adapter(self, adapter: str | None, steps: Iterator) -> Iterator:
        """Activate the adapter of a side before each of its decode steps."""
        while True:
            self.activate(adapter)
            with torch.no_grad():
                finished = next(steps)
            yield finished

    # --- base model

    def load(self, config: Config, base_key: tuple) -> None:
        self.unload()
        self.policy = load_policy(config)
        self.base_key = base_key
        # A second thread slows a small model down, by a factor of 20 if a run trains on the same cores.
        is_small = self.policy.hidden_size < KEEP_FREED_BELOW_HIDDEN
        torch.set_num_threads(1 if is_small else self.default_threads)

    def unload(self) -> None:
        self.policy = self.base_key = None
        self.adapters = {}
        self.active = "default"
        self.free_memory()

    def free_memory(self) -> None:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def release_gpu(self) -> None:
        """Unload the model from the GPU if a run trains there, so that an idle page does not hold memory."""
        if self.policy and self.policy.device.type == "cuda" and self.run_on_gpu():
            self.unload()

    # --- adapters

    def activate(self, adapter: str | None) -> None:
        """Activate an adapter; None disables all adapters."""
        if adapter == self.active:
            return
        model = self.policy.model
        self.active = adapter
        if adapter is None:
            model.base_model.disable_adapter_layers()
        else:
            model.base_model.enable_adapter_layers()
            model.set_adapter(adapter, inference_mode=True)

    def get_adapter(self, name: str, checkpoint: str, in_use: set[str | None]) -> str:
        """Return the name of a checkpoint's adapter in the model, loaded if necessary. Raise UiError or ConfigError."""
        run = self.runs.get(name)
        if checkpoint not in (names := run.checkpoints()):
            raise UiError(f"{name} has no checkpoint {checkpoint!r}. It has {', '.join(names) or 'none yet'}.")
        weights = run.file(f"checkpoints/{checkpoint}/adapter_model.safetensors")
        if not weights.is_file():
            raise ConfigError(f"adapter: {weights.parent} has no adapter_model.safetensors: choose another checkpoint")
        key = weights, weights.stat().st_mtime_ns
        adapter = self.adapters.pop(key, None) or self.load_adapter(weights.parent, in_use)
        self.adapters[key] = adapter
        return adapter

    def load_adapter(self, folder: Path, in_use: set[str | None]) -> str:
        """Load an adapter and drop the least recently used ones. Raise ConfigError if it does not fit the model."""
        model = self.policy.model
        name = f"checkpoint{next(self.counter)}"
        self.activate("default")
        for key, old_name in list(self.adapters.items()):
            if len(self.adapters) >= MAX_ADAPTERS and old_name not in in_use:
                model.delete_adapter(self.adapters.pop(key))
        try:
            result = model.load_adapter(folder, name, torch_device=str(self.policy.device))
            if result.missing_keys or result.unexpected_keys:
                raise ValueError("the parameter names do not match the model")
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            if name in model.peft_config:
                model.delete_adapter(name)
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise ConfigError(f"adapter: {folder} does not fit {model.config.name_or_path}: {reason}") from error
        return name
