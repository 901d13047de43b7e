"""The reader of run folders: runs that are in progress, truncated, damaged, malicious or huge."""

import os
import subprocess
import sys
import time
import tracemalloc

import filelock
import pytest
from watching import make_metrics, make_rollouts, to_jsonl, truncate_rollouts, write_rollouts, write_tokens

from rl.config import ConfigError, RunError
from rl.run.reader import MAX_POINTS, Runs, downsample, tail


@pytest.fixture
def folder(tmp_path):
    """A run folder `a` with 20 steps and two completions per prompt."""
    run = tmp_path / "runs/a"
    (run / "eval").mkdir(parents=True)
    (run / "config.yaml").write_text("num_generations: 2\nmax_steps: 20\n")
    (run / "metrics.jsonl").write_text(to_jsonl(make_metrics(range(1, 21))))
    write_rollouts(run, make_rollouts(range(1, 21)))
    write_tokens(run, [{"step": s, "prompt_id": f"q{s}-0", "completions": []} for s in range(1, 21)])
    for name in ("after", "step_000010", "before"):
        (run / f"eval/{name}.jsonl").write_text(to_jsonl([{"question": "<b>", "verdict": "right"}] * 3))
    for name in ("step_000010", "step_000005", "step_000015.unfinished", "step_000020"):
        (run / "checkpoints" / name).mkdir(parents=True)
        (run / "checkpoints" / name / "adapter_config.json").write_text("{}")
    (run / "checkpoints/step_000020/adapter_config.json").unlink()
    return tmp_path / "runs"


@pytest.fixture
def run(folder):
    return Runs(folder).get("a")


def test_an_empty_or_missing_folder_has_no_runs(tmp_path):
    for runs in (Runs(tmp_path), Runs(tmp_path / "none")):
        assert runs.names() == []
        with pytest.raises(RunError, match="train one first"):
            runs.get("a")


def test_the_newest_run_comes_first(folder):
    for name, start_time in (("old", 1), ("new", 2**32)):
        (folder / name).mkdir()
        (folder / name / "config.yaml").write_text("")
        os.utime(folder / name / "config.yaml", (start_time, start_time))
    (folder / "no_run").mkdir()
    assert Runs(folder).names() == ["new", "a", "old"]


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc", "", ".", "..", "a/", "a\0", None, "A"])
def test_refuses_run_names_that_lead_outside_the_folder(folder, name):
    (folder.parent / "x").mkdir()
    (folder.parent / "x/config.yaml").write_text("")
    with pytest.raises(RunError, match="There is no run|No run is selected"):
        Runs(folder).get(name)


@pytest.mark.parametrize("name", ["../../secret", "../config", "before.jsonl", "", None])
def test_refuses_evaluation_names_that_lead_outside_the_folder(folder, run, name):
    (folder / "secret.jsonl").write_text('{"secret": 1}\n')
    with pytest.raises(RunError, match="has no evaluation"):
        run.evaluation(name)


def test_refuses_links_that_lead_outside_the_folder(folder):
    secret = folder.parent / "secret"
    secret.write_text('{"step": 1, "secret": 1}\n')
    run = folder / "a"
    files = (
        "console.log",
        "rollouts/000001.jsonl",
        "tokens/000001.json",
        "summary.json",
        "eval/x.jsonl",
        "metrics.jsonl",
    )
    for name in files:
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(secret)
    run = Runs(folder).get("a")
    for read in (
        run.summary,
        run.metrics,
        lambda: run.tokens(1),
        lambda: run.groups(1),
        lambda: run.evaluation("x"),
        lambda: run.file("console.log"),
    ):
        with pytest.raises(RunError, match="outside the runs folder"):
            read()
    for name in ("rollouts", "tokens"):
        (run.path / name).rename(folder.parent / name)
        (run.path / name).symlink_to(folder.parent / name)
    for read in (run.steps, lambda: run.groups(2), lambda: run.tokens(2)):
        with pytest.raises(RunError, match="outside the runs folder"):
            read()
    (folder / "b").symlink_to(folder.parent / "elsewhere")
    (folder.parent / "elsewhere").mkdir()
    (folder.parent / "elsewhere/config.yaml").write_text("")
    assert Runs(folder).names() == ["a"]


def test_lists_evaluations_and_complete_checkpoints(run):
    assert run.evaluations() == ["before", "step_000010", "after"]
    assert len(run.evaluation("after")) == 3
    assert run.checkpoints() == ["step_000005", "step_000010"]


def test_reads_a_run_without_output(folder):
    (folder / "b").mkdir()
    (folder / "b/config.yaml").write_text("")
    run = Runs(folder).get("b")
    assert (run.metrics().steps, run.steps(), run.tokens(1), run.evaluations()) == ([], [], None, [])
    assert (run.checkpoints(), run.summary(), tail(run.file("console.log"), 20), run.status()) == (
        [],
        {},
        "",
        "stopped",
    )


def test_status_of_a_run(folder, run):
    assert run.status() == "stopped"
    (folder / "a/summary.json").write_text('{"finished": true}')
    assert run.status() == "finished"
    with filelock.FileLock(folder / "a/lock"):
        assert run.status() == "running"
    assert run.status() == "finished"


def test_detects_the_lock_of_another_process_and_keeps_it(folder, run):
    code = (
        "import filelock, sys; l = filelock.FileLock(sys.argv[1]); l.acquire(); print(1, flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, folder / "a/lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    process.stdout.readline()
    assert [run.status() for _ in range(3)] == ["running"] * 3
    process.communicate()
    assert run.status() == "stopped"


def test_groups_hold_the_completions_of_each_prompt(run):
    assert run.steps() == list(range(1, 21))
    groups = run.groups(7)
    assert [[line["completion"] for line in group] for group in groups] == [
        [f"\\boxed{{4}} 7 {p} {i}" for i in range(2)] for p in range(3)
    ]
    assert run.completions(7) == sum(groups, [])
    for step in (0, 21):
        with pytest.raises(RunError, match=f"step {step}: rollouts/0000{step:02d}.jsonl is missing"):
            run.groups(step)


def test_a_prompt_that_was_drawn_twice_in_a_row_gives_two_groups(folder, run):
    lines = make_rollouts([1], prompts=1, size=4)
    write_rollouts(folder / "a", lines)
    assert run.groups(1) == [lines[:2], lines[2:]]


def test_steps_come_from_the_file_names(folder, run):
    """Incomplete files and other names are ignored, and missing steps stay missing."""
    rollouts = folder / "a/rollouts"
    for step in (1, 7, 20):
        (rollouts / f"{step:06d}.jsonl").unlink()
    write_rollouts(folder / "a", make_rollouts([1_000_000]))
    for name in ("000021.jsonl.unfinished", "x.jsonl", "00002\N{SUPERSCRIPT TWO}.jsonl", "000022.json"):
        (rollouts / name).write_text("{}\n")
    assert run.steps() == [*range(2, 7), *range(8, 20), 1_000_000]
    assert len(run.groups(1_000_000)) == 3


def test_ignores_an_incomplete_line(folder, run):
    with (folder / "a/metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "prompt')
    assert run.metrics().steps == list(range(1, 21))
    with (folder / "a/metrics.jsonl").open("a") as file:
        file.write('_id": 1, "alarms": []}\n')
    assert run.metrics().steps[-1] == 21 and run.metrics().points("prompt_id") == [(21, 1.0)]


def test_reads_the_files_anew_after_a_resume(folder, run):
    """--resume truncates metrics.jsonl, which may exceed its former length before the next read."""
    metrics = folder / "a/metrics.jsonl"
    assert len(run.metrics().steps) == 20
    metrics.write_text(to_jsonl(make_metrics(range(1, 6))))
    truncate_rollouts(folder / "a", 5)
    assert run.metrics().steps == run.steps() == [1, 2, 3, 4, 5]
    resumed = make_metrics(range(1, 6)) + make_metrics(range(6, 41), reward=7.0, alarms=["clipped"])
    metrics.write_text(to_jsonl(resumed))
    assert run.metrics().steps == [m["step"] for m in resumed]
    assert run.metrics().points("reward")[-1] == (40, 7.0)
    assert run.metrics().alarms == {"clipped": 6} and run.metrics().active == ["clipped"]
    metrics.write_text(to_jsonl(make_metrics(range(1, 42))))
    assert run.metrics().alarms == {} and run.metrics().active == [] and run.metrics().steps[-1] == 41


def test_downsamples_metrics_and_keeps_evaluations(folder, run):
    lines = make_metrics(range(1, 5001))
    for line in lines[99::100]:
        line["eval/accuracy"] = 0.5
    (folder / "a/metrics.jsonl").write_text(to_jsonl(lines))
    metrics = run.metrics()
    assert 500 <= len(metrics.steps) <= 550
    assert metrics.steps == sorted(metrics.steps) and metrics.steps[0] == 1 and metrics.steps[-1] == 5000
    assert len(metrics.points("eval/accuracy")) == 50
    assert len(metrics.points("reward")) == len(metrics.steps) and metrics.points("unknown") == []
    assert downsample([1, 2, 3], 3) == [1, 2, 3] and downsample(range(100), 3) == [0, 50, 99]


def test_names_a_damaged_file(folder, run):
    for content in ('nonsense\n{"step": 1}\n', '{"step": 1}\n', '{"step": 1, "com', "[]\n", "\ud800"):
        (folder / "a/rollouts/000003.jsonl").write_bytes(content.encode(errors="surrogatepass"))
        (folder / "a/tokens/000003.json").write_bytes(content.encode(errors="surrogatepass"))
        with pytest.raises(RunError, match="rollouts/000003.jsonl .* not a JSON object"):
            run.groups(3)
        with pytest.raises(RunError, match="tokens/000003.json .* not a JSON object"):
            run.tokens(3)
    (folder / "a/rollouts/000003.jsonl").write_text("")
    with pytest.raises(RunError, match="rollouts/000003.jsonl is missing or empty"):
        run.groups(3)
    assert 3 in run.steps() and len(run.groups(4)) == 3
    (folder / "a/metrics.jsonl").write_text('{"step": 1, "alarms": []}\n{"step": \n')
    with pytest.raises(RunError, match="metrics.jsonl .* not a JSON object"):
        run.metrics()
    (folder / "a/config.yaml").write_text("lerning_rate: 1\n")
    with pytest.raises(ConfigError, match="learning_rate"):
        _ = run.config


def test_tail_returns_the_last_lines(folder, run):
    (folder / "a/console.log").write_bytes(b"x" * 200_000 + b"\none\n\xfftwo\n")
    assert tail(run.file("console.log"), 2) == "one\n\N{REPLACEMENT CHARACTER}two"
    assert len(tail(run.file("console.log"), 20)) < 2**16


def write_long_run(path, num_steps, num_completions, length):
    """Write a run folder with `num_completions` per step, each with a text of `length` characters."""
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(f"num_generations: 2\nmax_steps: {num_steps}\n")
    extra = {f"part/{n}/mean": 0.123456789 for n in range(60)}  # makes lines of about 2 KB, as in a real run
    (path / "metrics.jsonl").write_text(to_jsonl(make_metrics(range(1, num_steps + 1), **extra)))
    write_rollouts(path, make_rollouts(range(1, num_steps + 1), num_completions // 2, 2, "x" * length))
    write_tokens(
        path,
        (
            {"step": step, "prompt_id": "q", "completions": [{"tokens": ["x"] * 1000}]}
            for step in range(1, num_steps + 1)
        ),
    )


def poll_run(run, num_polls, num_steps):
    """Read a run repeatedly, as the page does. Returns the slowest poll in seconds, and early and late memory in MB."""
    slowest, memory = 0.0, []
    for poll in range(num_polls):
        start = time.monotonic()
        step = 1 + poll * 997 % num_steps
        assert len(run.metrics().steps) <= 1000 and run.steps()[-1] >= num_steps
        assert run.groups(step)[0][0]["step"] == run.tokens(step)["step"] == step
        with run.file("metrics.jsonl").open("a") as file:
            file.write(to_jsonl(make_metrics([num_steps + poll + 1])))
        slowest = max(slowest, time.monotonic() - start)
        if poll == num_polls // 4 or poll == num_polls - 1:
            memory.append(tracemalloc.get_traced_memory()[0] / 2**20)
    return slowest, memory


@pytest.mark.parametrize(
    "num_steps, num_completions, length, num_polls",
    [(300, 8, 1000, 20), pytest.param(5000, 8, 1000, 60, marks=pytest.mark.slow)],
)
def test_memory_stays_flat(tmp_path, num_steps, num_completions, length, num_polls):
    write_long_run(tmp_path / "runs/a", num_steps, num_completions, length)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0] / 2**20
        slowest, (early, late) = poll_run(Runs(tmp_path / "runs").get("a"), num_polls, num_steps)
        peak = tracemalloc.get_traced_memory()[1] / 2**20
    finally:
        tracemalloc.stop()
    print(f"{num_polls} polls: slowest {slowest:.2f} s, memory {early:.2f} and {late:.2f} MB, peak {peak:.1f} MB")
    assert late - before < 3 and late - early < 0.5 and peak - before < 30
    assert slowest < 2


def test_renames_a_run(folder):
    runs = Runs(folder)
    (folder / "b").mkdir()
    for name, message in (
        ("b", "exists already"),
        ("../b", "without slashes"),
        ("", "slashes"),
        (".x", "slashes"),
        (" b", "slashes"),
        ("b\n", "slashes"),
    ):
        with pytest.raises(RunError, match=message):
            runs.rename("a", name)
    runs.get("a").write_note("a note")
    runs.rename("a", "c d")
    assert runs.names() == ["c d"] and runs.get("c d").note() == "a note" and len(runs.get("c d").steps()) == 20
    with pytest.raises(RunError, match="no run 'a'"):
        runs.rename("a", "x")


def test_deletes_a_run(folder):
    runs = Runs(folder)
    with filelock.FileLock(folder / "a/lock"):
        with pytest.raises(RunError, match="a is running. Stop it first"):
            runs.delete("a")
    assert runs.names() == ["a"]
    runs.delete("a")
    assert runs.names() == [] and not list(folder.iterdir())
    (folder / "config.yaml").write_text("")
    for name in ("../runs", "", None):
        with pytest.raises(RunError, match="no run|No run"):
            runs.delete(name)
    assert folder.is_dir()


def test_a_half_deleted_run_is_hidden(folder):
    (folder / "a").rename(folder / ".deleted-a")
    assert Runs(folder).names() == []


def test_imports_neither_torch_nor_gradio():
    code = "import sys, rl.run.reader, ui.page; print([m for m in ('torch', 'gradio', 'pandas') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
    assert MAX_POINTS == 500


@pytest.mark.parametrize("content", ["null", "[]", "5", '"x"'])
def test_one_bad_folder_does_not_affect_the_others(tmp_path, content):
    """A summary with other contents, a cycle of links, and a checkpoint without a valid step number."""
    for name in ("bad", "good"):
        (tmp_path / name / "checkpoints/step_²").mkdir(parents=True)
        (tmp_path / name / "config.yaml").write_text("model: data/tiny\n")
    (tmp_path / "bad/summary.json").write_text(content)
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    runs = Runs(tmp_path)
    assert sorted(runs.names()) == ["bad", "good"] and runs.running() == []
    assert runs.get("bad").summary() == {} and runs.get("bad").checkpoints() == []
    (tmp_path / "bad/metrics.jsonl").write_text("5\n")
    with pytest.raises(RunError, match="metrics.jsonl .* not a JSON object"):
        runs.get("bad").metrics()
