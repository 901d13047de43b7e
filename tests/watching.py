"""Run folders with synthetic contents, and the pages over them."""

import contextlib
import itertools
import json
import time
from pathlib import Path

import gradio as gr

from rl.run.reader import Runs
from ui import watch_page
from ui.launch import Launcher
from ui.page import Page


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


def real_metrics(steps, **more):
    parts = {
        "completions/mean_length": 20.0,
        "step_time": 2.0,
        "time/rollout": 1.0,
        "time/score": 0.0,
        "time/update": 1.0,
    }
    return make_metrics(steps, **{"kl": None, "peak_memory_mb": 500.0} | parts | more)


def stopped_run(tmp_path, name="a"):
    """Return a runs folder with a run that stopped after 10 of 20 steps of 3 x 2 completions."""
    run = tmp_path / "runs" / name
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


def make_page(folder, editable=True, worker=None, rewards_file=Path("rewards.py")):
    runs = Runs(folder)
    return Page(runs, worker, editable, rewards_file, Launcher(runs))


def follow_run(page, name=None, seen=None, others=(), metrics=tuple(watch_page.METRICS)[:6], smoothing=0.0):
    """Return the values that the Watch page shows, by name."""
    return watch_page.follow(page, name, list(others), list(metrics), smoothing, seen or {})


def build(page, module=watch_page):
    """Return the Blocks and the View of a page."""
    with gr.Blocks(analytics_enabled=False) as blocks:
        view = module.build(page)
    return blocks, view


@contextlib.contextmanager
def serving(folder):
    """Yield a function that returns clients of the Watch page over `folder`."""
    from gradio_client import Client

    servers = []

    def client(editable=True):
        if not servers:
            blocks, view = build(make_page(folder, editable))
            blocks.queue().launch(prevent_thread_lock=True, quiet=True, run_history=False, enable_monitoring=False)
            servers.append((blocks, view))
        blocks, view = servers[0]
        client = Client(blocks.local_url, verbose=False)
        client.view = view
        return client

    yield client
    for blocks, _ in servers:
        blocks.close()


def call(client, endpoint, *inputs):
    """Call an event handler of a page, and return the values that it sets, by the names of the components."""
    return by_name(client, client.predict(*inputs, api_name=endpoint))


def by_name(client, values):
    """Name the outputs of an event handler, which are the components that existed when it was attached."""
    hidden = gr.State, gr.Row, gr.Column  # the client does not return them
    names = [name for name, component in client.view.items() if not isinstance(component, hidden)]
    is_skipped = [isinstance(value, dict) and value.keys() <= {"__type__", "props"} for value in values]
    return {name: value for name, value, skip in zip(names, values, is_skipped) if not skip}


def watch_run(client, name=None):
    return call(client, "/watch", name, [], ["eval/accuracy"], 0.0)


def wait_until(client, condition, seconds=60):
    """Poll the Watch page, as its timer does, until the values that it shows meet a condition."""
    end = time.monotonic() + seconds
    values = watch_run(client)
    while not condition(values):
        assert time.monotonic() < end, values
        time.sleep(0.2)
        values |= watch_run(client)
    return values
