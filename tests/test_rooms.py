"""The structure of the project (CONTRIBUTING.md): no import cycles or upward imports, no long files."""

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# From bottom to top. A file may import from its own room and from rooms in earlier lines.
ROOMS = [
    ["grading/base.py"],
    ["rl/config.py"],  # the settings, which all rooms read
    ["grading/sandbox"],
    ["grading/answers"],
    ["grading/countdown.py", "grading/gym.py"],
    ["grading/rewards"],
    ["grading"],
    ["data"],
    ["rl/model"],
    ["rl"],
    ["rl/fit"],
    ["rl/run"],
    ["tools", "export"],
    ["train.py", "export.py", "rewards.py"],
    ["bench", "ui"],
]
PACKAGES = ("rl", "grading", "data", "tools", "export", "ui", "bench", "train", "rewards")


def is_entry_point(path: str) -> bool:
    """Commands may import upward: `python -m grading self-test` and `python rewards.py`."""
    return path.endswith("__main__.py") or path == "rewards.py"


def files() -> list[str]:
    folders = [path for name in PACKAGES for path in ROOT.glob(f"{name}/**/*.py")]
    return sorted(str(path.relative_to(ROOT)) for path in [*folders, *ROOT.glob("*.py")])


def level(path: str) -> int:
    """Return the number of a file's room, the one with the longest matching name."""
    rooms = {room: number for number, names in enumerate(ROOMS) for room in names}
    matches = [room for room in rooms if path == room or path.startswith(room + "/")]
    return rooms[max(matches, key=len)]


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
    """Return the files of this project that a file imports, at the top level or inside functions."""
    paths = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            paths |= {module_file(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                paths.add(module_file(f"{node.module}.{alias.name}") or module_file(node.module))
    return frozenset(paths - {None, path})


def upward_imports(paths: list[str]) -> list[str]:
    return [
        f"{path} imports {other}"
        for path in paths
        if not is_entry_point(path)
        for other in sorted(imports(path))
        if level(other) > level(path)
    ]


def import_cycles(graph: dict[str, frozenset[str]]) -> list[list[str]]:
    """Return the import cycles that a depth-first search finds, each as a list of files."""
    cycles = []
    done = set()

    def walk(path: str, stack: list[str]) -> None:
        if path in stack:
            cycles.append(stack[stack.index(path) :])
            return
        if path in done:
            return
        for other in sorted(graph.get(path, ())):
            walk(other, [*stack, path])
        done.add(path)

    for path in graph:
        walk(path, [])
    return cycles


def test_no_upward_imports():
    assert not upward_imports(files())


def test_no_import_cycles():
    assert not import_cycles({path: imports(path) for path in files() if not is_entry_point(path)})


def test_checks_detect_violations(monkeypatch):
    assert level("rl/model/engine.py") < level("rl/update.py") < level("rl/run/session.py") < level("ui/app.py")
    assert "rl/model/engine.py" in imports("rl/rollout.py") and "data/__init__.py" in imports("rl/rollout.py")
    assert import_cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    monkeypatch.setitem(globals(), "imports", lambda path: frozenset({"rl/run/session.py"}))
    assert upward_imports(["rl/update.py"]) == ["rl/update.py imports rl/run/session.py"] and not upward_imports(
        ["ui/app.py"]
    )


@pytest.mark.parametrize("path", files())
def test_files_have_at_most_400_lines(path):
    assert len((ROOT / path).read_text(encoding="utf-8").splitlines()) <= 400
