"""What the parts of bench/gpu_check.py do: each function is given the part's Notes and writes its figures into them.

Nothing here is measured in the process of the part: each run, and each pair of a backend and a dtype, has one of its own,
since Unsloth patches transformers for good. In a rehearsal the same is done on the CPU, with models and runs as small as can
be, and without Unsloth.
"""

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import memory as memory_bench  # noqa: E402
from bench.gpu_check import Failed, Notes, NotRun, kill_tree  # noqa: E402
from bench.sides import plain_logprobs  # noqa: E402
from data import load  # noqa: E402

GB = 2**30
MARK = "@figures "  # begins a line that a process writes for the part that started it
SHAPES = ("Qwen/Qwen3-0.6B", "Qwen/Qwen2.5-0.5B")  # of random weights, beside the tiny model
ROWS, TOKENS = 8, 32  # of the comparison with fp32
ENGINE_OFF = 0.05  # nats in the mean, of the sampler's log-probabilities against fp32
ACCURACY = 0.95  # greedy, of the main job
PREDICTED = 0.85, 1.15  # predicted peak / measured peak
SMALL = (
    "--device cpu --backend transformers --no-load-in-4bit --max-steps 2 --prompts-per-step 2 --num-generations 2 "
    "--max-completion-length 12 --eval-questions 2 --eval-steps 0 --save-steps 1 --train-questions 20 --num-mini-batches 1 "
    "--optim adamw_torch --critic-warmup-steps 0 --soft-punish-cache 0 --dtype float32"
).split()


def run(arguments: list[str], seconds: float | None = None, on_figures=None) -> list[str]:
    """Run Python with these arguments, and show what it prints: the lines. on_figures is given those that are marked.

    Raises Failed where it ends with an error, or is killed after so many seconds.
    """
    process = subprocess.Popen(
        [sys.executable, "-u", *arguments], cwd=ROOT, text=True, errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )  # fmt: skip
    late = threading.Event()

    def stop():
        late.set()
        kill_tree(process)

    timer = threading.Timer(seconds or 86400, stop)
    timer.daemon = True
    timer.start()
    lines = []
    for line in process.stdout:
        if line.startswith(MARK):
            on_figures(json.loads(line.removeprefix(MARK)))
            continue
        print(line, end="", flush=True)
        if line.strip():
            lines.append(line.strip())
    process.wait()
    timer.cancel()
    if late.is_set():
        raise Failed(f"{seconds:.0f} s were not enough", lines)
    if process.returncode:
        raise Failed((lines or [f"it ended with status {process.returncode}"])[-1], lines)
    return lines


def ask(function: str, on_figures=None, seconds: float | None = None, **arguments) -> list[str]:
    """Call a function of this file in a process of its own, which gives its figures by `tell`: the lines it printed."""
    return run(["-m", "bench.gpu_parts", function, json.dumps(arguments)], seconds, on_figures)


def tell(**figures) -> None:
    print(MARK + json.dumps(figures), flush=True)


def make_model(name: str, folder: Path) -> str:
    """Random weights with the tiny model's tokenizer; where they are."""
    path = folder / name.split("/")[-1]
    run(["bench/memory.py", "--make", name, str(path)])
    return str(path)


# --- sampler


def sampler(notes: Notes) -> None:
    """Sampler, trainer and own forward with noise in the LoRA, and the sampler against fp32, row by row."""
    shapes = ("rehearsal",) if notes.rehearsal else SHAPES
    pairs = [(dtype, backend) for dtype in ("bfloat16", "float16") for backend in ("unsloth", "transformers")]
    if notes.rehearsal:
        pairs = [("float32", "transformers")]
    with tempfile.TemporaryDirectory() as folder:
        models = [str(ROOT / "data/tiny"), *(make_model(name, Path(folder)) for name in shapes)]
        written = []

        def compared(found):
            name = Path(found["model"]).name
            what = f"{name}, {found['backend']}, {found['dtype']}"
            written.append(found.pop("rows") | {"model": found["model"], "what": what})
            notes.row("Mean differences of log-probabilities, nats a token", **found | {"model": name})
            for path in ("sampler", "own_forward"):
                allowed = 0.05 * max(found["shift"], 1)  # as rl/checks.py has it
                notes.check(f"{what}: {path}", found[path], at_most=allowed)

        for dtype, backend in pairs:
            with notes.attempt(f"{backend}, {dtype}"):
                ask("agree", compared, 150, models=models, dtype=dtype, backend=backend, in_4bit=not notes.rehearsal)

        def referred(found):
            notes.row("The sampler against fp32, row by row, nats a token", **found)
            notes.check(f"{found['what']}: sampler against fp32", found["mean"], at_most=ENGINE_OFF)

        rows = Path(folder, "rows.json")
        rows.write_text(json.dumps(written))
        with notes.attempt("the fp32 forward"):
            ask("refer", referred, 120, rows=str(rows), in_4bit=not notes.rehearsal)


def agree(models: list[str], dtype: str, backend: str, in_4bit: bool) -> None:
    """Compare the paths on each model, and write a few completions with what the sampler says of them."""
    from rl.config import Config
    from rl.model.backends import import_backend

    config = Config(dtype=dtype, backend=backend, load_in_4bit=in_4bit)
    import_backend(config)  # before what imports transformers

    import torch

    from rl.checks import PROMPTS, compare
    from rl.model.policy import load_policy
    from rl.model.sampling import Sampling
    from rl.rollout import rollout

    for config.model in models:
        policy = load_policy(config)
        prompts = policy.encode_prompts(load("sums", ROWS), 64)
        found = vars(compare(policy, prompts[:PROMPTS], 16))
        generator = torch.Generator(policy.device).manual_seed(0)
        episodes = rollout(policy, prompts, 1, TOKENS, Sampling(), generator, ROWS)
        rows = {
            "prompts": [e.prompt_ids for e in episodes], "completions": [e.completion_ids for e in episodes],
            "logprobs": [e.sampler_logprobs for e in episodes],
        }  # fmt: skip
        tell(model=config.model, backend=backend, dtype=dtype, **found, rows=rows)


def refer(rows: str, in_4bit: bool) -> None:
    """How far the sampler's log-probabilities are from those of a forward pass in fp32 for each row alone."""
    from rl.config import Config
    from rl.model.policy import load_policy

    written = json.loads(Path(rows).read_text())
    for model in dict.fromkeys(of["model"] for of in written):
        policy = load_policy(Config(model=model, dtype="float32", backend="transformers", load_in_4bit=in_4bit))
        for of in written:
            if of["model"] != model:
                continue
            off = []
            for prompt, completion, sampled in zip(of["prompts"], of["completions"], of["logprobs"]):
                found = plain_logprobs(policy, prompt, completion)
                off += [abs(a - b) for a, b in zip(found, sampled, strict=True)]
            tell(what=of["what"], tokens=len(off), mean=sum(off) / len(off), greatest=max(off))


# --- runs of train.py


def train(notes: Notes, arguments: list[str], folder: Path, seconds: float | None = None) -> dict:
    """Run train.py into a folder: its summary. A rehearsal's settings override these."""
    run(["train.py", *arguments, *(SMALL if notes.rehearsal else []), "--output-dir", str(folder)], seconds)
    return json.loads((folder / "summary.json").read_text())


def tiny(notes: Notes, config: str, seed: int) -> None:
    """A main job on the tiny model, by Unsloth in 4 bit."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--config", config, "--seed", str(seed), "--load-in-4bit", "--backend", "unsloth"]
        summary = train(notes, arguments, Path(folder, "run"))
    before, after = summary["eval"]["before"], summary["eval"]["after"]
    names = ("accuracy", "accuracy_sampled", "thinking", "accuracy_when_thinking")
    for what, of in (("before", before), ("after", after)):
        notes.row("Held-out questions", when=what, n=of["n"], ci95=of["ci95"], **{name: of.get(name) for name in names})
    notes.row("Seconds", **summary["seconds"])
    notes.row("Memory, MB", **summary["memory"])
    notes.check("right, greedy", after["accuracy"], at_least=ACCURACY)


def recipe(notes: Notes, config: str, card: float) -> None:
    """10 steps of a recipe with random weights of its model's shape, within the memory of its card."""
    from rl.fit.cards import CONTEXT
    from rl.fit.memory import ASSUMED_PROMPT
    from rl.run.read_config import read_config

    if not (ROOT / config).is_file():
        raise NotRun(f"there is no {config}")
    settings, _ = read_config(["--config", str(ROOT / config)], config)
    length = ASSUMED_PROMPT - len(settings.system_prompt or "")
    with tempfile.TemporaryDirectory() as parent:
        data, folder = Path(parent, "padded.jsonl"), Path(parent, "run")
        model = make_model("rehearsal" if notes.rehearsal else known_name(settings.model), Path(parent))
        rows = [{"question": padded(r["prompt"], length), "answer": r["answer"]} for r in load("sums", 200)]
        data.write_text("\n".join(map(json.dumps, rows)) + "\n")
        arguments = [
            *f"--config {config} --model {model} --max-steps 10 --eval-questions 8 --eval-steps 0 --save-steps 0".split(),
            *f"--curriculum-steps 0 --dynamic-sampling 0 --control random-reward --train-data {data} --eval-data {data}".split(),
            *(SMALL if notes.rehearsal else []), "--output-dir", str(folder),
        ]  # fmt: skip
        lines = []
        with notes.attempt("10 steps"):  # what was measured until an error, or until the time was over, counts
            try:
                lines = ask("capped", seconds=440, gigabytes=card, arguments=arguments)
            finally:
                measured = steps_of(folder)
                for one in measured:
                    notes.row("Steps", **one)
        if not measured:
            return
        free = card * GB - CONTEXT
        predicted = memory_bench.predicted(arguments, not notes.rehearsal, free).peak_mb
        peak = max(one["peak_memory_mb"] for one in measured)
        seconds = sorted(one["step_time"] for one in measured)[len(measured) // 2]
        memory = {"card_gb": card, "predicted_mb": predicted, "measured_mb": peak}
        notes.row("In all", **memory, seconds_a_step=seconds, steps=len(measured))
        notes.check("steps", len(measured), at_least=5)  # of 10, for which the time may not be enough
        notes.check("times that memory ran out", sum("ran out:" in line for line in lines), at_most=0)
        notes.check("predicted / measured peak", predicted / peak, *PREDICTED)


def capped(gigabytes: float, arguments: list[str]) -> None:
    """train.py on a GPU of which only so much is used. Unsloth first, which chooses PyTorch's allocator."""
    from rl.fit.cards import CONTEXT
    from rl.model.backends import import_backend
    from rl.run.read_config import read_config

    import_backend(read_config(arguments, "configs/tiny.yaml")[0])

    import torch

    import train

    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min((gigabytes * GB - CONTEXT) / total, 1.0))
    train.main(arguments)


def steps_of(folder: Path) -> list[dict]:
    """Seconds by part, length and peak memory of the steps that a run has logged."""
    file = folder / "metrics.jsonl"
    steps = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    names = "step step_time time/rollout time/score time/update completions/mean_length peak_memory_mb".split()
    return [{name: step.get(name) for name in names} for step in steps]


def known_name(model: str) -> str:
    """The name in rl/fit/shapes.py of the shape that a model has: unsloth/Qwen3-4B-Base is Qwen/Qwen3-4B."""
    from rl.fit.shapes import KNOWN

    own = model.split("/")[-1].lower()
    fitting = [name for name in KNOWN if own.startswith(name.split("/")[-1].lower())]
    if not fitting:
        raise NotRun(f"rl/fit/shapes.py does not know the shape of {model}")
    return max(fitting, key=len)


def padded(prompt: str, tokens: int) -> str:
    """The prompt behind so much filler that it has about so many tokens of the tiny model, which are characters."""
    filler = "Some numbers are added and subtracted. "
    missing = max(tokens - 32 - len(prompt), 0)  # the template takes a few, too
    return (filler * (missing // len(filler) + 1))[:missing] + prompt


# --- bench and memory


def bench(notes: Notes, model: str, lengths: str) -> None:
    """bench/step.py beside each peer. One that fails costs its column alone; where all do, Ponder is measured alone."""
    alone = True
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "step.json")
        size = ["--model", "rehearsal", "--steps", "1"] if notes.rehearsal else ["--model", model, "--steps", "3"]
        common = ["bench/step.py", "--here", *size, "--rounds", "1", "--lengths", lengths, "--json", str(file)]
        for peer in ("none",) if notes.rehearsal else ("trl", "unsloth", "none"):
            if peer == "none" and not alone:
                continue
            with notes.attempt(f"beside {peer}"):
                run([*common, "--peer", peer], 225)
                found = json.loads(file.read_text())
                alone = False
                notes.row(f"Log-probabilities off by, at the most, nats, beside {peer}", **found["off_by"])
                for side, of in found["sides"].items():
                    cold = {f"cold: {what}": seconds for what, seconds in found["cold"][side].items()}
                    notes.row(f"A step beside {peer}", side="Ponder" if side == "ours" else peer, **of, **cold)
                if found["ratio"]:
                    notes.row(f"Ponder's advantage over {peer}: above 1 it is ahead", **found["ratio"])


def memory(notes: Notes, backend: str) -> None:
    """bench/memory.py's six shapes by one backend."""
    for name in ("rehearsal",) if notes.rehearsal else memory_bench.ON_CUDA:
        settings = SMALL if notes.rehearsal else [*memory_bench.CUDA_SETTINGS, "--backend", backend]
        with notes.attempt(name):
            try:
                found = memory_bench.measure(name, settings)
            except SystemExit as error:
                lines = str(error).strip().splitlines()
                raise Failed(lines[-1], lines) from None
            ratio = found["peak"] / found["measured"]
            notes.row(f"MB, {backend}", model=name, predicted=found["peak"], measured=found["measured"], ratio=ratio)
            notes.check(f"{name}: predicted / measured peak", ratio, *PREDICTED)


# --- cuda


def cuda(notes: Notes) -> None:
    """What holds on the CPU by test: equal bits, resuming, going on with half where memory runs out."""
    few = "--control random-reward --max-steps 3 --eval-questions 16 --eval-steps 0 --save-steps 1 --load-in-4bit --log-completions-steps 0".split()
    with tempfile.TemporaryDirectory() as parent:
        one, two, paged = (Path(parent, name) for name in ("one", "two", "paged"))
        with notes.attempt("two runs of 3 steps"):
            for folder in (one, two):
                train(notes, few, folder, 120)
            compare_runs(notes, "two runs of the same seed", adapter(one), adapter(two))
        with notes.attempt("resuming with paged 8-bit Adam"):
            train(notes, [*few, "--optim", "paged_adamw_8bit"], paged, 120)
            kept = shutil.copytree(adapter(paged), Path(parent, "kept"))
            first = sorted((paged / "checkpoints").glob("step_*"))[0]
            run(["train.py", "--resume", str(first), "--accept-changes"], 120)  # the steps after it are given up
            compare_runs(notes, f"a run, and the same resumed from {first.name}", kept, adapter(paged))
        with notes.attempt("out of memory"):
            if notes.rehearsal:
                notes.row("Out of memory", outcome="not tried: a CPU cannot be capped in this way")
            else:
                out_of_memory(notes, Path(parent))


def adapter(folder: Path) -> Path:
    """The last checkpoint of a run."""
    return sorted((folder / "checkpoints").glob("step_*"))[-1]


def compare_runs(notes: Notes, what: str, some: Path, others: Path) -> None:
    """The greatest difference of two saved LoRAs, which is to be 0."""
    from safetensors.torch import load_file

    one, two = (load_file(folder / "adapter_model.safetensors") for folder in (some, others))
    off = max((one[name].float() - two[name].float()).abs().max().item() for name in one)
    moved = max(values.abs().max().item() for name, values in one.items() if "lora_B" in name)
    notes.row("Saved LoRAs", what=what, greatest_difference=off, greatest_element_of_B=moved)
    notes.check(f"{what}: greatest difference", off, at_most=0)
    notes.check(f"{what}: greatest element that was learned", moved, at_least=1e-6)


def out_of_memory(notes: Notes, parent: Path) -> None:
    """Two steps of Qwen3-0.6B in 4 GB with micro-batches that need far more: they are halved, and the steps are done."""
    model, folder = make_model("Qwen/Qwen3-0.6B", parent), parent / "halved"
    arguments = [
        *f"--model {model} --load-in-4bit --max-steps 2 --eval-questions 8 --eval-steps 0 --max-completion-length 128".split(),
        *f"--max-tokens-per-micro-batch 32768 --control random-reward --train-data sums --output-dir {folder}".split(),
    ]
    lines = run(["-m", "bench.gpu_parts", "capped", json.dumps({"gigabytes": 4, "arguments": arguments})], 150)
    halved = [line for line in lines if "ran out:" in line]
    summary = json.loads((folder / "summary.json").read_text())
    for line in halved:
        notes.row("Out of memory", outcome=line)
    notes.row("Out of memory", outcome=f"the run is finished: {summary.get('finished', False)}")
    notes.check("times that memory ran out", len(halved), at_least=1)
    notes.check("steps done in spite of it", summary["steps"], at_least=2)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        globals()[sys.argv[1]](**json.loads(sys.argv[2]))
