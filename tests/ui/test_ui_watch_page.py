"""The Watch page over runs that are in progress, truncated, long, damaged or malicious."""

import csv
import json
import os
import shutil
import time
import zipfile
from types import SimpleNamespace

import filelock
import pytest

gr = pytest.importorskip("gradio")

from watching import (  # noqa: E402
    build,
    call,
    follow_run,
    make_page,
    make_rollouts,
    real_metrics,
    stopped_run,
    to_jsonl,
    truncate_rollouts,
    watch_run,
    write_rollouts,
)

from rl.config import RunError  # noqa: E402
from ui import watch_page  # noqa: E402
from ui.page import UiError  # noqa: E402


def points(plot):
    return [tuple(row) for row in plot.value["data"]]


def test_asks_for_a_run_if_there_is_none(tmp_path):
    values = follow_run(make_page(tmp_path))
    assert "There is no run yet" in values["status"] and values["timer"].value == 10 and values["plot0"] is None


def test_shows_a_stopped_run(page):
    values = follow_run(page)
    assert (values["name"].value, values["name"].choices) == ("a", [("a", "a")])
    assert values["progress"] == (
        '<progress value="10" max="20"></progress>a: Stopped early, step 10 of 20. Held-out accuracy (greedy): 10.0% at '
        "step 0, 50.0% at step 5."
    )
    assert values["log"].endswith("step 2/20") and values["alarms"] == "none" and values["timer"].value == 10
    assert (values["step"].minimum, values["step"].maximum, values["step"].value) == (1, 10, 10)
    accuracy = values["plot0"]
    assert points(accuracy) == [(0, 0.1, "a"), (5, 0.5, "a")] and accuracy.label == "Held-out accuracy (greedy)"
    assert accuracy.y_axis_format == ".0%" and accuracy.x_lim == [0, 12]
    assert points(values["plot1"])[:2] == [(1, 0.1, "a"), (2, 0.2, "a")]
    assert values["plot4"].value is None, "KL was not logged"
    assert values["runs"] == [["a", "stopped", "10/20", "10.0% -> 50.0%", "1", ""]]


def test_shows_the_time_left_of_a_run_in_progress(folder, page):
    (folder / "b").mkdir()
    (folder / "b/config.yaml").write_text("")  # newer, but not in progress
    os.utime(folder / "b/config.yaml", (2**32, 2**32))
    with filelock.FileLock(folder / "a/lock"):
        values = follow_run(page)
        assert [name for name, _ in values["name"].choices] == ["a", "b"] and values["timer"].value == 2
        # 10 steps of 2 s and two evaluations of 10 / 3 s are left
        assert "a: Running, step 10 of 20, about 0:27 min left." in values["progress"]
        (folder / "a/STOP").touch()
        assert "Running (will save and stop after this step)" in follow_run(page, "a")["progress"]
    assert follow_run(page, "a")["timer"].value == 10


def test_a_first_evaluation_is_visible(folder, page):
    """A line of one point would be invisible: it is drawn over one step."""
    (folder / "a/metrics.jsonl").write_text("")
    accuracy = follow_run(page)["plot0"]
    assert points(accuracy) == [(0, 0.1, "a"), (1, 0.1, "a")] and accuracy.x_lim[1] == watch_page.MIN_X


def test_compares_runs_and_any_metric(folder, page):
    stopped_run(folder.parent, "b")
    (folder / "b/metrics.jsonl").write_text(to_jsonl(real_metrics([1, 2], **{"rewards/correct/mean": 0.25})))
    values = follow_run(page, "a", others=["b", "a", "removed"], metrics=["reward", "rewards/correct/mean"])
    assert values["others"].value == ["b"] and values["others"].choices == [("b", "b")]
    assert points(values["plot0"])[-3:] == [(10, 1.0, "a"), (1, 0.1, "b"), (2, 0.2, "b")]
    assert (
        points(values["plot1"]) == [(1, 0.25, "b"), (2, 0.25, "b")] and values["plot1"].label == "rewards/correct/mean"
    )
    assert [values[f"plot{i}"].visible for i in range(3)] == [True, True, False]
    choices = [metric for _, metric in values["metrics"].choices]
    assert {"loss", "grad_norm", "learning_rate", "rewards/correct/mean"} <= set(choices) and "step" not in choices


def test_smoothing():
    assert watch_page.smooth([(1, 4.0), (2, 2.0), (3, 8.0)], 0.0) == [(1, 4.0), (2, 2.0), (3, 8.0)]
    # weights 1 - s, normalized: 4; (0.5 4 + 2) / 1.5; (0.25 4 + 0.5 2 + 8) / 1.75
    smoothed = watch_page.smooth([(1, 4.0), (2, 2.0), (3, 8.0)], 0.5)
    assert [value for _, value in smoothed] == pytest.approx([4.0, 4 / 1.5, 10 / 1.75])
    assert watch_page.smooth([], 0.5) == []


def test_sends_only_the_values_that_changed(folder, page):
    first = follow_run(page)
    second = follow_run(page, "a", first["seen"])
    assert second.keys() == {"timer", "launched", "seen", "status"} and "value" not in second["status"]
    with (folder / "a/metrics.jsonl").open("a") as file:
        file.write(to_jsonl(real_metrics([11])) + '{"step": 12, "rew')
    write_rollouts(folder / "a", make_rollouts([11]))
    third = follow_run(page, "a", second["seen"])
    assert points(third["plot1"])[-1] == (11, 1.1, "a") and "step 11 of 20" in third["progress"]
    assert third["step"].maximum == 11 and third["step"].value != 11, "the selected step stays"
    assert not {"note", "new_name", "steps"} & third.keys(), "a note that is being written stays"


def test_shows_the_last_step_of_a_truncated_run(folder, page):
    seen = follow_run(page)["seen"]
    (folder / "a/metrics.jsonl").write_text(to_jsonl(real_metrics(range(1, 4), reward=9.0)))
    truncate_rollouts(folder / "a", 3)
    values = follow_run(page, "a", seen)
    assert points(values["plot1"]) == [(1, 9.0, "a"), (2, 9.0, "a"), (3, 9.0, "a")]
    assert values["step"].maximum == values["step"].value == 3


def test_watches_a_run_from_its_start(folder, page):
    (folder / "a/metrics.jsonl").rename(folder / "metrics.jsonl")
    (folder / "a/rollouts").rename(folder / "rollouts")
    first = follow_run(page, seen={"range": ["z", 1, 45]})
    assert (first["step"].minimum, first["step"].maximum, first["step"].value) == (1, 2, 1)
    assert first["plot1"].value is None, "an empty frame makes the plot treat numbers as categories"
    (folder / "metrics.jsonl").rename(folder / "a/metrics.jsonl")
    (folder / "rollouts").rename(folder / "a/rollouts")
    values = follow_run(page, "a", first["seen"])
    assert (values["step"].minimum, values["step"].maximum, values["step"].value) == (1, 10, 10)
    assert values["steps"] == ["a", 1, 10] != first["steps"], "its completions are shown"


def test_lists_alarms_with_their_texts(folder, page):
    metrics = real_metrics([1, 2], alarms=["all wrong"]) + real_metrics([3])
    (folder / "a/metrics.jsonl").write_text(to_jsonl(metrics))
    assert follow_run(page)["alarms"] == "all wrong: since step 1, resolved\nnothing is <b>right</b>"


def test_a_damaged_run_empties_the_page(folder, page):
    """The curves of the run before must not stay under the name of this one, and its completions are read anew."""
    seen = follow_run(page)["seen"]
    shutil.copytree(folder / "a", folder / "b")
    (folder / "b/metrics.jsonl").write_text("nonsense\n")
    (folder / "a/note.txt").write_text("of a")
    (folder / "b/note.txt").write_text("of b")
    values = follow_run(page, "b", seen)
    assert (values["new_name"], values["note"], values["confirm"]) == ("b", "of b", False), "not those of a"
    assert "metrics.jsonl is damaged" in values["status"] and values["name"].value == "b"
    assert not any(values[name] for name in watch_page.EMPTY) and values["steps"] == ["b"]
    rows = {row[0]: row for row in values["runs"]}
    assert rows["a"][2] == "10/20" and "metrics.jsonl is damaged" in rows["b"][-1], "the other rows stay"
    (folder / "b/metrics.jsonl").unlink()
    (folder / "b/metrics.jsonl").symlink_to("/etc/passwd")
    assert follow_run(page, "b")["status"].startswith("b/metrics.jsonl links outside")
    (folder / "b/config.yaml").write_text("lerning_rate: 1\n")
    assert "learning_rate" in follow_run(page, "b")["status"]


def test_draws_a_long_run_with_at_most_500_points(folder, page):
    metrics = real_metrics(range(1, 5001))
    for line in metrics[::2]:
        line["eval/accuracy"] = 0.5
    (folder / "a/metrics.jsonl").write_text(to_jsonl(metrics))
    values = follow_run(page)
    assert max(len(points(values[f"plot{i}"])) for i in range(3)) <= 500
    assert points(values["plot1"])[-1][0] == 5000 and values["plot1"].x_lim == [0, 5000]


# --- managing runs


def test_renames_a_run_and_keeps_its_note(folder, page):
    assert watch_page.change_run(page, "a", "b", "first <b>try</b>") == {"name": "b"}
    values = follow_run(page, "b", seen={})
    assert values["note"] == "first <b>try</b>" and values["new_name"] == "b"
    assert values["runs"][0] == ["b", "stopped", "10/20", "10.0% -> 50.0%", "1", "first <b>try</b>"]
    assert watch_page.pick_run(SimpleNamespace(row_value=["b", "stopped"])) == {"name": "b"}


def test_deletes_a_run_after_a_confirmation(folder, page):
    with pytest.raises(UiError, match="tick the box"):
        watch_page.delete_run(page, "a", False)
    assert (folder / "a").is_dir()
    assert watch_page.delete_run(page, "a", True) == {"name": None, "confirm": False}
    assert not (folder / "a").exists() and "There is no run yet" in follow_run(page, "a")["status"]


def test_exports_the_metrics_and_the_newest_adapter(folder, page):
    assert len(watch_page.export_run(page, "a")["files"].value) == 1, "there is no checkpoint"
    for step in (5, 10):
        checkpoint = folder / f"a/checkpoints/step_{step:06d}"
        checkpoint.mkdir(parents=True)
        for name in ("adapter_config.json", "adapter_model.safetensors", "tokenizer_config.json", "trainer_state.pt"):
            (checkpoint / name).write_text(str(step))
    files = [file["path"] for file in watch_page.export_run(page, "a")["files"].value]
    with open(files[0], newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10 and rows[1]["reward"] == "0.2" and rows[4]["eval/accuracy"] == "0.5"
    with zipfile.ZipFile(files[1]) as archive:
        assert sorted(archive.namelist()) == [
            "adapter_config.json",
            "adapter_model.safetensors",
            "tokenizer_config.json",
        ]
        assert archive.read("adapter_config.json") == b"10"
    (checkpoint / "README.md").symlink_to("/etc/hostname")
    with pytest.raises(RunError, match="links outside"):
        watch_page.export_run(page, "a")


# --- the page


def test_tables_do_not_render_html(page):
    blocks, view = build(page)
    tables = [block for block in blocks.blocks.values() if isinstance(block, gr.Dataframe)]
    assert len(tables) == 4 and {t.datatype for t in tables} == {"str"}
    assert [b for b in blocks.blocks.values() if isinstance(b, gr.HTML)] == [view["progress"]]


def test_a_name_is_escaped_in_the_progress(folder, page):
    (folder / "a").rename(folder / "<b>")
    assert "&lt;b&gt;: Stopped" in follow_run(page)["progress"]


def test_a_page_for_other_machines_only_reads_runs(served):
    client = served(editable=False)
    names = set(client.view_api(return_format="dict", print_info=False)["named_endpoints"])
    changing = {"/start_run", "/resume_run", "/stop_run", "/show_command", "/change_run", "/delete_run", "/check"}
    assert "/watch" in names and not changing & names
    values = watch_run(client)
    assert "step 10 of 20" in values["progress"]
    assert "There is no run '../a'" in client.predict("../a", 1, "KL", api_name="/show_step")[2]
    assert json.dumps(call(client, "/select", "../a", [], [], 0.0)).count("root:") == 0


def test_every_control_has_a_label(page):
    blocks, _ = build(page)
    controls = (gr.Textbox, gr.Dropdown, gr.Slider, gr.Radio, gr.Dataframe, gr.LinePlot, gr.HighlightedText)
    assert all(block.label for block in blocks.blocks.values() if isinstance(block, controls))


def test_twenty_long_runs_stay_usable(tmp_path):
    """20 runs of 5,000 steps: bench/page.py measures the time of a poll. Here: nothing is read twice."""
    folder = stopped_run(tmp_path)
    (folder / "a/metrics.jsonl").write_text(to_jsonl(real_metrics(range(1, 301))))
    for i in range(19):
        shutil.copytree(folder / "a", folder / f"run{i}")
    page = make_page(folder)
    follow_run(page)
    start = time.perf_counter()
    values = follow_run(page, "a")
    assert len(values["runs"]) == 20 and time.perf_counter() - start < 2
