"""Engine paths that otherwise run only on a GPU: CUDA graphs (replaced by fakes), idle slots, sizes; and nan logits."""

import pytest
import torch
from test_decoder import make_policy, random_rows

from rl.config import ConfigError
from rl.model import engine
from rl.model.engine import Engine, bucket
from rl.model.sampling import Sampling
from rl.rollout import rollout


def rollout_with_graphs(policy, prompts, monkeypatch, **settings):
    """Roll out through the CUDA graph path with eager decode steps as replays. Also returns the graph sizes."""
    sizes = []

    def graph(self, rows, length):
        sizes.append((rows, length))
        return lambda: self.decode(rows, length)

    monkeypatch.setattr(engine, "uses_graphs", lambda device: True)
    monkeypatch.setattr(Engine, "graph", graph)
    monkeypatch.setattr(engine, "SMALLEST_BATCH", 2)
    monkeypatch.setattr(engine, "SMALLEST_LENGTH", 8)
    return rollout(policy, prompts, **settings), sizes


@pytest.mark.parametrize("name", ["qwen3, sliding window", "llama, llama3 rope"])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_graph_steps_give_the_same_completions(name, penalty, monkeypatch):
    """Rows end at the right token and do not interfere, with several steps between checks, idle slots and buckets."""
    policy = make_policy(name)
    prompts = random_rows(5, 11, 1, 8, 3, 7)
    policy.eos_ids = frozenset({2, 13, 18, 24, 31})
    settings = {"num_generations": 2, "max_completion_length": 21, "rollout_batch_size": 5}
    settings |= {"sampling": Sampling(top_k=1, repetition_penalty=penalty), "generator": torch.Generator()}
    expected = rollout(policy, prompts, **settings)
    finished = []
    episodes, sizes = rollout_with_graphs(policy, prompts, monkeypatch, on_finished=finished.append, **settings)
    assert [e.completion_ids for e in episodes] == [e.completion_ids for e in expected]
    assert {e.truncated for e in episodes} == {True, False}
    for a, b in zip(episodes, expected):
        assert a.sampler_logprobs == pytest.approx(b.sampler_logprobs, abs=1e-5)
    assert sum(map(len, finished)) == 12
    longest = 11 + 21
    assert {rows for rows, _ in sizes} <= {2, 4, 5} and {length for _, length in sizes} <= {8, 16, 32, longest}
    assert len(set(sizes)) > 1


def test_idle_slot_beyond_the_length_of_a_graph_leaves_no_nan():
    """Its sliding window is outside the part of the cache that the graph reads. A later row must not see nan there."""
    policy = make_policy("qwen3, sliding window")
    prompts = random_rows(4, 4, 4)
    with torch.no_grad():
        sampler = Engine(policy, prompts, 1, 40, Sampling(0), torch.Generator(), 3)
        sampler.reserve(sampler.length)
        sampler.position[:] = 35
        sampler.decode(2, 16)
        assert not any(cache.isnan().any() for cache in sampler.cache)


def test_nan_logits_end_the_run():
    policy = make_policy("llama")
    policy.model.get_base_model().model.norm.weight.data.fill_(torch.nan)
    for sampling in (Sampling(), Sampling(0)):
        with pytest.raises(ConfigError, match="^dtype: .*logits are nan"):
            rollout(policy, random_rows(3), 1, 4, sampling, torch.Generator(), 1)


def test_graph_is_captured_once_and_its_warm_up_does_not_change_the_state(monkeypatch):
    """Checks the order of the calls to torch.cuda, and the state of the rows afterwards."""
    calls = []

    class Graph:
        def register_generator_state(self, generator):
            calls.append("generator")

        def replay(self):
            calls.append("replay")

        def pool(self):
            return "pool"

    class Context:
        def __init__(self, name, *args, pool=None):
            self.name = name, pool

        def __enter__(self):
            calls.append(self.name)

        def __exit__(self, *_):
            pass

        def wait_stream(self, other):
            pass

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: Context("side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Context("current"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool: Context("capture", pool=pool))
    policy = make_policy("qwen2")
    prompts = random_rows(5, 3)
    with torch.no_grad():
        sampler = Engine(policy, prompts, 2, 9, Sampling(repetition_penalty=1.1), torch.Generator().manual_seed(0), 4)
        logits = sampler.admit(list(enumerate(prompts)))
        sampler.draw(range(len(logits)), logits)
        sampler.reserve(sampler.length)
        state = [sampler.token.clone(), sampler.position.clone(), sampler.seen.clone()]
        sizes, decode = [], sampler.decode

        def recording_decode(rows, length):
            sizes.append((rows, length))
            if len(sizes) % 2:  # the warm-up; a capture does not execute the step
                return decode(rows, length)
            return torch.zeros(rows), torch.zeros(rows)

        monkeypatch.setattr(sampler, "decode", recording_decode)
        for _ in range(2):
            sampler.graph(4, 8)()
        sampler.graph(2, 8)()
        assert sizes == [(4, 8)] * 2 + [(2, 8)] * 2
        assert calls == [
            ("side", None),
            "generator",
            ("capture", None),
            "replay",
            "replay",
            ("side", None),
            "generator",
            ("capture", "pool"),
            "replay",
        ]
        assert all(torch.equal(x, y) for x, y in zip(state, (sampler.token, sampler.position, sampler.seen)))


def test_buckets_double_up_to_the_largest():
    assert [bucket(n, 8, 200) for n in (1, 8, 9, 16, 17, 100, 129, 200)] == [8, 8, 16, 16, 32, 128, 200, 200]
    assert bucket(3, 8, 5) == 5
