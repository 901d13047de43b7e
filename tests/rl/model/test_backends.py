"""The choice of the backend, and the call of Unsloth's forward. test_unsloth.py tests against the package itself."""

import builtins
import os
import sys
from types import SimpleNamespace

import pytest
import torch

from rl.config import Config, ConfigError
from rl.model import backends
from rl.model.backends import choose_backend, import_backend, unsloth_states


@pytest.fixture
def machine(monkeypatch):
    """Returns a function that simulates a machine: with a GPU or not, with bf16 or not, with Unsloth installed or not."""

    def pretend(gpu=True, unsloth=True, bf16=True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16)
        monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: object() if unsloth else None)

    return pretend


@pytest.mark.parametrize(
    "gpu, installed, settings, expected",
    [
        (True, True, {}, "unsloth"),
        (True, False, {}, "transformers"),
        (False, True, {}, "transformers"),
        (True, True, {"device": "cpu"}, "transformers"),
        (True, True, {"dtype": "float32"}, "transformers"),
        (True, True, {"backend": "transformers"}, "transformers"),
        (False, True, {"backend": "unsloth"}, "unsloth"),  # Unsloth has a fallback on a CPU
    ],
)
def test_chooses_backend(machine, gpu, installed, settings, expected):
    machine(gpu, installed)
    assert choose_backend(Config(**settings)) == expected


def test_refuses_unsloth_if_it_cannot_be_used(machine):
    machine(unsloth=False)
    with pytest.raises(ConfigError, match="^backend .*not installed.* requirements.txt"):
        choose_backend(Config(backend="unsloth"))
    machine()
    with pytest.raises(ConfigError, match="^backend .*bfloat16 or float16: set dtype"):
        choose_backend(Config(backend="unsloth", dtype="float32"))


@pytest.mark.parametrize("bf16, text", [(True, "cuda in bfloat16 by Unsloth"), (False, "cuda in float16 by Unsloth")])
def test_cards_without_bf16_compute_in_fp16(machine, bf16, text):
    machine(bf16=bf16)
    assert backends.describe_precision(Config()) == text


def test_falls_back_to_transformers_if_unsloth_cannot_be_imported(machine, monkeypatch):
    machine()
    imports = builtins.__import__

    def broken(name, *rest):
        if name == "unsloth":
            raise RuntimeError("no kernel image\nfor this device")
        return imports(name, *rest)

    monkeypatch.setattr(builtins, "__import__", broken)
    config = Config()
    assert "transformers: no kernel image" in import_backend(config)[-1]
    assert config.backend == "transformers" and "unsloth" not in sys.modules
    with pytest.raises(ConfigError, match="^backend: .*transformers: no kernel image$"):
        import_backend(Config(backend="unsloth"))


def test_does_not_import_unsloth_on_a_cpu():
    config = Config(device="cpu")
    assert import_backend(config) == [] and config.backend == "transformers" and "unsloth" not in sys.modules


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_calls_unsloths_forward_without_mask_and_labels(monkeypatch, training, gradient):
    """It returns states in place of logits, and checkpointing is off if no backward follows."""
    name = "UNSLOTH_RETURN_HIDDEN_STATES"
    calls = []
    monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(
        backends, "set_mode", lambda model, training, uses_unsloth: setattr(model, "training", training)
    )

    class Model:
        def __call__(self, **kwargs):
            calls.append((sorted(kwargs), kwargs["use_cache"], os.environ[name], self.training))
            return SimpleNamespace(logits="states")

    model = Model()
    model.training = training
    with torch.set_grad_enabled(gradient):
        ids = SimpleNamespace(device=torch.device("cuda"))
        assert unsloth_states(model, ids, torch.bfloat16) == "states"
    assert calls == [(["input_ids", "use_cache"], False, "1", training and gradient)]
    assert model.training == training and os.environ[name] == "0"


def test_max_seq_length_of_unsloth_limits_the_context(policy):
    context_length = policy.context_length
    policy.model.max_seq_length = 50
    assert policy.context_length == context_length  # transformers ignores max_seq_length
    policy.uses_unsloth = True
    assert policy.context_length == 50
