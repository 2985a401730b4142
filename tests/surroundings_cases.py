import logging
import os
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.data import DataLoader

from hf_flashcp import FlashCPCollator, FlashCPPlugin, attach
from hf_flashcp.errors import ConfigurationError
from hf_flashcp.integrations import surroundings
from tests.model_cases import cp_mesh
from tests.models import build_model


class _Logged(logging.Handler):
    """Collects what `plan_for_surroundings` logs."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append((record.levelname, record.getMessage()))

    def __enter__(self):
        self.level_before = surroundings.logger.level
        surroundings.logger.setLevel(logging.INFO)
        surroundings.logger.addHandler(self)
        return self

    def __exit__(self, *_):
        surroundings.logger.removeHandler(self)
        surroundings.logger.setLevel(self.level_before)


def found_by_attach(devices, local_world_sizes, mesh=None, without=(), settings=None):
    """Attach a model on ranks that have these devices and environments; return what is planned for, and the log.

    `mesh` has the global ranks of the context-parallel groups, and `without` are sizes that the config lacks.
    """
    rank, ranks = dist.get_rank(), torch.tensor(mesh or [list(range(dist.get_world_size()))])
    mesh = DeviceMesh("cpu", ranks, mesh_dim_names=("dp", "cp"))
    plugin, model = FlashCPPlugin(cp_size=ranks.shape[1], **(settings or {})), build_model("llama")
    for name in without:
        object.__setattr__(model.config, name, None)
    environment = mock.patch.dict(os.environ)
    device = mock.patch.object(surroundings, "_device_name", lambda *_: devices[rank])
    with environment, device, _Logged() as logged:
        os.environ.pop("LOCAL_WORLD_SIZE")
        if local_world_sizes[rank] is not None:
            os.environ["LOCAL_WORLD_SIZE"] = local_world_sizes[rank]
        try:
            attach(model, mesh, plugin=plugin)
        except ConfigurationError as error:
            return str(error)
        attach(model, mesh, plugin=plugin)
    return plugin.plan_settings, logged.lines


def plans_of_loader_workers(lengths):
    """Collate a batch before attach, and in workers that start after it."""
    plugin, collator = FlashCPPlugin(cp_size=2), FlashCPCollator()
    documents = [{"input_ids": [1] * length} for length in lengths]
    before = collator(documents)["flashcp_plan"]
    loader = DataLoader(documents, len(documents), collate_fn=collator, num_workers=2)
    model = build_model("llama")
    attach(model, cp_mesh())
    (batch,) = loader
    return before, batch["flashcp_plan"], plugin.plan_settings.timing()
