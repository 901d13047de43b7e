"""docs/terms.md against the code: what it names exists, the settings it shows are valid, and no term or function is missing."""

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

DOCUMENT = Path("docs/terms.md").read_text(encoding="utf-8")
PARTS = ("Formula", "Settings", "Code")  # the list of an entry, in this order
TERMS = """state, action, policy, episode, trajectory, return, advantage, credit assignment, REINFORCE, baseline, RLOO, GRPO,
whitening, REINFORCE++, loss normalisation, Dr. GRPO, sample efficiency, on-policy, off-policy, importance ratio, PPO clip, DAPO,
clip-higher, dynamic sampling, overlong punishment, GSPO, CISPO, SAPO, value function, Bellman equation, TD error, critic,
explained variance, GAE, actor-critic, A2C, PPO, reference, KL divergence, k1, k2, k3, RLHF objective, trust region, target_kl,
adaptive beta, DPO, process rewards, hierarchical rewards, reward model, reward hacking, exploration, entropy, curriculum,
generalisation, forgetting"""


def entries(text: str) -> dict[str, str]:
    """The entries by their headings."""
    found = re.findall(r"^### (.+)\n((?:(?!#).*\n)*)", text + "\n", re.M)
    assert len(dict(found)) == len(found), "two entries have the same heading"
    return dict(found)


def lines(text: str, part: str) -> list[str]:
    return re.findall(rf"^\* {part}: (.*)$", text, re.M)


def quoted(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


@functools.cache
def defined(path: str) -> dict[str, bool]:
    """The functions, classes and methods (Class.method) that a file defines, and whether each is a public function."""
    names = {}
    for node in ast.parse(Path(path).read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            names[node.name] = not node.name.startswith("_")
        elif isinstance(node, ast.ClassDef):
            members = [m.name for m in node.body if isinstance(m, (ast.FunctionDef, ast.AsyncFunctionDef))]
            names |= dict.fromkeys([node.name, *(f"{node.name}.{member}" for member in members)], False)
    return names


def check_structure(text: str) -> None:
    """Each entry: sentences, then its list, which ends in the code."""
    for heading, body in entries(text).items():
        sentences, *rest = body.strip().split("\n* ")
        assert sentences.endswith(".") and not sentences.startswith("* "), f"{heading} has no sentences"
        parts = [part.partition(": ")[0] for part in rest]
        assert parts == [part for part in PARTS if part in parts], f"{heading} has {parts}"
        assert parts[-1:] == ["Code"], f"{heading} names no code"


def check_code(text: str) -> set[str]:
    """Every reference leads to a definition. Returns them."""
    by_line = [quoted(line) for line in lines(text, "Code")]
    assert by_line and all(by_line), "a line of code names nothing"
    references = set(itertools.chain(*by_line))
    for reference in references:
        path, _, name = reference.partition(":")
        assert Path(path).is_file(), f"{reference}: there is no such file"
        assert name in defined(path), f"{reference}: {path} does not define {name}"
    return references


def check_settings(shown: list[str]) -> None:
    """Each is a setting, alone or as `name: value | other value`, and the values shown together are valid together."""
    hints, values = typing.get_type_hints(Config), {}
    for setting in shown:
        name, given, value = setting.partition(": ")
        assert name in hints, f"there is no setting {name}"
        if given:
            values[name] = [coerce(yaml.safe_load(v), hints[name]) for v in value.split(" | ")]
    for combination in itertools.product(*values.values()):
        Config(**dict(zip(values, combination))).check()


def table(text: str) -> dict[str, list[str]]:
    """The table "algorithm -> settings"."""
    head, _, rows = text.partition("| algorithm |")
    rows = re.findall(r"^\| (.+?) \| (.+) \|$", rows.partition("\n\n")[0], re.M)
    return {name: quoted(settings) for name, settings in rows}


def check_all_settings(text: str) -> None:
    for settings in [*table(text).values(), *map(quoted, lines(text, "Settings"))]:
        assert settings
        check_settings(settings)


def check_terms(text: str) -> None:
    """Each term has one heading, alone or beside another: "State and action"."""
    named = [term.lower() for heading in entries(text) for term in re.split(r", | and ", heading)]
    for term in re.split(r",\s+", TERMS):
        assert named.count(term.lower()) == 1, f"{term} has {named.count(term.lower())} entries"


def check_algorithms(text: str) -> None:
    """Every public function of the mathematics is explained somewhere."""
    public = {f"rl/algorithms.py:{name}" for name, is_public in defined("rl/algorithms.py").items() if is_public}
    missing = public - check_code(text)
    assert not missing, f"not explained: {', '.join(sorted(missing))}"


CHECKS = [check_structure, check_code, check_all_settings, check_terms, check_algorithms]


@pytest.mark.parametrize("check", CHECKS)
def test_the_document(check):
    check(DOCUMENT)


def test_every_algorithm_and_loss_is_in_the_table():
    shown = {setting for settings in table(DOCUMENT).values() for setting in settings}
    hints = typing.get_type_hints(Config)
    for name in ("algorithm", "loss_type", "baseline"):
        assert {f"{name}: {value}" for value in typing.get_args(hints[name])} <= shown
    assert len(DOCUMENT.splitlines()) <= 300


@pytest.mark.parametrize(
    "check, old, new, message",
    [
        (check_structure, "* Code: `rl/model/sampling.py:sample`\n", "", "State and action names no code"),
        (check_structure, "What an episode earns", "* Formula: `1`\nWhat an episode earns", "Return has no sentences"),
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
        (check_code, "* Code: `rl/model/sampling.py:sample`", "* Code: sample", "names nothing"),
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
def test_what_is_broken_is_found(check, old, new, message):
    assert old in DOCUMENT
    with pytest.raises((AssertionError, ConfigError, ValueError), match=message):
        check(DOCUMENT.replace(old, new, 1))
