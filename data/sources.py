"""Read questions from .jsonl, .json, .csv, .tsv and .parquet files. Errors name file and line."""

import csv
import io
import json
from pathlib import Path

from data.schema import DataError, to_schema
from grading.base import did_you_mean, first_line

DELIMITERS = (",", ";", "\t")  # of .csv and .tsv files


def read_file(source: str, columns: dict[str, str]) -> list[dict]:
    """Read all rows of a file. Raise DataError for a missing file, an invalid line or a missing column.

    Args:
        columns: Maps our names (prompt, answer, tests, task, id) to the column names of the file.
    """
    raw_rows, places = read_raw(source)
    return to_schema(raw_rows, Path(source).stem, columns, places)


def read_raw(source: str) -> tuple[list[dict], list[str]]:
    """Return the rows of a file as they are, and the place of each for messages ("q.jsonl:3")."""
    path = Path(source)
    if path.suffix.lower() not in READERS:
        raise DataError(f"{source}: unknown type of file: use {', '.join(FILE_TYPES)}")
    if not path.is_file():
        names = [file.name for file in path.parent.glob("*.*")]
        raise DataError(f"{source}: there is no such file.{did_you_mean(path.name, names)}")
    try:
        raw_rows = READERS[path.suffix.lower()](path)
    except csv.Error as error:
        raise DataError(f"{source}: not a valid CSV file: {error}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: not UTF-8 text at byte {error.start}: save it as UTF-8") from None
    if not raw_rows:
        raise DataError(f"{source}: the file has no rows")
    return [raw for _, raw in raw_rows], [f"{path}:{line}" for line, _ in raw_rows]


def _read_jsonl(path: Path) -> list[tuple[int, dict]]:
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        return _parse_array(text, path)
    return _parse_lines(text, path)


def _read_json(path: Path) -> list[tuple[int, dict]]:
    text = path.read_text(encoding="utf-8-sig")
    first_object = text.strip().partition("\n")[0].rstrip().removesuffix(",")
    if "\n" in text.strip() and _is_json_object(first_object):
        return _parse_lines(text, path)
    return _parse_array(text, path)


def _is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except json.JSONDecodeError:
        return False


def _parse_lines(text: str, path: Path) -> list[tuple[int, dict]]:
    """Parse one object per line, with its line number. Blank lines, and a comma after an object, are allowed."""
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.strip().removesuffix(","))
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number}: not valid JSON: {error.msg} at column {error.colno}") from None
        rows.append((number, _as_dict(row, path, number)))
    return rows


def _parse_array(text: str, path: Path) -> list[tuple[int, dict]]:
    """Parse a list of objects, and number them."""
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not valid JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(content, list):
        raise DataError(f"{path}: expected a list of objects, [{{...}}, {{...}}], or one object per line")
    return [(number, _as_dict(row, path, number)) for number, row in enumerate(content, 1)]


def _read_csv(path: Path) -> list[tuple[int, dict]]:
    csv.field_size_limit(2**24)  # characters per cell
    with path.open(encoding="utf-8-sig", newline="") as file:
        text = file.read()
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=_find_delimiter(text))
    rows = []
    for row in reader:
        if None in row or None in row.values():
            num_fields = len(reader.fieldnames)
            raise DataError(f"{path}:{reader.line_num}: this row does not have {num_fields} fields like the header")
        rows.append((reader.line_num, row))
    return rows


def _find_delimiter(text: str) -> str:
    """Return the delimiter of a CSV file.

    It splits the header. If several do, one that gives all rows the same number of fields is preferred, then the one
    with the most fields.
    """
    widths = {}  # number of fields of each row, the header first
    for delimiter in DELIMITERS:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        widths[delimiter] = [len(row) for row in reader if row] or [1]
    splitting = [delimiter for delimiter in DELIMITERS if widths[delimiter][0] > 1]
    return max(splitting or DELIMITERS, key=lambda name: (len(set(widths[name])) == 1, widths[name][0]))


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


READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".tsv": _read_csv, ".parquet": _read_parquet}
FILE_TYPES = tuple(READERS)
