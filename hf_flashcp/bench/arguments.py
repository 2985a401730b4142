"""A decorator that puts arguments of a benchmark into its results, where its tables and `--json` show them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any


Measure = Callable[..., dict[str, Any]]


def with_arguments(*names: str) -> Callable[[Measure], Measure]:
    """Decorate a function that returns a dict, so that the dict starts with the named arguments.

    Tuples become lists.
    """

    def decorate(measure: Measure) -> Measure:
        signature = inspect.signature(measure)

        @functools.wraps(measure)
        def measured(*args: Any, **kwargs: Any) -> dict[str, Any]:
            given = signature.bind(*args, **kwargs)
            given.apply_defaults()
            values = {name: given.arguments[name] for name in names}
            shown = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
            return shown | measure(*args, **kwargs)

        return measured

    return decorate
