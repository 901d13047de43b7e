"""Ponder against another trainer, step by step, on the same model, LoRA, prompts and reward.

    python bench/step.py --peer trl                        the bundled tiny model
    python bench/step.py --peer unsloth --model qwen3-1.7b   random weights of that architecture; needs an NVIDIA GPU

Both sides take steps of 32 prompts x 8 completions of at most 96 tokens (8 x 8 of at most 256 with random weights, whose
lengths follow one geometric law, or with --lengths fixed are all 256), temperature 1, one AdamW step each: GRPO with the loss `dapo`, without a KL. They begin with the LoRA of a short run of train.py, in the middle of
which completions are longer than at its start; a small learning rate keeps them so. Rounds of a few steps alternate, the
side that begins too; a side at rest sleeps. First of all both must give the log-probabilities of a plain forward pass.

Every ratio is Ponder's advantage: more than 1 is better for Ponder, in time (peer / ours), in rates (ours / peer) and in
memory (peer / ours). It is that of a round's medians; what is shown is the median of the rounds with the least and the
greatest. Ponder's roll-out holds most of its scoring, for completions are scored as they end.

All cores are used, unless OMP_NUM_THREADS says otherwise. --peer none: Ponder alone. Not run yet: anything on a GPU, and so --peer unsloth.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import sides  # noqa: E402
from bench.sides import BenchError, spread  # noqa: E402

WARM_UP = 2  # steps of each side before the first round; the first of them is reported apart
SECONDS = {
    "rollout": "roll-out, s",
    "scoring": "scoring, s",
    "logprobs": "log-probabilities, s",
    "update": "update, s",
    "step": "**whole step, s**",
}
RATES = {"completions": "completions/s", "tokens": "generated tokens/s"}
# Of log-probabilities, nats, at the most: in 16 bits the rounding of single tokens is some hundredths.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.3, "float16": 0.3}

# The published shapes of Qwen3.
ARCHITECTURES = {
    "qwen3-0.6b": {"num_hidden_layers": 28, "hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 3072},
    "qwen3-1.7b": {"num_hidden_layers": 28, "hidden_size": 2048, "num_attention_heads": 16, "intermediate_size": 6144},
    "qwen3-4b": {"num_hidden_layers": 36, "hidden_size": 2560, "num_attention_heads": 32, "intermediate_size": 9728},
}
REHEARSAL = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "intermediate_size": 128,
    "head_dim": 16,
}
VOCABULARY, RANDOM_MAX_LENGTH, RANDOM_PROMPTS = 151_936, 256, 8  # of a step of 8 completions each
LENGTHS = {"varied": 128, "fixed": VOCABULARY}  # mean without the limit; fixed: one completion in 600 ends before it


def make_random_model(
    folder: str, name: str, vocabulary: int = VOCABULARY, mean_length: int = LENGTHS["varied"]
) -> None:
    """Random weights of an architecture, with a tokenizer of bytes, into a folder.

    Its next tokens are nearly uniform, so with vocabulary / mean_length of them as end-of-sequence tokens the lengths
    follow one geometric law on every side.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast, Qwen3Config

    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens += [f"~{i}" for i in range(len(tokens), vocabulary)]  # never made from a text, but each has one
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    ends = list(range(vocabulary - round(vocabulary / mean_length), vocabulary))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=tokens[ends[0]], pad_token=tokens[ends[0] - 1]
    ).save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"num_key_value_heads": 8, "head_dim": 128} | (ARCHITECTURES | {"rehearsal": REHEARSAL})[name]
    config = Qwen3Config(
        vocab_size=vocabulary, tie_word_embeddings=True, max_position_embeddings=40_960, eos_token_id=ends,
        pad_token_id=ends[0] - 1, **shape,
    )  # fmt: skip
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=ends[0] - 1)
    model.save_pretrained(folder)


def run_python(arguments: list[str], what: str) -> None:
    """A process of its own for what would make this one large."""
    print(f"{what} ...", flush=True)
    done = subprocess.run([sys.executable, *arguments], cwd=sides.ROOT, capture_output=True, text=True)
    if done.returncode:
        raise BenchError(f"{what}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")


def prepare_model(name: str, lengths: str, adapter: str | None, folder: Path, seed: int) -> dict:
    """The part of the job that says what to train from. adapter: a LoRA to start from, in place of one trained here."""
    if name == "rehearsal" or name in ARCHITECTURES:
        model = str(folder / name)
        sizes = (1000, 10) if name == "rehearsal" else (VOCABULARY, LENGTHS[lengths])
        code = f"from bench.step import make_random_model; make_random_model{(model, name, *sizes)}"
        run_python(["-c", code], f"Making random weights of {name}")
        if name == "rehearsal":  # of bench/gpu_check.py, on a CPU
            return {"model": model, "prompts_per_step": RANDOM_PROMPTS, "max_completion_length": 8}
        return {
            "model": model, "load_in_4bit": True, "prompts_per_step": RANDOM_PROMPTS,
            "max_completion_length": RANDOM_MAX_LENGTH, "max_tokens_per_micro_batch": 8192,
        }  # fmt: skip
    if not adapter:
        adapter = str(folder / "run/checkpoints/step_000010")
        settings = (
            f"--train-data sums words --max-steps 10 --lr-scheduler-type constant --seed {seed} --eval-questions 8"
        )
        quiet = "--eval-steps 0 --save-steps 0 --log-completions-steps 0"
        where = ["--model", name, "--output-dir", str(folder / "run")]
        run_python(["train.py", *where, *settings.split(), *quiet.split()], "Training the LoRA to start from, 10 steps")
    return {"model": str(Path(name).resolve()), "adapter": str(Path(adapter).resolve())}


def check_both(ours: sides.Side, peer: sides.Side) -> dict[str, float]:
    """How far log-probabilities are from those of a plain forward pass, in nats. Raises BenchError beyond the tolerance."""
    found = ours.ask("check")
    theirs = peer.ask("logprobs", prompts=found["prompts"], completions=found["completions"])
    off = {f"Ponder's {title}": found["off"][name] for name, title in sides.LOGPROBS.items()}
    off[peer.name] = sides.greatest_difference(found["plain"], theirs)
    tolerance = TOLERANCE[ours.about["dtype"]]
    for what, difference in off.items():
        if not difference <= tolerance:
            raise BenchError(f"{what}: log-probabilities are off by {difference:.2g} nats; {tolerance:g} is allowed")
    return off


def figures(steps: list[dict]) -> dict[str, float]:
    """Median seconds of a step's parts, and what was made in a second, over some steps."""
    seconds = sum(step["step"] for step in steps)
    rates = {name: sum(step[name] for step in steps) / seconds for name in (*RATES, "trained_tokens")}
    return {name: statistics.median(step[name] for step in steps) for name in SECONDS} | rates


def advantage(name: str, ours: float, peer: float) -> float | None:
    """How many times better ours is: above 1 Ponder is ahead. None where there is nothing to divide by."""
    better, worse = (ours, peer) if name in RATES else (peer, ours)
    return better / worse if worse else None


def compare(rounds: dict[str, list[list[dict]]], memory: dict[str, float]) -> dict:
    """What both sides did, and Ponder's advantage. rounds: a list of steps for each round, memory: MB, by side."""
    found = {"sides": {}}
    for side, by_round in rounds.items():
        steps = [step for one in by_round for step in one]
        completions = sum(step["completions"] for step in steps)
        found["sides"][side] = figures(steps) | {
            "memory": memory[side],
            "mean_length": sum(step["tokens"] for step in steps) / completions,
            "skipped": 1 - sum(step["trained_completions"] for step in steps) / completions,
        }
    by_round = list(zip(*([figures(steps) for steps in rounds[side]] for side in ("ours", "peer"))))
    spreads = {name: spread([advantage(name, o[name], p[name]) for o, p in by_round]) for name in (*SECONDS, *RATES)}
    spreads["memory"] = spread([advantage("memory", memory["ours"], memory["peer"])])
    found["ratio"] = {name: s and s["median"] for name, s in spreads.items()}
    return found | {"spread": spreads}


def report(found: dict, peer: str) -> str:
    """The table in Markdown, and who is ahead in what."""
    ours, theirs, spreads = found["sides"]["ours"], found["sides"]["peer"], found["spread"]
    lines = [
        f"| {found.get('prompts', sides.PROMPTS)} x {sides.GROUP} completions a step | Ponder | {peer} | ratio (least to greatest round) |",
        "|---|---|---|---|",
    ]
    titles = {**SECONDS, **RATES, "memory": "peak memory, MB"}
    for name, title in titles.items():
        digits = 3 if name in SECONDS else 0
        ratio = f"{spreads['memory']['median']:.2f}" if name == "memory" else sides.show(spreads[name])
        lines.append(f"| {title} | {ours[name]:,.{digits}f} | {theirs[name]:,.{digits}f} | {ratio} |")
    behind = [name for name, ratio in found["ratio"].items() if ratio is not None and ratio < 1]
    lines += [
        "",
        f"{peer} is ahead in: {', '.join(titles[name].strip('*') for name in behind) or 'nothing that is measured here'}",
    ]
    for name, side in (("Ponder", ours), (peer, theirs)):
        lines.append(
            f"{name}: {side['mean_length']:.1f} tokens a completion, {100 * side['skipped']:.1f} % of the completions skipped "
            f"in the update, {side['trained_tokens']:,.0f} trained tokens/s"
        )
    return "\n".join(lines)


def alone(args, job: dict, folder: Path) -> dict:
    """Ponder's figures where there is no peer."""
    with sides.start_ours(job, folder) as ours:
        off = {f"Ponder's {title}": ours.ask("check")["off"][name] for name, title in sides.LOGPROBS.items()}
        cold = {"loading": ours.loading, "first_step": ours.ask("steps", n=WARM_UP)["steps"][0]["step"]}
        done = ours.ask("steps", n=args.rounds * args.steps)
    found = figures(done["steps"])
    return {
        "sides": {"ours": found},
        "ratio": {},
        "off_by": off,
        "cold": {"ours": cold},
        "memory_mb": done["memory_mb"],
    }


def measure(args, folder: Path) -> dict:
    """The whole comparison."""
    start_of_all = sides.machine()
    total = WARM_UP + args.rounds * args.steps
    rows, _ = sides.draw_rows(total, args.seed)
    job = sides.tiny_job(rows, args.seed, total, 1e-6) | prepare_model(
        args.model, args.lengths, args.adapter, folder, args.seed
    )
    job["reward"] = args.reward
    if args.peer == "none":
        return alone(args, job, folder)
    with sides.start_ours(job, folder) as ours:
        micro_batch = min(args.micro_batch, job["prompts_per_step"] * job["num_generations"])
        theirs = sides.peer_job(job, ours, args.peer, folder / "start", folder, micro_batch)
        with sides.start_peer(theirs, folder, args.here) as peer:
            off = check_both(ours, peer)
            both = {"ours": ours, "peer": peer}
            cold = {side: {"loading": both[side].loading} for side in both}
            for side in both:
                cold[side]["first_step"] = both[side].ask("steps", n=1)["steps"][0]["step"]
            for side in both:
                both[side].ask("steps", n=WARM_UP - 1)
            rounds, peaks = {side: [] for side in both}, {}
            for number in range(args.rounds):
                for side in ("ours", "peer") if number % 2 == 0 else ("peer", "ours"):
                    done = both[side].ask("steps", n=args.steps)
                    rounds[side].append(done["steps"])
                    peaks[side] = done["memory_mb"]
            about = {side: both[side].about for side in both}
    headline = "allocated" if about["ours"]["device"] == "cuda" else "process"
    found = compare(rounds, {side: peaks[side][headline] for side in peaks})
    return found | {
        "off_by": off, "cold": cold, "memory_mb": peaks, "machine": start_of_all, "seed": args.seed, "rounds": rounds,
        "device": about["ours"]["device"], "versions": {side: about[side]["versions"] for side in about},
        "prompts": job["prompts_per_step"], "command": sys.argv,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=[*sides.PEERS, "none"], default="trl")
    parser.add_argument(
        "--here", action="store_true", help="the peer as it is installed here, not in a .venv of its own"
    )
    parser.add_argument("--lengths", choices=LENGTHS, default="varied", help="of what random weights write")
    parser.add_argument("--model", default="data/tiny", help=f"a folder, or {', '.join(ARCHITECTURES)}: random weights")
    parser.add_argument(
        "--adapter", metavar="FOLDER", help="the LoRA to start from; without it one is trained, 10 steps"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="of each side in a round")
    parser.add_argument("--reward", choices=("coin", "task"), default="coin", help="coin: nothing can be skipped by us")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--micro-batch", type=int, choices=(1, 2, 4, 8, 16, 32, 64, 128, 256), default=sides.MICRO_BATCH
    )
    parser.add_argument("--json", metavar="FILE", help="write all of it; more than 1 in `ratio` is better for Ponder")
    args = parser.parse_args()
    try:
        if (args.peer == "unsloth" or args.model in ARCHITECTURES) and not sides.has_gpu():
            what = "--peer unsloth" if args.peer == "unsloth" else f"--model {args.model}"
            raise BenchError(f"{what} needs an NVIDIA GPU, and torch sees none here: use --peer trl --model data/tiny")
        with tempfile.TemporaryDirectory() as folder:
            try:
                found = measure(args, Path(folder))
            except BenchError:
                for log in Path(folder).glob("*.log"):  # in which the traceback is
                    print(f"{log.name}:", *log.read_text(errors="replace").splitlines()[-20:], sep="\n")
                raise
    except BenchError as error:
        sys.exit(f"error: {error}")
    if args.json:
        sides.write_json(args.json, found)
    if args.peer == "none":
        return print(found)
    peer = sides.title(args.peer, found["versions"]["peer"])
    print("\n" + report(found, peer))
    for side, name in (("ours", "Ponder"), ("peer", peer)):
        cold = found["cold"][side]
        print(f"{name}, cold: {cold['loading']:.1f} s until loaded, {cold['first_step']:.2f} s for the first step")
    print("log-probabilities off by, nats: " + ", ".join(f"{who} {off:.1e}" for who, off in found["off_by"].items()))
    print(sides.circumstances(f"{found['machine']}; {found['device']}; seed {args.seed}", found["versions"], peer))


if __name__ == "__main__":
    main()
