"""bench/vs_peer.py: ratios, time to an accuracy, table, reward; and a small comparison with TRL, if it is installed."""

import argparse
import importlib.metadata
import importlib.util
import json
import subprocess
import sys

import pytest

from bench import vs_peer

TRL = importlib.metadata.version("trl") if importlib.util.find_spec("trl") else ""


def make_step(seconds, memory=100.0, accuracy=0.5):
    return {"rollout": seconds / 4, "update": 3 * seconds / 4, "step": seconds, "memory": memory, "tokens": 1000} | {
        "accuracy": accuracy
    }


ROUNDS = {
    "ours": [[make_step(1.0), make_step(2.0), make_step(3.0)], [make_step(1.0, memory=120.0)] * 3],
    "peer": [[make_step(6.0), make_step(8.0), make_step(10.0)], [make_step(2.0, memory=60.0)] * 3],
}


def test_ratios_above_one_are_better_for_ponder():
    result = vs_peer.compare(ROUNDS)
    assert result["spread"]["step"] == {"median": 3.0, "least": 2.0, "greatest": 4.0}  # from 8 / 2 and 2 / 1
    assert result["ratio"]["rollout"] == result["ratio"]["update"] == 3.0
    assert result["spread"]["memory"] == {"median": 0.75, "least": 0.5, "greatest": 1.0}
    assert result["sides"]["ours"]["step"] == 1.0  # the median of all steps, not of the rounds
    assert result["sides"]["peer"]["memory"] == 100.0  # the maximum
    json.dumps(result)


def test_report_has_table_machine_and_versions():
    details = {
        "peer": "trl 1.0",
        "machine": "a laptop",
        "device": "cpu",
        "seed": 3,
        "command": ["a", "b c"],
        "off_by": 1e-6,
    }
    details |= {"versions": {"torch": "2.0"}, "cold": {"ours": {"loading": 1, "first_step": 2.5}}}
    text = vs_peer.report(vs_peer.compare(ROUNDS) | details)
    assert "| | Ponder | trl 1.0 | ratio" in text
    assert "| step, s | 1.000 | 4.000 | 3.00 (2.00 to 4.00) |" in text
    assert "| memory, MB | 120 | 100 | 0.75 (0.50 to 1.00) |" in text
    assert "a laptop, cpu; seed 3; a 'b c'" in text and "torch 2.0" in text and "2.5 s for the first step" in text


def test_steps_until_an_accuracy():
    steps = [make_step(2.0, accuracy=0.3), make_step(1.0, accuracy=0.8), make_step(5.0, accuracy=0.7)]
    assert vs_peer.steps_until(0.8, steps) == {"steps": 2, "seconds": 3.0}
    assert vs_peer.steps_until(0.2, steps) == {"steps": 1, "seconds": 2.0}
    assert vs_peer.steps_until(0.9, steps) is None


@pytest.mark.parametrize(
    "text, right", [("<think>1</think>\\boxed{7}", 1), ("\\boxed{7} \\boxed{8}", 0), ("7", 0), ("\\boxed{ 7 }", 1)]
)
def test_reward_uses_the_last_box(text, right):
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


def test_ponder_trains_on_the_prompts_that_the_peer_gets(ponder, monkeypatch):
    batches = []
    take = ponder.questions.take
    monkeypatch.setattr(ponder.questions, "take", lambda *args: batches.append(take(*args)) or batches[-1])
    steps = [ponder.step() for _ in range(2)]
    assert sum(batches, []) == ponder.order
    for figures in steps:
        assert figures["step"] == pytest.approx(figures["rollout"] + figures["update"])
        assert figures["tokens"] > 16 and 0 <= figures["accuracy"] <= 1 and figures["memory"] > 100


def test_sample_has_logprobs_of_all_tokens(ponder):
    prompt, completions, logprobs = ponder.sample()
    assert prompt == ponder.order[0].prompt_ids and len(completions) == 8
    assert len(logprobs) == sum(map(len, completions)) and max(logprobs) <= 0


@pytest.mark.parametrize("error, is_accepted", [(2e-5, True), (0.01, False), (float("nan"), False)])
def test_exits_if_logprobs_differ(ponder, monkeypatch, tmp_path, error, is_accepted):
    class Peer:
        def __init__(self, *job):
            prompt, completions = job[-1]
            assert prompt == ponder.order[0].prompt_ids and len(completions) == 8
            self.logprobs = ponder.sample()[2]
            self.logprobs[3] += error

    monkeypatch.setattr(vs_peer, "Ponder", lambda settings: ponder)
    monkeypatch.setattr(vs_peer, "make_settings", lambda *_: {})
    monkeypatch.setattr(vs_peer, "Peer", Peer)
    if is_accepted:
        assert vs_peer.start(argparse.Namespace(peer="trl"), str(tmp_path))[2] == pytest.approx(error, abs=1e-6)
    else:
        with pytest.raises(SystemExit, match="log-probabilities differ by .* nats; at most 0.0001"):
            vs_peer.start(argparse.Namespace(peer="trl"), str(tmp_path))


def test_exits_if_the_peer_fails(capfd):
    with pytest.raises(SystemExit, match="the peer has failed"):
        vs_peer.Peer("trl", None, "adapter", [], ())
    assert "Traceback" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(TRL < "1.16" and not importlib.util.find_spec("triton"), reason="no TRL that trains here")
@pytest.mark.parametrize(
    "options", [["--random-weights", "qwen3-small"], ["--until", "50"]], ids=["random weights", "until"]
)
def test_compares_with_trl(tmp_path, options):
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
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    result = json.loads(file.read_text())
    assert "| roll-out, s |" in process.stdout and result["off_by"] < 1e-4
    assert all(result["sides"][side][name] > 0 for side in ("ours", "peer") for name in vs_peer.FIGURES)
    assert ("until" in result) == ("--until" in options)
