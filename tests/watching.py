"""Run folders with synthetic contents, and the Watch tab over them."""

import contextlib
import itertools
import json
import time
from pathlib import Path

import gradio as gr

from ui import watch_tab
from ui.runs import Page, Runs

NAMES = ["name", "status", "alarms", "log", "started", "step", "shown_range", "timer", "seen"]


def to_jsonl(dicts):
    return "".join(json.dumps(d, ensure_ascii=False) + "\n" for d in dicts)


def make_metrics(steps, **more):
    return [{"step": s, "reward": s / 10, "accuracy": 0.5, "alarms": []} | more for s in steps]


def make_rollouts(steps, prompts=3, size=2, text="\\boxed{4}"):
    return [
        {
            "step": s,
            "prompt_id": f"q{s}-{p}",
            "prompt": "2 + 2 = ?",
            "completion": f"{text} {s} {p} {i}",
            "reward": i / 2,
        }
        for s in steps
        for p in range(prompts)
        for i in range(size)
    ]


def write_rollouts(run, records):
    """Write rollouts/000001.jsonl etc. records: completions in the order of their steps."""
    (run / "rollouts").mkdir(exist_ok=True)
    for step, completions in itertools.groupby(records, key=lambda record: record["step"]):
        (run / f"rollouts/{step:06d}.jsonl").write_text(to_jsonl(completions))


def write_tokens(run, records):
    """Write tokens/000001.json etc. records: one per step."""
    (run / "tokens").mkdir(exist_ok=True)
    for record in records:
        (run / f"tokens/{record['step']:06d}.json").write_text(json.dumps(record))


def truncate_rollouts(run, step):
    """Remove the files of later steps, as --resume does."""
    for file in run.glob("rollouts/*.jsonl"):
        if int(file.stem) > step:
            file.unlink()


def follow_run(launcher, selected=None, seen=None):
    return watch_tab.follow(launcher.runs, launcher, selected, seen or {})


def real_metrics(steps, **more):
    parts = {
        "completions/mean_length": 20.0,
        "step_time": 2.0,
        "time/rollout": 1.0,
        "time/score": 0.0,
        "time/update": 1.0,
    }
    return make_metrics(steps, **{"kl": None, "peak_memory_mb": 500.0} | parts | more)


def stopped_run(tmp_path):
    """Return a runs folder with a run `a` that stopped after 10 of 20 steps of 3 x 2 completions."""
    run = tmp_path / "runs/a"
    (run / "eval").mkdir(parents=True)
    (run / "config.yaml").write_text("num_generations: 2\nprompts_per_step: 3\nmax_steps: 20\neval_steps: 5\n")
    metrics = real_metrics(range(1, 11))
    metrics[4]["eval/accuracy"], metrics[4]["eval/accuracy_sampled"] = 0.5, 0.25
    (run / "metrics.jsonl").write_text(to_jsonl(metrics))
    write_rollouts(run, make_rollouts(range(1, 11)))
    rates = {"accuracy": 0.1, "accuracy_sampled": 0.2}
    (run / "summary.json").write_text(json.dumps({"eval": {"before": rates}, "seconds": {"eval": 10.0}, "steps": 5}))
    (run / "console.log").write_text("step 1/20\n  alarm: nothing is <b>right</b>\nstep 2/20\n")
    return tmp_path / "runs"


def build(folder, editable=True):
    with gr.Blocks(analytics_enabled=False) as blocks:
        with gr.Tab("Another"):
            gr.Markdown("-")
        watch_tab.build(Page(Runs(folder), None, editable, Path("rewards.py")))
    return blocks


@contextlib.contextmanager
def serving(folder):
    """Yield a function that returns clients of one page over `folder`."""
    from gradio_client import Client

    pages = []

    def client(editable=True):
        if not pages:
            pages.append(build(folder, editable))
            pages[0].queue().launch(prevent_thread_lock=True, quiet=True, run_history=False, enable_monitoring=False)
        return Client(pages[0].local_url, verbose=False)

    yield client
    for page in pages:
        page.close()


def watch_run(client, name=None, visible=True):
    return dict(
        zip(
            [n for n in NAMES if n not in ("shown_range", "seen")], client.predict(visible, name, api_name="/watch_run")
        )
    )


def wait_until(client, condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition(values := watch_run(client)):
        assert time.monotonic() < end, values
        time.sleep(0.2)
    return values
