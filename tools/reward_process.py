"""Run a reward file in a separate process. The page survives code that loops forever, exits or prints endlessly.

`run_task` starts `python -m tools.reward_process FOLDER` with a time limit. It imports neither gradio nor torch.
"""

import contextlib
import dataclasses
import faulthandler
import io
import json
import math
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT, Popen, TimeoutExpired

from data import DataError
from grading import RewardError, Rewards, Score, load_rewards, row_kind, sandbox, score_all
from grading.base import shorten
from grading.rewards import probes
from rl.run.reader import read_text
from tools.rescore import (
    differ,
    learn_run_payments,
    load_run_rewards,
    questions,
    read_settings,
    report,
    saved_completion,
)

ROOT = Path(__file__).resolve().parent.parent
MAX_OUTPUT = 50_000  # only the last bytes of the printed output are kept
GRACE = 5.0  # extra seconds for the process to start and exit
POLL_SECONDS = 0.2
JOB, ANSWER, TRACEBACK = "job.json", "answer.json", "traceback.txt"  # files in the folder of a task


def run_task(task: str, run: Path | None, file: Path, source: str, seconds: float, **arguments) -> Iterator[float]:
    """Run one of TASKS. Yields the elapsed seconds, then returns the result and the end of its printed output.

    Closing the iterator kills the process.

    Args:
        run: The run folder whose settings are used, if any.
        source: The text of the reward file, saved or not.

    Raises:
        RewardError: The source cannot be imported, a function fails, or the time limit is exceeded.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = {"task": task, "run": run and str(run), "file": str(file), "source": source, "seconds": seconds}
        (folder / JOB).write_text(json.dumps(job | arguments), encoding="utf-8")
        command = [sys.executable, "-m", "tools.reward_process", name]
        python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"PYTHONPATH": python_path, "PYTHONIOENCODING": "utf-8:replace"}
        process = Popen(command, env=environment, stdin=DEVNULL, stdout=PIPE, stderr=STDOUT, start_new_session=True)
        output = bytearray()
        reader = threading.Thread(target=drain, args=(process.stdout, output), daemon=True)
        reader.start()
        start = time.monotonic()
        try:
            while process.poll() is None and time.monotonic() < start + seconds + GRACE:
                with contextlib.suppress(TimeoutExpired):
                    process.wait(POLL_SECONDS)
                yield time.monotonic() - start
        finally:
            with contextlib.suppress(OSError):  # also kills the processes that it started
                os.killpg(process.pid, signal.SIGKILL) if hasattr(os, "killpg") else process.kill()
            process.wait()
            reader.join(1.0)
        answer, traceback = read_text(folder / ANSWER), read_text(folder / TRACEBACK)
    printed = bytes(output).decode(errors="replace").strip()
    if answer:
        result = json.loads(answer)
        if "error" in result:
            raise RewardError(result["error"])
        return result["value"], printed
    if traceback:
        frames = re.findall(r'File "(.*)", line (\d+) in (.*)', traceback)
        place = next((f"in {f}, line {n}" for path, n, f in frames if Path(path).name == file.name), "in another file")
        raise RewardError(
            f"{file.name} did not finish within {seconds:g} s: it was {place}. Look for an infinite loop there."
        )
    last_output = f"Last output: {printed[-300:]}" if printed else "It printed nothing."
    raise RewardError(f"{file.name} exited (status {process.returncode}) before it returned a result. {last_output}")


def drain(pipe, output: bytearray) -> None:
    """Read a pipe to its end, and keep the last MAX_OUTPUT bytes in `output`."""
    while part := os.read(pipe.fileno(), 2**16):
        output += part
        del output[:-MAX_OUTPUT]


def score_completions(run, file: Path, source: str, seconds: float, completions: list[dict]) -> Iterator[float]:
    """Score completions. Returns the weight of each function, a Score per completion, and the last output.

    completions: row, text, truncated and, if known, step, tokens and token_ids of each. The rest: see `run_task`.
    """
    result, printed = yield from run_task("score", run, file, source, seconds, completions=completions)
    return result["weights"], [Score(**fields) for fields in result["scores"]], printed


def reward_rows(score: Score, weights: dict[str, float]) -> list[list[str]]:
    """Return the name, value, weight, weighted value and reason of each reward and metric."""
    rows = []
    for name, value in (score.parts | score.metrics).items():
        steps = [f"{v:g} at character {position}" for position, v in score.process.get(name, [])]
        reason = ", ".join(filter(None, [score.reasons.get(name), *steps]))
        weight = weights.get(name, 0)
        weighted = format_number(weight * value) if weight and value is not None else ""
        rows.append([name, format_number(value), f"{weight:g}" if weight else "metric", weighted, reason])
    return rows


def format_number(value: float | None, spec: str = ".3g") -> str:
    return "-" if value is None or math.isnan(value) else format(round(value, 12), spec)


# --- inside the process


def main(folder: Path) -> None:
    """Run the task in job.json and write answer.json, or traceback.txt after a timeout."""
    job = json.loads((folder / JOB).read_text(encoding="utf-8"))
    faulthandler.dump_traceback_later(job["seconds"], exit=True, file=(folder / TRACEBACK).open("w"))
    try:
        result = {"value": TASKS[job["task"]](job)}
    except (RewardError, DataError, ValueError) as error:
        result = {"error": str(error)}
    except Exception as error:
        result = {"error": f"Invalid row or settings: {type(error).__name__}: {error}."}
    sys.stdout.flush()
    unfinished = folder / "unfinished"
    unfinished.write_text(json.dumps(result, default=str), encoding="utf-8")
    os.replace(unfinished, folder / ANSWER)
    os._exit(0)  # does not wait for threads of reward functions


def load_settings(job: dict) -> dict:
    return read_settings(Path(job["run"])) if job["run"] else {}


def load_job_rewards(job: dict, rows: list[dict]) -> Rewards:
    """Load the rewards of the file, with the run's choice of functions and weights."""
    settings = load_settings(job)
    if any(row_kind(row) == "code" for row in rows):  # other rows need no sandbox, and it starts slowly
        sandbox.start(settings.get("code_timeout", 1.0), settings.get("unsafe_run_model_code", False))
    return load_run_rewards(job["file"], settings, job["source"])


def check_task(job: dict) -> list[str]:
    """Import the file. Returns the name and weight of each reward."""
    rewards = load_rewards(job["file"], source=job["source"])
    return [f"{f.name} {f.weight:g}" for f in rewards.functions if f.weight]


def score_task(job: dict) -> dict:
    """Score completions. Returns the weight of each function, and the fields of each Score."""
    rows = [fields["row"] for fields in job["completions"]]
    rewards = load_job_rewards(job, rows)
    learn_run_payments(rewards, job["run"] and Path(job["run"]), rows)
    completions = []
    for fields in job["completions"]:
        completion = probes.completion(fields["row"], fields["text"], fields["truncated"], fields.get("step") or 1)
        if fields.get("tokens"):  # otherwise each byte counts as a token
            completion.tokens, completion.token_ids = fields["tokens"], fields.get("token_ids", [])
        completions.append(completion)
    scores = [dataclasses.asdict(dataclasses.replace(score, extra={})) for score in score_all(rewards, completions)]
    return {"weights": {f.name: f.weight for f in rewards.functions}, "scores": scores}


def rescore_task(job: dict) -> dict:
    """Rescore the completions of a step. Returns the report of --rescore, and the rows of the table of changes."""
    rows = questions(load_settings(job), Path(job["run"]))
    lines = [line | {"number": n} for n, line in enumerate(job["lines"], 1) if line["prompt_id"] in rows]
    rewards = load_job_rewards(job, [rows[line["prompt_id"]] for line in lines])
    learn_run_payments(rewards, Path(job["run"]), list(rows.values()))
    scores = score_all(rewards, [saved_completion(line, rows[line["prompt_id"]]) for line in lines])
    with contextlib.redirect_stdout(io.StringIO()) as means:
        report(rewards, lines, scores, shown=0)
    changes = sorted(map(describe_change, lines, scores), key=lambda item: -item[0])
    return {"report": means.getvalue(), "rows": [cells for _, cells in changes]}


def describe_change(line: dict, score: Score) -> tuple[float, list]:
    """Return the absolute change of the total, and a row of the table of changes (rewards_page.CHANGES)."""
    before, after = line.get("rewards", {}), score.parts
    old = line.get("reward")
    new = None if math.isnan(score.total) else score.total
    changed = [name for name in after | before if differ(before.get(name), after.get(name))]
    changes = "; ".join(f"{n} {format_number(before.get(n))} -> {format_number(after.get(n))}" for n in changed)
    changes = changes or ("weights" if differ(old, new) else "none")
    verdict = line.get("verdict") or score.verdict
    if verdict != score.verdict:
        verdict += f" -> {score.verdict}"
    cells = [line["number"], shorten(line["prompt"], 80), format_number(old), format_number(new), verdict, changes]
    reasons = shorten("; ".join(score.reasons.values()), 200)
    return abs((new or 0.0) - (old or 0.0)), [*cells, reasons, line["completion"][-80:]]


TASKS = {"check": check_task, "score": score_task, "rescore": rescore_task}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
