"""What a run takes on a card: its update by Unsloth, its time, and the cards that are known."""

import dataclasses
import importlib.util

import pytest

from rl.config import Config
from rl.fit.cards import CARDS, EFFICIENCY, Card, known_card, run_seconds, update_flops, typical_card
from rl.fit.dry_run import dry_run
from rl.fit.memory import predict, uses_unsloth
from rl.fit.shapes import find_shape

# --- the update by Unsloth


@pytest.mark.parametrize("installed", [True, False])
def test_who_makes_the_update(installed, monkeypatch):
    """As rl/model/backends.py chooses; for a card that is elsewhere Unsloth counts as installed."""
    qwen, other = find_shape("Qwen/Qwen3-0.6B"), dataclasses.replace(find_shape("Qwen/Qwen3-0.6B"), uses_decoder=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    assert uses_unsloth(Config(), qwen, "cuda", "bfloat16") == installed
    assert uses_unsloth(Config(gpu_memory=8.0), qwen, "cuda", "float16")
    assert uses_unsloth(Config(backend="unsloth"), qwen, "cuda", "bfloat16")
    assert not uses_unsloth(Config(gpu_memory=8.0, backend="transformers"), qwen, "cuda", "bfloat16")
    assert not uses_unsloth(Config(gpu_memory=8.0), other, "cuda", "bfloat16")
    assert not uses_unsloth(Config(gpu_memory=8.0), qwen, "cuda", "float32")
    assert not uses_unsloth(Config(gpu_memory=8.0), qwen, "cpu", "bfloat16")


def test_the_update_by_unsloth():
    """Qwen3-0.6B: H 1024, F 3072, 16 heads and 8 for keys of 128, 28 layers. 4,096 tokens, none shared, no mask."""
    shape, tokens = find_shape("Qwen/Qwen3-0.6B"), 4096

    def update(**changes):
        settings = dict(max_tokens_per_micro_batch=tokens, gradient_checkpointing=True, backend="unsloth") | changes
        return predict(Config(**settings), shape, "cuda", "bfloat16", 100).update

    layer = 2 * tokens * (5 * 1024 + 4 * 2048 + 5 * 1024 + 4 * 3072)
    assert layer == 251_658_240
    matrix, inputs, head = 1024 * 3072 * 2, 2 * tokens * 1024 * 2, 5 * 4 * 2**24 + 3 * tokens * 1024 * 2
    assert update() == inputs + max(layer, head)
    assert update(load_in_4bit=True) == inputs + max(layer + matrix, head)
    longer = 4 * tokens  # now a layer takes more than the head
    assert update(load_in_4bit=True, max_tokens_per_micro_batch=longer) == 4 * (inputs + layer) + matrix
    assert update(gradient_checkpointing=False) == 28 * layer + head
    assert update(backend="transformers") > update()
    elsewhere = predict(Config(gpu_memory=8.0, dry_run=True), shape, "cuda", "bfloat16", 100)
    assert elsewhere.uses_unsloth
    assert elsewhere.update == update(max_tokens_per_micro_batch=8192, gradient_checkpointing=False)


def test_every_completion_has_its_prompt_with_unsloth():
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
    """One row of 100 tokens by a card that computes at once: 100 decode steps, each reads the weights and half the keys."""
    shape, prompt = find_shape("Qwen/Qwen3-0.6B"), 50
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
    found = predict(config, shape, "cuda", "bfloat16", prompt)
    assert found.folds_lora
    weights, head, half = shape.linear_parameters, 151936 * 1024, 0.5  # of the row's completion is there on average
    read = 2 * weights + 2 * head + half * 114_688 * (prompt + 25)
    step, whole = run_seconds(config, shape, card, prompt, found)
    assert step == pytest.approx(100 * read / 300e9 / EFFICIENCY, rel=1e-6)
    assert whole == pytest.approx(10 * step + 4 * 2 * step, rel=1e-6)  # evaluated after 0, 4, 8 and 10, in two ways
    found.folds_lora = False  # 4-bit weights are read, written out in 16 bits, and read again
    step, _ = run_seconds(config, shape, card, prompt, found)
    assert step == pytest.approx(100 * (read + (4.516 - 2) * weights) / 300e9 / EFFICIENCY, rel=1e-6)
    quick, _ = run_seconds(config, shape, dataclasses.replace(card, bandwidth=1e9), prompt, found)
    assert quick == pytest.approx(100 * 0.002, rel=1e-3)  # a step takes as long for whatever card


def test_arithmetic_of_an_update():
    shape, prompt = find_shape("Qwen/Qwen3-0.6B"), 50
    config = Config(prompts_per_step=2, num_generations=4, max_completion_length=100, backend="unsloth")

    def flops(**changes):
        changed = dataclasses.replace(config, **changes)
        return update_flops(changed, shape, prompt, predict(changed, shape, "cuda", "bfloat16", prompt))

    n, head = shape.linear_parameters, 151936 * 1024
    body, completions = 8 * (50 + 50), 8 * 50  # tokens; of a completion half its greatest length
    assert flops() == 4 * n * body + 6 * head * completions
    assert flops(gradient_checkpointing=True) == 6 * n * body + 6 * head * completions
    assert flops(backend="transformers") == 4 * n * (2 * 50 + 8 * 50) + 6 * head * completions
    a_pass = 2 * n * body + 2 * head * completions
    assert flops(beta=0.1) == flops() + a_pass
    assert flops(num_mini_batches=2) == flops() + a_pass / 2
    assert flops(num_iterations=2) == 2 * flops()
    assert flops(algorithm="ppo") == flops() + 4 * n * body + 2 * n * body
    assert flops(algorithm="ppo", beta=0.1) == flops(algorithm="ppo") + 2 * a_pass


def test_a_better_card_takes_less():
    config, shape = Config(backend="unsloth", load_in_4bit=True), find_shape("Qwen/Qwen3-1.7B")
    found = predict(config, shape, "cuda", "bfloat16", 100)
    cards = [Card("", 8, bandwidth, tflops) for bandwidth, tflops in ((100, 10), (200, 10), (200, 20))]
    times = [run_seconds(config, shape, card, 100, found)[1] for card in cards]
    assert times == sorted(times, reverse=True) and len(set(times)) == 3


# --- cards


def test_cards_by_name_and_by_memory():
    assert known_card("NVIDIA GeForce RTX 4060", 8).gigabytes == 8
    assert known_card("NVIDIA GeForce RTX 4060 Ti", 15.6).tflops == 44.1
    assert known_card("NVIDIA GeForce RTX 3050", 5.8).gigabytes == 6
    assert known_card("NVIDIA GeForce RTX 3050", 7.9).gigabytes == 8
    assert known_card("Tesla T4", 14.6).name == "T4" and not known_card("Tesla T4", 14.6).bf16
    for other in ("NVIDIA GeForce RTX 4060 Laptop GPU", "NVIDIA GeForce RTX 3060 Ti", "NVIDIA H200"):
        assert known_card(other, 8) is None
    named = {gb: typical_card(gb, bf16=True).name for gb in (4, 6, 8, 12, 16, 24, 80)}
    assert list(named.values()) == [f"RTX {n}" for n in ("3050", "3050", "4060", "3060", "4060 Ti", "3090", "4090")]
    assert [typical_card(gb, bf16=False).name for gb in (6, 15, 80)] == ["RTX 2060", "T4", "T4"]
    assert len({(card.name, card.gigabytes) for card in CARDS}) == len(CARDS)


def test_no_time_is_modelled_for_a_cpu():
    assert "modelled" not in dry_run(Config(device="cpu"), 100)
    assert "minutes modelled for RTX 3060" in dry_run(Config(gpu_memory=12.0), 100)
