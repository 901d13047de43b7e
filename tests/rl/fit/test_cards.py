"""Predictions for a card: the memory of the update with Unsloth, the time of a run, and the known cards."""

import dataclasses
import importlib.util

import pytest

from rl.config import Config
from rl.fit.cards import CARDS, EFFICIENCY, Card, known_card, run_seconds, typical_card, update_flops
from rl.fit.dry_run import dry_run
from rl.fit.memory import predict, uses_unsloth
from rl.fit.shapes import find_shape

# --- the update with Unsloth


@pytest.mark.parametrize("installed", [True, False])
def test_predicts_which_backend_computes_the_update(installed, monkeypatch):
    """The choice of rl/model/backends.py. With gpu_memory, Unsloth is assumed to be installed."""
    qwen = find_shape("Qwen/Qwen3-0.6B")
    other = dataclasses.replace(find_shape("Qwen/Qwen3-0.6B"), uses_decoder=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    assert uses_unsloth(Config(), qwen, "cuda", "bfloat16") == installed
    assert uses_unsloth(Config(gpu_memory=8.0), qwen, "cuda", "float16")
    assert uses_unsloth(Config(backend="unsloth"), qwen, "cuda", "bfloat16")
    assert not uses_unsloth(Config(gpu_memory=8.0, backend="transformers"), qwen, "cuda", "bfloat16")
    assert not uses_unsloth(Config(gpu_memory=8.0), other, "cuda", "bfloat16")
    assert not uses_unsloth(Config(gpu_memory=8.0), qwen, "cuda", "float32")
    assert not uses_unsloth(Config(gpu_memory=8.0), qwen, "cpu", "bfloat16")


def test_update_memory_with_unsloth():
    """Qwen3-0.6B: H 1024, F 3072, 16 heads, 8 KV heads of size 128, 28 layers. 4,096 tokens, none shared, no mask."""
    shape = find_shape("Qwen/Qwen3-0.6B")
    tokens = 4096

    def update(**changes):
        settings = dict(max_tokens_per_micro_batch=tokens, gradient_checkpointing=True, backend="unsloth") | changes
        return predict(Config(**settings), shape, "cuda", "bfloat16", 100).update

    layer = 2 * tokens * (5 * 1024 + 4 * 2048 + 5 * 1024 + 4 * 3072)
    assert layer == 251_658_240
    matrix = 1024 * 3072 * 2
    inputs = 2 * tokens * 1024 * 2
    head = 12 * 2**24 + 3 * tokens * 1024 * 2
    assert update() == inputs + max(layer, head)
    assert update(load_in_4bit=True) == inputs + max(layer + matrix, head)
    more = 4 * tokens  # now a layer needs more than the head
    assert update(load_in_4bit=True, max_tokens_per_micro_batch=more) == 4 * (inputs + layer) + matrix
    assert update(gradient_checkpointing=False) == 28 * layer + head
    assert update(backend="transformers") > update()
    other_machine = predict(Config(gpu_memory=8.0, dry_run=True), shape, "cuda", "bfloat16", 100)
    assert other_machine.uses_unsloth
    assert other_machine.update == update(max_tokens_per_micro_batch=8192, gradient_checkpointing=False)


def test_prompts_are_not_shared_with_unsloth():
    config = Config(prompts_per_step=2, num_generations=4, max_completion_length=50)
    shape = find_shape("Qwen/Qwen3-0.6B")

    def tokens(**changes):
        return predict(dataclasses.replace(config, **changes), shape, "cuda", "bfloat16", 30).tokens

    assert tokens(backend="transformers") == 2 * 30 + 8 * 50
    assert tokens(backend="unsloth") == 8 * (30 + 50)
    assert tokens(backend="unsloth", max_tokens_per_micro_batch=1) == 30 + 50
    assert tokens(backend="unsloth", max_tokens_per_micro_batch=1, algorithm="dpo") == 2 * (30 + 50)
    assert tokens(backend="transformers", max_tokens_per_micro_batch=1, algorithm="dpo") == 30 + 2 * 50


# --- time: half of the roofline


def test_seconds_of_a_step_and_of_a_run():
    """One row of 100 tokens with infinite tflops: each of 100 decode steps reads the weights and half of the keys."""
    shape = find_shape("Qwen/Qwen3-0.6B")
    prompt = 50
    card = Card("a card", 8, 300, 1e9)
    config = Config(
        prompts_per_step=1,
        num_generations=1,
        max_completion_length=100,
        max_steps=10,
        eval_steps=4,
        eval_questions=1,
        algorithm="reinforce",
        baseline="running",
        backend="unsloth",
        load_in_4bit=True,
    )
    prediction = predict(config, shape, "cuda", "bfloat16", prompt)
    assert prediction.folds_lora
    weights = shape.linear_parameters
    head = 151936 * 1024
    half = 0.5  # mean share of the completion that has been generated
    read = 2 * weights + 2 * head + half * 114_688 * (prompt + 25)
    step, run = run_seconds(config, shape, card, prompt, prediction)
    assert step == pytest.approx(100 * read / 300e9 / EFFICIENCY, rel=1e-6)
    assert run == pytest.approx(
        10 * step + 4 * 2 * step, rel=1e-6
    )  # evaluations after 0, 4, 8 and 10, two roll-outs each
    prediction.folds_lora = False  # 4-bit weights are read, written in 16 bits, and read again
    step, _ = run_seconds(config, shape, card, prompt, prediction)
    assert step == pytest.approx(100 * (read + (4.516 - 2) * weights) / 300e9 / EFFICIENCY, rel=1e-6)
    shortest, _ = run_seconds(config, shape, dataclasses.replace(card, bandwidth=1e9), prompt, prediction)
    assert shortest == pytest.approx(100 * 0.002, rel=1e-3)  # minimum time of a decode step on any card


def test_flops_of_an_update():
    shape = find_shape("Qwen/Qwen3-0.6B")
    prompt = 50
    config = Config(prompts_per_step=2, num_generations=4, max_completion_length=100, backend="unsloth")

    def flops(**changes):
        changed = dataclasses.replace(config, **changes)
        return update_flops(changed, shape, prompt, predict(changed, shape, "cuda", "bfloat16", prompt))

    n = shape.linear_parameters
    head = 151936 * 1024
    body = 8 * (50 + 50)  # tokens; completions have half of the maximum length
    completions = 8 * 50
    assert flops() == 4 * n * body + 6 * head * completions
    assert flops(gradient_checkpointing=True) == 6 * n * body + 6 * head * completions
    assert flops(backend="transformers") == 4 * n * (2 * 50 + 8 * 50) + 6 * head * completions
    forward = 2 * n * body + 2 * head * completions
    assert flops(beta=0.1) == flops() + forward
    assert flops(num_mini_batches=2) == flops() + forward / 2
    assert flops(num_iterations=2) == 2 * flops()
    assert flops(algorithm="ppo") == flops() + 4 * n * body + 2 * n * body
    assert flops(algorithm="ppo", beta=0.1) == flops(algorithm="ppo") + 2 * forward


def test_faster_cards_take_less_time():
    config = Config(backend="unsloth", load_in_4bit=True)
    shape = find_shape("Qwen/Qwen3-1.7B")
    prediction = predict(config, shape, "cuda", "bfloat16", 100)
    cards = [Card("", 8, bandwidth, tflops) for bandwidth, tflops in ((100, 10), (200, 10), (200, 20))]
    times = [run_seconds(config, shape, card, 100, prediction)[1] for card in cards]
    assert times == sorted(times, reverse=True) and len(set(times)) == 3


# --- cards


def test_finds_cards_by_name_and_by_memory():
    assert known_card("NVIDIA GeForce RTX 4060", 8).gigabytes == 8
    assert known_card("NVIDIA GeForce RTX 4060 Ti", 15.6).tflops == 44.1
    assert known_card("NVIDIA GeForce RTX 3050", 5.8).gigabytes == 6
    assert known_card("NVIDIA GeForce RTX 3050", 7.9).gigabytes == 8
    assert known_card("Tesla T4", 14.6).name == "T4" and not known_card("Tesla T4", 14.6).bf16
    for other in ("NVIDIA GeForce RTX 4060 Laptop GPU", "NVIDIA GeForce RTX 3060 Ti", "NVIDIA H200"):
        assert known_card(other, 8) is None
    names = {gb: typical_card(gb, bf16=True).name for gb in (4, 6, 8, 12, 16, 24, 80)}
    assert list(names.values()) == [f"RTX {n}" for n in ("3050", "3050", "4060", "3060", "4060 Ti", "3090", "4090")]
    assert [typical_card(gb, bf16=False).name for gb in (6, 15, 80)] == ["RTX 2060", "T4", "T4"]
    assert len({(card.name, card.gigabytes) for card in CARDS}) == len(CARDS)


def test_no_time_is_modelled_for_a_cpu():
    assert "modelled" not in dry_run(Config(device="cpu"), 100)
    assert "minutes modelled for RTX 3060" in dry_run(Config(gpu_memory=12.0), 100)
