"""Says in words which ranks are missing, from the answers to a liveness check."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any


_MOST_NAMED = 8


def conclude(
    name: Callable[[int], str], answers: dict[int, dict[str, Any]], silent: Sequence[int], unknown: Sequence[int]
) -> str:
    """Return the conclusion of a check.

    Args:
        name: function that returns the name of a rank.
        answers: the `location` of each rank that answered.
        silent: ranks that did not answer.
        unknown: ranks that never started to answer checks.
    """
    if silent:
        return f"Missing: {_do_not_answer(name, silent)}: killed or stopped."
    if unknown:
        return f"Missing: {_do_not_answer(name, unknown)} and never reached hf_flashcp."
    elsewhere = {rank: answer["at"] for rank, answer in answers.items() if not answer["waits"]}
    if elsewhere:
        texts = [f"{name(rank)}, which is at {at}" for rank, at in elsewhere.items()]
        return f"Missing: {'; '.join(_shortened(texts))}."
    texts = [f"{name(rank)} at {answer['at']}" for rank, answer in answers.items()]
    return (
        "All ranks answer and are in collectives: either they wait for each other in different collectives, or the "
        f"network between them failed. They are {'; '.join(_shortened(texts))}."
    )


def store_is_gone(name: Callable[[int], str]) -> str:
    """Return the conclusion if the key-value store does not answer."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        holder = "the launcher of the first node, which holds the key-value store"
    else:
        holder = f"{name(0)}, whose process holds the key-value store"
    return f"Missing: {holder}. Without the store, no other rank can be asked."


def raised(name: str, error: BaseException) -> str:
    """Return the conclusion about a rank that ends because of an exception of its own."""
    return f"Missing: {name}, which raised {type(error).__name__}: {first_line(error)}."


def first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")[:300]


def _shortened(texts: list[str]) -> list[str]:
    more = len(texts) - _MOST_NAMED
    return texts if more <= 0 else [*texts[:_MOST_NAMED], f"and {more} more"]


def _do_not_answer(name: Callable[[int], str], ranks: Sequence[int]) -> str:
    names = ", ".join(_shortened([name(rank) for rank in ranks]))
    return f"{names}, which {'does' if len(ranks) == 1 else 'do'} not answer"
