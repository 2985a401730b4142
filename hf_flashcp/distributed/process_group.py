"""Finds the context-parallel process group in a device mesh."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
