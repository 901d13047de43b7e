"""What only a machine with an NVIDIA GPU can show, in parts of at most 8 minutes each, the most telling first.

    make gpu-check                               the parts, what each is for, its minutes, and what has been done
    make gpu-check PART="sampler grpo0"          these parts
    python bench/gpu_check.py --next 9           parts not done yet, in their order, as long as 9 minutes last
    python bench/gpu_check.py report             all figures so far in Markdown, for bench/RESULTS.md
    python bench/gpu_check.py --rehearse         each kind of part on the CPU, in a small size: tests this script, and no more

Each part (bench/gpu_parts.py) runs in a process of its own and is killed after its time, so that one which crashes or hangs
loses nothing. FOLDER/PART.json (--out, runs/gpu-check) holds its figures as they come, its bounds, and of one that
failed the last lines. A part that passed or failed is done: --again repeats it. Exit status 0: all that was asked for
passed.

On a machine without a package registry what it lacks is carried along in a folder, with pydantic-monty's program in its bin/:

    export PATH=$PWD/.gpu/bin:$PATH PYTHONPATH=$PWD/.gpu && python3 bench/gpu_check.py --next 9
"""

import argparse
import contextlib
import difflib
import importlib
import importlib.metadata
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.sides import has_gpu, write_json  # noqa: E402
from grading.base import first_line  # noqa: E402

LIMIT = 480  # seconds of a part
LAST_LINES = 30  # kept of a part that did not pass
PACKAGES = "torch triton transformers peft bitsandbytes accelerate trl unsloth unsloth_zoo"


@dataclass(frozen=True)
class Part:
    """minutes: a guess for an H200, until it has been measured. work: module:function, which is given Notes and arguments."""

    what: str
    minutes: float
    work: str
    arguments: tuple = ()
    seed: int = 0


def tiny(what: str, config: str, seed: int) -> Part:
    return Part(f"{what}, through Unsloth in 4 bit, seed {seed}", 3, "bench.gpu_parts:tiny", (config, seed), seed)


def recipe(name: str, card: int, minutes: float) -> Part:
    what = f"10 steps of {name} with random weights within {card} GB: peak memory, seconds a step"
    return Part(what, minutes, "bench.gpu_parts:recipe", (f"configs/{name}.yaml", card))


def step(model: str, lengths: str, minutes: float) -> Part:
    what = f"a step of {model}, completions of {lengths} length, beside TRL's and Unsloth's trainers"
    return Part(what, minutes, "bench.gpu_parts:bench", (model, lengths))


def memory(backend: str) -> Part:
    return Part(f"memory predicted and measured of six shapes, {backend}", 5, "bench.gpu_parts:memory", (backend,))


MAIN, PPO = "configs/tiny.yaml", "configs/tiny_ppo.yaml"
PARTS = {
    "sampler": Part("does the roll-out sample from the policy that is trained?", 5, "bench.gpu_parts:sampler"),
    "grpo0": tiny("the main job", MAIN, 0),
    "bench-1.7b": step("qwen3-1.7b", "varied", 7),
    "recipes-0.6b": recipe("qwen3_0.6b_gsm8k", 6, 5),
    "recipes-1.7b": recipe("qwen3_1.7b_gsm8k", 8, 6),
    "recipes-4b": recipe("qwen3_4b_base_dapo", 16, 8),
    "bench-1.7b-fixed": step("qwen3-1.7b", "fixed", 7),
    "grpo1": tiny("the main job", MAIN, 1),
    "grpo2": tiny("the main job", MAIN, 2),
    "ppo0": tiny("the main job by PPO", PPO, 0),
    "ppo1": tiny("the main job by PPO", PPO, 1),
    "ppo2": tiny("the main job by PPO", PPO, 2),
    "memory": memory("unsloth"),
    "memory-transformers": memory("transformers"),
    "bench-0.6b": step("qwen3-0.6b", "varied", 6),
    "bench-4b": step("qwen3-4b", "varied", 8),
    "cuda": Part("equal bits twice, resuming, out of memory", 7, "bench.gpu_parts:cuda"),
}
REHEARSED = ["sampler", "grpo0", "bench-1.7b", "recipes-0.6b", "ppo0", "memory", "cuda"]  # one of each kind


# --- what a part writes down


class NotRun(Exception):
    """The part cannot be run here. The message is one line that says why."""


class Failed(Exception):
    """A process that the part started failed. The message says why, lines are what it had printed."""

    def __init__(self, message: str, lines: list[str]):
        super().__init__(message)
        self.lines = lines


class Notes:
    """Figures and bounds of a part, in its file as soon as they are known."""

    def __init__(self, file: Path, rehearsal: bool):
        self.file, self.rehearsal = file, rehearsal
        self.tables, self.checks = {}, []

    def row(self, table: str, **cells) -> None:
        """A line of a table: numbers, texts or None, by the names of their columns."""
        self.tables.setdefault(table, []).append(cells)
        self._write()

    def check(self, what: str, found: float, at_least: float | None = None, at_most: float | None = None) -> None:
        """A figure and its bounds; a rehearsal has figures and no bounds."""
        bounds = [
            f"{word} {bound:g}" for word, bound in (("at least", at_least), ("at most", at_most)) if bound is not None
        ]
        kept = (at_least is None or found >= at_least) and (at_most is None or found <= at_most)  # nan keeps none
        bound = "none, a rehearsal" if self.rehearsal else ", ".join(bounds)
        self._checked(what, f"{found:.4g}", bound, bool(kept or self.rehearsal))

    def _checked(self, what: str, found: str, bound: str, passed: bool, more: dict | None = None) -> None:
        self.checks.append({"what": what, "found": found, "bound": bound, "passed": passed} | (more or {}))
        self._write()

    @contextlib.contextmanager
    def attempt(self, what: str):
        """What fails within is a bound not kept, and the part goes on."""
        try:
            yield
        except Exception as error:
            lines = error.lines if isinstance(error, Failed) else traceback.format_exc().splitlines()
            self._checked(what, first_line(error)[:300], "no error", False, {"last_lines": lines[-LAST_LINES:]})

    def _write(self) -> None:
        write_json(str(self.file), json.loads(self.file.read_text()) | {"tables": self.tables, "checks": self.checks})


def do(work: str, arguments: list, file: Path, rehearsal: bool) -> None:
    """In the process of the part: its work, and how it ended."""
    module, function = work.split(":")
    notes = Notes(file, rehearsal)
    end = {}
    try:
        getattr(importlib.import_module(module), function)(notes, *arguments)
        failed = [c for c in notes.checks if not c["passed"]]
        why = "; ".join(f"{c['what']}: {c['found']} ({c['bound']})" for c in failed)
        end = {"status": "failed" if failed else "passed", "why": why}
    except NotRun as error:
        end = {"status": "not run", "why": str(error)}
    finally:
        write_json(str(file), json.loads(file.read_text()) | end)


# --- running parts


def run_part(name: str, folder: Path, seconds: float = LIMIT, rehearsal: bool = False) -> dict:
    """Run a part for so long at the most, and return what its file holds then."""
    part, file = PARTS[name], folder / f"{name}.json"
    folder.mkdir(parents=True, exist_ok=True)
    arguments = ["--do", part.work, json.dumps(part.arguments), str(file), *(["--rehearse"] if rehearsal else [])]
    begun = {
        "part": name, "what": part.what, "status": "unfinished", "why": "it was killed from outside", "seconds": None,
        "rehearsal": rehearsal, "machine": "none: a CPU" if rehearsal else describe_gpu(), "versions": versions(),
        "seed": part.seed, "command": shlex.join(sys.argv), "date": time.strftime("%Y-%m-%d %H:%M"), "tables": {}, "checks": [],
    }  # fmt: skip
    write_json(str(file), begun)
    started, late = time.monotonic(), False
    with tempfile.TemporaryFile() as log:
        command = [sys.executable, "-u", str(Path(__file__).resolve()), *arguments]  # a crash loses no lines
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            if process.poll() is None:
                kill_tree(process)
            with contextlib.suppress(OSError, AttributeError):  # what it has left behind; Windows has no such groups
                os.killpg(process.pid, signal.SIGKILL)
        log.seek(0)
        text = log.read().decode(errors="replace")
        lines = [line.rstrip()[:400] for line in text.splitlines() if line.strip()][-LAST_LINES:]
    found = json.loads(file.read_text()) | {"seconds": round(time.monotonic() - started, 1)}
    if late and found["status"] == "unfinished":
        found["why"] = f"{seconds:.0f} s were not enough"
    elif found["status"] == "unfinished":
        found |= {
            "status": "failed",
            "why": f"it ended with status {process.returncode}: {(lines or ['no output'])[-1]}",
        }
    if found["status"] != "passed":
        found["last_lines"] = lines
    write_json(str(file), found)
    return found


def kill_tree(process: subprocess.Popen) -> None:
    """End a process that was started here and all that it has started."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    process.kill()
    process.wait()


def results(folder: Path) -> dict[str, dict]:
    """What has been run, by part."""
    files = {name: folder / f"{name}.json" for name in PARTS}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}


def is_done(found: dict | None) -> bool:
    return bool(found) and not found["rehearsal"] and found["status"] in ("passed", "failed")


def next_part(done: dict[str, dict], tried: set[str], seconds: float) -> str | None:
    """The first part that is not done and fits into the time: those that were never begun come before the unfinished."""
    left = [name for name in PARTS if not is_done(done.get(name)) and name not in tried]
    left.sort(key=lambda name: name in done and not done[name]["rehearsal"])
    return next((name for name in left if 60 * PARTS[name].minutes <= seconds), None)


def describe_gpu() -> str:
    """Name, memory and driver, as nvidia-smi says them."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        name, size, driver = (
            subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0].split(", ")
        )
        return f"{name}, {size}, driver {driver}"
    return "a GPU that nvidia-smi does not describe"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES.split():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


# --- what is shown


WORDS = {"passed": "PASS", "failed": "FAIL", "unfinished": "UNFINISHED", "not run": "NOT RUN"}


def outcome(found: dict) -> str:
    """One line on a part that has been run."""
    why = f": {found['why']}" if found["why"] and found["status"] != "passed" else ""
    took = "" if found["seconds"] is None else f", {found['seconds']:.0f} s"
    rehearsed = " (a rehearsal on the CPU)" if found["rehearsal"] else ""
    return f"{WORDS[found['status']]}{rehearsed}{took}{why}"


def listing(done: dict[str, dict]) -> str:
    """Every part, its minutes, what it is for, and how it went."""
    lines = []
    for name, part in PARTS.items():
        lines.append(f"{name:20} {part.minutes:3g} min  {part.what}")
        if name in done:
            lines.append(f"{'':30}{outcome(done[name])}")
    left = sum(part.minutes for name, part in PARTS.items() if not is_done(done.get(name)))
    return "\n".join([*lines, f"\nleft to do: about {left:g} minutes on an H200 (a guess)"])


def report(done: dict[str, dict]) -> str:
    """All figures in Markdown. A rehearsal's are left out: they say nothing of a GPU."""
    real = {name: found for name, found in done.items() if not found["rehearsal"]}
    lines = ["## On a GPU: `make gpu-check`", ""]
    lines += [f"* {name}: left out, a rehearsal on the CPU" for name in done if name not in real]
    if not real:
        return "\n".join([*lines, "Nothing has been run on a GPU yet."])
    versions = {name: ", ".join(" ".join(pair) for pair in found["versions"].items()) for name, found in real.items()}
    machines = dict.fromkeys(f"{found['machine']}; {versions[name]}" for name, found in real.items())
    lines += [f"Machine: {'; or '.join(machines)}.", "", "| part | what | outcome |", "|---|---|---|"]
    lines += [f"| {name} | {found['what']} | {cell(outcome(found))} |" for name, found in real.items()]
    missing = [name for name in PARTS if name not in real]
    lines += ["", f"Not run: {', '.join(missing)}."] if missing else []
    for name, found in real.items():
        lines += ["", f"### {name}", "", f"{found['date']}, seed {found['seed']}, `{found['command']}`"]
        for title, rows in found["tables"].items():
            columns = list(dict.fromkeys(column for row in rows for column in row))
            lines += ["", f"{title}:", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
            lines += [f"| {' | '.join(cell(row.get(column)) for column in columns)} |" for row in rows]
        if found["checks"]:
            lines += ["", "| bound | found | |", "|---|---|---|"]
            lines += [
                f"| {cell(c['what'])}: {c['bound']} | {cell(c['found'])} | {'PASS' if c['passed'] else 'FAIL'} |"
                for c in found["checks"]
            ]
        for of in [*found["checks"], found]:
            if of.get("last_lines"):
                lines += ["", f"{of['what']}: the last lines", "", *(f"    {line}" for line in of["last_lines"])]
    return "\n".join(lines)


def cell(value) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "–" if value is None else str(value).replace("|", "\\|").replace("\n", " ")


def main() -> int:
    if sys.argv[1:2] == ["--do"]:
        work, arguments, file, *rest = sys.argv[2:]
        from bench import gpu_check  # the module that the parts know, which this script is not

        gpu_check.do(work, json.loads(arguments), Path(file), "--rehearse" in rest)
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="parts to run, or report; without any they are listed")
    parser.add_argument("--next", type=float, metavar="MINUTES", help="run parts not done yet for so long")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where results are kept (default runs/gpu-check)")
    parser.add_argument("--again", action="store_true", help="run parts that are done, too")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU in a small size, into a temporary folder")
    args = parser.parse_args()
    folder = args.out or (
        Path(tempfile.mkdtemp(prefix="ponder-rehearsal-")) if args.rehearse else ROOT / "runs/gpu-check"
    )
    if args.parts == ["report"]:
        print(report(results(folder)))
        return 0
    for name in args.parts:
        if name not in PARTS:
            near = difflib.get_close_matches(name, PARTS, n=1)
            parser.error(
                f"there is no part {name}; " + (f"did you mean {near[0]}?" if near else "without any they are listed")
            )
    if args.rehearse and any(not found["rehearsal"] for found in results(folder).values()):
        parser.error(f"--out {folder} holds figures of a GPU, which a rehearsal would replace: name another folder")
    asked = args.parts or (REHEARSED if args.rehearse and not args.next else [])
    if not asked and not args.next:
        print(listing(results(folder)))
        return 0
    if not args.rehearse and not has_gpu():
        print(
            "\n".join(
                f"{name}: NOT RUN: torch sees no NVIDIA GPU here (--rehearse tries it on the CPU)"
                for name in asked or ["--next"]
            )
        )
        return 1
    if args.next:
        end, tried = time.monotonic() + 60 * args.next - 10, set()

        def chosen():
            while name := next_part(results(folder), tried, end - time.monotonic()):
                tried.add(name)
                yield name, min(LIMIT, end - time.monotonic())
    else:

        def chosen():
            for name in asked:
                yield name, LIMIT

    passed = True
    for name, seconds in chosen():
        found = results(folder).get(name)
        if args.again or not is_done(found):
            print(f"{name}: {PARTS[name].what} ...", flush=True)
            found = run_part(name, folder, seconds, args.rehearse)
        print(f"{name}: {outcome(found)}", flush=True)
        passed = passed and found["status"] == "passed"
    print(f"figures: {folder}/*.json; python bench/gpu_check.py report --out {folder}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
