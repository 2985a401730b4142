"""`replaced_once`: replacements of functions of other packages."""

from __future__ import annotations

import functools
from collections.abc import Callable


def replaced_once(function: Callable, replace: Callable[[Callable], Callable]) -> Callable:
    """Return `replace(function)`, or `function` itself if it is already a replacement."""
    if getattr(function, "_flashcp", False):
        return function
    ours = functools.wraps(function)(replace(function))
    ours._flashcp = True
    return ours
