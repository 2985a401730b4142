"""Checks of a cluster before a long run.

They cover the versions on every rank, the data that collectives deliver, the speed of the links, and one attention
layer, which is compared with each document run alone.
"""

from __future__ import annotations

import os
import platform
import socket
import time
from collections import defaultdict
from datetime import timedelta
from statistics import median
from typing import TYPE_CHECKING, Any

import accelerate
import torch
import torch.distributed as dist
import transformers

from .. import __version__
from ..attention import Layer, select_kernel
from ..distributed import require_agreement
from ..errors import ConfigurationError
from .layer_errors import LayerCase, layer_errors


if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

CASE = LayerCase()
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5}
"""Largest relative errors (Frobenius norm) of out, dQ, dK and dV, compared with each document run alone.

bf16 is not listed: its limit is twice the error of bf16 on one device.
"""


def check_cluster(
    group: ProcessGroup, device: torch.device, *, megabytes: int = 64, timeout: timedelta = timedelta(seconds=60)
) -> dict[str, Any]:
    """Check the cluster, and return what was measured.

    Every rank of the world must call this function, with its own context-parallel group of at least two ranks.

    Args:
        group: this rank's context-parallel group.
        device: this rank's device.
        megabytes: size in MiB of the transfers that measure the speed of a link.
        timeout: how long to wait for ranks that have not called the function yet.

    Returns a JSON-serializable dict that is the same on every rank. It has the `versions`; the `ranks`; the `links` by
    kind ("node" between ranks on one host, "network" between hosts); and in `layer`, for each dtype, the kernel and
    the largest error of any rank.

    Raises a `ConfigurationError` on every rank if versions differ, if a collective delivered wrong data, or if the
    layer is not exact.
    """
    versions = {
        "python": platform.python_version(),
        **{module.__name__: module.__version__ for module in (torch, transformers, accelerate)},
        "hf_flashcp": __version__,
    }
    require_agreement(
        "versions", versions, dist.group.WORLD, advice="Start every process in the same environment.", timeout=timeout
    )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    ranks = gathered({"host": socket.gethostname(), "device": name, "local_rank": os.environ.get("LOCAL_RANK", "0")})
    _check_collectives(group, device)
    links = _links(group, device, megabytes, [rank["host"] for rank in ranks])
    return {"versions": versions, "ranks": ranks, "links": links, "layer": _layer(group, device)}


def gathered(mine: Any, group: ProcessGroup | None = None) -> list[Any]:
    """Return the objects of all ranks, in the order of the ranks. `group` must contain every rank of the world."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine, group=group)
    return found


def _raise_on_all_ranks(problem: str | None) -> None:
    """Raise an error on all ranks if any rank reports a problem."""
    if problems := [problem for problem in gathered(problem) if problem]:
        raise ConfigurationError(f"The cluster failed a check: {'; '.join(problems)}.")


def _check_collectives(group: ProcessGroup, device: torch.device) -> None:
    """Run an uneven all-to-all with some empty parts, in which every number encodes its sender and receiver."""
    size, rank = group.size(), group.rank()
    splits = [
        (rank + other) % 3 for other in range(size)
    ]  # symmetric: each rank receives from another as much as it sends to it
    sent = torch.cat([torch.full((count,), size * rank + other) for other, count in enumerate(splits)])
    received = torch.empty(sum(splits), dtype=sent.dtype, device=device)
    dist.all_to_all_single(received, sent.to(device), splits, splits, group=group)
    expected = torch.cat([torch.full((count,), size * other + rank) for other, count in enumerate(splits)])
    total = torch.ones(1, device=device)
    dist.all_reduce(total)
    problem = None
    if not torch.equal(received.cpu(), expected):
        problem = f"an all-to-all delivered wrong data to rank {dist.get_rank()} ({socket.gethostname()})"
    elif int(total) != dist.get_world_size():
        problem = f"an all-reduce of ones gave {float(total)} on rank {dist.get_rank()} ({socket.gethostname()})"
    _raise_on_all_ranks(problem and problem + ": check the network and the NCCL version on every host")


def _links(group: ProcessGroup, device: torch.device, megabytes: int, hosts: list[str]) -> dict[str, Any]:
    """Measure bandwidth and latency of the links, by kind.

    For each offset, every rank sends `megabytes` to the rank that many places after it and receives as much from the
    rank that many places before it. All ranks do so at the same time, as in the stages of an attention layer.
    """
    members, rank = dist.get_process_group_ranks(group), group.rank()
    found = []
    for offset in range(1, len(members)):
        to, source = members[(rank + offset) % len(members)], members[(rank - offset) % len(members)]
        latency = _seconds(group, device, offset, 1)
        seconds = _seconds(group, device, offset, megabytes * 2**20)
        found.append({"pair": [dist.get_rank(), to], "from": source, "seconds": seconds, "latency": latency})
    links = defaultdict(list)
    for measured in (measured for rank_found in gathered(found) for measured in rank_found):
        sender, receiver = measured["pair"]
        # A transfer also waits for the data that this rank receives.
        near = hosts[sender] == hosts[receiver] == hosts[measured["from"]]
        links["node" if near else "network"].append(measured)
    summary = {}
    for kind, measured in links.items():
        slowest = max(measured, key=lambda one: one["seconds"])
        summary[kind] = {
            "bytes_per_second": megabytes * 2**20 / median(one["seconds"] for one in measured),
            "slowest_bytes_per_second": megabytes * 2**20 / slowest["seconds"],
            "slowest_pair": slowest["pair"],
            "latency_seconds": median(one["latency"] for one in measured),
        }
    return summary


def _seconds(group: ProcessGroup, device: torch.device, offset: int, num_bytes: int, turns: int = 5) -> float:
    size, rank = group.size(), group.rank()
    sends, receives = [0] * size, [0] * size
    sends[(rank + offset) % size] = receives[(rank - offset) % size] = num_bytes
    buffers = [torch.zeros(num_bytes, dtype=torch.uint8, device=device) for _ in range(2)]
    seconds = []
    for _ in range(turns + 1):
        dist.barrier(group)
        begin = time.perf_counter()
        dist.all_to_all_single(*buffers, receives, sends, group=group)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return median(seconds[1:])


def _layer(group: ProcessGroup, device: torch.device) -> dict[str, Any]:
    """Check the output and gradients of one layer under a plan that splits every document, for each dtype."""
    found = {}
    exact = torch.float64 if device.type == "cpu" else torch.float32
    for dtype in (exact, torch.bfloat16):
        kernel = select_kernel(device, Layer(dtype, CASE.head_dim, CASE.head_dim))
        errors, alone = layer_errors(CASE, group, device, dtype, kernel)
        limit = LIMITS.get(dtype) or 2 * max(alone)
        worst = max(gathered(max(errors)))
        found[str(dtype).removeprefix("torch.")] = {"kernel": kernel.name, "error": worst, "limit": limit}
        problem = None
        if not max(errors) <= limit:
            where = f"rank {dist.get_rank()} ({socket.gethostname()})"
            problem = f"attention in {dtype} with the kernel {kernel.name} is off by {max(errors):.1e} on {where}"
        _raise_on_all_ranks(
            problem and f"{problem}, more than {limit:.1e}: report this with your torch version and GPU model"
        )
    return found
