"""The process groups in which attached models exchange KV.

A mesh that covers all ranks returns the default group, in which DDP reduces gradients: exchanges would queue behind
them. So the attached models of a mesh share one further group. Its first user makes it, and its last user destroys it.
The second steps of hierarchical exchanges have another group, because one group runs its collectives in order: the
first step of a stage would wait for the second step of the stage before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from .agreement import require_agreement
from .failures import naming
from .process_group import mesh_group_of, new_group


if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class _Exchange:
    """The groups in which the ranks of one mesh exchange KV, and how many attached models use them."""

    def __init__(self, mesh_group: ProcessGroup):
        self._name = mesh_group.group_name
        self.users = self.number = 0
        self.groups: list[ProcessGroup] = []  # of the first step, and of the second if there has been one

    @property
    def name(self) -> str:
        return f"{self._name}/flashcp/{self.number}"

    def add_group(self, mesh_group: ProcessGroup, description: str) -> None:
        with naming(f'the process group "{description}"'):
            self.groups.append(new_group(mesh_group, f"{self.name}/{len(self.groups)}", description))


_exchanges: WeakKeyDictionary[ProcessGroup, _Exchange] = WeakKeyDictionary()  # by the mesh's group


def exchange_number(mesh_group: ProcessGroup) -> int:
    """Return how many groups [`acquire_exchange_group`] will have made once it returns, the same on every rank."""
    exchange = _exchanges.get(mesh_group)
    return 1 if exchange is None else exchange.number + (not exchange.groups)


def acquire_exchange_group(mesh_group: ProcessGroup) -> ProcessGroup:
    """Return the group in which the ranks of a mesh's group exchange KV, made if it has no user yet.

    All ranks of the mesh's group have to call this function, after they have agreed on the [`exchange_number`]. Other
    ranks do not take part. Under NCCL the group has streams of high priority, and its communicator allocates buffers
    on the GPU when it is first used.
    """
    exchange = _exchanges.setdefault(mesh_group, _Exchange(mesh_group))
    if not exchange.groups:
        _delete_keys(exchange, mesh_group)
        exchange.number += 1
        exchange.add_group(mesh_group, "flashcp exchange")
        # A rank that released the group at once would cut off others while they still connect.
        require_agreement("the process group of the exchange", {"number": exchange.number}, mesh_group, advice="")
    exchange.users += 1
    return exchange.groups[0]


def release_exchange_group(mesh_group: ProcessGroup) -> None:
    """End one use of [`acquire_exchange_group`]; the last one destroys the group, unless PyTorch already has."""
    exchange = _exchanges[mesh_group]
    exchange.users -= 1
    if exchange.users == 0:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # a group must not be destroyed while its collectives run
        for group in exchange.groups:
            if group in dist.distributed_c10d._world.pg_map:
                dist.destroy_process_group(group)
        exchange.groups.clear()


def second_step_group(group: ProcessGroup) -> ProcessGroup:
    """Return the group for the second step of hierarchical exchanges whose first step runs in `group`.

    It is made by the first call, on all ranks of the group. Only groups of [`acquire_exchange_group`] have one; other
    groups run both steps.
    """
    mesh_group = mesh_group_of(group)
    exchange = _exchanges.get(mesh_group)
    if exchange is None or group not in exchange.groups:
        return group
    if len(exchange.groups) == 1:
        exchange.add_group(mesh_group, "flashcp exchange inside nodes")
    return exchange.groups[1]


def _delete_keys(exchange: _Exchange, mesh_group: ProcessGroup) -> None:
    """Delete what the previous groups left in the store. No rank reads it, because all ranks want a new group."""
    if exchange.number and mesh_group.rank() == 0:
        left = dist.PrefixStore(exchange.name, dist.distributed_c10d._get_default_store())
        for key in left.list_keys():
            left.delete_key(key)
