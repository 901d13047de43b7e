"""The example in CONTRIBUTING.md runs as it stands, and its map is true."""

import re
import subprocess
import sys
from pathlib import Path

TEXT = Path("CONTRIBUTING.md").read_text(encoding="utf-8")


def test_three_steps_without_a_run():
    (example,) = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    done = subprocess.run([sys.executable, "-"], input=example, capture_output=True, text=True, check=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == ["1", "2", "3"] and done.stderr == ""
    assert all(0 < float(reward) < 1.2 and float(grad_norm) > 0 for _, reward, grad_norm in lines)


def test_every_file_and_folder_that_is_named_exists():
    named = {name.partition(":")[0] for name in re.findall(r"`([\w./]+(?:/|\.(?:py|md))(?::\w+)?)`", TEXT)}
    assert {"train.py", "rl/update.py", "docs/terms.md"} <= named
    assert not [name for name in named if not Path(name).exists()]
