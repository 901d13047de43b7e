"""The schema of a row: conversion from the columns of a source, nested columns, and checks of the prompt."""

import ast
import contextlib
import json
import re
import warnings

from data.formats import Format, find_format, parse_tests_cell
from grading.base import did_you_mean, shorten

PROMPT_NAMES = ("prompt", "question", "problem")  # tried in this order if `columns` does not map the prompt
ASSISTANT_ROLES = ("assistant", "model", "gpt", "bot", "ai")
# Starts of LaTeX commands that were read as control characters: JSON and YAML read "\frac" as a form feed and "rac".
DAMAGED_COMMAND = re.compile(
    r"[\x07\x08\x0b\x0c\x1b](?=[A-Za-z])|\t(?=ext(?:bf|it|rm)?\{|imes\b|heta\b|frac\{|riangle\b)"
    r"|\r(?=ight\b|ho\b|floor\b|ceil\b|angle\b)|\n(?=abla\b|otin\b|eq\b)"
)


class DataError(Exception):
    """Raised if a data source cannot be used. The message is one line: file, line or column, and what to change."""


def to_schema(raw_rows: list[dict], name: str, columns: dict[str, str], places: list[str]) -> list[dict]:
    """Convert rows of any format to the project's schema. Other columns are kept. Raise DataError for an invalid row.

    Args:
        name: Name of the source, used for ids and tasks.
        columns: Maps our column names to theirs; takes precedence over the format.
        places: Place of each row, for messages ("q.jsonl:3"). The part after the last colon becomes part of the id.
    """
    form = find_format(raw_rows)
    return [_to_row(raw, name, columns, place, form) for raw, place in zip(raw_rows, places)]


def _to_row(raw: dict, name: str, columns: dict[str, str], place: str, form: Format | None) -> dict:
    row = dict(raw)
    if form:
        try:
            row |= {"task": form.task} | form.convert(raw)
        except (KeyError, TypeError, ValueError, SyntaxError, AttributeError) as error:
            raise DataError(f"{place}: not a valid {form.task} row: {error}") from None
    for ours, theirs in columns.items():
        try:
            row[ours] = look_up(raw, theirs)
        except KeyError:
            if form is None:  # for a known format, the mapping may be meant for another source
                names = list(nested_names(raw))
                hint = did_you_mean(theirs, names) or f" It has {shorten(', '.join(names), 300)}."
                raise DataError(
                    f"{place}: columns maps {ours} to '{theirs}', but there is no such column.{hint}"
                ) from None
    prompt_column = columns.get("prompt", "prompt")
    if "prompt" not in row:
        prompt_column = next((name for name in PROMPT_NAMES if name in row), None)
        if prompt_column is None:
            raise DataError(
                f"{place}: no column prompt, question or problem, only {', '.join(raw)}: map yours with "
                "--columns prompt=YOUR_COLUMN, or columns: {prompt: YOUR_COLUMN} in the settings file"
            )
        row["prompt"] = row[prompt_column]
    for ours in ("answer", "tests"):
        if row.get(ours) == "":  # an empty cell
            row[ours] = None
    row["prompt"] = _check_prompt(row["prompt"], row.get("answer"), prompt_column, place)
    if isinstance(row.get("answer"), str) and DAMAGED_COMMAND.search(row["answer"]):
        raise DataError(
            f"{place}: the answer {row['answer'][:40]!r} has a control character, which comes from a single backslash: "
            "write two, as in \\\\frac"
        )
    if isinstance(row.get("tests"), str):
        row["tests"] = parse_tests_cell(row["tests"])
    row["id"] = str(row["id"]) if row.get("id") not in (None, "") else f"{name}:{place.rpartition(':')[2]}"
    row["task"] = str(row.get("task") or name)
    return row


# --- nested columns


def look_up(value, path: str):
    """Return the value of a column, or of a part of it: reward_model.ground_truth, messages.0.content.

    Names may contain dots. Text that is JSON or a Python literal is parsed. A part of an empty cell is None. Raises
    KeyError if there is no such part.
    """
    if isinstance(value, str):
        value = parse_text(value)
    if value is None or value == "":
        return None
    if isinstance(value, list):  # also counted from the end: -1
        value = {str(i): item for i, item in enumerate(value)} | {str(i - len(value)): x for i, x in enumerate(value)}
    if not isinstance(value, dict):
        raise KeyError(path)
    if path in value:
        return value[path]
    for i in reversed(range(len(path))):
        if path[i] == "." and path[:i] in value:
            with contextlib.suppress(KeyError):
                return look_up(value[path[:i]], path[i + 1 :])
    raise KeyError(path)


def parse_text(text: str):
    """Parse text that is a list or dict, as JSON or as a Python literal (in CSV files). Return other text unchanged."""
    if text.lstrip()[:1] in ("[", "{"):
        for parse in (json.loads, ast.literal_eval):
            with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # questionable Python
                return parse(text)
    return text


def nested_names(value, prefix: str = ""):
    """Yield the names of the columns of a row and of their parts; of a list, the first item only."""
    if isinstance(value, str):
        value = parse_text(value)
    if isinstance(value, list):
        value = dict(enumerate(value[:1]))
    for name, part in value.items() if isinstance(value, dict) else ():
        yield f"{prefix}{name}"
        yield from nested_names(part, f"{prefix}{name}.")


# --- prompts


def _check_prompt(prompt, answer, column: str, place: str) -> str | list[dict]:
    """Return the prompt, parsed if it is messages as text. Raise DataError if it is invalid or shows an answer."""
    if isinstance(prompt, str) and isinstance(messages := parse_text(prompt), list) and is_prompt(messages):
        prompt = messages
    if not is_prompt(prompt):
        shown = str(prompt)[:60]
        raise DataError(f"{place}: the prompt is {shown!r}: expected text, or a list of {{role, content}} messages")
    if isinstance(prompt, str):
        return prompt
    *context, last = prompt
    if context and last["role"] == "assistant" and not last["content"].strip():
        return _check_prompt(context, answer, column, place)
    if not _is_assistant(last):
        return prompt
    if last["role"] == "assistant" and context and not _is_assistant(context[-1]):
        if is_prefill(last["content"]) and not _contains(last["content"], answer):
            return prompt
    questions = [i for i, message in enumerate(prompt) if message["role"] == "user"]
    example = f", for example with columns: {{prompt: {column}.{questions[-1]}.content}}" if questions else ""
    raise DataError(
        f"{place}: the prompt ends with an assistant turn, {shorten(last['content'], 40)!r}, which shows the model an "
        f"answer: leave it out{example}. Only a turn that ends with an opening tag, such as <think>, is continued"
    )


def is_prompt(prompt) -> bool:
    """Return True if a prompt is non-empty text, or a list of chat messages, each with a role and text."""
    if isinstance(prompt, str):
        return bool(prompt.strip())
    return isinstance(prompt, list) and len(prompt) > 0 and all(map(_is_message, prompt))


def _is_message(message) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(name), str) for name in ("role", "content"))


def _is_assistant(message: dict) -> bool:
    return message["role"].lower() in ASSISTANT_ROLES


def is_prefill(text: str) -> bool:
    """Return True if an assistant turn only begins an answer: it ends with an opening tag or fence, or in a <think>."""
    ends_with_tag = re.search(r"<\w+>\s*\Z", text)
    ends_with_fence = re.search(r"```\w*\s*\Z", text) and text.count("```") % 2 == 1
    return bool(ends_with_tag or ends_with_fence or text.rfind("<think>") > text.rfind("</think>"))


def _contains(text: str, answer) -> bool:
    """Return True if a gold answer is part of a text."""
    gold = str(answer).strip() if isinstance(answer, (str, int, float)) else ""
    return bool(gold) and re.search(rf"(?<!\w){re.escape(gold)}(?!\w)", text) is not None
