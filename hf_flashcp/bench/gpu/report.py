"""The results of a run as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...tables import table
from .runner import Row


def text(rows: Sequence[Row], shows: dict[str, str]) -> str:
    """Return a summary of the steps, followed by the results of each. `shows` describes the steps by name."""
    machine = rows[0]["machine"] if rows else {}
    summary = [
        {"step": row["step"], "result": row["status"], "s": row["seconds"], "shows": shows.get(row["step"], "")}
        for row in rows
    ]
    parts = [", ".join(f"{name} {value}" for name, value in machine.items()), table_of(summary)]
    for row in rows:
        parts += [f"{title}\n\n{table_of(records)}" for title, records in row["tables"].items() if title]
        notes = [f"- {problem}" for problem in row["problems"]]
        if row["cut"]:
            notes.append(f"- left out for lack of time: {', '.join(row['cut'])}")
        if row["message"]:
            notes.append(f"- {row['message']}")
        if notes:
            parts.append("\n".join([f"{row['step']}, {row['status']}:", *notes]))
    return "\n\n".join(parts)


def table_of(records: Sequence[dict[str, Any]]) -> str:
    """Return a table with a column for every name in the records; columns of text are left-aligned."""
    names = list(dict.fromkeys(name for record in records for name in record))
    is_text = {name: all(isinstance(record.get(name, ""), str) for record in records) for name in names}
    rows = [[shown(record.get(name, "")) for name in names] for record in records]
    return table({name: "" if is_text[name] else ">" for name in names}, rows)


def shown(value: Any) -> str:
    """Return a value as text: whole numbers in full, others with at most four significant digits."""
    if value is None:
        return "not finite"
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:.1e}"
