"""The cold start: its loss, its effect on the reference, whole runs with it, kills and resumes, and bad demonstrations."""

import json
import signal

import pytest
import torch
from conftest import copy_tiny, lines
from running import assert_same, finish, read_output

import train
from data.demonstrations import write_demonstrations
from rl.config import Config, ConfigError
from rl.model.policy import load_policy
from rl.run.cold_start import BATCH_SIZE, ColdStart, encode_demonstrations
from rl.update import Updater

SMALL = "--max-steps 2 --prompts-per-step 4 --num-generations 4 --eval-questions 12 --eval-steps 0 --train-questions 30"


def cold_start(policy, config, rows):
    return ColdStart(Updater(policy, None, config), rows, config)


@pytest.fixture
def demonstrations(tmp_path):
    path = tmp_path / "demos.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in write_demonstrations(["sums", "words"], 24, seed=0)))
    return path


def reference_loss(policy, rows):
    """The mean cross-entropy of the completions' tokens, by the model's own forward pass on one row at a time."""
    total, count = 0.0, 0
    for row in rows:
        prompt = policy.encode_prompt(row["prompt"])
        text = policy.tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}],
            tokenize=False,
        )
        ids = policy.tokenizer.encode(text, add_special_tokens=False)
        logits = policy.model(input_ids=torch.tensor([ids])).logits[0, len(prompt) - 1 : -1]
        total = total + torch.nn.functional.cross_entropy(logits, torch.tensor(ids[len(prompt) :]), reduction="sum")
        count += len(ids) - len(prompt)
    return total / count


def test_one_step_equals_a_step_of_the_whole_model(config):
    rows = write_demonstrations(["sums", "functions"], BATCH_SIZE, seed=1)
    rows = [row | {"id": str(i), "task": "t"} for i, row in enumerate(rows)]
    config.sft_epochs, config.sft_learning_rate, config.max_tokens_per_micro_batch = (
        1,
        1e-2,
        100,
    )  # several micro-batches
    policy, other = load_policy(config), load_policy(config)
    parameters = other.trainable_parameters()
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    reference_loss(other, rows).backward()
    torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
    cold_start(policy, config, rows).train()
    optimizer.step()
    for ours, theirs in zip(policy.trainable_parameters(), parameters, strict=True):
        # Adam's first step is the sign of the gradient, which is rounding noise for a few elements.
        assert torch.isclose(ours, theirs, atol=2e-5, rtol=1e-3).float().mean() > 0.99


def test_it_learns_and_becomes_the_reference(config):
    rows = [row | {"id": str(i), "task": "t"} for i, row in enumerate(write_demonstrations(["sums"], 32, seed=0))]
    config.sft_learning_rate = 2e-3
    policy = load_policy(config)
    with torch.no_grad():
        before = reference_loss(policy, rows)
    cold_start(policy, config, rows).train()
    with torch.no_grad():
        after = reference_loss(policy, rows)
        with policy.reference():
            frozen = reference_loss(policy, rows)
        with policy.model.disable_adapter():
            base = reference_loss(policy, rows)
    assert after < before / 2
    assert frozen == after and base == pytest.approx(before.item(), abs=1e-6)
    assert not any(p.requires_grad for name, p in policy.model.named_parameters() if ".reference." in name)


def run(folder, *arguments):
    train.main([*SMALL.split(), "--output-dir", str(folder), "--device", "cpu", *map(str, arguments)])


def test_a_run_evaluates_before_and_after_it(tmp_path, demonstrations, capsys):
    folder = tmp_path / "run"
    run(
        folder,
        "--sft-data",
        demonstrations,
        "--sft-epochs",
        1,
        "--train-data",
        "sums",
        "words",
        "--beta",
        "0.01",
        "--num-mini-batches",
        1,
    )
    output = capsys.readouterr().out
    assert "cold start: 24 demonstrations from" in output and "cold start  epoch 1/1  loss" in output
    assert "before" in output and "cold start   " in output and "over the cold start, greedy:" in output
    evaluation = json.loads((folder / "summary.json").read_text())["eval"]
    assert {"before", "cold_start", "after", "gain", "gain_over_cold_start"} == set(evaluation)
    for name in ("before", "cold_start", "after"):
        right = sum(line["verdict"] == "right" for line in lines(folder / f"eval/{name}.jsonl"))
        assert evaluation[name]["accuracy"] == right / 12
    assert lines(folder / "metrics.jsonl")[0]["kl"] == 0.0  # the reference is the policy after the cold start
    assert "step_000000" in {path.name for path in (folder / "checkpoints").iterdir()}
    with pytest.raises(ConfigError, match="sft_epochs 1 -> 2: this cannot change during a run"):
        train.main(["--resume", str(folder), "--sft-epochs", "2", "--accept-changes"])


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param("in the cold start", marks=pytest.mark.slow),
        pytest.param("after the cold start", marks=pytest.mark.slow),
        pytest.param("in a step", marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_resumes_to_the_same_bits(tmp_path, demonstrations, fault):
    more = f"--sft-data {demonstrations} --sft-epochs 1 --beta 0.01"
    faults = {
        "in the cold start": {"rl.optimizer:Optimizer:step": (2, signal.SIGKILL)},
        "after the cold start": {"rl.run.session:Run:begin_step": (1, signal.SIGKILL)},
        "in a step": {"rl.run.folder:RunFolder:append_metrics": (4, signal.SIGKILL)},
    }[fault]
    whole, killed = tmp_path / "whole" / "run", tmp_path / "killed" / "run"
    whole.parent.mkdir()
    killed.parent.mkdir()
    assert finish(whole, "grpo", more=more) == 0
    assert finish(killed, "grpo", more=more, faults=faults) == -signal.SIGKILL
    assert finish(killed, "grpo", resume=True) == 0, read_output(killed)
    if fault == "after the cold start":
        assert "resumed  from step 0" in read_output(killed) and "epoch 1/1" not in read_output(killed)
    assert_same(killed, whole)


def test_demonstrations_are_encoded_like_the_template_renders_them(policy):
    rows = [{"id": "1", "task": "t", "prompt": "What is 1 + 1?", "completion": " \\boxed{2}\n"}]
    (episode,) = encode_demonstrations(policy, rows)
    assert policy.tokenizer.decode(episode.completion_ids) == "\\boxed{2}<|end|>"
    assert episode.prompt_ids == policy.encode_prompt("What is 1 + 1?")


def test_a_template_that_opens_think(tmp_path, config):
    template = (
        "{%- for message in messages -%}<|{{ message.role }}|>{{ message.content }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}<|assistant|><think>{%- endif -%}"
    )
    config.model = copy_tiny(tmp_path / "model")
    (tmp_path / "model/chat_template.jinja").write_text(template)
    policy = load_policy(config)
    row = {"id": "1", "task": "t", "prompt": "1 + 1?", "completion": "<think>1+1=2</think>\\boxed{2}"}
    (episode,) = encode_demonstrations(policy, [row])
    assert policy.decode(episode.prompt_ids).endswith("<think>")
    assert policy.decode(episode.completion_ids) == "1+1=2</think>\\boxed{2}"
    with pytest.raises(ConfigError, match="row 1: the chat template starts every completion with '<think>'"):
        encode_demonstrations(policy, [row | {"completion": "\\boxed{2}"}])


def test_too_long_demonstrations_and_bad_settings(policy):
    row = {"id": "1", "task": "t", "prompt": "1 + 1?", "completion": "1" * 600}
    with pytest.raises(
        ConfigError, match=r"sft_data: a demonstration has 6\d\d tokens, but the model's context is 512"
    ):
        encode_demonstrations(policy, [row])
    with pytest.raises(ConfigError, match="sft_epochs is 0, but must be at least 1"):
        Config(sft_epochs=0).check()
    with pytest.raises(ConfigError, match="sft_learning_rate is 0, but must be above 0"):
        Config(sft_learning_rate=0.0).check()


def test_a_gradient_that_is_not_finite_is_reported(config):
    rows = [row | {"id": str(i), "task": "t"} for i, row in enumerate(write_demonstrations(["sums"], 8, seed=0))]
    policy = load_policy(config)
    policy.trainable_parameters()[0].data[0] = torch.nan
    with pytest.raises(ConfigError, match="sft_learning_rate: the gradient of the cold start is not finite"):
        cold_start(policy, config, rows).train()
