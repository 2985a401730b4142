"""Progress bars that only the first process of a run shows."""

from __future__ import annotations

import os
from typing import Any


def on_first_process() -> bool:
    """Return whether this is the first or only process of a run."""
    return os.environ.get("RANK", "0") == "0"


def bar_options(description: str, unit: str) -> dict[str, Any]:
    """Return options of tqdm for a bar that appears on the first process only, if it has a terminal."""
    hidden = None if on_first_process() else True
    return {"desc": description, "unit": f" {unit}", "delay": 2, "leave": False, "disable": hidden}
