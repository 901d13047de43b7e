"""The tests for a GPU run through on a CPU, so that a mistake in them does not waste the minutes of a GPU."""

import os
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_gpu_tests_run_on_a_cpu():
    command = [sys.executable, "-m", "pytest", "tests/gpu/test_gpu.py", "-m", "gpu", "-p", "no:cacheprovider"]
    done = subprocess.run(command, env=os.environ | {"GPU_TESTS_ON_CPU": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "passed" in done.stdout
