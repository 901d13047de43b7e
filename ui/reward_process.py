"""Reward code in a process of its own: it may loop for ever, end its process or print without end, and the page goes on.

`apart` starts `python -m ui.reward_process FOLDER` with a time limit. Imports neither gradio nor torch, so that it starts at once.
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
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from data import DataError
from grading import RewardError, Rewards, Score, load_rewards, row_kind, sandbox
from grading.base import shorten
from grading.rewards.probes import completion as made_up
from tools.rescore import as_in_run, differ, number, questions, read_settings, report, saved_completion

ROOT = Path(__file__).resolve().parent.parent
PRINTED = 50_000  # bytes that are kept of what is printed
GRACE = 5.0  # seconds to start and to end
LEFT = "answer.json", "hung.txt"  # by the process


def apart(task: str, run: Path | None, file: Path, source: str, seconds: float, stop=None, **asked):
    """(what one of TASKS returns, the last of what was printed meanwhile). run: the folder whose settings count; source: what
    is in the reward file, or would be; stop: an event that ends it early.

    Raises RewardError in words: where the source does not import, a function fails, or nothing has come after `seconds`.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        asked |= {"task": task, "file": str(file), "source": source, "run": run and str(run), "seconds": seconds}
        (folder / "asked.json").write_text(json.dumps(asked), encoding="utf-8")
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        process = subprocess.Popen(
            [sys.executable, "-m", "ui.reward_process", name], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": path, "PYTHONIOENCODING": "utf-8:replace"}, start_new_session=True,
        )  # fmt: skip
        printed = bytearray()
        reader = threading.Thread(target=drain, args=(process.stdout, printed), daemon=True)
        reader.start()
        end = time.monotonic() + seconds + GRACE
        while process.poll() is None and time.monotonic() < end and not (stop and stop.is_set()):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.2)
        with contextlib.suppress(OSError):  # and what it has started
            os.killpg(process.pid, signal.SIGKILL) if hasattr(os, "killpg") else process.kill()
        process.wait()
        reader.join(1.0)
        text = bytes(printed).decode(errors="replace").strip()
        answer, hung = (f.read_text(errors="replace") if f.exists() else "" for f in map(folder.joinpath, LEFT))
    if answer:
        found = json.loads(answer)
        if "error" in found:
            raise RewardError(found["error"])
        return found["answer"], text
    if stop and stop.is_set():
        raise RewardError("stopped")
    if hung:
        frames = re.findall(r'File "(.*)", line (\d+) in (.*)', hung)
        where = next((f"in {f}, line {n}" for path, n, f in frames if Path(path).name == file.name), "busy")
        raise RewardError(
            f"{file.name} gave no answer within {seconds:g} s, it was {where}. Look for a loop that does not end there."
        )
    last = f"It printed last: {text[-300:]}" if text else "It printed nothing."
    raise RewardError(f"{file.name} ended its process (status {process.returncode}) without an answer. {last}")


def drain(pipe, printed: bytearray) -> None:
    """Keep the last of what is printed: it may be without end."""
    while part := os.read(pipe.fileno(), 2**16):
        printed += part
        del printed[:-PRINTED]


def score_apart(
    run: Path | None, file: Path, source: str, seconds: float, row: dict, completions: list[dict], stop=None
):
    """(the weights by function, a Score for each completion of this row, the last of what was printed).

    completions: text, truncated and, where they are known, step, tokens and token_ids. Raises RewardError as `apart`.
    """
    found, printed = apart("score", run, file, source, seconds, stop, row=row, completions=completions)
    return found["weights"], [Score(**fields) for fields in found["scores"]], printed


def parts_of(score: Score) -> Iterator[tuple[str, float | None, str]]:
    """(name, value, why) of each reward and metric."""
    for name, value in (score.parts | score.metrics).items():
        steps = [f"{v:g} at character {position}" for position, v in score.process.get(name, [])]
        yield name, value, ", ".join(filter(None, [score.reasons.get(name), *steps]))


def number_of(value: float | None, form: str = ".3g") -> str:
    return "-" if value is None or math.isnan(value) else format(round(value, 12), form)


# --- in the process


def main(folder: Path) -> None:
    """The process: do what asked.json asks and leave an answer, or where the code was when the time was over."""
    asked = json.loads((folder / "asked.json").read_text(encoding="utf-8"))
    answer, hung = map(folder.joinpath, LEFT)
    faulthandler.dump_traceback_later(asked["seconds"], exit=True, file=hung.open("w"))
    try:
        found = {"answer": TASKS[asked["task"]](asked)}
    except (RewardError, DataError, ValueError) as error:
        found = {"error": str(error)}
    except Exception as error:
        found = {"error": f"The row or the settings cannot be used: {type(error).__name__}: {error}."}
    sys.stdout.flush()
    unfinished = folder / "unfinished"
    unfinished.write_text(json.dumps(found, default=str), encoding="utf-8")
    os.replace(unfinished, answer)
    os._exit(0)  # whatever threads a reward function has started


def settings_of(asked: dict) -> dict:
    return read_settings(Path(asked["run"])) if asked["run"] else {}


def rewards_of(asked: dict, rows: list[dict]) -> Rewards:
    """The reward functions as they counted in the run."""
    settings = settings_of(asked)
    if any(row_kind(row) == "code" for row in rows):  # else its start is time lost
        sandbox.start(settings.get("code_timeout", 1.0), settings.get("unsafe_run_model_code", False))
    return as_in_run(asked["file"], settings, asked["source"])


def check_task(asked: dict) -> list[str]:
    rewards = load_rewards(asked["file"], source=asked["source"])
    return [f"{f.name} {f.weight:g}" for f in rewards.functions if f.weight]


def score_task(asked: dict) -> dict:
    """Completions of one row: the weight of each function, and the fields of each Score."""
    row, rewards = asked["row"], rewards_of(asked, [asked["row"]])
    completions = []
    for how in asked["completions"]:
        made = made_up(row, how["text"], how["truncated"], how.get("step") or 1)  # its tokens are its bytes
        if how.get("tokens"):  # unless they are known
            made.tokens, made.token_ids = how["tokens"], how.get("token_ids", [])
        completions.append(made)
    scores = [dataclasses.asdict(dataclasses.replace(score, extra={})) for score in rewards.score_all(completions)]
    return {"weights": {f.name: f.weight for f in rewards.functions}, "scores": scores}


def rescore_task(asked: dict) -> dict:
    """A step's completions once more: what --rescore says of them, and what has changed of each."""
    by_id = questions(settings_of(asked), Path(asked["run"]))
    known = [line | {"number": n} for n, line in enumerate(asked["lines"], 1) if line["prompt_id"] in by_id]
    rewards = rewards_of(asked, [by_id[line["prompt_id"]] for line in known])
    scores = rewards.score_all([saved_completion(line, by_id[line["prompt_id"]]) for line in known])
    with contextlib.redirect_stdout(io.StringIO()) as means:
        report(rewards, known, scores, shown=0)
    changes = sorted(map(change, known, scores), key=lambda found: -found[0])
    return {"report": means.getvalue(), "lines": [cells for _, cells in changes]}


def change(line: dict, score: Score) -> tuple[float, list]:
    """(by how much the total changes, the cells of CHANGES)."""
    old, new, total = line.get("rewards", {}), score.parts, None if math.isnan(score.total) else score.total
    turned = [name for name in {**new, **old} if differ(old.get(name), new.get(name))]
    what = "; ".join(f"{name} {number_of(old.get(name))} -> {number_of(new.get(name))}" for name in turned)
    what = what or ("the weights" if differ(line.get("reward"), total) else "nothing")
    was = line.get("verdict") or score.verdict
    verdict = was if was == score.verdict else f"{was} -> {score.verdict}"
    shown = [line["number"], shorten(line["prompt"], 80), number(line.get("reward")), number(total), verdict, what]
    why = shorten("; ".join(score.reasons.values()), 200)
    return abs((total or 0.0) - (line.get("reward") or 0.0)), [*shown, why, line["completion"][-80:]]


TASKS = {"check": check_task, "score": score_task, "rescore": rescore_task}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
