"""bench/step.py and bench/learn.py: their arithmetic, their reward, their errors. No peer is needed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import learn, sides, step
from bench.peers import CheapReward, of_completions


def taken(seconds, tokens=1000, trained=32):
    """A step of 32 completions."""
    parts = {"rollout": seconds / 2, "scoring": 0.0, "logprobs": 0.0, "update": seconds / 2, "step": seconds}
    return parts | {"completions": 32, "tokens": tokens, "trained_completions": trained, "trained_tokens": tokens // 2}


ROUNDS = {
    "ours": [[taken(1.0), taken(2.0), taken(3.0)], [taken(1.0, trained=8)] * 3],
    "peer": [[taken(6.0), taken(8.0), taken(10.0)], [taken(2.0)] * 3],
}


def run(script, *arguments):
    return subprocess.run([sys.executable, f"bench/{script}.py", *arguments], capture_output=True, text=True)


def test_figures_by_hand():
    found = step.figures(ROUNDS["ours"][0])
    assert (found["step"], found["rollout"], found["logprobs"]) == (2.0, 1.0, 0.0)
    assert (found["completions"], found["tokens"], found["trained_tokens"]) == (16.0, 500.0, 250.0)


def test_ratios_are_ours_to_win_above_one():
    found = step.compare(ROUNDS, {"ours": 1000.0, "peer": 500.0})
    assert found["ratio"]["step"] == 3.0 and found["spread"]["step"]["least"] == 2.0  # 8 / 2 and 2 / 1
    assert found["ratio"]["rollout"] == 3.0 and found["ratio"]["memory"] == 0.5
    assert found["ratio"]["tokens"] == pytest.approx(3.0)  # rates the other way round
    assert found["ratio"]["logprobs"] is None and found["spread"]["logprobs"] is None
    ours = found["sides"]["ours"]
    assert ours["skipped"] == pytest.approx(72 / 192) and ours["mean_length"] == pytest.approx(1000 / 32)
    assert ours["step"] == 1.0  # the median of all steps, not of the rounds
    json.dumps(found)


def test_the_table_names_what_the_peer_wins():
    text = step.report(step.compare(ROUNDS, {"ours": 1000.0, "peer": 500.0}), "TRL 1.16.0")
    assert "| **whole step, s** | 1.000 | 4.000 | 3.00 (2.00 to 4.00) |" in text
    assert "| log-probabilities, s | 0.000 | 0.000 | – |" in text
    assert "| peak memory, MB | 1,000 | 500 | 0.50 |" in text
    assert "TRL 1.16.0 is ahead in: peak memory, MB" in text
    assert "37.5 % of the completions skipped" in text
    ahead = step.report(step.compare(ROUNDS, {"ours": 500.0, "peer": 1000.0}), "TRL 1.16.0")
    assert "TRL 1.16.0 is ahead in: nothing that is measured here" in ahead


def test_log_probabilities_that_are_off_stop_the_comparison():
    class Answers:
        def __init__(self, name, answer):
            self.name, self.answer, self.about = name, answer, {"dtype": "float32"}

        def ask(self, do, **_):
            return self.answer

    off = {"logprobs": 2e-6, "sampler_logprobs": 1e-6}
    ours = Answers("Ponder", {"prompts": [], "completions": [], "plain": [[-1.0, -2.0], [-3.0]], "off": off})
    found = step.check_both(ours, Answers("TRL", [[-1.0, -2.0], [-3.00005]]))
    assert found == {"Ponder's roll-out": 1e-6, "Ponder's update": 2e-6, "TRL": pytest.approx(5e-5)}
    with pytest.raises(sides.BenchError, match="TRL: log-probabilities are off by 0.01 nats; 0.0001 is allowed"):
        step.check_both(ours, Answers("TRL", [[-1.0, -2.01], [-3.0]]))


def test_log_probabilities_are_found_in_the_rows_of_either_trainer():
    prompts, completions = [[1, 2, 3], [1]], [[7, 8], [7, 8, 9]]
    trl = [[-1.0, -2.0, 0.0], [-3.0, -4.0, -5.0]]
    unsloth = [[0.0, 0.0, -1.0, -2.0, 0.0], [-3.0, -4.0, -5.0, 0.0, 0.0]]  # two places of padding are behind the second
    expected = [[-1.0, -2.0], [-3.0, -4.0, -5.0]]
    assert of_completions(trl, prompts, completions) == of_completions(unsloth, prompts, completions) == expected


def test_a_peer_that_is_not_installed_here(tmp_path, monkeypatch):
    monkeypatch.setattr(sides.importlib.util, "find_spec", {}.get)
    with pytest.raises(sides.BenchError, match="trl is not installed here: without --here it gets an environment"):
        sides.start_peer({"peer": "trl-cb"}, tmp_path, here=True)


def test_the_coin_is_seeded_and_even_and_never_the_same_for_a_whole_group():
    def flips(seed, texts):
        reward = CheapReward("coin", seed)
        return [reward("1 + 1?", text, "2") for text in texts]

    texts = [f"text {i}" for i in range(2000)]
    assert flips(0, texts) == flips(0, texts) != flips(1, texts)
    assert set(flips(0, texts)) == {0.0, 1.0} and abs(sum(flips(0, texts)) / 2000 - 0.5) < 0.05
    equal = flips(0, ["same"] * 8000)
    groups = [sum(equal[i : i + 8]) for i in range(0, 8000, 8)]
    assert sum(g in (0, 8) for g in groups) / 1000 < 0.02  # equal completions get rewards of their own


@pytest.mark.parametrize(
    "text, right", [("<think>1</think>\\boxed{7}", 1), ("\\boxed{7} \\boxed{8}", 0), ("7", 0), ("\\boxed{ 7 }", 1)]
)
def test_the_task_reward_reads_the_last_box(text, right):
    assert CheapReward("task", 0)("3 + 4?", text, "7") == right


def test_both_sides_are_asked_the_same_every_time():
    rows, held_out = sides.draw_rows(2, seed=1)
    assert len(rows) == 2 * sides.PROMPTS and len(held_out) == 8 and sides.draw_rows(2, seed=1)[0] == rows
    assert rows != sides.draw_rows(2, seed=2)[0] and all(row["answer"] for row in rows + held_out)
    assert not {row["prompt"] for row in rows} & {row["prompt"] for row in held_out}


def test_the_table_of_learning():
    def side(steps, seconds, reached=True):
        return {"steps": steps, "seconds": seconds, "reached": reached, "accuracy": {steps: 0.9}}

    runs = [{"seed": 0, "ours": side(12, 10.0), "peer": side(15, 40.0)}]
    runs += [{"seed": 1, "ours": side(9, 20.0), "peer": side(60, 300.0, False)}]
    for one in runs:
        one["ratio"] = learn.seconds_ratio(one)
    text = learn.report(runs, "TRL 1.16.0", 0.8)
    assert "| 0 | 12 | 10.0 | 15 | 40.0 | 4.00 |" in text
    assert "| 1 | 9 | 20.0 | 60, not reached | 300.0 | – |" in text
    assert "median of 1 seeds (least to greatest): 4.00 (4.00 to 4.00)" in text


def test_an_environment_is_made_once(tmp_path, monkeypatch):
    commands = []

    def pretend(command, **_):
        commands.append(command)
        tmp_path.joinpath("env").mkdir(exist_ok=True)
        return subprocess.CompletedProcess(command, int("broken==1" in command), stderr="x\nno such version")

    monkeypatch.setattr(subprocess, "run", pretend)
    monkeypatch.setenv("PIP_ARGS", "--extra-index-url URL")
    for _ in range(2):
        assert sides.make_environment(tmp_path / "env", ["a==1", "b==2"]).parent.parent == tmp_path / "env"
    assert len(commands) == 2 and commands[1][-4:] == ["--extra-index-url", "URL", "a==1", "b==2"]
    with pytest.raises(sides.BenchError, match="env cannot be set up: no such version"):
        sides.make_environment(tmp_path / "env", ["broken==1"])


def test_a_side_that_ends_or_fails_says_why(tmp_path):
    speak = "import sys; from bench.peers import run_side; run_side({})"

    def start(body):
        return sides.Side("TRL", [sys.executable, "-c", speak.format(body)], {"n": 1}, tmp_path / "log")

    with start("lambda c: [print('library noise'), c.answer({'n': c.job['n']}), c.next_request(), 1 / 0]") as side:
        assert side.about == {"n": 1}
        with pytest.raises(sides.BenchError, match="TRL: ZeroDivisionError: division by zero"):
            side.ask("anything")
    with pytest.raises(sides.BenchError, match="TRL: it ended with status 3: "):
        start("lambda c: sys.exit(3)")


@pytest.mark.parametrize("script, word", [("step", "--micro-batch"), ("learn", "--target")])
def test_help(script, word):
    done = run(script, "--help")
    assert done.returncode == 0 and word in done.stdout and "more than 1" in done.stdout


@pytest.mark.parametrize(
    "arguments, what", [(["--peer", "unsloth"], "--peer unsloth"), (["--model", "qwen3-4b"], "--model qwen3-4b")]
)
def test_without_a_gpu_what_needs_one_is_refused(arguments, what, monkeypatch):
    monkeypatch.setattr(sides, "has_gpu", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench/step.py", *arguments])
    with pytest.raises(SystemExit, match=f"error: {what} needs an NVIDIA GPU"):
        step.main()


def test_a_random_model_ends_by_one_law(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    small = {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 8, "intermediate_size": 32}
    monkeypatch.setitem(step.ARCHITECTURES, "small", small)
    step.make_random_model(str(tmp_path), "small", vocabulary=1000, mean_length=50)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert (
        len(model.generation_config.eos_token_id) == 20
        and tokenizer.eos_token_id in model.generation_config.eos_token_id
    )
    text = "What is 3 + 4 in [é]?\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text and len(tokenizer) == model.config.vocab_size == 1000


@pytest.mark.slow
def test_our_side_takes_steps(tmp_path):
    rows, _ = sides.draw_rows(2, seed=0)
    with sides.start_ours(sides.tiny_job(rows, 0, 2, 1e-3) | {"reward": "coin"}, tmp_path) as ours:
        assert len(ours.about["prompts"]) == 64
        assert max(ours.ask("check")["off"].values()) < 1e-4
        done = ours.ask("steps", n=2)
        ours.ask("save", folder=str(tmp_path / "lora"))
        assert 0 <= ours.ask("evaluate", folder=str(tmp_path / "lora")) <= 1
    first = done["steps"][0]
    assert first["completions"] == 256 and first["trained_completions"] > 240 and done["memory_mb"]["process"] > 100
    assert first["step"] == pytest.approx(sum(first[part] for part in ("rollout", "scoring", "update")), rel=0.05)
    assert Path(tmp_path, "lora/adapter_config.json").is_file()
