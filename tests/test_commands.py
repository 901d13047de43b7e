"""Entry points whose output is closed before it ends, as by `| head`."""

import os
import subprocess
import sys

import pytest

from rl.run.process import CLOSED_PIPE_STATUS

COMMANDS = [
    "train.py --help",
    "train.py --dry-run",
    "export.py --help",
    "rewards.py --help",
    "rewards.py",
    "-m data --help",
    "-m data show sums -n 2000",
    "-m data check sums -n 5",
    "-m grading --help",
    "-m grading self-test rewards.py",
    "-m grading math-table tests/grading/math_cases.tsv",
]


def run_with_closed_pipe(arguments, num_bytes, **environment):
    """Run a command whose reader closes the pipe after some bytes. Return its exit status and stderr."""
    read_end, write_end = os.pipe()
    if not num_bytes:
        os.close(read_end)
    command = [sys.executable, *arguments]
    process = subprocess.Popen(
        command, stdout=write_end, stderr=subprocess.PIPE, text=True, env=os.environ | environment
    )
    os.close(write_end)
    if num_bytes:
        os.read(read_end, num_bytes)
        os.close(read_end)
    stderr = process.communicate()[1]
    return process.returncode, stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_closed_pipe_ends_a_command_silently(command):
    status, stderr = run_with_closed_pipe(command.split(), 0)
    assert status in (0, CLOSED_PIPE_STATUS) and stderr == ""


@pytest.mark.parametrize("num_bytes, unbuffered", [(1, ""), (0, "1"), (1, "1")])
def test_pipe_that_is_closed_while_a_command_prints(num_bytes, unbuffered):
    command = "-m data show sums -n 2000"  # more output than a pipe holds
    status, stderr = run_with_closed_pipe(command.split(), num_bytes, PYTHONUNBUFFERED=unbuffered)
    assert status == CLOSED_PIPE_STATUS and stderr == ""
    status, stderr = run_with_closed_pipe(["train.py", "--help"], num_bytes, PYTHONUNBUFFERED=unbuffered)
    assert status in (0, CLOSED_PIPE_STATUS) and stderr == ""  # 0: all of it was printed before the pipe was closed


def test_errors_are_shown_if_the_pipe_is_closed():
    status, stderr = run_with_closed_pipe(["-m", "data", "show", "wrods"], 0)
    assert status == 1 and stderr.startswith("error: wrods: unknown source")


def test_a_broken_pipe_to_another_process_is_not_hidden():
    code = "from rl.run.process import command_output\nwith command_output():\n    print(1)\n    raise BrokenPipeError"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 1 and process.stdout == "1\n" and "BrokenPipeError" in process.stderr


@pytest.mark.parametrize(
    "module",
    ["train", "export", "ui.app", "bench.vs_peer", "tools.make_tiny", "tools.sample"],
)
@pytest.mark.parametrize("own", [{}, {"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "ACTIVE"}], ids=str)
def test_openmp_spins_little_unless_the_user_says_otherwise(module, own):
    """Beside another busy process, the default number of spins makes a step 20 to 30 times slower."""
    code = (
        "import os, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch':\n"
        "            print('torch', os.environ.get('GOMP_SPINCOUNT'), flush=True)\n"
        "            os._exit(0)\n"
        f"sys.meta_path.insert(0, Finder())\nimport {module}\nimport rl, torch"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment | own
    )
    expected = own.get("GOMP_SPINCOUNT", None if own else "1000")
    assert f"torch {expected}" == output.stdout.splitlines()[0]
