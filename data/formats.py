"""Row formats of well-known datasets, and their conversion to the project's schema.

A format is recognized by its columns, in files and on the Hub. To add one, write a function that converts a row, and add
a line to FORMATS. Code rows get `tests` (all tests of the dataset, including the one shown in the prompt: a program that
hard-codes it fails the others), `setup` (code that runs before both program and tests) and `solution` (a gold program).
"""

import ast
import json
import re
from collections.abc import Callable
from typing import NamedTuple

from grading.sandbox.cases import called_names, parse_tests


class Format(NamedTuple):
    """The row format of a dataset."""

    task: str
    columns: frozenset[str]  # columns that every row has
    convert: Callable[[dict], dict]  # returns our columns; raises KeyError, TypeError or ValueError for an invalid row
    evaluation_only: bool = False  # True for a benchmark, which must not be trained on
    marker: tuple[str, str] = ("", "")  # a column, and a text that it contains in every row


def find_format(rows: list[dict]) -> Format | None:
    """Return the format of all rows, or None."""

    def matches(form: Format, row: dict) -> bool:
        column, marker = form.marker
        return form.columns <= row.keys() and (not marker or marker in str(row[column]))

    return next((form for form in FORMATS if all(matches(form, row) for row in rows)), None)


def _gsm8k(row: dict) -> dict:
    solution, _, gold = row["answer"].rpartition("####")
    if not gold.strip():
        raise ValueError("the answer has nothing after ####")
    solution = re.sub(r"<<[^<>]*>>", "", row["answer"])  # calculator annotations: <<16-3-4=9>>
    return {"prompt": row["question"], "answer": gold.strip().replace(",", ""), "solution": solution}


def _math_500(row: dict) -> dict:
    return {"id": row["unique_id"], "prompt": row["problem"]}


def _dapo(row: dict) -> dict:
    return {"answer": row["solution"], "solution": None}  # DAPO's solution is only the final number


def _mbpp_sanitized(row: dict) -> dict:
    return _mbpp(row, row["prompt"], "\n".join(_texts(row["test_imports"])), [])


def _mbpp_full(row: dict) -> dict:
    return _mbpp(row, row["text"], row["test_setup_code"] or "", row.get("challenge_test_list") or [])


def _mbpp(row: dict, question: str, setup: str, more_tests) -> dict:
    """Convert an MBPP row. The prompt shows one test, which gives the function's name; the only test is not shown."""
    tests = _texts(row["test_list"]) + _texts(more_tests)
    if not tests:
        raise ValueError("the test_list is empty")
    program = row["code"].replace("\r\n", "\n")
    if len(tests) > 1:
        shown = f"Your code must pass this test:\n{tests[0]}"
    else:
        shown = f"It is called {', '.join(sorted(called_names(parse_tests(tests, None, setup))))}."
    prompt = f"{question.strip()}\n{shown}"
    setup = setup.replace("\r\n", "\n")
    return {"id": f"mbpp/{row['task_id']}", "prompt": prompt, "tests": tests, "setup": setup, "solution": program}


def _humaneval(row: dict) -> dict:
    start = row["prompt"]
    return {
        "id": row["task_id"],
        "prompt": f"Complete this Python function. Answer with all of it.\n\n{start.strip()}",
        "tests": row["test"],
        "setup": _before_function(start, row["entry_point"]),
        "starter": start,
        "solution": start + row["canonical_solution"],
    }


def _before_function(program: str, name: str) -> str:
    """Return the lines before a function: the imports and helpers that it and its tests use."""
    try:
        functions = [node for node in ast.parse(program).body if getattr(node, "name", None) == name]
    except SyntaxError as error:
        raise ValueError(f"the prompt is not Python: {error.msg}") from None
    if not functions:
        raise ValueError(f"the prompt does not define {name}")
    first_line = min([functions[-1].lineno, *(decorator.lineno for decorator in functions[-1].decorator_list)])
    return "\n".join(program.split("\n")[: first_line - 1]).strip()


def _texts(value) -> list[str]:
    """Return a list of texts. In a CSV file it is a Python literal: ['assert f(1) == 2', ...]."""
    if isinstance(value, str):
        value = ast.literal_eval(value) if value.strip() else []
    return [text.replace("\r\n", "\n") for text in value]


FORMATS = (
    Format("gsm8k", frozenset({"question", "answer"}), _gsm8k, marker=("answer", "####")),
    Format("math_500", frozenset({"problem", "solution", "answer", "subject", "level", "unique_id"}), _math_500, True),
    Format("dapo", frozenset({"prompt", "solution", "data_source", "ability", "reward_model"}), _dapo),
    Format("mbpp", frozenset({"task_id", "prompt", "code", "test_imports", "test_list"}), _mbpp_sanitized),
    Format("mbpp", frozenset({"task_id", "text", "code", "test_setup_code", "test_list"}), _mbpp_full),
    Format(
        "humaneval", frozenset({"task_id", "prompt", "canonical_solution", "test", "entry_point"}), _humaneval, True
    ),
)


def parse_tests_cell(text: str) -> str | list:
    """Parse a column `tests` that is one text: a check function, a JSON list, or one assert per line."""
    if "def check(" in text:
        return text
    if text.lstrip().startswith("["):
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            pass
    return [line for line in text.splitlines() if line.strip()]
