"""Progress bars and warnings of the first process of a run."""

from __future__ import annotations

import os
from typing import Any


def on_first_process() -> bool:
    """Returns whether this is the first process of a run, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def bar_options(description: str, unit: str) -> dict[str, Any]:
    """Returns tqdm's options for work that may take long: a bar on the first process, if that has a terminal."""
    hidden = None if on_first_process() else True
    return {"desc": description, "unit": f" {unit}", "delay": 2, "leave": False, "disable": hidden}
