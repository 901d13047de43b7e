"""Reading a person's own questions from .jsonl, .json, .csv and .parquet files, with errors that name file and line."""

import csv
import difflib
import json
from pathlib import Path

from data.tasks import FAMILIES

PROMPT_NAMES = ("prompt", "question", "problem")  # looked for in this order where `columns` does not map the prompt


class DataError(Exception):
    """A data source cannot be used. The message is one line that names file, line or column and what to change."""


def read_file(source: str, columns: dict[str, str]) -> list[dict]:
    """All rows of a file in the project's schema. Raises DataError for a missing file, broken line, or missing column.

    columns maps our names (prompt, answer, tests, task, id) to the file's.
    """
    path = Path(source)
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
    if path.suffix.lower() not in readers:
        raise DataError(
            f"{source}: not a source: use a built-in family ({', '.join(FAMILIES)}) or a file ending in "
            f"{', '.join(readers)}"
        )
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.*")], n=1)
        raise DataError(
            f"{source}: there is no such file" + (f"; did you mean {path.parent / near[0]}?" if near else "")
        )
    try:
        raw_rows = readers[path.suffix.lower()](path)
    except csv.Error as error:
        raise DataError(f"{source}: not a CSV file that can be read: {error}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: not UTF-8 text at byte {error.start}: save it as UTF-8") from None
    if not raw_rows:
        raise DataError(f"{source}: the file has no rows")
    return [_to_schema(raw, line, path, columns) for line, raw in raw_rows]


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
        raise DataError(f"{path}: expected a list of objects, [{{...}}, {{...}}]; for one object a line use .jsonl")
    return [(number, _as_dict(row, path, number)) for number, row in enumerate(content, 1)]


def _read_csv(path: Path) -> list[tuple[int, dict]]:
    csv.field_size_limit(2**24)  # characters in a cell
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        rows = []
        for row in reader:
            if None in row or None in row.values():
                fields = len(reader.fieldnames)
                raise DataError(f"{path}:{reader.line_num}: this row does not have the header's {fields} fields")
            rows.append((reader.line_num, row))
        return rows


def _read_parquet(path: Path) -> list[tuple[int, dict]]:
    import pyarrow
    import pyarrow.parquet

    try:
        return list(enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1))
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a parquet file: {str(error).splitlines()[0]}") from None


def _as_dict(row, path: Path, number: int) -> dict:
    if not isinstance(row, dict):
        raise DataError(f"{path}:{number}: expected an object {{...}}, found {json.dumps(row)[:40]}")
    return row


def _to_schema(raw: dict, line: int, path: Path, columns: dict[str, str]) -> dict:
    """One row with our names; the mapped columns take the place of the file's, all others stay as they are."""
    for ours, theirs in columns.items():
        if theirs not in raw:
            near = difflib.get_close_matches(theirs, raw, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"it has {', '.join(raw)}"
            raise DataError(f"{path}:{line}: columns maps {ours} to '{theirs}', but there is no such column; {hint}")
    row = dict(raw) | {ours: raw[theirs] for ours, theirs in columns.items()}
    if "prompt" not in row:
        name = next((name for name in PROMPT_NAMES if name in row), None)
        if name is None:
            raise DataError(
                f"{path}:{line}: no column prompt or question, only {', '.join(raw)}: name it with "
                "columns: {prompt: YOUR_COLUMN}"
            )
        row["prompt"] = row[name]
    if not is_prompt(row["prompt"]):
        shown = str(row["prompt"])[:60]
        raise DataError(
            f"{path}:{line}: the prompt is {shown!r}: expected text, or a list of {{role, content}} messages"
        )
    for name in ("answer", "tests"):
        if row.get(name) == "":  # an empty cell
            row[name] = None
    if isinstance(row.get("tests"), str):  # as it comes from a CSV file: one assert a line
        row["tests"] = [test for test in row["tests"].splitlines() if test.strip()]
    row["id"] = str(row["id"]) if row.get("id") not in (None, "") else f"{path.stem}:{line}"
    row["task"] = str(row.get("task") or path.stem)
    return row


def is_prompt(prompt) -> bool:
    """Whether a prompt is text, or a list of chat messages with a role and text each."""
    if isinstance(prompt, str):
        return bool(prompt.strip())
    return (
        isinstance(prompt, list)
        and len(prompt) > 0
        and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in prompt
        )
    )
