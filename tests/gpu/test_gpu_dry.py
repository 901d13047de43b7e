"""Runs the GPU tests on a CPU, so that mistakes in them are found without a GPU."""

import os
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_gpu_tests_run_on_a_cpu():
    command = [sys.executable, "-m", "pytest", "tests/gpu/test_gpu.py", "-m", "gpu", "-p", "no:cacheprovider"]
    result = subprocess.run(command, env=os.environ | {"GPU_TESTS_ON_CPU": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]
    assert "passed" in result.stdout
