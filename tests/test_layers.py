"""The structure (CONTRIBUTING.md): no import cycles, no upward imports between layers, no file above 400 lines."""

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# From the bottom to the top. A file may import from its own layer and from the layers before it.
LAYERS = [
    ["grading/base.py"],
    ["rl/config.py"],  # the settings, which every layer may read
    ["grading/sandbox"],
    ["grading/answers"],
    ["grading/countdown.py", "grading/environments.py", "grading/gym.py", "grading/gym_verdicts.py"],
    ["grading/rewards"],
    ["grading"],
    ["data"],
    ["rl/model"],
    ["rl"],
    ["rl/fit"],
    ["rl/run"],
    ["tools", "export"],
    ["train.py", "export.py", "rewards.py", "environments.py"],
    ["bench", "ui"],
]
PACKAGES = ("rl", "grading", "data", "tools", "export", "ui", "bench", "train", "rewards")


def is_entry_point(path: str) -> bool:
    """Return True for commands, which may import upward, such as `python -m grading self-test`."""
    return path.endswith("__main__.py") or path in ("rewards.py", "environments.py")


def source_files() -> list[str]:
    folders = [path for name in PACKAGES for path in ROOT.glob(f"{name}/**/*.py")]
    return sorted(str(path.relative_to(ROOT)) for path in [*folders, *ROOT.glob("*.py")])


def layer(path: str) -> int:
    """Return the number of a file's layer, by the longest name in LAYERS that matches."""
    layers = {name: number for number, names in enumerate(LAYERS) for name in names}
    matches = [name for name in layers if path == name or path.startswith(name + "/")]
    return layers[max(matches, key=len)]


def module_file(module: str) -> str | None:
    """Return the file of a module of this project, or None for other modules."""
    base = ROOT / module.replace(".", "/")
    if module.partition(".")[0] not in PACKAGES:
        return None
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return str(path.relative_to(ROOT))
    return None


@functools.cache
def imports(path: str) -> frozenset[str]:
    """Return the files of this project that a file imports, at the top or inside functions."""
    files = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            files |= {module_file(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                files.add(module_file(f"{node.module}.{alias.name}") or module_file(node.module))
    return frozenset(files - {None, path})


def upward_imports(paths: list[str]) -> list[str]:
    return [
        f"{path} imports {other}"
        for path in paths
        if not is_entry_point(path)
        for other in sorted(imports(path))
        if layer(other) > layer(path)
    ]


def import_cycles(graph: dict[str, frozenset[str]]) -> list[list[str]]:
    """Return every import cycle that a depth-first search closes, as a list of files."""
    cycles = []
    visited = set()

    def walk(path: str, trail: list[str]) -> None:
        if path in trail:
            cycles.append(trail[trail.index(path) :])
            return
        if path in visited:
            return
        for other in sorted(graph.get(path, ())):
            walk(other, [*trail, path])
        visited.add(path)

    for path in graph:
        walk(path, [])
    return cycles


def test_no_upward_imports():
    assert not upward_imports(source_files())


def test_no_import_cycles():
    assert not import_cycles({path: imports(path) for path in source_files() if not is_entry_point(path)})


def test_detects_upward_imports_and_cycles(monkeypatch):
    assert layer("rl/model/engine.py") < layer("rl/update.py") < layer("rl/run/session.py") < layer("ui/app.py")
    assert "rl/model/engine.py" in imports("rl/rollout.py") and "data/__init__.py" in imports("rl/rollout.py")
    assert import_cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    monkeypatch.setitem(globals(), "imports", lambda path: frozenset({"rl/run/session.py"}))
    assert upward_imports(["rl/update.py"]) == ["rl/update.py imports rl/run/session.py"]
    assert not upward_imports(["ui/app.py"])


@pytest.mark.parametrize("path", source_files())
def test_file_has_at_most_400_lines(path):
    assert len((ROOT / path).read_text(encoding="utf-8").splitlines()) <= 400
