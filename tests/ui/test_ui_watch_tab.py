"""The tab Watch: what it says of runs under way, cut back, long, damaged or hostile."""

import os
import time

import filelock
import pytest

gr = pytest.importorskip("gradio")

from watching import (  # noqa: E402
    build,
    cut_rollouts,
    followed,
    lines_of,
    real_metrics,
    rollouts_of,
    watched,
    write_rollouts,
    write_tokens,
)

from rl.run.metrics import standard_deviation  # noqa: E402
from ui import watch_tab  # noqa: E402
from ui.launch import Launcher  # noqa: E402
from ui.runs import Runs  # noqa: E402

HOSTILE = ["<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "</think>" * 9, "\x00\x1b[31m", "x" * 50_000]


def points(frame):
    return [tuple(row) for row in frame.itertuples(index=False)]


def test_without_runs(tmp_path):
    found = followed(Launcher(Runs(tmp_path)))
    assert "There is no run yet" in found["status"] and found["timer"].value == 10 and found["Reward"] is None


def test_a_run_that_was_stopped(launcher):
    found = followed(launcher)
    assert (found["name"].value, found["name"].choices) == ("a", [("a", "a")])
    assert found["status"] == (
        "Stopped before its end: step 10 of 20.\nHeld-out accuracy, greedy: 10.0% at step 0, 50.0% at step 5."
    )
    assert found["log"].endswith("step 2/20") and found["alarms"] == "none" and found["timer"].value == 10
    assert (found["step"].minimum, found["step"].maximum, found["step"].value) == (1, 10, 10)
    assert points(found["Held-out accuracy, %"]) == [
        (0, 10.0, "greedy"),
        (5, 50.0, "greedy"),
        (0, 20.0, "sampled"),
        (5, 25.0, "sampled"),
    ]
    assert points(found["Reward"])[:2] == [(1, 0.1, "mean"), (2, 0.2, "mean")]
    assert points(found["Tokens a second"])[0] == (1, 60.0, "of the whole step")  # 6 completions of 20 tokens in 2 s
    assert found["KL from the base, nats a token"] is None


def test_a_run_under_way(folder, launcher):
    (folder / "b").mkdir()
    (folder / "b/config.yaml").write_text("")  # newer, but not running
    os.utime(folder / "b/config.yaml", (2**32, 2**32))
    with filelock.FileLock(folder / "a/lock"):
        found = followed(launcher)
        assert [name for name, _ in found["name"].choices] == ["a", "b"] and found["timer"].value == 2
        # 10 steps of 2 s are left, and two evaluations of 10 / 3 s
        assert found["status"].startswith("Running: step 10 of 20, about 0:27 min left.")
        (folder / "a/STOP").touch()
        assert followed(launcher, "a")["status"].startswith("Running, asked to stop: it ends after this step")
    assert followed(launcher, "a")["timer"].value == 10


def test_only_what_changed_is_sent(folder, launcher):
    first = followed(launcher)
    again = followed(launcher, "a", first["seen"])
    assert not {"name", "step", "shown_range", *watch_tab.CURVES} & set(again)
    with (folder / "a/metrics.jsonl").open("a") as file:
        file.write(lines_of(real_metrics([11])) + '{"step": 12, "rew')
    write_rollouts(folder / "a", rollouts_of([11]))
    more = followed(launcher, "a", again["seen"])
    assert points(more["Reward"])[-1] == (11, 1.1, "mean") and more["status"].startswith(
        "Stopped before its end: step 11"
    )
    assert more["step"].maximum == 11 and more["step"].value != 11, "the step that is looked at stays"


def test_a_run_that_was_cut_back(folder, launcher):
    seen = followed(launcher)["seen"]
    (folder / "a/metrics.jsonl").write_text(lines_of(real_metrics(range(1, 4), reward=9.0)))
    cut_rollouts(folder / "a", 3)
    found = followed(launcher, "a", seen)
    assert points(found["Reward"]) == [(1, 9.0, "mean"), (2, 9.0, "mean"), (3, 9.0, "mean")]
    assert found["step"].maximum == found["step"].value == 3


def test_a_run_that_is_watched_from_its_start(folder, launcher):
    (folder / "a/metrics.jsonl").rename(folder / "metrics.jsonl")
    (folder / "a/rollouts").rename(folder / "rollouts")
    first = followed(launcher, seen={"range": ["z", 1, 45]})
    assert (first["step"].minimum, first["step"].maximum, first["step"].value) == (1, 2, 1), "nothing of the run before"
    assert first["Reward"] is None, "of an empty frame a plot takes the numbers for words"
    (folder / "metrics.jsonl").rename(folder / "a/metrics.jsonl")
    (folder / "rollouts").rename(folder / "a/rollouts")
    found = followed(launcher, "a", first["seen"])
    assert (found["step"].minimum, found["step"].maximum, found["step"].value) == (1, 10, 10)
    assert found["shown_range"] == ["a", 1, 10] != first["shown_range"], "its completions are shown"


def test_alarms_in_words(folder, launcher):
    metrics = real_metrics([1, 2], alarms=["all wrong"]) + real_metrics([3])
    (folder / "a/metrics.jsonl").write_text(lines_of(metrics))
    assert followed(launcher)["alarms"] == "all wrong: since step 1, no longer\nnothing is <b>right</b>"


def test_what_is_damaged_is_said_and_asked_again_seldom(folder, launcher):
    with filelock.FileLock(folder / "a/lock"):
        (folder / "a/metrics.jsonl").write_text("nonsense\n")
        found = followed(launcher)
        assert "metrics.jsonl is damaged" in found["status"] and found["timer"].value == 10
        (folder / "a/metrics.jsonl").unlink()
        (folder / "a/metrics.jsonl").symlink_to("/etc/passwd")
        found = followed(Launcher(Runs(folder)))
        assert found["status"].startswith("a/metrics.jsonl lies outside") and found["timer"].value == 10


def test_a_long_run_is_drawn_by_500_points(folder, launcher):
    metrics = real_metrics(range(1, 5001))
    for line in metrics[::2]:
        line["eval/accuracy"] = 0.5
    (folder / "a/metrics.jsonl").write_text(lines_of(metrics))
    followed(launcher)
    started = time.monotonic()
    found = followed(launcher, "a")
    assert time.monotonic() - started < 2
    for label in watch_tab.CURVES:
        assert found[label] is None or found[label].groupby("series").size().max() <= 500
    assert points(found["Reward"])[-1][0] == 5000


# --- the completions of a step


def line(reward, verdict="wrong", finish="stop", **more):
    base = {
        "prompt": "q",
        "completion": "c",
        "rewards": {"correct": reward},
        "reasons": {},
        "advantage": 0.5,
        "tokens": 3,
    }
    return base | {"reward": reward, "verdict": verdict, "finish_reason": finish} | more


def test_a_group_is_sorted_by_reward_and_judged_in_words():
    group = [
        line(0.0, finish="length"),
        line(0.1, reasons={"correct": "no_answer: none found"}),
        line(None, "ungraded", rewards={"correct": None}, advantage=None),
        line(1.1, "right", rewards={"correct": 1.0, "format": 1.0}, reasons={"correct": "right"}),
        line(0.1),
    ]
    question, rows, text, reasons = watch_tab.show_group(group)
    assert [row[:5] for row in rows] == [
        [4, "1.1", "correct", "+0.5", "itself"],
        [2, "0.1", "no answer", "+0.5", "itself"],
        [5, "0.1", "wrong", "+0.5", "itself"],
        [1, "0", "cut off", "+0.5", "the length limit"],
        [3, "-", "not graded", "-", "itself"],
    ]
    assert (question, text, reasons) == ("q", "c", [["correct", "1", "right"], ["format", "1", ""]])
    assert watch_tab.describe_group(7, group) == [7, "1 of 5", "0.325", "0.519", "q"]
    assert watch_tab.number_of(standard_deviation([1.1] * 8)) == "0"


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_stays_text(text):
    """It goes into components that show text as text; what is too long is cut, and says so."""
    question, rows, shown, reasons = watch_tab.show_group(
        [line(1.0, completion=text, prompt=text, reasons={"correct": text})]
    )
    for value, most in ((question, 20_000), (shown, 20_000), (rows[0][-1], 300), (reasons[0][2], 300)):
        assert (
            value == text
            if len(text) <= most
            else value.startswith(text[:most]) and f"{len(text) - most:,} more characters" in value
        )
    completion = {"tokens": [text], "advantages": [1.0]}
    _, tokens = watch_tab.describe_tokens([completion], 0, "advantage")
    assert len(tokens[0][0]) < 400 and len(watch_tab.describe_token(completion, 0)) < 500


def test_no_table_takes_text_for_html(folder):
    page = build(folder)
    tables = [block for block in page.blocks.values() if isinstance(block, gr.Dataframe)]
    assert len(tables) == 3 and {t.datatype for t in tables} == {"str"}
    assert not [block for block in page.blocks.values() if isinstance(block, gr.HTML)]


# --- tokens


def test_tokens_are_coloured_by_what_is_chosen():
    completions = [
        {"tokens": ["a", "\n", " ", "", "b"], "logprobs": [-1.0] * 5, "advantages": [1.0, -1.0, 0.4, -0.2, 0.01]},
        {"tokens": ["c"], "advantages": [-2.0], "logprobs": [-1.0]},
    ]
    legend, tokens = watch_tab.describe_tokens(completions, 0, "advantage")
    assert tokens == [("a", "above 0"), ("⏎\n", "below 0"), ("␣", "above 0"), ("∅", "below 0"), ("b", "about 0")]
    assert legend.startswith("advantage, in this group from -2 to 1. Grey is within 0.1 of 0") and "beyond 1." in legend
    assert watch_tab.describe_token(completions[0], 1) == (
        "token 2, text ⏎, log-probability -1, advantage -1, value -, KL -, entropy -"
    )
    assert watch_tab.describe_tokens(completions, 1, "advantage")[1] == [("c", "far below 0")]
    legend, tokens = watch_tab.describe_tokens(completions, 0, "value")
    assert "no critic" in legend and {kind for _, kind in tokens} == {None}
    for nothing in (([], 0), (completions, None), (completions, 2)):
        assert watch_tab.describe_tokens(*nothing, "KL") == ["No tokens were logged for this step.", []]


def test_many_tokens_are_cut():
    legend, tokens = watch_tab.describe_tokens([{"tokens": ["a"] * 9000, "entropy": [0.5] * 9000}], 0, "entropy")
    assert len(tokens) == 2000 and "first 2,000 of 9,000 tokens" in legend


def test_the_choices_name_reward_and_verdict():
    completions = {"prompt_id": "q", "completions": [{}, {}]}
    groups = [[{"prompt_id": "p"}], [line(1.0, "right", prompt_id="q"), line(0.0, prompt_id="q")]]
    assert watch_tab.token_choices(completions, groups) == [("1: reward 1, correct", 0), ("2: reward 0, wrong", 1)]
    assert watch_tab.token_choices(completions, groups * 2) == [("1", 0), ("2", 1)], "the prompt was asked twice"
    assert watch_tab.token_choices({"prompt_id": None, "completions": []}, groups) == []


# --- the page


def clicked(page, name, *inputs, index=None, row=None):
    """What the handler of this name makes of a click, as Gradio calls it."""
    from gradio.helpers import special_args

    handler = next(block.fn for block in page.fns.values() if block.name == name)
    event = gr.EventData(None, {"index": index, "value": None, "row_value": row})
    return handler(*special_args(handler, list(inputs), event_data=event)[0])


def test_clicks(folder):
    page = build(folder)
    runs = Runs(folder)
    tokens = [{"tokens": ["a", "b"], "logprobs": [-0.5, -1.5]}]
    write_tokens(folder / "a", [{"step": 3, "prompt_id": "q3-0", "completions": tokens}])
    write_rollouts(folder / "a", rollouts_of([3], text="<b>"))
    groups, _, _, _, _, _, _, logged, *_ = watch_tab.show_step(runs, "a", 3, "KL")
    assert groups == runs.get("a").groups(3) and logged == tokens
    group, question, rows, text, _ = clicked(page, "pick_prompt", groups, row=["2", "2 + 2 = ?"])
    assert (group, question, text) == (groups[1], "2 + 2 = ?", "<b> 3 1 1") and [row[0] for row in rows] == [2, 1]
    assert clicked(page, "pick_completion", group, row=[1, "0"])[0] == "<b> 3 1 0"
    assert clicked(page, "pick_token", logged, 0, index=1).startswith("token 2, text b, log-probability -1.5")
    with pytest.raises(gr.Error, match="There is no run &#x27;../a&#x27;"):
        clicked(page, "show_step", "../a", 3, "KL")


def test_a_gap_or_a_damaged_file_leaves_the_page_whole(folder):
    """The step is empty, and a sentence names the file."""
    runs = Runs(folder)
    write_tokens(
        folder / "a", [{"step": 3, "prompt_id": "q3-0", "completions": [{"tokens": ["a"], "advantages": [1.0]}]}]
    )
    _, prompts, group, question, completions, _, _, _, which, legend, tokens = watch_tab.show_step(
        runs, "a", 3, "advantage"
    )
    assert (len(prompts), len(group), question, len(completions)) == (3, 2, "2 + 2 = ?", 2)
    assert which.value == 0 and legend.startswith("advantage, in this group") and tokens == [("a", "far above 0")]
    (folder / "a/rollouts/000004.jsonl").unlink()
    (folder / "a/rollouts/000005.jsonl").write_text("nonsense")
    (folder / "a/tokens/000005.json").write_text('{"step": 5,')
    (folder / "a/rollouts/000006.jsonl").write_text('{"step": 6, "prompt_id": "q"}\n')
    (folder / "a/tokens/000006.json").write_text('{"step": 6}')
    for step, problem, of_tokens in (
        (4, "rollouts/000004.jsonl is missing", "No tokens were logged"),
        (5, "rollouts/000005.jsonl is damaged", "tokens/000005.json is damaged"),
        (6, "rollouts/000006.jsonl is damaged", "tokens/000006.json is damaged"),
    ):
        *empty, question, completions, text, reasons, logged, which, legend, tokens = watch_tab.show_step(
            runs, "a", step, "KL"
        )
        assert empty == [[], [], []] and completions == reasons == tokens == which.choices == [] and text == ""
        assert problem in question and of_tokens in legend
    found = followed(Launcher(runs))
    assert (found["step"].minimum, found["step"].maximum) == (1, 10) and "step 10 of 20" in found["status"]


def test_another_tab_in_front_ends_the_timer(folder, served):
    with filelock.FileLock(folder / "a/lock"):
        client = served()
        assert watched(client)["timer"]["active"]
        assert not watched(client, visible=False)["timer"]["active"]


def test_where_others_can_reach_it_runs_are_only_read(served):
    client = served(editable=False)
    names = client.view_api(return_format="dict")["named_endpoints"]
    assert "/watch_run" in names and not {"/start_run", "/resume_run", "/stop_run", "/show_command"} & set(names)
    found = watched(client)
    assert found["started"] == "nothing yet" and "step 10 of 20" in found["status"]
    with pytest.raises(Exception, match="."):
        client.predict("../a", 1, "KL", api_name="/show_step")


def test_every_control_is_labelled(folder):
    page = build(folder)
    controls = (gr.Textbox, gr.Dropdown, gr.Slider, gr.Radio, gr.Dataframe, gr.LinePlot, gr.HighlightedText)
    assert all(block.label for block in page.blocks.values() if isinstance(block, controls))
