"""Compare Ponder with another trainer: time and memory of the same training step, measured in interleaved rounds.

    python bench/vs_peer.py                                            TRL, with the bundled tiny model
    python bench/vs_peer.py --model smollm2 --prompts 8                a pretrained model (python -m data get smollm2)
    python bench/vs_peer.py --random-weights Qwen/Qwen3-1.7B           4-bit weights, on a GPU
    python bench/vs_peer.py --until 80                                 time until 80 % of the completions are right
    .venv-unsloth-cpu/bin/python bench/vs_peer.py --peer unsloth       Unsloth, or its CPU fallback

The trainers run in two processes with the same packages and number of threads; while one works, the other waits. They
use the same model and LoRA, prompts, group size, length limit, sampling, reward and loss (GRPO with `dapo`, no KL, one
AdamW step per roll-out), and their log-probabilities are compared first. On the tiny model they start from a LoRA that
train.py has trained for 10 steps, since its completions are longer; a tiny learning rate keeps their length constant.
TRL is in requirements-dev.txt, Unsloth in the environment of `make test-unsloth`.

Ratios are peer / Ponder: above 1 is better for Ponder. A round's figure is the median of its steps; the table has the
median of the rounds and, for ratios, the lowest and highest round. Ponder's steps are those of train.py without logs.
Their roll-out time includes scoring, since completions are scored as they end; the peer's scoring (about 1 ms) is part
of its update time.
"""

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import platform
import random
import re
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import rl  # noqa: E402, F401, I001  (before torch)
import torch  # noqa: E402

from bench.memory import run  # noqa: E402
from data import QuestionSampler, load_questions  # noqa: E402
from grading import Rewards, reward  # noqa: E402
from rl.config import Config  # noqa: E402
from rl.model.backends import choose_device, choose_dtype, import_backend  # noqa: E402

WARM_UP = 2  # steps of each trainer before the first round
MICRO_BATCH = 64  # rows of the peer's forward passes; of 32, 64, 128 and 256, the fastest for TRL on two cores
FIGURES = {  # key: title
    "rollout": "roll-out, s",
    "update": "update, s",
    "step": "step, s",
    "memory": "memory, MB",
    "tokens": "tokens",
}
SHARED_SETTINGS = {  # the peer's settings that equal Ponder's; Unsloth's defaults differ from TRL's
    "loss_type": "dapo", "beta": 0.0, "num_iterations": 1, "scale_rewards": "group", "mask_truncated_completions": False,
    "temperature": 1.0, "top_k": 0, "top_p": 1.0, "optim": "adamw_torch", "weight_decay": 0.0, "warmup_steps": 0,
    "lr_scheduler_type": "constant", "gradient_checkpointing": False, "shuffle_dataset": False, "save_strategy": "no",
    "logging_strategy": "no", "report_to": "none", "disable_tqdm": True,
}  # fmt: skip


def is_right(text: str, answer: str) -> float:
    """Return the reward of both trainers: 1 if the last box of the text contains the answer."""
    boxed = re.findall(r"\\boxed\{([^{}]*)\}", text)
    return float(bool(boxed) and boxed[-1].strip() == answer)


def now(device) -> float:
    """Return the time in seconds after waiting for the GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class Ponder:
    def __init__(self, settings: dict):
        start = time.perf_counter()
        self.config = Config(**settings)
        self.config.check()
        import_backend(self.config)  # Unsloth has to be imported before transformers
        from rl.advantages import Advantages
        from rl.model.policy import load_policy
        from rl.update import Updater

        @reward
        def boxed_answer(completion):
            return is_right(completion.text, completion.row["answer"])

        rows, _, _ = load_questions(self.config)
        self.policy = load_policy(self.config)
        self.rewards = Rewards(Path(__file__), [boxed_answer.reward])
        questions = self.policy.encode(rows)
        self.questions = QuestionSampler(questions, 0, self.config.seed)
        num_questions = self.config.max_steps * self.config.prompts_per_step
        self.order = QuestionSampler(questions, 0, self.config.seed).take(num_questions, 1)  # for all steps
        self.advantages = Advantages(self.policy, self.rewards, self.config)
        self.updater = Updater(self.policy, None, self.config)
        self.generator = torch.Generator(self.policy.device).manual_seed(self.config.seed)
        self.steps_done = 0
        self.load_seconds = time.perf_counter() - start

    def step(self) -> dict[str, float]:
        """Train for one step and return its figures: FIGURES and the accuracy."""
        from rl.rollout import collect
        from rl.run.monitor import peak_memory_mb

        device = self.policy.device
        self.steps_done += 1
        start = now(device)
        episodes = collect(self.policy, self.questions, self.rewards, self.generator, self.config, self.steps_done)
        rollout_end = now(device)
        self.advantages.compute(episodes)
        self.updater.update(episodes)
        end = now(device)
        return {
            "rollout": rollout_end - start,
            "update": end - rollout_end,
            "step": end - start,
            "memory": peak_memory_mb(device),
            "tokens": sum(len(episode.completion_ids) for episode in episodes),
            "accuracy": statistics.fmean(episode.score.total for episode in episodes),
        }

    def sample(self) -> tuple[list[int], list[list[int]], list[float]]:
        """Return a prompt, eight completions of it, and the log-probabilities of all their tokens."""
        from rl.model.sampling import Sampling
        from rl.rollout import rollout
        from rl.run.checks import check_sampler

        check_sampler(self.policy, self.order)  # roll-out, update and the model's own forward pass must agree
        prompt = self.order[0].prompt_ids
        generator = torch.Generator(self.policy.device).manual_seed(self.config.seed)
        episodes = rollout(self.policy, [prompt], 8, self.config.max_completion_length, Sampling(), generator, 8)
        logprobs = [value for episode in episodes for value in episode.sampler_logprobs]
        return prompt, [episode.completion_ids for episode in episodes], logprobs


class Peer:
    """The GRPOTrainer of TRL or Unsloth, in a second process, which trains one step per request."""

    def __init__(self, *job):
        start = time.perf_counter()
        processes = multiprocessing.get_context("spawn")
        self.pipe, other_end = processes.Pipe()
        processes.Process(target=train_peer, args=(*job, other_end), daemon=True).start()
        other_end.close()
        self.logprobs = self.receive()
        self.load_seconds = time.perf_counter() - start

    def step(self) -> dict[str, float]:
        """Train for one step and return its figures: FIGURES and the accuracy."""
        self.pipe.send("step")
        return self.receive()

    def receive(self):
        """Wait for a message of the peer. Exits if the peer has failed."""
        try:
            return self.pipe.recv()
        except EOFError:
            sys.exit("error: the peer has failed: its error is printed above")


def load_peer(peer: str, config: Config, adapter: str, length: int):
    """Load the base model with the LoRA in `adapter`, and the tokenizer. length: maximum length of a text in tokens."""
    device = choose_device(config)
    dtype = choose_dtype(config, device)
    if peer == "unsloth":  # with its defaults: CUDA graphs, packing and shared prefix
        os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"  # otherwise it downloads a file from the Hub
        os.environ["UNSLOTH_COMPILE_LOCATION"] = f"{adapter}-compiled"
        from unsloth import FastLanguageModel  # must be imported before trl, whose trainers it replaces

        options = {"dtype": dtype, "load_in_4bit": config.load_in_4bit, "use_gradient_checkpointing": False}
        return FastLanguageModel.from_pretrained(adapter, max_seq_length=length, use_exact_model_name=True, **options)
    from peft import PeftModel
    from transformers import AutoTokenizer

    from rl.model.policy import load_with_transformers

    model = PeftModel.from_pretrained(load_with_transformers(config, device, dtype), adapter, is_trainable=True)
    return model, AutoTokenizer.from_pretrained(config.model, padding_side="left")


def train_peer(peer: str, config: Config, adapter: str, prompts: list[tuple], sample: tuple, pipe) -> None:
    """Run the peer: send the log-probabilities of the sample, then train one step and send its figures per message.

    Args:
        adapter: Folder of the initial LoRA.
        prompts: Text, token ids and answer of the prompts of all steps.
        sample: A prompt and completions of it, as token ids.
    """
    max_prompt_length = max(len(ids) for _, ids, _ in prompts)
    model, tokenizer = load_peer(peer, config, adapter, max_prompt_length + config.max_completion_length)

    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from rl.run.monitor import peak_memory_mb

    device = model.device
    rows_per_step = config.prompts_per_step * config.num_generations

    class TimedTrainer(GRPOTrainer):
        """Measures the time of `_generate`, the roll-out; the rest of a step counts as update."""

        def _generate(self, *args, **kwargs):
            start = now(device)
            result = super()._generate(*args, **kwargs)
            self.figures["rollout"] += now(device) - start
            self.figures["tokens"] += sum(map(len, result[1]))
            return result

    class StepByStep(TrainerCallback):
        """Sends the log-probabilities at the start, waits for a message before each step, and sends its figures."""

        def on_train_begin(self, *_, **__):
            prompt, completions = sample
            length = max(map(len, completions))
            padding = [length - len(ids) for ids in completions]
            rows = [prompt + ids + [tokenizer.pad_token_id] * n for ids, n in zip(completions, padding)]
            mask = [[1] * (len(prompt) + length - n) + [0] * n for n in padding]
            tensors = (torch.tensor(x, device=device) for x in (rows, mask))
            with torch.no_grad():
                logprobs = trainer._get_per_token_logps_and_entropies(trainer.model, *tensors, length)[0].tolist()
            pipe.send([value for row, ids in zip(logprobs, completions) for value in row[: len(ids)]])

        def on_step_begin(self, *_, **__):
            try:
                pipe.recv()
            except EOFError:  # the main process has ended
                sys.exit()
            trainer.figures = {"rollout": 0.0, "tokens": 0, "accuracy": 0.0}
            self.start = now(device)

        def on_step_end(self, *_, **__):
            step = now(device) - self.start
            update = step - trainer.figures["rollout"]
            pipe.send(trainer.figures | {"update": update, "step": step, "memory": peak_memory_mb(device)})

    coin = random.Random(config.seed)

    def reward(completions, answer, **_):
        rewards = [is_right(*pair) for pair in zip(completions, answer)]
        trainer.figures["accuracy"] += sum(rewards) / rows_per_step
        return [float(coin.getrandbits(1)) for _ in rewards] if config.control == "random-reward" else rewards

    texts, ids, answers = map(list, zip(*prompts))
    if tokenizer(texts)["input_ids"] != ids:
        raise ValueError("the peer's tokenizer returns different token ids for the same prompts")
    names = ("seed", "num_generations", "max_completion_length", "max_steps", "learning_rate")
    settings = GRPOConfig(
        output_dir=f"{adapter}-trainer",
        use_cpu=device.type == "cpu",
        bf16=choose_dtype(config, device) == torch.bfloat16,
        dataloader_pin_memory=device.type == "cuda",
        per_device_train_batch_size=min(MICRO_BATCH, rows_per_step),
        gradient_accumulation_steps=max(1, rows_per_step // MICRO_BATCH),
        **{name: getattr(config, name) for name in names},
        **SHARED_SETTINGS,
    )
    data = Dataset.from_dict({"prompt": texts, "answer": answers})
    trainer = TimedTrainer(model, reward, settings, data, processing_class=tokenizer, callbacks=[StepByStep()])
    trainer.train()


def make_settings(args: argparse.Namespace, folder: str) -> dict:
    """Return Ponder's settings, and create the random weights or the initial LoRA that they name in the folder."""
    settings = {"train_data": ["sums", "words"], "eval_questions": 8, "seed": args.seed, "model": args.model}
    settings |= {"max_steps": WARM_UP + args.rounds * args.steps, "max_completion_length": args.max_completion_length}
    settings |= {"prompts_per_step": args.prompts, "num_generations": args.generations, "dtype": args.dtype}
    settings["max_tokens_per_micro_batch"] = 8192 if args.random_weights else 4096
    if args.until:
        return settings | {"learning_rate": 2e-3}
    settings |= {"learning_rate": 1e-6, "control": "random-reward" if args.reward == "coin" else "none"}
    if args.random_weights:
        model = f"{folder}/model"
        run("-c", f"from bench.memory import *; make_random_model({args.random_weights!r}, {model!r}, 128)")
        sizes = {"prompts_per_step": 8, "max_completion_length": 256, "load_in_4bit": torch.cuda.is_available()}
        return settings | sizes | {"model": model}
    if args.model != "data/tiny":
        return settings | {"max_tokens_per_micro_batch": 1024, "rollout_batch_size": 128}
    options = "--max-steps 10 --lr-scheduler-type constant --eval-questions 8 --eval-steps 0 --train-data sums words"
    run("train.py", *options.split(), "--output-dir", f"{folder}/run", "--seed", str(args.seed))
    return settings | {"adapter": f"{folder}/run/checkpoints/step_000010"}


def start(args: argparse.Namespace, folder: str) -> tuple[Ponder, Peer, float]:
    """Start both trainers. Returns them and their largest log-probability difference in nats; exits if too large."""
    ponder = Ponder(make_settings(args, folder))
    ponder.policy.model.save_pretrained(folder, selected_adapters=["default"])
    render = ponder.policy.render_prompt
    prompts = [(render(q.row["prompt"]), q.prompt_ids, q.row["answer"]) for q in ponder.order]
    *sample, logprobs = ponder.sample()
    peer = Peer(args.peer, ponder.config, folder, prompts, sample)
    difference = (torch.tensor(logprobs) - torch.tensor(peer.logprobs)).abs().max().item()
    tolerance = 1e-4 if ponder.policy.dtype == torch.float32 else 0.3  # in 16 bits, single tokens differ by hundredths
    if not difference <= tolerance:
        sys.exit(f"error: log-probabilities differ by {difference:.2g} nats; at most {tolerance:g} is allowed")
    return ponder, peer, difference


def summarize(steps: list[dict]) -> dict[str, float]:
    """Return the median over the steps of each figure; for the memory, the maximum."""
    medians = {name: statistics.median(step[name] for step in steps) for name in FIGURES}
    return medians | {"memory": max(step["memory"] for step in steps)}


def compare(rounds: dict[str, list[list[dict]]]) -> dict:
    """Return the figures of both trainers, and ratios. rounds: figures by trainer, round and step."""
    sides = {side: summarize([step for steps in by_round for step in steps]) for side, by_round in rounds.items()}
    pairs = [(summarize(ours), summarize(peer)) for ours, peer in zip(rounds["ours"], rounds["peer"])]
    spread = {}
    for name in FIGURES:
        ratios = [peer[name] / ours[name] for ours, peer in pairs]
        spread[name] = {"median": statistics.median(ratios), "least": min(ratios), "greatest": max(ratios)}
    return {"sides": sides, "ratio": {name: spread[name]["median"] for name in FIGURES}, "spread": spread}


def steps_until(goal: float, steps: list[dict]) -> dict[str, float] | None:
    """Return the number of steps until one reaches this accuracy, and their total seconds; None if none does."""
    number = next((n for n, step in enumerate(steps, 1) if step["accuracy"] >= goal), None)
    return number and {"steps": number, "seconds": sum(step["step"] for step in steps[:number])}


def report(result: dict) -> str:
    """Return the table in Markdown, with the machine, command, versions and cold-start times below it."""
    lines = [f"| | Ponder | {result['peer']} | ratio (lowest to highest round) |", "|---|---|---|---|"]
    for name, title in FIGURES.items():
        digits = 0 if name in ("memory", "tokens") else 3
        ours, theirs = (f"{result['sides'][side][name]:,.{digits}f}" for side in ("ours", "peer"))
        ratio = "{median:.2f} ({least:.2f} to {greatest:.2f})".format(**result["spread"][name])
        lines.append(f"| {title} | {ours} | {theirs} | {ratio} |")
    lines += ["", f"{result['machine']}, {result['device']}; seed {result['seed']}; {shlex.join(result['command'])}"]
    versions = ", ".join(map(" ".join, result["versions"].items()))
    lines.append(f"{versions}; log-probabilities differ by at most {result['off_by']:.1e} nats")
    for side, cold in result["cold"].items():
        name = "Ponder" if side == "ours" else result["peer"]
        lines.append(
            f"{name}, cold start: {cold['loading']:.1f} s to load, {cold['first_step']:.1f} s for the first step"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=("trl", "unsloth"), default="trl")
    parser.add_argument("--model", default="data/tiny")
    parser.add_argument(
        "--random-weights", metavar="NAME", help="random weights in the shape of a model of models.json"
    )
    parser.add_argument("--reward", choices=("coin", "task"), default="coin", help="coin: random, no group is skipped")
    parser.add_argument("--until", type=float, metavar="PERCENT", help="train until this share of answers is right")
    parser.add_argument("--prompts", type=int, default=32, help="prompts per step")
    parser.add_argument("--generations", type=int, default=8, help="completions of each prompt")
    parser.add_argument("--max-completion-length", type=int, default=96)
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of both trainers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="steps per trainer and round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="write all figures to this file")
    args = parser.parse_args()
    args.model = {"smollm2": "data/smollm2"}.get(args.model, args.model)
    if args.prompts * args.generations > MICRO_BATCH and args.prompts * args.generations % MICRO_BATCH:
        parser.error(f"--prompts x --generations must be a multiple of {MICRO_BATCH}, the peer's rows at a time")
    os.environ["HF_HUB_OFFLINE"] = "1"
    machine = f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start"
    with tempfile.TemporaryDirectory() as folder:
        ponder, peer, difference = start(args, folder)
        sides = {"ours": ponder, "peer": peer}
        warm_up = {side: [trainer.step() for _ in range(WARM_UP)] for side, trainer in sides.items()}
        rounds = {"ours": [], "peer": []}
        for number in range(args.rounds):
            for side in ("ours", "peer") if number % 2 == 0 else ("peer", "ours"):
                rounds[side].append([sides[side].step() for _ in range(args.steps)])
    packages = sorted({"torch", "transformers", "peft", "trl", args.peer})
    versions = {name: importlib.metadata.version(name) for name in packages}
    result = compare(rounds) | {
        "peer": f"{args.peer} {versions[args.peer]}",
        "off_by": difference,
        "cold": {s: {"loading": sides[s].load_seconds, "first_step": warm_up[s][0]["step"]} for s in sides},
        "machine": machine,
        "device": ponder.policy.device.type,
        "seed": args.seed,
        "versions": versions,
        "rounds": rounds,
        "command": sys.argv,
    }
    print(report(result))
    if args.until:
        result["until"] = {s: steps_until(args.until / 100, sum(rounds[s], warm_up[s])) for s in sides}
        print(f"{args.until:g} % of the completions are right: {result['until']}")
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
