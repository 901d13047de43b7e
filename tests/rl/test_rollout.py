"""The roll-out samples from the policy's distribution, ends completions correctly and records log-probabilities."""

import collections

import pytest
import torch
import transformers
from conftest import copy_tiny, fill_lora

from rl.model import engine, hf_generate
from rl.model.logprobs import completion_logprobs
from rl.model.policy import load_policy
from rl.model.sampling import Sampling, draw_by_inversion, draw_by_race, sample
from rl.rollout import rollout


@pytest.fixture(params=["engine", "hf generate"])
def policy(policy, request):
    """The tiny model, on the engine and through generate as for an unsupported architecture."""
    if request.param == "hf generate":
        policy.decoder = None
    return policy


def roll(policy, questions, n=1, length=24, sampling=None, seed=0, rows=64, **kwargs):
    prompts = [policy.encode_prompt(question) for question in questions]
    generator = torch.Generator().manual_seed(seed)
    return rollout(policy, prompts, n, length, sampling or Sampling(), generator, rows, **kwargs)


QUESTIONS = [
    "What is 3 + 4 + 5?",
    "Compute 9 - 2 + 1.",
    "Write f(x) in Python: add 4, then multiply by 3.",
    "1 + 1 = ?",
]


def chi_square(counts, probabilities, n):
    """Return Pearson's statistic and degrees of freedom. Tokens with an expected count below 5 share one cell."""
    common = [i for i, p in enumerate(probabilities) if p * n >= 5]
    observed = [counts.get(i, 0) for i in common]
    expected = [probabilities[i] * n for i in common]
    cells = [*zip(observed, expected), (n - sum(observed), n - sum(expected))]
    return sum((o - e) ** 2 / e for o, e in cells if e > 1e-9), len(common)


def test_generation_config_does_not_change_the_distribution(tmp_path, config):
    """Token frequencies follow the raw softmax, whatever the model folder's generation_config."""
    qwen = {"do_sample": True, "temperature": 0.3, "top_k": 2, "top_p": 0.5, "repetition_penalty": 1.3}
    config.model = copy_tiny(tmp_path / "m", generation_config=qwen)
    policy = load_policy(config)
    prompt = policy.encode_prompt("What is 8 - 3 + 9?") + policy.tokenizer.encode("\\boxed{", add_special_tokens=False)
    with torch.no_grad():
        probabilities = policy.model(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(-1).tolist()
    n = 4000
    episodes = rollout(policy, [prompt], n, 1, Sampling(), torch.Generator().manual_seed(0), rollout_batch_size=n)
    counts = collections.Counter(e.completion_ids[0] for e in episodes)
    statistic, freedom = chi_square(counts, probabilities, n)
    assert freedom >= 3 and statistic < 3 * freedom + 12  # a generous bound; top_k 2 would give thousands
    sharpened = torch.tensor(probabilities) ** (1 / 0.7)
    wrong, _ = chi_square(counts, (sharpened / sharpened.sum()).tolist(), n)
    assert wrong > 3 * freedom + 12  # the test would detect a temperature of 0.7


def test_greedy_equals_generate(policy):
    episodes = roll(policy, QUESTIONS, sampling=Sampling(0), length=40)
    for question, episode in zip(QUESTIONS, episodes):
        ids = torch.tensor([policy.encode_prompt(question)])
        generated = policy.model.generate(input_ids=ids, do_sample=False, max_new_tokens=40, pad_token_id=policy.pad_id)
        assert episode.completion_ids == generated[0, ids.shape[1] :].tolist()


def test_completions_end_at_the_first_eos_or_are_truncated(policy):
    (eos,) = policy.eos_ids
    episodes = roll(policy, QUESTIONS, n=8, length=24)
    assert len(episodes) == 32
    for i, episode in enumerate(episodes):
        assert episode.group == i // 8 and len(episode.sampler_logprobs) == len(episode.completion_ids) <= 24
        ended = episode.completion_ids[-1] == eos
        assert episode.completion_ids.count(eos) == int(ended) and episode.truncated == (not ended)
        assert episode.finish_reason == ("stop" if ended else "length")
        assert episode.truncated <= (len(episode.completion_ids) == 24)
    assert {e.truncated for e in episodes} == {True, False}


@pytest.mark.parametrize("rows", [64, 16])
def test_on_finished_is_called_as_completions_end(policy, rows):
    """Each episode is reported once with its index: by the engine in order of length, by `generate` in batches."""
    calls = []
    episodes = roll(policy, QUESTIONS, n=8, length=24, rows=rows, on_finished=calls.append)
    assert {i: e for finished in calls for i, e in finished.items()} == dict(enumerate(episodes))
    assert sum(map(len, calls)) == 32
    if not policy.decoder:
        assert [list(finished) for finished in calls] == [list(range(32))[i : i + rows] for i in range(0, 32, rows)]
        return
    assert len(calls) > 3
    first_batch = [e for finished in calls for i, e in finished.items() if i < rows]
    lengths = [len(e.completion_ids) for e in first_batch]
    assert lengths == sorted(lengths) and lengths[0] < lengths[-1]


def test_several_end_tokens(tmp_path, config):
    """Any of the end-of-sequence tokens ends a completion; here the digit 1 is one of them."""
    one = 8 + 1 + ord("1") - ord(" ")
    config.model = copy_tiny(tmp_path / "m", generation_config={"eos_token_id": [1, one]})
    policy = load_policy(config)
    assert policy.tokenizer.decode([one]) == "1"
    episodes = roll(policy, ["What is 5 + 5 + 5?", "What is 2 + 3 + 2?"], n=64)
    last = {episode.completion_ids[-1] for episode in episodes if not episode.truncated}
    assert last == {1, one} and all(one not in e.completion_ids[:-1] for e in episodes)


def test_batch_size_changes_neither_order_nor_greedy_answers(policy):
    expected = roll(policy, QUESTIONS, sampling=Sampling(0), rows=64)
    for rows in (1, 3):
        episodes = roll(policy, QUESTIONS, sampling=Sampling(0), rows=rows)
        assert [e.completion_ids for e in episodes] == [e.completion_ids for e in expected]
        assert [e.group for e in episodes] == [0, 1, 2, 3]


def test_the_same_seed_gives_the_same_completions(policy):
    first, again, other = (roll(policy, QUESTIONS, n=4, seed=seed) for seed in (5, 5, 6))
    assert [e.completion_ids for e in first] == [e.completion_ids for e in again] != [e.completion_ids for e in other]


def test_kv_cache_is_used_with_gradient_checkpointing(config, monkeypatch):
    """Training mode would disable the cache, and each decode step would see only its own token."""
    expected = roll(load_policy(config), QUESTIONS, sampling=Sampling(0))
    config.gradient_checkpointing = True
    policy = load_policy(config)
    policy.decoder = None
    policy.model.train()
    widths = []
    model = policy.model.get_base_model()
    forward = model.forward

    def spy(*args, **kwargs):
        widths.append(kwargs["input_ids"].shape[1])
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", spy)
    episodes = roll(policy, QUESTIONS, sampling=Sampling(0))
    assert widths[0] > 1 and set(widths[1:]) == {1}
    assert [e.completion_ids for e in episodes] == [e.completion_ids for e in expected]


def test_a_repetition_penalty_sees_prompt_and_completion(policy, monkeypatch):
    """With a very strong penalty no token of prompt or completion occurs again, even if rows move between slots."""
    for module in (engine, hf_generate):  # negative logits, so that the penalty removes all probability of a token
        monkeypatch.setattr(module, "sample", lambda logits, *args: sample(logits - 1000, *args))
    episodes = roll(policy, QUESTIONS, n=4, length=30, rows=6, sampling=Sampling(repetition_penalty=1e6))
    for episode in episodes:
        ids = episode.prompt_ids + episode.completion_ids[:-1]  # the prompt may contain the end token
        new = ids[len(episode.prompt_ids) :]
        assert len(set(new)) == len(new) and not set(new) & set(episode.prompt_ids)


# --- the fallback to `generate`


@pytest.mark.parametrize("policy", ["hf generate"], indirect=True)
def test_batches_do_not_exceed_rollout_batch_size(policy, monkeypatch):
    """The limit holds even if a group is split."""
    sizes = []
    complete = hf_generate.HFGenerate.complete

    def spy(self, indices):
        sizes.append(len(indices))
        return complete(self, indices)

    monkeypatch.setattr(hf_generate.HFGenerate, "complete", spy)
    assert len(roll(policy, QUESTIONS, n=4, length=4, rows=3)) == 16
    assert sizes == [3, 3, 3, 3, 3, 1]


@pytest.mark.parametrize("policy", ["hf generate"], indirect=True)
def test_generation_config_does_not_change_generate(policy, config, tmp_path):
    """Settings for sampling, forced or suppressed tokens and stopping criteria have no effect."""
    expected = roll(policy, QUESTIONS, n=4)
    drawn = sorted({token for episode in expected for token in episode.completion_ids} - {1, 9})
    hostile = {
        "do_sample": True,
        "temperature": 0.1,
        "top_k": 1,
        "num_beams": 3,
        "num_return_sequences": 2,
        "repetition_penalty": 5.0,
        "no_repeat_ngram_size": 1,
        "forced_bos_token_id": 9,
        "forced_eos_token_id": 9,
        "suppress_tokens": drawn,
        "bad_words_ids": [[drawn[0]]],
        "min_new_tokens": 20,
        "max_length": 3,
        "max_time": 0.0,
        "stop_strings": ["1"],
        "return_dict_in_generate": True,
        "use_cache": False,
    }
    config.model = copy_tiny(tmp_path / "m", generation_config=hostile)
    policy = load_policy(config)
    policy.decoder = None
    fill_lora(policy, 0.02)
    episodes = roll(policy, QUESTIONS, n=4)
    assert [e.completion_ids for e in episodes] == [e.completion_ids for e in expected]
    assert [e.sampler_logprobs for e in episodes] == [e.sampler_logprobs for e in expected]


SIZES = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 3, "pad_token_id": 0, "eos_token_id": 1}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 64}
LINEAR = {f"linear_{name}": 8 for name in ("key_head_dim", "value_head_dim")}
LINEAR |= {f"linear_{name}": 2 for name in ("num_key_heads", "num_value_heads")}
LINEAR |= {"head_dim": 16, "layer_types": ["linear_attention", "full_attention", "linear_attention"]}
FAMILIES = {  # learned positions; sliding window and soft cap; recurrent layers, which may read padding
    "GPT2LMHeadModel": {"vocab_size": 128, "n_embd": 32, "n_layer": 2, "n_head": 2, "eos_token_id": 1},
    "Gemma2ForCausalLM": SIZES | HEADS | {"head_dim": 16, "sliding_window": 8},
    "RecurrentGemmaForCausalLM": SIZES | HEADS | {"lru_width": 32},
    "Qwen3_5ForCausalLM": SIZES | HEADS | LINEAR,
    "Lfm2ForCausalLM": SIZES | HEADS | {"layer_types": ["conv", "full_attention", "conv"]},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_other_families_sample_from_the_trained_policy(tmp_path, config, name):
    """For prompts of different lengths, log-probabilities agree with unpadded single rows and with the trainer."""
    family = getattr(transformers, name)
    torch.manual_seed(0)
    model = family(family.config_class(**FAMILIES[name]))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data = torch.randn(parameter.shape) * 0.15
    model.save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained("data/tiny").save_pretrained(tmp_path)
    config.model = str(tmp_path)
    policy = load_policy(config)
    assert policy.decoder is None and name in policy.fallback_reason
    fill_lora(policy, 0.2)
    episodes = roll(policy, [QUESTIONS[i] for i in (0, 2, 3, 1)], n=3, length=12)
    assert len({len(e.prompt_ids) for e in episodes}) == 3 and len(episodes) == 12
    assert [e.group for e in episodes] == [index // 3 for index in range(12)]
    sampled = torch.tensor([p for e in episodes for p in e.sampler_logprobs])
    single = []
    with torch.no_grad():
        for e in episodes:
            logits = policy.model(input_ids=torch.tensor([e.prompt_ids + e.completion_ids]), use_cache=False).logits[0]
            logprobs = logits[len(e.prompt_ids) - 1 : -1].log_softmax(-1)
            single.append(logprobs.gather(1, torch.tensor(e.completion_ids)[:, None]).squeeze(1))
        trained, mask, _ = completion_logprobs(policy, *zip(*((e.prompt_ids, e.completion_ids) for e in episodes)))
    torch.testing.assert_close(sampled, torch.cat(single), atol=2e-4, rtol=0)
    torch.testing.assert_close(sampled, trained[mask], atol=2e-4, rtol=0)
    assert sampled.std() > 0.1


# --- sampling one token


LOGITS = torch.log(torch.tensor([[0.5, 0.25, 0.15, 0.1]]))


def frequencies(sampling, n=4000, seen=None):
    generator = torch.Generator().manual_seed(0)
    tokens, logprobs = sample(LOGITS.repeat(n, 1), sampling, generator, seen)
    raw = (LOGITS[0] / (sampling.temperature or 1)).log_softmax(-1)
    torch.testing.assert_close(logprobs, raw[tokens])  # log-probabilities are of the full distribution
    return (torch.bincount(tokens, minlength=4) / n).tolist()


@pytest.mark.parametrize(
    "sampling, expected",
    [
        (Sampling(), [0.5, 0.25, 0.15, 0.1]),
        (Sampling(temperature=0), [1, 0, 0, 0]),
        (Sampling(temperature=0.5), [0.25 / 0.345, 0.0625 / 0.345, 0.0225 / 0.345, 0.01 / 0.345]),
        (Sampling(top_k=2), [2 / 3, 1 / 3, 0, 0]),
        (Sampling(top_p=0.7), [2 / 3, 1 / 3, 0, 0]),  # 0.5 is below 0.7; the token that crosses it is kept
        (Sampling(top_p=0.4), [1, 0, 0, 0]),
        (Sampling(min_p=0.25), [0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0]),
    ],
)
def test_sampling_settings(sampling, expected):
    assert frequencies(sampling) == pytest.approx(expected, abs=0.025)


@pytest.mark.parametrize("draw", [draw_by_inversion, draw_by_race])
def test_frequencies_match_probabilities(draw):
    """Chi-square test for a peaked and a flat distribution. Tokens of probability 0 are never drawn."""
    generator = torch.Generator().manual_seed(0)
    for peak in (4.0, 0.3):
        probabilities = (peak * torch.randn(300, generator=generator)).softmax(-1)
        probabilities[[0, 1, 40, 298, 299]] = 0.0
        n = 20_000
        tokens = draw(probabilities.repeat(n, 1), generator).tolist()
        assert not {0, 1, 40, 298, 299} & set(tokens)
        expected = (probabilities / probabilities.sum()).tolist()
        statistic, freedom = chi_square(collections.Counter(tokens), expected, n)
        assert freedom > 20 and statistic < freedom + 4 * (2 * freedom) ** 0.5


def test_repetition_penalty_by_hand():
    # log 0.5 = -0.693 becomes -1.386, so 0.5 becomes 0.25: (0.25, 0.25, 0.15, 0.1) / 0.75
    assert frequencies(
        Sampling(repetition_penalty=2.0), seen=torch.tensor([[True, False, False, False]])
    ) == pytest.approx([1 / 3, 1 / 3, 0.2, 0.4 / 3], abs=0.025)
