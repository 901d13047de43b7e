"""The whole script train.py: the files of a run, its learning, and its errors."""

import json
import shutil
import statistics
import subprocess
import sys
import textwrap

import pytest
import yaml
from conftest import lines, read_rollouts, read_tokens

import train

SMALL = "--max-steps 3 --prompts-per-step 6 --num-generations 4 --eval-questions 12 --eval-steps 2 --save-steps 2 --train-questions 30"


def run(folder, *arguments):
    train.main([*SMALL.split(), "--output-dir", str(folder), "--device", "cpu", *map(str, arguments)])
    return folder


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """The folder and the console output of one short run on the tiny model."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    command = [sys.executable, "train.py", *SMALL.split(), "--output-dir", str(folder), "--device", "cpu"]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    assert process.stderr == ""  # no warnings
    return folder, process.stdout


def test_run_folder_has_the_documented_files(small_run):
    folder, _ = small_run
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    expected = "config.yaml rewards.py metrics.jsonl rollouts/000003.jsonl tokens/000003.json summary.json curve.png checkpoints/last"
    expected += " eval/before.jsonl eval/after.jsonl eval/step_000002.jsonl"
    for step in (2, 3):
        checkpoint_files = "adapter_config.json adapter_model.safetensors README.md tokenizer.json chat_template.jinja trainer_state.json"
        expected += "".join(f" checkpoints/step_00000{step}/{name}" for name in checkpoint_files.split())
    assert set(expected.split()) <= names
    assert not [name for name in names if "unfinished" in name]
    assert (folder / "checkpoints/last").read_text() == "step_000003\n"
    assert (folder / "rewards.py").read_text() == open("rewards.py").read()
    assert yaml.safe_load((folder / "config.yaml").read_text())["prompts_per_step"] == 6


def test_summary_has_the_documented_fields(small_run):
    summary = json.loads((small_run[0] / "summary.json").read_text())
    assert summary["algorithm"] == "grpo" and summary["model"] == "data/tiny" and summary["steps"] == 3
    assert summary["control"] == "none" and summary["alarms"] == {}
    assert summary["seed"] == 0 and summary["completions"] == 72 and summary["tokens"] > 72
    for when in ("before", "after"):
        for rates in (summary["eval"][when], *summary["eval"][when]["tasks"].values()):
            low, high = rates["ci95"]
            assert 0 <= low <= rates["accuracy"] <= high <= 1 and 0 <= rates["accuracy_sampled"] <= 1
            assert {"n", "thinking", "accuracy_when_thinking", "ci95_sampled", "thinking_sampled"} <= set(rates)
        assert set(summary["eval"][when]["tasks"]) == {"sums", "words", "functions"}
        assert summary["eval"][when]["n"] == 12
    assert {"accuracy", "ci95", "fixed", "broke", "n"} <= set(summary["eval"]["gain"])
    assert set(summary["seconds"]) == {"total", "setup", "cold_start", "rollout", "update", "eval"}
    parts = sum(seconds for part, seconds in summary["seconds"].items() if part != "total")
    assert parts <= summary["seconds"]["total"] + 0.1
    assert summary["peak_memory_mb"] > 100 and summary["versions"]["torch"]


def test_metrics_have_trls_names_and_agree_with_the_rollouts(small_run):
    metrics, rollouts = lines(small_run[0] / "metrics.jsonl"), read_rollouts(small_run[0])
    assert [m["step"] for m in metrics] == [1, 2, 3] and len(rollouts) == 72
    names = "reward reward_std frac_reward_zero_std rewards/correct/mean rewards/format/mean completions/mean_length "
    names += (
        "completions/clipped_ratio kl entropy clip_ratio/region_mean grad_norm num_tokens step_time loss learning_rate"
    )
    assert set(names.split()) <= set(metrics[0])
    assert all(m["alarms"] == [] and 0 < sum(v for k, v in m.items() if "outcomes/" in k) <= 1 for m in metrics)
    assert metrics[0]["kl"] == 0.0 < metrics[2]["kl"]  # the LoRA starts at zero
    assert all(m["sampling/sampling_logp_difference/max"] < 1e-3 for m in metrics)
    assert "eval/accuracy" in metrics[1] and "eval/accuracy" not in metrics[0]
    for m in metrics:
        step_rows = [r for r in rollouts if r["step"] == m["step"]]
        assert m["reward"] == pytest.approx(sum(r["reward"] for r in step_rows) / 24)
        assert m["accuracy"] == pytest.approx(sum(r["verdict"] == "right" for r in step_rows) / 24)
        assert m["completions/mean_length"] == pytest.approx(sum(r["tokens"] for r in step_rows) / 24)
        for group in (step_rows[i : i + 4] for i in range(0, 24, 4)):
            assert len({r["prompt_id"] for r in group}) == 1
            assert sum(r["advantage"] for r in group) == pytest.approx(0, abs=1e-4)
    assert set(rollouts[0]) >= {
        "prompt_id",
        "completion",
        "finish_reason",
        "rewards",
        "verdict",
        "reasons",
        "advantage",
    }


def test_token_files_contain_the_completions_of_one_group(small_run):
    tokens, rollouts = read_tokens(small_run[0]), read_rollouts(small_run[0])
    assert [t["step"] for t in tokens] == [1, 2, 3]
    for t in tokens:
        texts = [r["completion"] for r in rollouts if (r["step"], r["prompt_id"]) == (t["step"], t["prompt_id"])]
        assert ["".join(c["tokens"]).removesuffix("<|end|>") for c in t["completions"]] == texts


def test_evaluations_have_one_line_per_question(small_run):
    before, after = (lines(small_run[0] / f"eval/{name}.jsonl") for name in ("before", "after"))
    assert [r["question"] for r in before] == [r["question"] for r in after] and len(before) == 12
    assert set(before[0]) >= {"question", "expected", "completion", "verdict", "sampled"}
    summary = json.loads((small_run[0] / "summary.json").read_text())["eval"]
    state = json.loads((small_run[0] / "checkpoints/step_000003/trainer_state.json").read_text())
    assert state["step"] == 3 and state["eval"] == summary["after"]
    assert (
        f"{summary['after']['accuracy']:.1%} at step"
        in (small_run[0] / "checkpoints/step_000003/README.md").read_text()
    )
    assert sum(r["verdict"] == "right" for r in after) / 12 == summary["after"]["accuracy"]
    assert sum(r["sampled"]["verdict"] == "right" for r in before) / 12 == summary["before"]["accuracy_sampled"]


def test_console_output(small_run):
    out = small_run[1]
    for part in (
        "CPU cores",
        "step 1/3  accuracy",
        "left",
        "Before training",
        "After training",
        "gain, greedy:",
        "read back",
    ):
        assert part in out
    assert "loss" not in out


def test_the_same_seed_gives_the_same_run(small_run, tmp_path):
    again = run(tmp_path / "again")
    other = run(tmp_path / "other", "--seed", 1)

    def results(folder):
        excluded = ("time", "memory")
        rows = [
            {k: v for k, v in m.items() if not any(t in k for t in excluded)} for m in lines(folder / "metrics.jsonl")
        ]
        return rows, read_rollouts(folder), (folder / "eval/after.jsonl").read_text()

    assert results(small_run[0]) == results(again)
    assert results(small_run[0])[1] != results(other)[1]
    weights = "checkpoints/step_000003/adapter_model.safetensors"
    assert (small_run[0] / weights).read_bytes() == (again / weights).read_bytes()


def test_a_saved_adapter_can_be_evaluated(small_run, tmp_path, capsys):
    checkpoint = small_run[0] / "checkpoints/step_000003"
    # The settings come from the adapter's run.
    train.main(["--eval-only", "--adapter", str(checkpoint), "--output-dir", str(tmp_path / "eval")])
    evaluated = tmp_path / "eval"
    table = small_run[1][small_run[1].index("held-out questions   ") :].partition("\n\n")[0]
    assert table in capsys.readouterr().out  # the same table as at the end of the run
    first, second = (json.loads((folder / "summary.json").read_text())["eval"] for folder in (small_run[0], evaluated))
    assert second["before"] == first["before"] and second["after"] == first["after"]
    assert not (evaluated / "metrics.jsonl").exists()
    base = run(tmp_path / "base", "--eval-only")
    assert json.loads((base / "summary.json").read_text())["eval"] == {"before": first["before"]}


def test_it_learns(tmp_path):
    """A few steps at a high learning rate make the base model think before it answers."""
    settings = "--train-data words --max-steps 12 --prompts-per-step 16 --num-generations 8 --eval-questions 60 --eval-steps 0 --learning-rate 3e-3 --train-questions 1000"
    train.main([*settings.split(), "--output-dir", str(tmp_path / "run"), "--device", "cpu"])
    result = json.loads((tmp_path / "run/summary.json").read_text())["eval"]
    assert result["after"]["thinking_sampled"] > result["before"]["thinking_sampled"] + 0.2
    assert result["after"]["accuracy_sampled"] > result["before"]["accuracy_sampled"] + 0.15


@pytest.mark.parametrize(
    "arguments",
    [
        "--loss-type grpo --scale-rewards none --beta 0.05",
        "--loss-type dr_grpo --num-iterations 2 --num-mini-batches 2 --epsilon-high 0.28 --delta 4",
        "--beta 0.05 --kl-estimator k1 --mask-truncated-completions --max-completion-length 20",
        "--load-in-4bit --gradient-checkpointing --top-k 20 --scale-rewards batch",
        "--dtype float16 --temperature 0.8 --system-prompt Think. --lr-scheduler-type cosine --warmup-ratio 0.5",
    ],
)
def test_settings_run(tmp_path, arguments):
    folder = run(tmp_path / "run", "--max-steps", 2, *arguments.split())
    metrics = lines(folder / "metrics.jsonl")
    assert len(metrics) == 2 and all(m["skipped_updates"] == 0 for m in metrics)
    assert any(m["grad_norm"] > 0 for m in metrics)


# --- custom questions and rewards


def write_custom_files(tmp_path):
    rows = [{"question": f"What is {i} + {j}?", "gold": i + j} for i in range(1, 7) for j in range(1, 7)]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "my_rewards.py").write_text(
        textwrap.dedent(
            """
            from grading import grade_math, reward

            @reward
            def correct(completion):
                return grade_math(completion.answer, completion.row["gold"])

            @reward(weight=0.1)
            def short(completion):
                return max(0, 1 - completion.tokens / 50), f"{completion.tokens} tokens"
            """
        )
    )
    return ["--train-data", tmp_path / "questions.jsonl", "--rewards-file", tmp_path / "my_rewards.py"]


def test_custom_questions_and_rewards(tmp_path, capsys):
    folder = run(tmp_path / "run", *write_custom_files(tmp_path))
    assert "24 training questions, 6 held out" in capsys.readouterr().out
    first = read_rollouts(folder)[0]
    assert set(first["rewards"]) == {"correct", "short"} and "tokens" in first["reasons"]["short"]
    assert first["task"] == "questions"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--train-data", "TMP/nothing.jsonl"], "TMP/nothing.jsonl: there is no such file"),
        (["--train-data", "TMP/broken.jsonl"], "TMP/broken.jsonl:2: not valid JSON"),
        (["--train-data", "TMP/empty.jsonl"], "TMP/empty.jsonl: the file has no rows"),
        (["--train-data", "TMP/questions.jsonl", "--columns", "answer", "glod"], "questions.jsonl:1: columns maps answer to 'glod'"),
        (["--train-data", "TMP/nocolumn.jsonl"], "nocolumn.jsonl:1: no column prompt"),
        (["--train-data", "TMP/questions.jsonl"], "only format applies, but correct or passes_tests"),
        (["--train-data", "TMP/badtest.jsonl"], "row badtest:1, column tests:"),
        (["--reward-funcs", "corect"], "reward_funcs: rewards.py has no reward function 'corect'. Did you mean 'correct'?"),
        (["--rewards-file", "TMP/none.py"], "rewards_file: there is no file"),
        (["--config", "TMP/wrong.yaml"], "wrong.yaml: max_steps is 'soon', but must be a whole number"),
        (["--num-generations", "1"], "num_generations is 1"),
        (["--temperature", "0"], "temperature is 0"),
        (["--code-timeout", "0"], "code_timeout is 0, but must be above 0 (seconds"),
        (["--model", "data/tinny"], "did you mean data/tiny?"),
        (["--model", "TMP"], "has no config.json"),
        (["--adapter", "TMP"], "is not a saved LoRA"),
        (["--output-dir", "TMP"], "exists already"),
        (["--output-dir", "TMP/empty.jsonl/run"], "output_dir"),
        (["--max-completion-length", "5000"], "the model's context is 512"),
        (["--max-seq-length", "5000"], "max_completion_length"),
    ],
)  # fmt: skip
def test_errors_are_one_line_and_leave_no_files(tmp_path, arguments, message):
    """The error is one line that names the file, line or key and the remedy. No run folder is created."""
    write_custom_files(tmp_path)
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"}\n{"prompt\n')
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "nocolumn.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "badtest.jsonl").write_text('{"prompt": "a", "tests": ["f(1) = 2"]}\n{"prompt": "b"}\n')
    (tmp_path / "wrong.yaml").write_text("max_steps: soon\n")
    before = sorted(tmp_path.rglob("*"))
    arguments = [argument.replace("TMP", str(tmp_path)) for argument in arguments]
    if "--output-dir" not in arguments:
        arguments += ["--output-dir", str(tmp_path / "run")]
    with pytest.raises((train.ConfigError, train.DataError, train.RewardError)) as error:
        train.main(arguments)
    assert message.replace("TMP", str(tmp_path)) in str(error.value) and "\n" not in str(error.value)
    assert not [path for path in sorted(tmp_path.rglob("*")) if path not in before and "__pycache__" not in str(path)]


def test_errors_are_one_line_on_the_terminal(tmp_path):
    command = [sys.executable, "train.py", "--model", "data/tinny", "--output-dir", str(tmp_path / "run")]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 1 and process.stdout == "" and not (tmp_path / "run").exists()
    assert process.stderr.startswith("error: model: data/tinny cannot be loaded") and process.stderr.count("\n") == 1


def test_adapter_that_loads_differently_is_an_error(tmp_path, monkeypatch):
    """The check at the end of a run detects an adapter file that differs from the weights in memory."""
    import rl.model.lora
    import rl.run.checkpoint

    save = rl.model.lora.save_adapter

    def lossy(policy, folder):
        from conftest import fill_lora

        saved = {name: p.data.clone() for name, p in policy.model.named_parameters() if p.requires_grad}
        fill_lora(policy, 0.2)
        save(policy, folder)
        for name, p in policy.model.named_parameters():
            if name in saved:
                p.data = saved[name]

    monkeypatch.setattr(rl.run.checkpoint, "save_adapter", lossy)
    with pytest.raises(train.RunError, match="step_000003.* read back"):
        run(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_default_run_learns_to_think(tmp_path, seed):
    """The results in the README, for three seeds: held-out accuracy and thinking before and after."""
    train.main(["--output-dir", str(tmp_path / "run"), "--seed", str(seed)])
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    before, after = summary["eval"]["before"], summary["eval"]["after"]
    assert summary["alarms"] == {}
    assert before["n"] >= 400 and before["accuracy_sampled"] <= 0.5 and before["thinking_sampled"] <= 0.45
    assert after["accuracy"] >= 0.92 and after["accuracy_sampled"] >= 0.87
    assert all(min(task["accuracy"], task["accuracy_sampled"]) >= 0.88 for task in after["tasks"].values())
    assert all(after["tasks"][task]["thinking_sampled"] >= 0.95 for task in ("sums", "words"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ppo_learns_to_think_with_a_useful_critic(tmp_path, seed):
    """The critic explains variance before updates, in steps with an accuracy between 20 and 80 %."""
    train.main(["--config", "configs/tiny_ppo.yaml", "--output-dir", str(tmp_path / "run"), "--seed", str(seed)])
    after = json.loads((tmp_path / "run/summary.json").read_text())["eval"]["after"]
    metrics = lines(tmp_path / "run/metrics.jsonl")
    explained = [m["explained_variance"] for m in metrics if 0.2 <= m["accuracy"] <= 0.8]
    assert after["accuracy"] >= 0.9 and len(explained) >= 5 and statistics.median(explained) > 0.3


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_long_sums_learns_more_than_to_think(tmp_path, seed):
    """Most completions think from the start, and their accuracy rises on sums longer than in pretraining."""
    train.main(["--config", "configs/long_sums.yaml", "--output-dir", str(tmp_path / "run"), "--seed", str(seed)])
    result = json.loads((tmp_path / "run/summary.json").read_text())["eval"]
    before, after = (result[when]["tasks"]["long_sums"] for when in ("before", "after"))
    assert before["thinking_sampled"] > 0.5
    for name in ("accuracy_when_thinking", "accuracy_when_thinking_sampled"):
        assert before[name] < 0.2 and after[name] >= before[name] + 0.2
    assert "longer_sums" in result["after"]["tasks"]


@pytest.mark.slow
def test_default_run_learns_in_4_bit(tmp_path):
    train.main(["--output-dir", str(tmp_path / "run"), "--load-in-4bit"])
    result = json.loads((tmp_path / "run/summary.json").read_text())["eval"]
    assert result["after"]["accuracy_sampled"] >= result["before"]["accuracy_sampled"] + 0.4
    shutil.rmtree(tmp_path / "run")
