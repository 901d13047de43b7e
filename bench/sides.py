"""What bench/step.py and bench/learn.py share: two trainers in processes of their own, and the arithmetic of a comparison.

A side is a process that holds its model and sleeps until it is asked for something, so that one works while the other does
not, with all cores. Ponder's side is this file, run as a module by the interpreter of the script; a peer's is
bench/peers.py in an environment of its own, `.venv-trl` or `.venv-unsloth` beside `.venv`, which is made on first use.
Imports no torch but in the sides, so that the script itself stays small.
"""

import importlib.util
import json
import os
import platform
import random
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

from bench.peers import Channel, CheapReward, Parts, memory_mb, run_side, versions
from data import load_questions

ROOT = Path(__file__).resolve().parent.parent
PROMPTS, GROUP, MAX_LENGTH = 32, 8, 96  # of a step, of a prompt, and in tokens of a completion
TRL = "torch==2.13.0 transformers==5.17.0 peft==0.21.2 accelerate==1.15.0 bitsandbytes==0.50.2 datasets==4.8.5 trl==1.16.0"
# Rows in one forward and backward pass of the peer: TRL's best. Its update of the tiny model took 6.1, 5.9, 6.8 and 11.8 s with
# 32, 64, 128 and 256 of them (medians of three steps, one thread each).
MICRO_BATCH = 64
UNSLOTH = "unsloth==2026.10.5 unsloth_zoo==2026.10.7 trl==1.15.0"
PEERS = {  # title, environment, packages
    "trl": ("TRL", ".venv-trl", TRL),
    "trl-cb": ("TRL, continuous batching", ".venv-trl", TRL),
    "unsloth": ("Unsloth", ".venv-unsloth", UNSLOTH),
}


class BenchError(Exception):
    """The comparison cannot go on. The message is one line."""


class Side:
    """One trainer, in a process of its own."""

    def __init__(self, name: str, command: list[str], job: dict, log: Path):
        self.name, self.log = name, log
        environment = {"OMP_NUM_THREADS": str(os.cpu_count())} | os.environ | {"HF_HUB_OFFLINE": "1"}
        started = time.perf_counter()
        with log.open("w") as errors:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors, "text": True}
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)
        self.about = self._say(job)
        self.loading = time.perf_counter() - started  # seconds: starting, importing, loading the model

    def ask(self, do: str, **arguments):
        return self._say({"do": do} | arguments)

    def _say(self, message: dict):
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        answer = json.loads(line) if line else {"error": self._last_words()}
        if isinstance(answer, dict) and "error" in answer:
            raise BenchError(f"{self.name}: {answer['error']}")
        return answer

    def _last_words(self) -> str:
        code = self.process.wait()
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return f"it ended with status {code}: {lines[-1] if lines else 'it printed nothing'}"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()


def start_ours(job: dict, folder: Path, name: str = "Ponder") -> Side:
    return Side(name, [sys.executable, "-m", "bench.sides"], job, folder / f"{name.lower()}.log")


def start_peer(job: dict, folder: Path, here: bool = False) -> Side:
    """here: the peer as it is installed beside Ponder, whatever its version."""
    name, environment, packages = PEERS[job["peer"]]
    package = job["peer"].removesuffix("-cb")
    if here and not importlib.util.find_spec(package):
        raise BenchError(f"{package} is not installed here: without --here it gets an environment of its own")
    python = sys.executable if here else make_environment(ROOT / environment, packages.split())
    return Side(name, [str(python), "-m", "bench.peers"], job, folder / "peer.log")


def make_environment(folder: Path, packages: list[str]) -> Path:
    """A virtual environment with these packages; its interpreter. Made anew where it lacks the mark that it is whole."""
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    mark = folder / "installed"
    if not mark.is_file() or mark.read_text().split() != packages:
        print(f"Setting up {folder.name}: {' '.join(packages)} ...", flush=True)
        options = ["--quiet", "--disable-pip-version-check", *shlex.split(os.environ.get("PIP_ARGS", ""))]
        for command in (
            [sys.executable, "-m", "venv", str(folder)],
            [str(python), "-m", "pip", "install", *options, *packages],
        ):
            done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
                raise BenchError(f"{folder.name} cannot be set up: {last} (PIP_ARGS are passed to pip)")
        mark.write_text("\n".join(packages) + "\n")
    return python


def has_gpu() -> bool:
    """Whether torch sees an NVIDIA GPU; asked in a process of its own."""
    question = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", question]).returncode == 0


def draw_rows(steps: int, seed: int, questions: int = 8) -> tuple[list[dict], list[dict]]:
    """Sums and word problems: the rows of so many steps in their order, and held-out ones."""
    train, held_out, _ = load_questions(["sums", "words"], [], 3000, questions, {}, seed)
    rng = random.Random(seed)
    rows = [row for _ in range(-(-steps * PROMPTS // len(train))) for row in rng.sample(train, len(train))]
    keep = ("id", "task", "prompt", "answer")
    slim = [[{k: row[k] for k in keep} for row in some] for some in (rows[: steps * PROMPTS], held_out)]
    return slim[0], slim[1]


def tiny_job(rows: list[dict], seed: int, max_steps: int, learning_rate: float) -> dict:
    """To teach the bundled model, from a fresh LoRA, to answer these rows."""
    return {
        "model": str(ROOT / "data/tiny"), "adapter": None, "load_in_4bit": False, "rows": rows, "reward": "task",
        "seed": seed, "prompts_per_step": PROMPTS, "num_generations": GROUP, "max_completion_length": MAX_LENGTH,
        "max_steps": max_steps, "learning_rate": learning_rate, "max_tokens_per_micro_batch": 4096,
    }  # fmt: skip


def peer_job(job: dict, ours: Side, peer: str, start: Path, folder: Path, micro_batch: int) -> dict:
    """The same job for a peer: with the prompts that our side made of the rows and the LoRA that it begins with."""
    ours.ask("save", folder=str(start))
    prompts = ours.about["prompts"]
    rows = [{"question": row["prompt"], "answer": row["answer"]} for row in job["rows"]]
    return job | {
        "peer": peer, "adapter": str(start), "prompts": prompts, "rows": rows, "micro_batch": micro_batch,
        "max_prompt": max(len(p["ids"]) for p in prompts), "folder": str(folder / "trainer"),
    }  # fmt: skip


# --- Ponder's side


class Ponder:
    """Our trainer: the steps of train.py, without its console line and its run folder (the peers log nothing either)."""

    def __init__(self, job: dict):
        from grading import Rewards, reward
        from rl.config import Config
        from rl.model.backends import import_backend

        self.config = config = Config(
            model=job["model"], adapter=job["adapter"], load_in_4bit=job["load_in_4bit"], seed=job["seed"],
            prompts_per_step=job["prompts_per_step"], num_generations=job["num_generations"],
            max_completion_length=job["max_completion_length"], max_steps=job["max_steps"],
            learning_rate=job["learning_rate"],
            max_tokens_per_micro_batch=job["max_tokens_per_micro_batch"], num_iterations=1, num_mini_batches=1, loss_type="dapo", beta=0.0,
        )  # fmt: skip
        config.check()
        import_backend(config)  # before what imports transformers

        from rl.advantages import Advantages
        from rl.model.policy import load_policy
        from rl.update import Updater

        rate = CheapReward(job["reward"], job["seed"])

        @reward
        def cheap(completion):
            return rate(completion.row["prompt"], completion.text, completion.row["answer"])

        self.rows, self.rewards = job["rows"], Rewards(Path(__file__), [cheap.reward])
        self.policy = load_policy(config)
        self.prompts = self.policy.encode_prompts(self.rows, config.max_completion_length)
        self.updater = Updater(self.policy, config)
        self.teacher = Advantages(self.policy, config, self.rewards)
        self.generator = self.new_generator()
        self.done = 0  # steps

    def new_generator(self):
        import torch

        return torch.Generator(self.policy.device).manual_seed(self.config.seed)

    def about(self) -> dict:
        texts = [self.policy.render_prompt(row["prompt"]) for row in self.rows]
        return {
            "versions": versions("torch", "transformers", "peft", *(["unsloth"] if self.policy.by_unsloth else [])),
            "device": self.policy.device.type,
            "dtype": str(self.policy.dtype).removeprefix("torch."),
            "prompts": [{"text": text, "ids": ids} for text, ids in zip(texts, self.prompts)],
        }

    def save(self, folder: str) -> dict:
        from rl.model.policy import save_adapter

        save_adapter(self.policy, Path(folder))
        return {}

    def steps(self, n: int) -> dict:
        steps = [self.step() for _ in range(n)]
        return {"steps": steps, "memory_mb": memory_mb(self.policy.device)}

    def step(self) -> dict:
        """One step: seconds of its parts, and how much was generated and trained on."""
        import torch

        first = self.done * self.config.prompts_per_step
        self.done += 1
        parts = Parts(self.policy.device)
        start = parts.now()
        with parts.time("rollout"):  # completions are scored as they end, so this holds most of the scoring too
            episodes, marking = self.roll_out(slice(first, first + self.config.prompts_per_step), self.generator)
        with parts.time("scoring"):
            completions, scores = marking.results()
        with parts.time("update"):
            rewards = torch.tensor([score.total for score in scores])
            self.updater.look(episodes)
            self.teacher.fill(episodes, rewards, completions, scores)
            self.updater.inspect(episodes)
            self.updater.update(episodes)
        seconds = parts.seconds | {"logprobs": 0.0, "step": parts.now() - start}  # the update needs no pass before it
        trained = [len(e.completion_ids) for e in episodes if e.advantages.any()]
        return seconds | {
            "completions": len(episodes), "tokens": sum(len(e.completion_ids) for e in episodes),
            "trained_completions": len(trained), "trained_tokens": sum(trained),
        }  # fmt: skip

    def roll_out(self, where: slice, generator, group: int = GROUP, temperature: float = 1.0):
        """Completions of these rows' prompts, and the marking that has begun to score them."""
        from rl.evaluate import Marking
        from rl.model.sampling import Sampling
        from rl.rollout import rollout

        marking = Marking(self.policy, self.rows[where], self.rewards, self.done)
        config = self.config
        episodes = rollout(
            self.policy, self.prompts[where], group, config.max_completion_length, Sampling(temperature), generator,
            config.rollout_batch_size, marking.add,
        )  # fmt: skip
        return episodes, marking

    def check(self) -> dict:
        """Completions of eight prompts, their log-probabilities by a plain forward pass for each row, and how far those of
        the roll-out and of the update are from them at the most."""
        episodes, _ = self.roll_out(slice(GROUP), self.new_generator(), group=1)
        _, inspected = self.updater.inspect(episodes)
        plain = [plain_logprobs(self.policy, e.prompt_ids, e.completion_ids) for e in episodes]
        return {
            "prompts": [e.prompt_ids for e in episodes],
            "completions": [e.completion_ids for e in episodes],
            "plain": plain,
            "off": {name: greatest_difference(plain, [row[name] for row in inspected]) for name in LOGPROBS},
        }

    def evaluate(self, folder: str) -> float:
        """The share of the rows that a saved LoRA answers right, greedily."""
        from rl.model.policy import reloaded_adapter

        with reloaded_adapter(self.policy, Path(folder)):
            _, marking = self.roll_out(slice(None), self.new_generator(), group=1, temperature=0.0)
            _, scores = marking.results()
        return sum(score.total for score in scores) / len(scores)


LOGPROBS = {"sampler_logprobs": "roll-out", "logprobs": "update"}  # what Updater.inspect calls them


def serve_ponder(channel: Channel) -> None:
    ponder = Ponder(channel.job)
    channel.answer(ponder.about())
    while True:
        request = channel.next_request()
        channel.answer(getattr(ponder, request.pop("do"))(**request))


def plain_logprobs(policy, prompt: list[int], completion: list[int]) -> list[float]:
    """Of a completion's tokens, by the model's own forward pass of this row alone, at temperature 1."""
    import torch

    ids = torch.tensor([prompt + completion], device=policy.device)
    with torch.no_grad():
        logprobs = policy.model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
    return logprobs.gather(1, ids[0, 1:, None]).squeeze(1)[len(prompt) - 1 :].tolist()


# --- arithmetic and output


def greatest_difference(some: list[list[float]], others: list[list[float]]) -> float:
    return max(abs(a - b) for x, y in zip(some, others, strict=True) for a, b in zip(x, y, strict=True))


def spread(values: list[float]) -> dict[str, float] | None:
    """Their median with the least and the greatest; None where there is nothing to compare."""
    if not values or None in values:
        return None
    return {"median": statistics.median(values), "least": min(values), "greatest": max(values)}


def show(found: dict[str, float] | None, digits: int = 2) -> str:
    if not found:
        return "–"
    return f"{found['median']:.{digits}f} ({found['least']:.{digits}f} to {found['greatest']:.{digits}f})"


def machine() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        processor = platform.processor() or platform.machine()
    return f"{os.cpu_count()} cores, {processor}, load {os.getloadavg()[0]:.1f} at the start"


def title(peer: str, versions: dict[str, str]) -> str:
    """A peer's name with its version."""
    return f"{PEERS[peer][0]} {versions[peer.removesuffix('-cb')]}"


def circumstances(machine: str, versions: dict[str, dict], peer: str) -> str:
    """Lines on what the figures depend on."""
    lines = [machine]
    for side, name in (("ours", "Ponder"), ("peer", peer)):
        lines.append(f"{name}: " + ", ".join(f"{package} {version}" for package, version in versions[side].items()))
    return "\n".join([*lines, "python " + shlex.join(sys.argv)])


def write_json(path: str, value: dict) -> None:
    unfinished = Path(path + ".unfinished")
    unfinished.write_text(json.dumps(value, indent=1) + "\n")
    unfinished.replace(path)


if __name__ == "__main__":
    run_side(serve_ponder)
