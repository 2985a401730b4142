"""Compares values between ranks through the process group's key-value store, before anything depends on them.

A collective whose sizes differ between ranks hangs or corrupts memory, depending on the backend. The store needs no
device and works before and between collectives. Every rank reads the values of all ranks, so all of them raise the
same error.
"""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch.distributed as dist

from ..errors import ConfigurationError, FlashCPError
from .helper_thread import within
from .liveness import find_missing_ranks, result_of_others, watch_liveness
from .process_group import group_timeout, mesh_group_of


if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_CHECK_EVERY = timedelta(seconds=1)
_rounds: WeakKeyDictionary[ProcessGroup, Counter[str]] = WeakKeyDictionary()


def require_agreement(
    what: str,
    values: dict[str, Any],
    group: ProcessGroup,
    *,
    advice: str,
    error: type[FlashCPError] = ConfigurationError,
    meanwhile: Callable[[], None] | None = None,
    timeout: timedelta | None = None,
) -> None:
    """Return once all ranks of a group have called this function with equal values; raise an error if they differ.

    All ranks have to make these calls in the same order. A call costs one write and two reads of the store.

    Args:
        what (`str`): what the values describe, for the message. Ranks count their calls separately for each `what`.
        values (`dict[str, Any]`): JSON-serializable values.
        group (`ProcessGroup`): the ranks that compare their values.
        advice (`str`): what the user should do, with which the message ends.
        error (`type[FlashCPError]`, *optional*, defaults to `ConfigurationError`): class of the error.
        meanwhile (`Callable`, *optional*): work to do after the values are written, while other ranks write theirs.
        timeout (`timedelta`, *optional*): how long to wait for the other ranks, by default as long as the group's
            collectives do. The wait ends early if another rank reports a failure.

    Raises:
        FlashCPError: an `error`, raised on every rank. It names the values that differ and the ranks that have each of
            them, or the ranks that did not make the call.
    """
    found = gather_values(what, values, group, advice=advice, error=error, meanwhile=meanwhile, timeout=timeout)
    if any(each != found[0] for each in found):
        ranks = dist.get_process_group_ranks(mesh_group_of(group))
        raise error(f"Ranks disagree on {what}: {differences(ranks, found)}. {advice}")


def gather_values(
    what: str,
    values: dict[str, Any],
    group: ProcessGroup,
    *,
    advice: str,
    error: type[FlashCPError] = ConfigurationError,
    meanwhile: Callable[[], None] | None = None,
    timeout: timedelta | None = None,
) -> list[dict[str, Any]]:
    """Return the values of all ranks of a group, which may differ. Arguments and errors as in [`require_agreement`].

    All ranks have to make these calls in the same order.
    """
    watch_liveness()
    group = mesh_group_of(group)  # which outlives the groups of exchanges, so that rounds never use the same keys
    store = dist.distributed_c10d._get_default_store()
    ranks, rank = dist.get_process_group_ranks(group), dist.get_rank()
    prefix = f"flashcp/{what}/{group.group_name}"
    rounds = _rounds.setdefault(group, Counter())
    turn = rounds[what]
    rounds[what] += 1
    keys = [f"{prefix}/{turn}/{each}" for each in ranks]
    store.set(f"{prefix}/{turn}/{rank}", json.dumps(values))
    if meanwhile is not None:
        meanwhile()
    timeout, begin = timeout or group_timeout(group), time.monotonic()
    found = within(timeout.total_seconds() + 5, lambda: _values(store, keys, timeout))
    if found is None:
        check = within(5, lambda: [each for each, key in zip(ranks, keys) if not store.check([key])])
        missing = "other ranks" if check is None else f"ranks {check}"
        raise error(
            f"Waited {time.monotonic() - begin:.0f} seconds for {missing} to compare {what} (rank {rank} is here). "
            f"{find_missing_ranks()} They failed, stalled, or have fewer batches: look at their output first. {advice}"
        )
    if turn >= 2:  # every rank has written turn - 1, and so has read all values of turn - 2
        store.delete_key(f"{prefix}/{turn - 2}/{rank}")
    return found


def _values(store: dist.Store, keys: list[str], timeout: timedelta) -> list[dict[str, Any]] | None:
    """Return the values of all keys, or `None` if one is not written in time or another rank reports a failure."""
    deadline = time.monotonic() + timeout.total_seconds()
    while True:
        left = timedelta(seconds=max(deadline - time.monotonic(), 0.001))
        try:
            store.wait(keys, min(left, _CHECK_EVERY))
            return [json.loads(value) for value in store.multi_get(keys)]
        except dist.DistStoreError:
            if left < _CHECK_EVERY or result_of_others() is not None:
                return None


def differences(ranks: list[int], found: list[dict[str, Any]]) -> str:
    """Return a sentence such as `cp_size is 2 on ranks 0, 1 and 4 on rank 2` for every key that differs."""
    texts = []
    for key in found[0] | found[-1]:
        holders: dict[str, list[str]] = defaultdict(list)
        for rank, values in zip(ranks, found):
            holders[json.dumps(values.get(key))].append(str(rank))
        if len(holders) > 1:
            sides = (f"{value} on rank{'s' * (len(same) > 1)} {', '.join(same)}" for value, same in holders.items())
            texts.append(f"{key} is " + " and ".join(sides))
    return "; ".join(texts)
