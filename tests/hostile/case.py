"""The class of a catalogue case, and texts that several programs share."""

import os
import textwrap
from dataclasses import dataclass

TESTS = ["assert f(3) == 21", "assert f(-1) == 9"]
RIGHT = "def f(x):\n    return (x + 4) * 3\n"
CHECK = """
def check(candidate):
    assert candidate(3) == 21
    assert candidate(-1) == 9
    assert abs(candidate(0) - 12) < 1e-6
"""
MARK = f"canary-{os.getpid()}"  # part of the name of everything that a program leaves behind, to find it


@dataclass(frozen=True, eq=False)
class Case:
    """An answer with its tests and the verdict that it must get.

    In `answer` and `previous`, placeholders such as @HOME@ are replaced (`host.Host.placeholders`). A hostile answer
    must score 0; in the Monty tier it may also be ungraded.
    """

    family: str  # the kind of attack
    name: str
    answer: str
    tests: list | str = None  # None: TESTS
    entry_point: str | None = None
    setup: str = ""
    starter: str = ""
    score: float = 0.0  # 1.0: an honest program
    outcome: str = ""  # outcomes allowed in bubblewrap, separated by |; "": any except passed
    monty: str = ""  # outcomes allowed in Monty, if it matters; "unsupported": Monty cannot run it
    previous: str = ""  # a program that is graded just before this one in the same tier
    timeout: float = 0.4  # seconds of processor time (wall time: three times as much)

    def __str__(self):
        return f"{self.family}: {self.name}"


def attack(body: str, *, header: str = "") -> str:
    """Return a program that is right only if all of `body` succeeds: an exception means that the attack failed."""
    body = textwrap.indent(body.strip(), "    ")
    return f"{header}\nwon = False\ntry:\n{body}\n    won = True\nexcept BaseException:\n    pass\n" + (
        "def f(x):\n    return (x + 4) * 3 if won else 0\n"
    )


def in_function(body: str, *, header: str = "") -> str:
    """Return a program whose function runs a hostile body and returns 0."""
    return f"{header}\ndef f(x):\n{textwrap.indent(body.strip(), '    ')}\n    return 0\n"
