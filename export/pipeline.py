"""The steps of an export: merge, convert to GGUF, evaluate on the held-out questions, upload.

The merged model is read back and compared with base and LoRA before it replaces an earlier one. export/report.json has
all figures.
"""

import gc
import json
import shutil
from dataclasses import replace
from pathlib import Path

import httpx
import huggingface_hub
from transformers.utils import cached_file, is_gguf_available

from export import gguf, merge
from grading import Rewards
from grading.base import first_line
from rl.config import Config, ConfigError, RunError
from rl.evaluate import answer, rates
from rl.model.backends import describe_precision
from rl.model.policy import Policy, load_policy
from rl.run.checkpoint import Checkpoints, damage, fingerprint
from rl.run.files import read_jsonl, to_json, write_atomic, write_errors


class Export:
    """The export of one checkpoint of a run, into RUN/export. Call `merge` first."""

    def __init__(self, checkpoint: Path, config: Config, base_model: str | None, device: str):
        """Check the checkpoint and the base model. Raises ConfigError if one of them is unusable.

        Args:
            config: Config of the run.
            base_model: Base model to use instead of the run's, or None.
        """
        self.run_folder = checkpoint.parent.parent
        if problem := damage(checkpoint):
            intact = [str(folder) for folder in Checkpoints(self.run_folder, keep=0).all() if not damage(folder)]
            raise ConfigError(
                f"{checkpoint} cannot be used: {problem}; intact checkpoints: {', '.join(intact) or 'none'}"
            )
        self.state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        self.run_config = config
        self.base = base_model or config.model
        self.dtype, self.base_has_dtype = merge.merge_dtype(self.base)
        self.config = replace(config, model=self.base, adapter=str(checkpoint), device=device)
        # These run without a GPU or a server, too.
        self.config = replace(self.config, optim="adamw_torch", backend="transformers", rollout="local")
        self.folder = self.run_folder / "export"
        self.merged = self.folder / "merged"
        self.unpacked = self.folder / "unpacked"  # the GGUF file, converted for transformers
        self.report = {"checkpoint": str(checkpoint), "base_model": self.base, "dtype": self.dtype}
        print(f"checkpoint  {checkpoint}; base model {self.base}")

    def load(self, folder: Path | None = None, **changes) -> Policy:
        """Load base and LoRA, or the model in a folder, with changes to the settings of the run."""
        if folder:
            changes |= {"model": str(folder), "adapter": None, "load_in_4bit": False}
        return load_policy(replace(self.config, **changes))

    def merge(self) -> None:
        """Merge the LoRA, write the model, read it back and compare its logits with those of base and LoRA."""
        policy = self.load(load_in_4bit=False, dtype=self.dtype)
        policy.model.delete_adapter("reference")  # an unused copy of the LoRA
        origin = self.state["made"]
        # The run and this export have the same numbers only if neither has rounded the saved weights.
        is_unrounded = self.base_has_dtype and origin["runs_on"].removesuffix(" by Unsloth").endswith(
            (self.dtype, "float32")
        )
        if is_unrounded and not (self.run_config.adapter or self.run_config.load_in_4bit):
            if fingerprint(policy) != origin["model"]:
                raise ConfigError(f"{self.base} is not the base model that was trained: its weights differ")
        records = read_jsonl(self.run_folder / "eval/before.jsonl")
        self.texts = []  # at most four held-out questions with the answers before training, up to 128 tokens each
        for record in records[:: len(records) // 4 + 1]:
            completion = policy.tokenizer.encode(record["completion"], add_special_tokens=False)
            self.texts.append((policy.encode_prompt(record["question"]) + completion)[-128:])
        trained_logits = merge.compute_logits(policy.model, self.texts)
        with policy.model.disable_adapter():
            base_logits = merge.compute_logits(policy.model, self.texts)
        print(f"merge       the LoRA into {self.base}, summed in fp32 and rounded to {self.dtype}")
        with merge.replace_folder(self.merged) as folder:
            model, rounding = merge.merge_lora(policy.model)
            model.save_pretrained(folder)
            policy.tokenizer.save_pretrained(folder)
            # For some tokenizers llama.cpp's converter needs this file, which transformers no longer writes.
            if file := cached_file(self.base, "tokenizer.model", _raise_exceptions_for_missing_entries=False):
                shutil.copy(file, folder)
            del policy, model
            gc.collect()
            self.merged_logits = merge.compute_logits(self.load(folder, dtype=self.dtype).model, self.texts)
            figures = merge.compare_logits(base_logits, trained_logits, self.merged_logits, rounding)
        print(
            f"read back   logits differ from base with LoRA by up to {figures['merged']:.2g} "
            f"(the LoRA changes them by up to {figures['lora']:.2g})"
        )
        print(f"written     {self.merged}")
        self.report["logits"] = {"places": len(trained_logits)} | figures
        self.write()

    def convert(self, gguf_type: str, tools: dict[str, list[str]]) -> None:
        """Write a GGUF file and a Modelfile with `tools` (from find_tools); compare its logits to the merged model."""
        config = self.config
        file = self.folder / gguf_type / f"{self.run_folder.resolve().name}-{gguf_type}.gguf"
        remark = "not compared, which requires the package gguf: pip install gguf"
        with merge.replace_folder(file.parent) as folder:
            gguf.convert(tools, gguf_type, self.merged, folder / file.name)
            text = gguf.modelfile(file.name, config.temperature, config.system_prompt, config.chat_template_kwargs)
            (folder / "Modelfile").write_text(text, encoding="utf-8")
            if is_gguf_available():
                merge.unpack_gguf(folder / file.name, self.merged, self.unpacked)
                gguf_policy = self.load(self.unpacked, dtype="float16", device="cpu")
                difference = (
                    (merge.compute_logits(gguf_policy.model, self.texts) - self.merged_logits).abs().max().item()
                )
                self.report["logits"] |= {"gguf_type": gguf_type, "gguf": difference}
                remark = f"logits differ from the merged model's by up to {difference:.2g}"
        print(f"gguf        {file}, with a Modelfile for Ollama; {remark}")
        self.write()

    def evaluate(self, rows: list[dict], rewards: Rewards) -> None:
        """Answer the held-out questions greedily, with base and LoRA, merged model and GGUF file; print a table."""
        label = "as trained" if self.base == self.run_config.model else "base and LoRA"
        precision = f"{'NF4, ' if self.config.load_in_4bit else ''}{describe_precision(self.config)}"
        models = {f"{label}, {precision}": None, "merged": self.merged}
        if gguf_type := self.report["logits"].get("gguf_type"):
            models[f"GGUF {gguf_type}"] = self.unpacked
        print(f"\n{'held-out questions, greedy':<36}{'n':>5}{'right (95 %)':>24}{'same text as trained':>24}")
        accuracy = self.report["accuracy"] = {}
        texts = {}
        for name, folder in models.items():
            policy = self.load(folder)
            records = answer(policy, policy.encode(rows), rewards, self.config, step=0, temperature=0.0)
            del policy
            gc.collect()
            texts[folder] = [record["completion"] for record in records]
            num_same = sum(a == b for a, b in zip(texts[folder], texts[None]))
            accuracy[name] = rates(records) | {"same_as_trained": num_same}
            right = "{accuracy:.1%} ({ci95[0]:.0%} to {ci95[1]:.0%})".format(**accuracy[name])
            print(f"{name:<36}{len(records):>5}{right:>24}{num_same:>24}")
        self.write()

    def upload(self, name: str, public: bool) -> None:
        """Upload the merged model. Raises RunError on failure, or if the repository is public without `public`."""
        api = huggingface_hub.HfApi()
        try:
            address = api.create_repo(name, private=not public, exist_ok=True)
            if not public and not api.model_info(name).private:
                raise RunError(f"push_to_hub: {name} exists and is public: add --public or choose another name")
            api.upload_folder(repo_id=name, folder_path=self.merged, commit_message="Merged by Ponder")
        except (OSError, httpx.HTTPError, ValueError) as error:  # no token, no network, no permission
            reason = f"{first_line(error)} (log in with: hf auth login)"
            raise RunError(
                f"push_to_hub: {name} was not uploaded: {reason}; the merged model is in {self.merged}"
            ) from error
        print(f"uploaded    {address}")

    def write(self) -> None:
        """Write report.json and the model card."""
        config = self.config
        base_line = "" if Path(self.base).is_dir() else f"base_model: {self.base}\n"  # the Hub accepts only ids
        summary = json.loads((self.run_folder / "summary.json").read_text(encoding="utf-8"))
        last_evaluation = {"at the run's last evaluation": self.state["eval"]}
        accuracy = {"before training": summary["eval"]["before"]} | self.report.get("accuracy", last_evaluation)
        lines = [f"* {name}: {x['accuracy']:.1%} of {x['n']} questions" for name, x in accuracy.items()]
        card = f"""\
---
{base_line}library_name: transformers
pipeline_tag: text-generation
tags: [ponder]
---

# {self.base} with a LoRA merged into it, trained with Ponder

{config.algorithm.upper()}, step {self.state["step"]}, seed {config.seed}, on {", ".join(config.train_data)}.
System prompt: {config.system_prompt or "none"}. Chat template settings: {json.dumps(config.chat_template_kwargs)}.

Held-out accuracy, greedy:

"""
        with write_errors(self.folder):
            write_atomic(self.merged / "README.md", card + "\n".join(lines) + "\n")
            write_atomic(self.folder / "report.json", to_json(self.report, indent=2) + "\n")
