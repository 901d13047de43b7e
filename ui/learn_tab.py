"""The Learn tab: interactive demos of GAE and of PPO's clipping, computed by the functions that training uses."""

import math
import re
from pathlib import Path

import gradio as gr
import pandas as pd

from ui.runs import Page, UiError, shows_errors
from ui.watch_tab import plot

TERMS = Path(__file__).resolve().parent.parent / "docs" / "algorithms.md"
EPISODE = [["3+4", 0, 0.4], ["=7", 0, 0.7], ["7-5", 0, 0.3], ["=2", 0, 0.6], ["answer", 1, 0.8]]
ESTIMATES = ["token", "TD error", "advantage", "return - value", "return", "return (lambda 1)"]
LAMBDAS = "lambda 0", "chosen lambda", "lambda 1"  # curves of the advantage plot
ERRORS = "bias", "spread"  # curves of the error plot
OBJECTIVES = "clipped", "unclipped", "your token"  # curves of the objective plot
NUM_EPISODES = 2000  # with noisy rewards
MAX_TOKENS = 50


def term(name: str) -> str:
    """Return the entry of docs/algorithms.md with this heading, as Markdown."""
    text = TERMS.read_text(encoding="utf-8")
    entry = re.search(rf"^### {re.escape(name)}\n(.*?)(?=^##|\Z)", text, re.DOTALL | re.MULTILINE)
    return f"**{name}**, from docs/algorithms.md:\n\n{entry[1]}"


def gae(episode: list[list], gamma: float, lam: float, noise: float) -> tuple:
    """Compute advantages and returns for an episode of [token, reward, value] rows.

    Bias and spread are the errors of the critic's target, A_t + V(s_t), at the first token: over NUM_EPISODES episodes
    with Gaussian noise added to the rewards, relative to the return without noise.

    Returns:
        Summary, table, advantage plot, error plot.
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
    return summary, table, frame(advantages), frame(by_lambda)


def parse_row(row: list) -> tuple[float, float]:
    """Return the reward and the value of a token."""
    try:
        reward, value = map(float, row[1:3])
    except (TypeError, ValueError):
        reward = value = math.nan
    if not math.isfinite(reward + value):
        raise UiError(f"A token has {row[1:3]} instead of two numbers. Enter a reward and a value for each token.")
    return reward, value


def clip(ratio: float, advantage: float, epsilon: float, epsilon_high: float) -> tuple:
    """Compute PPO's clipped objective of one token. Returns: summary, plot of the objective against the ratio."""
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
    return summary, frame(points)


def frame(points: list[tuple]) -> pd.DataFrame:
    return pd.DataFrame(points, columns=["x", "y", "series"])


def build(page: Page) -> None:
    with gr.Tab("Learn") as tab:
        gr.Markdown(
            "## GAE: how far to trust the critic\nGAE uses the critic's values to distribute the final reward over the "
            "tokens that led to it. With lambda 0, an advantage relies on the critic's value of the next token: little "
            "noise, but all of the critic's errors. With lambda 1, it relies on the actual return: all of the noise, but "
            "none of the critic's errors."
        )
        with gr.Row():
            with gr.Column():
                columns = {"headers": ["token", "reward", "value"], "datatype": ["str", "number", "number"]}
                label = "Episode (edit the cells)"
                episode = gr.Dataframe(EPISODE, label=label, type="array", interactive=True, **columns)
                gamma = gr.Slider(0, 1, 1.0, step=0.01, label="gamma (discount per token)")
                lam = gr.Slider(0, 1, 0.95, step=0.01, label="lambda")
                noise = gr.Slider(0, 2, 0.5, step=0.05, label="reward noise (standard deviation, for bias and spread)")
            with gr.Column():
                advantages = plot("Advantage of each token", LAMBDAS, 260, "token", "advantage")
                errors = plot("Errors of the critic's target", ERRORS, 260, "lambda", "error")
                summary = gr.Textbox(label="Summary", lines=2)
        table = gr.Dataframe(headers=ESTIMATES, label="Estimates for each token", interactive=False)
        gr.Markdown(term("GAE"))
        gr.Markdown(
            "## PPO clipping: how far one roll-out may move a token's probability\nThe ratio is the token's current "
            "probability divided by its probability when it was sampled. Once the ratio leaves the range in the direction "
            "of the advantage, the gradient is 0."
        )
        with gr.Row():
            with gr.Column():
                ratio = gr.Slider(0, 3, 1.3, step=0.01, label="ratio")
                advantage = gr.Slider(-2, 2, 1.0, step=0.1, label="advantage A")
                epsilon = gr.Slider(0.01, 0.99, 0.2, step=0.01, label="epsilon (lower bound 1 - epsilon)")
                epsilon_high = gr.Slider(
                    0.01, 1.5, 0.28, step=0.01, label="epsilon_high (upper bound 1 + epsilon_high; DAPO: 0.28)"
                )
                verdict = gr.Textbox(label="Summary", lines=2)
            objective = plot("Objective of the token", OBJECTIVES, 260, "ratio", "objective")
        gr.Markdown(term("PPO clip"))
        quiet = {"show_progress": "hidden", "trigger_mode": "always_last"}
        inputs = [episode, gamma, lam, noise]
        outputs = [summary, table, advantages, errors]
        gr.on([tab.select, *(c.change for c in inputs)], shows_errors(gae), inputs, outputs, api_name="gae", **quiet)
        inputs = [ratio, advantage, epsilon, epsilon_high]
        outputs = [verdict, objective]
        gr.on([tab.select, *(c.change for c in inputs)], shows_errors(clip), inputs, outputs, api_name="clip", **quiet)
