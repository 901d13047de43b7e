"""PPO and REINFORCE with rl/algorithms.py on a control task: CartPole-v1, with at most 500 steps per episode.

Each row of a (B, T) tensor is one segment of an episode: it ends with the episode or with the roll-out, and is padded
to T steps. The value after an episode in which the pole fell is 0. All other segments bootstrap from the critic's value
of their last state. The reward is 1 - gamma per step, so that values are between 0 and 1.
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
    """A CartPole environment that restarts when an episode is over, with the segment collected so far."""

    def __init__(self, seed: int):
        self.env = gymnasium.make("CartPole-v1")
        self.state, _ = self.env.reset(seed=seed)
        self.states = []
        self.actions = []

    def step(self, action: int) -> tuple[bool, bool]:
        """Return whether the pole fell, and whether the episode is over (by the fall or the step limit)."""
        self.states.append(torch.from_numpy(self.state))
        self.actions.append(action)
        self.state, _, fell, truncated, _ = self.env.step(action)
        return fell, fell or truncated

    def end_segment(self, over: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the segment: states (t, 4), actions (t,) and the last state (4,). Restart if the episode is over."""
        segment = torch.stack(self.states), torch.tensor(self.actions), torch.from_numpy(self.state)
        self.states = []
        self.actions = []
        if over:
            self.state, _ = self.env.reset()
        return segment


def network(outputs: int) -> torch.nn.Sequential:
    hidden = [torch.nn.Linear(4, 64), torch.nn.Tanh(), torch.nn.Linear(64, 64), torch.nn.Tanh()]
    last = torch.nn.Linear(64, outputs)
    torch.nn.init.zeros_(last.weight)  # the initial output is the same for every state
    return torch.nn.Sequential(*hidden, last)


@torch.no_grad()
def collect(games: list[Game], actor, steps: int | None = None):
    """Play `steps` steps of each game, or one whole episode if None.

    Returns:
        states (B, T, 4), actions (B, T), mask (B, T), the last states (B, 4), and fell (B,).
    """
    rows = []
    falls = []
    playing = list(games)
    step = 0
    while playing:
        step += 1
        states = torch.stack([torch.from_numpy(game.state) for game in playing])
        actions = torch.distributions.Categorical(logits=actor(states)).sample().tolist()
        for game, action in zip(list(playing), actions):
            fell, over = game.step(action)
            if over or step == steps:
                rows.append(game.end_segment(over))
                falls.append(fell)
            if step == steps or (over and steps is None):
                playing.remove(game)
    states, actions, last_states = zip(*rows)
    mask = pad_sequence([torch.ones(len(a), dtype=torch.bool) for a in actions], batch_first=True)
    return pad_sequence(states, True), pad_sequence(actions, True), mask, torch.stack(last_states), torch.tensor(falls)


def compute_logprobs(actor, states: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(actor(states), -1).gather(-1, actions[..., None]).squeeze(-1)  # (B, T)


def train_ppo(seed: int, updates: int = 200) -> tuple[torch.nn.Module, list[float]]:
    """Return an actor trained on `updates` roll-outs of 8 games x 128 steps, and the explained variance of each one."""
    torch.manual_seed(seed)
    games = [Game(1000 * seed + i) for i in range(8)]
    actor, critic = network(2), network(1)
    optimizer = torch.optim.Adam([*actor.parameters(), *critic.parameters()], lr=1e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, updates)
    explained = []
    for _ in range(updates):
        states, actions, mask, last_states, fell = collect(games, actor, 128)
        with torch.no_grad():
            old_logprobs = compute_logprobs(actor, states, actions)
            old_values = critic(states).squeeze(-1)
            last_values = torch.where(fell, 0.0, critic(last_states).squeeze(-1))
        rewards = torch.full(mask.shape, 1 - GAMMA)
        advantages, returns = alg.generalised_advantages(rewards, old_values, mask, GAMMA, LAMBDA, last_values)
        explained.append(alg.explained_variance(old_values, returns, mask))
        advantages = alg.whiten(advantages, mask)
        for _ in range(EPOCHS):
            ratio = alg.token_ratio(compute_logprobs(actor, states, actions), old_logprobs, mask)
            policy_loss = alg.clipped_policy_loss(ratio, advantages, CLIPRANGE)
            value_loss = alg.clipped_value_loss(critic(states).squeeze(-1), old_values, returns, CLIPRANGE)
            optimizer.zero_grad()
            (policy_loss + value_loss)[mask].mean().backward()
            optimizer.step()
        schedule.step()
    return actor, explained


def train_reinforce(seed: int, updates: int = 150) -> torch.nn.Module:
    """Return an actor trained for `updates` steps on 8 whole episodes each, with a running mean as the baseline."""
    torch.manual_seed(seed)
    games = [Game(1000 * seed + i) for i in range(8)]
    actor = network(2)
    baseline = None
    optimizer = torch.optim.Adam(actor.parameters(), lr=3e-3)
    for _ in range(updates):
        states, actions, mask, _, _ = collect(games, actor)
        returns = alg.discounted_returns(torch.full(mask.shape, 1 - GAMMA), mask, GAMMA)
        baseline = alg.running_mean(baseline, returns[mask])
        advantages = alg.reinforce_advantages(returns, mask, baseline)
        optimizer.zero_grad()
        (-advantages * compute_logprobs(actor, states, actions))[mask].mean().backward()
        optimizer.step()
    return actor


def mean_return(actor, seed: int) -> float:
    """Return the mean length of 20 unseen episodes, played greedily (at a temperature close to 0)."""
    games = [Game(10**6 + 1000 * seed + i) for i in range(20)]
    _, _, mask, _, _ = collect(games, lambda states: actor(states) / 1e-6)
    return mask.sum(1).float().mean().item()


@pytest.fixture
def seconds_limit():
    """Fail a test that takes more than 90 s of CPU time."""
    threads = torch.get_num_threads()
    start = time.process_time()
    torch.set_num_threads(1)  # the matrices are tiny
    yield
    torch.set_num_threads(threads)
    assert time.process_time() - start < 90


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ppo_solves_cartpole(seed, seconds_limit):
    actor, explained = train_ppo(seed)
    assert mean_return(actor, seed) >= 475 and statistics.median(explained) > 0.3


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_reinforce_with_a_baseline_learns_cartpole(seed, seconds_limit):
    assert mean_return(train_reinforce(seed), seed) >= 300
