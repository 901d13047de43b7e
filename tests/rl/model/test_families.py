"""Small random models of every family: they train by GRPO and PPO, in 4 bits, and agree with transformers row by row.

The slow test of all families writes the table of docs/families.md.
"""

import dataclasses
import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from conftest import ROOT, Rewards, fill_lora, lines, vectors, with_rewards
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

import train
from export.merge import compute_logits, merge_lora
from rl.advantages import Advantages
from rl.config import Config, ConfigError
from rl.critic import Critic
from rl.fit.shapes import find_shape
from rl.model.logprobs import completion_logprobs
from rl.model.lora import save_adapter
from rl.model.policy import load_policy
from rl.model.sampling import Sampling
from rl.rollout import rollout
from rl.run.checks import check_sampler
from rl.run.report import model_notes
from rl.update import Updater, prompt_and_completion_ids

TABLE = ROOT / "docs/families.md"
VOCABULARY = 300
END = 1
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": END,
    "eos_token_id": END,
    "pad_token_id": END,
    "tie_word_embeddings": False,
}


def layers(*kinds: str) -> dict:
    return {"layer_types": list(kinds), "num_hidden_layers": len(kinds)}


FULL, LINEAR, WINDOW = "full_attention", "linear_attention", "sliding_attention"
WINDOWS = {"sliding_window": 8} | layers(WINDOW, FULL)
# Names of the number of experts, of their sizes and of the shared expert, in all families.
EXPERTS = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 32),
    **dict.fromkeys(
        ("n_shared_experts", "moe_num_shared_experts", "first_k_dense_replace", "n_group", "topk_group"), 1
    ),
}
LATENT = {
    "num_key_value_heads": 4,
    "head_dim": 8,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}
MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_d_ssm": 128,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
}
MAMBA2 = {"state_size": 8, "n_groups": 1, "chunk_size": 16}
DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "n_inner": 96, "rotary_dim": 16}
PER_LAYER = {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 16, "num_kv_shared_layers": 0}
CONV = layers("conv", FULL) | {"conv_L_cache": 3}
HYBRID = EXPERTS | MAMBA | layers("mamba", "attention")
DBRX = {
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
    "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "ffn_act_fn": {"name": "silu"}},
}
KIMI = {"kda_layers": [1], "full_attn_layers": [2], "num_heads": 4, "head_dim": 16, "short_conv_kernel_size": 4}
# Settings by model type; a second variant of a type has a suffix. A string: a multimodal model with this type of text.
FAMILIES = {
    **dict.fromkeys(("llama", "qwen2", "qwen3", "mistral:full", "seed_oss", "arcee", "apertus", "helium", "gemma"), {}),
    **dict.fromkeys(("phi", "stablelm", "starcoder2", "gpt_neox", "persimmon", "biogpt", "nemotron", "bitnet"), {}),
    **dict.fromkeys(("olmo", "olmo2", "glm", "glm4", "ernie4_5", "hunyuan_v1_dense", "doge", "nanochat", "jais2"), {}),
    **dict.fromkeys(("gpt2", "gptj", "gpt_bigcode", "codegen"), GPT),
    **dict.fromkeys(("ministral", "gemma3_text", "olmo3", "exaone4", "cohere2"), WINDOWS),
    **dict.fromkeys(("granitemoe", "granitemoeshared", "phimoe", "olmoe", "flex_olmo", "glm4_moe"), EXPERTS),
    **dict.fromkeys(("ernie4_5_moe", "mixtral", "qwen2_moe", "qwen3_moe", "solar_open"), EXPERTS),
    **dict.fromkeys(("glm4_moe_lite", "deepseek_v2", "deepseek_v3"), EXPERTS | LATENT),
    **dict.fromkeys(("qwen3_5_text", "olmo_hybrid"), DELTA | layers(LINEAR, FULL)),
    **dict.fromkeys(("qwen3_next", "qwen3_5_moe_text"), EXPERTS | DELTA | layers(LINEAR, FULL)),
    **dict.fromkeys(("gemma2", "vaultgemma"), {"sliding_window": 8, "query_pre_attn_scalar": 16}),
    **dict.fromkeys(("mamba", "falcon_mamba"), {"state_size": 8, "time_step_rank": 8}),
    "mistral:window": {"sliding_window": 8},
    "ministral3": {},
    "smollm3": {"no_rope_layers": [1, 0]},
    "granite": {"logits_scaling": 2.0, "residual_multiplier": 0.5, "embedding_multiplier": 2.0},
    "granitemoehybrid": HYBRID,
    "granitemoehybrid:dense": MAMBA | layers("mamba", "attention") | {"num_local_experts": 0, "shared_intermediate_size": 96},
    "gemma3n_text": WINDOWS | PER_LAYER | {"laurel_rank": 8, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 2},
    "gemma4_text": WINDOWS | PER_LAYER | {"global_head_dim": 16},
    "phi3": {"partial_rotary_factor": 1.0},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 16},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 512},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "xglm": {"d_model": 64, "ffn_dim": 96, "num_layers": 2, "attention_heads": 4},
    "cohere": {"logit_scale": 0.5},
    "hunyuan_v1_moe": EXPERTS | {"moe_topk": [2, 2]},
    "minicpm3": LATENT | {"head_dim": 16},
    "modernbert-decoder": layers(WINDOW, FULL),
    "gpt_oss": EXPERTS | WINDOWS,
    "dots1": EXPERTS | layers(FULL, FULL),
    "minimax": EXPERTS | layers(LINEAR, FULL),
    "minimax_m2": EXPERTS | {"rotary_dim": 16},
    "dbrx": {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 512} | DBRX,
    "afmoe": EXPERTS | WINDOWS | {"num_dense_layers": 1},
    "llama4_text": EXPERTS | {"moe_layers": [1], "attention_chunk_size": 64, "no_rope_layers": [1, 0]},
    "jetmoe": EXPERTS | {"kv_channels": 16},
    "lfm2": CONV | {"block_ff_dim": 96},
    "lfm2_moe": EXPERTS | CONV | {"num_dense_layers": 1},
    "bamba": MAMBA | {"attn_layer_indices": [1]},
    "falcon_h1": MAMBA,
    "nemotron_h": EXPERTS | MAMBA2 | layers(LINEAR, FULL, "moe") | {"mamba_num_heads": 8, "mamba_head_dim": 16},
    "jamba": EXPERTS | {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "use_mamba_kernels": False},
    "mamba2": MAMBA2 | {"num_heads": 8, "head_dim": 16, "expand": 2},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 64, "attention_window_size": 16},
    "kimi_linear": EXPERTS | LATENT | layers(LINEAR, FULL) | {"linear_attn_config": KIMI},
    "gemma3": "gemma3_text",
    "qwen3_5": "qwen3_5_text",
    "mistral3": "ministral3",
    "qwen2_vl": "qwen2_vl_text",
    "qwen2_5_vl": "qwen2_5_vl_text",
    "qwen3_vl": "qwen3_vl_text",
    "smolvlm": "llama",
    "lfm2_vl": "lfm2",
    "internvl": "qwen2",
    "llava": "llama",
}  # fmt: skip
FAST = ("mistral:window", "seed_oss", "granite", "mistral3", "qwen3_5_text", "lfm2", "gpt_oss", "mamba")
NOT_TRAINED = {"doge", "minimax"}


def make_model(family: str, folder: Path) -> None:
    """Save a random model of a family, with the bundled tokenizer."""
    torch.manual_seed(0)
    name = family.partition(":")[0]
    settings = FAMILIES[family]
    if isinstance(settings, str):
        config = multimodal_config(name, settings)
        model = AutoModelForImageTextToText.from_config(config)
    else:
        settings = SIZES | settings
        if name == "falcon":
            del settings["head_dim"]
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **settings))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, parameter.shape[-1] ** -0.5)
    model.float().save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "data/tiny").save_pretrained(folder)


def multimodal_config(name: str, text_type: str):
    text = SIZES | FAMILIES.get(text_type, {}) | {"model_type": text_type}
    vision = {"intermediate_size": 48, "num_hidden_layers": 2, "depth": 2, "num_attention_heads": 4, "num_heads": 4}
    vision |= {
        "hidden_size": 64 if name == "qwen2_vl" else 32,
        "image_size": 28,
        "patch_size": 14,
        "out_hidden_size": 64,
    }
    if name.startswith("qwen"):
        vision |= {"embed_dim": 32, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    if text_type.endswith("vl_text"):
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    ids = dict.fromkeys(("image_token_id", "image_token_index"), VOCABULARY - 1) | {"video_token_id": VOCABULARY - 2}
    ids |= {"vision_start_token_id": VOCABULARY - 3, "vision_end_token_id": VOCABULARY - 4}
    return AutoConfig.for_model(name, text_config=text, vision_config=vision, **ids)


def make_config(folder: Path, **settings) -> Config:
    sizes = {"prompts_per_step": 2, "num_generations": 4, "max_completion_length": 12}
    return Config(model=str(folder), device="cpu", dtype="float32", learning_rate=1e-3, **sizes, **settings)


def sample_episodes(policy) -> list:
    rows = [{"id": str(i), "task": "t", "prompt": f"What is 3 + {i}?" + " and 5" * i * 3} for i in range(4)]
    questions = policy.encode(rows)
    agreement = check_sampler(policy, questions)
    prompts = [question.prompt_ids for question in questions[:2]]
    episodes = rollout(policy, prompts, 4, 12, Sampling(), torch.Generator().manual_seed(0), 8)
    for i, episode in enumerate(episodes):  # the random model rarely stops
        episode.completion_ids = episode.completion_ids[: 5 + i]
        episode.sampler_logprobs = episode.sampler_logprobs[: 5 + i]
    return agreement, episodes


def model_logprobs(policy, episode) -> torch.Tensor:
    """Return the log-probabilities of a completion's tokens, (C,), by the whole transformers model on this row alone."""
    ids = torch.tensor([episode.prompt_ids + episode.completion_ids])
    logits = policy.model(input_ids=ids, use_cache=False).logits[0, len(episode.prompt_ids) - 1 : -1].float()
    return logits.log_softmax(-1).gather(1, ids[0, len(episode.prompt_ids) :, None]).squeeze(1)


def train_grpo(folder: Path) -> str:
    """Make one update. Compare sampler and update with the whole model, row by row. Returns the forward pass that was used."""
    config = make_config(folder)
    policy = load_policy(config)
    agreement, episodes = sample_episodes(policy)
    assert agreement.sampler < 1e-2, f"sampler differs by {agreement.sampler:.1e} nats"
    fill_lora(policy, 0.05)
    logprobs, mask, _ = completion_logprobs(policy, *prompt_and_completion_ids(episodes))
    logprobs[mask].sum().backward()
    gradient = vectors(p.grad for p in policy.trainable_parameters() if p.grad is not None)
    policy.model.zero_grad()
    for row, episode in zip(logprobs, episodes):
        expected = model_logprobs(policy, episode)
        expected.sum().backward()
        torch.testing.assert_close(row[: len(expected)], expected, atol=5e-5, rtol=0)
    expected = vectors(p.grad for p in policy.trainable_parameters() if p.grad is not None)
    assert (gradient - expected).norm() < 1e-4 * expected.norm()
    policy.model.zero_grad()
    before = vectors(policy.trainable_parameters()).clone()
    for i, episode in enumerate(episodes):
        episode.advantages = torch.full((len(episode.completion_ids),), 1.0 if i % 2 else -1.0)
    assert Updater(policy, None, config).update(episodes)["updates"] == 1
    assert not torch.equal(before, vectors(policy.trainable_parameters()))
    return "Ponder's" if policy.decoder else "its own"


def train_ppo(folder: Path) -> str:
    config = make_config(folder, algorithm="ppo")
    policy = load_policy(config)
    critic = Critic(policy, config)
    _, episodes = sample_episodes(policy)
    updater = Updater(policy, critic, config)
    updater.fill_values(episodes)
    with_rewards(episodes, [float(i % 2) for i in range(len(episodes))])
    Advantages(policy, Rewards, config).compute(episodes)
    assert updater.update(episodes)["critic_grad_norm"] > 0
    return "yes"


def train_4bit(folder: Path) -> str:
    config = make_config(folder, load_in_4bit=True)
    policy = load_policy(config)
    _, episodes = sample_episodes(policy)
    for i, episode in enumerate(episodes):
        episode.advantages = torch.full((len(episode.completion_ids),), 1.0 if i % 2 else -1.0)
    assert Updater(policy, None, config).update(episodes)["grad_norm"] > 0
    return "yes"


def trained_logits(folder: Path) -> tuple:
    """Return a policy with a random LoRA, two texts, and their logits."""
    policy = load_policy(make_config(folder))
    fill_lora(policy, 0.05)
    texts = [policy.encode_prompt("What is 3 + 4?"), policy.encode_prompt("7 - 2")]
    return policy, texts, compute_logits(policy.model, texts)


def export_merged(folder: Path) -> str:
    policy, texts, expected = trained_logits(folder)
    merged, _ = merge_lora(policy.model)
    merged.save_pretrained(folder / "merged")
    policy.tokenizer.save_pretrained(folder / "merged")
    logits = compute_logits(load_policy(make_config(folder / "merged")).model, texts)
    difference = (logits - expected).abs().max().item()
    assert difference < 1e-3, f"the merged model's logits differ by {difference:.1g}"
    return "yes"


def resume(folder: Path) -> str:
    policy, texts, expected = trained_logits(folder)
    save_adapter(policy, folder / "adapter")
    again = load_policy(make_config(folder, adapter=str(folder / "adapter")))
    assert torch.equal(compute_logits(again.model, texts), expected)
    return "yes"


@pytest.mark.parametrize("family", FAST)
def test_a_family_is_exported_and_resumed(family, tmp_path):
    make_model(family, tmp_path)
    assert export_merged(tmp_path) == resume(tmp_path) == "yes"


@pytest.mark.parametrize("family", FAST)
def test_a_family_trains_and_agrees_with_transformers(family, tmp_path):
    make_model(family, tmp_path)
    forward = train_grpo(tmp_path)
    assert (forward == "Ponder's") == (family in ("mistral:window", "seed_oss"))


@pytest.mark.parametrize("family", ["lfm2", *(pytest.param(f, marks=pytest.mark.slow) for f in FAST if f != "lfm2")])
@torch.no_grad()
def test_a_family_agrees_in_bf16_within_rounding(family, tmp_path):
    """Sampler and update are about as far from the fp32 model as the whole transformers model in bf16 is."""
    make_model(family, tmp_path)
    config = make_config(tmp_path)
    exact = load_policy(config)
    policy = load_policy(dataclasses.replace(config, dtype="bfloat16"))
    for either in (exact, policy):
        fill_lora(either, 0.05)
    _, episodes = sample_episodes(policy)
    logprobs, mask, _ = completion_logprobs(policy, *prompt_and_completion_ids(episodes))
    expected, rounded = (torch.cat([model_logprobs(p, e) for e in episodes]) for p in (exact, policy))
    sampled = torch.tensor([p for e in episodes for p in e.sampler_logprobs])
    rounding = (rounded - expected).abs().mean()
    assert rounding > 1e-4
    for ours in (logprobs[mask], sampled):
        assert (ours - expected).abs().mean() < 1.5 * rounding


def test_gemma_3n_trains_in_4_bits(tmp_path):
    make_model("gemma3n_text", tmp_path)
    assert train_4bit(tmp_path) == "yes"


def test_no_lora_on_encoders_of_images(tmp_path):
    make_model("mistral3", tmp_path)
    adapted = [name for name, _ in load_policy(make_config(tmp_path)).model.named_parameters() if "lora_A" in name]
    assert adapted and not [name for name in adapted if re.search("vision|projector", name)]


def test_notes_say_that_experts_are_not_trained(tmp_path):
    make_model("gpt_oss", tmp_path)
    _, experts = model_notes(load_policy(make_config(tmp_path)))
    assert re.match(r"the experts \(\d\d% of the weights\) get no LoRA and stay in float32", experts)


def test_notes_say_that_the_template_has_no_generation_prompt(tmp_path):
    make_model("llama", tmp_path)
    policy = load_policy(make_config(tmp_path))
    assert model_notes(policy) == []
    policy.tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    (note,) = model_notes(policy)
    assert "no generation prompt" in note


def attempt(train: Callable[[Path], str], folder: Path) -> str:
    """Return the result of a training function, or "no" with its error in one line."""
    try:
        return train(folder)
    except Exception as error:
        return f"no: {' '.join(str(error).split())[:160]}"


@pytest.mark.slow
def test_all_families(tmp_path):
    """Trains a model of each family, and writes the table of docs/families.md."""
    transformers.utils.logging.set_verbosity_error()
    rows = {}
    for family in FAMILIES:
        folder = tmp_path / family.replace(":", "_")
        make_model(family, folder)
        rows[family] = [attempt(train, folder) for train in (train_grpo, train_ppo, train_4bit, export_merged, resume)]
    before, marker, _ = TABLE.read_text(encoding="utf-8").partition("| model type |")
    lines = ["| model type | forward pass | GRPO | PPO | 4-bit | export | resume |", "|---|---|---|---|---|---|---|"]
    for family, (grpo, *others) in rows.items():
        cells = ("", grpo) if grpo.startswith("no") else (grpo, "yes")
        cells = [cell.replace(str(tmp_path), "").replace("|", "/") for cell in (*cells, *others)]
        lines.append(f"| {family.replace(':', ', ')} | {' | '.join(cells)} |")
    text = before + "\n".join(lines) + "\n"
    TABLE.write_text(text, encoding="utf-8")
    trained = {family for family, (grpo, *_) in rows.items() if not grpo.startswith("no")}
    assert set(FAMILIES) - trained == NOT_TRAINED, rows


DIGITS = """
reward_funcs = ["digits"]


def digits(completion):
    return sum(map(str.isdigit, completion.text)) / max(len(completion.text), 1)
"""


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("family", ["qwen3_5_text", "lfm2"])
def test_hybrid_models_learn(family, seed, tmp_path):
    """The reward is the share of digits in the completion; a random model begins near 0.1."""
    make_model(family, tmp_path / "model")
    (tmp_path / "rewards.py").write_text(DIGITS)
    settings = "--train-data sums --train-questions 16 --eval-questions 4 --eval-steps 0 --save-steps 0 --max-steps 60"
    sizes = "--prompts-per-step 4 --num-generations 8 --max-completion-length 8 --learning-rate 1e-2 --device cpu"
    paths = f"--model {tmp_path}/model --rewards-file {tmp_path}/rewards.py --output-dir {tmp_path}/run"
    train.main([*settings.split(), *sizes.split(), *paths.split(), "--seed", str(seed)])
    rewards = [line["reward"] for line in lines(tmp_path / "run/metrics.jsonl")]
    before, after = sum(rewards[:3]) / 3, sum(rewards[-3:]) / 3
    print(f"{family}, seed {seed}: {before:.2f} -> {after:.2f}")
    assert after - before >= 0.5


def load_and_check(config: Config) -> None:
    policy = load_policy(config)
    check_sampler(policy, policy.encode([{"id": "1", "task": "t", "prompt": "What is 3 + 4?"}]))


ODD_VALUES = (None, -1, 0, 1.5, "x", [], {}, True)


@pytest.mark.parametrize("family", ["llama", "qwen3_5_text", "gpt_oss", "gemma2", "lfm2"])
@pytest.mark.parametrize("use", [load_and_check, lambda config: find_shape(config.model)], ids=["load", "dry run"])
def test_odd_configs_load_or_give_one_line(family, use, tmp_path):
    """Keys of config.json that are missing or have odd values."""
    make_model(family, tmp_path)
    file = tmp_path / "config.json"
    settings = json.loads(file.read_text())
    rng = random.Random(0)
    for _ in range(40):
        changed = dict(settings)
        key = rng.choice(list(settings))
        if rng.random() < 0.3:
            del changed[key]
        else:
            changed[key] = rng.choice(ODD_VALUES)
        file.write_text(json.dumps(changed))
        try:
            use(make_config(tmp_path))
        except ConfigError as error:
            assert str(error).count("\n") == 0, (key, changed.get(key, "missing"))
