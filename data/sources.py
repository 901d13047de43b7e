"""Read questions from .jsonl, .json, .csv and .parquet files into the project's schema. Errors name file and line."""

import csv
import json
from pathlib import Path

from data.formats import Format, find_format, parse_tests_cell
from grading.base import did_you_mean, first_line

FILE_TYPES = (".jsonl", ".json", ".csv", ".parquet")
PROMPT_NAMES = ("prompt", "question", "problem")  # tried in this order if `columns` does not map the prompt


class DataError(Exception):
    """Raised if a data source cannot be used. The message is one line: file, line or column, and what to change."""


def read_file(source: str, columns: dict[str, str]) -> list[dict]:
    """Read all rows of a file. Raise DataError for a missing file, an invalid line or a missing column.

    Args:
        columns: Maps our names (prompt, answer, tests, task, id) to the column names of the file.
    """
    path = Path(source)
    readers = dict(zip(FILE_TYPES, (_read_jsonl, _read_json, _read_csv, _read_parquet)))
    if not path.is_file():
        names = [file.name for file in path.parent.glob("*.*")]
        raise DataError(f"{source}: there is no such file.{did_you_mean(path.name, names)}")
    try:
        raw_rows = readers[path.suffix.lower()](path)
    except csv.Error as error:
        raise DataError(f"{source}: not a valid CSV file: {error}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: not UTF-8 text at byte {error.start}: save it as UTF-8") from None
    if not raw_rows:
        raise DataError(f"{source}: the file has no rows")
    return to_schema([raw for _, raw in raw_rows], path.stem, columns, [f"{path}:{line}" for line, _ in raw_rows])


def _read_jsonl(path: Path) -> list[tuple[int, dict]]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number}: not valid JSON: {error.msg} at column {error.colno}") from None
        rows.append((number, _as_dict(row, path, number)))
    return rows


def _read_json(path: Path) -> list[tuple[int, dict]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not valid JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(content, list):
        raise DataError(f"{path}: expected a list of objects, [{{...}}, {{...}}]; for one object per line use .jsonl")
    return [(number, _as_dict(row, path, number)) for number, row in enumerate(content, 1)]


def _read_csv(path: Path) -> list[tuple[int, dict]]:
    csv.field_size_limit(2**24)  # characters per cell
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        rows = []
        for row in reader:
            if None in row or None in row.values():
                num_fields = len(reader.fieldnames)
                raise DataError(f"{path}:{reader.line_num}: this row does not have {num_fields} fields like the header")
            rows.append((reader.line_num, row))
        return rows


def _read_parquet(path: Path) -> list[tuple[int, dict]]:
    import pyarrow
    import pyarrow.parquet

    try:
        return list(enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1))
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a parquet file: {first_line(error)}") from None


def _as_dict(row, path: Path, number: int) -> dict:
    if not isinstance(row, dict):
        raise DataError(f"{path}:{number}: expected an object {{...}}, got {json.dumps(row)[:40]}")
    return row


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
        if theirs in raw:
            row[ours] = raw[theirs]
        elif form is None:  # for a known format, the mapping may be meant for another source
            hint = did_you_mean(theirs, raw) or f" It has {', '.join(raw)}."
            raise DataError(f"{place}: columns maps {ours} to '{theirs}', but there is no such column.{hint}")
    if "prompt" not in row:
        prompt_name = next((name for name in PROMPT_NAMES if name in row), None)
        if prompt_name is None:
            raise DataError(
                f"{place}: no column prompt, question or problem, only {', '.join(raw)}: map yours with "
                "--columns prompt=YOUR_COLUMN, or columns: {prompt: YOUR_COLUMN} in the settings file"
            )
        row["prompt"] = row[prompt_name]
    if not is_prompt(row["prompt"]):
        shown = str(row["prompt"])[:60]
        raise DataError(f"{place}: the prompt is {shown!r}: expected text, or a list of {{role, content}} messages")
    for ours in ("answer", "tests"):
        if row.get(ours) == "":  # an empty cell
            row[ours] = None
    if isinstance(row.get("tests"), str):
        row["tests"] = parse_tests_cell(row["tests"])
    row["id"] = str(row["id"]) if row.get("id") not in (None, "") else f"{name}:{place.rpartition(':')[2]}"
    row["task"] = str(row.get("task") or name)
    return row


def is_prompt(prompt) -> bool:
    """Return True if a prompt is non-empty text, or a list of chat messages, each with a role and text."""
    if isinstance(prompt, str):
        return bool(prompt.strip())
    return isinstance(prompt, list) and len(prompt) > 0 and all(map(_is_message, prompt))


def _is_message(message) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(name), str) for name in ("role", "content"))
