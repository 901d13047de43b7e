"""Which backend a run takes, and how Unsloth's forward is called; what the package itself computes is in test_unsloth.py."""

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
    """Pretends that there is a GPU, with or without bf16, and that Unsloth is installed, or not."""

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
        (False, True, {"backend": "unsloth"}, "unsloth"),  # its fallback on a CPU
    ],
)
def test_the_backend_chosen(machine, gpu, installed, settings, expected):
    machine(gpu, installed)
    assert choose_backend(Config(**settings)) == expected


def test_unsloth_by_force_where_it_cannot_be(machine):
    machine(unsloth=False)
    with pytest.raises(
        ConfigError, match="backend is unsloth, which is not installed: pip install -r requirements.txt"
    ):
        choose_backend(Config(backend="unsloth"))
    machine()
    with pytest.raises(ConfigError, match="bfloat16 or float16: set dtype to auto"):
        choose_backend(Config(backend="unsloth", dtype="float32"))


@pytest.mark.parametrize("bf16, text", [(True, "cuda in bfloat16 by Unsloth"), (False, "cuda in float16 by Unsloth")])
def test_cards_without_bf16_compute_in_fp16(machine, bf16, text):
    machine(bf16=bf16)
    assert backends.describe_precision(Config()) == text


def test_an_unsloth_that_does_not_import_is_done_without(machine, monkeypatch):
    machine()
    imports = builtins.__import__

    def broken(name, *rest):
        if name == "unsloth":
            raise RuntimeError("no kernel image\nfor this device")
        return imports(name, *rest)

    monkeypatch.setattr(builtins, "__import__", broken)
    config = Config()
    assert import_backend(config)[-1] == "Unsloth cannot be imported, plain transformers is used: no kernel image"
    assert config.backend == "transformers" and "unsloth" not in sys.modules
    with pytest.raises(
        ConfigError, match="backend: Unsloth cannot be imported, set it to transformers: no kernel image"
    ):
        import_backend(Config(backend="unsloth"))


def test_nothing_is_imported_on_a_cpu():
    config = Config(device="cpu")
    assert import_backend(config) == [] and config.backend == "transformers" and "unsloth" not in sys.modules


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_how_unsloths_forward_is_called(monkeypatch, training, gradient):
    """No mask, no labels, states in place of logits; its checkpointing is off where no backward will come."""
    name, seen = "UNSLOTH_RETURN_HIDDEN_STATES", []
    monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(
        backends, "set_mode", lambda model, training, uses_unsloth: setattr(model, "training", training)
    )

    class Model:
        def __call__(self, **given):
            seen.append((sorted(given), given["use_cache"], os.environ[name], self.training))
            return SimpleNamespace(logits="states")

    model = Model()
    model.training = training
    with torch.set_grad_enabled(gradient):
        ids = SimpleNamespace(device=torch.device("cuda"))
        assert unsloth_states(model, ids, torch.bfloat16) == "states"
    assert seen == [(["input_ids", "use_cache"], False, "1", training and gradient)]
    assert model.training == training and os.environ[name] == "0"


def test_unsloth_cuts_what_is_longer_than_its_max_seq_length(policy):
    own = policy.context_length
    policy.model.max_seq_length = 50
    assert policy.context_length == own  # of no meaning for transformers
    policy.uses_unsloth = True
    assert policy.context_length == 50
