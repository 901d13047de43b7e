"""README.md and docs/: every setting is documented once, links and file names lead somewhere, and commands exist."""

import dataclasses
import re
import typing
from pathlib import Path

import pytest
import yaml

from rl.config import Config

REMOVED = {"bench/step.py", "bench/learn.py", "bench/growth.py", "bench/grading.py"}  # bench/RESULTS.md says so
MADE = {"data/smollm2"}  # by a command
DOCUMENTS = [Path("README.md"), Path("CONTRIBUTING.md"), Path("bench/RESULTS.md"), *sorted(Path("docs").glob("*.md"))]


def settings_table() -> str:
    """The tables of docs/settings.md, from the sections, defaults and comments of rl/config.py."""
    source = Path("rl/config.py").read_text(encoding="utf-8")
    hints = typing.get_type_hints(Config)
    lines = []
    for line in source[source.index("class Config:") : source.index("    def check(")].splitlines():
        if section := re.match(r"    # --- (cold start|[\w-]+)", line):
            lines += ["", f"## {section[1].capitalize()}", "", "| setting | default | meaning |", "|---|---|---|"]
        elif field := re.match(r"    (\w+): .*  # (.*)", line):
            name, comment = field.groups()
            meaning = comment.replace("|", "\\|")
            lines.append(f"| `{name}` | {default_cell(name, hints[name])} | {meaning} |")
    return "\n".join(lines)


def default_cell(name: str, hint) -> str:
    """The default in YAML, with the other choices if there are any."""
    default = vars(Config())[name]
    values = ", ".join(default) if isinstance(default, list) else yaml.safe_dump(default).removesuffix("...\n").strip()
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join([f"**`{values}`**", *(f"`{choice}`" for choice in typing.get_args(hint) if choice != default)])
    return "" if default in (None, [], {}) else f"`{values}`"


def test_every_setting_is_documented_once():
    text = Path("docs/settings.md").read_text(encoding="utf-8")
    documented = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    assert documented == [field.name for field in dataclasses.fields(Config)]
    assert text[text.index("\n## ") :].strip() == settings_table().strip(), (
        "docs/settings.md: use the text of rl/config.py"
    )


def anchors(document: Path) -> set[str]:
    """The anchors that a Markdown viewer makes of the headings."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)]+)\)", document.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        path = document.parent / name if name else document
        assert path.exists(), f"{document}: there is no {target}"
        assert not anchor or anchor in anchors(path), f"{document}: {path} has no heading for #{anchor}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_files_and_commands_exist(document):
    """In backticks and code blocks: files of the project, make targets, and settings of train.py."""
    if document.name == "log.md":
        return  # it also names files that were removed
    text = document.read_text(encoding="utf-8")
    code = "\n".join([*re.findall(r"`([^`\n]+)`", text), *re.findall(r"^    (.+)$", text, re.MULTILINE)])
    folders = "rl|grading|data|tools|export|ui|bench|tests|configs|docs"
    for name in re.findall(rf"(?<![\w/.])(?:(?:{folders})/[\w./]*\w|train\.py|rewards\.py|export\.py)", code):
        assert Path(name).exists() or name in REMOVED | MADE or "NAME" in name, f"{document}: there is no {name}"
    targets = set(re.findall(r"^([\w-]+):", Path("Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for target in re.findall(r"\bmake ([a-z][\w-]*)", code):
        assert target in targets, f"{document}: there is no target {target} in the Makefile"
    settings = {field.name for field in dataclasses.fields(Config)} | {"config", "help"}
    for command in re.findall(r"python train\.py(.*?)(?:   |$)", code, re.MULTILINE):
        for option in re.findall(r"--([\w-]+)", command):
            assert option.replace("-", "_") in settings, f"{document}: train.py has no --{option}"
