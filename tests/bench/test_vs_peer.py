"""bench/vs_peer.py: ratios, the accuracy to reach, the table, the reward; and a small run beside TRL, if it is installed."""

import argparse
import importlib.metadata
import importlib.util
import json
import subprocess
import sys

import pytest

from bench import vs_peer

TRL = importlib.metadata.version("trl") if importlib.util.find_spec("trl") else ""


def step(seconds, memory=100.0, accuracy=0.5):
    return {"rollout": seconds / 4, "update": 3 * seconds / 4, "step": seconds, "memory": memory, "tokens": 1000} | {
        "accuracy": accuracy
    }


ROUNDS = {
    "ours": [[step(1.0), step(2.0), step(3.0)], [step(1.0, memory=120.0)] * 3],
    "peer": [[step(6.0), step(8.0), step(10.0)], [step(2.0, memory=60.0)] * 3],
}


def test_ratios_above_one_are_better_for_ponder():
    result = vs_peer.compare(ROUNDS)
    assert result["spread"]["step"] == {"median": 3.0, "least": 2.0, "greatest": 4.0}  # of 8 / 2 and 2 / 1
    assert result["ratio"]["rollout"] == result["ratio"]["update"] == 3.0
    assert result["spread"]["memory"] == {"median": 0.75, "least": 0.5, "greatest": 1.0}
    assert result["sides"]["ours"]["step"] == 1.0  # the median of all steps, not of the rounds
    assert result["sides"]["peer"]["memory"] == 100.0  # the maximum
    json.dumps(result)


def test_the_table():
    more = {
        "peer": "trl 1.0",
        "machine": "a laptop",
        "device": "cpu",
        "seed": 3,
        "command": ["a", "b c"],
        "off_by": 1e-6,
    }
    more |= {"versions": {"torch": "2.0"}, "cold": {"ours": {"loading": 1, "first_step": 2.5}}}
    text = vs_peer.report(vs_peer.compare(ROUNDS) | more)
    assert "| | Ponder | trl 1.0 | ratio" in text
    assert "| step, s | 1.000 | 4.000 | 3.00 (2.00 to 4.00) |" in text
    assert "| memory, MB | 120 | 100 | 0.75 (0.50 to 1.00) |" in text
    assert "a laptop, cpu; seed 3; a 'b c'" in text and "torch 2.0" in text and "2.5 s for the first step" in text


def test_steps_and_seconds_until_an_accuracy():
    steps = [step(2.0, accuracy=0.3), step(1.0, accuracy=0.8), step(5.0, accuracy=0.7)]
    assert vs_peer.until(0.8, steps) == {"steps": 2, "seconds": 3.0}
    assert vs_peer.until(0.2, steps) == {"steps": 1, "seconds": 2.0}
    assert vs_peer.until(0.9, steps) is None


@pytest.mark.parametrize(
    "text, right", [("<think>1</think>\\boxed{7}", 1), ("\\boxed{7} \\boxed{8}", 0), ("7", 0), ("\\boxed{ 7 }", 1)]
)
def test_the_reward_reads_the_last_box(text, right):
    assert vs_peer.is_right(text, "7") == right


@pytest.fixture(scope="module")
def ponder():
    settings = {
        "train_data": ["sums"],
        "eval_questions": 8,
        "max_steps": 2,
        "prompts_per_step": 4,
        "num_generations": 4,
    }
    return vs_peer.Ponder(settings | {"max_completion_length": 24, "device": "cpu", "control": "random-reward"})


def test_the_peer_gets_the_prompts_of_ponders_steps_in_their_order(ponder, monkeypatch):
    taken = []
    take = ponder.questions.take
    monkeypatch.setattr(ponder.questions, "take", lambda *how: taken.append(take(*how)) or taken[-1])
    steps = [ponder.step() for _ in range(2)]
    assert sum(taken, []) == ponder.order
    for figures in steps:
        assert figures["step"] == pytest.approx(figures["rollout"] + figures["update"])
        assert figures["tokens"] > 16 and 0 <= figures["accuracy"] <= 1 and figures["memory"] > 100


def test_the_sample_that_both_sides_score(ponder):
    prompt, completions, logprobs = ponder.sample()
    assert prompt == ponder.order[0].prompt_ids and len(completions) == 8
    assert len(logprobs) == sum(map(len, completions)) and max(logprobs) <= 0


@pytest.mark.parametrize("error, fits", [(2e-5, True), (0.01, False), (float("nan"), False)])
def test_log_probabilities_that_differ_end_the_script(ponder, monkeypatch, tmp_path, error, fits):
    class Peer:
        def __init__(self, *job):
            prompt, completions = job[-1]
            assert prompt == ponder.order[0].prompt_ids and len(completions) == 8
            self.logprobs = ponder.sample()[2]
            self.logprobs[3] += error

    monkeypatch.setattr(vs_peer, "Ponder", lambda settings: ponder)
    monkeypatch.setattr(vs_peer, "make_settings", lambda *_: {})
    monkeypatch.setattr(vs_peer, "Peer", Peer)
    if fits:
        assert vs_peer.start(argparse.Namespace(peer="trl"), str(tmp_path))[2] == pytest.approx(error, abs=1e-6)
    else:
        with pytest.raises(SystemExit, match="log-probabilities differ by .* nats; 0.0001 is allowed"):
            vs_peer.start(argparse.Namespace(peer="trl"), str(tmp_path))


def test_a_failure_of_the_peer_ends_the_script(capfd):
    with pytest.raises(SystemExit, match="the peer has failed"):
        vs_peer.Peer("trl", None, "adapter", [], ())
    assert "Traceback" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(TRL < "1.16" and not importlib.util.find_spec("triton"), reason="no TRL that trains here")
@pytest.mark.parametrize(
    "options", [["--random-weights", "qwen3-small"], ["--until", "50"]], ids=["random weights", "until"]
)
def test_a_small_run_beside_trl(tmp_path, options):
    file = tmp_path / "result.json"
    command = [
        sys.executable,
        "bench/vs_peer.py",
        "--rounds",
        "1",
        "--steps",
        "1",
        "--json",
        str(file),
        *options,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    assert "| roll-out, s |" in done.stdout and result["off_by"] < 1e-4
    assert all(result["sides"][side][name] > 0 for side in ("ours", "peer") for name in vs_peer.FIGURES)
    assert ("until" in result) == ("--until" in options)
