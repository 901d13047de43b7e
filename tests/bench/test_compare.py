"""bench/compare.py without training: completions needed, the table, the picture, and which runs are not repeated."""

import dataclasses
import json
import math

import pytest
from conftest import fill_lora

from bench import compare
from rl.run.read_config import read_config


def run(points, **more):
    """A run as it is kept, with these completions and accuracies."""
    rates = {"accuracy": points[-1][1], "accuracy_sampled": 0.5}
    return {
        "points": points, "before": {"n": 10, "accuracy": points[0][1], "accuracy_sampled": 0.25}, "after": rates,
        "completions": points[-1][0], "kl_token": 0.01, "kl_completion": 0.3, "seconds": 60.0, "machine": "a laptop",
        "torch": "2.0", "date": "2026-01-02",
    } | more  # fmt: skip


@pytest.mark.parametrize(
    "points, needed",
    [
        ([(0, 0.2), (1000, 0.6), (2000, 1.0)], 1500),  # half of the way from 0.6 to 1.0
        ([(0, 0.0), (1000, 0.8), (2000, 0.9)], 1000),  # exactly at an evaluation
        ([(0, 0.4), (1000, 0.9), (2000, 0.5), (3000, 0.9)], 800),  # the first time counts
        ([(0, 0.4), (1000, 0.2), (2000, 1.0)], 1750),  # from the evaluation before it, not from the start
        ([(0, 0.85), (1000, 0.2)], 0),  # before training
        ([(0, 0.2), (1000, 0.79)], math.inf),
        ([(0, 0.2)], math.inf),
    ],
)
def test_completions_needed_by_hand(points, needed):
    assert compare.completions_needed(points, 0.8) == pytest.approx(needed)


def test_spread():
    assert compare.spread([3, 1, 2], ".0f") == "2 (1 to 3)"
    assert compare.spread([1234.4], ",.0f") == "1,234"
    assert compare.spread([2.01, 2.04], ".1f") == "2.0"  # as it is printed
    assert compare.spread([1000, math.inf, 2000], ",.0f") == "2,000 (1,000 to not reached)"
    assert compare.spread([math.inf, math.inf], ",.0f") == "not reached"


def test_completions_are_counted_by_step(tmp_path):
    """Steps of 3, 2 and 4 completions; a budget of 5 or 8 ends with the second."""
    steps = [1, 1, 1, 2, 2, 3, 3, 3, 3]
    (tmp_path / "rollouts.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in steps))
    asked = compare.completions_by_step(tmp_path)
    assert asked == {1: 3, 2: 5, 3: 9}
    assert [compare.last_within(asked, budget) for budget in (2, 3, 5, 8, 9, 100)] == [1, 1, 2, 2, 3, 3]


def test_the_table_by_hand():
    rising = [run([(0, 0.2), (1000, 0.6), (2000, end)]) for end in (1.0, 0.9, 0.7)]
    header, rule, before, *lines = compare.table({"a": rising, "b": [rising[0], None], "c": [None, None]}).split("\n")
    assert {line.count("|") for line in (header, rule, before, *lines)} == {len(compare.COLUMNS) + 2}
    assert before.startswith("| *before training* | 20.0 | 25.0 |")
    assert lines == [
        "| a | 90.0 (70.0 to 100.0) | 50.0 | 1,667 (1,500 to not reached) | 0.010 | 0.30 | 2,000 | 60 |",
        "| b (1 of 2 failed) | 100.0 | 50.0 | 1,500 | 0.010 | 0.30 | 2,000 | 60 |",
        "| c | failed |  |  |  |  |  |  |",
    ]


@pytest.mark.parametrize("name", compare.FAMILY)
def test_settings_are_valid_and_ask_the_same(name):
    config, _ = read_config(compare.settings_of(name, 3, 24, 402), compare.DEFAULTS)
    assert (config.seed, config.max_steps, config.eval_questions) == (3, 24, 402)
    assert (config.prompts_per_step, config.num_generations) == (32, 8)
    assert (config.model, config.temperature, config.train_data) == ("data/tiny", 1, ["sums", "words", "functions"])
    assert (config.eval_steps, config.save_steps) == (compare.EVERY, 1)
    assert config.critic_warmup_steps < config.max_steps


def test_every_run_has_a_file_of_its_own():
    assert len({compare.kept_path(name, seed) for name in compare.FAMILY for seed in range(2)}) == 2 * len(
        compare.FAMILY
    )


def test_the_source_covers_what_a_run_depends_on(tmp_path, monkeypatch):
    for name in ("train.py", "rl/update.py", "data/tiny/config.json", "bench/compare.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("one")
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    was = compare.source()
    (tmp_path / "bench/compare.py").write_text("two")
    assert compare.source() == was
    for name in ("train.py", "rl/update.py", "data/tiny/config.json"):
        now = compare.source()
        (tmp_path / name).write_text("two")
        assert compare.source() != now


@pytest.fixture
def comparison(tmp_path, monkeypatch, capsys):
    """Calls main in an empty project with a stand-in for the training; returns what has run since, and what was printed."""
    monkeypatch.setattr(compare, "source", lambda: "this source")
    ran = []

    def stand_in(name, seed, settings, of_source):
        ran.append((name, seed))
        if (name, seed) == ("gspo", 1):
            raise RuntimeError("out of luck")
        kept = {"name": name, "seed": seed, "settings": settings, "source": of_source}
        return kept | run([(0, 0.2), (1000, 0.6), (2000, 0.9)])

    monkeypatch.setattr(compare, "run_and_measure", stand_in)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # main sets it: so that it is put back
    for folder in ("docs", "configs"):
        (tmp_path / folder).mkdir()
    for file in compare.ROOT.glob("configs/tiny*.yaml"):
        (tmp_path / "configs" / file.name).write_text(file.read_text())
    monkeypatch.setattr(compare, "ROOT", tmp_path)

    def call(*arguments):
        ran.clear()
        monkeypatch.setattr("sys.argv", ["bench/compare.py", *arguments])
        with pytest.raises(SystemExit) as end:
            compare.main()
        return sorted(ran), end.value.code, capsys.readouterr().out

    return call


def test_kept_runs_are_not_repeated(comparison, tmp_path, monkeypatch):
    two = "--only", "grpo", "ppo, critic head"
    assert comparison(*two, "--seeds", "0")[0] == [("grpo", 0), ("ppo, critic head", 0)]
    assert comparison(*two, "--seeds", "0", "1")[0] == [("grpo", 1), ("ppo, critic head", 1)]
    assert comparison(*two, "--seeds", "0", "1")[0] == []
    assert comparison("--only", "grpo", "--seeds", "0", "--fresh")[0] == [("grpo", 0)]
    assert "| ppo, critic head | 90.0 |" in (tmp_path / "docs/compare.md").read_text()  # kept, though not asked for
    assert comparison("--only", "grpo", "--seeds", "1", "--steps", "8")[0] == [("grpo", 1)]  # other settings
    monkeypatch.setattr(compare, "source", lambda: "another source")
    assert comparison("--only", "grpo", "--seeds", "1", "--steps", "8")[0] == [("grpo", 1)]
    (tmp_path / "runs/compare/grpo-1.json").write_text('{"name": "gr')  # cut off
    assert comparison("--only", "grpo", "--seeds", "1", "--steps", "8")[0] == [("grpo", 1)]


def test_a_failed_run_is_one_line_and_runs_again(comparison, tmp_path):
    for _ in range(2):
        ran, status, printed = comparison("--only", "gspo", "--seeds", "0", "1", "--jobs", "1")
        assert ("gspo", 1) in ran and status == 1 and "gspo, seed 1: failed: out of luck\n" in printed
    assert ran == [("gspo", 1)]
    assert "| gspo (1 of 2 failed) | 90.0 |" in (tmp_path / "docs/compare.md").read_text()
    _, status, _ = comparison("--only", "gspo", "--seeds", "1")
    assert status == "error: every run failed, so there is nothing to compare: see the lines above"


def test_the_document_says_how_it_was_measured(comparison, tmp_path):
    comparison("--only", "grpo", "--seeds", "0", "2")
    text = (tmp_path / "docs/compare.md").read_text()
    for said in (
        "`python bench/compare.py --only grpo --seeds 0 2`", "6,144 completions", "seeds 0, 2", "10 held-out questions",
        "a laptop", "torch 2.0", "2026-01-02.", "(compare.png)", "the first 7 teach its critic only",
    ):  # fmt: skip
        assert said in text
    assert max(map(len, text.splitlines())) < 200


def test_the_curve_is_the_median_of_the_seeds_as_far_as_all_go():
    one = run([(0, 0.2), (1000, 0.4), (2000, 0.8)])
    two = run([(0, 0.2), (500, 0.3), (1500, 0.5)])
    x, median, least, most = compare.curve([one, two])
    assert x == [0, 1, 1.5]
    assert least == pytest.approx([20, 40, 50]) and most == pytest.approx([20, 40, 60])  # each is 0.4 at 1000
    assert median == pytest.approx([20, 40, 55])


@pytest.mark.parametrize("methods", [1, 5])
def test_the_picture_is_drawn(methods, tmp_path):
    runs = {f"method {i}": [run([(0, 0.2), (1000, 0.5 + i / 10)]), None] for i in range(methods)}
    compare.draw(runs | {"failed": [None, None]}, tmp_path / "compare.png")
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_kl_is_measured_from_the_base_not_from_the_saved_lora(policy, config, tmp_path):
    """A LoRA of noise: its own samples are likelier under it than under the base. A LoRA of zeros is the base."""
    fill_lora(policy, 0.2)
    policy.model.save_pretrained(tmp_path)
    config = dataclasses.replace(config, adapter=str(tmp_path), eval_questions=30)
    drift = compare.kl_from_base(config)
    length = drift["kl_completion"] / drift["kl_token"]  # tokens a completion
    assert drift["kl_token"] > 0.01 and 1 < length <= config.max_completion_length
    assert length * 30 == pytest.approx(round(length * 30))
    fill_lora(policy, 0)
    policy.model.save_pretrained(tmp_path)
    assert compare.kl_from_base(config)["kl_completion"] == 0
