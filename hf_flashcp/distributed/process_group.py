"""The context-parallel process group of a device mesh, and further groups of the same ranks."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch.distributed as dist

from ..errors import ConfigurationError


if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


def context_parallel_group(mesh: DeviceMesh | None) -> tuple[ProcessGroup | None, int, int]:
    """Return `(group, rank within the group, group size)` of a 1-D mesh, or of the "cp" dimension of a larger mesh.

    Without a mesh this is `(None, 0, 1)`.

    Raises:
        ConfigurationError: the mesh has several dimensions, none of which is named "cp".
    """
    if mesh is None:
        return None, 0, 1
    if mesh.ndim > 1:
        if "cp" not in (mesh.mesh_dim_names or ()):
            raise ConfigurationError(
                f'The device mesh has dimensions {mesh.mesh_dim_names}, none of them "cp". Pass a 1-D mesh of the '
                'context-parallel ranks, or name one dimension "cp" (FlashCPPlugin(cp_size=...) does).'
            )
        mesh = mesh["cp"]
    group = mesh.get_group()
    return group, group.rank(), group.size()


def group_timeout(group: ProcessGroup | None = None) -> timedelta:
    """Return the timeout of a group's collectives; of the group of all ranks (`TrainingArguments.ddp_timeout`) by
    default."""
    group = group or dist.group.WORLD
    options = getattr(group._get_backend(group._device_types[0]), "options", None)
    return getattr(options, "_timeout", None) or dist.distributed_c10d.default_pg_timeout


_mesh_groups: WeakKeyDictionary[ProcessGroup, ReferenceType[ProcessGroup]] = WeakKeyDictionary()


def mesh_group_of(group: ProcessGroup) -> ProcessGroup:
    """Return the group that [`new_group`] was given, or the group itself if it was made by something else."""
    return (_mesh_groups[group]() if group in _mesh_groups else None) or group


def new_group(like: ProcessGroup, name: str, description: str) -> ProcessGroup:
    """Make a group with the ranks, backends and timeout of a mesh's group `like`, all of whose ranks must call this.

    `torch.distributed.new_group` makes every rank of the world take part, or, with `use_local_synchronization`,
    derives the name from the number of groups that a process knows. Ranks may know different numbers, and a group
    would find the addresses of a destroyed group of the same name in the store.

    Args:
        like: group of a mesh.
        name: name in the store, the same on every rank, and never used before.
        description: name in PyTorch's errors and profiles.
    """
    c10d, ranks, timeout = dist.distributed_c10d, dist.get_process_group_ranks(like), group_timeout(like)
    backend, default = c10d.Backend(dist.get_backend(like)), dist.group.WORLD
    # With a bound device, NCCL would split the communicator of all ranks, and wait for all of them.
    device, default.bound_device_id = default.bound_device_id, None
    try:
        group, _ = c10d._new_process_group_helper(
            like.size(),
            like.rank(),
            ranks,
            backend,
            c10d._get_default_store(),
            name,
            backend_options=_backend_options(backend, timeout),
            timeout=timeout,
            group_desc=description,
        )
    finally:
        default.bound_device_id = device
    c10d._world.pg_group_ranks[group] = {rank: place for place, rank in enumerate(ranks)}
    _mesh_groups[group] = ref(like)
    return group


def _backend_options(backend: str, timeout: timedelta) -> Any:
    """Return options with which NCCL's kernels run beside attention kernels that fill the GPU; `None` for gloo."""
    if "nccl" not in dist.distributed_c10d.BackendConfig(backend).get_device_backend_map().values():
        return None
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options._timeout = timeout
    return options
