"""Ranks agree or say so: values compared through the process group's key-value store before anything depends on them.

A collective whose sizes differ between ranks hangs or corrupts memory, depending on the backend. The store needs no
device, works before and between collectives, and gives every rank every value, so all of them raise the same error.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch.distributed as dist

from ..errors import ConfigurationError, FlashCPError


if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

TIMEOUT = timedelta(minutes=10)  # for a rank that does not come; a disagreement shows as soon as all have
_rounds: WeakKeyDictionary[ProcessGroup, Counter[str]] = WeakKeyDictionary()


def require_agreement(
    what: str,
    values: dict[str, Any],
    group: ProcessGroup,
    *,
    advice: str,
    error: type[FlashCPError] = ConfigurationError,
    timeout: timedelta = TIMEOUT,
) -> None:
    """Returns when all ranks of `group` have called it with equal `values`; costs a write and two reads of the store.

    Args:
        what (`str`): what the values are, for the message and to tell calls apart.
        values (`dict`): JSON-serializable.
        group (`ProcessGroup`): every rank of it calls, in the same order.
        advice (`str`): what to change, the end of the message.
        error: what is raised.

    Raises:
        FlashCPError: on every rank, naming the values that differ and who has which; or, after `timeout`, the ranks
            that did not come.
    """
    store = dist.distributed_c10d._get_default_store()
    ranks, rank = dist.get_process_group_ranks(group), dist.get_rank()
    prefix = f"flashcp/{what}/{group.group_name}"
    rounds = _rounds.setdefault(group, Counter())
    turn = rounds[what]
    rounds[what] += 1
    keys = [f"{prefix}/{turn}/{each}" for each in ranks]
    store.set(f"{prefix}/{turn}/{rank}", json.dumps(values))
    try:
        store.wait(keys, timeout)
    except (dist.DistStoreError, RuntimeError) as reason:
        missing = [each for each, key in zip(ranks, keys) if not store.check([key])]
        raise error(
            f"Waited {timeout} for ranks {missing} to compare {what} (rank {rank} is here). They failed, stalled, or "
            f"have fewer batches: look at their output. {advice}"
        ) from reason
    found = [json.loads(value) for value in store.multi_get(keys)]
    if turn >= 2:  # whoever wrote turn - 1 has read all of turn - 2
        store.delete_key(f"{prefix}/{turn - 2}/{rank}")
    if any(each != found[0] for each in found):
        raise error(f"Ranks disagree on {what}: {_differences(ranks, found)}. {advice}")


def _differences(ranks: list[int], found: list[dict[str, Any]]) -> str:
    """`cp_size is 2 on ranks 0, 1 and 4 on rank 2`, for every key that differs."""
    texts = []
    for key in found[0] | found[-1]:
        holders: dict[str, list[str]] = defaultdict(list)
        for rank, values in zip(ranks, found):
            holders[json.dumps(values.get(key))].append(str(rank))
        if len(holders) > 1:
            sides = (f"{value} on rank{'s' * (len(who) > 1)} {', '.join(who)}" for value, who in holders.items())
            texts.append(f"{key} is " + " and ".join(sides))
    return "; ".join(texts)
