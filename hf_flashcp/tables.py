"""Plain-text tables and counts, as all commands and benchmarks print them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


GIB = 2**30
"""Bytes in a GiB."""

_UNITS = {"": 1, "ms": 1e3, "us": 1e6, "MiB": 2**-20, "GiB": 2**-30}
"""The factor by which seconds or bytes are multiplied to express them in each unit."""


def table(columns: Mapping[str, str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table of rows under their column headings, without colors, rules or a maximum width.

    Args:
        columns (`Mapping[str, str]`): the format of each column by its heading, which may have several lines. A format
            is what [`format`] takes, after a unit if the values are seconds or bytes to be converted: "ms:.1f".
            Columns with an empty format hold text and are left-aligned; all others are right-aligned.
        rows (`Iterable[Sequence]`): the values of each row. Text is printed unchanged, `None` as "-" (as nothing in a
            text column), and an empty row as an empty line.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="")
    for name, form in columns.items():
        drawn.add_column(Text(name), justify="right" if form else "left", vertical="bottom", no_wrap=True)
    for row in rows:
        drawn.add_row(*(Text(_shown(value, form)) for value, form in zip(row, columns.values())))
    console = Console(width=10_000, color_system=None, force_terminal=False, legacy_windows=False)
    with console.capture() as capture:
        console.print(drawn)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _shown(value: Any, form: str) -> str:
    if value is None:
        return "-" if form else ""
    if isinstance(value, str):
        return value
    unit, _, form = form.rpartition(":")
    return format(_UNITS[unit] * value, form)


def records_table(columns: Mapping[str, tuple[str, str]], records: Iterable[Mapping[str, Any]]) -> str:
    """Return the [`table`] of some records.

    `columns` maps keys of the records to the heading and format of their column. An empty record is an empty line.
    """
    rows = ([record.get(key) for key in columns] if record else () for record in records)
    return table(dict(columns.values()), rows)


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, as in `1 document` and `2,000 documents`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
