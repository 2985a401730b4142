"""Replacements of functions of other packages."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any


def replaced_once(function: Callable, replace: Callable[[Callable], Callable]) -> Callable:
    """Return `replace(function)`, or `function` itself if it is already a replacement."""
    if getattr(function, "_flashcp", False):
        return function
    ours = functools.wraps(function)(replace(function))
    ours._flashcp = True
    return ours


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Context manager in which an object has another attribute of its own."""
    had, earlier = name in vars(owner), vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if had:
            setattr(owner, name, earlier)
        else:
            delattr(owner, name)
