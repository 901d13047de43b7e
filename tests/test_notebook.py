"""The notebook runs from top to bottom on a machine without a GPU."""

import json
import os
import shutil
import sys
from pathlib import Path

import nbclient
import nbformat

NOTEBOOK = Path("notebooks/quickstart.ipynb")
FILES = "train.py rewards.py rl grading data tools configs notebooks requirements.txt requirements-cpu.txt"
FEW_STEPS = "--max-steps 2 --prompts-per-step 4 --num-generations 4 --eval-questions 12 --train-questions 30"


def test_notebook_trains_and_shows_answers_before_and_after(tmp_path, monkeypatch):
    for name in FILES.split():
        copy = shutil.copytree if Path(name).is_dir() else shutil.copy
        copy(name, tmp_path / name)
    bin_folder = tmp_path / "bin"  # a machine without a GPU
    bin_folder.mkdir()
    (bin_folder / "nvidia-smi").write_text("#!/bin/sh\nexit 1\n")
    (bin_folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_folder}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert len(notebook.cells) <= 12 and all(not cell.get("outputs") for cell in notebook.cells)
    (parameters,) = [cell for cell in notebook.cells if cell.source.startswith("REPOSITORY")]
    parameters.source = f'REPOSITORY = ""\nARGUMENTS = "{FEW_STEPS}"'
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path / "notebooks")}}
    )
    client.execute()
    printed = "".join(
        output.get("text", "")
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.output_type == "stream"
    )
    summary = json.loads((tmp_path / "runs/quickstart/summary.json").read_text())
    for name in ("before", "after"):
        assert f"{name:<8} {summary['eval'][name]['accuracy']:.1%} of 12 held-out questions right" in printed
    assert "Before training, one held-out question" in printed and printed.count("question: ") >= 7
    assert any("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", []))
    assert "error:" not in printed
