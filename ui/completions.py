"""The completions of a step in the Watch page, with their rewards, turns and coloured tokens."""

from functools import partial

import gradio as gr

from rl.config import RunError
from rl.run.metrics import mean, standard_deviation
from tools.reward_process import format_number
from ui.page import Page
from ui.text import CELL_CHARS, cut
from ui.view import View, status_line, table

MEASURES = {"advantage": "advantages", "value": "values", "KL": "kl", "entropy": "entropy"}
MAX_TOKENS = 2_000  # coloured tokens of a completion


def show_step(page: Page, name: str, step: float, measure: str) -> dict:
    """Show the prompts of a step, and the completions of the prompt with a token log."""
    run = page.runs.get(name)
    groups = run.groups(int(step))
    step_data = {"groups": groups, "log": [], "logged": None, "note": "No tokens were logged for this step."}
    try:
        if log := run.tokens(int(step)):
            step_data |= {"log": log["completions"], "logged": find_group(groups, log)}
    except RunError as error:
        step_data["note"] = str(error)
    rows = [describe_group(number, group) for number, group in enumerate(groups, 1)]
    return {"step_data": step_data, "prompts": rows} | show_group(step_data, step_data["logged"] or 0, measure)


def find_group(groups: list[list[dict]], log: dict) -> int | None:
    """Return the index of the group with the token log. A prompt that was drawn twice is identified by the lengths."""
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
        reward = format_number(record.get("reward"))
        advantage = format_number(record.get("advantage"), "+.3g")
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
    if not picked or not step_data:  # there is no run yet, or the step could not be read
        return {}
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


def build(page: Page, name: gr.Dropdown, step: gr.Slider, steps: gr.State) -> None:
    """Build the tab. name, step: the chosen run and step. steps: the range of its steps, whose changes reload them."""
    view = View(name=name, step=step, step_data=gr.State({}), picked=gr.State([]))
    view["status"] = status_line("completions-status")
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

    shown = "step_data prompts completions text rewards turns tokens legend question"
    view.on([steps.change, step.change], partial(show_step, page), "name step measure", shown)
    view.on(view["prompts"].select, pick_prompt, "step_data measure")
    view.on(view["completions"].select, pick_completion, "step_data picked measure")
    view.on(view["measure"].input, show_tokens, "step_data picked measure")
    view.on(view["tokens"].select, pick_token, "step_data picked")
