"""Reading JSON Lines files, which may contain corrupt lines."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import BatchError


if TYPE_CHECKING:
    from datasets import Dataset


def load_json_lines(
    files: Sequence[str | os.PathLike], *, skip_corrupt: bool = False, cache_dir: str | os.PathLike = "."
) -> tuple[Dataset, int]:
    """Load files with one JSON object per line, and name or skip lines that cannot be read.

    Files are loaded by the datasets library, which does not name the line at which it fails.

    Args:
        files (`Sequence[str | os.PathLike]`): files to load.
        skip_corrupt (`bool`, *optional*, defaults to `False`): whether to skip lines that cannot be read. Files with
            such lines are copied to `cache_dir` without them.
        cache_dir (`str | os.PathLike`, *optional*): folder for these copies; defaults to the current folder.

    Returns:
        `tuple[Dataset, int]`: the rows, and the number of skipped lines.

    Raises:
        BatchError: a line is not valid JSON or not an object, and `skip_corrupt` is not set.
    """
    from datasets.exceptions import DatasetGenerationError

    try:
        for file in files:
            _decode(Path(file))
        return _load(files), 0
    except (DatasetGenerationError, UnicodeDecodeError):
        corrupt = {Path(file): dict(_corrupt_lines(Path(file))) for file in files}
        if not any(corrupt.values()):
            raise
        if not skip_corrupt:
            file, number, reason = next((file, *line) for file, lines in corrupt.items() for line in lines.items())
            raise BatchError(
                f"{file}, line {number}: {reason}. In total, {sum(map(len, corrupt.values()))} of the lines cannot be "
                "read. Repair them, or set skip_corrupt to skip and count them."
            ) from None
        copies = [_copy(file, lines, Path(cache_dir)) if lines else file for file, lines in corrupt.items()]
        return _load(copies), sum(map(len, corrupt.values()))


def _load(files: Sequence[str | os.PathLike]) -> Dataset:
    from datasets import load_dataset

    return load_dataset("json", data_files=[str(file) for file in files], split="train")


def _decode(file: Path) -> None:
    """Raise a `UnicodeDecodeError` if a file is not UTF-8. pyarrow accepts such bytes, but reading the row fails."""
    with file.open(encoding="utf-8") as text:
        while text.read(1 << 20):
            pass


def _corrupt_lines(file: Path) -> Iterator[tuple[int, str]]:
    """Yield the numbers of lines that cannot be read, and the reasons."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line, parse_constant=_no_constant)
            except (ValueError, RecursionError) as error:  # also covers UnicodeDecodeError
                yield number, str(error)
            else:
                if not isinstance(row, dict):
                    yield number, f"a JSON {type(row).__name__}, not an object"


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _copy(file: Path, corrupt: dict[int, str], directory: Path) -> Path:
    """Copy a file without its corrupt lines, unless the copy exists, because another process may be reading it."""
    state = file.stat()
    name = hashlib.sha256(f"{file.resolve()} {state.st_mtime_ns} {state.st_size}".encode()).hexdigest()[:16]
    copy = directory / f"{file.stem}-{name}.jsonl"
    if not copy.exists():
        directory.mkdir(parents=True, exist_ok=True)
        unfinished = copy.with_suffix(f".{os.getpid()}")
        with file.open("rb") as lines, unfinished.open("wb") as kept:
            kept.writelines(line for number, line in enumerate(lines, 1) if number not in corrupt)
        os.replace(unfinished, copy)
    return copy
