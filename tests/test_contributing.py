"""The example in CONTRIBUTING.md runs, and the files it names exist."""

import re
import subprocess
import sys
from pathlib import Path

TEXT = Path("CONTRIBUTING.md").read_text(encoding="utf-8")


def test_three_steps_without_a_run():
    (example,) = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    process = subprocess.run([sys.executable, "-"], input=example, capture_output=True, text=True, check=True)
    lines = [line.split() for line in process.stdout.splitlines()]
    assert [line[0] for line in lines] == ["1", "2", "3"] and process.stderr == ""
    assert all(0 < float(reward) < 1.2 and float(grad_norm) > 0 for _, reward, grad_norm in lines)


def test_named_files_and_folders_exist():
    paths = {name.partition(":")[0] for name in re.findall(r"`([\w./]+(?:/|\.(?:py|md))(?::\w+)?)`", TEXT)}
    assert {"train.py", "rl/update.py", "docs/terms.md"} <= paths
    assert not [path for path in paths if not Path(path).exists()]
