"""Decoder, engine and shared-prompt update against the models' own forward, for random models of each family."""

import peft
import pytest
import torch
import transformers
from conftest import bare_policy, fill_lora, vectors
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rl.model import engine, logprobs
from rl.model.decoder import Decoder, Linears, SwiGLU, folded_weight, unsupported_reason
from rl.model.engine import Engine
from rl.model.logprobs import completion_logprobs, completion_states
from rl.model.policy import LogitTransform, find_logit_transform, make_deterministic
from rl.model.sampling import Sampling
from rl.rollout import rollout

SIZES = dict(vocab_size=61, hidden_size=48, intermediate_size=80, num_hidden_layers=3, max_position_embeddings=256)
SLIDING = {
    "use_sliding_window": True, "sliding_window": 6,
    "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
HEADS = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8}
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig, HEADS),
    "llama, as many key heads as heads, tied": (
        LlamaForCausalLM, LlamaConfig, {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True},
    ),
    "llama, one key head, biases": (
        LlamaForCausalLM, LlamaConfig, HEADS | {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True},
    ),
    "llama, llama3 rope": (LlamaForCausalLM, LlamaConfig, HEADS | {"rope_parameters": LLAMA3}),
    "llama, linear rope": (
        LlamaForCausalLM, LlamaConfig, HEADS | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}},
    ),
    "llama, yarn": (
        LlamaForCausalLM, LlamaConfig,
        HEADS | {"rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}},
    ),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"num_attention_heads": 6, "num_key_value_heads": 2}),
    "qwen2, sliding window": (Qwen2ForCausalLM, Qwen2Config, {"num_attention_heads": 6, "num_key_value_heads": 3} | SLIDING),
    "qwen3, tied": (Qwen3ForCausalLM, Qwen3Config, HEADS | {"tie_word_embeddings": True}),
    "qwen3, sliding window": (Qwen3ForCausalLM, Qwen3Config, HEADS | SLIDING),
}  # fmt: skip


def make_policy(name, lora_scale=0.1, **changes):
    """Return a policy with a random model, noise in its biases, and a LoRA of noise that includes the head."""
    model_class, config_class, settings = MODELS[name]
    torch.manual_seed(1)
    model = model_class(config_class(**SIZES | settings | changes)).float()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith(("bias", "norm.weight")):
            parameter.data += 0.3 * torch.randn_like(parameter)
    tied = model.config.tie_word_embeddings
    targets = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split() + ([] if tied else ["lm_head"])
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            parameter.data = lora_scale * torch.randn_like(parameter)
    make_deterministic(model)
    model.eval()
    assert unsupported_reason(model) is None
    return bare_policy(model, eos_ids=(2, 3), decoder=Decoder(model))


def random_rows(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, SIZES["vocab_size"], (n,), generator=generator).tolist() for n in lengths]


def model_logits(policy, row):
    """Return the logits of one row by the model's own forward, (T, V)."""
    with torch.no_grad():
        return policy.model(input_ids=torch.tensor([row])).logits[0]


@pytest.mark.parametrize("scratch", [True, False], ids=["scratch weights", "modules"])
@pytest.mark.parametrize("name", MODELS)
def test_engine_logits_are_the_models_own(name, scratch, monkeypatch):
    """Checks all logits through prefill, decoding, refills and the tail, whichever slot a row is in."""
    policy = make_policy(name)
    sampled_logits = []
    logits_by_token = {}
    counts = []  # (waiting rows, active rows) at each step
    sample = engine.sample

    def recording_sample(logits, *args):
        sampled_logits.append(logits.clone())
        return sample(logits, *args)

    class RecordingEngine(Engine):
        def collect_finished(self, slots, tokens, logprobs):
            counts.append((len(waiting_rows(self)), len(self.rows)))
            for slot, logits in zip(slots, sampled_logits[-1]):
                row = self.rows[slot]
                logits_by_token[row.index, len(row.ids)] = logits
            return super().collect_finished(slots, tokens, logprobs)

    def waiting_rows(engine):
        started = {index for index, _ in logits_by_token} | {row.index for row in engine.rows}
        return set(range(len(prompts) * 3)) - started

    monkeypatch.setattr(engine, "sample", recording_sample)
    monkeypatch.setattr(engine, "fits", lambda *_: scratch)
    monkeypatch.setattr(engine, "CACHE_GROWTH", 4)
    monkeypatch.setattr("rl.rollout.Engine", RecordingEngine)
    prompts = random_rows(5, 11, 1, 8, 3, 7)
    episodes = rollout(policy, prompts, 3, 20, Sampling(), torch.Generator().manual_seed(2), rollout_batch_size=7)
    assert len({len(e.completion_ids) for e in episodes}) > 5 and {e.truncated for e in episodes} == {True, False}
    refills = sum(later > earlier for (_, earlier), (_, later) in zip(counts, counts[1:]))
    assert refills > 1
    assert min(active for waiting, active in counts if waiting == 0) < 6  # there is a tail
    for index, episode in enumerate(episodes):
        logits = model_logits(policy, episode.prompt_ids + episode.completion_ids)
        for t in range(len(episode.completion_ids)):
            expected = logits[len(episode.prompt_ids) - 1 + t]
            torch.testing.assert_close(logits_by_token[index, t], expected, atol=1e-5, rtol=0)
            logprob = expected.log_softmax(-1)[episode.completion_ids[t]].item()
            assert episode.sampler_logprobs[t] == pytest.approx(logprob, abs=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_greedy_decoding_equals_generate(name):
    policy = make_policy(name)
    prompts = random_rows(6, 2, 9)
    episodes = rollout(policy, prompts, 1, 24, Sampling(0), torch.Generator(), rollout_batch_size=2)
    for prompt, episode in zip(prompts, episodes):
        ids = torch.tensor([prompt])
        generated = policy.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=24,
            eos_token_id=[2, 3],
            pad_token_id=0,
        )
        assert episode.completion_ids == generated[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", MODELS)
def test_shared_prompts_do_not_change_the_update(name):
    """Log-probabilities, entropies and gradients equal those of the model's own forward."""
    policy = make_policy(name)
    first, second = random_rows(9, 4)
    prompts = [first, second, first, first, second]
    completions = random_rows(7, 12, 1, 3, 5, seed=3)
    weights = torch.randn(5, 12, generator=torch.Generator().manual_seed(4))

    def run():
        policy.model.zero_grad()
        values, mask, entropy = completion_logprobs(policy, prompts, completions, with_entropy=True)
        (values * weights * mask).sum().backward()
        gradients = torch.cat([p.grad.flatten() for p in policy.trainable_parameters()])
        return values.detach(), entropy, gradients

    values, entropy, gradients = run()
    policy.decoder = None
    expected_values, expected_entropy, expected = run()
    torch.testing.assert_close(values, expected_values, atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy, expected_entropy, atol=1e-5, rtol=0)
    assert torch.cosine_similarity(gradients, expected, dim=0) > 0.9999
    torch.testing.assert_close(gradients, expected, atol=1e-4 * expected.abs().max().item(), rtol=0)


def test_completions_of_one_token():
    """Their only token is not an input of the forward pass, whether the other completions are longer or not."""
    policy = make_policy("qwen3, tied")
    prompts = random_rows(5, 3, 5)
    for completions in ([[7], [2], [9]], [[7], [8, 9, 2], [4]]):
        values, mask, _ = completion_logprobs(policy, prompts, completions)
        values.sum().backward()
        for i, (prompt, completion) in enumerate(zip(prompts, completions)):
            logits = model_logits(policy, prompt + completion)[len(prompt) - 1 : -1].log_softmax(-1)
            expected = logits[range(len(completion)), completion]
            torch.testing.assert_close(values[i][mask[i]].detach(), expected, atol=1e-5, rtol=0)


def test_aligned_widths_change_no_result(monkeypatch):
    """With widths rounded up to multiples of 16, as on CUDA, values and shapes stay the same."""
    policy = make_policy("qwen2, sliding window")
    prompts = random_rows(9, 4, 4)
    completions = random_rows(7, 12, 1, seed=3)

    def run():
        policy.model.zero_grad()
        values, mask, entropy = completion_logprobs(policy, prompts, completions, with_entropy=True)
        values.sum().backward()
        generator = torch.Generator().manual_seed(0)
        episodes = rollout(policy, prompts, 2, 9, Sampling(), generator, rollout_batch_size=4)
        states, _ = completion_states(policy, prompts, completions)
        gradients = torch.cat([p.grad.flatten() for p in policy.trainable_parameters()])
        return [values.detach(), mask, entropy, states.detach(), gradients], [e.completion_ids for e in episodes]

    tensors, sampled = run()
    monkeypatch.setattr("rl.model.attention.round_up", lambda width, device: -(-width // 16) * 16)
    monkeypatch.setattr("rl.model.engine.round_up", lambda width, device: -(-width // 16) * 16)
    aligned_tensors, aligned_sampled = run()
    assert sampled == aligned_sampled
    for a, b in zip(tensors, aligned_tensors, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_chunked_head_and_gradient_checkpointing_change_no_result(monkeypatch):
    policy = make_policy("llama")
    prompts = random_rows(9, 4, 4)
    completions = random_rows(7, 12, 5, seed=3)

    def run():
        policy.model.zero_grad()
        values, _, _ = completion_logprobs(policy, prompts, completions, with_entropy=True)
        values.sum().backward()
        return values.detach(), torch.cat([p.grad.flatten() for p in policy.trainable_parameters()])

    values, gradients = run()
    monkeypatch.setattr(logprobs, "LOGITS_PER_CHUNK", 5 * SIZES["vocab_size"])  # five tokens at a time
    in_chunks = run()
    policy.model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    calls = []
    run_layer = Decoder.run_layer
    monkeypatch.setattr(Decoder, "run_layer", lambda *args: calls.append(1) or run_layer(*args))
    recomputed = run()
    assert len(calls) == 6  # three layers, in the forward and again in the backward
    for other in (in_chunks, recomputed):
        torch.testing.assert_close(other[0], values, atol=1e-6, rtol=0)
        torch.testing.assert_close(other[1], gradients, atol=1e-5, rtol=1e-5)


def test_completion_states_are_the_models_hidden_states():
    policy = make_policy("qwen2")
    prompts = random_rows(4, 6)
    completions = random_rows(5, 2, seed=1)
    with torch.no_grad():
        states, mask = completion_states(policy, prompts, completions)
        assert states.shape == (2, 6, 48) and mask.sum(1).tolist() == [5, 2]
        for i, (prompt, completion) in enumerate(zip(prompts, completions)):
            row = torch.tensor([prompt + completion])
            hidden = policy.model.get_base_model().model(input_ids=row).last_hidden_state[0]
            n = len(completion) + 1
            torch.testing.assert_close(states[i, :n], hidden[len(prompt) - 1 :], atol=1e-5, rtol=0)
            assert not states[i, n:].any()


def test_engine_follows_disabled_and_switched_adapters():
    """The reference and a reloaded LoRA depend on disable_adapter and set_adapter."""
    policy = make_policy("qwen3, tied")
    policy.model.add_adapter("other", policy.model.peft_config["default"])
    for name, parameter in policy.model.named_parameters():
        if "lora_B.other" in name:
            parameter.data = torch.randn_like(parameter)
    prompts = random_rows(5, 8)

    def check_logprobs():
        (episode, _) = rollout(policy, prompts, 1, 9, Sampling(), torch.Generator().manual_seed(0), 2)
        row = episode.prompt_ids + episode.completion_ids
        logits = model_logits(policy, row)[len(episode.prompt_ids) - 1 : -1].log_softmax(-1)
        expected = logits[range(len(episode.completion_ids)), episode.completion_ids].tolist()
        assert episode.sampler_logprobs == pytest.approx(expected, abs=1e-5)
        return sum(expected)

    sums = [check_logprobs()]
    with policy.model.disable_adapter():
        sums.append(check_logprobs())
    policy.model.set_adapter("other")
    sums.append(check_logprobs())
    assert len({round(s, 3) for s in sums}) == 3


def test_folding_is_exact_and_does_not_change_the_model():
    policy = make_policy("llama, one key head, biases")
    before = {name: p.clone() for name, p in policy.model.named_parameters()}
    layer = policy.model.get_base_model().model.layers[1]
    x = torch.randn(3, 48)
    gate_up = Linears(layer.mlp.gate_proj, layer.mlp.up_proj)
    for part, module in zip(gate_up.folded(torch.float32)(x), (layer.mlp.gate_proj, layer.mlp.up_proj)):
        torch.testing.assert_close(part, module(x), atol=1e-5, rtol=0)
    fp32 = folded_weight(layer.self_attn.q_proj, torch.float32)
    bf16 = folded_weight(layer.self_attn.q_proj, torch.bfloat16)
    assert torch.equal(bf16, fp32.bfloat16())  # rounded once, at the end
    Decoder(policy.model).folded()
    assert all(torch.equal(p, before[name]) for name, p in policy.model.named_parameters())


def test_dora_is_run_by_its_own_module():
    """DoRA cannot be folded, but roll-out and update still agree with the model's own forward."""
    policy = make_policy("llama")
    settings = peft.LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "down_proj"])
    policy.model.add_adapter("dora", settings)
    policy.model.set_adapter("dora")
    for name, parameter in policy.model.named_parameters():
        if ".dora." in name and "lora_B" in name:
            parameter.data = 0.1 * torch.randn_like(parameter)
    assert not policy.decoder.can_fold()
    (prompt,) = random_rows(6)
    (episode,) = rollout(policy, [prompt], 1, 8, Sampling(), torch.Generator().manual_seed(0), 1)
    logits = model_logits(policy, prompt + episode.completion_ids)[len(prompt) - 1 : -1].log_softmax(-1)
    expected = logits[range(len(episode.completion_ids)), episode.completion_ids]
    assert episode.sampler_logprobs == pytest.approx(expected.tolist(), abs=1e-5)
    logprobs, _, _ = completion_logprobs(policy, [prompt], [episode.completion_ids])
    torch.testing.assert_close(logprobs[0], expected, atol=1e-5, rtol=0)


def test_unsupported_reason_names_architecture_or_rope():
    neox = GPTNeoXForCausalLM(GPTNeoXConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=40))
    assert "GPTNeoXForCausalLM" in unsupported_reason(neox)
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    llama = LlamaForCausalLM(LlamaConfig(**SIZES | HEADS | {"rope_parameters": rope}))
    assert "type dynamic" in unsupported_reason(llama)

    class Patched(LlamaForCausalLM):
        """A subclass with another name may behave differently."""

    assert "Patched" in unsupported_reason(Patched(LlamaConfig(**SIZES | HEADS)))


def scaled_model(name, **settings):
    """Return a small random model whose forward pass scales or caps its logits."""
    config = transformers.AutoConfig.for_model(name, **SIZES | HEADS | {"head_dim": 8}, pad_token_id=0, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.get_output_embeddings().weight.data.normal_()  # large logits, which a cap changes
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).eval()


@pytest.mark.parametrize(
    "name, settings, transform",
    [
        ("cohere", {"logit_scale": 0.25}, LogitTransform(0.25)),
        ("cohere", {"logit_scale": 1.0}, LogitTransform()),
        ("granite", {"logits_scaling": 4.0}, LogitTransform(0.25)),
        ("gemma2", {"final_logit_softcapping": 5.0}, LogitTransform(1.0, 5.0)),
    ],
)
@pytest.mark.parametrize("known", [True, False])
def test_logits_are_scaled_and_capped_as_in_the_model(name, settings, transform, known):
    model = scaled_model(name, **settings)
    assert find_logit_transform(model) == transform
    prompts = random_rows(4, 6)
    completions = random_rows(5, 1, seed=1)
    policy = bare_policy(model, decoder=None, logit_transform=transform if known else None)
    fill_lora(policy, 0.1)
    gradients = []
    for entropy_gradient in (False, True):
        policy.entropy_gradient = entropy_gradient
        values, mask, _ = completion_logprobs(policy, prompts, completions)
        values[mask].sum().backward()
        gradients.append(vectors(p.grad for p in policy.trainable_parameters()))
        model.zero_grad()
    for i, (prompt, completion) in enumerate(zip(prompts, completions)):
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = logits[range(len(completion)), completion]
        torch.testing.assert_close(values[i][mask[i]], expected, atol=1e-5, rtol=0)
        expected.sum().backward()
    expected = vectors(p.grad for p in policy.trainable_parameters())
    for gradient in gradients:
        torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-4)


def test_an_unknown_transform_of_the_logits_is_none(monkeypatch):
    """The update then uses the logits of the model's own forward pass."""
    model = scaled_model("cohere", logit_scale=0.25)
    monkeypatch.setattr("rl.model.policy.LOGIT_FACTORS", ())
    assert find_logit_transform(model) is None


def test_swiglu_has_the_values_and_gradients_of_the_plain_expression():
    gate, up = (torch.randn(5, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.equal(SwiGLU.apply(gate, up), torch.nn.functional.silu(gate) * up)
    assert torch.autograd.gradcheck(SwiGLU.apply, (gate, up))
