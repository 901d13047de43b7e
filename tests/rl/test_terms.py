"""docs/algorithms.md against the code: references exist, settings are valid, and no term or function is missing."""

import ast
import functools
import itertools
import re
import typing
from pathlib import Path

import pytest
import yaml

from rl.config import Config, ConfigError
from rl.run.read_config import coerce

DOCUMENT = Path("docs/algorithms.md").read_text(encoding="utf-8")
PARTS = ("Formula", "Settings", "Code")  # the list items of an entry, in this order
TERMS = """state, action, policy, episode, trajectory, return, advantage, credit assignment, REINFORCE, baseline, RLOO, GRPO,
whitening, REINFORCE++, loss normalisation, Dr. GRPO, sample efficiency, on-policy, off-policy, importance ratio, PPO clip, DAPO,
clip-higher, dynamic sampling, overlong punishment, GSPO, CISPO, SAPO, value function, Bellman equation, TD error, critic,
explained variance, GAE, actor-critic, A2C, PPO, reference, KL divergence, k1, k2, k3, RLHF objective, trust region, target_kl,
adaptive beta, DPO, process rewards, hierarchical rewards, reward model, reward hacking, exploration, entropy, curriculum,
generalisation, forgetting"""


def entries(text: str) -> dict[str, str]:
    """Return the entries by heading."""
    matches = re.findall(r"^### (.+)\n((?:(?!#).*\n)*)", text + "\n", re.M)
    assert len(dict(matches)) == len(matches), "two entries have the same heading"
    return dict(matches)


def lines(text: str, part: str) -> list[str]:
    return re.findall(rf"^\* {part}: (.*)$", text, re.M)


def quoted(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


@functools.cache
def definitions(path: str) -> dict[str, bool]:
    """Return the functions, classes and methods (Class.method) of a file, and whether each is a public function."""
    names = {}
    for node in ast.parse(Path(path).read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            names[node.name] = not node.name.startswith("_")
        elif isinstance(node, ast.ClassDef):
            members = [m.name for m in node.body if isinstance(m, (ast.FunctionDef, ast.AsyncFunctionDef))]
            names |= dict.fromkeys([node.name, *(f"{node.name}.{member}" for member in members)], False)
    return names


def check_structure(text: str) -> None:
    """Each entry consists of sentences and a list that ends with the code."""
    for heading, body in entries(text).items():
        sentences, *rest = body.strip().split("\n* ")
        assert sentences.endswith(".") and not sentences.startswith("* "), f"{heading} has no sentences"
        parts = [part.partition(": ")[0] for part in rest]
        assert parts == [part for part in PARTS if part in parts], f"{heading} has {parts}"
        assert parts[-1:] == ["Code"], f"{heading} names no code"


def check_code(text: str) -> set[str]:
    """Check that every reference has a definition. Return the references."""
    by_line = [quoted(line) for line in lines(text, "Code")]
    assert by_line and all(by_line), "a line of code has no reference"
    references = set(itertools.chain(*by_line))
    for reference in references:
        path, _, name = reference.partition(":")
        assert Path(path).is_file(), f"{reference}: there is no such file"
        assert name in definitions(path), f"{reference}: {path} does not define {name}"
    return references


def check_settings(texts: list[str]) -> None:
    """Check that all settings (`name` or `name: value | other value`) exist and that every combination is valid."""
    hints = typing.get_type_hints(Config)
    values = {}
    for setting in texts:
        name, has_value, value = setting.partition(": ")
        assert name in hints, f"there is no setting {name}"
        if has_value:
            values[name] = [coerce(yaml.safe_load(v), hints[name]) for v in value.split(" | ")]
    for combination in itertools.product(*values.values()):
        Config(**dict(zip(values, combination))).check()


def table(text: str) -> dict[str, list[str]]:
    """Return the settings of each row of the table of algorithms."""
    head, _, rows = text.partition("| algorithm |")
    rows = re.findall(r"^\| (.+?) \| (.+) \|$", rows.partition("\n\n")[0], re.M)
    return {name: quoted(settings) for name, settings in rows}


def check_all_settings(text: str) -> None:
    for settings in [*table(text).values(), *map(quoted, lines(text, "Settings"))]:
        assert settings
        check_settings(settings)


def check_terms(text: str) -> None:
    """Each term has exactly one heading, alone or with another term: "State and action"."""
    headings = [term.lower() for heading in entries(text) for term in re.split(r", | and ", heading)]
    for term in re.split(r",\s+", TERMS):
        assert headings.count(term.lower()) == 1, f"{term} has {headings.count(term.lower())} entries"


def check_algorithms(text: str) -> None:
    """Every public function of rl/algorithms.py is explained."""
    public = {f"rl/algorithms.py:{name}" for name, is_public in definitions("rl/algorithms.py").items() if is_public}
    missing = public - check_code(text)
    assert not missing, f"not explained: {', '.join(sorted(missing))}"


CHECKS = [check_structure, check_code, check_all_settings, check_terms, check_algorithms]


@pytest.mark.parametrize("check", CHECKS)
def test_document(check):
    check(DOCUMENT)


def test_every_algorithm_and_loss_is_in_the_table():
    listed = {setting for settings in table(DOCUMENT).values() for setting in settings}
    hints = typing.get_type_hints(Config)
    for name in ("algorithm", "loss_type", "baseline"):
        assert {f"{name}: {value}" for value in typing.get_args(hints[name])} <= listed
    assert len(DOCUMENT.splitlines()) <= 300


@pytest.mark.parametrize(
    "check, old, new, message",
    [
        (check_structure, "* Code: `rl/model/sampling.py:sample`\n", "", "State and action names no code"),
        (check_structure, "The return is the", "* Formula: `1`\nThe return is the", "Return has no sentences"),
        (
            check_code,
            "`rl/model/sampling.py:sample`",
            "`rl/model/sampling.py:drew`",
            "rl/model/sampling.py does not define drew",
        ),
        (check_code, "`rl/model/sampling.py:sample`", "`rl/samplings.py:sample`", "no such file"),
        (check_code, "`rl/critic.py:Critic.values`", "`rl/critic.py:values`", "rl/critic.py does not define values"),
        (check_code, "`rl/critic.py:Critic.values`", "`rl/critic.py:Critic.value`", "does not define Critic.value"),
        (check_code, "`rl/critic.py:Critic.values`", "`rl/critic.py`", "rl/critic.py does not define"),
        (check_code, "* Code: `rl/model/sampling.py:sample`", "* Code: sample", "has no reference"),
        (check_all_settings, "`algorithm: rloo` |", "`algorithm: rlo` |", "one of grpo, rloo"),
        (check_all_settings, "`loss_type: sapo` |", "`losstype: sapo` |", "no setting losstype"),
        (check_all_settings, "`algorithm: dpo`, `beta: 0.1` |", "`algorithm: dpo` |", "dpo needs it"),
        (check_all_settings, "* Settings: `gamma`\n", "* Settings: `discount`\n", "no setting discount"),
        (check_all_settings, "`gamma`, `lam: 0`", "`gamma`, `lam: 2`", "lam is 2.0"),
        (check_all_settings, "group | running | none", "group | moving | none", "one of group, running, none"),
        (check_terms, "### GSPO\n", "### Sequences\n", "GSPO has 0 entries"),
        (check_terms, "### GSPO\n", "### GAE and GSPO\n", "GAE has 2 entries"),
        (
            check_algorithms,
            "`rl/algorithms.py:adapted_beta`",
            "`rl/algorithms.py:whiten`",
            "explained: .*:adapted_beta",
        ),
    ],
)
def test_checks_detect_errors(check, old, new, message):
    assert old in DOCUMENT
    with pytest.raises((AssertionError, ConfigError, ValueError), match=message):
        check(DOCUMENT.replace(old, new, 1))
