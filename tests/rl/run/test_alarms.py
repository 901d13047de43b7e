"""Alarms on made-up histories (each for what it is there for, none on healthy ones), and on two planted hacks."""

import json
import math
import random

import pytest
from conftest import lines

import train
from grading import Completion, Score, load_rewards, score_all
from rl.config import Config
from rl.evaluate import Evaluation
from rl.rollout import Episode
from rl.run import alarms
from rl.run.metrics import describe_episodes, is_repetitive

REWARDS = """
from grading import grade_math, reward

@reward
def correct(completion):
    return grade_math(completion.answer, completion.row["answer"])

@reward(weight={weight})
def shaping(completion):
    return {value}
"""


@pytest.fixture
def rewards(tmp_path):
    return planted(tmp_path, 2.0, "0")


def planted(tmp_path, weight, value):
    (tmp_path / "hack.py").write_text(REWARDS.format(weight=weight, value=value))
    return load_rewards(str(tmp_path / "hack.py"))


def steps(n, **ramps):
    """A history of n steps, quiet but for what is named: (first value, last value)."""
    quiet = {
        "reward": 0.4, "reward_std": 0.5, "shaping": 0.05, "shaping_when_wrong": 0.05, "ungraded": 0.0,
        "reward_errors": 0, "frac_reward_zero_std": 0.2, "skipped_updates": 0, "frac_groups_all_wrong": 0.1, "frac_groups_all_right": 0.1,
        "completions/mean_length": 20.0, "completions/clipped_ratio": 0.0, "completions/repetitive": 0.0,
    }  # fmt: skip
    history = [dict(quiet, step=step) for step in range(1, n + 1)]
    for name, (first, last) in ramps.items():
        for i, metrics in enumerate(history):
            metrics[name.replace("__", "/")] = first if first == last else first + (last - first) * i / (n - 1)
    return history


def answers(accuracy, n=400, sampled=None):
    """An evaluation: which questions are right is drawn anew, so two of them differ as two real ones do."""
    rng = random.Random(f"{accuracy} {sampled}")

    def records(share):
        return [{"verdict": "right" if i < round(share * n) else "wrong"} for i in rng.sample(range(n), n)]

    return Evaluation(records(accuracy), records(accuracy if sampled is None else sampled))


def score(verdict="wrong", judge="correct", error=None, **reasons):
    parts = {"correct": float(verdict == "right"), "shaping": 0.5}
    return Score(0.0, parts, {}, reasons, verdict, judge=judge, error=error)


def find(history, evaluations, rewards, scores=None, **settings):
    scores = scores or [score(correct="wrong: 5 is not 6")]
    completion = Completion("q", "... 5", {"id": "r"})
    episodes = [Episode([], [], [], False, completion=completion, score=score) for score in scores]
    return alarms.find_alarms(history, evaluations, episodes, rewards, Config(prompts_per_step=32, **settings))


RISING = {0: answers(0.30), 15: answers(0.80), 30: answers(0.95)}
FLAT = {0: answers(0.30), 15: answers(0.31), 30: answers(0.29)}


def test_a_healthy_run_is_silent(rewards):
    """Reward, length and accuracy rise; the shaping is small, and the longer one becomes the more is right."""
    ramps = {"reward": (0.4, 1.05), "shaping_when_wrong": (0.08, 0.1)}
    history = steps(30, completions__mean_length=(20, 60), frac_groups_all_wrong=(0.2, 0), **ramps)
    for n in range(1, 31):
        seen = {step: evaluation for step, evaluation in RISING.items() if step <= n}
        assert find(history[:n], seen, rewards) == {}
    assert alarms.find_notes(history, Config()) == {}


def test_the_reward_rises_and_the_held_out_accuracy_does_not(rewards):
    history = steps(30, reward=(0.4, 1.2))
    found = find(history, FLAT, rewards)
    assert set(found) == {"hacking"}
    assert (
        "has risen (0.46 to 1.14)" in found["hacking"] and "held-out accuracy has not (-1.0 points" in found["hacking"]
    )
    assert find(history[:15], {0: FLAT[0], 15: FLAT[15]}, rewards) == {}  # one evaluation may be bad luck
    assert find(steps(30), FLAT, rewards) == {}  # nor is the reward alone to blame
    assert find(history, FLAT | {30: answers(0.30, sampled=0.60)}, rewards) == {}  # it rises where it is sampled


def test_noise_is_no_alarm(rewards):
    """A rise that so few completions may show by chance, or that right answers within the interval may explain."""
    history = steps(30, reward=(0.40, 0.44))
    assert find(history, FLAT, rewards) == {}
    few = {step: answers(accuracy, n=20) for step, accuracy in ((0, 0.30), (15, 0.35), (30, 0.30))}
    assert find(steps(30, reward=(0.4, 0.55)), few, rewards) == {}
    assert set(find(steps(30, reward=(0.4, 1.2)), few, rewards)) == {"hacking"}


def test_a_hack_that_comes_after_real_learning(rewards):
    """Accuracy rises, then falls while the reward goes on: seen against the best evaluation."""
    evaluations = {0: answers(0.3), 15: answers(0.9), 30: answers(0.7), 45: answers(0.6)}
    history = steps(45, reward=(0.4, 2.5), completions__mean_length=(20, 100))
    found = find(history, evaluations, rewards)
    assert set(found) == {"hacking", "length"}
    assert "since step 15" in found["hacking"] and "since step 15" in found["length"]


def test_length_rises_and_the_held_out_accuracy_does_not(rewards):
    longer = steps(30, completions__mean_length=(20, 40))
    assert "(21 to 39 tokens)" in find(longer, FLAT, rewards)["length"]
    assert find(longer, RISING, rewards) == {}
    assert find(steps(30, completions__mean_length=(20, 27)), FLAT, rewards) == {}


def test_a_reward_beside_the_judge_dominates(tmp_path):
    """Wrong answers may earn a fifth of what a right one does, and no more; correct weighs 1 in this file."""
    rewards, evaluations = planted(tmp_path, 2.0, "0.5"), {0: answers(0.3)}
    found = find(steps(20, shaping_when_wrong=(0.1, 0.35)), evaluations, rewards)
    assert set(found) == {"dominating"}
    assert "wrong answers earn 0.32, most of it by shaping, where correct pays 1 for a right" in found["dominating"]
    found = find(steps(20, shaping=(0.25, 0.25)), evaluations, rewards)  # more than half of a reward of 0.4
    assert "of the mean reward of 0.40, 0.25 do not come from correct, most of that from shaping" in found["dominating"]
    assert find(steps(20, shaping=(0.19, 0.19), reward=(0.2, 0.2)), evaluations, rewards) == {}  # a hard start
    assert find(steps(20, shaping_when_wrong=(0.2, 0.2)), evaluations, rewards) == {}
    none_wrong = steps(20, shaping_when_wrong=(float("nan"), float("nan")))
    assert find(none_wrong, evaluations, rewards) == {}
    nobody = [score(judge=None)]  # there is nothing to compare with
    assert find(steps(20, shaping_when_wrong=(1, 1)), evaluations, rewards, nobody) == {}


ALL_WRONG = {name: (0, 0) for name in ("reward", "reward_std", "shaping", "shaping_when_wrong")} | {
    name: (1, 1) for name in ("frac_groups_all_wrong", "frac_reward_zero_std")
}


@pytest.mark.parametrize(
    "subject, ramps, scores, words",
    [
        ("cut", {"completions/clipped_ratio": (0.2, 0.3)}, [], "29% of the completions are cut at max_completion_length"),
        ("all_wrong", {"frac_groups_all_wrong": (0.8, 0.8)}, [], "in 80% of the groups nothing is right"),
        ("repetition", {"completions/repetitive": (0.1, 0.6)}, [], "55% of the completions are long and mostly repeat"),
        ("ungraded", {"ungraded": (0.06, 0.06)}, [score("ungraded", code="sandbox_error: dead")], "sandbox_error: dead"),
        ("reward_errors", {"reward_errors": (1, 1)}, [score("ungraded", error="f (r.py:3)")], "1 completions of"),
        ("skipped", {"skipped_updates": (1, 1), "updates": (3, 3)}, [], "20 of 80 updates so far were skipped"),
        ("all_cut", {"completions/clipped_ratio": (1, 1), "accuracy": (0, 0)} | ALL_WRONG, [], "no answer is finished: raise"),
        ("cut", {"completions/clipped_ratio": (1, 1), "accuracy": (0.1, 0.1)}, [], "100% of the completions are cut"),
        ("no_reward", ALL_WRONG, [], "every reward of the last 5 steps is 0"),
        ("dead_groups", {"frac_reward_zero_std": (1, 1)}, [], "nothing is learned: try other questions"),
        ("dead_groups", {"frac_reward_zero_std": (1, 1), "frac_groups_all_right": (1, 1)}, [], "try harder questions"),
        ("sampler", {"sampling/sampling_logp_difference/mean": (0.2, 0.2)}, [], "differ by 0.2 nats a token"),
        ("sampler", {"sampling/sampling_logp_difference/max": (9, 9)}, [], "9 at the worst"),
        ("kl", {"kl": (0, 2)} | ALL_WRONG, [], "run away from the model it began as: KL 1.8 nats a token"),
    ],
)  # fmt: skip
def test_steps_that_cannot_teach(rewards, subject, ramps, scores, words):
    found = find(steps(20, **ramps), {0: answers(0.3)}, rewards, scores)
    assert set(found) == {subject} and words in found[subject] and "\n" not in found[subject]


def test_rewards_of_0_and_groups_without_a_difference_are_named_once_they_last(rewards):
    """Instead of all_wrong, which has the same to say; in a run that is shorter, at its end."""
    history = steps(20, **ALL_WRONG)
    for n in range(1, 5):
        assert find(history[:n], {0: answers(0.3)}, rewards) == {}
        assert find(history[:n], {0: answers(0.3)}, rewards, max_steps=n).keys() == {"no_reward"}
    line = find(history, {0: answers(0.3)}, rewards)["no_reward"]
    assert "Most often: wrong: 5 is not 6. One ends in '... 5'" in line
    one = [*history[:18], history[18] | {"reward": 0.01, "reward_std": 0.1}, history[19]]
    assert set(find(one, {0: answers(0.3)}, rewards)) == {"dead_groups", "all_wrong"}
    assert "no_reward" not in find(history, {0: answers(0.3)}, rewards, control="random-reward")

    same = steps(20, frac_reward_zero_std=(1, 1))
    assert find(same[:4], {0: answers(0.3)}, rewards) == {} and "same" in alarms.find_notes(same[:4], Config())
    assert find(same, {0: answers(0.3)}, rewards, algorithm="ppo") == {}  # its advantages do not come from the group
    unmarked = steps(20, frac_reward_zero_std=(1, 1), ungraded=(1, 1), reward=(math.nan, math.nan))
    assert set(find(unmarked, {0: answers(0.3)}, rewards)) == {"ungraded"}


UPDATED = {"updates": (2, 2), "learning_rate": (1e-3, 1e-3), "kl": (0.0, 0.7)}
NOT_UPDATED = UPDATED | {"updates": (0, 0), "lora_norm": (5.0, 5.0)}


def test_updates_that_change_nothing(rewards):
    evaluations = {0: answers(0.3)}
    idle = steps(20, **UPDATED, lora_norm=(5.0, 5.0))
    assert "learning_rate = 0.001 does nothing" in find(idle, evaluations, rewards)["unmoved"]
    assert find(idle[:4], evaluations, rewards) == {}
    for healthy in (
        steps(20, **UPDATED, lora_norm=(5.0, 5.0 + 1e-9)),
        steps(20, **UPDATED),  # of an older version
        steps(20, **UPDATED | {"learning_rate": (0, 0)}, lora_norm=(5.0, 5.0)),  # a warm-up, or the end of a schedule
    ):
        assert find(healthy, evaluations, rewards) == {} == alarms.find_notes(healthy, Config())


def test_no_updates_at_all(rewards):
    evaluations, history = {0: answers(0.3)}, steps(20, **NOT_UPDATED)
    assert "no update was made in the last 5 steps" in find(history, evaluations, rewards)["no_updates"]
    why = find(history, evaluations, rewards, target_kl=1e-9, mask_truncated_completions=True)["no_updates"]
    assert "at target_kl = 1e-09 and mask_truncated_completions = True" in why
    assert find(steps(20, **NOT_UPDATED | {"updates": (0, 1), "lora_norm": (5, 6)}), evaluations, rewards) == {}
    assert find(steps(20, **NOT_UPDATED | {"learning_rate": (0, 0)}), evaluations, rewards) == {}
    waiting = {"algorithm": "ppo", "critic_warmup_steps": 16}
    assert find(history, evaluations, rewards, **waiting) == {}
    assert set(find(steps(21, **NOT_UPDATED), evaluations, rewards, **waiting)) == {"no_updates"}
    assert set(find(steps(20, **NOT_UPDATED, frac_reward_zero_std=(1, 1)), evaluations, rewards)) == {"dead_groups"}
    assert set(find(steps(20, **NOT_UPDATED, skipped_updates=(1, 1)), evaluations, rewards)) == {"skipped"}


def test_a_policy_that_hardly_moves_is_a_note():
    history = steps(20, **UPDATED | {"kl": (0, 0)}, lora_norm=(5, 6))
    assert alarms.find_notes(history[:10], Config()) == {}
    assert "raise learning_rate (now 1e-05)" in alarms.find_notes(history, Config())["still"]
    assert (
        alarms.find_notes(steps(20, **UPDATED | {"kl": (0, 0)}, lora_norm=(5, 5)), Config()) == {}
    )  # an alarm by then
    assert alarms.find_notes(steps(20, **UPDATED | {"kl": (0, 1e-5)}, lora_norm=(5, 6)), Config()) == {}


def test_what_healthy_runs_show_is_no_alarm(rewards):
    """bf16's differences, a KL as large as any run's that learned, a step with equal rewards or no updates now and then."""
    usual = {"sampling/sampling_logp_difference/mean": (0.03, 0.03), "sampling/sampling_logp_difference/max": (2, 2)}
    history = steps(30, **UPDATED, **usual, lora_norm=(5, 7), reward=(0.4, 1.0))
    for step in (3, 11, 12):
        history[step] |= {
            "frac_reward_zero_std": 1.0,
            "updates": 0,
            "loss": math.nan,
            "lora_norm": history[step - 1]["lora_norm"],
        }
    for n in range(1, 31):
        seen = {step: evaluation for step, evaluation in RISING.items() if step <= n}
        assert find(history[:n], seen, rewards) == {} == alarms.find_notes(history[:n], Config())


def test_a_history_with_gaps(rewards):
    """Read back from metrics.jsonl, where nan is null, or made by an older version."""
    for history in ([{"step": i} for i in range(1, 31)], [dict.fromkeys(step) for step in steps(30, **NOT_UPDATED)]):
        assert find(history, FLAT, rewards) == {} == alarms.find_notes(history, Config())


def test_what_goes_away_is_no_alarm_any_more_and_easy_questions_are_a_note(rewards):
    history = steps(10, completions__clipped_ratio=(0.5, 0), frac_groups_all_right=(0, 1))
    assert set(find(history[:2], {0: answers(0.3)}, rewards)) == {"cut"}
    assert find(history, {0: answers(0.3)}, rewards) == {}
    assert (
        alarms.find_notes(history[:2], Config()) == {}
        and "have become easy" in alarms.find_notes(history, Config())["easy"]
    )
    assert (
        "in 95% of the groups all rewards are the same"
        in alarms.find_notes(steps(3, frac_reward_zero_std=(0.95, 0.95)), Config())["same"]
    )


def test_the_commonest_outcome_is_shown(rewards):
    scores = [score(correct=f"wrong: {i} is not 6") for i in range(3)] + [score(correct="no_answer: no box")] * 2
    found = find(steps(2, frac_groups_all_wrong=(1, 1)), {0: answers(0)}, rewards, scores)
    assert "Most often: wrong: 0 is not 6" in found["all_wrong"]


def test_repetition_is_told_from_long_working(rewards):
    rng = random.Random(0)
    worked = [rng.randrange(12) for _ in range(300)]  # few kinds of tokens, like arithmetic
    assert not is_repetitive(worked)
    assert is_repetitive(worked[:40] * 5)
    assert not is_repetitive([7] * 40)  # short
    assert is_repetitive([7] * 100)
    assert not is_repetitive(worked[:100] + worked[:60])  # some of it


def test_shares_of_the_reward(tmp_path):
    """What wrong answers earn; groups by verdict; a grader judges whatever it weighs."""
    rewards = planted(tmp_path, 2.0, "completion.tokens / 10")
    row = {"id": "r", "prompt": "q", "task": "t", "answer": "5"}
    texts = ["\\boxed{5}", "\\boxed{4}", "\\boxed{4}", "\\boxed{4}"]
    completions = [Completion("q", text, row, tokens=10, token_ids=[1] * 10) for text in texts]
    scores = score_all(rewards, completions)
    assert [s.judge for s in scores] == ["correct"] * 4 and [s.is_right for s in scores] == [True, False, False, False]
    episodes = [Episode([], [], [], False, completion=c, score=s, reward=s.total) for c, s in zip(completions, scores)]
    found = describe_episodes(episodes, rewards, Config(num_generations=2))
    assert (found["reward"], found["shaping"], found["shaping_when_wrong"]) == (2.25, 2.0, 2.0)
    assert (found["frac_groups_all_wrong"], found["frac_groups_all_right"]) == (0.5, 0.0)
    assert (found["outcomes/right"], found["outcomes/wrong"]) == (0.25, 0.75)
    assert found["completions/repetitive"] == 0 and found["reward_errors"] == 0


# --- planted hacks in short runs on the tiny model

SHORT = (
    "--train-data words --max-steps {steps} --prompts-per-step 8 --num-generations 8 --eval-questions 30 --eval-steps 3 "
    "--train-questions 300 --learning-rate 5e-3 --lr-scheduler-type constant --num-mini-batches 1 --save-steps 0 --device cpu"
)


def run(tmp_path, steps, settings=""):
    folder, rewards = tmp_path / "run", str(tmp_path / "hack.py")
    train.main(
        [*SHORT.format(steps=steps).split(), "--rewards-file", rewards, "--output-dir", str(folder), *settings.split()]
    )
    return json.loads((folder / "summary.json").read_text()), lines(folder / "metrics.jsonl")


def test_a_format_reward_worth_more_than_being_right(tmp_path, capsys):
    planted(tmp_path, 1.5, '"<think>" not in completion.text')
    summary, metrics = run(tmp_path, steps=4)
    out = capsys.readouterr().out
    assert out.count("something else than being right may be learned") == 1
    assert summary["alarms"]["dominating"] == 1 and all("dominating" in m["alarms"] for m in metrics)
    assert summary["eval"]["before"]["accuracy"] < 0.6  # what is right is what the grader says, not what pays most


def test_a_length_reward(tmp_path, capsys):
    planted(tmp_path, 1.0, "completion.tokens / 20")
    summary, metrics = run(tmp_path, steps=4)
    assert "  alarm: wrong answers earn" in capsys.readouterr().out
    assert "dominating" in summary["alarms"] and "dominating" in metrics[-1]["alarms"]


# --- steps that cannot teach, in short runs on the tiny model

TINY = "--prompts-per-step 4 --num-generations 4 --eval-questions 8 --eval-steps 0"


def test_answers_that_have_no_room(tmp_path, capsys):
    planted(tmp_path, 0.0, "0")
    summary, metrics = run(tmp_path, 6, f"{TINY} --max-completion-length 4")
    out = capsys.readouterr().out
    assert (
        out.count("alarm: ") == out.count("every completion is cut at max_completion_length = 4 and none is right") == 1
    )
    assert summary["alarms"] == {"all_cut": 1} and metrics[-1]["alarms"] == ["all_cut"]


def test_a_temperature_at_which_all_completions_are_the_same(tmp_path, capsys):
    planted(tmp_path, 0.0, "0")
    summary, metrics = run(tmp_path, 5, f"{TINY} --temperature 1e-4 --learning-rate 1e-30")
    assert "a higher temperature, or dynamic_sampling" in capsys.readouterr().out
    assert summary["alarms"]["dead_groups"] == 5 and "dead_groups" in metrics[-1]["alarms"]


def test_a_learning_rate_that_does_nothing(tmp_path, capsys):
    planted(tmp_path, 0.1, "len(completion.text)")
    summary, metrics = run(tmp_path, 5, f"{TINY} --learning-rate 1e-30")
    assert capsys.readouterr().out.count("learning_rate = 1e-30 does nothing") == 1
    assert summary["alarms"]["unmoved"] == 5 and len({m["lora_norm"] for m in metrics}) == 1
