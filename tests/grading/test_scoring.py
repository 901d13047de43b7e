"""Scoring: functions written for TRL, async functions, many completions at once, and errors during a run."""

import math
import textwrap
import threading
import time

import pytest
from conftest import completion, score_one, write

from grading import Completion, RewardError, Scoring, load_rewards, outcome_shares, preflight, score_all
from grading.base import lock_released, reward_lock
from grading.rewards.scoring import THREADS

# --- functions written for TRL

NOTEBOOK = r"""
    import re

    def extract_xml_answer(text: str) -> str:
        answer = text.split("<answer>")[-1]
        answer = answer.split("</answer>")[0]
        return answer.strip()

    def correctness_reward_func(prompts, completions, answer, **kwargs) -> list[float]:
        responses = [completion[0]["content"] for completion in completions]
        question = prompts[0][-1]["content"]
        extracted = [extract_xml_answer(response) for response in responses]
        seen.append((question, extracted, answer))
        return [2.0 if r == a else 0.0 for r, a in zip(extracted, answer)]

    def int_reward_func(completions, **kwargs) -> list[float]:
        responses = [completion[0]["content"] for completion in completions]
        return [0.5 if extract_xml_answer(response).isdigit() else 0.0 for response in responses]

    def strict_format_reward_func(completions, **kwargs) -> list[float]:
        pattern = r"^<reasoning>\n.*?\n</reasoning>\n<answer>\n.*?\n</answer>\n$"
        responses = [completion[0]["content"] for completion in completions]
        return [0.5 if re.match(pattern, response) else 0.0 for response in responses]

    def soft_format_reward_func(completions, **kwargs) -> list[float]:
        pattern = r"<reasoning>.*?</reasoning>\s*<answer>.*?</answer>"
        responses = [completion[0]["content"] for completion in completions]
        return [0.5 if re.match(pattern, response) else 0.0 for response in responses]

    seen = []
    reward_funcs = [soft_format_reward_func, strict_format_reward_func, int_reward_func, correctness_reward_func]
    """


def test_functions_of_a_notebook_run_unchanged(tmp_path):
    rewards = load_rewards(write(tmp_path, NOTEBOOK))
    names = ["soft_format_reward_func", "strict_format_reward_func", "int_reward_func", "correctness_reward_func"]
    assert rewards.names == names and all(f.weight == 1 and f.is_batch for f in rewards.functions)
    texts = [
        "<reasoning>\n1+1\n</reasoning>\n<answer>\n2\n</answer>\n",
        "<reasoning>1</reasoning><answer>3</answer>",
        "2",
        "two",
    ]
    scores = score_all(rewards, [completion(text, answer="2") for text in texts])
    assert [list(score.parts.values()) for score in scores] == [
        [0.0, 0.5, 0.5, 2.0],
        [0.5, 0.0, 0.5, 0.0],
        [0.0, 0.0, 0.5, 2.0],
        [0.0, 0.0, 0.0, 0.0],
    ]
    assert [score.total for score in scores] == [3.0, 1.0, 2.5, 0.0]
    assert [score.judge for score in scores] == ["correctness_reward_func"] * 4  # the only one with a column parameter
    assert [score.verdict for score in scores] == ["right", "wrong", "right", "wrong"]
    seen = rewards.functions[3].function.__globals__["seen"]
    assert seen == [("q", ["2", "3", "2", "two"], ["2"] * 4)] and rewards.functions[3].style == "chat"
    notes = preflight(
        rewards, [{"id": "r1", "task": "t", "prompt": [{"role": "user", "content": "1+1?"}], "answer": "2"}]
    )
    assert "on math rows" in notes[0] and "correctness_reward_func 2" in notes[0]


def test_detects_whether_a_function_reads_text_or_messages(tmp_path):
    rewards = load_rewards(
        write(
            tmp_path,
            """
            from grading.base import Ungraded
            @reward
            def text(completions, **kwargs): return [float(c.startswith("7")) for c in completions]
            @reward
            def size(prompts, completions): return [len(p) + len(c) for p, c in zip(prompts, completions)]
            @reward
            def either(completions, **kwargs):
                return [c[0].get("content") == "7" if isinstance(c, list) else -1 for c in completions]
            @reward
            def tokens(completion_ids, completions): return [len(ids) for ids in completion_ids]
            @metric
            def role(prompts, completions): return [p[0]["role"] == "system" and c[-1]["role"] == "assistant" for p, c in zip(prompts, completions)]
            """,
        )
    )
    messages = [{"role": "system", "content": "Think."}, {"role": "user", "content": "3+4"}]
    c = Completion("3+4", "7", {"id": 1, "task": "t", "prompt": messages}, token_ids=[5, 6])
    for _ in range(2):
        score = score_one(rewards, c)
        assert score.parts == {"text": 1.0, "size": 4.0, "either": 1.0, "tokens": 2.0} and score.metrics == {
            "role": 1.0
        }
    assert [f.style for f in rewards.functions] == ["text", "text", "chat", "text", "chat"]


def test_arguments_of_trl_functions(tmp_path):
    rewards = load_rewards(
        write(
            tmp_path,
            """
            calls = []
            def few(completions, level=None, missing=5): calls.append((level, missing)); return [0] * len(completions)
            def log(completions, prompts, trainer_state, log_extra, log_metric, **columns):
                log_extra("length", [len(c) for c in completions])
                log_metric("share", 0.25)
                log_metric("share", 0.75)
                calls.append((prompts, trainer_state.global_step, trainer_state.max_steps, sorted(columns)))
                return [None, True]
            reward_funcs = [few, log]
            """,
        ),
        max_steps=9,
    )
    rows = [{"id": i, "task": "t", "prompt": "q", "level": i} | ({"answer": "1"} if i else {}) for i in range(2)]
    scores = score_all(rewards, [Completion("q", "abc"[i:], row, step=3) for i, row in enumerate(rows)])
    calls = rewards.functions[0].function.__globals__["calls"]
    assert calls[0] == ([0, 1], 5)
    assert calls[-1] == (["q", "q"], 2, 9, ["answer", "completion_ids", "id", "level", "task"])
    assert [s.parts["log"] for s in scores] == [None, 1.0] and [s.extra for s in scores] == [
        {"length": 3},
        {"length": 2},
    ]
    assert [s.metrics for s in scores] == [{"share": 0.5}] * 2


@pytest.mark.parametrize(
    "result, message",
    [
        ("[1.0]", "returned 1 value for 4 completions"),
        ("[1.0] * 5", "returned 5 values for 4 completions"),
        ("1.0", "returned 1.0, expected a list of 4"),
        ("None", "returned None, expected a list of 4"),
        ("(x for x in completions)", "returned <generator .*expected a list of 4"),
        ("[1, 1, float('nan'), 1]", "row r2: returned nan, expected a finite number"),
        ("[1, '1', 1, 1]", "row r1: returned '1', expected"),
        ("[log_extra('x', [1])] * 4", "ValueError: log_extra\\('x'\\): 1 values for 4 completions"),
        ("[log_metric('x', 'much')] * 4", "ValueError: could not convert"),
        ("1 / 0", "row r0 and 3 more: ZeroDivisionError"),
    ],
)
def test_refuses_invalid_results_of_batch_functions(tmp_path, result, message):
    source = f"@reward\ndef odd(completions, log_extra, log_metric):\n    return {result}\n"
    rewards = load_rewards(write(tmp_path, source))
    with pytest.raises(RewardError, match=rf"'odd' \(rewards.py:\d\).*{message}") as error:
        score_all(rewards, [Completion("q", "x", {"id": f"r{i}", "task": "t"}) for i in range(4)])
    assert len(error.value.completions) == (1 if "row r" in message and "more" not in message else 4)


def test_when_limits_a_batch_function(tmp_path):
    source = "@reward(when='math')\ndef n(completions, answer): return [len(completions)] * len(completions)\n@reward\ndef one(c): return 1\n"
    rewards = load_rewards(write(tmp_path, source))
    rows = [{"answer": "1"}, {}, {"answer": "2"}]
    scores = score_all(rewards, [completion("x", **row) for row in rows])
    assert [s.parts["n"] for s in scores] == [2.0, None, 2.0]
    assert score_one(rewards, completion("x")).parts == {"n": None, "one": 1.0}


def test_preflight_detects_missing_column_of_a_batch_function(tmp_path):
    rewards = load_rewards(write(tmp_path, "@reward\ndef right(completions, anwser): return [1] * len(completions)\n"))
    rows = [{"id": f"r{i}", "task": "t", "prompt": "q", "answer": "1"} for i in range(3)]
    with pytest.raises(RewardError, match="'right' .*column 'anwser'.*row r0.*'answer'"):
        preflight(rewards, rows)


def test_which_functions_are_used(tmp_path):
    source = textwrap.dedent("""
        def plain(completions, **kwargs): return [1] * len(completions)
        def single(completion): return 1
        @reward(weight=0.5)
        def marked(completions): return [1] * len(completions)
        def pasted(completions): return [1] * len(completions)
        """)
    rewards = load_rewards(write(tmp_path, source))
    assert rewards.names == ["marked"]
    assert [note.split()[0] for note in rewards.notes] == ["plain", "pasted"]
    listed = write(tmp_path, source + "reward_funcs = [plain, 'single', marked]\n")
    rewards = load_rewards(listed)
    assert rewards.names == ["marked", "plain", "single"] and score_one(rewards, completion("x")).total == 2.5
    assert score_one(load_rewards(listed, ["plain"], {"plain": 2}), completion("x")).total == 2.0
    assert load_rewards(listed, ["pasted"]).names == ["pasted"]  # the settings name it
    for entry, message in (
        ("3", "reward_funcs lists 3"),
        ("'singel'", "Did you mean 'single'"),
        ("lambda c: 1", "def"),
    ):
        with pytest.raises(RewardError, match=message):
            load_rewards(write(tmp_path, source + f"reward_funcs = [{entry}]\n"))
    with pytest.raises(RewardError, match="expected a list of functions"):
        load_rewards(write(tmp_path, source + "reward_funcs = 'plain'\n"))


# --- concurrency


def test_async_functions_are_awaited_together(tmp_path):
    source = """
        import asyncio
        @reward
        async def judge(completion):
            await asyncio.sleep(0.1)
            return float(completion.text), "reason"
        @reward
        async def batch(completions, **kwargs):
            await asyncio.sleep(0.1)
            return [len(c) for c in completions]
        @reward
        def plain(completion): return 1
        """
    rewards = load_rewards(write(tmp_path, source))
    start = time.perf_counter()
    scores = score_all(rewards, [completion(str(i)) for i in range(40)])
    assert time.perf_counter() - start < 1.0
    assert [s.parts for s in scores] == [{"judge": float(i), "batch": len(str(i)), "plain": 1.0} for i in range(40)]
    broken = load_rewards(write(tmp_path, "@reward\nasync def bad(c):\n    raise KeyError('no key')\n"))
    with pytest.raises(RewardError, match=r"'bad' \(rewards.py:4\), row r1: KeyError: no key"):
        score_one(broken, completion("x"))


def test_runs_one_function_at_a_time_while_many_wait(tmp_path):
    source = """
        import time
        from grading.base import lock_released
        running, waiting, num_waiting = [], [], []
        order = []
        @reward
        def slow(completion):
            order.append(completion.text)
            running.append(1)
            assert len(running) == 1
            time.sleep(0.0005)
            running.pop()
            with lock_released():
                waiting.append(1)
                num_waiting.append(len(waiting))
                time.sleep(0.2)
                waiting.pop()
            running.append(1)
            assert len(running) == 1
            running.pop()
            return int(completion.text)
        """
    rewards = load_rewards(write(tmp_path, source))
    start = time.perf_counter()
    scores = score_all(rewards, [completion(str(i)) for i in range(50)])
    assert time.perf_counter() - start < 5  # sequential scoring would take 10 s
    assert [s.total for s in scores] == list(range(50))
    names = rewards.functions[0].function.__globals__
    assert names["order"] == [str(i) for i in range(50)] and 10 < max(names["num_waiting"]) <= THREADS


def test_lock_is_released_only_inside_the_context():
    acquired = []

    def acquire_lock():
        with reward_lock():
            acquired.append(1)

    with lock_released(), lock_released():  # no effect without the lock
        pass
    with reward_lock(), reward_lock():
        thread = threading.Thread(target=acquire_lock)
        thread.start()
        thread.join(0.05)
        assert not acquired
        with lock_released(), lock_released():
            thread.join(5)
        assert acquired


def test_scores_completions_before_all_are_added(tmp_path):
    rewards = load_rewards(write(tmp_path, "seen = []\n@reward\ndef f(c): seen.append(c.text); return float(c.text)\n"))
    seen = rewards.functions[0].function.__globals__["seen"]
    scoring = Scoring(rewards)
    for index in (2, 0, 1):
        scoring.add(completion(str(index)), index)
        deadline = time.perf_counter() + 5
        while str(index) not in seen and time.perf_counter() < deadline:
            time.sleep(0.001)
    assert seen == ["2", "0", "1"]
    assert [score.total for score in scoring.results()] == [0.0, 1.0, 2.0]
    assert Scoring(rewards).results() == []


def test_a_reward_function_may_call_score_all(tmp_path):
    inner = load_rewards(write(tmp_path, "@reward\ndef f(c): return len(c.text)\n"))
    rewards = load_rewards(write(tmp_path, "@reward\ndef g(c): return score_all(inner, [c])[0].total * 2\n"))
    rewards.functions[0].function.__globals__["inner"] = inner
    assert score_all(rewards, [completion("abc"), completion("ab")])[0].total == 6.0


def test_sys_exit_in_a_function_is_an_error(tmp_path):
    rewards = load_rewards(write(tmp_path, "import sys\n@reward\ndef f(c): sys.exit('no key')\n"))
    with pytest.raises(RewardError, match="'f' .*SystemExit: no key"):
        score_all(rewards, [completion("x"), completion("y")])


def test_a_function_cannot_change_the_row(tmp_path):
    rewards = load_rewards(write(tmp_path, "@reward\ndef f(c):\n    c.row['answer'] = '1'\n    return 1\n"))
    with pytest.raises(RewardError, match="'f' .*data rows are read-only"):
        score_all(rewards, [completion("x", answer="2")])
    row = {"id": "r1", "task": "t", "tests": ["assert f(1) == 2"]}
    Completion("q", "x", row).row["tests"].clear()
    assert row["tests"] == ["assert f(1) == 2"]


def test_a_function_without_return_is_ungraded(tmp_path):
    """A forgotten return must not train on a silent reward of 0."""
    rewards = load_rewards(write(tmp_path, "@reward\ndef f(c): c.text == '7'\n"))
    (score,) = score_all(rewards, [completion("7")])
    assert score.verdict == "ungraded" and "is a return missing" in score.reasons["f"]


# --- errors during a run

ONE_IN_TEN = """
    @reward
    def fragile(completion):
        if int(completion.text) % 10 == 3:
            raise ValueError("three")
        return 1
    @reward(weight=0.1)
    def shape(completion): return 1
    """


def test_errors_stop_the_run_with_the_completion(tmp_path):
    rewards = load_rewards(write(tmp_path, ONE_IN_TEN))
    with pytest.raises(
        RewardError, match=r"'fragile' \(rewards.py:6\), row r3: ValueError: three. The completion ends with '3'"
    ) as error:
        score_all(rewards, [Completion("q", str(i), {"id": f"r{i}", "task": "t"}) for i in range(40)])
    assert [c.text for c in error.value.completions] == ["3"]


def test_skips_errors_up_to_5_percent(tmp_path):
    rewards = load_rewards(write(tmp_path, ONE_IN_TEN), reward_errors="skip")
    scores = score_all(rewards, [completion(str(i)) for i in range(40)])
    assert (rewards.errors, rewards.scored) == (4, 40)
    assert scores[3].verdict == "ungraded" and math.isnan(scores[3].total) and scores[4].total == 1.1
    assert (
        scores[3].reasons["fragile"].startswith("reward_error: reward function 'fragile'")
        and "three" in scores[3].error
    )
    assert outcome_shares(scores) == {"outcomes/reward_error": 0.1}
    score_all(rewards, [completion("0")] * 100)
    with pytest.raises(RewardError, match="failed on 8 of 150 completions, .*5%.*'fragile'") as error:
        score_all(rewards, [completion("3")] * 4 + [completion("0")] * 6)
    assert error.value.completions[0].text == "3"


def test_skip_ignores_failed_metrics_but_preflight_raises(tmp_path):
    source = "@reward\ndef one(c): return 1\n@metric\ndef broken(c): return 1 / len(c.text)\n"
    rewards = load_rewards(write(tmp_path, source), reward_errors="skip")
    score = score_one(rewards, completion(""))
    assert score.total == 1.0 and score.metrics == {"broken": None} and rewards.errors == 1
    with pytest.raises(RewardError, match="ZeroDivisionError"):
        preflight(rewards, [{"id": "r1", "task": "t", "prompt": "q"}])


def test_failed_batch_function_is_skipped_for_all_its_completions(tmp_path):
    source = "@reward\ndef bad(completions): raise OSError('gone')\n"
    rewards = load_rewards(write(tmp_path, source), reward_errors="skip")
    assert {s.verdict for s in score_all(rewards, [completion("x")] * 3)} == {"ungraded"}
    with pytest.raises(RewardError, match="failed on 6 of 6"):
        score_all(rewards, [completion("x")] * 3)
