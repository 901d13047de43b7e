"""The tab Watch: the curves of a run while it trains, the completions of any step, and its tokens coloured by advantage,
value, KL or entropy. Starting and stopping runs is in ui/launch.py.
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
from ui.reward_process import number_of
from ui.runs import Page, Run, Runs, UiError, opened, shows_errors, tail, thinned

CURVES = {  # label: (factor, {series: metric}); the first two are large
    "Held-out accuracy, %": (100, {"greedy": "eval/accuracy", "sampled": "eval/accuracy_sampled"}),
    "Reward": (1, {"mean": "reward"}),
    "Length, tokens": (1, {"mean": "completions/mean_length"}),
    "Thinks, % of completions": (100, {"mean": "completions/thinking"}),
    "KL from the base, nats a token": (1, {"mean": "kl"}),
    "Entropy, nats a token": (1, {"mean": "entropy"}),
    "Clipped, %": (100, {"completions, by length": "completions/clipped_ratio", "ratios": "clip_ratio/region_mean"}),
    "Memory, MB": (1, {"peak": "peak_memory_mb"}),
    "Tokens a second": (1, {"of the whole step": "tokens_per_second"}),
}
MEASURES = {"advantage": "advantages", "value": "values", "KL": "kl", "entropy": "entropy"}
SHORT = 300  # characters of a text in a table; longer ones are cut
MAX_TOKENS = 2_000  # tokens of a completion that are coloured
NEAR_ZERO = 0.05  # share of the largest value in the group below which a token is grey
LARGE = 0.5  # share above which its colour is dark
COLOURS = {
    "far below 0": "#d9534f",
    "below 0": "#f0a8a0",
    "about 0": "#b8b8b8",
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
        seen = gr.State({})  # what the page of this visitor shows
        name = gr.Dropdown(label="Run", choices=[], info="running ones first, then the newest")
        status = gr.Textbox(label="Status", max_lines=4, elem_id="watch-status")
        alarms = gr.Textbox(label="Alarms", max_lines=8)
        large, small = list(CURVES)[:2], list(CURVES)[2:]
        with gr.Row():
            plots = {label: plot(label, CURVES[label][1], 260) for label in large}
        with gr.Row():
            plots |= {label: plot(label, CURVES[label][1], 180) for label in small}
        log = gr.Textbox(label="Last lines of its console", lines=6, max_lines=12, elem_classes="console")
        if page.editable:
            started = launch_controls(launcher, name, timer)
        else:
            gr.Markdown(READ_ONLY)
            started = gr.Textbox(visible=False)
        gr.Markdown("### The completions of a step")
        step = gr.Slider(1, 2, value=1, step=1, label="Step")
        shown_range = gr.State()  # its change has the completions shown anew
        groups, group = gr.State([]), gr.State([])  # the completions of the step, and those of the chosen prompt
        prompts = table("Prompts (click one)", "No.", "correct", "mean reward", "spread", "question")
        question = gr.Textbox(label="Question", max_lines=8)
        headers = ("No.", "reward", "verdict", "advantage", "ended by", "tokens", "completion")
        completions = table("Its completions, the highest reward first (click one)", *headers)
        text = gr.Textbox(label="Completion", max_lines=20)
        reasons = table("Its rewards", "reward function", "gave", "why")
        gr.Markdown("### The tokens of the group from which most was learned")
        logged = gr.State([])  # the completions that were logged token by token
        with gr.Row():
            which = gr.Dropdown(label="Completion", choices=[])
            measure = gr.Radio(list(MEASURES), value="advantage", label="Colour by")
        legend = gr.Textbox(label="What the colours say", max_lines=4)
        coloured = gr.HighlightedText(
            label="Tokens (click one for its numbers)", show_legend=True, color_map=COLOURS, elem_classes="tokens"
        )

    watched = {"name": name, "status": status, "alarms": alarms, "log": log, "started": started, "step": step}
    watched |= {"shown_range": shown_range, "timer": timer, "seen": seen} | plots

    @shows_errors
    def watch_run(visible: bool, chosen: str | None, seen: dict):
        if not visible:  # another tab is in front: the timer ends until this one is selected
            return {timer: gr.Timer(active=False)}
        return {watched[key]: value for key, value in follow(page.runs, launcher, chosen, seen).items()}

    quiet = {"show_progress": "hidden"}
    inputs, outputs = [visible, name, seen], list(watched.values())
    gr.on([tab.select, name.input], watch_run, inputs, outputs, **quiet)
    timer.tick(watch_run, inputs, outputs, js=IS_VISIBLE, **quiet)
    of_group = [group, question, completions, text, reasons]
    outputs = [groups, prompts, *of_group, logged, which, legend, coloured]
    show = shows_errors(show_step, page.runs)
    stepping = [shown_range.change, step.change]
    gr.on(stepping, show, [name, step, measure], outputs, trigger_mode="always_last", **quiet)
    prompts.select(shows_errors(pick_prompt), groups, of_group, **quiet)
    completions.select(shows_errors(pick_completion), group, [text, reasons], **quiet)
    colouring = [which.input, measure.input]
    gr.on(colouring, shows_errors(describe_tokens), [logged, which, measure], [legend, coloured], **quiet)
    coloured.select(shows_errors(pick_token), [logged, which], legend, **quiet)


# --- the run


def follow(runs: Runs, launcher: Launcher, chosen: str | None, seen: dict) -> dict:
    """New values by the names of `watched` in `build`; what has not changed is left out. seen: what the page shows."""
    running = runs.running()
    names = running + [name for name in runs.names() if name not in running]
    name = chosen if chosen in names else next(iter(names), None)
    started = launcher.name if launcher.alive() and launcher.name in names else None
    if started and seen.get("started") != started:  # switch to a run that was just started, once
        name = started
    is_active = name in running or launcher.alive()
    shown = {"status": "There is no run yet: start one below, or by: make train", "alarms": "", "log": ""}
    curves, key, steps = dict.fromkeys(CURVES), None, []
    try:
        if name:
            run = runs.get(name)
            metrics, summary = run.metrics(), run.summary()
            shown = {"status": describe_status(run, metrics, summary), "alarms": describe_alarms(run, metrics)}
            shown["log"] = tail(run.file("console.log"), 20)
            steps = run.steps()
            key = [name, len(metrics), metrics[-1:], summary.get("finished"), list(summary.get("eval", {}))]
            curves = describe_curves(run, metrics, summary) if key != seen.get("key") else {}
    except Exception as error:  # whatever a file contains
        is_active, key = False, None
        known = isinstance(error, (UiError, ConfigError))
        shown["status"] = str(error) if known else f"{name} cannot be shown: {type(error).__name__}: {error}"
    shown |= curves
    shown_range, before = [name, *steps[:1], *steps[-1:]], seen.get("range", [])
    if shown_range != before:
        first, last = (steps[0], steps[-1]) if steps else (1, 1)
        # Another run, its first step, or a run that was cut back: show the last step. Else the chosen step stays.
        is_new = shown_range[:2] != before[:2] or shown_range[2:] < before[2:]
        shown["step"] = gr.Slider(first, max(last, first + 1), **({"value": last} if is_new else {}))
        if is_new and name:
            shown["shown_range"] = shown_range
    if [names, chosen] != [seen.get("names"), name]:
        shown["name"] = gr.Dropdown(choices=names, value=name)
    shown |= {"started": launcher.describe(), "timer": gr.Timer(2 if is_active else 10, active=True)}
    seen = {"names": names, "key": key, "range": shown_range, "started": started or seen.get("started")}
    return shown | {"seen": seen}


def describe_status(run: Run, metrics: list[dict], summary: dict) -> str:
    """Status, steps, time left and held-out accuracy in two lines."""
    config, status = run.config, run.status()
    done = metrics[-1]["step"] if metrics else 0
    words = {"finished": "Finished", "stopped": "Stopped before its end", "running": "Running"}[status]
    if status == "running" and run.file("STOP").exists():
        words = "Running, asked to stop: it ends after this step, and saves"
    text = f"{words}: step {done} of {config.max_steps}"
    if status == "running" and done:
        parts = ("rollout", "update")
        seconds = {part: done * mean([m.get(f"time/{part}") or 0.0 for m in metrics]) for part in parts}
        seconds["eval"] = summary.get("seconds", {}).get("eval", 0.0)
        text += f", about {clock(seconds_left(done, config, seconds))} left"
    if rates := points_of(run, metrics, summary, "eval/accuracy"):
        ends = dict.fromkeys((rates[0], rates[-1]))
        text += f".\nHeld-out accuracy, greedy: {', '.join(f'{rate:.1%} at step {step}' for step, rate in ends)}"
    return text + "."


def describe_alarms(run: Run, metrics: list[dict]) -> str:
    """The alarms with their first steps, and their texts from the console."""
    if not (alarms := run.alarms()):
        return "none"
    active = metrics[-1].get("alarms", [])
    lines = [f"{a}: since step {s}" + ("" if a in active else ", no longer") for a, s in list(alarms.items())[:20]]
    with opened(run.file("console.log")) as file:
        texts = dict.fromkeys(line[8:].strip() for line in file if line.startswith(b"  alarm:"))
    return "\n".join(lines + [cut(text.decode("utf-8", errors="replace"), SHORT) for text in list(texts)[-20:]])


def describe_curves(run: Run, metrics: list[dict], summary: dict) -> dict[str, pd.DataFrame | None]:
    """The points of each curve, at most POINTS a series; None if there are none."""
    frames = {}
    for label, (factor, series) in CURVES.items():
        points = [(name, points_of(run, metrics, summary, metric)) for name, metric in series.items()]
        rows = [(step, factor * value, name) for name, known in points for step, value in known]
        # None: a plot takes the numbers of an empty frame for categories, and keeps them.
        frames[label] = pd.DataFrame(rows, columns=["x", "y", "series"]) if rows else None
    return frames


def points_of(run: Run, metrics: list[dict], summary: dict, metric: str) -> list[tuple[int, float]]:
    """(step, value) of a metric, at most POINTS."""
    points = {m["step"]: m.get(metric) for m in metrics}
    if metric == "tokens_per_second":
        completions = run.config.prompts_per_step * run.config.num_generations
        timed = [m for m in metrics if m.get("step_time")]
        points = {m["step"]: completions * m["completions/mean_length"] / m["step_time"] for m in timed}
    if metric.startswith("eval/"):  # the first and the final evaluation are in the summary alone
        steps = {"before": 0, "after": summary.get("steps")}
        rates = summary.get("eval", {})
        points |= {steps[end]: rates[end][metric[5:]] for end in steps if rates.get(end)}
    return thinned(sorted((step, value) for step, value in points.items() if value is not None))


# --- the completions of a step


def show_step(runs: Runs, name: str, step: float, measure: str) -> list:
    """All values below the slider. A step without a file, or with a damaged one, is empty, and the question says why."""
    run, step = runs.get(name), int(step)
    groups, choices, logged = [], [], []
    try:
        groups = run.groups(step)
        group = [groups[0], *show_group(groups[0])]
    except UiError as error:
        group = [[], str(error), [], "", []]
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
    """The question, a row for each completion, and the best one in full."""
    rewards = [-math.inf if record.get("reward") is None else record["reward"] for record in group]
    order = sorted(range(len(group)), key=rewards.__getitem__, reverse=True)
    rows = []
    for i in order:
        record = group[i]
        ended_by = {"length": "the length limit", "stop": "itself"}.get(record.get("finish_reason"), "?")
        reward, advantage = number_of(record.get("reward")), number_of(record.get("advantage"), "+.3g")
        text = cut(record["completion"], SHORT)
        rows.append([i + 1, reward, verdict(record), advantage, ended_by, record.get("tokens"), text])
    return [cut(group[0]["prompt"]), rows, *show_completion(group[order[0]])]


def show_completion(record: dict) -> list:
    """Its text, and a row for each reward function."""
    reasons = record.get("reasons") or {}
    rewards = record.get("rewards") or {}
    rows = [[name, number_of(value), cut(reasons.get(name, ""), SHORT)] for name, value in rewards.items()]
    return [cut(record["completion"]), rows]


def describe_group(number: int, group: list[dict]) -> list:
    rewards = [record["reward"] for record in group if record.get("reward") is not None]
    right = f"{sum(record.get('verdict') == 'right' for record in group)} of {len(group)}"
    question = cut(group[0]["prompt"], SHORT)
    return [number, right, number_of(mean(rewards)), number_of(standard_deviation(rewards)), question]


def verdict(record: dict) -> str:
    """correct, wrong, cut off, no answer or not graded."""
    if record.get("verdict") == "right":
        return "correct"
    if record.get("verdict") != "wrong":
        return "not graded"
    if record.get("finish_reason") == "length":
        return "cut off"
    return "no answer" if any(r.startswith("no_answer") for r in record.get("reasons", {}).values()) else "wrong"


# --- its tokens


def pick_token(event: gr.SelectData, logged: list[dict], which: int) -> str:
    return describe_token(logged[which], event.index)


def token_choices(record: dict, groups: list[list[dict]]) -> list[tuple[str, int]]:
    """The completions that were logged token by token, as (label, index)."""
    same = [group for group in groups if group[0]["prompt_id"] == record["prompt_id"]]
    if len(same) != 1:  # the prompt was drawn twice: it is not known which group was logged
        return [(f"{i + 1}", i) for i in range(len(record["completions"]))]
    return [(f"{i + 1}: reward {number_of(one.get('reward'))}, {verdict(one)}", i) for i, one in enumerate(same[0])]


def describe_token(completion: dict, i: int) -> str:
    """Its number, text, log-probability and measures."""
    measures = {name: completion.get(key) for name, key in {"log-probability": "logprobs", **MEASURES}.items()}
    numbers = [f"{name} {number_of(values[i] if values else None)}" for name, values in measures.items()]
    return ", ".join([f"token {i + 1}", f"text {shown_token(completion['tokens'][i]).strip()}", *numbers])


def describe_tokens(completions: list[dict], which: int | None, measure: str) -> list:
    """The legend in words and the coloured tokens. The colours are relative to the group."""
    if which is None or not 0 <= which < len(completions) or not completions[which]["tokens"]:
        return ["No tokens were logged for this step.", []]
    group_values = [completion.get(MEASURES.get(measure, "")) or [] for completion in completions]
    texts = completions[which]["tokens"]
    tokens = map(shown_token, texts[:MAX_TOKENS])
    values = group_values[which]
    if not values:
        return [f"This run has no {measure}: there is no critic.", [(token, None) for token in tokens]]
    known = [value for values in group_values for value in values if value is not None]
    top = max(map(abs, known), default=0)
    legend = (
        f"{measure}, in this group from {min(known, default=0):.3g} to {max(known, default=0):.3g}. Grey is within "
        f"{NEAR_ZERO * top:.2g} of 0; blue is above, red below; the darker ones are beyond {LARGE * top:.2g}."
    )
    if len(texts) > MAX_TOKENS:
        legend += f" The first {MAX_TOKENS:,} of {len(texts):,} tokens are shown."
    return [legend, [(token, colour_class(value or 0.0, top)) for token, value in zip(tokens, values)]]


def colour_class(value: float, top: float) -> str:
    """The key of COLOURS for a value; top: the largest absolute value in the group."""
    if abs(value) <= NEAR_ZERO * top:
        return "about 0"
    return ("far " if abs(value) > LARGE * top else "") + ("above 0" if value > 0 else "below 0")


def shown_token(token: str) -> str:
    """The text of a token with line breaks, and spaces that stand alone, made visible."""
    token = cut(token, SHORT)
    return token.replace("\n", "⏎\n") if token.strip(" ") else "␣" * len(token) or "∅"


# --- components


def plot(label: str, series: Iterable[str], height: int, x: str = "step", y: str = " ") -> gr.LinePlot:
    """A plot of a frame with x, y and series. The colours are named in the label: the plot's own legend has no room."""
    colours = dict(zip(series, LINE_COLOURS))
    options = {}
    if len(colours) > 1:
        options = {"color": "series", "color_map": {name: LINE_COLOURS[colour] for name, colour in colours.items()}}
        label += f" ({', '.join(f'{name} {colour}' for name, colour in colours.items())})"
    return gr.LinePlot(x="x", y="y", x_title=x, y_title=y, label=label, height=height, min_width=240, **options)


def table(label: str, *headers: str) -> gr.Dataframe:
    return gr.Dataframe(headers=list(headers), type="array", label=label, interactive=False, wrap=True, max_height=360)
