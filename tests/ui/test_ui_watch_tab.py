"""The Watch tab over runs that are in progress, truncated, long, damaged or malicious."""

import os
import time

import filelock
import pytest

gr = pytest.importorskip("gradio")

from watching import (  # noqa: E402
    build,
    follow_run,
    make_rollouts,
    real_metrics,
    to_jsonl,
    truncate_rollouts,
    watch_run,
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


def test_asks_for_a_run_if_there_is_none(tmp_path):
    values = follow_run(Launcher(Runs(tmp_path)))
    assert "There is no run yet" in values["status"] and values["timer"].value == 10 and values["Reward"] is None


def test_shows_a_stopped_run(launcher):
    values = follow_run(launcher)
    assert (values["name"].value, values["name"].choices) == ("a", [("a", "a")])
    assert values["status"] == (
        "Stopped early: step 10 of 20.\nHeld-out accuracy (greedy): 10.0% at step 0, 50.0% at step 5."
    )
    assert values["log"].endswith("step 2/20") and values["alarms"] == "none" and values["timer"].value == 10
    assert (values["step"].minimum, values["step"].maximum, values["step"].value) == (1, 10, 10)
    assert points(values["Held-out accuracy, %"]) == [
        (0, 10.0, "greedy"),
        (5, 50.0, "greedy"),
        (0, 20.0, "sampled"),
        (5, 25.0, "sampled"),
    ]
    assert points(values["Reward"])[:2] == [(1, 0.1, "mean"), (2, 0.2, "mean")]
    assert points(values["Tokens per second"])[0] == (1, 60.0, "whole step")  # 6 completions of 20 tokens in 2 s
    assert values["KL from the reference, nats per token"] is None


def test_shows_the_time_left_of_a_run_in_progress(folder, launcher):
    (folder / "b").mkdir()
    (folder / "b/config.yaml").write_text("")  # newer, but not in progress
    os.utime(folder / "b/config.yaml", (2**32, 2**32))
    with filelock.FileLock(folder / "a/lock"):
        values = follow_run(launcher)
        assert [name for name, _ in values["name"].choices] == ["a", "b"] and values["timer"].value == 2
        # 10 steps of 2 s and two evaluations of 10 / 3 s are left
        assert values["status"].startswith("Running: step 10 of 20, about 0:27 min left.")
        (folder / "a/STOP").touch()
        assert follow_run(launcher, "a")["status"].startswith("Running (will save and stop after this step): ")
    assert follow_run(launcher, "a")["timer"].value == 10


def test_sends_only_the_values_that_changed(folder, launcher):
    first = follow_run(launcher)
    second = follow_run(launcher, "a", first["seen"])
    assert not {"name", "step", "shown_range", *watch_tab.CURVES} & set(second)
    with (folder / "a/metrics.jsonl").open("a") as file:
        file.write(to_jsonl(real_metrics([11])) + '{"step": 12, "rew')
    write_rollouts(folder / "a", make_rollouts([11]))
    third = follow_run(launcher, "a", second["seen"])
    assert points(third["Reward"])[-1] == (11, 1.1, "mean") and third["status"].startswith("Stopped early: step 11")
    assert third["step"].maximum == 11 and third["step"].value != 11, "the selected step stays"


def test_shows_the_last_step_of_a_truncated_run(folder, launcher):
    seen = follow_run(launcher)["seen"]
    (folder / "a/metrics.jsonl").write_text(to_jsonl(real_metrics(range(1, 4), reward=9.0)))
    truncate_rollouts(folder / "a", 3)
    values = follow_run(launcher, "a", seen)
    assert points(values["Reward"]) == [(1, 9.0, "mean"), (2, 9.0, "mean"), (3, 9.0, "mean")]
    assert values["step"].maximum == values["step"].value == 3


def test_watches_a_run_from_its_start(folder, launcher):
    (folder / "a/metrics.jsonl").rename(folder / "metrics.jsonl")
    (folder / "a/rollouts").rename(folder / "rollouts")
    first = follow_run(launcher, seen={"range": ["z", 1, 45]})
    assert (first["step"].minimum, first["step"].maximum, first["step"].value) == (1, 2, 1), (
        "nothing is left of the previous run"
    )
    assert first["Reward"] is None, "an empty frame makes the plot treat numbers as categories"
    (folder / "metrics.jsonl").rename(folder / "a/metrics.jsonl")
    (folder / "rollouts").rename(folder / "a/rollouts")
    values = follow_run(launcher, "a", first["seen"])
    assert (values["step"].minimum, values["step"].maximum, values["step"].value) == (1, 10, 10)
    assert values["shown_range"] == ["a", 1, 10] != first["shown_range"], "its completions are shown"


def test_lists_alarms_with_their_texts(folder, launcher):
    metrics = real_metrics([1, 2], alarms=["all wrong"]) + real_metrics([3])
    (folder / "a/metrics.jsonl").write_text(to_jsonl(metrics))
    assert follow_run(launcher)["alarms"] == "all wrong: since step 1, resolved\nnothing is <b>right</b>"


def test_names_a_damaged_file_and_polls_slowly(folder, launcher):
    with filelock.FileLock(folder / "a/lock"):
        (folder / "a/metrics.jsonl").write_text("nonsense\n")
        values = follow_run(launcher)
        assert "metrics.jsonl" in values["status"] and values["timer"].value == 10
        (folder / "a/metrics.jsonl").unlink()
        (folder / "a/metrics.jsonl").symlink_to("/etc/passwd")
        values = follow_run(Launcher(Runs(folder)))
        assert values["status"].startswith("a/metrics.jsonl links outside") and values["timer"].value == 10


def test_draws_a_long_run_with_at_most_500_points(folder, launcher):
    metrics = real_metrics(range(1, 5001))
    for line in metrics[::2]:
        line["eval/accuracy"] = 0.5
    (folder / "a/metrics.jsonl").write_text(to_jsonl(metrics))
    follow_run(launcher)
    start = time.monotonic()
    values = follow_run(launcher, "a")
    assert time.monotonic() - start < 2
    for label in watch_tab.CURVES:
        assert values[label] is None or values[label].groupby("series").size().max() <= 500
    assert points(values["Reward"])[-1][0] == 5000


# --- completions of a step


def record(reward, verdict="wrong", finish_reason="stop", **fields):
    defaults = {
        "prompt": "q",
        "completion": "c",
        "rewards": {"correct": reward},
        "reasons": {},
        "advantage": 0.5,
        "tokens": 3,
    }
    return defaults | {"reward": reward, "verdict": verdict, "finish_reason": finish_reason} | fields


def test_sorts_a_group_by_reward_and_shows_verdicts():
    group = [
        record(0.0, finish_reason="length"),
        record(0.1, reasons={"correct": "no_answer: none values"}),
        record(None, "ungraded", rewards={"correct": None}, advantage=None),
        record(1.1, "right", rewards={"correct": 1.0, "format": 1.0}, reasons={"correct": "right"}),
        record(0.1),
    ]
    question, rows, text, reasons, _ = watch_tab.show_group(group)
    assert [row[:5] for row in rows] == [
        [4, "1.1", "correct", "+0.5", "stop token"],
        [2, "0.1", "no answer", "+0.5", "stop token"],
        [5, "0.1", "wrong", "+0.5", "stop token"],
        [1, "0", "cut off", "+0.5", "length limit"],
        [3, "-", "not graded", "-", "stop token"],
    ]
    assert (question, text, reasons) == ("q", "c", [["correct", "1", "right"], ["format", "1", ""]])
    assert watch_tab.describe_group(7, group) == [7, "1 of 5", "0.325", "0.519", "q"]
    assert watch_tab.format_number(standard_deviation([1.1] * 8)) == "0"


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_stays_text(text):
    """The components show it as plain text. Text that is too long is cut with a note."""
    question, rows, shown, reasons, _ = watch_tab.show_group(
        [record(1.0, completion=text, prompt=text, reasons={"correct": text})]
    )
    for value, limit in ((question, 20_000), (shown, 20_000), (rows[0][-1], 300), (reasons[0][2], 300)):
        assert (
            value == text
            if len(text) <= limit
            else value.startswith(text[:limit]) and f"{len(text) - limit:,} more characters" in value
        )
    completion = {"tokens": [text], "advantages": [1.0]}
    _, tokens = watch_tab.describe_tokens([completion], 0, "advantage")
    assert len(tokens[0][0]) < 400 and len(watch_tab.describe_token(completion, 0)) < 500


def test_tables_do_not_render_html(folder):
    page = build(folder)
    tables = [block for block in page.blocks.values() if isinstance(block, gr.Dataframe)]
    assert len(tables) == 3 and {t.datatype for t in tables} == {"str"}
    assert not [block for block in page.blocks.values() if isinstance(block, gr.HTML)]


# --- tokens


def test_colours_tokens_by_the_selected_measure():
    completions = [
        {"tokens": ["a", "\n", " ", "", "b"], "logprobs": [-1.0] * 5, "advantages": [1.0, -1.0, 0.4, -0.2, 0.01]},
        {"tokens": ["c"], "advantages": [-2.0], "logprobs": [-1.0]},
    ]
    legend, tokens = watch_tab.describe_tokens(completions, 0, "advantage")
    assert tokens == [("a", "above 0"), ("⏎\n", "below 0"), ("␣", "above 0"), ("∅", "below 0"), ("b", "near 0")]
    assert (
        legend.startswith("advantage: -2 to 1 in this group. Grey: within 0.1 of 0.") and "more than 1 from 0" in legend
    )
    assert watch_tab.describe_token(completions[0], 1) == (
        "token 2, text ⏎, log-probability -1, advantage -1, value -, KL -, entropy -"
    )
    assert watch_tab.describe_tokens(completions, 1, "advantage")[1] == [("c", "far below 0")]
    legend, tokens = watch_tab.describe_tokens(completions, 0, "value")
    assert "no critic" in legend and {kind for _, kind in tokens} == {None}
    for no_tokens in (([], 0), (completions, None), (completions, 2)):
        assert watch_tab.describe_tokens(*no_tokens, "KL") == ["No tokens were logged for this step.", []]


def test_colours_at_most_2000_tokens():
    legend, tokens = watch_tab.describe_tokens([{"tokens": ["a"] * 9000, "entropy": [0.5] * 9000}], 0, "entropy")
    assert len(tokens) == 2000 and "first 2,000 of 9,000 tokens" in legend


def test_choices_name_reward_and_verdict():
    token_log = {"prompt_id": "q", "completions": [{}, {}]}
    groups = [[{"prompt_id": "p"}], [record(1.0, "right", prompt_id="q"), record(0.0, prompt_id="q")]]
    assert watch_tab.token_choices(token_log, groups) == [("1: reward 1, correct", 0), ("2: reward 0, wrong", 1)]
    assert watch_tab.token_choices(token_log, groups * 2) == [("1", 0), ("2", 1)], "the prompt was drawn twice"
    assert watch_tab.token_choices({"prompt_id": None, "completions": []}, groups) == []


# --- the page


def click(page, name, *inputs, index=None, row=None):
    """Call the event handler of this name with a click, as Gradio does, and return its outputs."""
    from gradio.helpers import special_args

    handler = next(block.fn for block in page.fns.values() if block.name == name)
    event = gr.EventData(None, {"index": index, "value": None, "row_value": row})
    return handler(*special_args(handler, list(inputs), event_data=event)[0])


def test_a_click_selects_a_prompt_completion_or_token(folder):
    page = build(folder)
    runs = Runs(folder)
    tokens = [{"tokens": ["a", "b"], "logprobs": [-0.5, -1.5]}]
    write_tokens(folder / "a", [{"step": 3, "prompt_id": "q3-0", "completions": tokens}])
    write_rollouts(folder / "a", make_rollouts([3], text="<b>"))
    groups, _, _, _, _, _, _, _, logged, *_ = watch_tab.show_step(runs, "a", 3, "KL")
    assert groups == runs.get("a").groups(3) and logged == tokens
    group, question, rows, text, _, _ = click(page, "pick_prompt", groups, row=["2", "2 + 2 = ?"])
    assert (group, question, text) == (groups[1], "2 + 2 = ?", "<b> 3 1 1") and [row[0] for row in rows] == [2, 1]
    assert click(page, "pick_completion", group, row=[1, "0"])[0] == "<b> 3 1 0"
    assert click(page, "pick_token", logged, 0, index=1).startswith("token 2, text b, log-probability -1.5")
    with pytest.raises(gr.Error, match="There is no run &#x27;../a&#x27;"):
        click(page, "show_step", "../a", 3, "KL")


def test_a_missing_or_damaged_file_gives_an_empty_step(folder):
    """A message names the file."""
    runs = Runs(folder)
    write_tokens(
        folder / "a", [{"step": 3, "prompt_id": "q3-0", "completions": [{"tokens": ["a"], "advantages": [1.0]}]}]
    )
    _, prompts, group, question, completions, _, _, _, _, choice, legend, tokens = watch_tab.show_step(
        runs, "a", 3, "advantage"
    )
    assert (len(prompts), len(group), question, len(completions)) == (3, 2, "2 + 2 = ?", 2)
    assert choice.value == 0 and legend.startswith("advantage: ") and tokens == [("a", "far above 0")]
    (folder / "a/rollouts/000004.jsonl").unlink()
    (folder / "a/rollouts/000005.jsonl").write_text("nonsense")
    (folder / "a/tokens/000005.json").write_text('{"step": 5,')
    (folder / "a/rollouts/000006.jsonl").write_text('{"step": 6, "prompt_id": "q"}\n')
    (folder / "a/tokens/000006.json").write_text('{"step": 6}')
    for step, rollout_error, token_error in (
        (4, "rollouts/000004.jsonl is missing", "No tokens were logged"),
        (5, "rollouts/000005.jsonl is damaged", "tokens/000005.json is damaged"),
        (6, "rollouts/000006.jsonl is damaged", "tokens/000006.json is damaged"),
    ):
        *empty, question, completions, text, reasons, _, logged, choice, legend, tokens = watch_tab.show_step(
            runs, "a", step, "KL"
        )
        assert empty == [[], [], []] and completions == reasons == tokens == choice.choices == [] and text == ""
        assert rollout_error in question and token_error in legend
    values = follow_run(Launcher(runs))
    assert (values["step"].minimum, values["step"].maximum) == (1, 10) and "step 10 of 20" in values["status"]


def test_stops_the_timer_while_another_tab_is_open(folder, served):
    with filelock.FileLock(folder / "a/lock"):
        client = served()
        assert watch_run(client)["timer"]["active"]
        assert not watch_run(client, visible=False)["timer"]["active"]


def test_a_page_for_other_machines_only_reads_runs(served):
    client = served(editable=False)
    names = client.view_api(return_format="dict")["named_endpoints"]
    assert "/watch_run" in names and not {"/start_run", "/resume_run", "/stop_run", "/show_command"} & set(names)
    values = watch_run(client)
    assert values["started"] == "No run yet." and "step 10 of 20" in values["status"]
    with pytest.raises(Exception, match="."):
        client.predict("../a", 1, "KL", api_name="/show_step")


def test_every_control_has_a_label(folder):
    page = build(folder)
    controls = (gr.Textbox, gr.Dropdown, gr.Slider, gr.Radio, gr.Dataframe, gr.LinePlot, gr.HighlightedText)
    assert all(block.label for block in page.blocks.values() if isinstance(block, controls))


def test_an_episode_is_shown_as_a_chat():
    turns = [{"text": "move(<b>up</b>)", "reply": "A."}, {"text": "done", "reply": ""}]
    chat = watch_tab.show_turns({"completion": "done", "turns": turns})
    assert chat.visible and [(m["role"], m["content"][0]["text"]) for m in chat.value] == [
        ("assistant", "move(<b>up</b>)"),
        ("user", "A."),
        ("assistant", "done"),
    ]
    assert not watch_tab.show_turns({"completion": "done"}).visible
