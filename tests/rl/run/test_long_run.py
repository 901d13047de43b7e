"""A run of 2,000 steps: memory, open files and processes do not grow after step 100, except for the sandbox's pool.

The pool has as many processes as programs have run at the same time so far, at most two per core in each of its lanes.
"""

import json
import os
import statistics
import subprocess
import sys
import time

import psutil
import pytest

SHORT = "--max-steps 2000 --prompts-per-step 2 --num-generations 4 --max-completion-length 16 --eval-questions 12 --eval-steps 500 --save-steps 100 --train-questions 300 --log-completions-steps 0 --logging-steps 100 --device cpu"


@pytest.mark.slow
def test_nothing_grows_over_two_thousand_steps(tmp_path):
    folder = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "train.py", *SHORT.split(), "--output-dir", str(folder)], stdout=subprocess.DEVNULL
    )
    monitor = psutil.Process(process.pid)
    samples = []  # (step, resident bytes, open files, threads, children)
    metrics = folder / "metrics.jsonl"
    while process.poll() is None:
        time.sleep(1)
        step = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        try:
            children = len(monitor.children(recursive=True))
            samples.append((step, monitor.memory_info().rss, monitor.num_fds(), monitor.num_threads(), children))
        except psutil.NoSuchProcess:
            break
    assert process.wait() == 0
    early = [x for x in samples if 100 <= x[0] <= 300]
    late = [x for x in samples if 1800 <= x[0] < 1990]  # before the final evaluation and the curve
    print("period, resident MB, files, threads, processes, s per step")
    seconds = [json.loads(line)["step_time"] for line in metrics.read_text().splitlines()]
    for name, part, steps in (("early", early, slice(100, 300)), ("late", late, slice(1800, 1990))):
        rss, *counts = (statistics.median(x[i] for x in part) for i in range(1, 5))
        print(name, f"{rss / 2**20:.1f}", *counts, f"{statistics.median(seconds[steps]):.4f}")
    assert statistics.median(x[1] for x in late) <= 1.03 * statistics.median(x[1] for x in early)
    for i in (2, 3, 4):
        growth = statistics.median(x[i] for x in late) - statistics.median(x[i] for x in early)
        assert growth <= 4 * os.cpu_count()
