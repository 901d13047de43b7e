"""The Watch tab: curves of a run while it trains, the completions of any step, and tokens coloured by advantage, value,
KL or entropy. ui/launch.py starts and stops runs.
"""

import math
from collections.abc import Iterable

import gradio as gr
import pandas as pd

from rl.config import ConfigError
from rl.run.metrics import mean, standard_deviation
from rl.run.report import clock, seconds_left
from ui.chat import cut
from ui.launch import READ_ONLY, Launcher, launch_controls
from ui.reward_process import format_number
from ui.runs import Page, Run, Runs, UiError, downsample, open_or_empty, shows_errors, tail

CURVES = {  # label: (factor, {series: metric}); the first two plots are large
    "Held-out accuracy, %": (100, {"greedy": "eval/accuracy", "sampled": "eval/accuracy_sampled"}),
    "Reward": (1, {"mean": "reward"}),
    "Completion length, tokens": (1, {"mean": "completions/mean_length"}),
    "Completions with thinking, %": (100, {"mean": "completions/thinking"}),
    "KL from the reference, nats per token": (1, {"mean": "kl"}),
    "Entropy, nats per token": (1, {"mean": "entropy"}),
    "Truncated and clipped, %": (
        100,
        {"truncated completions": "completions/clipped_ratio", "clipped ratios": "clip_ratio/region_mean"},
    ),
    "Peak memory, MB": (1, {"peak": "peak_memory_mb"}),
    "Tokens per second": (1, {"whole step": "tokens_per_second"}),
}
MEASURES = {"advantage": "advantages", "value": "values", "KL": "kl", "entropy": "entropy"}
CELL_CHARS = 300  # longer texts are truncated in tables
MAX_TOKENS = 2_000  # coloured tokens of a completion
NEAR_ZERO = 0.05  # a token is grey up to this fraction of the largest absolute value in the group
LARGE = 0.5  # its colour is dark above this fraction
COLOURS = {
    "far below 0": "#d9534f",
    "below 0": "#f0a8a0",
    "near 0": "#b8b8b8",
    "above 0": "#9fc5e8",
    "far above 0": "#3d85c6",
}
LINE_COLOURS = {"blue": "#3d85c6", "orange": "#f57c00", "red": "#d9534f"}
IS_VISIBLE = "(visible, ...others) => [document.getElementById('watch-status')?.offsetParent != null, ...others]"


def build(page: Page) -> None:
    launcher = Launcher(page.runs)
    with gr.Tab("Watch") as tab:
        timer = gr.Timer(2, active=False)
        visible = gr.Checkbox(True, visible=False)
        seen = gr.State({})  # the state that this visitor's page shows
        name = gr.Dropdown(label="Run", choices=[], info="Runs in progress come first, then the newest")
        status = gr.Textbox(label="Status", max_lines=4, elem_id="watch-status")
        alarms = gr.Textbox(label="Alarms", max_lines=8)
        large, small = list(CURVES)[:2], list(CURVES)[2:]
        with gr.Row():
            plots = {label: plot(label, CURVES[label][1], 260) for label in large}
        with gr.Row():
            plots |= {label: plot(label, CURVES[label][1], 180) for label in small}
        log = gr.Textbox(label="Console (last lines)", lines=6, max_lines=12, elem_classes="console")
        if page.editable:
            started = launch_controls(launcher, name, timer)
        else:
            gr.Markdown(READ_ONLY)
            started = gr.Textbox(visible=False)
        gr.Markdown("### Completions of a step")
        step = gr.Slider(1, 2, value=1, step=1, label="Step")
        shown_range = gr.State()  # a change reloads the completions
        groups = gr.State([])  # completions of the step, one list per prompt
        group = gr.State([])  # completions of the selected prompt
        prompts = table("Prompts (click to select)", "#", "correct", "mean reward", "reward std", "question")
        question = gr.Textbox(label="Question", max_lines=8)
        headers = ("#", "reward", "verdict", "advantage", "ended by", "tokens", "completion")
        completions = table("Completions, highest reward first (click to select)", *headers)
        text = gr.Textbox(label="Completion", max_lines=20)
        turns = gr.Chatbot(label="Turns", render_markdown=False, elem_classes="turns", visible=False)
        reasons = table("Rewards of the completion", "function", "value", "reason")
        gr.Markdown("### Tokens of the group with the largest advantages")
        logged = gr.State([])  # completions with a token log
        with gr.Row():
            logged_choice = gr.Dropdown(label="Completion", choices=[])
            measure = gr.Radio(list(MEASURES), value="advantage", label="Colour by")
        legend = gr.Textbox(label="Legend or selected token", max_lines=4)
        coloured = gr.HighlightedText(
            label="Tokens (click one for its values)", show_legend=True, color_map=COLOURS, elem_classes="tokens"
        )

    components = {"name": name, "status": status, "alarms": alarms, "log": log, "started": started, "step": step}
    components |= {"shown_range": shown_range, "timer": timer, "seen": seen} | plots

    @shows_errors
    def watch_run(visible: bool, selected: str | None, seen: dict):
        if not visible:  # another tab is open: stop the timer until this one is selected
            return {timer: gr.Timer(active=False)}
        return {components[key]: value for key, value in follow(page.runs, launcher, selected, seen).items()}

    quiet = {"show_progress": "hidden"}
    inputs = [visible, name, seen]
    outputs = list(components.values())
    gr.on([tab.select, name.input], watch_run, inputs, outputs, **quiet)
    timer.tick(watch_run, inputs, outputs, js=IS_VISIBLE, **quiet)
    group_outputs = [group, question, completions, text, reasons, turns]
    outputs = [groups, prompts, *group_outputs, logged, logged_choice, legend, coloured]
    show = shows_errors(show_step, page.runs)
    step_events = [shown_range.change, step.change]
    gr.on(step_events, show, [name, step, measure], outputs, trigger_mode="always_last", **quiet)
    prompts.select(shows_errors(pick_prompt), groups, group_outputs, **quiet)
    completions.select(shows_errors(pick_completion), group, [text, reasons, turns], **quiet)
    colour_events = [logged_choice.input, measure.input]
    gr.on(colour_events, shows_errors(describe_tokens), [logged, logged_choice, measure], [legend, coloured], **quiet)
    coloured.select(shows_errors(pick_token), [logged, logged_choice], legend, **quiet)


# --- the run


def follow(runs: Runs, launcher: Launcher, selected: str | None, seen: dict) -> dict:
    """Return the changed values for the `components` of `build`, by name. seen: the state that the page shows."""
    running = runs.running()
    names = running + [name for name in runs.names() if name not in running]
    name = selected if selected in names else next(iter(names), None)
    started = launcher.name if launcher.is_alive() and launcher.name in names else None
    if started and seen.get("started") != started:  # switch to a run that was just started, once
        name = started
    is_active = name in running or launcher.is_alive()
    updates = {"status": "There is no run yet. Start one below, or run: make train", "alarms": "", "log": ""}
    curves = dict.fromkeys(CURVES)
    key = None
    steps = []
    try:
        if name:
            run = runs.get(name)
            metrics, summary = run.metrics(), run.summary()
            updates = {"status": describe_status(run, metrics, summary), "alarms": describe_alarms(run, metrics)}
            updates["log"] = tail(run.file("console.log"), 20)
            steps = run.steps()
            key = [name, len(metrics), metrics[-1:], summary.get("finished"), list(summary.get("eval", {}))]
            curves = describe_curves(run, metrics, summary) if key != seen.get("key") else {}
    except Exception as error:  # a file may have any contents
        is_active = False
        key = None
        is_known = isinstance(error, (UiError, ConfigError))
        updates["status"] = str(error) if is_known else f"Cannot show {name}: {type(error).__name__}: {error}"
    updates |= curves
    shown_range = [name, *steps[:1], *steps[-1:]]
    previous_range = seen.get("range", [])
    if shown_range != previous_range:
        first, last = (steps[0], steps[-1]) if steps else (1, 1)
        # Show the last step of another run, a run's first steps or a truncated run; else keep the selected step.
        is_new = shown_range[:2] != previous_range[:2] or shown_range[2:] < previous_range[2:]
        updates["step"] = gr.Slider(first, max(last, first + 1), **({"value": last} if is_new else {}))
        if is_new and name:
            updates["shown_range"] = shown_range
    if [names, selected] != [seen.get("names"), name]:
        updates["name"] = gr.Dropdown(choices=names, value=name)
    updates |= {"started": launcher.describe(), "timer": gr.Timer(2 if is_active else 10, active=True)}
    seen = {"names": names, "key": key, "range": shown_range, "started": started or seen.get("started")}
    return updates | {"seen": seen}


def describe_status(run: Run, metrics: list[dict], summary: dict) -> str:
    """Describe a run in two lines: status, steps and time left; held-out accuracy."""
    config = run.config
    status = run.status()
    done = metrics[-1]["step"] if metrics else 0
    label = {"finished": "Finished", "stopped": "Stopped early", "running": "Running"}[status]
    if status == "running" and run.file("STOP").exists():
        label = "Running (will save and stop after this step)"
    text = f"{label}: step {done} of {config.max_steps}"
    if status == "running" and done:
        parts = ("rollout", "update")
        seconds = {part: done * mean([m.get(f"time/{part}") or 0.0 for m in metrics]) for part in parts}
        seconds["eval"] = summary.get("seconds", {}).get("eval", 0.0)
        text += f", about {clock(seconds_left(done, config, seconds))} left"
    if rates := metric_points(run, metrics, summary, "eval/accuracy"):
        ends = dict.fromkeys((rates[0], rates[-1]))
        text += f".\nHeld-out accuracy (greedy): {', '.join(f'{rate:.1%} at step {step}' for step, rate in ends)}"
    return text + "."


def describe_alarms(run: Run, metrics: list[dict]) -> str:
    """List the alarms with their first steps, and their texts from the console."""
    if not (alarms := run.alarms()):
        return "none"
    active = metrics[-1].get("alarms", [])
    lines = [f"{a}: since step {s}" + ("" if a in active else ", resolved") for a, s in list(alarms.items())[:20]]
    with open_or_empty(run.file("console.log")) as file:
        texts = dict.fromkeys(line[8:].strip() for line in file if line.startswith(b"  alarm:"))
    return "\n".join(lines + [cut(text.decode("utf-8", errors="replace"), CELL_CHARS) for text in list(texts)[-20:]])


def describe_curves(run: Run, metrics: list[dict], summary: dict) -> dict[str, pd.DataFrame | None]:
    """Return a frame with the points of each curve, at most MAX_POINTS per series, or None if there are none."""
    frames = {}
    for label, (factor, series) in CURVES.items():
        points = [(name, metric_points(run, metrics, summary, metric)) for name, metric in series.items()]
        rows = [(step, factor * value, name) for name, values in points for step, value in values]
        # An empty frame would make the plot treat its numbers as categories, also after later updates.
        frames[label] = pd.DataFrame(rows, columns=["x", "y", "series"]) if rows else None
    return frames


def metric_points(run: Run, metrics: list[dict], summary: dict, metric: str) -> list[tuple[int, float]]:
    """Return at most MAX_POINTS (step, value) pairs of a metric."""
    points = {m["step"]: m.get(metric) for m in metrics}
    if metric == "tokens_per_second":
        completions = run.config.prompts_per_step * run.config.num_generations
        timed = [m for m in metrics if m.get("step_time")]
        points = {m["step"]: completions * m["completions/mean_length"] / m["step_time"] for m in timed}
    if metric.startswith("eval/"):  # only the summary has the first and the final evaluation
        steps = {"before": 0, "cold_start": 0, "after": summary.get("steps")}  # the later one at step 0 is shown
        rates = summary.get("eval", {})
        points |= {steps[end]: rates[end][metric[5:]] for end in steps if rates.get(end)}
    return downsample(sorted((step, value) for step, value in points.items() if value is not None))


# --- completions of a step


def show_step(runs: Runs, name: str, step: float, measure: str) -> list:
    """Return the values of all components below the slider. An error replaces the question or the legend."""
    run = runs.get(name)
    step = int(step)
    groups, choices, logged = [], [], []
    try:
        groups = run.groups(step)
        group = [groups[0], *show_group(groups[0])]
    except UiError as error:
        group = [[], str(error), [], "", [], show_turns({})]
    try:
        record = run.tokens(step) or {"prompt_id": None, "completions": []}
        logged = record["completions"]
        choices = token_choices(record, groups)
        tokens = describe_tokens(logged, 0, measure)
    except UiError as error:
        tokens = [str(error), []]
    rows = [describe_group(number, group) for number, group in enumerate(groups, 1)]
    return [groups, rows, *group, logged, gr.Dropdown(choices=choices, value=0 if choices else None), *tokens]


def pick_prompt(event: gr.SelectData, groups: list[list[dict]]) -> list:
    group = groups[int(event.row_value[0]) - 1]
    return [group, *show_group(group)]


def pick_completion(event: gr.SelectData, group: list[dict]) -> list:
    return show_completion(group[int(event.row_value[0]) - 1])


def show_group(group: list[dict]) -> list:
    """Return the question, a table row per completion, and the values for the best completion."""
    rewards = [-math.inf if record.get("reward") is None else record["reward"] for record in group]
    order = sorted(range(len(group)), key=rewards.__getitem__, reverse=True)
    rows = []
    for i in order:
        record = group[i]
        ended_by = {"length": "length limit", "stop": "stop token"}.get(record.get("finish_reason"), "?")
        reward, advantage = format_number(record.get("reward")), format_number(record.get("advantage"), "+.3g")
        text = cut(record["completion"], CELL_CHARS)
        rows.append([i + 1, reward, verdict(record), advantage, ended_by, record.get("tokens"), text])
    return [cut(group[0]["prompt"]), rows, *show_completion(group[order[0]])]


def show_completion(record: dict) -> list:
    """Return the text of a completion, a table row per reward function, and its turns, if it has several."""
    reasons = record.get("reasons") or {}
    rewards = record.get("rewards") or {}
    rows = [[name, format_number(value), cut(reasons.get(name, ""), CELL_CHARS)] for name, value in rewards.items()]
    return [cut(record["completion"]), rows, show_turns(record)]


def show_turns(record: dict) -> gr.Chatbot:
    """Return an episode as a chat: the model's turns, and the environment's replies in the place of the user's."""
    messages = []
    for turn in record.get("turns") or []:
        messages.append({"role": "assistant", "content": cut(turn["text"])})
        if turn["reply"]:
            messages.append({"role": "user", "content": cut(turn["reply"])})
    return gr.Chatbot(messages, visible=bool(messages))


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


def pick_token(event: gr.SelectData, logged: list[dict], selected: int) -> str:
    return describe_token(logged[selected], event.index)


def token_choices(record: dict, groups: list[list[dict]]) -> list[tuple[str, int]]:
    """Return (label, index) of the completions with a token log. record: the token log of the step."""
    matches = [group for group in groups if group[0]["prompt_id"] == record["prompt_id"]]
    if len(matches) != 1:  # the prompt was drawn twice, so the logged group is unknown
        return [(f"{i + 1}", i) for i in range(len(record["completions"]))]
    return [(f"{i + 1}: reward {format_number(c.get('reward'))}, {verdict(c)}", i) for i, c in enumerate(matches[0])]


def describe_token(completion: dict, i: int) -> str:
    """Describe token i: its number, text, log-probability and measures."""
    measures = {name: completion.get(key) for name, key in {"log-probability": "logprobs", **MEASURES}.items()}
    numbers = [f"{name} {format_number(values[i] if values else None)}" for name, values in measures.items()]
    return ", ".join([f"token {i + 1}", f"text {visible_text(completion['tokens'][i]).strip()}", *numbers])


def describe_tokens(completions: list[dict], selected: int | None, measure: str) -> list:
    """Return the legend and the coloured tokens. The colours are relative to the group."""
    if selected is None or not 0 <= selected < len(completions) or not completions[selected]["tokens"]:
        return ["No tokens were logged for this step.", []]
    group_values = [completion.get(MEASURES.get(measure, "")) or [] for completion in completions]
    texts = completions[selected]["tokens"]
    tokens = map(visible_text, texts[:MAX_TOKENS])
    values = group_values[selected]
    if not values:
        return [f"No {measure} was logged: this run has no critic.", [(token, None) for token in tokens]]
    all_values = [value for values in group_values for value in values if value is not None]
    max_abs = max(map(abs, all_values), default=0)
    legend = (
        f"{measure}: {min(all_values, default=0):.3g} to {max(all_values, default=0):.3g} in this group. Grey: within "
        f"{NEAR_ZERO * max_abs:.2g} of 0. Blue: above 0. Red: below 0. Dark: more than {LARGE * max_abs:.2g} from 0."
    )
    if len(texts) > MAX_TOKENS:
        legend += f" The first {MAX_TOKENS:,} of {len(texts):,} tokens are shown."
    return [legend, [(token, colour_key(value or 0.0, max_abs)) for token, value in zip(tokens, values)]]


def colour_key(value: float, max_abs: float) -> str:
    """Return the key of COLOURS for a value. max_abs: the largest absolute value in the group."""
    if abs(value) <= NEAR_ZERO * max_abs:
        return "near 0"
    return ("far " if abs(value) > LARGE * max_abs else "") + ("above 0" if value > 0 else "below 0")


def visible_text(token: str) -> str:
    """Return the text of a token with visible line breaks, and visible spaces if it has nothing else."""
    token = cut(token, CELL_CHARS)
    return token.replace("\n", "⏎\n") if token.strip(" ") else "␣" * len(token) or "∅"


# --- components


def plot(label: str, series: Iterable[str], height: int, x: str = "step", y: str = " ") -> gr.LinePlot:
    """Build a line plot of a frame with x, y and series. The label names the colours, as a legend does not fit."""
    colours = dict(zip(series, LINE_COLOURS))
    options = {}
    if len(colours) > 1:
        options = {"color": "series", "color_map": {name: LINE_COLOURS[colour] for name, colour in colours.items()}}
        label += f" ({', '.join(f'{name}: {colour}' for name, colour in colours.items())})"
    return gr.LinePlot(x="x", y="y", x_title=x, y_title=y, label=label, height=height, min_width=240, **options)


def table(label: str, *headers: str) -> gr.Dataframe:
    return gr.Dataframe(headers=list(headers), type="array", label=label, interactive=False, wrap=True, max_height=360)
