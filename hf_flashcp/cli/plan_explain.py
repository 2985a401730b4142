"""The text of `flashcp plan --explain`: what limits a step, and a table of what other choices would give."""

from __future__ import annotations

import textwrap

from ..planning.explanation import Choice, Limits
from ..tables import records_table


WIDTH = 100
"""Characters in a line of the paragraph."""

PARTS = {
    "linear": "linear layers",
    "attention": "attention kernels",
    "scan": "scans of recurrent layers",
    "copies": "copies",
    "uneven": "uneven work",
    "inside": "waiting for links inside nodes",
    "between": "waiting for links between nodes",
    "states": "waiting for other ranks' states",
}
"""What the parts of a step are called."""

WORTH_IT = 0.01
"""A choice is suggested if it saves at least this part of the step."""

WORTH_RANKS = 0.05
"""Fewer ranks are suggested if they save at least this part of the GPU-seconds per token."""

LARGE = 0.03
"""Uneven work, copies or waiting are worth a hint if they take at least this part of the step."""

HINTS = {
    "copies": "Copies grow with the KV that ranks receive: fewer ranks or shorter documents need less.",
    "uneven": "Work is uneven because kernels or documents do not divide well: longer rows even it out.",
    "inside": "Fewer ranks, or rows with more work per token of KV, would hide more of the transfers.",
    "between": "Ranks on fewer nodes, or longer rows, would hide more of the transfers.",
    "states": "Recurrent layers pass states from rank to rank: fewer ranks wait less.",
}
"""What helps if one part is large and no other choice in the table is faster."""


def explanation_lines(limits: Limits, choices: list[Choice]) -> list[str]:
    """Return the paragraph and the table."""
    return [*textwrap.wrap(_paragraph(limits, choices), WIDTH), "", _table(choices)]


def _paragraph(limits: Limits, choices: list[Choice]) -> str:
    step = sum(limits)
    parts = sorted(((getattr(limits, name), name) for name in PARTS), reverse=True)
    shown = [
        f"{PARTS[name]} {1000 * seconds:,.1f} ms ({seconds / step:.1%})"
        for seconds, name in parts
        if seconds >= 0.0005 * step
    ]
    return (
        f"{PARTS[parts[0][1]].capitalize()} limit the step. It consists of {', '.join(shown)}. "
        f"{_room(choices[0])} {_suggestion(limits, choices)}"
    )


def _room(this: Choice) -> str:
    if this.over_bound is None:
        return "Ranks are beyond the caps, so there is no lower bound to compare with."
    return f"No plan within the caps can save more than {1 - 1 / this.over_bound:.1%}."


def _suggestion(limits: Limits, choices: list[Choice]) -> str:
    this, *others = choices
    equal = [other for other in others if other.cp_size == this.cp_size]
    fastest = min(equal, key=lambda choice: choice.seconds, default=this)
    fewer = min(others, key=lambda choice: choice.cp_size, default=this)
    said = []
    if fastest.seconds <= (1 - WORTH_IT) * this.seconds:
        said.append(f"{_named(fastest)} would save {1 - fastest.seconds / this.seconds:.1%}.")
    else:
        said.append("No other choice for as many ranks saves 1%.")
        seconds, worst = max((getattr(limits, name), name) for name in HINTS)
        if seconds >= LARGE * sum(limits):
            said.append(HINTS[worst])
    saved = 1 - fewer.gpu_seconds_per_token / this.gpu_seconds_per_token
    if fewer.cp_size < this.cp_size and saved >= WORTH_RANKS:
        said.append(
            f"cp_size={fewer.cp_size} would take {saved:.1%} fewer GPU-seconds per token, if `flashcp estimate` says "
            "that it fits."
        )
    return " ".join(said)


def _named(choice: Choice) -> str:
    """Return a choice as an argument of `FlashCPPlugin`."""
    return f"{choice.group}={choice.value!r}" if choice.group else "this plan"


def _table(choices: list[Choice]) -> str:
    columns = {
        "choice": ("choice", ""),
        "seconds": ("step\nms", "ms:,.1f"),
        "over_this": ("step\n/ this", ".3f"),
        "over_bound": ("step\n/ bound", ".3f"),
        "kv_received": ("KV received by\nthe busiest rank", ",d"),
        "gpu_seconds_per_token": ("GPU us\nper token", "us:,.2f"),
    }
    this = choices[0].seconds
    rows = [{**choice._asdict(), "choice": _named(choice), "over_this": choice.seconds / this} for choice in choices]
    return records_table(columns, rows)
