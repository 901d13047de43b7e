"""The recipes in configs/: their headers agree with --dry-run, and answers to their questions can be graded.

python tests/rl/fit/test_recipes.py        writes the predicted memory and time to the headers
"""

import dataclasses
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # as a script

from data import hub, level_of, load, load_questions
from grading import Completion, load_rewards, preflight, sandbox, score_all
from rl.config import ConfigError
from rl.fit import recipes
from rl.fit.cards import GB, IMPORTS, Machine
from rl.fit.dry_run import dry_run
from rl.fit.memory import predict
from rl.fit.shapes import find_shape
from rl.model import backends
from rl.run.read_config import read_config, read_yaml

RECIPES = sorted(
    str(path)
    for path in Path("configs").glob("*.yaml")
    if not path.stem.startswith(("tiny", "long_sums", "smollm2", "ice_maze", "calculator"))
)
FIELD = re.compile(r"^# (Card|Memory|Time|Result) +(.*)$", re.MULTILINE)
# Recipes whose sources generate their questions, so that nothing is downloaded (reasoning_gym by family and level).
GENERATED = {"configs/countdown.yaml", "configs/reasoning_gym.yaml"}


@pytest.fixture(scope="module", autouse=True)
def shapes_are_found_once():
    """Many tests need the shapes of the same models; building one takes half a second."""
    with pytest.MonkeyPatch.context() as patch:
        cached = functools.cache(find_shape)
        patch.setattr("rl.fit.recipes.find_shape", cached)
        patch.setattr("rl.fit.dry_run.find_shape", cached)
        yield


def header(file):
    """Return the fields of a recipe's header, and the memory of its card in GB."""
    text = Path(file).read_text(encoding="utf-8")
    fields = dict(FIELD.findall(text[: text.index("\nmodel:")]))
    return fields, re.search(r"--gpu-memory (\d+)", fields["Card"])[1]


def predicted(file):
    """Return memory and time as predicted by --dry-run, in the format of the header."""
    config, _ = read_config(["--config", file, "--dry-run", "--gpu-memory", header(file)[1]], "")
    prompts = [row["prompt"] for row in generated_rows(file)] if file in GENERATED else []  # as in a dry run
    text = dry_run(config, prompts=prompts)
    memory = re.search(r"It fits: .*|It does not fit.*", text)[0]
    return {"Memory": memory, "Time": re.search(r"time +(about .*);|$", text)[1]}


@functools.cache
def generated_rows(file):
    """Return the rows of sources that generate their questions. Cached, because reasoning_gym takes seconds."""
    return [row for source in read_config(["--config", file], "")[0].train_data for row in load(source)]


def write_headers():
    for file in RECIPES:
        text = Path(file).read_text(encoding="utf-8")
        for name, value in predicted(file).items():
            text = re.sub(rf"^# {name} .*$", f"# {name:8} {value}", text, count=1, flags=re.MULTILINE)
        Path(file).write_text(text, encoding="utf-8")
        print(file, *predicted(file).values())


# --- headers


@pytest.mark.parametrize(
    "file", [pytest.param(f, marks=pytest.mark.slow) if "reasoning_gym" in f else f for f in RECIPES]
)
def test_header_agrees_with_the_dry_run(file):
    if "reasoning_gym" in file:
        pytest.importorskip("reasoning_gym")
    fields, gigabytes = header(file)
    text = Path(file).read_text(encoding="utf-8")
    assert f"#   python train.py --config {file}\n" in text
    assert "# Not yet run on a GPU: memory and time are predicted, not measured.\n" in text
    assert re.search(r"verl|no published figure", fields["Result"])
    assert f"{gigabytes} GB" in fields["Card"]
    prediction = predicted(file)
    assert prediction["Memory"].startswith("It fits: ") and " modelled for " in prediction["Time"]
    header_values = {name: fields[name] for name in prediction}
    assert header_values == prediction, "run python tests/rl/fit/test_recipes.py to update the headers"
    assert len(text.splitlines()) <= 40


def test_readme_agrees_with_the_headers():
    rows = dict(
        re.findall(
            r"^\| `([\w.]+)`.*?\| \w+ \| ([\d.]+ \| \d+ \([\w ]+\)) \|", Path("README.md").read_text(), re.MULTILINE
        )
    )
    assert rows.keys() == {Path(file).stem for file in RECIPES}
    for file in RECIPES:
        fields, _ = header(file)
        needed = re.search(r"It fits: ([\d.]+)", fields["Memory"])[1]
        minutes, card = re.search(r"about (\d+) minutes modelled for ([\w ]+) \(", fields["Time"]).groups()
        assert rows[Path(file).stem] == f"{needed} | {minutes} ({card})", file


@pytest.mark.parametrize("file", RECIPES)
def test_recipe_has_the_required_settings(file):
    config, name = read_config(["--config", file], "")
    assert name == Path(file).stem
    assert config.load_in_4bit and config.gradient_checkpointing and config.optim == "adamw_8bit"
    assert 1e-5 <= config.learning_rate <= 5e-5 and config.lora_r in (16, 32)
    assert config.rollout_batch_size % config.num_generations == 0
    assert config.eval_steps and config.max_steps // config.eval_steps <= 4
    assert config.dtype == ("float16" if name == "t4" else "auto")


def test_tiny_recipes_can_be_read():
    for file in ("configs/tiny.yaml", "configs/tiny_ppo.yaml", "configs/long_sums.yaml"):
        assert read_config(["--config", file], "")[0].model == "data/tiny"


def test_laptop_recipe_fits_into_3_gb_and_uses_the_bundled_demonstrations():
    config, name = read_config(["--config", recipes.LAPTOP, "--device", "cpu"], "")
    assert name == "smollm2_135m" and config.model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert len(Path(config.sft_data).read_text().splitlines()) <= 200
    for dtype in ("bfloat16", "float32"):
        prediction = predict(config, find_shape(config.model), "cpu", dtype, prompt_length=80)
        assert prediction.peak + IMPORTS < 3 * GB, dtype


# --- settings that fit a model


def fitted(model, machine, monkeypatch, *arguments):
    monkeypatch.setattr(recipes, "find_machine", lambda config: machine)
    return read_config(["--model", model, "--dry-run", *arguments], "configs/tiny.yaml")[0]


CPU = Machine("cpu", "float32", 16 * GB, "the CPU")


def test_a_model_without_a_recipe_does_not_get_the_settings_of_the_tiny_one(monkeypatch, capsys):
    config = fitted("HuggingFaceTB/SmolLM2-135M-Instruct", CPU, monkeypatch)
    assert config.learning_rate == 1e-4 and config.max_tokens_per_micro_batch == 1024
    assert config.num_mini_batches == 1 and not config.gradient_checkpointing
    assert (
        "Chosen for HuggingFaceTB/SmolLM2-135M-Instruct on this machine: learning_rate 0.0001"
        in capsys.readouterr().out
    )
    assert fitted("Qwen/Qwen3-1.7B", CPU, monkeypatch).learning_rate == 2e-5
    config = fitted("HuggingFaceTB/SmolLM2-135M-Instruct", CPU, monkeypatch, "--learning-rate", "3e-5")
    assert config.learning_rate == 3e-5 and config.max_tokens_per_micro_batch == 1024
    assert fitted("data/tiny", CPU, monkeypatch).max_steps == 45  # the recipe's own model


@pytest.mark.parametrize("model", ["HuggingFaceTB/SmolLM2-360M", "Qwen/Qwen2.5-0.5B", "Qwen/Qwen3-0.6B"])
@pytest.mark.parametrize("gigabytes", [4, 6, 8, 24])
def test_chosen_settings_fit_into_the_memory(model, gigabytes, monkeypatch):
    for machine in (
        Machine("cuda", "bfloat16", gigabytes * GB, "a card"),
        Machine("cpu", "float32", gigabytes * GB, "the CPU"),
    ):
        config = fitted(model, machine, monkeypatch)
        prediction = predict(config, find_shape(model), machine.device, machine.dtype, 256, machine.free())
        assert machine.needed(prediction.peak) <= machine.memory
        assert config.rollout_batch_size >= config.num_generations


def test_a_resumed_run_keeps_its_settings(tmp_path, monkeypatch):
    from rl.run.read_config import saved_settings

    config = fitted("HuggingFaceTB/SmolLM2-135M", CPU, monkeypatch)
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(saved_settings(config)))
    monkeypatch.setattr(recipes, "find_machine", None)
    assert read_config(["--resume", str(tmp_path / "run")], "")[0].learning_rate == config.learning_rate


def test_an_unknown_model_keeps_the_defaults(monkeypatch, tmp_path):
    config = fitted(str(tmp_path), CPU, monkeypatch)
    assert config.learning_rate == 1e-5 and config.max_tokens_per_micro_batch == 8192


# --- questions: small invented rows in the format of the sources

DOUBLE = "def double(n):\r\n    return 2 * n\r\n"
SETS = {
    ("openai/gsm8k", "main"): [
        {
            "question": f"Tom bakes {n} trays with 12 rolls each and burns 5. How many rolls are good?",
            "answer": f"There are {n}*12=<<{n}*12={12 * n}>>{12 * n} rolls.\nGood are {12 * n}-5=<<{12 * n}-5={12 * n - 5}>>{12 * n - 5}.\n#### {12 * n - 5:,}",
        }
        for n in (3, 400)
    ],
    ("open-r1/DAPO-Math-17k-Processed", "en"): [
        {
            "prompt": f"Find the sum of the odd numbers below {n}.",
            "solution": str((n // 2) ** 2),
            "data_source": "math_dapo",
            "source_prompt": [{"role": "user", "content": f"Find the sum of the odd numbers below {n}."}],
            "ability": "MATH",
            "reward_model": {"ground_truth": str((n // 2) ** 2), "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": f"made-up-{n}"},
        }
        for n in (20, 70)
    ],
    ("HuggingFaceH4/MATH-500", None): [
        {
            "problem": f"What is {n} divided by {n + 2}?",
            "solution": f"It is $\\boxed{{\\frac{{{n}}}{{{n + 2}}}}}$.",
            "answer": f"\\frac{{{n}}}{{{n + 2}}}",
            "subject": "Prealgebra",
            "level": 1,
            "unique_id": f"test/prealgebra/made_up_{n}.json",
        }
        for n in (3, 5)
    ],
    ("google-research-datasets/mbpp", "full"): [
        {
            "task_id": 9001,
            "text": "Write a function to double a number.",
            "code": DOUBLE,
            "test_list": ["assert double(2) == 4", "assert double(0) == 0", "assert double(-3) == -6"],
            "test_setup_code": "",
            "challenge_test_list": [],
        }
    ],
    ("google-research-datasets/mbpp", "sanitized"): [
        {
            "source_file": "made_up.ipynb",
            "task_id": 9002,
            "prompt": "Write a function to double a number.",
            "code": DOUBLE,
            "test_imports": ["import math"],
            "test_list": ["assert double(2) == 4", "assert double(math.floor(1.5)) == 2"],
        }
    ],
    ("openai/openai_humaneval", None): [
        {
            "task_id": "HumanEval/9003",
            "prompt": 'def third(words: list) -> str:\n    """The third of the words.\n    >>> third(["a", "b", "c"])\n    \'c\'\n    """\n',
            "canonical_solution": "    return words[2]\n",
            "test": "METADATA = {}\n\n\ndef check(candidate):\n    assert candidate(['a', 'b', 'c']) == 'c'\n    assert candidate(list('wxyz')) == 'y'\n",
            "entry_point": "third",
        }
    ],
}
SINGLE_SPLIT = {"openai/openai_humaneval": "test", "HuggingFaceH4/MATH-500": "test"}


@pytest.fixture
def fake_hub(monkeypatch):
    """A Hub with the data sets above. Those with two splits have one row in each."""
    datasets = pytest.importorskip("datasets")
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def load_dataset(name, config=None):
        rows = SETS[name, config]
        splits = {SINGLE_SPLIT[name]: rows} if name in SINGLE_SPLIT else {"train": rows[:1], "test": rows[-1:]}
        return datasets.DatasetDict({split: datasets.Dataset.from_list(part) for split, part in splits.items()})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name, timeout: None)
    hub._fetch.cache_clear()
    yield
    hub._fetch.cache_clear()


@pytest.fixture(scope="module")
def rewards():
    sandbox.start(code_timeout=5.0)
    return load_rewards("rewards.py")


def make_completion(row, system_prompt, right=True):
    """Return a right or wrong completion in the format that the recipe's system prompt requests."""
    forms = {
        "####": "#### {}",
        "\\boxed{}": "It is $\\boxed{{{}}}$.",
        "<answer>": "<answer>{}</answer>",
        "```python": "```python\n{}\n```",
    }
    (form,) = [form for marker, form in forms.items() if marker in system_prompt]
    if "```" in form:
        gold = row["solution"] if right else row["solution"].replace("return", "return not")
    elif row.get("grader") == "countdown":
        gold = row["solution"] if right else row["solution"] + "+1"
    else:
        gold = row["answer"] if right else "77777"
    thinking = "<think>Let me see.</think>" if "<think>" in system_prompt else "Let me see.\n"
    return Completion(prompt=row["prompt"], text=thinking + form.format(gold), row=row, tokens=20)


def check_rows(rows, config, rewards):
    """Check that right answers get the full score, and wrong ones only the score for the format."""
    assert not [note for note in preflight(rewards, rows) if "warning" in note]
    for right in (True, False):
        for score in score_all(rewards, [make_completion(row, config.system_prompt, right) for row in rows]):
            assert score.is_right == right and score.parts["format"] == 1, score
            assert score.total == pytest.approx(1.1 if right else 0.1)


@pytest.mark.parametrize("file", [file for file in RECIPES if file not in GENERATED])
def test_right_answers_get_the_full_score(file, fake_hub, rewards):
    config, _ = read_config(["--config", file], "")
    train_rows, eval_rows, notes = load_questions(config)
    assert train_rows and eval_rows and not [note for note in notes if "evaluation" in note]
    assert {row["prompt"] for row in train_rows}.isdisjoint(row["prompt"] for row in eval_rows)
    check_rows(train_rows + eval_rows, config, rewards)


def test_sanitized_mbpp_can_be_graded(fake_hub, rewards):
    rows = load("google-research-datasets/mbpp")
    assert rows[0]["setup"] == "import math"
    check_rows(rows, read_config(["--config", "configs/qwen3_1.7b_mbpp.yaml"], "")[0], rewards)


def test_countdown_can_be_graded(rewards):
    check_rows(load("countdown", 5), read_config(["--config", "configs/countdown.yaml"], "")[0], rewards)


@pytest.mark.slow
def test_reasoning_gym_can_be_graded(rewards):
    pytest.importorskip("reasoning_gym")
    config, _ = read_config(["--config", "configs/reasoning_gym.yaml"], "")
    rows = generated_rows("configs/reasoning_gym.yaml")
    assert set(map(level_of, rows)) == {1, 2, 3, 4} and config.curriculum_steps
    check_rows(rows[::40], config, rewards)


# --- --config auto


def choose(gigabytes, dtype="bfloat16"):
    """Return the recipe chosen for a card with this memory, and the explanation."""
    settings = {"gpu_memory": float(gigabytes), "dtype": dtype, "dry_run": True}
    return recipes.choose_recipe(lambda file: dataclasses.replace(read_yaml(file), **settings))


def auto(capsys, *arguments):
    """Return the recipe chosen by --config auto, and its output."""
    name = read_config(["--config", "auto", "--dry-run", *map(str, arguments)], "")[1]
    return name, capsys.readouterr().out


@pytest.mark.parametrize(
    "gigabytes, bf16, fp16",
    [
        (2, "tiny", "tiny"),
        (4, "qwen3_0.6b_gsm8k", "qwen2.5_0.5b_gsm8k"),
        (6, "qwen3_0.6b_gsm8k", "qwen2.5_0.5b_gsm8k"),
        (8, "qwen3_1.7b_gsm8k", "t4"),
        (12, "llama3.2_3b_gsm8k", "t4"),
        (16, "qwen3_4b_base_dapo", "t4"),
        (24, "qwen3_8b_base_dapo", "t4"),
        (80, "qwen3_8b_base_dapo", "t4"),
    ],
)
def test_auto_chooses_the_largest_recipe_that_fits(gigabytes, bf16, fp16):
    file, text = choose(gigabytes)
    assert Path(file).stem == bf16 and f"Using {file}" in text
    assert f" {gigabytes} GB, in bfloat16." in text and "not measured" in text
    assert Path(choose(gigabytes, "float16")[0]).stem == fp16


@pytest.mark.parametrize("gigabytes", [3.0, 3.6, 5.5, 7.6, 9.4, 11.6, 14.9, 15.6, 22.0])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_recipe_chosen_by_auto_fits(gigabytes, dtype):
    file, text = choose(gigabytes, dtype)

    def predict_recipe(file, gigabytes):
        config = dataclasses.replace(read_yaml(file), gpu_memory=float(gigabytes), dtype=dtype)
        return dry_run(config, prompt_length=256)

    assert "It fits: " in predict_recipe(file, gigabytes)
    if larger := re.search(r"next larger recipe, (\S+), needs ([\d.]+) GB", text):
        assert float(larger[2]) > gigabytes and "It fits: " in predict_recipe(*larger.groups())


def test_auto_names_the_minimum_memory_if_the_card_is_too_small():
    file, text = choose(2)
    smallest = re.search(r"smallest recipe, (\S+), needs ([\d.]+) GB", text)
    assert file == recipes.TINY and smallest[1] == recipes.LADDER[-1]
    assert choose(smallest[2])[0] == smallest[1]


def test_auto_applies_the_command_line(capsys):
    name, text = auto(capsys, "--gpu-memory", 12, "--max-completion-length", 4096)
    assert name == "qwen2.5_0.5b_gsm8k" and "configs/qwen3_0.6b_gsm8k.yaml, needs" in text
    arguments = ["--config=auto", "--dry-run", "--gpu-memory", "15", "--dtype", "float16", "--max-steps", "7"]
    config, name = read_config(arguments, "")
    assert name == "t4" and config.max_steps == 7 and config.model == "Qwen/Qwen2.5-1.5B-Instruct"
    with pytest.raises(ConfigError, match="^gpu_memory is 15, .*--dry-run"):
        read_config(["--config", "auto", "--gpu-memory", "15"], "")


def test_auto_chooses_the_laptop_recipe_without_a_gpu(capsys, monkeypatch):
    name, text = auto(capsys, "--device", "cpu")
    assert name == "smollm2_135m" and "no NVIDIA GPU" in text and f"Using {recipes.LAPTOP}." in text
    machine = Machine("cpu", "float32", 3 * GB, "the CPU")
    monkeypatch.setattr(recipes, "find_machine", lambda config: machine)
    assert recipes.choose_recipe(read_yaml)[0] == recipes.TINY


def test_auto_imports_neither_torch_nor_transformers_without_a_gpu():
    code = (
        "import sys; from rl.run.read_config import read_config\n"
        "assert read_config(['--config', 'auto', '--device', 'cpu'], '')[1] == 'smollm2_135m'\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unsloth_is_imported_before_the_prediction_imports_transformers(monkeypatch):
    """With --dry-run it is not imported at all."""
    machine = Machine("cuda", "bfloat16", 8 * GB, "a card")
    monkeypatch.setattr(recipes, "find_machine", lambda config: machine)
    calls = []
    monkeypatch.setattr(backends, "import_backend", lambda config: calls.append("backend"))
    monkeypatch.setattr(recipes, "find_shape", lambda model: calls.append("shape") or find_shape(model))
    recipes.choose_recipe(read_yaml)
    assert calls[:2] == ["backend", "shape"]
    calls.clear()
    recipes.choose_recipe(lambda file: dataclasses.replace(read_yaml(file), dry_run=True))
    assert set(calls) == {"shape"}


def test_auto_uses_free_memory_and_bf16_support_of_this_machine(monkeypatch):
    def choose_here(memory, dtype):
        machine = Machine("cuda", dtype, memory * GB, f"NVIDIA Something with {memory:.1f} GB free")
        monkeypatch.setattr(recipes, "find_machine", lambda config: machine)
        return recipes.choose_recipe(read_yaml)

    file, text = choose_here(11.6, "bfloat16")
    assert file == "configs/llama3.2_3b_gsm8k.yaml" and "NVIDIA Something with 11.6 GB free, in bfloat16" in text
    assert choose_here(5.4, "float16")[0] == "configs/qwen2.5_0.5b_gsm8k.yaml"
    assert choose_here(14.5, "float16")[0] == "configs/t4.yaml"


def test_ladders_are_sorted_by_memory():
    machine = Machine("cuda", "bfloat16", 0.1 * GB, "a card")
    for ladder in (recipes.LADDER, recipes.LADDER_FP16):
        assert set(ladder) <= set(RECIPES)
        configs = map(read_yaml, ladder)
        minima = [recipes.min_memory(config, find_shape(config.model), machine) for config in configs]
        assert minima == sorted(minima, reverse=True)


if __name__ == "__main__":
    write_headers()
