"""Turns a collective that fails into an error that names the missing ranks, and tells other ranks about errors."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator

import torch.distributed as dist

from ..errors import FlashCPError
from .conclusions import first_line
from .liveness import find_missing_ranks, name_of_rank, tell_others, watch_liveness
from .location import activities, activity


_ADVICE = (
    "Look at the output of these ranks first. Saved checkpoints are complete: start again with "
    "resume_from_checkpoint=True (docs/reliability.md)."
)
_FAILED_COLLECTIVE = re.compile(
    r"\bgloo/|Connection (closed|reset) by peer|Timed out waiting \d+ms|Broken pipe|NCCL (error|communicator)|ncclUnh"
)


def is_failed_collective(error: BaseException) -> bool:
    """Return whether an error says that other ranks could not be reached, rather than that this rank failed."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and _FAILED_COLLECTIVE.search(str(error)) is not None
    )


@contextlib.contextmanager
def name_missing_ranks(activity: str | Callable[[], str] = "training") -> Iterator[None]:
    """Context manager in which a collective that fails or times out raises an error that names the missing ranks.

    The [`FlashCPError`] is the same on all ranks, and gives the host of each missing rank. An exception that ends this
    rank is reported to the other ranks, so that their errors name it. NCCL ends the process instead of raising an
    error; there the missing ranks are logged before.

    `FlashCPTrainer` and the mixin train and evaluate inside this context manager. Put it around a training loop of
    your own, on every rank. If no launcher (torchrun, accelerate) holds the key-value store, the process of rank 0
    does; once that process is gone, the error says so and cannot name other ranks.

    Args:
        activity (`str` or `Callable[[], str]`): what the ranks are doing, for the message, or a function that returns
            it.

    Raises:
        FlashCPError: a collective failed. The backend's error is its cause.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        yield
        return
    watch = watch_liveness()
    activities.append(activity)
    try:
        with naming("a collective"):
            yield
    except FlashCPError as error:
        if not (error.__cause__ is not None and is_failed_collective(error.__cause__)):
            tell_others(error)
        raise
    except (Exception, SystemExit) as error:
        tell_others(error)
        raise
    finally:
        activities.pop()
        watch.run += not activities  # all ranks may continue after a failure, which must not explain the next one


@contextlib.contextmanager
def naming(waited_for: str) -> Iterator[None]:
    """Context manager that turns the failure of a collective into the error that names the missing ranks.

    The message calls what the collective should have brought `waited_for`.
    """
    try:
        yield
    except FlashCPError:
        raise
    except RuntimeError as error:
        if not is_failed_collective(error):
            raise
        place = f" during {activity()}" if activities else ""
        timed_out = re.search("time(d )?out", str(error), re.IGNORECASE)
        how = "timed out waiting for" if timed_out else "lost the connection while waiting for"
        raise FlashCPError(
            f"R{name_of_rank(dist.get_rank())[1:]} {how} {waited_for}{place}. {find_missing_ranks()} "
            f"{_ADVICE} The backend said: {first_line(error)}"
        ) from error
