"""Steps that need several GPUs, and run on all ranks of a launch together.

Every rank of the process group calls every step, which returns the same on each of them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from ...attention import Layer, document_attention, select_kernel
from ...doctor.cluster import check_cluster, gathered
from ...exchange import return_grads, send_kv
from ...exchange.kv_exchange import kv_width
from ...integrations.attach import attach
from ...layout import RankPlan
from ...planning import plan_documents
from ..kernels import RankWork
from ..turns import median_seconds
from .settings import Found, Settings
from .small_models import packed_batch, small_llama


ROUNDS = 5


class Ranks(NamedTuple):
    """Process groups and device of a rank.

    Both groups contain all ranks: `group` runs the measured collectives, and `control` exchanges results over gloo.
    """

    group: dist.ProcessGroup
    control: dist.ProcessGroup
    device: torch.device


def slowest(ranks: Ranks, seconds: dict[str, float]) -> dict[str, float]:
    """Return the largest value over all ranks for each entry."""
    found = gathered(seconds, ranks.control)
    return {name: max(rank[name] for rank in found) for name in seconds}


def links(ranks: Ranks, settings: Settings) -> Found:
    """Check collectives, measure links within and between nodes, and check one attention layer."""
    found = Found()
    checked = check_cluster(ranks.group, ranks.device, megabytes=settings.sized(64, 1))
    found.more["ranks"] = checked["ranks"]
    for kind, link in checked["links"].items():
        record = {
            "between ranks of": "one node" if kind == "node" else "several nodes",
            "GB/s": link["bytes_per_second"] / 1e9,
            "slowest GB/s": link["slowest_bytes_per_second"] / 1e9,
            "slowest pair": " -> ".join(map(str, link["slowest_pair"])),
            "latency us": 1e6 * link["latency_seconds"],
        }
        found.add("Links, all ranks sending and receiving at once", record)
    for dtype, layer in checked["layer"].items():
        found.add("One layer over all ranks, compared with each document alone", {"dtype": dtype, **layer})
    return found


def exchange(ranks: Ranks, settings: Settings) -> Found:
    """Time the layer, the layer without exchange and the exchange alone, and report how much the kernels hide."""
    found, size = Found(), dist.get_world_size()
    shape = settings.sized((32, 8, 128), (4, 2, 16))
    for tokens in settings.sized((4096, 16384), (64,)):
        for stages in dict.fromkeys((1, size - 1)):
            plan = plan_documents([size * tokens], size, strategy="per_doc", num_stages=stages)
            bound = RankPlan(plan, ranks.group.rank(), ranks.group)
            kernel = select_kernel(ranks.device, Layer(torch.bfloat16, shape[2], shape[2]))
            work = RankWork(plan, bound.rank, kernel, shape, torch.bfloat16, ranks.device)
            leaves = [tensor.detach().requires_grad_() for tensor in (work.query, work.key, work.value)]

            def layer(leaves=leaves, bound=bound, kernel=kernel, work=work) -> None:
                out = document_attention(*leaves, bound, kernel=kernel)
                torch.autograd.grad(out, leaves, work.grad_out)

            def exchange_alone(work=work, bound=bound) -> None:
                _transfers_alone(work, bound)

            seconds = slowest(
                ranks,
                median_seconds(ROUNDS, ranks.device, layer=layer, without=work.engine, exchange_alone=exchange_alone),
            )
            exposed = max(seconds["layer"] - seconds["without"], 0.0)
            record = {
                "tokens per rank": tokens,
                "stages": stages,
                "layer ms": 1000 * seconds["layer"],
                "without exchange ms": 1000 * seconds["without"],
                "exchange alone ms": 1000 * seconds["exchange_alone"],
                "hidden": max(0.0, 1 - exposed / seconds["exchange_alone"]) if seconds["exchange_alone"] else 1.0,
            }
            found.add("One document over all ranks, forward and backward, slowest rank", record)
    return found


def _transfers_alone(work: RankWork, bound: RankPlan) -> None:
    transfers = send_kv(work.key, work.value, work.layout, bound.group)
    received = [transfer.wait() for transfer in transfers]
    width = kv_width(work.key, work.value)
    returned = work.key.new_empty(work.layout.send_rows(work.key.device).count, width)
    back = [
        return_grads(keys[: stage.received].contiguous(), returned[stage.sent], stage, bound.group)
        for keys, stage in zip(received, work.stages)
    ]
    for transfer in back:
        transfer.wait()


def groups(ranks: Ranks, settings: Settings) -> Found:
    """Time a training step whose exchange shares DDP's process group, and one whose exchange has its own group."""
    found, size = Found(), dist.get_world_size()
    shared = dist.new_group(list(range(size)), backend=settings.sized("nccl", "gloo"))
    for what, exchange in (("shared with DDP", shared), ("its own", None)):
        step, model = _model_step(exchange, shared, ranks.device, settings)
        seconds = slowest(ranks, median_seconds(ROUNDS, ranks.device, step=step))["step"]
        norm = float(torch.stack([p.grad.float().norm() for p in model.parameters()]).norm())
        found.add("A training step", {"the exchange's group": what, "ms": 1000 * seconds, "gradient norm": norm})
    first, second = (record["gradient norm"] for record in found.tables["A training step"])
    found.require(abs(first / second - 1) < 1e-3, f"gradient norms differ: {first} and {second}")
    return found


def _model_step(
    exchange: dist.ProcessGroup | None, shared: dist.ProcessGroup, device: torch.device, settings: Settings
):
    """Return a training step and its model; the model exchanges KV in the group `exchange`, if one is given."""
    size = dist.get_world_size()
    model = small_llama(settings.sized(2048, 128), settings.sized(8, 2)).to(device, torch.bfloat16)
    wrapped = DistributedDataParallel(model, process_group=shared)
    handle = attach(
        wrapped, DeviceMesh.from_group(shared, device.type, mesh=list(range(size)), mesh_dim_names=("cp",))
    )
    handle.group = exchange or handle.group
    tokens = settings.sized(8192, 64) * size
    batch = packed_batch((3 * tokens // 4, tokens // 4), device, size)

    def step() -> None:
        wrapped.zero_grad()
        wrapped(**batch).loss.backward()

    return step, model
