"""Files of a run: written whole or not at all, as JSON that other programs read. Imports no torch."""

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
    """Write a file beside its place, sync it, and rename it, so that no reader and no crash meets half of it."""
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
    """fsync a file, or a folder if the system can."""
    try:
        descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)  # Windows syncs only what it may write
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError:
        if not path.is_dir():
            raise


@contextlib.contextmanager
def write_errors(path: Path):
    """Turn an OSError while writing into a RunError of one line."""
    try:
        yield
    except OSError as error:
        raise RunError(describe_write_error(path, error)) from error


def describe_write_error(path: Path, error: Exception) -> str:
    """One line for a file that could not be written."""
    problem = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
    with contextlib.suppress(OSError):
        if shutil.disk_usage(path.parent).free < 2**20:
            problem = "the disk is full: make room"
    return f"{path} cannot be written: {problem}"


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def to_json(value, indent: int | None = None) -> str:
    """JSON with null for nan and inf, and text for values that JSON does not have (a date, a decimal)."""
    return json.dumps(replace_nan(value), ensure_ascii=False, indent=indent, default=str)


def to_jsonl(records: list[dict]) -> str:
    return "".join(to_json(record) + "\n" for record in records)


def replace_nan(value):
    """The value with None in place of nan and inf, which JSON does not have."""
    if isinstance(value, dict):
        return {key: replace_nan(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [replace_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_jsonl(path: Path) -> list[dict]:
    """The records of a .jsonl file; none if it does not exist."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
