"""Tables and counts in plain text: the one way in which commands and benchmarks print figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


GIB = 2**30
"""Bytes."""

_UNITS = {"": 1, "ms": 1e3, "us": 1e6, "MiB": 2**-20, "GiB": 2**-30}
"""By what seconds or bytes are multiplied to be shown in a unit."""


def table(columns: Mapping[str, str], rows: Iterable[Sequence[Any]]) -> str:
    """Rows under the names of their columns, without colours, rules or a limit to the width.

    A column has the format of its values, as [`format`] takes it, behind a unit if seconds or bytes are shown in one:
    "ms:.1f". Columns without a format hold text and are aligned to the left, all others to the right. A name may have
    several lines. Text stays as it is, `None` is "-" (nothing in a text column), and an empty row is an empty line.
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
    """The [`table`] of records: by key of the records the name and the format of a column. An empty record is an empty
    line."""
    rows = ([record.get(key) for key in columns] if record else () for record in records)
    return table(dict(columns.values()), rows)


def counted(number: int, noun: str) -> str:
    """`1 document`, `2,000 documents`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
