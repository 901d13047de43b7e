"""bench/compare.py: completions to the goal, table, plot, skipping of finished runs, and a small run."""

import json
import math
import re
import subprocess

import pytest

from bench import compare
from rl.run.read_config import read_config


@pytest.mark.parametrize(
    "points, expected",
    [
        ([(0, 0.2), (1000, 0.6), (2000, 1.0)], 1500),  # halfway from 0.6 to 1.0
        ([(0, 0.0), (1000, 0.8), (2000, 0.9)], 1000),  # exactly at an evaluation
        ([(0, 0.4), (1000, 0.9), (2000, 0.5), (3000, 0.9)], 800),  # the first time it is reached
        ([(0, 0.4), (1000, 0.2), (2000, 1.0)], 1750),  # interpolated from the previous evaluation, not from the start
        ([(0, 0.85), (1000, 0.2)], 0),  # before training
        ([(0, 0.2), (1000, 0.79)], math.inf),
        ([(0, 0.2)], math.inf),
    ],
)
def test_completions_to_goal(points, expected):
    assert compare.completions_to_goal(points, 0.8) == pytest.approx(expected)


def test_spread_shows_median_and_range():
    assert compare.spread([3, 1, 2], ".0f") == "2 (1 to 3)"
    assert compare.spread([1234.4], ",.0f") == "1,234"
    assert compare.spread([2.01, 2.04], ".1f") == "2.0"  # equal after rounding
    assert compare.spread([1000, math.inf, 2000], ",.0f") == "2,000 (1,000 to not reached)"
    assert compare.spread([math.inf, math.inf], ",.0f") == "not reached"


@pytest.mark.parametrize("method", compare.METHODS)
def test_methods_are_valid_and_have_equal_budgets(method):
    arguments = [*compare.METHODS[method].split(), "--seed", "3", "--max-steps", "24"]
    config, _ = read_config(arguments, "configs/tiny.yaml")
    assert (config.seed, config.max_steps) == (3, 24) and config.critic_warmup_steps < config.max_steps
    assert (config.prompts_per_step, config.num_generations) == (32, 8)
    assert (config.model, config.temperature, config.train_data) == ("data/tiny", 1, ["sums", "words", "functions"])


def write_run(folder, after=0.9):
    """Write a run of three steps with 3, 2 and 4 completions, evaluated before, after the first step and at the end."""
    (folder / "rollouts").mkdir(parents=True)
    for step, count in enumerate([3, 2, 4], 1):
        (folder / f"rollouts/{step:06d}.jsonl").write_text("{}\n" * count)
    metrics = [{"kl": step / 10, "time/rollout": 1.0, "time/update": 2.0} for step in range(3)]
    metrics[0]["eval/accuracy"] = 0.4
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    rates = [{"accuracy": accuracy, "accuracy_sampled": 0.5} for accuracy in (0.2, after)]
    summary = {"finished": True, "eval": dict(zip(("before", "after"), rates))}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_reads_figures_of_a_run(tmp_path):
    figures = compare.read_figures(write_run(tmp_path / "run"))
    assert figures["points"] == [(0, 0.2), (3, 0.4), (9, 0.9)]
    assert (figures["completions"], figures["seconds"], figures["greedy"], figures["sampled"]) == (9, 9.0, 0.9, 0.5)
    assert figures["kl"] == pytest.approx(0.1) and figures["to_goal"] == pytest.approx(7.8)


@pytest.fixture
def comparison(tmp_path, monkeypatch):
    """A function that calls main in an empty project, with a fake train.py, and returns the runs that were trained."""
    trained = []
    run = subprocess.run

    def fake_run(command, **options):
        if "--output-dir" not in command:  # matplotlib runs a command to list the fonts
            return run(command, **options)
        folder = command[command.index("--output-dir") + 1]
        trained.append(folder)
        if "gspo" in folder:
            return subprocess.CompletedProcess(command, 1, stderr="error: out of luck\n")
        write_run(tmp_path / folder, after=0.7 if folder.endswith("1") else 0.9)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(compare, "ROOT", tmp_path)
    monkeypatch.setattr(subprocess, "run", fake_run)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # main sets it; restored after the test
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/compare.md").write_text("Above.\n<!-- table -->\nold\n<!-- end of table -->\nBelow.\n")

    def call(*arguments):
        trained.clear()
        monkeypatch.setattr("sys.argv", ["bench/compare.py", *arguments])
        compare.main()
        return sorted(re.sub("runs/compare/", "", folder) for folder in trained)

    return call


def test_finished_runs_are_not_repeated(comparison, tmp_path):
    methods = "--only", "grpo", "ppo, critic head"
    assert comparison(*methods, "--seeds", "0") == ["grpo-24-0", "ppo-critic-head-24-0"]
    assert comparison(*methods, "--seeds", "0", "1") == ["grpo-24-1", "ppo-critic-head-24-1"]
    assert comparison(*methods, "--seeds", "0", "1") == []
    assert comparison("--only", "grpo", "--seeds", "0", "--steps", "8") == ["grpo-8-0"]
    (tmp_path / "runs/compare/grpo-24-0/summary.json").write_text('{"finished": false}')
    assert comparison("--only", "grpo", "--seeds", "0") == ["grpo-24-0"]


def test_writes_table_and_plot_into_docs(comparison, tmp_path):
    comparison("--only", "grpo", "dapo", "--seeds", "0", "1")
    text = (tmp_path / "docs/compare.md").read_text()
    assert text.startswith("Above.\n<!-- table -->\n| method |") and text.endswith("<!-- end of table -->\nBelow.\n")
    assert "| *before training* | 20.0% | 50.0% | | | | |" in text
    assert "| dapo | 80.0% (70.0% to 90.0%) | 50.0% | not reached (8 to not reached) | 0.100 | 9 | 9 |" in text
    assert "24 steps, seeds [0, 1]" in text and "old" not in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 5 and {line.count("|") for line in rows} == {8}
    assert (tmp_path / "docs/compare.png").read_bytes().startswith(b"\x89PNG")


def test_failed_run_raises_error_with_method_and_seed(comparison):
    with pytest.raises(SystemExit, match="gspo, seed 0: error: out of luck"):
        comparison("--only", "gspo", "--seeds", "0")


def test_document_has_the_table_markers():
    with open("docs/compare.md") as file:
        assert compare.TABLE.search(file.read())


@pytest.mark.slow
def test_trains_a_small_run(tmp_path, monkeypatch):
    monkeypatch.setitem(compare.METHODS, "grpo", f"--loss-type grpo --prompts-per-step 4 --output-dir {tmp_path}/run")
    monkeypatch.setattr(compare, "Path", lambda *parts: tmp_path.joinpath(*parts))
    figures = compare.train(2, ("grpo", 0))
    assert figures["completions"] == 64 and 0 <= figures["greedy"] <= 1 and figures["seconds"] > 0
