"""The structure: no import circle, no import upward between rooms, and one file's job from its name (CONTRIBUTING.md)."""

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# From the bottom to the top. A file may import its own room and those in earlier lines.
ROOMS = [
    ["grading/base.py"],
    ["rl/config.py"],  # the settings, which everybody reads
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
    """Commands may import upward: `python -m grading self-test` is a tool, `python rewards.py` too."""
    return path.endswith("__main__.py") or path == "rewards.py"


def files() -> list[str]:
    folders = [path for name in PACKAGES for path in ROOT.glob(f"{name}/**/*.py")]
    return sorted(str(path.relative_to(ROOT)) for path in [*folders, *ROOT.glob("*.py")])


def level(path: str) -> int:
    """The number of a file's room: the longest name that fits."""
    rooms = {room: number for number, names in enumerate(ROOMS) for room in names}
    fitting = [room for room in rooms if path == room or path.startswith(room + "/")]
    return rooms[max(fitting, key=len)]


def module_file(module: str) -> str | None:
    """The file of a module of this project."""
    base = ROOT / module.replace(".", "/")
    if module.partition(".")[0] not in PACKAGES:
        return None
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return str(path.relative_to(ROOT))
    return None


@functools.cache
def imports(path: str) -> frozenset[str]:
    """The files of this project that a file imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {module_file(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                found.add(module_file(f"{node.module}.{alias.name}") or module_file(node.module))
    return frozenset(found - {None, path})


def upward(paths: list[str]) -> list[str]:
    return [
        f"{path} imports {other}"
        for path in paths
        if not is_entry_point(path)
        for other in sorted(imports(path))
        if level(other) > level(path)
    ]


def circles(graph: dict[str, frozenset[str]]) -> list[list[str]]:
    """Every import circle that a depth-first walk closes, as the files on it."""
    found, done = [], set()

    def walk(path: str, way: list[str]) -> None:
        if path in way:
            found.append(way[way.index(path) :])
            return
        if path in done:
            return
        for other in sorted(graph.get(path, ())):
            walk(other, [*way, path])
        done.add(path)

    for path in graph:
        walk(path, [])
    return found


def test_no_import_goes_upward():
    assert not upward(files())


def test_no_import_circle():
    assert not circles({path: imports(path) for path in files() if not is_entry_point(path)})


def test_what_is_looked_for_is_found(monkeypatch):
    assert level("rl/model/engine.py") < level("rl/update.py") < level("rl/run/session.py") < level("ui/app.py")
    assert "rl/model/engine.py" in imports("rl/rollout.py") and "data/__init__.py" in imports("rl/rollout.py")
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    monkeypatch.setitem(globals(), "imports", lambda path: frozenset({"rl/run/session.py"}))
    assert upward(["rl/update.py"]) == ["rl/update.py imports rl/run/session.py"] and not upward(["ui/app.py"])


@pytest.mark.parametrize("path", files())
def test_a_file_is_not_longer_than_can_be_read(path):
    assert len((ROOT / path).read_text(encoding="utf-8").splitlines()) <= 400
