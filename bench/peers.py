"""What runs inside a peer's own environment: its trainer, timed part by part, at the beck and call of bench/step.py and learn.py.

Imports nothing of Ponder, for a peer's environment has none of what that needs; Ponder's own side (bench/sides.py) takes
from here what both sides must have in common: the channel, the rewards and how memory is measured.

A side gets its job as the first line of its input, answers what it is (versions, device), and then does what each further
line asks for. Between two requests it sleeps. TRL does all this from within `trainer.train()`, in a callback. Its subclass
here changes nothing; it only takes the time of `_generate` (tokenizing, generating, decoding), `_calculate_rewards`, and
the log-probabilities that are computed without a gradient. All else of a step is its update.

Unsloth's side has only been run on its CPU fallback.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import sys
import time
from collections import Counter

# Of continuous batching on a CPU, where it attends to the whole cache, and by default makes one of half the machine's memory
# and tries it for 40 s in each step. With this one 256 short answers of the tiny model took 2.3 s, with 1280 x 32 3.5 s.
SMALL_CACHE = {"block_size": 16, "num_blocks": 640, "max_batch_tokens": 256}


class Channel:
    """Requests and answers, one JSON line each. What libraries print goes to stderr instead."""

    def __init__(self):
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.job = self.next_request()

    def next_request(self) -> dict:
        line = sys.stdin.readline()
        if not line:  # the script has ended
            sys.exit()
        return json.loads(line)

    def answer(self, value) -> None:
        self.answers.write(json.dumps(value) + "\n")
        self.answers.flush()


def run_side(serve) -> None:
    """serve(channel) until the script ends; an error becomes the answer to the request that met it."""
    channel = Channel()
    try:
        serve(channel)
    except Exception as error:
        channel.answer({"error": " ".join(f"{type(error).__name__}: {error}".split())})
        raise


class CheapReward:
    """A reward that costs next to nothing, the same on both sides.

    coin: 0 or 1 with even chances, by a hash of seed, question, text and how often both have come before; without the last,
    equal completions would get equal rewards, and their groups teach nothing. task: 1 where the last box holds the answer.
    """

    def __init__(self, kind: str, seed: int):
        self.kind, self.seed, self.seen = kind, seed, Counter()

    def __call__(self, question: str, text: str, answer: str) -> float:
        if self.kind == "task":
            boxed = re.findall(r"\\boxed\{([^{}]*)\}", text)
            return float(bool(boxed) and boxed[-1].strip() == answer)
        self.seen[question, text] += 1
        drawn = f"{self.seed}\n{question}\n{text}\n{self.seen[question, text]}"
        return float(hashlib.sha256(drawn.encode()).digest()[0] & 1)


class Parts:
    """Seconds spent in each part of a step."""

    def __init__(self, device):
        self.device, self.seconds = device, {}

    def now(self) -> float:
        """The clock, when the GPU has done what was asked of it."""
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize()
        return time.perf_counter()

    @contextlib.contextmanager
    def time(self, part: str):
        start = self.now()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + self.now() - start


def memory_mb(device) -> dict[str, float]:
    """The most memory this process has had so far, in MB of 2^20 bytes; on a GPU what torch allocated and reserved there too."""
    import resource

    unit = 1 if platform.system() == "Darwin" else 1024
    peaks = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20}
    if device.type == "cuda":
        import torch

        peaks["allocated"] = torch.cuda.max_memory_allocated() / 2**20
        peaks["reserved"] = torch.cuda.max_memory_reserved() / 2**20
    return peaks


def versions(*packages: str) -> dict[str, str]:
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}


def load_model(job: dict):
    """The base model with the starting LoRA, trainable, and its tokenizer, as plain transformers and peft load them."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    model = AutoModelForCausalLM.from_pretrained(
        job["model"],
        dtype=dtype,
        device_map={"": 0 if torch.cuda.is_available() else "cpu"},
        quantization_config=quantization if job["load_in_4bit"] else None,
    )
    tokenizer = AutoTokenizer.from_pretrained(job["model"], padding_side="left")
    return PeftModel.from_pretrained(model, job["adapter"], is_trainable=True), tokenizer


def load_unsloth(job: dict):
    """The same by Unsloth: its CUDA graphs, packing and shared prefix are on by default; no vLLM, so no standby."""
    os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"  # nothing is fetched from the Hub
    os.environ["UNSLOTH_COMPILE_LOCATION"] = job["folder"] + "-compiled"  # the trainers that it writes
    from unsloth import FastLanguageModel  # before trl, whose trainers it replaces

    return FastLanguageModel.from_pretrained(
        job["adapter"],
        use_exact_model_name=True,
        max_seq_length=job["max_prompt"] + job["max_completion_length"],
        load_in_4bit=job["load_in_4bit"],
        fast_inference=False,
        use_gradient_checkpointing=False,  # memory is not short here, and it costs time
    )


def of_completions(
    rows: list[list[float]], prompts: list[list[int]], completions: list[list[int]]
) -> list[list[float]]:
    """What a trainer gave for completions, out of its rows for prompts of several lengths.

    TRL's rows begin with the completion. Unsloth's are wider by the most padding that a prompt had, which it has moved behind
    the row: a completion begins as many places later as its prompt is longer than the shortest one.
    """
    width, more = max(map(len, prompts)), len(rows[0]) - max(map(len, completions))
    firsts = [max(0, more - (width - len(prompt))) for prompt in prompts]
    return [row[first : first + len(c)] for row, first, c in zip(rows, firsts, completions)]


def serve_trainer(channel: Channel) -> None:
    """TRL's GRPOTrainer (or Unsloth's of that name), step by step as requests come in."""
    job = channel.job
    model, tokenizer = load_unsloth(job) if job["peer"] == "unsloth" else load_model(job)

    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    parts = Parts(model.device)
    generated = []  # completions of this step, as token ids

    class TimedTrainer(GRPOTrainer):
        def _generate(self, *arguments, **named):
            with parts.time("rollout"):
                result = super()._generate(*arguments, **named)
            generated.extend(result[1])
            return result

        def _calculate_rewards(self, *arguments, **named):
            with parts.time("scoring"):
                return super()._calculate_rewards(*arguments, **named)

        def _get_per_token_logps_and_entropies(self, *arguments, **named):
            with contextlib.nullcontext() if torch.is_grad_enabled() else parts.time("logprobs"):
                return super()._get_per_token_logps_and_entropies(*arguments, **named)

    rate = CheapReward(job["reward"], job["seed"])

    def cheap(completions, question, answer, **_):
        return [rate(*asked) for asked in zip(question, completions, answer)]

    class Requests(TrainerCallback):
        """Holds the trainer until a request lets it take steps."""

        def on_train_begin(self, *_, **__):
            self.wait()

        def on_step_end(self, *_, **__):
            now, tokens = parts.now(), sum(map(len, generated))
            step = now - self.started
            seconds = {part: parts.seconds.get(part, 0.0) for part in ("rollout", "scoring", "logprobs")}
            self.steps.append(
                seconds | {
                    "update": step - sum(seconds.values()), "step": step, "completions": len(generated),
                    "tokens": tokens, "trained_completions": len(generated), "trained_tokens": tokens,
                }
            )  # fmt: skip
            self.left -= 1
            self.begin_step()
            if not self.left:
                channel.answer({"steps": self.steps, "memory_mb": memory_mb(parts.device)})
                self.wait()

        def begin_step(self):
            generated.clear()
            parts.seconds.clear()
            self.started = parts.now()

        def wait(self):
            while True:
                request = channel.next_request()
                if request["do"] == "logprobs":
                    channel.answer(logprobs(request["prompts"], request["completions"]))
                elif request["do"] == "save":
                    trainer.model.save_pretrained(request["folder"])
                    channel.answer({})
                else:
                    self.left, self.steps = request["n"], []
                    return self.begin_step()

    @torch.no_grad()
    def logprobs(prompts, completions):
        """The trainer's own log-probabilities of completions, from rows padded as it pads them."""
        width, length = max(map(len, prompts)), max(map(len, completions))
        rows, mask = [], []
        for p, c in zip(prompts, completions):
            before, after = width - len(p), length - len(c)
            rows.append([tokenizer.pad_token_id] * before + p + c + [tokenizer.pad_token_id] * after)
            mask.append([0] * before + [1] * len(p + c) + [0] * after)
        ids, mask = (torch.tensor(x, device=parts.device) for x in (rows, mask))
        found = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, length)[0]
        return of_completions(found.tolist(), prompts, completions)

    on_gpu = parts.device.type == "cuda"
    config = GRPOConfig(
        output_dir=job["folder"], seed=job["seed"], use_cpu=not on_gpu, bf16=on_gpu,
        per_device_train_batch_size=job["micro_batch"],
        gradient_accumulation_steps=job["prompts_per_step"] * job["num_generations"] // job["micro_batch"],
        num_generations=job["num_generations"], max_completion_length=job["max_completion_length"],
        max_steps=job["max_steps"], learning_rate=job["learning_rate"], lr_scheduler_type="constant",
        loss_type="dapo", beta=0.0, num_iterations=1, scale_rewards="group", temperature=1.0, top_k=0, top_p=1.0,
        mask_truncated_completions=False, optim="adamw_torch", weight_decay=0.0, warmup_steps=0,  # Unsloth's defaults differ
        shuffle_dataset=False, gradient_checkpointing=False, save_strategy="no", logging_strategy="no", report_to="none",
        disable_tqdm=True, dataloader_pin_memory=on_gpu,
        use_transformers_continuous_batching=job["peer"] == "trl-cb",
        transformers_continuous_batching_config=None if on_gpu else SMALL_CACHE,
    )  # fmt: skip
    prompts, rows = job["prompts"], job["rows"]
    if tokenizer([p["text"] for p in prompts])["input_ids"] != [p["ids"] for p in prompts]:
        raise ValueError("its tokenizer gives other token ids for the same prompts")
    asked = [{"prompt": p["text"], "question": r["question"], "answer": r["answer"]} for p, r in zip(prompts, rows)]
    trainer = TimedTrainer(
        model=model, processing_class=tokenizer, reward_funcs=cheap, args=config, train_dataset=Dataset.from_list(asked),
        callbacks=[Requests()],
    )  # fmt: skip
    names = ("torch", "transformers", "peft", "trl") + (("unsloth",) if job["peer"] == "unsloth" else ())
    channel.answer({"versions": versions(*names), "device": parts.device.type})
    trainer.train()


if __name__ == "__main__":
    run_side(serve_trainer)
