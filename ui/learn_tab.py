"""The tab Learn: two playgrounds that call the functions of training, for GAE and for PPO's clip."""

import math
import re
from pathlib import Path

import gradio as gr
import pandas as pd

from ui.runs import Page, UiError, shows_errors
from ui.watch_tab import plot

TERMS = Path(__file__).resolve().parent.parent / "docs" / "terms.md"
EPISODE = [["3+4", 0, 0.4], ["=7", 0, 0.7], ["7-5", 0, 0.3], ["=2", 0, 0.6], ["answer", 1, 0.8]]
ESTIMATES = ["token", "TD error", "advantage", "return less value", "return", "return of lambda 1"]
LAMBDAS = "lambda 0", "chosen lambda", "lambda 1"  # the lines of the plots
ERRORS = "bias", "spread"
OBJECTIVES = "clipped", "ratio x A, unclipped", "your token"
NOISY = 2000  # episodes
LONGEST = 50  # tokens


def term(name: str) -> str:
    """The entry of docs/terms.md under this heading, as Markdown."""
    text = TERMS.read_text(encoding="utf-8")
    entry = re.search(rf"^### {re.escape(name)}\n(.*?)(?=^##|\Z)", text, re.DOTALL | re.MULTILINE)
    return f"**{name}**, from docs/terms.md:\n\n{entry[1]}"


def gae(episode: list[list], gamma: float, lam: float, noise: float) -> tuple:
    """Estimates for an episode of [token, reward, value]: words, table, the plots of advantages and of errors.

    The errors are those of A_t + V(s_t), which the critic learns, at the first token: over many episodes whose rewards have
    normal noise added, against the return without noise.
    """
    import torch

    from rl.algorithms import generalised_advantages

    def estimate(rewards, lam):  # advantages and returns, (B, T)
        mask = torch.ones_like(rewards, dtype=torch.bool)
        return generalised_advantages(rewards, values.expand_as(rewards), mask, gamma, lam)

    def errors(lam):
        returns = estimate(noisy, lam)[1][:, 0]
        return (returns.mean() - whole[1][0, 0]).abs().item(), returns.std(correction=0).item()

    if len(episode) > LONGEST:
        raise UiError(f"The episode has {len(episode)} tokens. Give it at most {LONGEST}.")
    rewards, values = torch.tensor([numbers_in(row) for row in episode or [[]]]).T[:, None]  # (1, T) each
    z = torch.randn(NOISY // 2, len(episode), generator=torch.Generator().manual_seed(0))
    noisy = rewards + noise * torch.cat([z, -z])  # (NOISY, T), with the rewards as their exact mean
    td, chosen, whole = (estimate(rewards, x) for x in (0.0, lam, 1.0))
    columns = torch.cat([td[0], chosen[0], whole[0], chosen[1], whole[1]])
    table = [[t, *(round(x, 4) for x in row)] for t, row in enumerate(columns.T.tolist(), 1)]
    advantages = [(row[0], row[i], name) for i, name in enumerate(LAMBDAS, 1) for row in table]
    by_lambda = [(x / 20, error, name) for x in range(21) for name, error in zip(ERRORS, errors(x / 20))]
    shown = ["lambda {:g}: bias {:.3f}, spread {:.3f}".format(x, *errors(x)) for x in (0.0, lam, 1.0)]
    words = f"The return of token 1, as the critic would learn it, over {NOISY:,} noisy episodes. {'; '.join(shown)}."
    return words, table, frame(advantages), frame(by_lambda)


def numbers_in(row: list) -> tuple[float, float]:
    """The reward and the value of a token."""
    try:
        reward, value = map(float, row[1:3])
    except (TypeError, ValueError):
        reward = value = math.nan
    if not math.isfinite(reward + value):
        raise UiError(f"The episode has {row[1:3]} where two numbers belong. Give each token a reward and a value.")
    return reward, value


def clip(ratio: float, advantage: float, epsilon: float, epsilon_high: float) -> tuple:
    """PPO's clipped loss of one token: words, and the plot of the objective by the ratio."""
    import torch

    from rl.algorithms import clipped_policy_loss

    def objective(ratios):
        return -clipped_policy_loss(ratios, torch.full_like(ratios, advantage), epsilon, epsilon_high)

    grid = torch.linspace(0, 3, 151)
    point = torch.tensor([float(ratio)], requires_grad=True)
    height = objective(point)
    (slope,) = torch.autograd.grad(height.sum(), point)
    points = [(x, y, OBJECTIVES[0]) for x, y in zip(grid.tolist(), objective(grid).tolist())]
    points += [(x, x * advantage, OBJECTIVES[1]) for x in grid.tolist()]
    points += [(ratio, y, OBJECTIVES[2]) for y in (0.0, height.item())]
    verdict = "The gradient is not cut."
    if advantage and not slope:
        bound = f"A > 0 and the ratio is above {1 + epsilon_high:g}"
        if advantage < 0:
            bound = f"A < 0 and the ratio is below {1 - epsilon:g}"
        verdict = f"The gradient is CUT: {bound}."
    elif not 1 - epsilon <= ratio <= 1 + epsilon_high:
        verdict = "The gradient is not cut although the ratio is outside of the range: it leads back, or A is 0."
    words = f"{verdict} Objective {height.item():.3f} (unclipped {ratio * advantage:.3f}), its slope by the ratio {slope.item():.3g}."
    return words, frame(points)


def frame(points: list[tuple]) -> pd.DataFrame:
    return pd.DataFrame(points, columns=["x", "y", "series"])


def build(page: Page) -> None:
    with gr.Tab("Learn") as tab:
        gr.Markdown(
            "## GAE: how far to trust the critic\nA reward at the end has to be shared out among the tokens that led to it, and the "
            "critic's values say how. With lambda 0 a token gets what the next value says (little noise, but the critic's errors), "
            "with lambda 1 what came of it in the end (all of the noise, but none of its errors)."
        )
        with gr.Row():
            with gr.Column():
                columns = {"headers": ["token", "reward", "value"], "datatype": ["str", "number", "number"]}
                label = "an episode: change it"
                episode = gr.Dataframe(EPISODE, label=label, type="array", interactive=True, **columns)
                gamma = gr.Slider(0, 1, 1.0, step=0.01, label="gamma: what a reward one token later is worth")
                lam = gr.Slider(0, 1, 0.95, step=0.01, label="lambda")
                noise = gr.Slider(0, 2, 0.5, step=0.05, label="noise of the rewards (for bias and spread)")
            with gr.Column():
                advantages = plot("advantage of each token", LAMBDAS, 260, "token", "advantage")
                errors = plot("what the critic learns, by lambda", ERRORS, 260, "lambda", "error")
                words = gr.Textbox(label="in words", lines=2)
        table = gr.Dataframe(headers=ESTIMATES, label="token by token", interactive=False)
        gr.Markdown(term("GAE"))
        gr.Markdown(
            "## PPO's clip: how far one roll-out may move a token\nThe ratio says how much likelier the token is now than when it "
            "was written. Once it has left the range in the direction that the advantage asks for, its gradient is cut."
        )
        with gr.Row():
            with gr.Column():
                ratio = gr.Slider(0, 3, 1.3, step=0.01, label="ratio")
                advantage = gr.Slider(-2, 2, 1.0, step=0.1, label="advantage A")
                epsilon = gr.Slider(0.01, 0.99, 0.2, step=0.01, label="epsilon, downwards")
                epsilon_high = gr.Slider(0.01, 1.5, 0.28, step=0.01, label="epsilon_high, upwards (DAPO: 0.28)")
                verdict = gr.Textbox(label="in words", lines=2)
            objective = plot("objective of the token", OBJECTIVES, 260, "ratio", "objective")
        gr.Markdown(term("PPO clip"))
        shown = {"show_progress": "hidden", "trigger_mode": "always_last"}
        inputs, outputs = [episode, gamma, lam, noise], [words, table, advantages, errors]
        gr.on([tab.select, *(c.change for c in inputs)], shows_errors(gae), inputs, outputs, api_name="gae", **shown)
        inputs, outputs = [ratio, advantage, epsilon, epsilon_high], [verdict, objective]
        gr.on([tab.select, *(c.change for c in inputs)], shows_errors(clip), inputs, outputs, api_name="clip", **shown)
