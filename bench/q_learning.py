"""Tabular Q-learning on IceMaze, beside which the language model can be seen: off-policy and on-policy learning.

    python bench/q_learning.py                  three seeds, mazes that are never slippery
    python bench/q_learning.py --slippery 0.2   one step in five goes in a random direction
    python bench/q_learning.py --plot curves.png --run runs/RUN    the win rates, with those of the language model

Q-learning (Watkins, 1989): Q(s, a) <- Q(s, a) + alpha (r + gamma max_b Q(s', b) - Q(s, a)). The behaviour policy is
epsilon-greedy, the target policy greedy: what is learned is not what is played (off-policy). GRPO and PPO learn about the
policy that samples (on-policy). The state is the drawing, so that a table learns each maze for itself and knows nothing
about a new one; a model that reads the drawing can generalize.
"""

import argparse
import json
import random
import sys
from collections import defaultdict
from pathlib import Path

import yaml

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


def learn(seed: int, options: argparse.Namespace) -> tuple[dict, list[tuple]]:
    """Learn from the mazes of the split "train". Returns the mazes of each split, and points of the curves.

    A point is a number of episodes with three win rates: of the behaviour policy since the last point, and of the target
    policy in the mazes trained on and in others.
    """
    random.seed(seed)
    mazes = {
        split: [row["seed"] for row in read_environment("environments.py:IceMaze", n, split, seed)]
        for split, n in (("train", 100), ("eval", 200))
    }
    table = Table()
    points = []
    wins = 0
    interval = max(1, options.episodes // 30)
    for i in range(options.episodes):
        wins += episode(table, mazes["train"][i % 100], options.slippery, learns=True)
        if (i + 1) % interval == 0:
            target = [win_rate(table, seeds, options.slippery) for seeds in mazes.values()]
            points.append((i + 1, wins / interval, *target))
            wins = 0
    return mazes, points


def plot(points: list[tuple], run: str | None, file: str) -> None:
    """Draw the win rates by episodes, with those of a run of train.py on the ice maze, if there is one."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5))
    episodes, behaviour, trained, held_out = zip(*points)
    axes.plot(episodes, behaviour, label="Q-learning, behaviour policy (epsilon-greedy), mazes trained on")
    axes.plot(episodes, trained, label="Q-learning, target policy (greedy), mazes trained on")
    axes.plot(episodes, held_out, label="Q-learning, target policy (greedy), other mazes")
    if run:
        config = yaml.safe_load((Path(run) / "config.yaml").read_text(encoding="utf-8"))
        per_step = config["prompts_per_step"] * config["num_generations"]
        metrics = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
        rates = [(m["step"] * per_step, m["accuracy"]) for m in metrics]
        axes.plot(*zip(*rates), label="language model, sampled (on-policy), new mazes each step")
    axes.set(xlabel="episodes", ylabel="mazes crossed", ylim=(0, 1))
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=120, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slippery", type=float, default=0.0, help="probability of a random direction (default 0)")
    parser.add_argument("--episodes", type=int, default=15360, help="episodes to learn from (default as in the recipe)")
    parser.add_argument("--plot", metavar="FILE", help="draw the win rates of seed 0 by episodes, such as curves.png")
    parser.add_argument("--run", help="a run of configs/ice_maze.yaml, drawn in the same plot")
    options = parser.parse_args()
    print(
        "| seed | episodes | mazes trained on | mazes not trained on | random play | shortest paths |\n|---|---|---|---|---|---|"
    )
    for seed in range(3):
        mazes, points = learn(seed, options)
        _, _, *rates = points[-1]
        untrained = win_rate(Table(), mazes["eval"], options.slippery)
        cells = [f"{rate:.1%}" for rate in (*rates, untrained, optimum(mazes["eval"]))]
        print(f"| {seed} | {options.episodes:,} | {' | '.join(cells)} |", flush=True)
        if seed == 0 and options.plot:
            plot(points, options.run, options.plot)


if __name__ == "__main__":
    main()
