"""The example in CONTRIBUTING.md runs unchanged, and the files and folders that it names exist."""

import re
import subprocess
import sys
from pathlib import Path

TEXT = Path("CONTRIBUTING.md").read_text(encoding="utf-8")


def test_example_trains_three_steps():
    (example,) = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    result = subprocess.run([sys.executable, "-"], input=example, capture_output=True, text=True, check=True)
    lines = [line.split() for line in result.stdout.splitlines()]
    assert [line[0] for line in lines] == ["1", "2", "3"] and result.stderr == ""
    assert all(0 < float(reward) < 1.2 and float(grad_norm) > 0 for _, reward, grad_norm in lines)


def test_named_files_and_folders_exist():
    names = {name.partition(":")[0] for name in re.findall(r"`([\w./]+(?:/|\.(?:py|md))(?::\w+)?)`", TEXT)}
    assert {"train.py", "rl/update.py", "docs/algorithms.md"} <= names
    assert not [name for name in names if not Path(name).exists()]
