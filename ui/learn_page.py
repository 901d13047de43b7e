"""The Learn page: advantages of a group, GAE and PPO's clipping, computed by the functions that training uses."""

import math
import re
from pathlib import Path

import gradio as gr
import pandas as pd
from gradio.context import Context

from ui.page import Page, UiError
from ui.view import View, frame, line_plot, status_line

TERMS = Path(__file__).resolve().parent.parent / "docs" / "algorithms.md"
GROUP = [1.1, 0.1, 0.1, 0.0]  # rewards of the completions of a question
ALGORITHMS = ("GRPO", "Dr. GRPO", "RLOO", "REINFORCE++")
EPISODE = [["3+4", 0, 0.4], ["=7", 0, 0.7], ["7-5", 0, 0.3], ["=2", 0, 0.6], ["answer", 1, 0.8]]
ESTIMATES = ["token", "TD error", "advantage", "return - value", "return", "return (lambda 1)"]
LAMBDAS = "lambda 0", "chosen lambda", "lambda 1"  # curves of the advantage plot
ERRORS = "bias", "spread"  # curves of the error plot
OBJECTIVES = "clipped", "unclipped", "your token"  # curves of the objective plot
NUM_EPISODES = 2000  # with noisy rewards
MAX_TOKENS = 50
INTRODUCTION = """GRPO samples a group of completions for a question and compares their rewards: those above the mean are
reinforced, those below are discouraged. Move the rewards. GRPO divides by the standard deviation of the group, so a small
difference counts as much as a large one; Dr. GRPO does not divide; RLOO compares with the mean of the others; REINFORCE++
divides by the standard deviation of the whole batch, which is this group here."""


def term(name: str) -> str:
    """Return the entry of docs/algorithms.md with this heading, as Markdown."""
    text = TERMS.read_text(encoding="utf-8")
    entry = re.search(rf"^### {re.escape(name)}\n(.*?)(?=^##|\Z)", text, re.DOTALL | re.MULTILINE)
    return f"**{name}**, from docs/algorithms.md:\n\n{entry[1]}"


def group(*rewards: float) -> dict:
    """Compute the advantages of a group of completions by each algorithm, as bars."""
    import torch

    from rl import algorithms

    values = torch.tensor(rewards)
    n = len(rewards)
    centred = algorithms.group_advantages(values, n, "none")
    mask = torch.ones(n, dtype=torch.bool)
    advantages = (
        algorithms.group_advantages(values, n, "group"),
        centred,
        algorithms.leave_one_out_advantages(values, n),
        algorithms.whiten_by_token(centred, torch.ones(n, dtype=torch.long), mask),
    )
    bars = {}
    for i, estimate in enumerate(advantages):
        completions = [str(number) for number in range(1, n + 1)]
        heights = [round(advantage, 4) for advantage in estimate.tolist()]
        bars[f"bars{i}"] = pd.DataFrame({"completion": completions, "advantage": heights})
    return bars


def gae(episode: list[list], gamma: float, lam: float, noise: float) -> dict:
    """Compute advantages and returns for an episode of [token, reward, value] rows.

    Bias and spread are the errors of the critic's target, A_t + V(s_t), at the first token: over NUM_EPISODES episodes
    with Gaussian noise added to the rewards, relative to the return without noise.
    """
    import torch

    from rl.algorithms import generalised_advantages

    def estimate(rewards, lam):  # advantages and returns, each (B, T)
        mask = torch.ones_like(rewards, dtype=torch.bool)
        return generalised_advantages(rewards, values.expand_as(rewards), mask, gamma, lam)

    def errors(lam):
        returns = estimate(noisy, lam)[1][:, 0]
        return (returns.mean() - monte_carlo[1][0, 0]).abs().item(), returns.std(correction=0).item()

    if len(episode) > MAX_TOKENS:
        raise UiError(f"The episode has {len(episode)} tokens. The maximum is {MAX_TOKENS}.")
    rewards, values = torch.tensor([parse_row(row) for row in episode or [[]]]).T[:, None]  # each (1, T)
    z = torch.randn(NUM_EPISODES // 2, len(episode), generator=torch.Generator().manual_seed(0))
    noisy = rewards + noise * torch.cat([z, -z])  # (NUM_EPISODES, T); their mean is exactly `rewards`
    td, chosen, monte_carlo = (estimate(rewards, x) for x in (0.0, lam, 1.0))
    columns = torch.cat([td[0], chosen[0], monte_carlo[0], chosen[1], monte_carlo[1]])
    table = [[t, *(round(x, 4) for x in row)] for t, row in enumerate(columns.T.tolist(), 1)]
    advantages = [(row[0], row[i], name) for i, name in enumerate(LAMBDAS, 1) for row in table]
    by_lambda = [(x / 20, error, name) for x in range(21) for name, error in zip(ERRORS, errors(x / 20))]
    lines = ["lambda {:g}: bias {:.3f}, spread {:.3f}".format(x, *errors(x)) for x in (0.0, lam, 1.0)]
    summary = f"The critic's target for token 1, over {NUM_EPISODES:,} noisy episodes. {'; '.join(lines)}."
    plots = {"advantages": frame(advantages, "estimate"), "errors": frame(by_lambda, "error")}
    return {"summary": summary, "table": table} | plots


def parse_row(row: list) -> tuple[float, float]:
    """Return the reward and the value of a token."""
    try:
        reward, value = map(float, row[1:3])
    except (TypeError, ValueError):
        reward = value = math.nan
    if not math.isfinite(reward + value):
        raise UiError(f"A token has {row[1:3]} instead of two numbers. Enter a reward and a value for each token.")
    return reward, value


def clip(ratio: float, advantage: float, epsilon: float, epsilon_high: float) -> dict:
    """Compute PPO's clipped objective of one token, and plot it against the ratio."""
    import torch

    from rl.algorithms import clipped_policy_loss

    def objective(ratios):
        return -clipped_policy_loss(ratios, torch.full_like(ratios, advantage), epsilon, epsilon_high)

    grid = torch.linspace(0, 3, 151)
    point = torch.tensor([float(ratio)], requires_grad=True)
    value = objective(point)
    (slope,) = torch.autograd.grad(value.sum(), point)
    points = [(x, y, OBJECTIVES[0]) for x, y in zip(grid.tolist(), objective(grid).tolist())]
    points += [(x, x * advantage, OBJECTIVES[1]) for x in grid.tolist()]
    points += [(ratio, y, OBJECTIVES[2]) for y in (0.0, value.item())]
    verdict = "The gradient is not clipped."
    if advantage and not slope:
        bound = f"A > 0 and the ratio is above {1 + epsilon_high:g}"
        if advantage < 0:
            bound = f"A < 0 and the ratio is below {1 - epsilon:g}"
        verdict = f"The gradient is CLIPPED to 0: {bound}."
    elif not 1 - epsilon <= ratio <= 1 + epsilon_high:
        verdict = "The gradient is not clipped although the ratio is out of range: it moves the ratio back, or A is 0."
    summary = f"{verdict} Objective {value.item():.3f} (unclipped {ratio * advantage:.3f}), slope {slope.item():.3g}."
    return {"verdict": summary, "objective": frame(points, "objective")}


def build(page: Page) -> View:
    view = View(status=status_line())
    with gr.Tab("GRPO"):
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            for i, reward in enumerate(GROUP, 1):
                view[f"reward{i}"] = gr.Slider(
                    0, 1.2, reward, step=0.05, label=f"Reward of completion {i}", min_width=150
                )
        with gr.Row():
            for i, name in enumerate(ALGORITHMS):
                axes = {"x": "completion", "y": "advantage", "y_lim": [-2, 2], "min_width": 240}
                view[f"bars{i}"] = gr.BarPlot(label=f"Advantages of {name}", height=220, **axes)
        gr.Markdown(term("GRPO"))
    with gr.Tab("GAE"):
        gr.Markdown(term("GAE"))
        with gr.Row():
            with gr.Column():
                columns = {"headers": ["token", "reward", "value"], "datatype": ["str", "number", "number"]}
                options = {"label": "Episode (edit the cells)", "type": "array", "interactive": True}
                view["episode"] = gr.Dataframe(EPISODE, **columns, **options)
                view["gamma"] = gr.Slider(0, 1, 1.0, step=0.01, label="gamma (discount per token)")
                view["lam"] = gr.Slider(0, 1, 0.95, step=0.01, label="lambda")
                view["noise"] = gr.Slider(0, 2, 0.5, step=0.05, label="reward noise (standard deviation)")
            with gr.Column():
                view["advantages"] = line_plot("Advantage of each token", "estimate", "token", "advantage")
                view["errors"] = line_plot("Errors of the critic's target", "error", "lambda", "error")
                view["summary"] = gr.Textbox(label="Summary", lines=2)
        view["table"] = gr.Dataframe(headers=ESTIMATES, label="Estimates for each token", interactive=False)
    with gr.Tab("PPO clip"):
        gr.Markdown(term("PPO clip"))
        with gr.Row():
            with gr.Column():
                view["ratio"] = gr.Slider(0, 3, 1.3, step=0.01, label="ratio")
                view["advantage"] = gr.Slider(-2, 2, 1.0, step=0.1, label="advantage A")
                view["epsilon"] = gr.Slider(0.01, 0.99, 0.2, step=0.01, label="epsilon (lower bound 1 - epsilon)")
                label = "epsilon_high (upper bound 1 + epsilon_high; DAPO: 0.28)"
                view["epsilon_high"] = gr.Slider(0.01, 1.5, 0.28, step=0.01, label=label)
                view["verdict"] = gr.Textbox(label="Summary", lines=2)
            view["objective"] = line_plot("Objective of the token", "objective", "ratio", "objective", 300)
    demos = {
        group: " ".join(f"reward{i}" for i in range(1, len(GROUP) + 1)),
        gae: "episode gamma lam noise",
        clip: "ratio advantage epsilon epsilon_high",
    }
    results = {group: "bars0 bars1 bars2 bars3", gae: "summary table advantages errors", clip: "verdict objective"}
    for demo, inputs in demos.items():
        events = [Context.root_block.load, *(view[name].change for name in inputs.split())]
        view.on(events, demo, inputs, results[demo], trigger_mode="always_last")
    return view
