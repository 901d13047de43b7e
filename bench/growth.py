"""What more costs: roll-outs of twice the prompts, group size or length, rows that have ended, and a large vocabulary.

    python bench/growth.py        two to three minutes on two cores

The bundled tiny model on the roll-out engine, without an end token, so that every completion has the same length; each
round times all cases, one after the other. Prints the seconds as ratios to the first case: median, least and greatest of
the rounds. Then the memory of a log-probability pass, measured in a process of its own (Linux).
"""

import argparse
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

CASES = {  # prompts, group, length, share of the rows that end half-way, slots
    "32 prompts x 8, 32 tokens": (32, 8, 32, 0.0, 256),
    "twice the prompts": (64, 8, 32, 0.0, 512),
    "twice the group": (32, 16, 32, 0.0, 512),
    "twice the length": (32, 8, 64, 0.0, 256),
    "four times the length": (32, 8, 128, 0.0, 256),
    "four times the prompts, through 256 slots": (128, 8, 32, 0.0, 256),
    "the same, three quarters of the rows end half-way": (128, 8, 32, 0.75, 256),
}


def time_cases(rounds: int) -> dict[str, list[float]]:
    """Seconds of each case by round."""
    import torch

    from data import load_questions
    from rl import rollout
    from rl.config import Config
    from rl.model import engine
    from rl.model.policy import load_policy
    from rl.model.sampling import Sampling

    class Ending(engine.Engine):
        """Rows of which a share ends half-way, evenly over the groups."""

        share = 0.0

        def leave(self, first, tokens, logprobs):
            half = self.max_completion_length // 2
            for slot, row in enumerate(self.rows[first:]):
                if len(row.ids) + 1 == half and row.place % 8 < 8 * self.share:
                    tokens[0, slot] = -1
            return super().leave(first, tokens, logprobs)

    policy = load_policy(Config(device="cpu"))
    policy.eos_ids = frozenset({-1})
    rows, _, _ = load_questions(["sums", "words"], [], 64, 2, {}, 0)
    random.Random(0).shuffle(rows)  # word problems are longer than sums
    prompts = policy.encode_prompts(rows, 128)
    rollout.Engine = Ending
    seconds = {name: [] for name in CASES}
    for round_ in range(rounds + 1):
        for name, (count, group, length, Ending.share, slots) in CASES.items():
            generator = torch.Generator().manual_seed(round_)
            started = time.perf_counter()
            rollout.rollout(policy, prompts[:count], group, length, Sampling(), generator, slots)
            if round_:  # the first one warms up
                seconds[name].append(time.perf_counter() - started)
    return seconds


def tokens_of(case: str) -> float:
    prompts, group, length, share, _ = CASES[case]
    return prompts * group * length * (1 - share / 2)


def measure_memory(tokens: int, vocabulary: int) -> dict[str, float]:
    """MB above the weights at the peak of a log-probability pass with its backward, in this process."""
    import peft
    import psutil
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from rl.model.decoder import Decoder
    from rl.model.logprobs import completion_logprobs
    from rl.model.policy import Policy
    from rl.run.folder import peak_memory_mb

    settings = Qwen3Config(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=4096,
    )  # fmt: skip
    model = peft.get_peft_model(Qwen3ForCausalLM(settings), peft.LoraConfig(r=4, target_modules="all-linear"))
    policy = Policy(
        model=model, tokenizer=None, device=torch.device("cpu"), dtype=torch.float32, eos_ids=frozenset({1}), pad_id=0,
        temperature=1.0, system_prompt=None, chat_template_kwargs={}, starts_from_adapter=False, decoder=Decoder(model),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(2, vocabulary, (8, tokens // 8), generator=generator).tolist()

    def learn(rows):
        logprobs, _, _ = completion_logprobs(policy, [[5, 6, 7]] * len(rows), rows, with_entropy=True)
        logprobs.mean().backward()

    learn([[8, 9]])  # what a first pass loads
    before = psutil.Process().memory_info().rss / 2**20
    started = time.perf_counter()
    learn(rows)
    return {"mb": peak_memory_mb(policy.device) - before, "seconds": time.perf_counter() - started}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory", nargs=2, type=int, metavar=("TOKENS", "VOCABULARY"), help="that measurement alone")
    args = parser.parse_args()
    if args.memory:
        found = measure_memory(*args.memory)
        print(f"{found['mb']:.0f} MB above the weights, {found['seconds']:.1f} s")
        return
    print(f"load at the start: {os.getloadavg()[0]:.1f}\n")
    seconds = time_cases(args.rounds)
    first = next(iter(CASES))
    print("| roll-out | s | time, ratio to the first | least | greatest | a token, ratio |\n" + "|---" * 6 + "|")
    for name, values in seconds.items():
        ratios = [value / one for value, one in zip(values, seconds[first])]
        per_token = statistics.median(ratios) * tokens_of(first) / tokens_of(name)
        print(
            f"| {name} | {statistics.median(values):.2f} | {statistics.median(ratios):.2f} | {min(ratios):.2f} | "
            f"{max(ratios):.2f} | {per_token:.2f} |"
        )
    command = [sys.executable, __file__, "--memory", "4096", "151936"]
    print("\nLog-probabilities of 4,096 tokens, 151,936 in the vocabulary, with backward: ", end="", flush=True)
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
