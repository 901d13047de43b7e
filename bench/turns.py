"""Time a roll-out of several turns: replies appended to the cache, against a new prefill of the conversation each turn.

    python bench/turns.py                                    16 episodes of 8 turns x (32 + 32) tokens, a random model
    python bench/turns.py --model data/smollm2 --reply 64    a model folder, replies of 64 tokens

Every turn has exactly the same number of tokens in both ways, so that the ratio compares equal work.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch  # noqa: E402

import rl.rollout  # noqa: E402
from bench.memory import make_random_model  # noqa: E402
from rl.config import Config  # noqa: E402
from rl.model.engine import Engine  # noqa: E402
from rl.model.policy import Policy, load_policy  # noqa: E402
from rl.model.sampling import Sampling  # noqa: E402

PROMPT = 64  # tokens


class FixedTurns(Engine):
    """The engine with turns of `turn_length` tokens, whatever is sampled."""

    turn_length = 0

    def collect_finished(self, slots, tokens, logprobs):
        end = min(self.eos_ids)
        for column, slot in enumerate(slots):
            row = self.rows[slot]
            is_last = len(row.ids) - row.turn_start == self.turn_length - 1
            tokens[:, column] = end if is_last else 5
        return super().collect_finished(slots, tokens, logprobs)


class Replies:
    """An environment in the place of rl/model/play.py that answers at once with the same tokens."""

    max_turn_length = sys.maxsize

    def __init__(self, reply: list[int], turns: int):
        self.reply = reply
        self.left = turns
        self.turns = {}
        self.new = {}

    def end_turn(self, index: int, ids: list[int]) -> None:
        self.turns[index] = self.turns.get(index, 0) + 1
        self.new[index] = self.reply if self.turns[index] < self.left else None

    def replies(self, block: bool) -> dict[int, list[int] | None]:
        new = self.new
        self.new = {}
        return new

    def close(self) -> None:
        pass


def sample(policy: Policy, prompts: list[list[int]], options: argparse.Namespace, play=None) -> list:
    length = options.turns * (options.turn_length + options.reply)
    generator = torch.Generator(policy.device).manual_seed(0)
    return rl.rollout.rollout(policy, prompts, 1, length, Sampling(1.0), generator, len(prompts), play=play)


def append_replies(policy: Policy, prompts: list[list[int]], reply: list[int], options: argparse.Namespace) -> int:
    """Play the episodes with one cache. Returns the number of their tokens."""
    episodes = sample(policy, prompts, options, Replies(reply, options.turns))
    return sum(len(episode.completion_ids) for episode in episodes)


def prefill_again(policy: Policy, prompts: list[list[int]], reply: list[int], options: argparse.Namespace) -> int:
    """Play the episodes as a roll-out for each turn, whose prompts are the conversations so far."""
    conversations = prompts
    for turn in range(options.turns):
        episodes = sample(policy, conversations, options)
        suffix = reply if turn < options.turns - 1 else []
        conversations = [e.prompt_ids + e.completion_ids + suffix for e in episodes]
    return sum(map(len, conversations)) - sum(map(len, prompts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model folder (default: llama-129m of bench/memory.py)")
    parser.add_argument("--rows", type=int, default=16, help="episodes (default 16)")
    parser.add_argument("--turns", type=int, default=8, help="turns of an episode (default 8)")
    parser.add_argument("--turn-length", type=int, default=32, help="tokens of a turn (default 32)")
    parser.add_argument("--reply", type=int, default=32, help="tokens of a reply (default 32)")
    parser.add_argument("--rounds", type=int, default=3, help="times that each way is measured, in turns (default 3)")
    options = parser.parse_args()
    FixedTurns.turn_length = options.turn_length
    rl.rollout.Engine = FixedTurns
    with tempfile.TemporaryDirectory() as folder:
        policy = load_policy(Config(model=options.model or make_random_model("llama-129m", folder)))
    prompts = [[10 + row] * PROMPT for row in range(options.rows)]
    seconds = {append_replies: [], prefill_again: []}
    for number in range(options.rounds + 1):  # the first round warms up
        tokens = set()
        for way, times in seconds.items():
            start = time.perf_counter()
            tokens.add(way(policy, prompts, [7] * options.reply, options))
            if number:
                times.append(time.perf_counter() - start)
                print(f"{way.__name__:<15} {times[-1]:6.1f} s", flush=True)
        assert len(tokens) == 1
    ratio = statistics.median(b / a for a, b in zip(*seconds.values()))
    print(f"prefilling again takes {ratio:.2f} times as long (median of {options.rounds} rounds)")


if __name__ == "__main__":
    main()
