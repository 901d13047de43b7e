"""The tab Learn: two playgrounds on the project's own functions, which are those that training calls."""

import contextlib
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
    """(words, table, advantages to draw, errors to draw) of an episode of [token, reward, value].

    The errors are those of A_t + V(s_t), which the critic learns, at the first token: over many episodes whose rewards are
    these with normal noise, against the return of these.
    """
    import torch

    from rl.algorithms import generalised_advantages

    def estimate(rewards, values, lam):
        """(advantages, returns), (B, T)."""
        return generalised_advantages(rewards, values.expand_as(rewards), torch.ones_like(rewards).bool(), gamma, lam)

    def errors(lam):
        returns = estimate(noisy, values, lam)[1][:, 0]
        return (returns.mean() - whole[1][0, 0]).abs().item(), returns.std(correction=0).item()

    if len(episode) > LONGEST:
        raise UiError(f"The episode has {len(episode)} tokens. Give it at most {LONGEST}.")
    rewards, values = (torch.tensor([[cell(row, i) for row in episode or [[]]]]) for i in (1, 2))  # (1, T)
    z = torch.randn(NOISY // 2, len(episode), generator=torch.Generator().manual_seed(0))
    noisy = rewards + noise * torch.cat([z, -z])  # (NOISY, T); their mean is exactly the rewards
    td, chosen, whole = (estimate(rewards, values, x) for x in (0.0, lam, 1.0))
    columns = [td[0], chosen[0], whole[0], chosen[1], whole[1]]
    table = [[t, *(round(x, 4) for x in row)] for t, row in enumerate(torch.cat(columns).T.tolist(), 1)]
    drawn = [(row[0], row[i], name) for i, name in enumerate(LAMBDAS, 1) for row in table]
    missed = [(x / 20, e, name) for x in range(21) for name, e in zip(ERRORS, errors(x / 20))]
    told = [f"lambda {x:g}: bias {errors(x)[0]:.3f}, spread {errors(x)[1]:.3f}" for x in (0.0, lam, 1.0)]
    words = f"The return of token 1, as the critic would learn it, over {NOISY:,} noisy episodes. {'; '.join(told)}."
    return words, table, *(pd.DataFrame(points, columns=["x", "y", "series"]) for points in (drawn, missed))


def cell(row: list, column: int) -> float:
    with contextlib.suppress(TypeError, ValueError, IndexError):
        if math.isfinite(value := float(row[column])):
            return value
    found = row[column : column + 1]
    raise UiError(f"The episode has {found} where a number belongs. Give each token a reward and a value.")


def clip(ratio: float, advantage: float, epsilon: float, epsilon_high: float) -> tuple:
    """(words, the objective by the ratio, to draw) of one token, by PPO's clipped loss."""
    import torch

    from rl.algorithms import clipped_policy_loss

    def objective(ratios):
        return -clipped_policy_loss(ratios, torch.full_like(ratios, advantage), epsilon, epsilon_high)

    grid, point = torch.linspace(0, 3, 151), torch.tensor([float(ratio)], requires_grad=True)
    height = objective(point)
    (slope,) = torch.autograd.grad(height.sum(), point)
    drawn = [(x, y, OBJECTIVES[0]) for x, y in zip(grid.tolist(), objective(grid).tolist())]
    drawn += [(x, x * advantage, OBJECTIVES[1]) for x in grid.tolist()]
    drawn += [(ratio, y, OBJECTIVES[2]) for y in (0.0, height.item())]
    is_cut, verdict = advantage and not slope, "The gradient is not cut."
    if is_cut and advantage > 0:
        verdict = f"The gradient is CUT: A > 0 and the ratio is above {1 + epsilon_high:g}."
    elif is_cut:
        verdict = f"The gradient is CUT: A < 0 and the ratio is below {1 - epsilon:g}."
    elif not 1 - epsilon <= ratio <= 1 + epsilon_high:
        verdict = "The gradient is not cut although the ratio is outside of the range: it leads back, or A is 0."
    words = f"{verdict} Objective {height.item():.3f} (unclipped {ratio * advantage:.3f}), its slope by the ratio {slope.item():.3g}."
    return words, pd.DataFrame(drawn, columns=["x", "y", "series"])


def build(page: Page) -> None:
    with gr.Tab("Learn") as tab:
        gr.Markdown(
            "## GAE: how far to trust the critic\nA reward at the end has to be shared out among the tokens that led to it, and the "
            "critic's values say how. With lambda 0 a token gets what the next value says (little noise, but the critic's errors), "
            "with lambda 1 what came of it in the end (all of the noise, but none of its errors)."
        )
        with gr.Row():
            with gr.Column():
                episode = gr.Dataframe(
                    EPISODE, headers=["token", "reward", "value"], datatype=["str", "number", "number"], type="array",
                    interactive=True, label="an episode: change it",
                )  # fmt: skip
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
                said_clip = gr.Textbox(label="in words", lines=2)
            objective = plot("objective of the token", OBJECTIVES, 260, "ratio", "objective")
        gr.Markdown(term("PPO clip"))
        of_gae, of_clip = [episode, gamma, lam, noise], [ratio, advantage, epsilon, epsilon_high]
        drawn, clipped = [words, table, advantages, errors], [said_clip, objective]
        shown = {"show_progress": "hidden", "trigger_mode": "always_last"}
        gr.on([tab.select, *(c.change for c in of_gae)], shows_errors(gae), of_gae, drawn, api_name="gae", **shown)
        gr.on(
            [tab.select, *(c.change for c in of_clip)], shows_errors(clip), of_clip, clipped, api_name="clip", **shown
        )
