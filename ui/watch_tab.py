"""The tab Watch: a run's curves as it learns, the completions of any step, its tokens by what was learned from them, and
(ui/launch.py) starting and stopping runs."""

import math
from collections.abc import Iterable

import gradio as gr
import pandas as pd

from rl.config import ConfigError
from rl.run.report import clock, mean, seconds_left, standard_deviation
from ui.chat import cut
from ui.launch import ELSEWHERE, Launcher, launch_controls
from ui.reward_process import number_of
from ui.runs import POINTS, Page, Run, Runs, UiError, opened, said, thinned

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
SHORT, LONG, TOKENS = 300, 20_000, 2_000  # characters in a table and in a box, tokens: what is more is cut off
ABOUT_0, A_LOT = 0.05, 0.5  # shares of the greatest value, where a token's colour changes
COLOURS = {
    "far below 0": "#d9534f", "below 0": "#f0a8a0", "about 0": "#b8b8b8", "above 0": "#9fc5e8", "far above 0": "#3d85c6",
}  # fmt: skip
SHADES = {"blue": "#3d85c6", "orange": "#f57c00", "red": "#d9534f"}  # of a plot's lines
VISIBLE = "(visible, ...others) => [document.getElementById('watch-status')?.offsetParent != null, ...others]"


def build(page: Page) -> None:
    """The tab, in the page that is being built."""
    runs, launcher = page.runs, Launcher(page.runs)
    with gr.Tab("Watch") as tab:
        timer = gr.Timer(2, active=False)
        visible, seen = gr.Checkbox(True, visible=False), gr.State({})
        name = gr.Dropdown(label="Run", choices=[], info="running ones first, then the newest")
        status = gr.Textbox(label="Status", max_lines=4, elem_id="watch-status")
        alarms = gr.Textbox(label="Alarms", max_lines=8)
        with gr.Row():
            plots = [plot(label, CURVES[label][1], 260) for label in list(CURVES)[:2]]
        with gr.Row():
            plots += [plot(label, CURVES[label][1], 180) for label in list(CURVES)[2:]]
        log = gr.Textbox(label="Last lines of its console", lines=6, max_lines=12, elem_classes="console")
        if page.editable:
            became = launch_controls(launcher, name, timer)
        else:
            gr.Markdown(ELSEWHERE)
            became = gr.Textbox(visible=False)
        gr.Markdown("### The completions of a step")
        step, opened_at = gr.Slider(1, 2, value=1, step=1, label="Step"), gr.State()
        prompts = table("Prompts (click one)", "No.", "correct", "mean reward", "spread", "question")
        number = gr.State(0)  # of the prompt
        question = gr.Textbox(label="Question", max_lines=8)
        headers = ("No.", "reward", "verdict", "advantage", "ended by", "tokens", "completion")
        completions = table("Its completions, the highest reward first (click one)", *headers)
        text = gr.Textbox(label="Completion", max_lines=20)
        reasons = table("Its rewards", "reward function", "gave", "why")
        gr.Markdown("### The tokens of the group from which most was learned")
        with gr.Row():
            which = gr.Dropdown(label="Completion", choices=[])
            measure = gr.Radio(list(MEASURES), value="advantage", label="Colour by")
        legend = gr.Textbox(label="What the colours say", max_lines=4)
        coloured = gr.HighlightedText(
            label="Tokens (click one for its numbers)", show_legend=True, color_map=COLOURS, elem_classes="tokens"
        )

    shown = [name, status, alarms, log, became, step, opened_at, timer, seen, *plots]
    of_group, of_tokens = [number, question, completions, text, reasons], [legend, coloured]

    @said
    def watch_run(visible: bool, chosen: str | None, seen: dict):
        """What has changed. The timer ends once another tab is in front."""
        if not visible:
            return {timer: gr.Timer(active=False)}
        return dict(zip(shown, follow(runs, launcher, chosen, seen)))

    @said
    def show_step(name: str, step: float, measure: str):
        groups = runs.get(name).groups(int(step))
        rows = [describe_group(number, group) for number, group in enumerate(groups, 1)]
        line = runs.get(name).tokens(int(step)) or {}
        choices = token_choices(line, groups)
        which = gr.Dropdown(choices=choices, value=0 if choices else None)
        tokens = describe_tokens(line.get("completions", []), 0, measure)
        return [rows, 0, *show_group(groups[0] if groups else []), which, *tokens]

    @said
    def pick_prompt(event: gr.SelectData, name: str, step: float):
        number = int(event.row_value[0]) - 1
        return [number, *show_group(runs.get(name).group(int(step), number))]

    @said
    def pick_completion(event: gr.SelectData, name: str, step: float, number: int):
        return show_completion(runs.get(name).group(int(step), number)[int(event.row_value[0]) - 1])

    @said
    def show_tokens(name: str, step: float, which: int | None, measure: str):
        return describe_tokens(tokens_of(runs, name, step), which, measure)

    @said
    def pick_token(event: gr.SelectData, name: str, step: float, which: int, measure: str):
        return describe_token(tokens_of(runs, name, step)[which], event.index)

    watching = {"inputs": [visible, name, seen], "outputs": shown, "show_progress": "hidden"}
    stepping = {"inputs": [name, step, measure], "outputs": [prompts, *of_group, which, *of_tokens]}
    stepping |= {"show_progress": "hidden", "trigger_mode": "always_last"}
    gr.on([tab.select, name.input], watch_run, **watching)
    timer.tick(watch_run, js=VISIBLE, **watching)
    gr.on([opened_at.change, step.change], show_step, **stepping)
    prompts.select(pick_prompt, [name, step], of_group, show_progress="hidden")
    completions.select(pick_completion, [name, step, number], [text, reasons], show_progress="hidden")
    picked = [name, step, which, measure]
    gr.on([which.input, measure.input], show_tokens, picked, of_tokens, show_progress="hidden")
    coloured.select(pick_token, picked, legend, show_progress="hidden")


# --- the run as it stands


def follow(runs: Runs, launcher: Launcher, chosen: str | None, seen: dict) -> list:
    """The values of `shown`; gr.skip() for what is as it was. seen: what this visitor's page shows."""
    running = runs.running()
    names = running + [name for name in runs.names() if name not in running]
    name = chosen if chosen in names else next(iter(names), None)
    started = launcher.name if launcher.alive() and launcher.name in names else None
    if started and seen.get("started") != started:  # the page goes over to it once
        name = started
    active, skip = name in running or launcher.alive(), gr.skip()
    say, alarms, log = "There is no run yet: start one below, or by: make train", "", ""
    key, steps, curves = None, [], [None] * len(CURVES)
    try:
        if name:
            run = runs.get(name)
            metrics, summary = run.metrics(POINTS), run.summary()
            say, alarms, log = describe_status(run, metrics), describe_alarms(run), run.log_tail()
            steps = run.steps()
            drawn = [name, len(metrics), metrics[-1:], summary.get("finished"), list(summary.get("eval", {}))]
            curves = describe_curves(run, metrics, summary) if drawn != seen.get("key") else [skip] * len(CURVES)
            key = drawn
    except Exception as error:  # whatever a file holds
        active, what = False, f"a file of it is damaged: {type(error).__name__}: {error}."
        say = str(error) if isinstance(error, (UiError, ConfigError)) else f"{name} cannot be shown, {what}"
    ends, known, slider = [name, *steps[:1], *steps[-1:]], seen.get("ends", []), skip
    opened_at = skip  # where the completions are shown from, which are shown anew
    if ends != known:
        first, last = (steps[0], steps[-1]) if steps else (1, 1)
        is_new = ends[:2] != known[:2] or ends[2:] < known[2:]  # another run, its first step, or it was cut back
        slider = gr.Slider(first, max(last, first + 1), **({"value": last} if is_new else {}))
        opened_at = ends if is_new and name else skip
    choices = gr.Dropdown(choices=names, value=name) if [names, chosen] != [seen.get("names"), name] else skip
    seen = {"names": names, "key": key, "ends": ends, "started": started or seen.get("started")}
    timer = gr.Timer(2 if active else 10, active=True)
    return [choices, say, alarms, log, launcher.words(), slider, opened_at, timer, seen, *curves]


def describe_status(run: Run, metrics: list[dict]) -> str:
    """Status, steps, time left and held-out accuracy in two lines."""
    config, summary, done, status = run.config, run.summary(), run.steps_done(), run.status()
    words = {"finished": "Finished", "stopped": "Stopped before its end", "running": "Running"}[status]
    if status == "running" and run.file("STOP").exists():
        words = "Running, asked to stop: it ends after this step, and saves"
    text = f"{words}: step {done} of {config.max_steps}"
    if status == "running" and done:
        parts = ("rollout", "score", "update")
        seconds = {part: done * mean([m.get(f"time/{part}") or 0.0 for m in metrics]) for part in parts}
        seconds["eval"] = summary.get("seconds", {}).get("eval", 0.0)
        text += f", about {clock(seconds_left(done, config, seconds))} left"
    if rates := points_of(run, metrics, summary, "eval/accuracy"):
        at = [f"{rate:.1%} at step {step}" for step, rate in dict.fromkeys((rates[0], rates[-1]))]
        text += f".\nHeld-out accuracy, greedy: {', '.join(at)}"
    return text + "."


def describe_alarms(run: Run) -> str:
    """Which alarms there were, and whether they still are; their words stand in the console."""
    if not (alarms := run.alarms()):
        return "none"
    holding = run.metrics(2)[-1].get("alarms", [])
    lines = [f"{a}: since step {s}" + ("" if a in holding else ", no longer") for a, s in list(alarms.items())[:20]]
    with opened(run.file("console.log")) as file:
        texts = dict.fromkeys(line[8:].strip() for line in file if line.startswith(b"  alarm:"))
    return "\n".join(lines + [cut(text.decode("utf-8", errors="replace"), SHORT) for text in list(texts)[-20:]])


def describe_curves(run: Run, metrics: list[dict], summary: dict) -> list[pd.DataFrame | None]:
    """The points of each curve, at most POINTS of a series; None where there are none."""
    frames = []
    for factor, series in CURVES.values():
        found = {name: points_of(run, metrics, summary, metric) for name, metric in series.items()}
        rows = [(step, factor * value, name) for name, points in found.items() for step, value in points]
        # An empty frame would have the plot take its numbers for words, and keep to that.
        frames.append(pd.DataFrame(rows, columns=["x", "y", "series"]) if rows else None)
    return frames


def points_of(run: Run, metrics: list[dict], summary: dict, metric: str) -> list[tuple[int, float]]:
    """(step, value) of a metric, at most POINTS."""
    points = {m["step"]: m.get(metric) for m in metrics}
    if metric == "tokens_per_second":
        completions = run.config.prompts_per_step * run.config.num_generations
        timed = [m for m in metrics if m.get("step_time")]
        points = {m["step"]: completions * m["completions/mean_length"] / m["step_time"] for m in timed}
    if metric.startswith("eval/"):  # before and after stand in the summary alone
        ends, rates = {"before": 0, "after": summary.get("steps")}, summary.get("eval", {})
        points |= {ends[end]: rates[end][metric[5:]] for end in ends if rates.get(end)}
    return thinned(sorted((step, value) for step, value in points.items() if value is not None))


# --- the completions of a step


def show_group(group: list[dict]) -> list:
    """The question, a row of each completion, and the best one in full."""
    if not group:
        return ["", [], "", []]
    numbered = [(line.get("reward"), number, line) for number, line in enumerate(group, 1)]
    numbered.sort(key=lambda found: math.inf if found[0] is None else -found[0])
    rows = [
        [number, number_of(reward), verdict(line), number_of(line.get("advantage"), "+.3g"),
         {"length": "the length limit", "stop": "itself"}.get(line.get("finish_reason"), "?"), line.get("tokens"),
         cut(line["completion"], SHORT)]
        for reward, number, line in numbered
    ]  # fmt: skip
    return [cut(group[0].get("prompt", ""), LONG), rows, *show_completion(numbered[0][2])]


def show_completion(line: dict) -> list:
    """Its text, and a row for each reward function."""
    parts, reasons = (line.get(key) or {} for key in ("rewards", "reasons"))
    rows = [[name, number_of(value), cut(reasons.get(name, ""), SHORT)] for name, value in parts.items()]
    return [cut(line["completion"], LONG), rows]


def describe_group(number: int, group: list[dict]) -> list:
    rewards = [line["reward"] for line in group if line.get("reward") is not None]
    right = f"{sum(line.get('verdict') == 'right' for line in group)} of {len(group)}"
    question = cut(group[0].get("prompt", ""), SHORT)
    return [number, right, number_of(mean(rewards)), number_of(standard_deviation(rewards)), question]


def verdict(line: dict) -> str:
    """In words: correct, wrong, cut off, no answer, not graded."""
    if line.get("verdict") != "wrong":
        return {"right": "correct"}.get(line.get("verdict"), "not graded")
    if line.get("finish_reason") == "length":
        return "cut off"
    return "no answer" if any(r.startswith("no_answer") for r in line.get("reasons", {}).values()) else "wrong"


# --- its tokens


def tokens_of(runs: Runs, name: str, step: float) -> list[dict]:
    """The completions in tokens.jsonl of a step."""
    return (runs.get(name).tokens(int(step)) or {}).get("completions", [])


def token_choices(line: dict | None, groups: list[list[dict]]) -> list[tuple[str, int]]:
    """The completions that can be looked at token by token."""
    if not line:
        return []
    same = [group for group in groups if group[0].get("prompt_id") == line.get("prompt_id")]
    if len(same) != 1:  # the prompt was asked twice: which group is it?
        return [(f"{i + 1}", i) for i in range(len(line["completions"]))]
    return [(f"{i + 1}: reward {number_of(one.get('reward'))}, {verdict(one)}", i) for i, one in enumerate(same[0])]


def describe_token(completion: dict, i: int) -> str:
    """Its number, text, log-probability and measures."""
    known = {name: completion.get(key) for name, key in {"log-probability": "logprobs", **MEASURES}.items()}
    numbers = [f"{name} {number_of(values[i] if values else None)}" for name, values in known.items()]
    return ", ".join([f"token {i + 1}", f"text {shown_token(completion['tokens'][i]).strip()}", *numbers])


def describe_tokens(completions: list[dict], which: int | None, measure: str) -> list:
    """The legend in words and the coloured tokens. The colours are the group's."""
    if which is None or not 0 <= which < len(completions) or not completions[which]["tokens"]:
        return ["No tokens were kept of this step.", []]
    of_group = [completion.get(MEASURES.get(measure, "")) or [] for completion in completions]
    tokens, values = map(shown_token, completions[which]["tokens"][:TOKENS]), of_group[which]
    if not values:
        return [f"This run has no {measure}: there is no critic.", [(token, None) for token in tokens]]
    known = [value for values in of_group for value in values if value is not None]
    top = max(map(abs, known), default=0)
    legend = (
        f"{measure}, in this group from {min(known, default=0):.3g} to {max(known, default=0):.3g}. Grey is within "
        f"{ABOUT_0 * top:.2g} of 0; blue is above, red below; the darker ones are beyond {A_LOT * top:.2g}."
    )
    if len(completions[which]["tokens"]) > TOKENS:
        legend += f" Shown are the first {TOKENS:,} of {len(completions[which]['tokens']):,} tokens."
    return [legend, [(token, kind(value or 0.0, top)) for token, value in zip(tokens, values)]]


def kind(value: float, top: float) -> str:
    if abs(value) <= ABOUT_0 * top:
        return "about 0"
    return ("far " if abs(value) > A_LOT * top else "") + ("above 0" if value > 0 else "below 0")


def shown_token(token: str) -> str:
    """A line break is shown, and made; so are blanks that stand alone."""
    token = cut(token, SHORT)
    return token.replace("\n", "⏎\n") if token.strip(" ") else "␣" * len(token) or "∅"


# --- components and text


def plot(label: str, series: Iterable[str], height: int, x: str = "step", y: str = " ") -> gr.LinePlot:
    """Of a frame with x, y and series. Which colour is whose stands in the label: the plot's own legend has no room."""
    colours = dict(zip(series, SHADES))
    how = {}
    if len(colours) > 1:
        how = {"color": "series", "color_map": {name: SHADES[colour] for name, colour in colours.items()}}
        label += f" ({', '.join(f'{name} {colour}' for name, colour in colours.items())})"
    return gr.LinePlot(x="x", y="y", x_title=x, y_title=y, label=label, height=height, min_width=240, **how)


def table(label: str, *headers: str) -> gr.Dataframe:
    return gr.Dataframe(headers=list(headers), type="array", label=label, interactive=False, wrap=True, max_height=360)
