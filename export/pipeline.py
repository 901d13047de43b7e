"""The steps of an export: merge, convert to GGUF, answer the held-out questions, upload.

The merged model is read back and compared with base and LoRA before it takes its place. export/report.json has all figures.
"""

import gc
import json
from dataclasses import replace
from pathlib import Path

import transformers

from export import gguf, hub, merge
from export.settings import Settings, Source
from grading import Rewards
from rl.config import ConfigError
from rl.evaluate import answer, rates
from rl.model.backends import describe_precision
from rl.model.policy import Policy, is_cached, load_policy, restore_adapter
from rl.run.checkpoint import damage, fingerprint
from rl.run.files import to_json, write_atomic, write_errors

COMPARED_TEXTS = 8  # texts whose logits are compared
COMPARED_TOKENS = 160  # of each text, from its end


class Export:
    """One export. Call `merge` first."""

    def __init__(self, source: Source, settings: Settings):
        self.source = source
        self.settings = settings
        self.check_checkpoint()
        if settings.push_to_hub:
            hub.check_repository(settings.push_to_hub)
        self.config = replace(
            source.config,
            adapter=str(source.checkpoint),
            device=settings.device,
            optim="adamw_torch",
            backend="transformers",
        )
        self.base = settings.base_model or source.config.model
        self.dtype = str(merge.merge_dtype(self.base)).removeprefix("torch.")
        self.folder = Path(settings.output_dir or (source.run or source.checkpoint) / "export")
        self.merged = self.folder / "merged"
        self.unpacked = self.folder / "unpacked"  # the weights of the GGUF file, as transformers reads it
        self.report = {"checkpoint": str(source.checkpoint), "base_model": self.base, "dtype": self.dtype}
        print(f"checkpoint  {source.checkpoint}{other_best(source)}; base model {self.base}")

    def merge(self) -> None:
        """Merge the LoRA, write the model, read it back and compare its logits with those of base and LoRA."""
        policy = self.load(model=self.base, load_in_4bit=False, dtype=self.dtype)
        merge.check_plain_lora(policy.model)
        restore_adapter(policy, self.source.checkpoint)  # raises if a matrix of the LoRA is missing or has no place
        self.check_base(policy)
        self.texts = texts_to_compare(policy, self.source.run)
        trained_logits = merge.compute_logits(policy.model, self.texts)
        with policy.model.disable_adapter():
            lora_effect = merge.largest_difference(merge.compute_logits(policy.model, self.texts), trained_logits)
        tokenizer = policy.tokenizer
        # Not the base's settings, whose top_k or penalty was not used in training.
        generation = transformers.GenerationConfig(eos_token_id=sorted(policy.eos_ids), pad_token_id=policy.pad_id)
        layers = len(merge.lora_layers(policy.model))
        model = merge.merge_lora(policy.model)
        print(f"merge       a LoRA on {layers} layers into {self.base}, summed in fp32 and rounded to {self.dtype}")
        with merge.replace_folder(self.merged) as folder:
            model.generation_config = generation
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            merge.copy_sentencepiece(self.base, folder)
            (folder / "README.md").write_text(hub.model_card(self.source, self.base), encoding="utf-8")
            del policy, model
            gc.collect()
            written = self.load(model=str(folder), adapter=None, load_in_4bit=False, dtype=self.dtype)
            self.merged_logits = merge.compute_logits(written.model, self.texts)
            difference = merge.largest_difference(self.merged_logits, trained_logits)
            merge.check_difference(difference, lora_effect)
        places = len(self.merged_logits)
        print(
            f"read back   logits differ from base and LoRA by up to {difference:.2g} at {places:,} places; the LoRA changes "
            f"them by up to {lora_effect:.2g}\nwritten     {self.merged}"
        )
        self.report["logits"] = {"places": places, "merged": difference, "lora": lora_effect}
        self.write_report()

    def convert(self, tools: dict[str, list[str]]) -> None:
        """Write a GGUF file with a Modelfile by `tools` (of find_tools), and compare its logits if transformers can read it."""
        config, gguf_type = self.config, self.settings.gguf
        name = (self.source.run or self.source.checkpoint).resolve().name
        file = self.folder / gguf_type / f"{name}-{gguf_type}.gguf"
        remark = "not compared, since transformers needs the package gguf for that: pip install gguf"
        with merge.replace_folder(file.parent) as folder:
            gguf.convert(tools, gguf_type, self.merged, folder / file.name)
            text = gguf.modelfile(file.name, config.temperature, config.system_prompt, config.chat_template_kwargs)
            (folder / "Modelfile").write_text(text, encoding="utf-8")
            if transformers.utils.is_gguf_available():
                merge.unpack_gguf(folder / file.name, self.merged, self.unpacked)
                read = self.load(
                    model=str(self.unpacked), adapter=None, load_in_4bit=False, dtype="float32", device="cpu"
                )
                logits = merge.compute_logits(read.model, self.texts)
                difference = merge.largest_difference(logits, self.merged_logits)
                self.report["logits"] |= {"gguf_type": gguf_type, "gguf": difference}
                remark = f"logits differ from the merged model's by up to {difference:.2g}"
        print(f"gguf        {file}, with a Modelfile for Ollama; {remark}")
        self.write_report()

    def evaluate(self, rows: list[dict], rewards: Rewards) -> None:
        """Answer the held-out questions greedily: as trained, merged, and as GGUF."""
        config = self.config
        as_trained = f"as trained, {'NF4, ' if config.load_in_4bit else ''}{describe_precision(config)}"
        has_model = Path(config.model).is_dir() or is_cached(config.model)
        merged = {"model": str(self.merged), "adapter": None, "load_in_4bit": False}
        models = {as_trained: {"model": config.model if has_model else self.base}, "merged": merged}
        if self.unpacked.exists():
            models[f"GGUF {self.settings.gguf}"] = merged | {"model": str(self.unpacked)}
        answers = {}
        for name, changes in models.items():
            policy = self.load(**changes)
            answers[name] = answer(policy, policy.encode(rows), rewards, config, step=0, temperature=0.0)
            del policy
            gc.collect()
        accuracy = {}
        for name, records in answers.items():
            same = sum(a["completion"] == b["completion"] for a, b in zip(answers[as_trained], records))
            accuracy[name] = rates(records) | {"same_as_trained": same}
        print("\n" + accuracy_table(accuracy))
        self.report["accuracy"] = accuracy
        self.write_report()
        self.write("merged/README.md", hub.model_card(self.source, self.base, accuracy))

    def upload(self) -> None:
        print(f"uploaded    {hub.push(self.merged, self.settings.push_to_hub, self.settings.public)}")

    def load(self, **changes) -> Policy:
        """Load the policy with these settings changed. adapter=None gives it a new LoRA, which has no effect."""
        policy = load_policy(replace(self.config, **changes))
        if policy.starts_from_adapter:
            policy.model.delete_adapter("reference")  # a second copy of the LoRA
        return policy

    def check_checkpoint(self) -> None:
        """Raise ConfigError if files of the checkpoint do not have their checksums."""
        checkpoint = self.source.checkpoint
        if not self.source.run and not (checkpoint / "SHA256SUMS").exists():
            return
        if problem := damage(checkpoint):
            others = sorted(str(folder) for folder in checkpoint.parent.glob("step_*") if not damage(folder))
            raise ConfigError(f"{checkpoint} cannot be used: {problem}; intact ones: {', '.join(others) or 'none'}")

    def check_base(self, policy: Policy) -> None:
        """Raise ConfigError if the base model's weights are not those of the run, as far as they can be compared."""
        run_config = self.source.config
        if not self.source.run or run_config.load_in_4bit or run_config.adapter:
            return
        made = self.source.state["made"]
        same_numbers = made["runs_on"].removesuffix(" by Unsloth").endswith(("float32", self.dtype))
        if same_numbers and fingerprint(policy) != made["model"]:
            raise ConfigError(
                f"{self.base} is not the base model that {self.source.checkpoint} was trained on: its weights differ"
            )

    def write_report(self) -> None:
        self.write("report.json", to_json(self.report, indent=2) + "\n")

    def write(self, name: str, text: str) -> None:
        with write_errors(self.folder / name):
            write_atomic(self.folder / name, text)


def other_best(source: Source) -> str:
    """A remark if another checkpoint of the run was better on the held-out questions."""
    best = source.run / "checkpoints/best" if source.run else None
    name = best.read_text(encoding="utf-8").strip() if best and best.is_file() else source.checkpoint.name
    return "" if name == source.checkpoint.name else f" (the best on the held-out questions was {name})"


def texts_to_compare(policy: Policy, run: Path | None) -> list[list[int]]:
    """Token ids of some held-out questions with their answers before training; without a run, of sums."""
    lines = [{"question": f"What is {n} + {n + 3}?", "completion": "The answer is"} for n in range(COMPARED_TEXTS)]
    if run:
        with (run / "eval/before.jsonl").open(encoding="utf-8") as file:
            lines = [json.loads(line) for line in file]
    texts = []
    for line in lines[:: max(1, len(lines) // COMPARED_TEXTS)][:COMPARED_TEXTS]:
        completion = policy.tokenizer.encode(line["completion"], add_special_tokens=False)
        texts.append((policy.encode_prompt(line["question"]) + completion)[-COMPARED_TOKENS:])
    return texts


def accuracy_table(accuracy: dict[str, dict]) -> str:
    """A table of `rates` with same_as_trained, by model."""
    lines = [f"{'held-out questions, greedy':<36}{'n':>5}{'right (95 %)':>24}{'same text as trained':>24}"]
    for name, figures in accuracy.items():
        right = "{:.1%} ({:.0%} to {:.0%})".format(figures["accuracy"], *figures["ci95"])
        lines.append(f"{name:<36}{figures['n']:>5}{right:>24}{figures['same_as_trained']:>24}")
    return "\n".join(lines)
