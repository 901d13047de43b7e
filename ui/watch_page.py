"""The Watch page: the runs, curves of any metric, and the completions of any step with their tokens coloured.

ui/launch.py starts and stops runs.
"""

import csv
import html
import json
import zipfile
from functools import partial

import gradio as gr
from gradio.context import Context

from rl.run.metrics import mean, standard_deviation
from rl.run.report import clock, seconds_left
from ui import launch
from ui.reward_process import format_number
from ui.runs import Page, Run, UiError, describe_error, downsample, open_or_empty, tail
from ui.text import CELL_CHARS, cut
from ui.view import View, frame, line_plot, status_line, table

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
RUN_COLUMNS = {"run": "170px", "status": "90px", "step": "80px", "accuracy": "130px", "reward": "80px", "note": "200px"}
MEASURES = {"advantage": "advantages", "value": "values", "KL": "kl", "entropy": "entropy"}
MAX_TOKENS = 2_000  # coloured tokens of a completion
STATES = {"finished": "Finished", "stopped": "Stopped early", "running": "Running"}
EXPORTED = ("adapter_config.json", "adapter_model.safetensors", "README.md", "chat_template.jinja", "tokenizer*.json")


EMPTY = dict.fromkeys(["progress", "alarms", "log", *(f"plot{i}" for i in range(MAX_PLOTS))])


# --- the runs


def follow(page: Page, name: str | None, others: list[str], metrics: list[str], smoothing: float, seen: dict) -> dict:
    """Return the values that changed since the state `seen`. Called by the timer, and when a selection changes."""
    runs = [page.runs.get(name) for name in page.runs.names()]
    statuses = {run.name: run.status() for run in runs}
    names = sorted(statuses, key=lambda name: statuses[name] != "running")  # running first, then the newest
    launcher = page.launcher
    started = launcher.name if launcher.is_alive() and launcher.name in names else None
    if name not in names or started not in (None, seen.get("started")):  # switch to a run that was just started, once
        name = started or next(iter(names), None)
    is_active = "running" in statuses.values() or launcher.is_alive()
    files = ("metrics.jsonl", "summary.json", "note.txt", "STOP")
    stamps = [run.stamp(file) for run in runs for file in files if file != "STOP" or run.name == name]
    key = [name, others, metrics, smoothing, statuses, stamps]
    now = {"key": key, "started": started or seen.get("started"), "range": seen.get("range")}
    values = {"timer": gr.Timer(2 if is_active else 10, active=True), "launched": show_launched(launcher), "seen": now}
    if key == seen.get("key"):
        return values | {"status": gr.skip()}
    others = [other for other in others if other in names and other != name]
    values["name"] = gr.Dropdown(names, value=name)
    values["others"] = gr.Dropdown([other for other in names if other != name], value=others)
    values["runs"] = [describe_row(run, statuses[run.name]) for run in runs]
    values |= EMPTY
    if not name:
        return values | {"status": "There is no run yet. Start one, or run: make train", "range": None}
    run = page.runs.get(name)
    try:
        values |= {"progress": describe_progress(run, statuses[name]), "alarms": describe_alarms(run)}
        values |= {"log": tail(run.file("console.log"), 12), "new_name": name, "note": run.note()}
        values |= show_plots([run, *map(page.runs.get, others)], metrics, smoothing)
        values |= show_range(run, now)
    except Exception as error:  # a file may have any contents
        values |= EMPTY | {"status": describe_error(error), "range": [name]}
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
    config, metrics, summary = run.config, run.metrics(), run.summary()
    done = metrics.steps[-1] if metrics.steps else 0
    label = STATES[status]
    if status == "running" and run.file("STOP").exists():
        label = "Running (will save and stop after this step)"
    text = f"{run.name}: {label}, step {done} of {config.max_steps}"
    if status == "running" and done:
        times = {part: [value for _, value in metrics.points(f"time/{part}")] for part in ("rollout", "update")}
        seconds = {part: done * mean(values) for part, values in times.items()}
        seconds["eval"] = summary.get("seconds", {}).get("eval", 0.0)
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
        points |= {steps[end]: rates[end][metric[5:]] for end in steps if rates.get(end)}
    return sorted(points.items())


def show_plots(runs: list[Run], metrics: list[str], smoothing: float) -> dict:
    """Draw the chosen metrics of the runs, and list the metrics that they have."""
    names = {name for run in runs for name in run.metrics().columns} - {"step"}
    choices = [name for name in METRICS if name in names or name.startswith("eval/")]
    choices += sorted(names - set(choices))
    last = max([MIN_X, *(step for run in runs for step in run.metrics().steps[-1:])])
    values = {"metrics": gr.Dropdown([(METRICS.get(name, (name, None))[0], name) for name in choices])}
    for i in range(MAX_PLOTS):
        metric = metrics[i] if i < len(metrics) else ""
        title, axis = METRICS.get(metric, (metric, None))
        lines = [(run.name, smooth(downsample(metric_points(run, metric)), smoothing)) for run in runs]
        data = frame([(step, value, name) for name, points in lines for step, value in points], "run")
        values[f"plot{i}"] = gr.LinePlot(data, label=title, y_axis_format=axis, x_lim=[0, last], visible=bool(metric))
    return values


def smooth(points: list[tuple[int, float]], smoothing: float) -> list[tuple[int, float]]:
    """Smooth values with an exponential moving average, corrected for its start. A lone value spans one step."""
    if len(points) == 1:
        return [*points, (points[0][0] + 1, points[0][1])]
    average, weight, smoothed = 0.0, 0.0, []
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
    return values | ({"range": now} if is_new else {})


# --- managing runs


def pick_run(event: gr.SelectData) -> dict:
    return {"name": event.row_value[0]}


def stop_run(launcher: launch.Launcher, name: str | None) -> dict:
    return {"status": launcher.stop(name)}


def resume_run(launcher: launch.Launcher, name: str | None) -> dict:
    return {"status": launcher.start(launcher.resume_command(name)).replace("\n", " ")}


def show_launched(launcher: launch.Launcher) -> dict:
    return gr.Textbox(text := launcher.describe(), visible=bool(text))


def change_run(page: Page, name: str, new_name: str, note: str) -> dict:
    """Save the note of a run, and rename it."""
    page.runs.get(name).write_note(note or "")
    if new_name != name:
        page.runs.rename(name, new_name)
    return {"name": new_name}


def delete_run(page: Page, name: str, is_confirmed: bool) -> dict:
    if not is_confirmed:
        raise UiError(f"Tick the box to confirm that {name} and its checkpoints are to be deleted.")
    page.runs.delete(name)
    return {"name": None, "confirm": False}


def export_run(page: Page, name: str) -> dict:
    """Write the metrics as CSV, and the newest adapter as a zip file that PEFT can load once it is unpacked."""
    run = page.runs.get(name)
    folder = page.launcher.folder / name
    folder.mkdir(exist_ok=True)
    files = [folder / f"{name}.csv"]
    with open_or_empty(run.file("metrics.jsonl")) as file:
        records = [json.loads(line) for line in file if line.endswith(b"\n")]
    with files[0].open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for record in records for key in record)))
        writer.writeheader()
        writer.writerows(records)
    for checkpoint in run.checkpoints()[-1:]:
        files.append(folder / f"{name}-{checkpoint}.zip")
        with zipfile.ZipFile(files[1], "w") as archive:
            for pattern in EXPORTED:
                for path in run.file(f"checkpoints/{checkpoint}").glob(pattern):
                    archive.write(path, path.name)
    return {"files": gr.File(list(map(str, files)), visible=True)}


# --- completions of a step


def show_step(page: Page, name: str, step: float, measure: str) -> dict:
    """Show the prompts of a step, and the completions of the prompt with a token log."""
    run = page.runs.get(name)
    groups = run.groups(int(step))
    step_data = {"groups": groups, "log": [], "logged": None, "note": "No tokens were logged for this step."}
    try:
        if log := run.tokens(int(step)):
            step_data |= {"log": log["completions"], "logged": find_group(groups, log)}
    except UiError as error:
        step_data["note"] = str(error)
    rows = [describe_group(number, group) for number, group in enumerate(groups, 1)]
    return {"step_data": step_data, "prompts": rows} | show_group(step_data, step_data["logged"] or 0, measure)


def find_group(groups: list[list[dict]], log: dict) -> int | None:
    """Return the index of the group with the token log. A prompt that was drawn twice is told by the lengths."""
    lengths = [len(completion["tokens"]) for completion in log["completions"]]
    same_prompt = [i for i, group in enumerate(groups) if group[0]["prompt_id"] == log["prompt_id"]]
    same_lengths = [i for i in same_prompt if [record.get("tokens") for record in groups[i]] == lengths]
    return next(iter(same_prompt if len(same_prompt) == 1 else same_lengths), None)


def pick_prompt(event: gr.SelectData, step_data: dict, measure: str) -> dict:
    return show_group(step_data, int(event.row_value[0]) - 1, measure)


def pick_completion(event: gr.SelectData, step_data: dict, picked: list, measure: str) -> dict:
    return show_completion(step_data, picked[0], int(event.row_value[0]) - 1, measure)


def show_group(step_data: dict, g: int, measure: str) -> dict:
    """Show the question, a table row per completion, and the best completion of a group."""
    group = step_data["groups"][g]
    order = sorted(range(len(group)), key=lambda i: group[i].get("reward") or 0.0, reverse=True)
    rows = []
    for i in order:
        record = group[i]
        ended_by = {"length": "length limit", "stop": "stop token"}.get(record.get("finish_reason"), "?")
        reward, advantage = format_number(record.get("reward")), format_number(record.get("advantage"), "+.3g")
        text = cut(record["completion"], CELL_CHARS)
        rows.append([i + 1, reward, verdict(record), advantage, ended_by, record.get("tokens"), text])
    values = {"question": cut(group[0]["prompt"]), "completions": rows}
    return values | show_completion(step_data, g, order[0], measure)


def show_completion(step_data: dict, g: int, i: int, measure: str) -> dict:
    """Show the text of a completion, its rewards, its turns if it has several, and its tokens."""
    record = step_data["groups"][g][i]
    reasons = record.get("reasons") or {}
    rewards = record.get("rewards") or {}
    rows = [[name, format_number(value), cut(reasons.get(name, ""), CELL_CHARS)] for name, value in rewards.items()]
    messages = []
    for turn in record.get("turns") or []:
        messages.append({"role": "assistant", "content": cut(turn["text"])})
        if turn["reply"]:
            messages.append({"role": "user", "content": cut(turn["reply"])})
    values = {"text": cut(record["completion"]), "rewards": rows, "picked": [g, i]}
    values["turns"] = gr.Chatbot(messages, visible=bool(messages))
    return values | show_tokens(step_data, [g, i], measure)


def describe_group(number: int, group: list[dict]) -> list:
    rewards = [record["reward"] for record in group if record.get("reward") is not None]
    correct = f"{sum(record.get('verdict') == 'right' for record in group)} of {len(group)}"
    question = cut(group[0]["prompt"], CELL_CHARS)
    return [number, correct, format_number(mean(rewards)), format_number(standard_deviation(rewards)), question]


def verdict(record: dict) -> str:
    """Return "correct", "wrong", "cut off", "no answer" or "not graded"."""
    if record.get("verdict") == "right":
        return "correct"
    if record.get("verdict") != "wrong":
        return "not graded"
    if record.get("finish_reason") == "length":
        return "cut off"
    return "no answer" if any(r.startswith("no_answer") for r in record.get("reasons", {}).values()) else "wrong"


# --- tokens


def show_tokens(step_data: dict, picked: list, measure: str) -> dict:
    """Colour the tokens of the chosen completion. The colours are relative to its group."""
    g, i = picked
    log = step_data["log"]
    if g != step_data["logged"] or i >= len(log):
        number = step_data["logged"]
        note = (
            step_data["note"] if number is None else f"Tokens were logged for prompt {number + 1} only. Click it above."
        )
        return {"legend": note, "tokens": []}
    texts = log[i]["tokens"][:MAX_TOKENS]
    values = log[i].get(MEASURES[measure]) or []
    if not values:
        note = f"No {measure} was logged: this run has no critic."
        return {"legend": note, "tokens": [(visible_text(token), None) for token in texts]}
    numbers = [value for completion in log for value in completion.get(MEASURES[measure]) or [] if value is not None]
    scale = max(map(abs, numbers), default=0) or 1.0
    legend = f"{measure} of completion {i + 1}: -1 and +1 on the scale are -{scale:.3g} and +{scale:.3g}, the largest "
    legend += "in the group. Click a token for its values."
    if len(log[i]["tokens"]) > MAX_TOKENS:
        legend += f" The first {MAX_TOKENS:,} of {len(log[i]['tokens']):,} tokens are shown."
    coloured = [(visible_text(token), (value or 0.0) / scale) for token, value in zip(texts, values)]
    return {"legend": legend, "tokens": coloured}


def pick_token(event: gr.SelectData, step_data: dict, picked: list) -> dict:
    """Describe a token: its number, text, log-probability and measures."""
    completion = step_data["log"][picked[1]]
    i = event.index
    measures = {name: completion.get(key) for name, key in {"log-probability": "logprobs", **MEASURES}.items()}
    numbers = [f"{name} {format_number(values[i] if values else None)}" for name, values in measures.items()]
    token = visible_text(completion["tokens"][i]).strip()
    return {"legend": ", ".join([f"token {i + 1}", f"text {token}", *numbers])}


def visible_text(token: str) -> str:
    """Return the text of a token with visible line breaks, and visible spaces if it has nothing else."""
    token = cut(token, CELL_CHARS)
    return token.replace("\n", "⏎\n") if token.strip(" ") else "␣" * len(token) or "∅"


# --- the layout


def build(page: Page) -> None:
    view = View(seen=gr.State({}), range=gr.State(), step_data=gr.State({}), picked=gr.State([]))
    view["timer"] = gr.Timer(2)
    view["progress"] = gr.HTML(elem_id="progress")
    view["status"] = status_line("watch-status")
    with gr.Row():
        view["name"] = gr.Dropdown([], label="Run", min_width=160)
        view["others"] = gr.Dropdown([], label="Compare with", multiselect=True, min_width=160)
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
            view["metrics"] = gr.Dropdown(
                list(METRICS),
                value=list(METRICS)[:MAX_PLOTS],
                label="Metrics",
                multiselect=True,
                max_choices=MAX_PLOTS,
                scale=3,
            )
            view["smoothing"] = gr.Slider(0, 0.99, value=0.0, step=0.01, label="Smoothing")
        with gr.Row():
            for i in range(MAX_PLOTS):
                view[f"plot{i}"] = line_plot("Metric", "run")
    with gr.Tab("Completions"):
        build_completions(view)
    with gr.Tab("Runs"):
        options = {"column_widths": list(RUN_COLUMNS.values()), "show_search": "search"}
        view["runs"] = table("Runs (click one to select it)", *RUN_COLUMNS, **options)
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
    latest = {"trigger_mode": "always_last"}
    view.on([view[name].input for name in selection.split()[:4]], poll, selection, api_name="select", **latest)
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
    shown = "step_data prompts completions text rewards turns tokens legend question"
    view.on([view["range"].change, view["step"].change], partial(show_step, page), "name step measure", shown, **latest)
    view.on(view["prompts"].select, pick_prompt, "step_data measure")
    view.on(view["completions"].select, pick_completion, "step_data picked measure")
    view.on(view["measure"].input, show_tokens, "step_data picked measure")
    view.on(view["tokens"].select, pick_token, "step_data picked")


def build_completions(view: View) -> None:
    view["step"] = gr.Slider(1, 2, value=1, step=1, label="Step")
    headers = ("#", "correct", "mean reward", "reward std", "question")
    view["prompts"] = table("Prompts (click to select)", *headers, max_height=200)
    view["question"] = gr.Textbox(label="Question", max_lines=4, interactive=False)
    headers = ("#", "reward", "verdict", "advantage", "ended by", "tokens", "completion")
    view["completions"] = table("Completions, highest reward first (click to select)", *headers, max_height=240)
    with gr.Row():
        with gr.Column(min_width=320):
            view["text"] = gr.Textbox(label="Completion", max_lines=12, interactive=False)
            view["turns"] = gr.Chatbot(label="Turns", render_markdown=False, visible=False)
            view["rewards"] = table("Rewards of the completion", "function", "value", "reason", max_height=240)
        with gr.Column(min_width=320):
            view["measure"] = gr.Radio(list(MEASURES), value="advantage", label="Colour the tokens by")
            view["tokens"] = gr.HighlightedText(label="Tokens of the completion", show_legend=True)
            view["legend"] = gr.Textbox(label="Scale, or selected token", max_lines=4, interactive=False)
