"""The Learn page: the advantages of a group, GAE and PPO's clip against hand-computed values, and their entries in docs/algorithms.md."""

import pytest

from ui import learn_page
from ui.page import UiError


def test_advantages_of_a_group():
    """Rewards 1, 0, 0, 0: mean 1/4, standard deviation 1/2 (n - 1); RLOO: 1 - 0 and 0 - 1/3."""
    bars = [learn_page.group(1.0, 0.0, 0.0, 0.0)[f"bars{i}"] for i in range(4)]
    grpo, dr_grpo, rloo, reinforce = (bar["advantage"].tolist() for bar in bars)
    assert grpo == pytest.approx([1.4997, -0.4999, -0.4999, -0.4999], abs=1e-4)
    assert dr_grpo == [0.75, -0.25, -0.25, -0.25]
    assert rloo == pytest.approx([1.0, -1 / 3, -1 / 3, -1 / 3], abs=1e-4)
    assert reinforce == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-4)
    assert bars[0]["completion"].tolist() == ["1", "2", "3", "4"]
    equal = learn_page.group(0.3, 0.3, 0.3, 0.3)
    assert all(bar["advantage"].tolist() == [0.0] * 4 for bar in equal.values()), "equal rewards teach nothing"


def test_gae_interpolates_between_td_error_and_return():
    episode = [["a", 0, 0.5], ["b", 1, 0.25]]
    values = learn_page.gae(episode, 1.0, 0.5, 0.0)
    summary, table, advantages, errors = (values[name] for name in ("summary", "table", "advantages", "errors"))
    # delta = 0 + 0.25 - 0.5, 1 - 0.25; A_1 = -0.25 + 0.5 x 0.75; lambda 1: 1 - 0.5
    assert table == [[1, -0.25, 0.125, 0.5, 0.625, 1.0], [2, 0.75, 0.75, 0.75, 1.0, 1.0]]
    chosen = advantages[advantages["estimate"] == "chosen lambda"]
    assert chosen["y"].tolist() == [0.125, 0.75] and len(advantages) == 6
    bias = dict(errors[errors["error"] == "bias"][["x", "y"]].values)
    assert (
        bias[0.0] == pytest.approx(0.75)
        and bias[0.5] == pytest.approx(0.375)
        and bias[1.0] == pytest.approx(0, abs=1e-6)
    )
    assert "lambda 0.5: bias 0.375, spread 0.000" in summary
    discounted = learn_page.gae(episode, 0.5, 1.0, 0.0)["table"]
    assert [row[3] for row in discounted] == [0.0, 0.75]


def test_larger_lambda_has_less_bias_and_more_spread():
    errors = learn_page.gae(learn_page.EPISODE, 1.0, 0.95, 1.0)["errors"]
    curves = {name: errors[errors["error"] == name]["y"].tolist() for name in ("bias", "spread")}
    assert curves["bias"][-1] == pytest.approx(0, abs=1e-5) and curves["bias"][0] == pytest.approx(0.3, abs=1e-5)
    assert curves["spread"] == sorted(curves["spread"])
    assert curves["spread"][0] == pytest.approx(1, abs=0.1) and curves["spread"][-1] == pytest.approx(5**0.5, abs=0.2)


def test_invalid_episode_raises():
    for row in (["a", "x", 1], ["a", 1, None], ["a", 1, ""], ["a", float("nan"), 0], ["a"]):
        with pytest.raises(UiError, match="two numbers"):
            learn_page.gae([["b", 0, 0], row], 1.0, 1.0, 0.1)
    for episode, expected in (([], "two numbers"), ([["a", 0, 0]] * 51, "51 tokens.*50")):
        with pytest.raises(UiError, match=expected):
            learn_page.gae(episode, 1.0, 1.0, 0.1)


@pytest.mark.parametrize(
    "ratio, advantage, expected, objective, slope",
    [
        (1.5, 1, "CLIPPED to 0: A > 0 and the ratio is above 1.28", "1.280", "0"),
        (1.2, 1, "not clipped.", "1.200", "1"),
        (0.5, -1, "CLIPPED to 0: A < 0 and the ratio is below 0.8", "-0.800", "0"),
        (0.5, 1, "not clipped although", "0.500", "1"),
        (2.5, -2, "not clipped although", "-5.000", "-2"),
        (1.0, 0, "not clipped.", "0.000", "0"),
    ],
)
def test_clip_reports_whether_the_gradient_is_clipped(ratio, advantage, expected, objective, slope):
    summary, plot = learn_page.clip(ratio, advantage, 0.2, 0.28).values()
    assert expected in summary and f"Objective {objective}" in summary.replace("-0.000", "0.000")
    assert summary.replace("-0.", "0.").endswith(f"slope {slope}.")
    point = plot[plot["objective"] == "your token"]
    assert point["x"].tolist() == [ratio, ratio] and point["y"].tolist()[1] == pytest.approx(float(objective), abs=1e-3)


def test_each_demo_has_an_entry_in_the_terms():
    assert "A_t = delta_t + gamma lam A_{t+1}" in learn_page.term("GAE") and "###" not in learn_page.term("GAE")
    assert "group" in learn_page.term("GRPO")
    assert "clip(ratio, 1 - epsilon, 1 + epsilon_high)" in learn_page.term("PPO clip")
