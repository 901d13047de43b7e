"""Datasets on the Hugging Face Hub, loaded with the package `datasets`.

    openai/gsm8k                                 default configuration and split
    google-research-datasets/mbpp:full           another configuration
    openai/gsm8k:main[test]                      configuration and split

The default split is `train` for training, and `test` or `validation` for evaluation, or the dataset's only split.
"""

import contextlib
import functools
import re

from data.schema import DataError, to_schema
from grading.base import did_you_mean

DEFAULT_CONFIGS = {  # for datasets with several; for any other, `datasets` picks the default or raises
    "openai/gsm8k": "main",
    "google-research-datasets/mbpp": "sanitized",
    "open-r1/DAPO-Math-17k-Processed": "all",
}
KNOWN = (*DEFAULT_CONFIGS, "HuggingFaceH4/MATH-500", "openai/openai_humaneval")
_SOURCE = re.compile(r"([\w-][\w.-]*/[\w.-]+)(?::([\w.-]+))?(?:\[([\w.-]+)\])?")


def is_hub_source(source: str) -> bool:
    """Return True if a source has the form OWNER/NAME, with an optional :CONFIG and [SPLIT]."""
    return _SOURCE.fullmatch(source) is not None


def read_hub(source: str, n: int | None, use: str, columns: dict[str, str]) -> tuple[list[dict], int]:
    """Return the first n rows (None: all) in the project's schema, and the number of rows in the split.

    The split is the one of the source, else the one for `use`, "train" or "eval". Raises DataError.
    """
    name, config, split = _SOURCE.fullmatch(source).groups()
    splits = _fetch(name, config)
    if split is None:
        split = _split_for(use, source, splits)
    elif split not in splits:
        raise DataError(f"{source}: there is no split {split}, only {', '.join(splits)}")
    table = splits[split]
    raw_rows = [table[i] for i in range(min(len(table), len(table) if n is None else n))]
    if not raw_rows:
        raise DataError(f"{source}: the split {split} has no rows")
    places = [f"{source}:{split}-{i}" for i in range(len(raw_rows))]
    return to_schema(raw_rows, name.partition("/")[2], columns, places), len(table)


def held_out_split(source: str) -> str | None:
    """Return the source of the evaluation split of a training source; None if the dataset has no separate one."""
    name, config, split = _SOURCE.fullmatch(source).groups()
    splits = _fetch(name, config)
    held_out = _split_for("eval", source, splits)
    if held_out == (split or _split_for("train", source, splits)):
        return None
    return source.removesuffix(f"[{split}]") + f"[{held_out}]"


def _split_for(use: str, source: str, splits) -> str:
    if use == "eval":
        for split in ("test", "validation"):
            if split in splits:
                return split
    if "train" in splits or len(splits) == 1:
        return "train" if "train" in splits else next(iter(splits))
    raise DataError(f"{source}: choose a split, such as {source}[{next(iter(splits))}]: {', '.join(splits)}")


@functools.lru_cache(maxsize=16)
def _fetch(name: str, config: str | None):
    """Load all splits of a dataset, by name, from the Hub or the local cache. Raise DataError if this fails.

    The Hub is probed first, because without a network `datasets` would retry for half a minute.
    """
    try:
        import datasets
        import httpx
        import huggingface_hub
    except ImportError as error:
        raise DataError(f"{name}: reading from the Hub needs a package: pip install {error.name}") from None
    label = name + (f":{config}" if config else "")
    is_reachable = True
    try:
        huggingface_hub.HfApi().dataset_info(name, timeout=10)
    except (httpx.TransportError, ConnectionError):
        is_reachable = False
    except (httpx.HTTPError, OSError, ValueError) as error:
        hint = did_you_mean(name, KNOWN) or f" {_in_one_line(error)}"
        raise DataError(f"{name}: the Hub does not provide this dataset.{hint}") from None
    try:
        with contextlib.nullcontext() if is_reachable else _offline():
            return datasets.load_dataset(name, config or DEFAULT_CONFIGS.get(name))
    except Exception as error:  # from any library: network, disk, file format, unknown configuration
        if is_reachable:
            raise DataError(f"{label}: cannot be loaded: {_in_one_line(error)}") from None
        raise DataError(
            f"{label}: this machine cannot reach the Hub and has no local copy of this dataset; without a network, use "
            "sums, words, functions, countdown, reasoning_gym:NAME or your own files"
        ) from None


@contextlib.contextmanager
def _offline():
    """Context in which the Hub client uses only its local cache."""
    import huggingface_hub

    previous = huggingface_hub.constants.HF_HUB_OFFLINE
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = previous


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
