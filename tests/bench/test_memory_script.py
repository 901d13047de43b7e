"""bench/memory.py: random weights of a known shape, and predicted and measured memory from --probe."""

import json

import pytest

from bench import memory
from rl.config import Config


def test_random_model_has_several_eos_tokens(tmp_path):
    from rl.model.policy import load_policy

    folder = memory.make_random_model("qwen3-small", str(tmp_path), mean_length=64)
    policy = load_policy(Config(model=folder, device="cpu"))
    assert len(policy.eos_ids) == 1 + 512 // 64 and policy.tokenizer.eos_token_id in policy.eos_ids
    assert policy.decoder and policy.vocabulary == 512
    assert sorted(policy.model.generation_config.eos_token_id) == sorted(policy.eos_ids)


def test_every_model_has_a_shape():
    known = json.loads((memory.ROOT / "rl/fit/models.json").read_text())
    assert set(memory.ON_CPU) <= set(memory.SMALL_SHAPES) | set(memory.OTHER_SHAPES) and set(memory.ON_GPU) <= set(
        known
    )
    assert {len(shape) for shape in memory.SMALL_SHAPES.values()} == {len(memory.FIELDS)}


@pytest.mark.slow
def test_measures_predicted_and_actual_memory():
    predicted, measured = memory.measure("qwen3-small", memory.SHORT)
    assert 10 < predicted < 1000 and 10 < measured < 1000
