"""Self-test of reward files: passes and failures, the table, --watch and --rescore."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import yaml
from conftest import run_with_questions

from tools.self_test import WIDTH, self_test


def write(tmp_path, source, name="my_rewards.py"):
    path = tmp_path / name
    path.write_text("from grading import *\n" + textwrap.dedent(source))
    return str(path)


def run(capsys, *arguments):
    """Run the self-test. Return its exit status (or error message) and its output lines."""
    status = 0
    try:
        self_test(arguments[0], list(arguments[1:]))
    except SystemExit as error:
        status = error.code or 0
    return status, capsys.readouterr().out.splitlines()


def find_row(lines, start):
    """Return the first line of a table that starts with a text, after its mark."""
    return next(line for line in lines if line[2:].startswith(start))


CORRECT = '@reward(when="math")\ndef correct(c): return grade_math(c.answer, c.row["answer"])\n'


def test_bundled_rewards_pass():
    start = time.perf_counter()
    process = subprocess.run([sys.executable, "rewards.py"], capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    lines = process.stdout.splitlines()
    assert lines[-1].startswith("self-test passed; ") and time.perf_counter() - start < 10
    assert max(map(len, lines)) <= WIDTH and not [line for line in lines if line.startswith("! ")]
    titles = [line.split(": answers written as")[0] for line in lines if "answers written as" in line]
    assert titles == ["sums", "words", "functions"]
    assert find_row(lines, "gold, with").split()[:7] == ["gold,", "with", "thinking", "right", "1", "1", "1"]
    for name in (
        "wrong answer",
        "only inside <think>",
        "several, last is wrong",
        "truncated",
        "very long",
        "tags only",
    ):
        matches = [line.split() for line in lines if line[2:].startswith(name)]
        assert len(matches) == 3 and all("right" not in line for line in matches)


def test_starts_quickly_and_imports_no_large_packages():
    code = (
        "import sys; sys.argv = ['rewards.py', '--help']; from tools.self_test import self_test\n"
        "try: self_test('rewards.py')\nexcept SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'numpy', 'sympy', 'math_verify', 'datasets'} & set(sys.modules)"
    )
    start = time.perf_counter()
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0 and "--rescore" in process.stdout, process.stderr
    assert time.perf_counter() - start < 5


def test_detects_a_reward_for_empty_answers(tmp_path, capsys):
    """A reward for short answers pays most for an empty one."""
    questions = tmp_path / "q.jsonl"
    questions.write_text('{"question": "Capitale de la France ?"}\n{"question": "Deux et deux ?"}\n')
    short = "@reward\ndef short(c): return max(0.0, 1 - len(c.text) / 100)\n"
    status, lines = run(capsys, write(tmp_path, short), "--data", str(questions))
    assert status == 1 and "self-test FAILED: 1 problem" in lines[-1]
    (failure,) = [line for line in lines if line.startswith("FAIL: q.jsonl: 'empty' ")]
    assert "gets 1," in failure and "2 of 2 questions" in failure and "no gold" in " ".join(lines)
    assert find_row(lines, "empty").startswith("! ")
    example = {"label": "right", "text": "Paris.", "prompt": "Capitale de la France ?"}
    fixed = f"@reward\ndef short(c): return 2 < len(c.text) < 10\nexamples = [{example}]\n"
    status, lines = run(capsys, write(tmp_path, fixed), "--data", str(questions))
    assert status == 0 and "self-test passed" in lines[-1]


@pytest.mark.parametrize(
    "source, probe",
    [
        ("@reward\ndef f(c): return c.row['answer'] in c.text\n", "'only inside <think>'"),
        ("@reward\ndef f(c): return c.row['answer'] in c.text\n", "'several, last is wrong'"),
        ("@reward\ndef f(c): return c.text.endswith('}') and len(c.text) > 10\n", "'wrong answer'"),
        (
            "import re\n@reward\ndef f(c): return re.findall('boxed.(.*?)}', c.text)[:1] == [c.row['answer']]\n",
            "'unclosed <think>'",
        ),
        ("@reward\ndef f(c): return min(1, len(c.text) / 1000)\n", "'very long'"),
    ],
)
def test_rewards_that_can_be_cheated_fail(tmp_path, capsys, source, probe):
    status, lines = run(capsys, write(tmp_path, source), "--data", "sums")
    assert status == 1 and any(line.startswith("FAIL: sums: " + probe) for line in lines)


def test_only_the_total_is_checked(tmp_path, capsys):
    """A format reward pays wrong answers too, which is not a failure."""
    status, lines = run(capsys, write(tmp_path, CORRECT + "@reward(weight=0.1)\ndef box(c): return 'boxed' in c.text\n"), "--data", "sums")  # fmt: skip
    assert status == 0 and "self-test passed" in lines[-1]


def test_constant_reward_fails_and_reward_that_never_applies_is_noted(tmp_path, capsys):
    source = CORRECT + "@reward(weight=0.1)\ndef same(c): return 0.5\n@reward(when='code')\ndef code(c): return 1\n"
    status, lines = run(capsys, write(tmp_path, source), "--data", "sums")
    assert status == 1 and any(line.startswith("FAIL: same gives 0.5 to all 90 completions") for line in lines)
    assert any(line.startswith("code ") and "--data SOURCE" in line for line in lines)


def test_examples_are_checked(tmp_path, capsys):
    examples = [
        {"label": "right", "text": "\\boxed{7}", "prompt": "3+4?", "answer": "7"},
        {"label": "wrong", "text": "I think \\boxed{7}", "prompt": "3+4?", "answer": "7"},
        {"label": "wrong", "text": "\\boxed{8}", "prompt": "3+4?", "answer": "7"},
    ]
    status, lines = run(capsys, write(tmp_path, CORRECT + f"examples = {examples}\n"), "--data", "sums")
    (failure,) = [line for line in lines if line.startswith("FAIL")]
    assert status == 1 and failure.startswith("FAIL: examples: '2. I think \\\\boxed{7}' (wrong) gets 1,")
    status, _ = run(capsys, write(tmp_path, CORRECT + "examples = [{'text': 'x'}]\n"), "--data", "sums")
    assert "example 1 must be a dict with label" in status


def test_detects_the_answer_style(tmp_path, capsys):
    source = "@reward\ndef xml(completions, answer): return ['<answer>\\n' + a + '\\n</answer>' in c[0]['content'] for a, c in zip(answer, completions)]\n"
    status, lines = run(capsys, write(tmp_path, source), "--data", "sums", "-n", "1")
    assert any("written as <reasoning>" in line for line in lines)
    assert status == 1 and "'only inside <think>'" in " ".join(lines)


def test_errors_are_one_line(tmp_path, capsys):
    assert run(capsys, write(tmp_path, "@reward\ndef f(c): return c.row['gold']\n"))[0].startswith("error: reward function 'f' (my_rewards.py:3), row sums-train-0-0: KeyError")  # fmt: skip
    assert "there is no such file" in run(capsys, write(tmp_path, CORRECT), "--data", "nothing.jsonl")[0]
    assert "there is no file" in run(capsys, str(tmp_path / "none.py"))[0]


def test_long_names_keep_the_table_narrow(tmp_path, capsys):
    names = [f"a_reward_function_with_a_long_name_{i}" for i in range(5)]
    source = CORRECT + "".join(f"@reward(weight=0.01)\ndef {name}(c): return len(c.text) % 7 / 7\n" for name in names)
    _, lines = run(capsys, write(tmp_path, source), "--data", "sums")
    assert len(lines) > 15 and max(map(len, lines)) <= WIDTH


# --- --watch


def test_watch_reruns_whenever_the_file_is_saved(tmp_path):
    path = write(tmp_path, CORRECT)
    command = [sys.executable, "-c", f"from tools.self_test import self_test; self_test({path!r})"]
    process = subprocess.Popen(
        [*command, "--data", "sums", "-n", "1", "--watch"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    killer = threading.Timer(60, process.kill)
    killer.start()
    try:
        first = read_until(process, "self-test passed")
        assert first[0].startswith("--- ") and "correct 1" in first[1]
        write(tmp_path, CORRECT + "@reward(weight=0.2)\ndef same(c): return 1\n")
        assert any(line.startswith("FAIL: same gives 1") for line in read_until(process, "self-test FAILED"))
        write(tmp_path, "def broken(:\n")
        assert "my_rewards.py:2: SyntaxError" in read_until(process, "error:")[-1]
        write(tmp_path, CORRECT)
        read_until(process, "self-test passed")
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
        killer.cancel()


def read_until(process, text):
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return lines
    raise AssertionError(f"{text} never came: {lines}")


# --- --rescore


def saved_line(question, text, step=1, **fields):
    return {
        "step": step, "prompt_id": question["id"], "task": "t", "prompt": question["prompt"], "completion": text, "tokens": 3,
        "finish_reason": "stop", **fields,
    }  # fmt: skip


@pytest.fixture
def run_folder(tmp_path):
    """A run of two steps on three questions of a file, whose reward accepted any boxed answer."""
    questions, rows, folder = run_with_questions(tmp_path)
    settings = {
        "train_data": [str(questions)], "eval_data": [], "train_questions": 100, "eval_questions": 1, "columns": {}, "seed": 0,
        "reward_funcs": [], "reward_weights": {"correct": 2.0, "gone": 1.0},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    (folder / "rollouts").mkdir()
    for step in (1, 2):
        old = {"reward": 2.0, "rewards": {"correct": 1.0}, "verdict": "right"}
        lines = [json.dumps(saved_line(row, "\\boxed{2}", step, **old)) + "\n" for row in rows[:3]]
        (folder / "rollouts" / f"{step:06d}.jsonl").write_text("".join(lines))
    return folder


def test_rescores_one_step(run_folder, tmp_path, capsys):
    step = run_folder / "rollouts" / "000002.jsonl"
    status, lines = run(capsys, write(tmp_path, CORRECT), "--rescore", str(step))
    assert status == 0 and lines[-1].startswith("rescored 3 completions of ")
    assert find_row(lines, "total").split() == ["total", "2.0000", "0.6667", "2"]  # uses the run's weight


def test_rescore_passes_whole_steps_to_batch_functions(run_folder, tmp_path, capsys):
    source = "@reward\ndef n(completions, **kwargs): return [len(completions)] * len(completions)\n"
    status, lines = run(capsys, write(tmp_path, source), "--rescore", str(run_folder))
    assert status == 0 and find_row(lines, "n ").split() == ["n", "-", "3.0000", "6"]


def test_rescore_shows_old_and_new_values(run_folder, tmp_path, capsys):
    status, lines = run(capsys, write(tmp_path, CORRECT), "--rescore", str(run_folder))
    assert status == 0 and lines[-1].startswith("rescored 6 completions of ")
    assert find_row(lines, "correct").split() == ["correct", "1.0000", "0.3333", "4"]
    assert find_row(lines, "total").split() == ["total", "2.0000", "0.6667", "4"]  # uses the run's weight
    assert "  verdicts: 4 right -> wrong" in lines
    changes = lines[lines.index("largest changes:") + 1 : -1]
    assert len(changes) == 4 and changes[0].split()[:4] == ["q0", "2", "->", "0"] and "wrong: 2 is not 1" in changes[0]
    assert "'\\\\boxed{2}'" in changes[0] and max(map(len, lines[:-1])) <= WIDTH


def test_rescoring_failed_completions_reproduces_the_error(run_folder, tmp_path, capsys):
    row = {"id": "x", "prompt": "q", "task": "t", "answer": "1"}
    failed = run_folder / "failed.jsonl"
    failed.write_text(json.dumps(saved_line(row, "a", row=row)) + "\n")
    status, _ = run(
        capsys, write(tmp_path, "@reward\ndef f(c): return 1 / (c.text != 'a')\n"), "--rescore", str(failed)
    )
    assert "'f' (my_rewards.py:3), row x: ZeroDivisionError" in status
    status, lines = run(capsys, write(tmp_path, CORRECT), "--rescore", str(failed))
    assert status == 0 and find_row(lines, "correct").split() == ["correct", "-", "0.0000", "1"]


def test_rescore_names_missing_completions_questions_and_config(run_folder, tmp_path, capsys):
    path = write(tmp_path, CORRECT)
    status, _ = run(capsys, path, "--rescore", str(run_folder.parent / "mien"))
    assert "there are no completions in" in status and f"Did you mean '{run_folder}'" in status
    step = run_folder / "rollouts" / "000002.jsonl"
    lines = step.read_text()
    step.write_text(lines + lines.replace('"q0"', '"q9"') + '{"step": 3')
    assert "000002.jsonl:7 is not a saved completion" in run(capsys, path, "--rescore", str(run_folder))[0]
    step.write_text(lines + lines.replace('"q0"', '"q9"') * 2)
    status, printed = run(capsys, path, "--rescore", str(run_folder))
    assert status == 0 and printed[0].startswith("note  2 completions skipped")
    os.remove(run_folder / "config.yaml")
    assert "there is no config.yaml in" in run(capsys, path, "--rescore", str(run_folder))[0]
