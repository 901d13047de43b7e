"""Reading and writing the files of a run: atomic writes, checksums and JSON. Imports no torch."""

import contextlib
import hashlib
import json
import math
import os
import shutil
from pathlib import Path

from grading.base import first_line
from rl.config import RunError


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a temporary file, sync it and rename it, so that a file is never incomplete, even after a crash."""
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        with unfinished.open("wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise


def fsync_path(path: Path) -> None:
    """fsync a file, or a folder if the system supports it."""
    try:
        descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)  # Windows syncs only writable files
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError:
        if not path.is_dir():
            raise


@contextlib.contextmanager
def write_errors(path: Path):
    """Raise an OSError from writing `path` as a RunError with a one-line message."""
    try:
        yield
    except OSError as error:
        raise RunError(describe_write_error(path, error)) from error


def describe_write_error(path: Path, error: Exception) -> str:
    """Return a one-line message for a file that could not be written."""
    problem = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
    with contextlib.suppress(OSError):
        if shutil.disk_usage(path.parent).free < 2**20:
            problem = "the disk is full: free some space"
    return f"{path} cannot be written: {problem}"


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def to_json(value, indent: int | None = None) -> str:
    """Return a value as JSON. NaN and infinity become null; values of other types (dates, decimals) become text."""
    return json.dumps(replace_nan(value), ensure_ascii=False, indent=indent, default=str)


def to_jsonl(records: list[dict]) -> str:
    """Return one line of JSON per record."""
    return "".join(to_json(record) + "\n" for record in records)


def replace_nan(value):
    """Replace NaN and infinity, which JSON does not have, by None."""
    if isinstance(value, dict):
        return {key: replace_nan(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [replace_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_jsonl(path: Path) -> list[dict]:
    """Return the records of a .jsonl file; an empty list if it does not exist."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
