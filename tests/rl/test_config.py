"""Settings: YAML types, overrides, and errors that name the key and its valid values."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rl.config import ABOVE_0, AT_LEAST_1, AT_MOST_1, BELOW_1, Config, ConfigError
from rl.run.read_config import RENAMED_SETTINGS, read_config, read_yaml


def from_yaml(tmp_path, text, *arguments):
    (tmp_path / "c.yaml").write_text(text)
    return read_config(["--config", str(tmp_path / "c.yaml"), *arguments], "unused.yaml")[0]


def test_yaml_types_and_overrides(tmp_path):
    text = "learning_rate: 1e-5\nbeta: 0\ndelta: null\ntrain_data: sums\ncolumns: {prompt: q}\nmax_steps: 3.0\n"
    config = from_yaml(tmp_path, text, "--max-steps", "7", "--scale_rewards", "none", "--load-in-4bit")
    assert config.learning_rate == 1e-5 and isinstance(config.beta, float) and config.delta is None
    assert config.train_data == ["sums"] and config.columns == {"prompt": "q"}
    assert config.max_steps == 7 and config.scale_rewards == "none" and config.load_in_4bit
    assert from_yaml(tmp_path, "") == dataclasses.replace(Config(), learning_rate=2e-3)  # chosen for the tiny model


@pytest.mark.parametrize(
    "text, message",
    [
        ("lerning_rate: 1", "there is no setting lerning_rate. Did you mean .learning_rate.?"),
        ("max_steps: ten", "max_steps is 'ten', but must be a whole number"),
        ("max_steps: 1.5", "max_steps is 1.5, but must be a whole number"),
        ("max_steps: true", "max_steps is True, but must be a whole number"),
        ("learning_rate: fast", "learning_rate is 'fast', but must be a number"),
        ("learning_rate: .nan", "learning_rate is nan, but must be a number"),
        ("load_in_4bit: 1", "load_in_4bit is 1, but must be true or false"),
        ("loss_type: gpro", "loss_type is 'gpro', .* one of dapo, grpo, dr_grpo, cispo, sapo. Did you mean .grpo"),
        ("system_prompt: 3", "system_prompt is 3, but must be text"),
        ("columns: [a]", "columns is .'a'., but must be a mapping"),
        ("- a", "expected lines of the form"),
        ("max_steps: 1\na: ]", "c.yaml:2: not valid YAML"),
        ("num_generations: 1", "num_generations is 1.*compares"),
        ("temperature: 0", "temperature is 0, but must be above 0"),
        ("temperature: -1", "temperature is -1"),
        ("max_steps: 0", "max_steps is 0, but must be at least 1"),
        ("learning_rate: -1", "learning_rate is -1.0, but must not be negative"),
        ("top_p: 0", "top_p is 0, but must be above 0"),
        ("top_p: 1.1", "top_p is 1.1, but must be at most 1"),
        ("min_p: 1", "min_p is 1.0, but must be below 1"),
        ("min_p: -0.1", "min_p is -0.1, but must not be negative"),
        ("gamma: 1.1", "gamma is 1.1, but must be at most 1"),
        ("lam: -1", "lam is -1.0, but must not be negative"),
        ("warmup_ratio: 2", "warmup_ratio is 2.0, but must be at most 1"),
        ("epsilon: 1.5", "epsilon is 1.5, but must be below 1"),
        ("epsilon: 0", "epsilon is 0, but must be above 0"),
        ("epsilon_high: 0", "epsilon_high is 0, but must be above 0"),
        ("code_timeout: 0", "code_timeout is 0, but must be above 0 .seconds"),
        ("repetition_penalty: 0", "repetition_penalty is 0, but must be above 0"),
        ("max_grad_norm: 0", "max_grad_norm is 0, but must be above 0 .a large number"),
        ("sapo_temperature_neg: 0", "sapo_temperature_neg is 0, but must be above 0"),
        ("target_kl: 0", "target_kl is 0, but must be above 0"),
        ("delta: 1.1", "delta is 1.1.*exceed"),
        ("{beta: 0.1, kl_estimator: k1, use_bias_correction_kl: false}", "kl_estimator k1 in the loss"),
        ("{num_mini_batches: 5, prompts_per_step: 4}", "num_mini_batches .5. is more than prompts_per_step .4."),
        ("train_data: []", "train_data is empty"),
    ],
)
def test_errors_are_one_line_with_the_key(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as error:
        from_yaml(tmp_path, text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, character",
    [
        (r'system_prompt: "Use \boxed{}."', r"'\x08' before 'oxed{}.'"),
        (r'system_prompt: "Use \frac12"', r"'\x0c' before 'rac12'"),
        (r'system_prompt: "Use \text{cm}"', r"'\t' before 'ext{cm}'"),
        (r'system_prompt: "2 \times 3"', r"'\t' before 'imes 3'"),
        (r'system_prompt: "\nabla f"', r"'\n' before 'abla f'"),
        (r'system_prompt: "\left( \right)"', "escape"),
        (r'system_prompt: "1 \right)"', r"'\r' before 'ight)'"),
        (r'system_prompt: "\alpha"', r"'\x07' before 'lpha'"),
        (r'system_prompt: "\vec{a}"', r"'\x0b' before 'ec{a}'"),
        (r'system_prompt: "\epsilon"', r"'\x1b' before 'psilon'"),
        (r'system_prompt: "\Nabla \Leftarrow"', r"'\x85' before 'abla "),
        (r'system_prompt: "\Phi"', r"'\u2029' before 'hi'"),
        (r'train_data: ["a", "\boxed.jsonl"]', "train_data has the control character"),
        (r'columns: {answer: "\bold"}', "columns has the control character"),
        (r'chat_template_kwargs: {"\bold": 1}', "chat_template_kwargs has the control character"),
        (r'chat_template_kwargs: {tools: [{name: "\bold"}]}', "chat_template_kwargs has the control character"),
    ],
)
def test_control_characters_are_errors_with_file_setting_and_fix(tmp_path, text, character):
    with pytest.raises(ConfigError) as error:
        from_yaml(tmp_path, text)
    message = str(error.value)
    assert message.startswith(f"{tmp_path}/c.yaml:") and character in message and "\n" not in message
    assert "in single quotes" in message


def test_unknown_escapes_raw_control_characters_and_tabs_as_indentation_are_one_line_errors(tmp_path):
    for text in (r'system_prompt: "a \sqrt b"', r'system_prompt: "a \xi b"', r'system_prompt: "\upsilon"'):
        with pytest.raises(ConfigError, match="c.yaml:1: not valid YAML: .* in single quotes$"):
            from_yaml(tmp_path, text)
    for text in ("columns:\n\tanswer: gold", "seed: 1\nsystem_prompt: \ta"):
        with pytest.raises(ConfigError, match="c.yaml:2: not valid YAML: .* use spaces instead of the tab$"):
            from_yaml(tmp_path, text)
    with pytest.raises(ConfigError, match="c.yaml: not valid YAML: unacceptable character #x0008[^\n]*$"):
        from_yaml(tmp_path, "system_prompt: a\x08oxed")
    with pytest.raises(
        ConfigError, match="^command line: system_prompt has the control character '.x08' before 'oxed'"
    ):
        from_yaml(tmp_path, "", "--system-prompt", "\x08oxed")


@pytest.mark.parametrize(
    "text, expected",
    [
        (r'"Think.\nThen answer.\n\n\t1.\tstep"', "Think.\nThen answer.\n\n\t1.\tstep"),
        (r'"a\textra\tb\n\nnext"', "a\textra\tb\n\nnext"),
        (r'"Use \\boxed{} and \\text{}."', "Use \\boxed{} and \\text{}."),
        (r"'Use \boxed{} and \text{}.'", "Use \\boxed{} and \\text{}."),
        (r"Use \boxed{}.", "Use \\boxed{}."),
        ("|\n  Use \\boxed{}.\n  \tIndented.\n", "Use \\boxed{}.\n\tIndented.\n"),
        ("'caf\u00e9 \u00a0 \u4e2d \U0001f600'", "caf\u00e9 \u00a0 \u4e2d \U0001f600"),
    ],
)
def test_line_breaks_tabs_and_backslashes_are_allowed(tmp_path, text, expected):
    (tmp_path / "c.yaml").write_text(f"system_prompt: {text}", encoding="utf-8")
    assert read_yaml(str(tmp_path / "c.yaml")).system_prompt == expected


def test_settings_of_trl_and_unsloth_name_their_equivalent(tmp_path):
    with pytest.raises(ConfigError, match="per_device_train_batch_size .* use prompts_per_step"):
        from_yaml(tmp_path, "per_device_train_batch_size: 8")
    with pytest.raises(ConfigError, match="max_seq_length .* max_completion_length"):
        from_yaml(tmp_path, "", "--max-seq-length", "2048")
    renamed = yaml.safe_load(RENAMED_SETTINGS.read_text())
    assert all(isinstance(hint, str) for hint in renamed.values())
    assert not set(renamed) & set(vars(Config()))  # no existing setting is listed
    with pytest.raises(ConfigError, match="Did you mean .max_steps"):
        from_yaml(tmp_path, "", "--max_step=3")


def test_all_bounds_apply_to_numbers():
    names = [*AT_LEAST_1, *AT_MOST_1, *BELOW_1, *ABOVE_0]
    assert all(isinstance(getattr(Config(), name), (int, float, type(None))) for name in names)
    with pytest.raises(ConfigError, match="beta is inf, but must be a finite number"):
        Config(beta=float("inf")).check()
    Config(seed=-1).check()


def test_reading_settings_imports_no_memory_predictor():
    code = "import sys, rl.run.read_config; assert not [name for name in sys.modules if name.startswith('rl.fit')]"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_missing_files():
    with pytest.raises(ConfigError, match="no file configs/tny.yaml; .*configs/tiny.yaml"):
        read_config(["--config=configs/tny.yaml"], "unused")
    with pytest.raises(ConfigError, match="--config .* a path"):
        read_config(["--config"], "unused")


def test_a_wrong_type_on_the_command_line_names_the_flag(capfd):
    with pytest.raises(SystemExit):
        read_config(["--lora-r", "many"], "configs/tiny.yaml")
    assert "--lora-r" in capfd.readouterr().err


def test_notes_mention_sampling_settings_that_change_the_policy():
    assert not Config().notes()
    assert "top_k 20" in Config(top_k=20).notes()[0]


def test_every_setting_has_a_line_of_help_and_help_loads_no_torch():
    code = """if True:
        import runpy, sys
        sys.argv = ["train.py", "--help"]
        try:
            runpy.run_path("train.py", run_name="__main__")
        finally:
            assert not {"torch", "transformers"} & set(sys.modules)
    """
    help = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    source = Path("rl/config.py").read_text()
    for name in vars(Config()):
        (line,) = [line for line in source.splitlines() if line.startswith(f"    {name}: ")]
        assert "  # " in line, name
        assert f"--{name.replace('_', '-')}" in help or name == "chat_template_kwargs"


@pytest.mark.parametrize("path", sorted(Path("configs").glob("*.yaml")), ids=str)
def test_recipes_are_valid_and_show_their_command(path):
    read_yaml(str(path)).check()
    text = path.read_text()
    assert text.startswith("#") and "python train.py" in text
    assert yaml.safe_load(text)


def test_columns_accept_both_forms(tmp_path):
    file = tmp_path / "empty.yaml"
    file.write_text("{}")
    for form in (["--columns", "answer=gold", "id=n"], ["--columns", "answer", "gold", "id", "n"]):
        config, _ = read_config(["--config", str(file), *form, "--seed", "3"], default_file=str(file))
        assert config.columns == {"answer": "gold", "id": "n"} and config.seed == 3


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--resume", "nothing"], "resume: nothing is not the folder of a run"),
        (["--gpu-memory", "8"], "gpu_memory is 8"),
        (["--dry-run", "--gpu-memory", "0"], "gpu_memory is 0"),
        (["--config", "FILE"], "FILE: dry_run can only be set on the command line: --dry-run"),
        (["--resume-from-checkpoint", "x"], "python train.py --resume runs/NAME resumes a run"),
        (["--early-stopping-patience", "3"], "use early_stopping"),
    ],
)
def test_command_line_settings(tmp_path, arguments, message):
    (tmp_path / "mine.yaml").write_text("dry_run: true\n")
    arguments = [a.replace("FILE", str(tmp_path / "mine.yaml")) for a in arguments]
    with pytest.raises(ConfigError) as error:
        read_config(arguments, "configs/tiny.yaml")
    assert message.replace("FILE", str(tmp_path / "mine.yaml")) in str(error.value)
