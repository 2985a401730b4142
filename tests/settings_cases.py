import torch
from accelerate import Accelerator

from hf_flashcp import FlashCPPlugin, Topology, attach
from hf_flashcp.errors import ConfigurationError
from tests.accelerate_state import fresh_accelerate
from tests.model_cases import cp_mesh
from tests.models import build_model


def plan_of_a_batch_without_one(lengths):
    FlashCPPlugin(cp_size=4, hardware=None, topology=Topology(2), num_stages=2, max_imbalance=1.2)
    model = build_model("llama")
    handle = attach(model, cp_mesh())
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    ids = torch.arange(sum(lengths))[None] % model.config.vocab_size
    model(input_ids=ids, position_ids=positions, labels=ids.masked_fill(positions == 0, -100))
    return handle.plan.plan


def plugin_and_mesh_or_accelerator():
    fresh_accelerate()
    found = []
    model = build_model("llama")
    for where, plugin in [
        (cp_mesh(), FlashCPPlugin(cp_size=4)),
        (Accelerator(cpu=True, parallelism_config=FlashCPPlugin(cp_size=2)), FlashCPPlugin(cp_size=2)),
    ]:
        try:
            attach(model, where, plugin=plugin)
        except ConfigurationError as error:
            found.append(str(error))
    return [found[0], found[1].split(": ")[1].rstrip(".")]
