"""The advantages and losses of rl/algorithms.py on a control task whose answer is known: CartPole-v1, at most 500 a game.

A row of every (B, T) tensor is one stretch of a game, cut where the game or the collecting ends and padded to the
longest. A game that fell has no further value; one that was cut (by its limit of 500 steps, or while it still ran) goes
on in the critic's value of the state it was left in. Rewards are 1 - gamma a step, so that values lie between 0 and 1.
"""

import statistics
import time

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from rl import algorithms as alg

gymnasium = pytest.importorskip("gymnasium", reason="gymnasium is not installed: pip install gymnasium==1.4.0")
pytestmark = pytest.mark.slow

GAMMA, LAMBDA, EPOCHS, CLIPRANGE = 0.98, 0.9, 10, 0.2


class Game:
    """One CartPole that begins anew when it is over, and the stretch of it that is being collected."""

    def __init__(self, seed: int):
        self.env = gymnasium.make("CartPole-v1")
        self.state, _ = self.env.reset(seed=seed)
        self.states, self.actions = [], []

    def step(self, action: int) -> tuple[bool, bool]:
        """Returns whether the pole fell, and whether the game is over (it fell, or the limit was reached)."""
        self.states.append(torch.from_numpy(self.state))
        self.actions.append(action)
        self.state, _, fell, limit, _ = self.env.step(action)
        return fell, fell or limit

    def cut(self, over: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The stretch so far: states (t, 4), actions (t,), and the state (4,) it was left in."""
        stretch = torch.stack(self.states), torch.tensor(self.actions), torch.from_numpy(self.state)
        self.states, self.actions = [], []
        if over:
            self.state, _ = self.env.reset()
        return stretch


def network(outputs: int) -> torch.nn.Sequential:
    hidden = [torch.nn.Linear(4, 64), torch.nn.Tanh(), torch.nn.Linear(64, 64), torch.nn.Tanh()]
    last = torch.nn.Linear(64, outputs)
    torch.nn.init.zeros_(last.weight)  # at first every state is alike
    return torch.nn.Sequential(*hidden, last)


@torch.no_grad()
def collect(games: list[Game], actor, steps: int | None = None):
    """Play `steps` steps of each game, or each to its end where it is None.

    Returns states (B, T, 4), actions (B, T), mask (B, T), the states (B, 4) the rows were left in, and fell (B,).
    """
    rows, falls, playing, step = [], [], list(games), 0
    while playing:
        step += 1
        states = torch.stack([torch.from_numpy(game.state) for game in playing])
        actions = torch.distributions.Categorical(logits=actor(states)).sample().tolist()
        for game, action in zip(list(playing), actions):
            fell, over = game.step(action)
            if over or step == steps:
                rows.append(game.cut(over))
                falls.append(fell)
            if step == steps or (over and steps is None):
                playing.remove(game)
    states, actions, left = zip(*rows)
    mask = pad_sequence([torch.ones(len(a), dtype=torch.bool) for a in actions], batch_first=True)
    return pad_sequence(states, True), pad_sequence(actions, True), mask, torch.stack(left), torch.tensor(falls)


def logprobs_of(actor, states: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(actor(states), -1).gather(-1, actions[..., None]).squeeze(-1)  # (B, T)


def learn_by_ppo(seed: int, updates: int = 200) -> tuple[torch.nn.Module, list[float]]:
    """An actor after `updates` roll-outs of 8 games x 128 steps, and the explained variance before each update."""
    torch.manual_seed(seed)
    games = [Game(1000 * seed + i) for i in range(8)]
    actor, critic = network(2), network(1)
    optimizer = torch.optim.Adam([*actor.parameters(), *critic.parameters()], lr=1e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, updates)
    explained = []
    for _ in range(updates):
        states, actions, mask, left, fell = collect(games, actor, 128)
        with torch.no_grad():
            old_logprobs, old_values = logprobs_of(actor, states, actions), critic(states).squeeze(-1)
            last_values = torch.where(fell, 0.0, critic(left).squeeze(-1))
        rewards = torch.full(mask.shape, 1 - GAMMA)
        advantages, returns = alg.generalised_advantages(rewards, old_values, mask, GAMMA, LAMBDA, last_values)
        explained.append(alg.explained_variance(old_values, returns, mask))
        advantages = alg.whiten(advantages, mask)
        for _ in range(EPOCHS):
            ratio = alg.token_ratio(logprobs_of(actor, states, actions), old_logprobs, mask)
            policy_loss = alg.clipped_policy_loss(ratio, advantages, CLIPRANGE)
            value_loss = alg.clipped_value_loss(critic(states).squeeze(-1), old_values, returns, CLIPRANGE)
            optimizer.zero_grad()
            (policy_loss + value_loss)[mask].mean().backward()
            optimizer.step()
        schedule.step()
    return actor, explained


def learn_by_reinforce(seed: int, updates: int = 150) -> torch.nn.Module:
    """An actor after `updates` steps, each on 8 whole games; the baseline is a running mean of the returns."""
    torch.manual_seed(seed)
    games = [Game(1000 * seed + i) for i in range(8)]
    actor, baseline = network(2), None
    optimizer = torch.optim.Adam(actor.parameters(), lr=3e-3)
    for _ in range(updates):
        states, actions, mask, _, _ = collect(games, actor)
        returns = alg.discounted_returns(torch.full(mask.shape, 1 - GAMMA), mask, GAMMA)
        baseline = alg.running_mean(baseline, returns[mask])
        advantages = alg.reinforce_advantages(returns, mask, baseline)
        optimizer.zero_grad()
        (-advantages * logprobs_of(actor, states, actions))[mask].mean().backward()
        optimizer.step()
    return actor


def mean_return(actor, seed: int) -> float:
    """Of 20 games that were not trained on, played greedily: at so low a temperature the likelier action is certain."""
    games = [Game(10**6 + 1000 * seed + i) for i in range(20)]
    _, _, mask, _, _ = collect(games, lambda states: actor(states) / 1e-6)
    return mask.sum(1).float().mean().item()


@pytest.fixture
def seconds_limit():
    """At most 90 s of one core's time; what else the machine does is not counted."""
    threads, start = torch.get_num_threads(), time.process_time()
    torch.set_num_threads(1)  # the matrices are tiny
    yield
    torch.set_num_threads(threads)
    assert time.process_time() - start < 90


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ppo_solves_cartpole(seed, seconds_limit):
    actor, explained = learn_by_ppo(seed)
    assert mean_return(actor, seed) >= 475 and statistics.median(explained) > 0.3


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_reinforce_with_a_baseline_learns_cartpole(seed, seconds_limit):
    assert mean_return(learn_by_reinforce(seed), seed) >= 300
