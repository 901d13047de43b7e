"""The engine where only a GPU would take it: CUDA graphs with stand-ins, idle slots, sizes; and logits that are no numbers."""

import pytest
import torch
from test_decoder import make_policy, random_rows

from rl.config import ConfigError
from rl.model import engine
from rl.model.engine import Engine, bucket
from rl.model.sampling import Sampling
from rl.rollout import rollout


def on_graphs(policy, prompts, monkeypatch, **how):
    """A roll-out by the path of CUDA graphs, each replay being the same decode step run eagerly; and the sizes asked for."""
    sizes = []

    def graph(self, rows, length):
        sizes.append((rows, length))
        return lambda: self.decode(rows, length)

    monkeypatch.setattr(engine, "uses_graphs", lambda device: True)
    monkeypatch.setattr(Engine, "graph", graph)
    monkeypatch.setattr(engine, "SMALLEST_BATCH", 2)
    monkeypatch.setattr(engine, "SMALLEST_LENGTH", 8)
    return rollout(policy, prompts, **how), sizes


@pytest.mark.parametrize("name", ["qwen3, sliding window", "llama, llama3 rope"])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_steps_by_graphs_give_the_same_completions(name, penalty, monkeypatch):
    """Several steps between two looks, idle slots decoded along, buckets: rows end where they should and nothing leaks."""
    policy, prompts = make_policy(name), random_rows(5, 11, 1, 8, 3, 7)
    policy.eos_ids = frozenset({2, 13, 18, 24, 31})
    how = {"num_generations": 2, "max_completion_length": 21, "rollout_batch_size": 5}
    how |= {"sampling": Sampling(top_k=1, repetition_penalty=penalty), "generator": torch.Generator()}
    expected = rollout(policy, prompts, **how)
    handed = []
    found, sizes = on_graphs(policy, prompts, monkeypatch, on_finished=handed.append, **how)
    assert [e.completion_ids for e in found] == [e.completion_ids for e in expected]
    assert {e.truncated for e in found} == {True, False}
    for a, b in zip(found, expected):
        assert a.sampler_logprobs == pytest.approx(b.sampler_logprobs, abs=1e-5)
    assert sum(map(len, handed)) == 12
    longest = 11 + 21
    assert {rows for rows, _ in sizes} <= {2, 4, 5} and {length for _, length in sizes} <= {8, 16, 32, longest}
    assert len(set(sizes)) > 1


def test_an_idle_slot_beyond_a_graphs_length_leaves_nothing_behind():
    """Its window lies outside of what the graph reads; a row that comes into the slot must not meet a nan there."""
    policy, prompts = make_policy("qwen3, sliding window"), random_rows(4, 4, 4)
    with torch.no_grad():
        made = Engine(policy, prompts, 1, 40, Sampling(0), torch.Generator(), 3)
        made.reserve(made.length)
        made.position[:] = 35
        made.decode(2, 16)
        assert not any(cache.isnan().any() for cache in made.cache)


def test_logits_that_are_not_numbers_end_the_run():
    policy = make_policy("llama")
    policy.model.get_base_model().model.norm.weight.data.fill_(torch.nan)
    for sampling in (Sampling(), Sampling(0)):
        with pytest.raises(ConfigError, match="dtype: .* logits are not numbers"):
            rollout(policy, random_rows(3), 1, 4, sampling, torch.Generator(), 1)


def test_a_graph_is_captured_once_and_its_warm_up_leaves_no_trace(monkeypatch):
    """The calls to torch.cuda, in their order, and the state of the rows after them."""
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
        made = Engine(policy, prompts, 2, 9, Sampling(repetition_penalty=1.1), torch.Generator().manual_seed(0), 4)
        made.draw(0, made.admit(list(enumerate(prompts))))
        made.reserve(made.length)
        state = [made.token.clone(), made.position.clone(), made.seen.clone()]
        decoded, decode = [], made.decode

        def counted(rows, length):
            decoded.append((rows, length))
            if len(decoded) % 2:  # the warm-up; a capture executes nothing
                return decode(rows, length)
            return torch.zeros(rows), torch.zeros(rows)

        monkeypatch.setattr(made, "decode", counted)
        for _ in range(2):
            made.graph(4, 8)()
        made.graph(2, 8)()
        assert decoded == [(4, 8)] * 2 + [(2, 8)] * 2
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
        assert all(torch.equal(x, y) for x, y in zip(state, (made.token, made.position, made.seen)))


def test_buckets_double_up_to_the_largest():
    assert [bucket(n, 8, 200) for n in (1, 8, 9, 16, 17, 100, 129, 200)] == [8, 8, 16, 16, 32, 128, 200, 200]
    assert bucket(3, 8, 5) == 5
