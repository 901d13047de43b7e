"""Tabular Q-learning on IceMaze, beside which the language model can be seen: off-policy and on-policy learning.

    python bench/q_learning.py                  three seeds, mazes that are never slippery
    python bench/q_learning.py --slippery 0.2   one step in five goes in a random direction

Q-learning (Watkins, 1989): Q(s, a) <- Q(s, a) + alpha (r + gamma max_b Q(s', b) - Q(s, a)). The behaviour policy is
epsilon-greedy, the target policy greedy: what is learned is not what is played (off-policy). GRPO and PPO learn about the
policy that samples (on-policy). The state is the drawing, so that a table learns each maze for itself and knows nothing
about a new one; a model that reads the drawing can generalize.
"""

import argparse
import random
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.environments import read_environment  # noqa: E402
from environments import STEPS, IceMaze  # noqa: E402

ACTIONS = list(STEPS)
MAX_TURNS = 12  # as in configs/ice_maze.yaml
ALPHA = 0.5
GAMMA = 0.95
EPSILON = 0.2


class Table:
    """Q-values by state and action."""

    def __init__(self):
        self.values = defaultdict(lambda: dict.fromkeys(ACTIONS, 0.0))

    def greedy(self, state: str) -> str:
        """Return the action with the highest value; ties are broken at random."""
        values = self.values[state]
        highest = max(values.values())
        return random.choice([action for action in ACTIONS if values[action] == highest])

    def behaviour(self, state: str) -> str:
        return random.choice(ACTIONS) if random.random() < EPSILON else self.greedy(state)

    def update(self, state: str, action: str, reward: float, next_state: str, done: bool) -> None:
        target = reward if done else reward + GAMMA * max(self.values[next_state].values())
        self.values[state][action] += ALPHA * (target - self.values[state][action])


def episode(table: Table, seed: int, slippery: float, learns: bool) -> bool:
    """Play a maze, greedily or, to learn, epsilon-greedily. Returns whether the flag was reached."""
    maze = IceMaze()
    maze.slippery = slippery
    state = maze.reset(seed)
    for _ in range(MAX_TURNS):
        action = table.behaviour(state) if learns else table.greedy(state)
        next_state = maze.move(action)
        if learns:
            table.update(state, action, maze.get_reward(), next_state, maze.done)
        state = next_state
        if maze.done:
            break
    return maze.get_reward() == 1


def win_rate(table: Table, seeds: list[int], slippery: float) -> float:
    return sum(episode(table, seed, slippery, learns=False) for seed in seeds) / len(seeds)


def optimum(seeds: list[int]) -> float:
    """Return the share of mazes that shortest paths solve within the turns, without slipping."""
    solved = 0
    for seed in seeds:
        maze = IceMaze()
        maze.reset(seed)
        solved += len(maze._path()) <= MAX_TURNS
    return solved / len(seeds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slippery", type=float, default=0.0, help="probability of a random direction (default 0)")
    parser.add_argument("--episodes", type=int, default=15360, help="episodes to learn from (default as in the recipe)")
    options = parser.parse_args()
    print(
        "| seed | episodes | mazes trained on | mazes not trained on | random play | shortest paths |\n|---|---|---|---|---|---|"
    )
    for seed in range(3):
        random.seed(seed)
        train, held_out = (
            [row["seed"] for row in read_environment("environments.py:IceMaze", n, split, seed)]
            for n, split in ((100, "train"), (200, "eval"))
        )
        untrained = win_rate(Table(), held_out, options.slippery)
        table = Table()
        for i in range(options.episodes):
            episode(table, train[i % len(train)], options.slippery, learns=True)
        rates = [win_rate(table, seeds, options.slippery) for seeds in (train, held_out)]
        cells = [f"{rate:.1%}" for rate in (*rates, untrained, optimum(held_out))]
        print(f"| {seed} | {options.episodes:,} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
