"""The command export.py: merging, GGUF, the Hub, errors, and that a failed export leaves the previous one intact."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import safetensors.torch
import torch
import transformers
import yaml
from conftest import ROOT, fill_lora

import train
from export import gguf, merge
from export.command import main
from export.pipeline import Export
from rl.config import Config, ConfigError, RunError
from rl.model.lora import save_adapter
from rl.model.policy import load_policy
from rl.run.checkpoint import fingerprint
from rl.run.files import sha256

SMALL = "--max-steps 3 --prompts-per-step 4 --num-generations 4 --eval-questions 12 --save-steps 2 --train-questions 30 --max-completion-length 40 --learning-rate 3e-3 --log-completions-steps 0 --device cpu"


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "small"
    train.main([*SMALL.split(), "--output-dir", str(folder)])
    return folder


@pytest.fixture
def run(small_run, tmp_path):
    """A copy of the run, which a test may modify."""
    return Path(shutil.copytree(small_run, tmp_path / "small", ignore=shutil.ignore_patterns("export")))


def read_files(folder):
    """Return the content of all files in a folder by relative path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def export_error(*arguments):
    """Return the error message of an export, which must be one line."""
    with pytest.raises((ConfigError, RunError)) as error:
        main([*map(str, arguments)])
    assert "\n" not in str(error.value)
    return str(error.value)


def load_model(folder, dtype=torch.float32):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


# --- the whole command


def test_exports_last_checkpoint_and_reports_accuracy(small_run, capsys):
    main([str(small_run), "--eval-questions", "8", "--device", "cpu"])
    output = capsys.readouterr().out
    out, last = small_run / "export", small_run / "checkpoints/step_000003"
    assert sorted(p.name for p in out.iterdir()) == ["merged", "report.json"]
    assert f"checkpoint  {last}" in output and "the LoRA into data/tiny" in output
    report = json.loads((out / "report.json").read_text())
    assert report["logits"]["merged"] < 0.1 < report["logits"]["lora"]
    assert report["logits"]["relative_rms"] < 0.05
    trained, merged = report["accuracy"].values()
    assert trained["n"] == merged["n"] <= 8 and trained["same_as_trained"] == trained["n"]
    assert f"merged                                  {merged['n']:>1}" in output
    # Loaded by transformers alone, the weights are base and LoRA, rounded to 16 bits.
    model, tokenizer = load_model(out / "merged", "auto"), transformers.AutoTokenizer.from_pretrained(out / "merged")
    assert model.dtype == torch.bfloat16 and tokenizer.chat_template and model.generation_config.eos_token_id == [1]
    by_peft = peft.PeftModel.from_pretrained(load_model("data/tiny"), last).merge_and_unload().state_dict()
    for name, weight in model.state_dict().items():
        assert weight.equal(by_peft[name].bfloat16()), name
    card = (out / "merged/README.md").read_text()
    assert "GRPO, step 3, seed 0" in card and "* before training: " in card and "* merged: " in card


# Uses only transformers and peft, nothing of this project.
PLAIN = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
adapter, answers = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained("data/tiny", dtype=torch.float32)
model = PeftModel.from_pretrained(model, adapter).eval()
tokenizer = AutoTokenizer.from_pretrained(adapter)
for line in open(answers, encoding="utf-8").readlines()[:6]:
    answer = json.loads(line)
    inputs = tokenizer.apply_chat_template([{"role": "user", "content": answer["question"]}],
                                           add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0, inputs["input_ids"].shape[1]:]
    text = tokenizer.decode([i for i in ids.tolist() if i != tokenizer.eos_token_id])
    assert text == answer["completion"], (text, answer["completion"])
    print("same")
assert not {"rl", "grading", "data"} & set(sys.modules)
"""


@pytest.mark.slow
def test_saved_lora_gives_same_answers_with_transformers_and_peft_alone(small_run):
    last = small_run / "checkpoints" / (small_run / "checkpoints/last").read_text().strip()
    command = [sys.executable, "-c", PLAIN, str(last), str(small_run / "eval/after.jsonl")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "same\n" * 6


def test_exports_best_checkpoint_and_checkpoint_folder(run, capsys):
    (run / "checkpoints/best").write_text("step_000002\n")
    for path in (run / "checkpoints/best", run / "checkpoints/step_000002"):
        main([str(path), "--eval-questions", "0"])
        output = capsys.readouterr().out
        assert f"checkpoint  {run}/checkpoints/step_000002" in output and "held-out questions" not in output
    card = (run / "export/merged/README.md").read_text()
    assert "GRPO, step 2, seed 0" in card and "* at the run's last evaluation: " in card
    assert "accuracy" not in json.loads((run / "export/report.json").read_text())


def test_4_bit_run_is_merged_into_16_bit_weights(run, capsys):
    settings = yaml.safe_load((run / "config.yaml").read_text()) | {"load_in_4bit": True}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    main([str(run), "--eval-questions", "2"])
    assert "as trained, NF4, cpu in float32" in capsys.readouterr().out
    assert not hasattr(transformers.AutoConfig.from_pretrained(run / "export/merged"), "quantization_config")


@pytest.mark.slow
def test_base_model_option_replaces_a_moved_base_model(run, tmp_path, capsys):
    moved = Path(shutil.copytree("data/tiny", tmp_path / "moved"))
    settings = yaml.safe_load((run / "config.yaml").read_text()) | {"model": "no/longer"}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    assert "base model: no/longer cannot be read (--base-model): " in export_error(run)
    main([str(run), "--base-model", str(moved), "--eval-questions", "2"])
    assert "base and LoRA, cpu in float32" in capsys.readouterr().out


def test_gpu_out_of_memory_is_a_one_line_error(run, monkeypatch):
    def out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    for name in ("merge_lora", "compute_logits"):
        monkeypatch.setattr(merge, name, out_of_memory)
        assert export_error(run).startswith("the GPU is out of memory: use --device cpu ")
        monkeypatch.undo()


def test_invalid_paths_and_damaged_checkpoints_are_one_line_errors(run, tmp_path):
    assert export_error(run.with_name("smal")).endswith(f"Did you mean '{run}'?")
    assert "nowhere/at/all is neither a run folder" in export_error("nowhere/at/all")
    shutil.copytree(run / "checkpoints/step_000002", tmp_path / "alone/a/b")
    assert "nor a checkpoint" in export_error(tmp_path / "alone/a/b")  # its run folder is missing
    weights = run / "checkpoints/step_000003/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    message = export_error(run)
    assert "adapter_model.safetensors" in message
    assert f"intact checkpoints: {run}/checkpoints/step_000002" in message
    (run / "checkpoints/last").unlink()
    assert "has no checkpoint" in export_error(run)
    assert not (run / "export").exists()


def test_refuses_another_base_model(run, tmp_path):
    other = Path(shutil.copytree("data/tiny", tmp_path / "other"))
    weights = safetensors.torch.load_file(other / "model.safetensors")
    safetensors.torch.save_file(
        {n: w * 1.01 for n, w in weights.items()}, other / "model.safetensors", {"format": "pt"}
    )
    assert "is not the base model that was trained: its weights differ" in export_error(run, "--base-model", other)
    settings = json.loads((other / "config.json").read_text())
    safetensors.torch.save_file(
        {n: w.float() * 1.01 for n, w in weights.items()}, other / "model.safetensors", {"format": "pt"}
    )
    main([str(run), "--base-model", str(other), "--eval-questions", "0"])  # rounded weights cannot be compared
    shutil.rmtree(run / "export")
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (other / "config.json").write_text(json.dumps(settings | {"quantization_config": quantization}))
    assert "is quantized: name the original 16-bit model with --base-model" in export_error(run, "--base-model", other)
    smaller = transformers.Qwen3Config(**settings | {"hidden_size": 64})
    transformers.Qwen3ForCausalLM(smaller).save_pretrained(other)
    assert "does not fit" in export_error(run, "--base-model", other)
    assert not (run / "export").exists()


@pytest.mark.parametrize(
    "saved, declared, merged",
    [
        ("float32", "float32", "bfloat16"),
        ("float32", "bfloat16", "bfloat16"),  # config.json may be wrong
        ("float32", None, "bfloat16"),
        ("float16", None, "float16"),
        ("float16", "bfloat16", "float16"),
        ("float32", "float16", "float16"),
        ("mixed", "bfloat16", "bfloat16"),
    ],
)
def test_base_models_of_every_dtype_are_merged(run, tmp_path, saved, declared, merged, capsys):
    """A run in fp32 has trained on weights that the export rounds to 16 bits."""
    base = Path(shutil.copytree("data/tiny", tmp_path / "base"))
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for i, (name, w) in enumerate(safetensors.torch.load_file(base / "model.safetensors").items()):
        dtype = getattr(torch, saved, torch.float32 if i % 2 else torch.bfloat16)
        weights[name] = (w.float() * (1 + 1e-3 * torch.rand(w.shape, generator=generator))).to(dtype)
    safetensors.torch.save_file(weights, base / "model.safetensors", {"format": "pt"})
    settings = json.loads((base / "config.json").read_text()) | {"dtype": declared}
    (base / "config.json").write_text(json.dumps({n: v for n, v in settings.items() if v is not None}))
    policy = load_policy(Config(model=str(base), device="cpu"))
    state = run / "checkpoints/step_000003/trainer_state.json"
    content = json.loads(state.read_text())
    content["made"]["model"] = fingerprint(policy)  # as if the run had trained this model
    write_state(run, content)
    main([str(run), "--base-model", str(base), "--eval-questions", "0"])
    assert f"rounded to {merged}" in capsys.readouterr().out
    assert str(load_model(run / "export/merged", "auto").dtype) == f"torch.{merged}"


def write_state(run, content):
    """Replace trainer_state.json of the last checkpoint, with its checksum."""
    folder = run / "checkpoints/step_000003"
    before = sha256(folder / "trainer_state.json")
    (folder / "trainer_state.json").write_text(json.dumps(content))
    sums = (folder / "SHA256SUMS").read_text()
    (folder / "SHA256SUMS").write_text(sums.replace(before, sha256(folder / "trainer_state.json")))


# --- MoE models


@pytest.mark.parametrize("family", ["Qwen3Moe", "Mixtral"])
def test_lora_of_experts_and_router_is_merged(tmp_path, family):
    """All experts of a layer are one parameter, and so is the weight of the router."""
    policy = load_policy(Config(model=make_moe(tmp_path, family), device="cpu", dtype="bfloat16"))
    fill_lora(policy, 0.05)
    wrapped = [m.parameter_name for m in policy.model.modules() if hasattr(m, "parameter_name")]
    assert {"gate_up_proj", "down_proj", "weight"} <= set(wrapped)
    state = {name: w.float() for name, w in policy.model.state_dict().items()}
    in_fp32 = load_policy(Config(model=str(tmp_path), device="cpu")).model
    in_fp32.load_state_dict(state)
    texts = [[4, 30, 31, 32, 50], [33, 34, 35]]
    expected = torch.cat([in_fp32(torch.tensor([text]), use_cache=False).logits[0] for text in texts]).detach()
    trained = merge.compute_logits(policy.model, texts)
    torch.testing.assert_close(trained, expected, rtol=1e-4, atol=1e-4)
    with policy.model.disable_adapter():
        base = merge.compute_logits(policy.model, texts)
    by_peft = in_fp32.merge_and_unload().state_dict()
    model, rounding = merge.merge_lora(policy.model)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, by_peft[name].to(torch.bfloat16), rtol=2**-7, atol=0, msg=name)
    figures = merge.compare_logits(base, trained, merge.compute_logits(model, texts), rounding)
    assert figures["lora"] > 0.1


def make_moe(folder, family):
    """Write a small random MoE model with the bundled tokenizer, and return its folder."""
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {"moe_intermediate_size": 32, "num_experts": 4, "head_dim": 16}
    experts = experts if family == "Qwen3Moe" else {"num_local_experts": 4}
    settings = getattr(transformers, f"{family}Config")(
        vocab_size=128, intermediate_size=96, num_experts_per_tok=2, initializer_range=0.1, **shape, **experts
    )
    torch.manual_seed(0)
    getattr(transformers, f"{family}ForCausalLM")(settings).bfloat16().save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained("data/tiny").save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
def test_trained_moe_model_is_exported(tmp_path):
    folder = tmp_path / "run"
    train.main([*SMALL.split(), "--model", make_moe(tmp_path / "moe", "Qwen3Moe"), "--output-dir", str(folder)])
    policy = load_policy(Config(model=str(tmp_path / "moe"), device="cpu"))
    fill_lora(policy, 0.05)
    save_adapter(policy, checkpoint := folder / "checkpoints/step_000003")  # a LoRA with a known effect
    names = [line.split()[1] for line in (checkpoint / "SHA256SUMS").read_text().splitlines()]
    (checkpoint / "SHA256SUMS").write_text("".join(f"{sha256(checkpoint / name)}  {name}\n" for name in names))
    main([str(folder), "--eval-questions", "4", "--device", "cpu"])
    assert json.loads((folder / "export/report.json").read_text())["logits"]["relative_rms"] < 0.1


# --- interrupted exports


def write_old_export(folder):
    """Write an old merged model and return the content of the folder."""
    (folder / "merged").mkdir(parents=True)
    (folder / "merged/model.safetensors").write_text("old")
    return read_files(folder)


@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), None])
def test_failed_export_keeps_the_previous_one(run, fault, monkeypatch):
    before = write_old_export(run / "export")
    write = transformers.PreTrainedModel.save_pretrained

    def fail(model, folder, **options):
        write(model, folder, **options)
        if fault:
            raise fault
        file = Path(folder) / "model.safetensors"  # corrupt the weights silently
        weights = {name: w * 1.01 for name, w in safetensors.torch.load_file(file).items()}
        safetensors.torch.save_file(weights, file, {"format": "pt"})

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", fail)
    with pytest.raises((RunError, KeyboardInterrupt)) as error:
        main([str(run)])
    if fault is None:
        assert "the merged model is not the trained model" in str(error.value)
    elif isinstance(fault, OSError):
        assert str(error.value) == f"{run}/export/merged cannot be written: No space left on device"
    assert read_files(run / "export") == before


@pytest.mark.parametrize(
    "moment", ["while it writes", "after the old folder is renamed", "before the old one is removed"]
)
def test_killed_export_leaves_old_or_new_folder(tmp_path, moment, monkeypatch):
    """The folder has the old or the new content, immediately or once the next export starts."""
    before = write_old_export(tmp_path / "export")
    rename = Path.rename

    def kill(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    def rename_and_kill(path, target):
        rename(path, target)
        kill()

    if not (child := os.fork()):
        with merge.replace_folder(tmp_path / "export/merged") as folder:
            (folder / "model.safetensors").write_text("new")
            if moment == "while it writes":
                kill()
            if moment == "after the old folder is renamed":
                monkeypatch.setattr(Path, "rename", rename_and_kill)
            else:
                monkeypatch.setattr(merge, "repair", kill)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    with pytest.raises(ValueError), merge.replace_folder(tmp_path / "export/merged"):
        raise ValueError
    new = {"merged/model.safetensors": b"new"}
    assert read_files(tmp_path / "export") == (new if moment == "before the old one is removed" else before)
    with merge.replace_folder(tmp_path / "export/merged") as folder:
        (folder / "model.safetensors").write_text("newer")
    assert read_files(tmp_path / "export") == {"merged/model.safetensors": b"newer"}


def test_restores_the_old_folder_if_renaming_fails(tmp_path, monkeypatch):
    before = write_old_export(tmp_path / "export")
    rename = Path.rename

    def fail(path, target):
        if path.name == "merged.unfinished":
            raise OSError(errno.EIO, "Input/output error")
        rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(RunError, match="export/merged cannot be written: Input/output error"):
        with merge.replace_folder(tmp_path / "export/merged"):
            pass
    assert read_files(tmp_path / "export") == before


# --- GGUF


@pytest.fixture
def no_tools_installed(monkeypatch, tmp_path):
    """No llama.cpp on the PATH or in the home folder."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "bin").mkdir()


def write_script(path, source):
    """Write an executable Python script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{sys.executable}\nimport sys\n{source}\n")
    path.chmod(0o755)


def test_missing_converter_raises_before_merging(run, no_tools_installed, tmp_path):
    assert "gguf: convert_hf_to_gguf.py of llama.cpp is neither in llama.cpp, " in export_error(run, "--gguf", "q8_0")
    assert not (run / "export").exists()
    write_script(tmp_path / "bin/convert-hf-to-gguf", "")
    assert gguf.find_tools("q8_0", None) == {"convert": [str(tmp_path / "bin/convert-hf-to-gguf")]}
    assert "gguf: llama-quantize of llama.cpp is neither" in export_error(run, "--gguf", "q4_k_m")
    write_script(tmp_path / "llama.cpp/convert_hf_to_gguf.py", "")
    write_script(tmp_path / "llama.cpp/build/bin/llama-quantize", "")
    tools = gguf.find_tools("q4_k_m", None)
    assert tools["convert"] == [sys.executable, str(tmp_path / "llama.cpp/convert_hf_to_gguf.py")]
    assert tools["quantize"] == [str(tmp_path / "llama.cpp/build/bin/llama-quantize")]


def test_failing_converter_leaves_the_merged_model(run, no_tools_installed, tmp_path):
    write_script(
        tmp_path / "llama.cpp/convert_hf_to_gguf.py",
        "sys.exit('loading\\nNotImplementedError: tokenizer not known\\n')",
    )
    message = export_error(run, "--gguf", "q8_0", "--llama-cpp", tmp_path / "llama.cpp", "--eval-questions", "0")
    assert message == (
        "gguf: convert_hf_to_gguf.py failed: NotImplementedError: tokenizer not known; the merged model is in "
        f"{run}/export/merged"
    )
    assert sorted(p.name for p in (run / "export").iterdir()) == ["merged", "report.json"]


def test_quantized_file_is_made_from_a_16_bit_file(tmp_path):
    write_script(tmp_path / "convert_hf_to_gguf.py", "open(sys.argv[3], 'w').write(' '.join(sys.argv[4:]))")
    write_script(
        tmp_path / "llama-quantize", "open(sys.argv[2], 'w').write(open(sys.argv[1]).read() + ' ' + sys.argv[3])"
    )
    gguf.convert(gguf.find_tools("q4_k_m", str(tmp_path)), "q4_k_m", tmp_path, tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").read_text() == "--outtype bf16 Q4_K_M"
    assert not (tmp_path / "unquantized.gguf").exists()
    gguf.convert(gguf.find_tools("q8_0", str(tmp_path)), "q8_0", tmp_path, tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").read_text() == "--outtype q8_0"


def test_modelfile_has_temperature_and_system_prompt():
    lines = gguf.modelfile("m.gguf", 0.7, "Think.\nThen answer.", {}).splitlines()
    assert lines[2:] == ["FROM ./m.gguf", "PARAMETER temperature 0.7", 'SYSTEM """Think.', 'Then answer."""']
    assert gguf.modelfile("m.gguf", 1.0, None, {}).endswith("PARAMETER temperature 1\n")
    assert '{"enable_thinking": false}' in gguf.modelfile("m.gguf", 1.0, None, {"enable_thinking": False})


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bf16", "q8_0"])
def test_gguf_file_has_the_logits_of_the_merged_model(kind, tmp_path):
    """Use the real converter on a small random Llama with a sentencepiece tokenizer trained here."""
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("gguf")
    try:
        gguf.find_tools("q8_0", None)
    except ConfigError as error:
        pytest.skip(str(error))
    base = tmp_path / "llama"
    base.mkdir()
    texts = [f"What is {a} + {b}? The answer is {a + b}." for a in range(30) for b in range(30)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(base / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    tokenizer = transformers.LlamaTokenizer.from_pretrained(base)
    tokenizer.save_pretrained(base)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    settings = transformers.LlamaConfig(
        vocab_size=len(tokenizer), num_key_value_heads=2, initializer_range=0.1, **shape
    )
    transformers.LlamaForCausalLM(settings).bfloat16().save_pretrained(base)
    run = tmp_path / "run"
    train.main([*SMALL.split(), "--model", str(base), "--output-dir", str(run)])
    policy = load_policy(Config(model=str(base), device="cpu"))
    fill_lora(policy, 0.05)
    checkpoint = run / "checkpoints/step_000003"
    save_adapter(policy, checkpoint)  # a LoRA with a known effect
    checksums = [
        f"{sha256(checkpoint / line.split()[1])}  {line.split()[1]}" for line in (checkpoint / "SHA256SUMS").open()
    ]
    (checkpoint / "SHA256SUMS").write_text("\n".join(checksums))
    main([str(run), "--gguf", kind, "--device", "cpu", "--eval-questions", "4"])
    out = run / "export"
    assert sorted(p.name for p in (out / kind).iterdir()) == ["Modelfile", f"run-{kind}.gguf"]
    report = json.loads((out / "report.json").read_text())
    logits = report["logits"]
    assert logits["gguf"] < (0.2 * logits["lora"] if kind == "q8_0" else 1e-4)
    assert [name.split()[0] for name in report["accuracy"]] == ["as", "merged", "GGUF"]
    assert sorted(p.name for p in out.iterdir()) == sorted(["merged", "report.json", kind])


# --- the Hub


class Hub:
    """Replaces huggingface_hub.HfApi and records its calls."""

    def __init__(self, private=True, error=None):
        self.private, self.error, self.calls = private, error, []

    def create_repo(self, name, **options):
        self.calls.append(("create_repo", name, options))
        return f"hub/{name}"

    def model_info(self, name):
        return SimpleNamespace(private=self.private)

    def upload_folder(self, **options):
        if self.error:
            raise self.error
        self.calls.append(("upload_folder", options["repo_id"], options["folder_path"]))


def test_upload_is_private_by_default(tmp_path, monkeypatch, capsys):
    def push(public, hub):
        monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
        Export.upload(SimpleNamespace(merged=tmp_path), "me/model", public)

    hub = Hub()
    push(False, hub)
    assert capsys.readouterr().out == "uploaded    hub/me/model\n"
    assert hub.calls == [
        ("create_repo", "me/model", {"private": True, "exist_ok": True}),
        ("upload_folder", "me/model", tmp_path),
    ]
    hub = Hub(private=False)
    with pytest.raises(RunError, match="me/model exists and is public: add --public"):
        push(False, hub)
    assert len(hub.calls) == 1
    push(True, hub)
    assert hub.calls[1:] == [
        ("create_repo", "me/model", {"private": False, "exist_ok": True}),
        ("upload_folder", "me/model", tmp_path),
    ]
    with pytest.raises(RunError, match="was not uploaded: the line is cut .log in with.*; the merged model is in"):
        push(True, Hub(error=ConnectionError("the line is cut\nand more")))


def test_failed_upload_keeps_the_merged_model(run):
    message = export_error(run, "--push-to-hub", "me/too/many", "--eval-questions", "0")
    assert "me/too/many was not uploaded: Repo id must" in message
    message = export_error(run, "--push-to-hub", "me/model", "--eval-questions", "0")
    assert message.startswith("push_to_hub: me/model was not uploaded: ") and f"is in {run}/export/merged" in message
    assert load_model(run / "export/merged")


def test_help_lists_all_settings(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["--help"])
    output = capsys.readouterr().out
    assert exit_info.value.code == 0 and "--push-to-hub" in output and "q4_k_m" in output and "PATH" in output
