"""The context-parallel process group of a device mesh."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import ConfigurationError


if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


def context_parallel_group(mesh: DeviceMesh | None) -> tuple[ProcessGroup | None, int, int]:
    """`(group, rank in it, size)` of a 1-D mesh or a mesh's "cp" dimension; `(None, 0, 1)` without a mesh."""
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
