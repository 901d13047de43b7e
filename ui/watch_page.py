"""The Watch page: the runs, and curves of any metric. ui/launch.py starts and stops runs."""

import csv
import html
import tempfile
import zipfile
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import gradio as gr
from gradio.context import Context

from rl.run.metrics import mean
from rl.run.reader import Run, downsample, open_or_empty, parse_object, tail
from rl.run.report import clock, seconds_left
from ui import completions, launch
from ui.page import Page, UiError, describe_error
from ui.text import CELL_CHARS, cut
from ui.view import View, frame, line_plot, menu, status_line, table

READ_ONLY = "Other machines can reach this page. Serve it at 127.0.0.1 to start, stop, rename and delete runs."
METRICS = {  # the metrics with a title: (title, format of the axis); the first MAX_PLOTS are shown at first
    "eval/accuracy": ("Held-out accuracy (greedy)", ".0%"),
    "reward": ("Reward", None),
    "completions/mean_length": ("Completion length, tokens", None),
    "completions/thinking": ("Completions with thinking", ".0%"),
    "kl": ("KL from the reference, nats per token", None),
    "entropy": ("Entropy, nats per token", None),
    "eval/accuracy_sampled": ("Held-out accuracy (sampled)", ".0%"),
    "completions/clipped_ratio": ("Truncated completions", ".0%"),
    "clip_ratio/region_mean": ("Clipped ratios", ".0%"),
    "loss": ("Loss", None),
    "grad_norm": ("Gradient norm", None),
    "learning_rate": ("Learning rate", None),
    "peak_memory_mb": ("Peak memory, MB", None),
    "step_time": ("Time of a step, s", None),
}
MAX_PLOTS = 6
MIN_X = 12  # smallest range of the steps; with fewer, the axis would have ticks at half steps
RUN_COLUMNS = "run", "status", "step", "accuracy", "reward", "note"
STATES = {"finished": "Finished", "stopped": "Stopped early", "running": "Running"}
EXPORTED = ("adapter_config.json", "adapter_model.safetensors", "README.md", "chat_template.jinja", "tokenizer*.json")
EMPTY = dict.fromkeys(["progress", "alarms", "log", *(f"plot{i}" for i in range(MAX_PLOTS))])


# --- the runs


def follow(page: Page, name: str | None, others: list[str], metrics: list[str], smoothing: float, seen: dict) -> dict:
    """Return the values that changed since the state `seen`. Called by the timer, and when a selection changes."""
    runs = {name: page.runs.get(name) for name in page.runs.names()}
    statuses = {name: run.status() for name, run in runs.items()}
    names = sorted(statuses, key=lambda name: statuses[name] != "running")  # running first, then the newest
    launcher = page.launcher
    started = launcher.name if launcher.is_alive() and launcher.name in names else None
    if name not in names or started not in (None, seen.get("started")):  # switch to a run that was just started, once
        name = started or next(iter(names), None)
    is_active = "running" in statuses.values() or launcher.is_alive()
    files = ("metrics.jsonl", "summary.json", "note.txt", "STOP", "console.log")
    stamps = [run.stamp(file) for run in runs.values() for file in files if file in files[:3] or run.name == name]
    key = [name, others, metrics, smoothing, statuses, stamps]
    now = {"key": key, "name": name, "started": started or seen.get("started"), "range": seen.get("range")}
    launched = gr.Textbox(text := launcher.describe(), visible=bool(text))
    values = {"timer": gr.Timer(2 if is_active else 10, active=True), "launched": launched, "seen": now}
    # Messages of other events stay. Those of this one end when the run can be shown.
    values["status"] = "" if seen.get("failed") else gr.skip()
    if key == seen.get("key"):
        return values | {"status": gr.skip(), "seen": now | {"failed": seen.get("failed")}}
    others = [other for other in others if other in names and other != name]
    values["name"] = gr.Dropdown(names, value=name)
    values["others"] = gr.Dropdown([other for other in names if other != name], value=others, multiselect=True)
    values["runs"] = [describe_row(run, statuses[run.name]) for run in runs.values()]
    values |= EMPTY
    if name != seen.get("name"):  # else the user may be editing them
        values |= {"new_name": name or "", "note": "", "confirm": False}
    if not name:
        now["failed"] = True
        return values | {"status": "There is no run yet. Start one, or run: make train", "steps": None}
    run = runs[name]
    try:
        if name != seen.get("name"):
            values["note"] = run.note()
        values |= {"progress": describe_progress(run, statuses[name]), "alarms": describe_alarms(run)}
        values |= {"log": tail(run.file("console.log"), 12)}
        values |= show_plots([run, *map(runs.get, others)], metrics, smoothing)
        values |= show_range(run, now)
    except Exception as error:  # a file may have any contents
        now["failed"] = True
        values |= EMPTY | {"status": describe_error(error), "steps": [name]}
    return values


def describe_row(run: Run, status: str) -> list:
    """Return a row of the table of runs. An error takes the place of the note."""
    try:
        metrics = run.metrics()
        step = f"{metrics.steps[-1] if metrics.steps else 0}/{run.config.max_steps}"
        rates = [f"{rate:.1%}" for _, rate in metric_points(run, "eval/accuracy")]
        accuracy = " -> ".join(dict.fromkeys((rates[0], rates[-1]))) if rates else ""
        rewards = metrics.points("reward")
        return [run.name, status, step, accuracy, f"{rewards[-1][1]:.3g}" if rewards else "", cut(run.note(), 200)]
    except Exception as error:  # a file may have any contents
        return [run.name, status, "", "", "", describe_error(error)]


def describe_progress(run: Run, status: str) -> str:
    """Return a progress bar with the status, the steps, the time left and the held-out accuracy, as HTML."""
    config = run.config
    metrics = run.metrics()
    done = metrics.steps[-1] if metrics.steps else 0
    label = STATES[status]
    if status == "running" and run.file("STOP").exists():
        label = "Running (will save and stop after this step)"
    text = f"{run.name}: {label}, step {done} of {config.max_steps}"
    if status == "running" and done:
        times = {part: [value for _, value in metrics.points(f"time/{part}")] for part in ("rollout", "update")}
        seconds = {part: done * mean(values) for part, values in times.items()}
        seconds["eval"] = run.summary().get("seconds", {}).get("eval", 0.0)
        text += f", about {clock(seconds_left(done, config, seconds))} left"
    if rates := metric_points(run, "eval/accuracy"):
        ends = dict.fromkeys((rates[0], rates[-1]))
        text += f". Held-out accuracy (greedy): {', '.join(f'{rate:.1%} at step {step}' for step, rate in ends)}"
    return f'<progress value="{done}" max="{config.max_steps}"></progress>{html.escape(text)}.'


def describe_alarms(run: Run) -> str:
    """List the alarms with their first steps, and their texts from the console."""
    metrics = run.metrics()
    if not metrics.alarms:
        return "none"
    first_steps = list(metrics.alarms.items())[:20]
    lines = [f"{a}: since step {s}" + ("" if a in metrics.active else ", resolved") for a, s in first_steps]
    with open_or_empty(run.file("console.log")) as file:
        texts = dict.fromkeys(line[8:].strip() for line in file if line.startswith(b"  alarm:"))
    return "\n".join(lines + [cut(text.decode("utf-8", errors="replace"), CELL_CHARS) for text in list(texts)[-20:]])


def metric_points(run: Run, metric: str) -> list[tuple[int, float]]:
    """Return the (step, value) pairs of a metric."""
    points = dict(run.metrics().points(metric))
    if metric.startswith("eval/"):  # only the summary has the first and the final evaluation
        summary = run.summary()
        steps = {"before": 0, "cold_start": 0, "after": summary.get("steps")}  # the later one at step 0 is shown
        rates = summary.get("eval", {})
        points |= {steps[end]: rates[end].get(metric[5:]) for end in steps if rates.get(end)}
    return sorted((step, value) for step, value in points.items() if value is not None)


def show_plots(runs: list[Run], metrics: list[str], smoothing: float) -> dict:
    """Draw the chosen metrics of the runs, and list the metrics that they have."""
    names = {name for run in runs for name in run.metrics().columns} - {"step"}
    choices = [*METRICS, *sorted(names - set(METRICS))]
    last = max([MIN_X, *(step for run in runs for step in run.metrics().steps[-1:])])
    values = {"metrics": gr.Dropdown(titled(choices), value=metrics, multiselect=True)}
    for i in range(MAX_PLOTS):
        metric = metrics[i] if i < len(metrics) else ""
        title, axis = METRICS.get(metric, (metric, None))
        lines = [(run.name, smooth(downsample(metric_points(run, metric)), smoothing)) for run in runs]
        data = frame([(step, value, name) for name, points in lines for step, value in points], "run")
        values[f"plot{i}"] = gr.LinePlot(
            data, label=title, title=title, y_axis_format=axis, x_lim=[0, last], visible=bool(metric)
        )
    return values


def titled(metrics: Iterable[str]) -> list[tuple[str, str]]:
    """Return (title, metric) pairs."""
    return [(METRICS.get(name, (name, None))[0], name) for name in metrics]


def smooth(points: list[tuple[int, float]], smoothing: float) -> list[tuple[int, float]]:
    """Smooth values with an exponential moving average, corrected for its start. A lone value spans one step."""
    if len(points) == 1:
        return [*points, (points[0][0] + 1, points[0][1])]
    average = 0.0
    weight = 0.0
    smoothed = []
    for step, value in points:
        average = smoothing * average + (1 - smoothing) * value
        weight = smoothing * weight + 1 - smoothing
        smoothed.append((step, average / weight))
    return smoothed


def show_range(run: Run, seen: dict) -> dict:
    """Return the slider of the steps if their range changed. Modifies `seen`."""
    steps = run.steps()
    now = [run.name, *steps[:1], *steps[-1:]]
    before = seen["range"] or []
    seen["range"] = now
    if now == before:
        return {}
    first, last = (steps[0], steps[-1]) if steps else (1, 1)
    # Show the last step of another run, a run's first steps or a truncated run; else keep the selected step.
    is_new = now[:2] != before[:2] or now[2:] < before[2:]
    values = {"step": gr.Slider(first, max(last, first + 1), **({"value": last} if is_new else {}))}
    return values | ({"steps": now} if is_new else {})


# --- managing runs


def pick_run(event: gr.SelectData) -> dict:
    return {"name": event.row_value[0]}


def stop_run(launcher: launch.Launcher, name: str | None) -> dict:
    return {"status": launcher.stop(name)}


def resume_run(launcher: launch.Launcher, name: str | None) -> dict:
    return {"status": launcher.start(launcher.resume_command(name)).replace("\n", " ")}


def change_run(page: Page, name: str, new_name: str, note: str) -> dict:
    """Rename a run, and save its note."""
    if new_name != name:
        page.runs.rename(name, new_name)
    page.runs.get(new_name).write_note(note or "")
    return {"name": new_name}


def delete_run(page: Page, name: str, is_confirmed: bool) -> dict:
    if not is_confirmed:
        raise UiError(f"To delete {name} and its checkpoints, tick the box.")
    page.runs.delete(name)
    return {"name": None, "confirm": False}


def export_run(page: Page, name: str) -> dict:
    """Write the metrics as CSV, and the newest adapter as a zip file that PEFT can load once it is unpacked."""
    run = page.runs.get(name)
    folder = Path(tempfile.mkdtemp(dir=page.launcher.folder))
    files = [folder / f"{name}.csv"]
    with open_or_empty(run.file("metrics.jsonl")) as file:
        records = [parse_object(line, "metrics.jsonl", "step") for line in file if line.endswith(b"\n")]
    with files[0].open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for record in records for key in record)))
        writer.writeheader()
        writer.writerows(records)
    for checkpoint in run.checkpoints()[-1:]:
        files.append(folder / f"{name}-{checkpoint}.zip")
        with zipfile.ZipFile(files[1], "w") as archive:
            for pattern in EXPORTED:
                for path in run.file(f"checkpoints/{checkpoint}").glob(pattern):
                    archive.write(run.file(f"checkpoints/{checkpoint}/{path.name}"), path.name)
    return {"files": gr.File(list(map(str, files)), visible=True)}


# --- the layout


def build(page: Page) -> View:
    view = View(seen=gr.State({}), steps=gr.State())
    view["timer"] = gr.Timer(2)
    view["progress"] = gr.HTML(elem_id="progress")
    view["status"] = status_line("watch-status")
    with gr.Row():
        view["name"] = menu("Run")
        view["others"] = menu("Compare with", value=[], multiselect=True)
        if page.editable:
            stop_button = gr.Button("Save and stop", min_width=110)
            resume_button = gr.Button("Resume", min_width=110)
    view["launched"] = gr.Textbox(label="Started from this page", max_lines=20, visible=False)
    if page.editable:
        with gr.Accordion("Start a run", open=False) as form:
            launch.build_form(page, form.expand, is_first_run=False)
    else:
        gr.Markdown(READ_ONLY)
    with gr.Tab("Curves"):
        with gr.Row():
            options = {"multiselect": True, "max_choices": MAX_PLOTS, "scale": 3, "min_width": 300}
            view["metrics"] = menu("Metrics", titled(METRICS), list(METRICS)[:MAX_PLOTS], **options)
            view["smoothing"] = gr.Slider(0, 0.99, value=0.0, step=0.01, label="Smoothing")
        with gr.Row():
            for i in range(MAX_PLOTS):
                view[f"plot{i}"] = line_plot("Metric", "run")
    with gr.Tab("Completions"):
        view["step"] = gr.Slider(1, 2, value=1, step=1, label="Step")
        completions.build(page, view["name"], view["step"], view["steps"])
    with gr.Tab("Runs"):
        view["runs"] = table("Runs (click one to select it)", *RUN_COLUMNS, show_search="search")
        view["files"] = gr.File(label="Metrics and adapter", visible=False, interactive=False)
        export_button = gr.Button("Export the selected run")
        view["new_name"] = gr.Textbox(label="Name of the selected run", visible=page.editable)
        view["note"] = gr.Textbox(label="Note", lines=2, visible=page.editable)
        with gr.Row(visible=page.editable):
            save_button = gr.Button("Save name and note")
            view["confirm"] = gr.Checkbox(label="Yes, delete this run and its checkpoints")
            delete_button = gr.Button("Delete", variant="stop")
    with gr.Tab("Console"):
        view["alarms"] = gr.Textbox(label="Alarms", max_lines=8)
        view["log"] = gr.Textbox(label="Console (last lines)", lines=12, max_lines=12, elem_classes="console")

    selection = "name others metrics smoothing seen"
    poll = partial(follow, page)
    view.on([Context.root_block.load, view["timer"].tick], poll, selection, api_name="watch")
    view.on([view[name].input for name in selection.split()[:4]], poll, selection, api_name="select")
    changes = [view.on(view["runs"].select, pick_run)]
    if page.editable:
        changes += [
            view.on(stop_button.click, partial(stop_run, page.launcher), "name"),
            view.on(resume_button.click, partial(resume_run, page.launcher), "name"),
            view.on(save_button.click, partial(change_run, page), "name new_name note"),
            view.on(delete_button.click, partial(delete_run, page), "name confirm"),
        ]
    for event in changes:
        view.on(event.then, poll, selection, api_visibility="private")
    view.on(export_button.click, partial(export_run, page), "name")
    return view
