"""Take a trained model away: merge its LoRA into the 16-bit base, for transformers, vLLM, llama.cpp and Ollama.

    python export.py runs/NAME                                  its last checkpoint, into runs/NAME/export/merged
    python export.py runs/NAME/checkpoints/step_000045 --gguf q8_0    that one, and a GGUF file of it
    python export.py runs/NAME --push-to-hub USER/NAME          and upload it (a private repository, unless --public)
    python export.py --help                                     every setting

Reads top to bottom: the checkpoint and the tools are found first, then the LoRA is merged (export/merge.py), written, read back
and compared with base and LoRA, then come GGUF, the held-out questions as trained, merged and as GGUF, and the upload.
A plain PEFT folder works as well, without questions to ask. export/report.json has every figure.
"""

import contextlib
import difflib
import gc
import json
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from data import DataError, load, load_questions
from grading import RewardError, load_rewards, sandbox
from rl.config import Config, ConfigError, RunError
from rl.run.process import Stopping
from rl.run.read_config import read_yaml

CONVERTED = ("f32", "f16", "bf16", "q8_0")  # types of GGUF that llama.cpp's converter itself can write
QUANTISED = ("q2_k", "q3_k_m", "q4_0", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k")  # those for its llama-quantize
PROBES, PLACES = 8, 160  # texts whose logits are compared, and tokens of each


@dataclass
class Settings:
    path: str  # a run folder (its last checkpoint), one of its checkpoints, or any folder that peft has saved a LoRA in
    gguf: Literal[CONVERTED + QUANTISED] | None = None  # write a GGUF file of this type too
    llama_cpp: str | None = None  # llama.cpp's folder; empty: the PATH, ./llama.cpp, ~/llama.cpp, ~/.unsloth/llama.cpp
    eval_questions: int = 402  # at most so many held-out questions are asked; 0 leaves them out
    base_model: str | None = None  # the 16-bit base, where it is no longer where the run had it, or the run's was 4-bit
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes the GPU where there is one
    output_dir: str | None = None  # where to; empty: export/ in the run folder, or in the LoRA's
    push_to_hub: str | None = None  # USER/NAME: upload the merged model to the Hugging Face Hub
    public: bool = False  # make the uploaded repository one that everybody can read


def main(arguments: list[str]) -> None:
    import tyro

    kind = tyro.conf.PositionalRequiredArgs[Settings]
    asked = tyro.cli(kind, args=arguments, prog="export.py", description=__doc__.split("\n")[0])
    try:
        with Stopping(), contextlib.ExitStack() as at_end:
            export(asked, at_end)
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        raise RunError(
            "the memory of the GPU is too small for it: --device cpu needs that of the machine alone"
        ) from error


def export(asked: Settings, at_end: contextlib.ExitStack) -> None:
    # --- What is asked for, and is all of it there?
    checkpoint, run = find_checkpoint(Path(asked.path))
    config = find_config(checkpoint, run)
    base = asked.base_model or config.model
    sandbox.start(config.code_timeout, config.unsafe_run_model_code)  # its processes are forked while this one is small
    rows, rewards = [], None
    if asked.eval_questions > 0 and run:
        names, weights = config.reward_funcs, config.reward_weights
        rewards = load_rewards(str(run / "rewards.py"), names, weights, config.reward_errors, config.max_steps)
        _, rows, _ = load_questions(config)
        rows = rows[:: -(-len(rows) // asked.eval_questions)]

    import transformers  # late: --help and the checks above answer at once

    from rl.evaluate import answer, rates
    from rl.model.backends import describe_precision
    from rl.model.policy import check_model, is_cached, load_policy
    from rl.run.checkpoint import Checkpoints, cannot_write, damage, fingerprint, write_whole
    from rl.run.folder import to_json

    began_with, config.adapter = config.adapter, str(checkpoint)
    config.device, config.optim, config.backend = asked.device, "adamw_torch", "transformers"
    from export import merge  # after rl.policy, which keeps bitsandbytes quiet

    tools = merge.find_tools(asked.gguf in QUANTISED, asked.llama_cpp) if asked.gguf else {}
    if run or (checkpoint / "SHA256SUMS").exists():
        if problem := damage(checkpoint):
            whole = [str(other) for other in Checkpoints(checkpoint.parent.parent, 0).all() if not damage(other)]
            raise ConfigError(f"{checkpoint} cannot be used: {problem}; whole ones: {', '.join(whole) or 'none'}")
    made = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["made"] if run else None
    if asked.push_to_hub:
        merge.check_repository(asked.push_to_hub)
    check_model(replace(config, model=base))
    dtype = str(merge.sixteen_bits(base)).removeprefix("torch.")
    in_16_bits = {"load_in_4bit": False, "dtype": dtype}
    out = Path(asked.output_dir or (run or checkpoint) / "export")
    report = {"checkpoint": str(checkpoint), "base_model": base, "dtype": dtype}
    print(f"checkpoint  {checkpoint}{other_best(checkpoint, run)}; base model {base}")

    def load(**changes):
        """The run's policy, but for these settings. adapter=None gives it a new LoRA, which does nothing."""
        policy = load_policy(replace(config, **changes))
        if policy.continues_adapter:
            policy.model.delete_adapter("reference")  # a second copy
        return policy

    def write(path, content):
        try:
            write_whole(path, content)
        except OSError as error:
            raise RunError(cannot_write(path, error)) from error

    # --- Merge, write beside its place, read back, compare. Only then does it take its place.
    policy = load(model=base, **in_16_bits)
    matrices = merge.check_landed(policy.model, checkpoint)
    # The fingerprint is of numbers: comparable where the run had these very weights, as they are or widened to fp32.
    comparable = made and made["runs_on"].removesuffix(" by Unsloth").endswith(("float32", dtype))
    if comparable and not (config.load_in_4bit or began_with):
        if fingerprint(policy) != made["model"]:
            raise ConfigError(f"{base} is not the base model that {checkpoint} was trained on: its weights are others")
    texts = probes(policy, run)
    expected = merge.Expected.of(policy.model, texts)
    tokenizer, ends, pad = policy.tokenizer, sorted(policy.eos_ids), policy.pad_id
    merged, changed = merge.merge(policy.model)
    print(f"merge       {matrices} LoRA matrices into {changed} of {base}, summed in fp32, rounded to {dtype}")
    if merge.lost_by_rounding(expected):
        print(f"  note: much of this LoRA is lost in rounding to {dtype}: better use base and LoRA as they are")
    with merge.whole_folder(out / "merged") as folder:
        # It ends where the policy did; the base's own way of sampling (a top_k, a penalty) is not how it was trained.
        merged.generation_config = transformers.GenerationConfig(eos_token_id=ends, pad_token_id=pad)
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        merge.copy_sentencepiece(base, folder)
        (folder / "README.md").write_text(model_card(config, base, checkpoint, run), encoding="utf-8")
        del policy, merged
        gc.collect()
        read_back = merge.logits_of(load(model=str(folder), adapter=None, **in_16_bits).model, texts)
        found = expected.compare(read_back)
        expected.check_explained(found, "the merged model")
    compared = {"merged": found, "by_rounding": expected.rounding, "by_lora": expected.lora}
    report["logits"] = {"places": len(read_back)} | {name: vars(figures) for name, figures in compared.items()}
    print(
        f"read back   logits differ from base and LoRA by {found.largest:.2g} at the most (rounding explains "
        f"{expected.rounding.largest:.2g}, the LoRA is {expected.lora.largest:.2g}); the same most likely token at "
        f"{found.same_top:.1%} of {len(read_back):,} places\nwritten     {out / 'merged'}"
    )
    write(out / "report.json", to_json(report, indent=2) + "\n")

    # --- GGUF, for llama.cpp and Ollama, read back by transformers.
    unpacked = None  # a folder with the file's weights, as read back
    if asked.gguf:
        file = out / asked.gguf / f"{(run or checkpoint).resolve().name}-{asked.gguf}.gguf"
        told = "not compared, since transformers needs the package gguf for it: pip install gguf"
        with merge.whole_folder(file.parent) as folder:
            merge.convert(tools, asked.gguf, out / "merged", folder / file.name)
            settings = config.temperature, config.system_prompt, config.chat_template_kwargs
            ollama = merge.modelfile(file.name, *settings)
            (folder / "Modelfile").write_text(ollama, encoding="utf-8")
            if merge.reads_gguf():
                unpacked = out / "unpacked"
                at_end.callback(shutil.rmtree, unpacked, ignore_errors=True)
                shutil.rmtree(unpacked, ignore_errors=True)  # of an export that was killed
                merge.unpack(folder / file.name, out / "merged", unpacked)
                as_it_is = {"load_in_4bit": False, "dtype": "float32", "device": "cpu"}  # what the file says
                logits = merge.logits_of(load(model=str(unpacked), adapter=None, **as_it_is).model, texts)
                found = merge.Difference.between(logits, read_back)
                if asked.gguf in ("f32", "f16", "bf16"):
                    expected.check_explained(found, f"the {asked.gguf} file")
                report["logits"]["gguf"] = {"type": asked.gguf} | vars(found)
                told = f"logits differ from the merged model's by {found.largest:.2g} at the most"
        print(f"gguf        {file}, with a Modelfile for Ollama; {told}")
        write(out / "report.json", to_json(report, indent=2) + "\n")

    # --- The held-out questions, greedily: as it was trained, merged, and as GGUF.
    if rows:
        precision, answers = describe_precision(config), {}
        as_trained = f"as trained, {'NF4, ' if config.load_in_4bit else ''}{precision}"
        merged = {"model": str(out / "merged"), "adapter": None, "load_in_4bit": False}
        is_there = Path(config.model).is_dir() or is_cached(config.model)  # else it has moved, to --base-model
        ways = {as_trained: {"model": config.model if is_there else base}, "merged": merged}
        if unpacked:
            ways[f"GGUF {asked.gguf}"] = merged | {"model": str(unpacked)}
        for name, changes in ways.items():
            policy = load(**changes)
            prompts = policy.encode_prompts(rows, config.max_completion_length)
            answers[name] = answer(policy, rows, prompts, rewards, config, step=0, temperature=0.0)
            del policy
            gc.collect()
        report["accuracy"] = {name: rates(records) for name, records in answers.items()}
        for name, records in answers.items():
            same = sum(a["completion"] == b["completion"] for a, b in zip(answers[as_trained], records))
            report["accuracy"][name]["same_as_trained"] = same
        print("\n" + accuracy_table(report["accuracy"]))
        if made["runs_on"] != precision:
            print(f"  note: the run was {made['runs_on']}, which rounds otherwise than {precision}")
        write(out / "report.json", to_json(report, indent=2) + "\n")
        write(out / "merged/README.md", model_card(config, base, checkpoint, run, report["accuracy"]))

    if asked.push_to_hub:
        print(f"uploaded    {merge.push(out / 'merged', asked.push_to_hub, asked.public)}")


# --- what is asked for


def find_checkpoint(path: Path) -> tuple[Path, Path | None]:
    """The checkpoint that a run folder, checkpoints/best or its own folder names, and its run folder where it has one."""
    if path.name in ("last", "best") and path.is_file():
        path = path.parent / path.read_text(encoding="utf-8").strip()
    if (path / "adapter_config.json").is_file():
        run = path.parent.parent if len(path.parts) > 1 else path.absolute().parent.parent
        return path, run if (run / "config.yaml").is_file() else None
    if (path / "config.yaml").is_file():
        if (path / "checkpoints/last").is_file():
            return find_checkpoint(path / "checkpoints/last")
        raise ConfigError(f"{path} has no checkpoint: nothing has been saved in this run")
    runs = [str(file.parent) for folder in (Path("runs"), path.parent) for file in folder.glob("*/config.yaml")]
    near = difflib.get_close_matches(str(path), runs, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else "give runs/NAME, or a folder like runs/NAME/checkpoints/step_000045"
    raise ConfigError(f"{path} is neither the folder of a run nor that of a saved LoRA; {hint}")


def find_config(checkpoint: Path, run: Path | None) -> Config:
    """The settings of the run; where there is none, the model alone, which the LoRA names."""
    if run:
        return read_yaml(str(run / "config.yaml"))
    try:
        settings = json.loads((checkpoint / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{checkpoint}/adapter_config.json cannot be read: {error}") from None
    return Config(model=settings.get("base_model_name_or_path") or "(none is named)")


def other_best(checkpoint: Path, run: Path | None) -> str:
    """A remark where another checkpoint of the run was better on the held-out questions."""
    best = run / "checkpoints/best" if run else None
    name = best.read_text(encoding="utf-8").strip() if best and best.is_file() else checkpoint.name
    return f" (the best on the held-out questions was {name})" if name != checkpoint.name else ""


def probes(policy, run: Path | None) -> list[list[int]]:
    """Token ids of some held-out questions with the run's answers, to compare logits on; without a run, made-up questions."""
    files = [run / f"eval/{name}.jsonl" for name in ("after", "before")] if run else []
    if files := [file for file in files if file.is_file()]:
        lines = [json.loads(line) for line in files[0].read_text(encoding="utf-8").split("\n") if line]
    else:
        rows = load("sums", PROBES, "eval")
        lines = [{"question": row["prompt"], "completion": "The answer is"} for row in rows]
    asked = lines[:: max(1, len(lines) // PROBES)][:PROBES]
    encode = policy.tokenizer.encode
    texts = [policy.encode_prompt(x["question"]) + encode(x["completion"], add_special_tokens=False) for x in asked]
    return [text[-PLACES:] for text in texts]


# --- what is said about it


def accuracy_table(accuracy: dict[str, dict]) -> str:
    """accuracy: `rates` with same_as_trained, by the way the model was asked."""
    lines = [f"{'held-out questions, greedy':<36}{'n':>5}{'right (95 %)':>24}{'same text as trained':>24}"]
    for name, rates in accuracy.items():
        right = f"{rates['accuracy']:.1%} ({rates['ci95'][0]:.0%} to {rates['ci95'][1]:.0%})"
        lines.append(f"{name:<36}{rates['n']:>5}{right:>24}{rates['same_as_trained']:>24}")
    return "\n".join(lines)


def model_card(config: Config, base: str, checkpoint: Path, run: Path | None, accuracy: dict | None = None) -> str:
    """README.md of the merged model. accuracy: as in the table, once it has been measured."""
    head = [] if Path(base).is_dir() else [f"base_model: {base}"]  # the Hub wants an id
    lines = ["---", *head, "library_name: transformers", "pipeline_tag: text-generation", "tags: [ponder]", "---", ""]
    lines += [f"# {base} with a LoRA merged into it, trained by Ponder", ""]
    if run:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        before = json.loads((run / "summary.json").read_text(encoding="utf-8"))["eval"]["before"]
        asked = ", ".join(config.train_data)
        lines += [f"{config.algorithm.upper()}, step {state['step']}, seed {config.seed}, on {asked}."]
        lines += [f"System prompt: {config.system_prompt or 'none'}"]
        if config.chat_template_kwargs:
            lines += [
                f"Settings of the chat template (chat_template_kwargs): {json.dumps(config.chat_template_kwargs)}"
            ]
        lines += ["", "Held-out accuracy, greedy:", ""]
        measured = {"before training": before} | (accuracy or {"when the run last measured it": state["eval"]})
        lines += [f"* {name}: {rates['accuracy']:.1%} of {rates['n']} questions" for name, rates in measured.items()]
    return "\n".join(lines) + HOW_TO_USE


HOW_TO_USE = """

To use it:

    AutoModelForCausalLM.from_pretrained(FOLDER), AutoTokenizer.from_pretrained(FOLDER)      # transformers
    vllm serve FOLDER
    ollama create NAME -f Modelfile      # of a GGUF file, which `python export.py RUN --gguf q8_0` writes
"""


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")
    try:
        main(sys.argv[1:])
    except (ConfigError, DataError, RewardError, RunError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as error:
        sys.exit(getattr(error, "exit_code", 130))
