"""Finds the hardware and the nodes of a context-parallel group, for plans whose settings are "auto"."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from ..distributed import gather_values
from ..distributed.agreement import differences
from ..planning import PlanSettings
from ..planning.devices import UNKNOWN_GPU, Surroundings, ranks_per_node
from ..tables import counted


if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

logger = logging.getLogger(__name__)

_VARIABLE = "LOCAL_WORLD_SIZE"


def plan_for_surroundings(
    settings: PlanSettings, model: PreTrainedModel, mesh: DeviceMesh, group: ProcessGroup, itemsize: int
) -> None:
    """Make settings plan for a model and, where they are "auto", for the hardware and the nodes of its group.

    Every rank of the group takes part, whatever its settings are, and plans for what the first rank found. That rank
    warns if ranks found different things, or something that plans cannot take into account.

    Raises:
        ConfigurationError: a rank of the group does not attach a model, or the model lacks sizes that explicit
            hardware needs.
    """
    mine = {"device": _device_name(model, mesh), _VARIABLE: _local_world_size()}
    advice = "All ranks of a context-parallel group have to attach the same models in the same order."
    everywhere = gather_values("the hardware", mine, group, advice=advice)
    ranks = dist.get_process_group_ranks(group)
    device, local_world_size = everywhere[0].values()
    found, before = Surroundings(device, ranks_per_node(ranks, local_world_size)), settings.surroundings
    settings.adopt(found)
    problem = settings.for_model(model.config, itemsize)
    if group.rank() != 0 or not settings.automatic:
        return
    if found != before:
        for warning in _warnings(settings, ranks, everywhere):
            logger.warning(warning)
    if problem is not None:
        logger.warning(
            f"Step times of {type(model).__name__} cannot be predicted, so plans are made for little KV traffic: "
            f"{problem} FlashCPPlugin(hardware=None) plans so without this warning."
        )
    if ranks[0] == 0:
        logger.info(_description(settings))


def _device_name(model: PreTrainedModel, mesh: DeviceMesh) -> str:
    if mesh.device_type != "cuda":
        return mesh.device_type
    return torch.cuda.get_device_name(model.device if model.device.type == "cuda" else None)


def _local_world_size() -> int | None:
    """Return the number of processes on this node according to the launcher, or `None` if that is unknown."""
    value = os.environ.get(_VARIABLE, "")
    return int(value) if value.isdecimal() and int(value) > 0 else None


def _warnings(settings: PlanSettings, ranks: list[int], everywhere: list[dict[str, Any]]) -> list[str]:
    """Return warnings about what the ranks of a group found."""
    texts, found, automatic = [], settings.surroundings, settings.automatic
    names = [name for name, needed_by in (("device", "hardware"), (_VARIABLE, "topology")) if needed_by in automatic]
    if differing := differences(ranks, [{name: each[name] for name in names} for each in everywhere]):
        texts.append(
            f"The ranks of a context-parallel group differ: {differing}. All of them plan for what rank {ranks[0]} "
            "has. Start them on equal nodes, or give FlashCPPlugin the hardware and topology to plan for."
        )
    if "hardware" in automatic and found.profile == UNKNOWN_GPU:
        texts.append(
            f"There is no hardware profile for {found.device}, so plans are made for an assumed GPU on PCIe. Name the "
            'profile of a similar GPU, as in FlashCPPlugin(hardware="h100"), or the JSON file that `python -m '
            "hf_flashcp bench gpu` measures."
        )
    if "topology" in automatic and found.ranks_per_node is None:
        size, named = everywhere[0][_VARIABLE], ", ".join(map(str, ranks))
        texts.append(
            f"{_VARIABLE} {size} does not divide cp_size {len(ranks)}, so the context-parallel group of ranks {named} "
            "does not fill its nodes. KV is sent directly between ranks. Choose a cp_size that fills nodes or fits "
            "into one."
            if len(ranks) % size
            else f"The context-parallel group of ranks {named} does not fill nodes one after another, as there are "
            f'{size} ranks on each ({_VARIABLE}). KV is sent directly between ranks. Make "cp" the innermost '
            "dimension of the mesh."
        )
    return texts


def _description(settings: PlanSettings) -> str:
    found, topology = settings.surroundings, settings.topology
    goal = "the least KV traffic" if settings.strategy == "search" else f'the strategy "{settings.strategy}"'
    if settings.hardware is not None:
        goal = "the least predicted step time"
        if "hardware" in settings.automatic:
            goal += f' with the hardware profile "{found.profile}"'
    nodes = "one node" if found.ranks_per_node == settings.cp_size else "ranks without nodes"
    if topology is not None:
        nodes = f"{counted(settings.cp_size // topology.ranks_per_node, 'node')} of {topology.ranks_per_node} ranks"
    return f"Plans are made for {goal}. The device is {found.device}, the group is {nodes}."
