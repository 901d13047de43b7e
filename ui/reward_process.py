"""Runs a reward file in a process of its own: its code may loop forever, exit or print without end, and the page is not affected.

`run_task` starts `python -m ui.reward_process FOLDER` with a time limit. Imports neither gradio nor torch, to start quickly.
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
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT, Popen, TimeoutExpired

from data import DataError
from grading import RewardError, Rewards, Score, load_rewards, row_kind, sandbox, score_all
from grading.base import shorten
from grading.rewards import probes
from tools.rescore import differ, load_run_rewards, questions, read_settings, report, saved_completion

ROOT = Path(__file__).resolve().parent.parent
MAX_OUTPUT = 50_000  # bytes that are kept of what the code prints, the last ones
GRACE = 5.0  # seconds to start and to exit
JOB, ANSWER, TRACEBACK = "job.json", "answer.json", "traceback.txt"  # files in the folder of a task


def run_task(task: str, run: Path | None, file: Path, source: str, seconds: float, stop=None, **arguments):
    """Run one of TASKS: what it returns, and the end of what the code printed.

    run: the run folder whose settings apply, if any. source: the text of the reward file, saved or not. stop: an event that
    ends the task early. Raises RewardError if the source cannot be imported, a function fails, or the time is over.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = {"task": task, "run": run and str(run), "file": str(file), "source": source, "seconds": seconds}
        (folder / JOB).write_text(json.dumps(job | arguments), encoding="utf-8")
        command = [sys.executable, "-m", "ui.reward_process", name]
        python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"PYTHONPATH": python_path, "PYTHONIOENCODING": "utf-8:replace"}
        process = Popen(command, env=environment, stdin=DEVNULL, stdout=PIPE, stderr=STDOUT, start_new_session=True)
        output = bytearray()
        reader = threading.Thread(target=drain, args=(process.stdout, output), daemon=True)
        reader.start()
        end = time.monotonic() + seconds + GRACE
        while process.poll() is None and time.monotonic() < end and not (stop and stop.is_set()):
            with contextlib.suppress(TimeoutExpired):
                process.wait(0.2)
        with contextlib.suppress(OSError):  # with the processes that it started
            os.killpg(process.pid, signal.SIGKILL) if hasattr(os, "killpg") else process.kill()
        process.wait()
        reader.join(1.0)
        answer, traceback = text_of(folder / ANSWER), text_of(folder / TRACEBACK)
    printed = bytes(output).decode(errors="replace").strip()
    if answer:
        result = json.loads(answer)
        if "error" in result:
            raise RewardError(result["error"])
        return result["value"], printed
    if stop and stop.is_set():
        raise RewardError("stopped")
    if traceback:
        frames = re.findall(r'File "(.*)", line (\d+) in (.*)', traceback)
        place = next((f"in {f}, line {n}" for path, n, f in frames if Path(path).name == file.name), "busy")
        raise RewardError(
            f"{file.name} gave no answer within {seconds:g} s, it was {place}. Look for a loop that does not end there."
        )
    last = f"It printed last: {printed[-300:]}" if printed else "It printed nothing."
    raise RewardError(f"{file.name} ended its process (status {process.returncode}) without an answer. {last}")


def drain(pipe, output: bytearray) -> None:
    """Read a pipe to its end and keep the last MAX_OUTPUT bytes."""
    while part := os.read(pipe.fileno(), 2**16):
        output += part
        del output[:-MAX_OUTPUT]


def text_of(file: Path) -> str:
    """The contents of a text file; empty if there is none."""
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""


def score_completions(run, file, source: str, seconds: float, row: dict, completions: list[dict], stop=None) -> tuple:
    """The weight of each function, a Score for each completion of this row, and the end of what the code printed.

    completions: text, truncated and, if they are known, step, tokens and token_ids. The rest is as for `run_task`.
    """
    result, printed = run_task("score", run, file, source, seconds, stop, row=row, completions=completions)
    return result["weights"], [Score(**fields) for fields in result["scores"]], printed


def reward_rows(score: Score, weights: dict[str, float]) -> list[list[str]]:
    """The name, value, weight, weighted value and reason of each reward and metric."""
    rows = []
    for name, value in (score.parts | score.metrics).items():
        steps = [f"{v:g} at character {position}" for position, v in score.process.get(name, [])]
        why = ", ".join(filter(None, [score.reasons.get(name), *steps]))
        weight = weights.get(name, 0)
        counts = number_of(weight * value) if weight and value is not None else ""
        rows.append([name, number_of(value), f"{weight:g}" if weight else "metric", counts, why])
    return rows


def number_of(value: float | None, form: str = ".3g") -> str:
    return "-" if value is None or math.isnan(value) else format(round(value, 12), form)


# --- in the process


def main(folder: Path) -> None:
    """Do the task of job.json and write answer.json, or traceback.txt when the time is over."""
    job = json.loads((folder / JOB).read_text(encoding="utf-8"))
    faulthandler.dump_traceback_later(job["seconds"], exit=True, file=(folder / TRACEBACK).open("w"))
    try:
        result = {"value": TASKS[job["task"]](job)}
    except (RewardError, DataError, ValueError) as error:
        result = {"error": str(error)}
    except Exception as error:
        result = {"error": f"The row or the settings cannot be used: {type(error).__name__}: {error}."}
    sys.stdout.flush()
    unfinished = folder / "unfinished"
    unfinished.write_text(json.dumps(result, default=str), encoding="utf-8")
    os.replace(unfinished, folder / ANSWER)
    os._exit(0)  # does not wait for threads that a reward function has started


def settings_of(job: dict) -> dict:
    return read_settings(Path(job["run"])) if job["run"] else {}


def rewards_of(job: dict, rows: list[dict]) -> Rewards:
    """The reward functions with the run's choice and weights."""
    settings = settings_of(job)
    if any(row_kind(row) == "code" for row in rows):  # others do not need it, and its start takes time
        sandbox.start(settings.get("code_timeout", 1.0), settings.get("unsafe_run_model_code", False))
    return load_run_rewards(job["file"], settings, job["source"])


def check_task(job: dict) -> list[str]:
    """Import the file: name and weight of each reward."""
    rewards = load_rewards(job["file"], source=job["source"])
    return [f"{f.name} {f.weight:g}" for f in rewards.functions if f.weight]


def score_task(job: dict) -> dict:
    """Score completions of one row: the weight of each function, and the fields of each Score."""
    row = job["row"]
    rewards = rewards_of(job, [row])
    completions = []
    for fields in job["completions"]:
        completion = probes.completion(row, fields["text"], fields["truncated"], fields.get("step") or 1)
        if fields.get("tokens"):  # else its bytes stand for its tokens
            completion.tokens, completion.token_ids = fields["tokens"], fields.get("token_ids", [])
        completions.append(completion)
    scores = [dataclasses.asdict(dataclasses.replace(score, extra={})) for score in score_all(rewards, completions)]
    return {"weights": {f.name: f.weight for f in rewards.functions}, "scores": scores}


def rescore_task(job: dict) -> dict:
    """Score the completions of a step again: the report of --rescore, and the rows of the table of changes."""
    rows = questions(settings_of(job), Path(job["run"]))
    lines = [line | {"number": n} for n, line in enumerate(job["lines"], 1) if line["prompt_id"] in rows]
    rewards = rewards_of(job, [rows[line["prompt_id"]] for line in lines])
    scores = score_all(rewards, [saved_completion(line, rows[line["prompt_id"]]) for line in lines])
    with contextlib.redirect_stdout(io.StringIO()) as means:
        report(rewards, lines, scores, shown=0)
    changes = sorted(map(change, lines, scores), key=lambda found: -found[0])
    return {"report": means.getvalue(), "rows": [cells for _, cells in changes]}


def change(line: dict, score: Score) -> tuple[float, list]:
    """The absolute change of the total, and the row of the table of changes (rewards_tab.CHANGES)."""
    before, after = line.get("rewards", {}), score.parts
    old, new = line.get("reward"), None if math.isnan(score.total) else score.total
    changed = [name for name in after | before if differ(before.get(name), after.get(name))]
    what = "; ".join(f"{name} {number_of(before.get(name))} -> {number_of(after.get(name))}" for name in changed)
    what = what or ("the weights" if differ(old, new) else "nothing")
    verdict = line.get("verdict") or score.verdict
    if verdict != score.verdict:
        verdict += f" -> {score.verdict}"
    cells = [line["number"], shorten(line["prompt"], 80), number_of(old), number_of(new), verdict, what]
    reasons = shorten("; ".join(score.reasons.values()), 200)
    return abs((new or 0.0) - (old or 0.0)), [*cells, reasons, line["completion"][-80:]]


TASKS = {"check": check_task, "score": score_task, "rescore": rescore_task}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
