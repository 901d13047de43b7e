"""bench/gpu_check.py without a GPU: which parts come next, what is kept of one that fails, and what the report says."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from bench import gpu_check, gpu_parts
from bench.gpu_check import PARTS, Failed, Notes, NotRun, Part, next_part, outcome, report, results, run_part

ROOT = Path(__file__).resolve().parents[2]


def command(*arguments):
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, "bench/gpu_check.py", *arguments], cwd=ROOT, capture_output=True, text=True, env=environment
    )


@pytest.fixture
def part(monkeypatch, tmp_path):
    """Runs a function of this file as a part, and returns what is kept of it."""
    monkeypatch.setattr(gpu_check, "describe_gpu", lambda: "NVIDIA TEST, 6 GB, driver 1")

    def run(function, seconds=60, rehearsal=False):
        monkeypatch.setitem(PARTS, "trial", Part("a trial", 1, f"tests.test_gpu_check:{function.__name__}", ("a",)))
        return run_part("trial", tmp_path, seconds, rehearsal)

    return run


# --- work that stands for a part's


def passes(notes, argument):
    notes.row("Figures", model=argument, seconds=1.25, peak=12345.6, missing=None)
    notes.check("accuracy", 0.97, at_least=0.95)
    notes.check("ratio", 1.0, 0.85, 1.15)


def misses(notes, argument):
    notes.check("ratio", 1.3, 0.85, 1.15)
    notes.check("nothing", float("nan"), at_least=0)


def crashes(notes, argument):
    notes.row("Figures", model=argument)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    notes.row("Left behind", pid=child.pid)
    for i in range(40):
        print(f"line {i}")
    os.abort()


def hangs(notes, argument):
    notes.row("Figures", model=argument)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    print(f"child {child.pid}", flush=True)
    time.sleep(60)


def goes_on(notes, argument):
    with notes.attempt("the first model"):
        raise Failed("CUDA error", ["Traceback", "CUDA error"])
    with notes.attempt("the second model"):
        print(1 / 0)
    notes.row("Figures", model="the third")


def cannot(notes, argument):
    raise NotRun("there is no recipe")


def kept(found):
    """A result as it stands in its file."""
    return {"passed": "passed"}.get(found["status"], found["status"]), found["why"], found["tables"]


def is_gone(pid):
    """Whether a process ends at once; nobody may have waited for it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for _ in range(50):
            if psutil.Process(pid).status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
                return True
            time.sleep(0.1)
        return False
    return True


def test_a_part_that_passes_keeps_its_figures(part, tmp_path):
    found = part(passes)
    figures = {"Figures": [{"model": "a", "seconds": 1.25, "peak": 12345.6, "missing": None}]}
    assert kept(found) == ("passed", "", figures) and results(tmp_path) == {"trial": found}
    assert found["machine"] == "NVIDIA TEST, 6 GB, driver 1" and "torch" in found["versions"]
    assert found["seconds"] > 0 and found["seed"] == 0 and not found["rehearsal"] and "last_lines" not in found
    text = report({"trial": found})
    assert (
        "Machine: NVIDIA TEST, 6 GB, driver 1; python 3" in text
        and f"| trial | a trial | PASS, {found['seconds']:.0f} s |" in text
    )
    assert "| model | seconds | peak | missing |" in text and "| a | 1.25 | 12,346 | – |" in text
    assert "| accuracy: at least 0.95 | 0.97 | PASS |" in text and "at least 0.85, at most 1.15" in text
    assert "Not run: sampler, grpo0," in text


def test_bounds_are_kept_or_the_part_fails(part):
    found = part(misses)
    assert kept(found)[:2] == ("failed", "ratio: 1.3 (at least 0.85, at most 1.15); nothing: nan (at least 0)")
    assert "| ratio: at least 0.85, at most 1.15 | 1.3 | FAIL |" in report({"trial": found})


def test_a_part_that_crashes_keeps_figures_and_last_lines(part):
    found = part(crashes)
    assert found["status"] == "failed" and found["tables"]["Figures"] == [{"model": "a"}]
    assert is_gone(found["tables"]["Left behind"][0]["pid"])
    assert len(found["last_lines"]) == 30 and "line 39" in found["last_lines"]
    assert "ended with status -6" in outcome(found) and "    line 39" in report({"trial": found})


def test_a_part_that_hangs_is_killed_with_all_that_it_started(part):
    found = part(hangs, seconds=4)
    assert kept(found) == ("unfinished", "4 s were not enough", {"Figures": [{"model": "a"}]}) and found["seconds"] < 30
    assert is_gone(next(int(line.split()[1]) for line in found["last_lines"] if line.startswith("child")))
    assert not gpu_check.is_done(found)


def test_what_fails_in_the_middle_is_told_and_the_part_goes_on(part):
    found = part(goes_on)
    assert found["status"] == "failed" and found["tables"] == {"Figures": [{"model": "the third"}]}
    assert found["why"] == "the first model: CUDA error (no error); the second model: division by zero (no error)"
    first, second = (check["last_lines"] for check in found["checks"])
    assert first == ["Traceback", "CUDA error"] and second[-1] == "ZeroDivisionError: division by zero"
    assert "the first model: the last lines\n\n    Traceback\n    CUDA error" in report({"trial": found})


def test_a_part_that_cannot_be_run_is_not_done(part):
    found = part(cannot)
    assert kept(found)[:2] == ("not run", "there is no recipe") and not gpu_check.is_done(found)
    assert outcome(found).startswith("NOT RUN, ") and outcome(found).endswith(": there is no recipe")


def test_a_rehearsal_is_no_figure_of_a_gpu(part, tmp_path):
    found = part(misses, rehearsal=True)
    assert found["status"] == "passed" and found["machine"] == "none: a CPU"
    assert {check["bound"] for check in found["checks"]} == {"none, a rehearsal"}
    assert "a rehearsal on the CPU" in outcome(found) and not gpu_check.is_done(found)
    text = report({"trial": found})
    assert "trial: left out, a rehearsal on the CPU" in text and "1.3" not in text and "PASS" not in text
    Path(tmp_path, "grpo0.json").write_text(json.dumps(found | {"rehearsal": False}))
    refused = command("--rehearse", "--out", str(tmp_path), "grpo0")
    assert refused.returncode == 2 and "which a rehearsal would replace" in refused.stderr


def test_what_comes_next():
    def of(status, rehearsal=False):
        return {"status": status, "rehearsal": rehearsal}

    names = list(PARTS)
    assert next_part({}, set(), 540) == "sampler" and next_part({}, {"sampler"}, 540) == "grpo0"
    done = {"sampler": of("passed"), "grpo0": of("failed"), "bench-1.7b": of("unfinished"), "recipes-4b": of("not run")}
    assert next_part(done, set(), 540) == "recipes-0.6b"
    assert next_part(done, set(), 200) == "grpo1"  # what is longer has to wait
    assert next_part(done, set(), 60) is None
    assert next_part({"sampler": of("passed", True)}, set(), 540) == "sampler"
    rest = {name: of("passed") for name in names} | {"bench-1.7b": of("unfinished")}
    assert next_part(rest, set(), 540) == "bench-1.7b" and next_part(rest, {"bench-1.7b"}, 540) is None
    assert names[:3] == ["sampler", "grpo0", "bench-1.7b"]  # the most telling first
    assert all(part.minutes * 60 <= gpu_check.LIMIT for part in PARTS.values())
    for part in PARTS.values():
        assert callable(getattr(gpu_parts, part.work.removeprefix("bench.gpu_parts:")))
        assert not part.arguments or not str(part.arguments[0]).endswith(".yaml") or Path(part.arguments[0]).is_file()


def test_done_parts_are_not_repeated(part, tmp_path, monkeypatch, capsys):
    part(passes)
    monkeypatch.setattr(gpu_check, "has_gpu", lambda: True)
    ran = []
    monkeypatch.setattr(gpu_check, "run_part", lambda name, *_: ran.append(name) or results(tmp_path)["trial"])

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(tmp_path), *arguments])
        return gpu_check.main()

    assert call("trial") == 0 and not ran and "trial: PASS" in capsys.readouterr().out
    assert call("trial", "--again") == 0 and ran == ["trial"]
    assert call("--next", "9") == 0 and ran == ["trial", *list(PARTS)[:-1]]  # here they take no time
    file = Path(tmp_path, "trial.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"status": "failed", "why": "ratio: 2"}))
    assert call("trial") == 1 and "trial: FAIL" in capsys.readouterr().out


def test_the_list_and_the_errors(tmp_path, monkeypatch, capsys):
    listed = command("--out", str(tmp_path))
    assert listed.returncode == 0 and all(name in listed.stdout for name in PARTS)
    assert "left to do: about" in listed.stdout
    assert "Nothing has been run on a GPU yet." in command("report", "--out", str(tmp_path)).stdout
    misspelt = command("samplr")
    assert misspelt.returncode == 2 and "there is no part samplr; did you mean sampler?" in misspelt.stderr
    monkeypatch.setattr(gpu_check, "has_gpu", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "sampler", "--out", str(tmp_path)])
    assert gpu_check.main() == 1 and "sampler: NOT RUN: torch sees no NVIDIA GPU here" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_process_of_a_part(tmp_path, capfd):
    found = []
    code = "from bench.gpu_parts import tell; print('said'); tell(a=1); {}"
    assert gpu_parts.run(["-c", code.format("")], on_figures=found.append) == ["said"] and found == [{"a": 1}]
    with pytest.raises(Failed, match="ValueError: wrong") as error:
        gpu_parts.run(["-c", code.format("raise ValueError('wrong')")], on_figures=found.append)
    assert error.value.lines[0] == "said" and "Traceback" in error.value.lines[1]
    with pytest.raises(Failed, match="1 s were not enough") as error:
        gpu_parts.run(["-c", "import time; print('begun', flush=True); time.sleep(60)"], seconds=1)
    assert error.value.lines == ["begun"]


@pytest.mark.parametrize(
    "model, name",
    [
        ("Qwen/Qwen3-4B-Base", "Qwen/Qwen3-4B"),
        ("unsloth/Llama-3.2-3B-Instruct", "meta-llama/Llama-3.2-3B"),
        ("Qwen/Qwen3-0.6B",) * 2,
    ],
)
def test_the_shape_of_a_recipe(model, name):
    assert gpu_parts.known_name(model) == name


def test_a_padded_prompt_and_an_unknown_shape():
    assert len(gpu_parts.padded("1 + 2 = ?", 256)) == 224 and gpu_parts.padded("1 + 2 = ?", 256).endswith("1 + 2 = ?")
    assert gpu_parts.padded("1 + 2 = ?", 8) == "1 + 2 = ?"
    with pytest.raises(NotRun, match="does not know the shape of some/model"):
        gpu_parts.known_name("some/model")


def test_figures_are_kept_as_they_come(tmp_path):
    file = tmp_path / "part.json"
    file.write_text('{"status": "unfinished"}')
    notes = Notes(file, rehearsal=False)
    notes.row("Steps", step=1)
    notes.check("steps", 1, at_least=10)
    assert json.loads(file.read_text())["tables"] == {"Steps": [{"step": 1}]} and not notes.checks[0]["passed"]
    assert json.loads(file.read_text())["status"] == "unfinished"


@pytest.mark.slow
def test_each_kind_of_part_can_be_rehearsed(tmp_path):
    done = command("--rehearse", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout
    found = results(tmp_path)
    assert list(found) == [name for name in PARTS if name in gpu_check.REHEARSED]
    assert all(of["status"] == "passed" and of["rehearsal"] and of["tables"] for of in found.values())
