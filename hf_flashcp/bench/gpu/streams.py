"""Step "streams": checks transfers over NCCL, from one rank to itself, and runs `check_cluster` on the device."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from ...doctor.cluster import check_cluster
from ...exchange import AllToAll, Transfer
from ...exchange.hierarchical import HierarchicalTransfer
from .settings import Found, Record, Run, Settings


TURNS = 20


def streams(run: Run, settings: Settings) -> Found:
    """Check transfers of one rank to itself, and run `check_cluster` on two processes."""
    found = Found()
    (transfers,) = run(1, _transfers)
    for record in transfers:
        found.add("Transfers of one rank to itself", record)
        found.require(
            record["wrong turns"] == 0, f"{record['wrong turns']} of {record['turns']} {record['what']} were wrong"
        )
    checked = run(2, _check_cluster)[0]
    for dtype, layer in checked["layer"].items():
        found.add("check_cluster on two processes", {"dtype": dtype, **layer})
    return found


def _transfers(settings: Settings) -> list[Record]:
    device = settings.prepare()
    backend = settings.sized("nccl", "gloo")
    group = dist.new_group([0], backend=backend)
    rows = settings.sized(4096, 64)
    found = []
    for what, transfer in (("transfers", _transfer), ("two-step transfers", _hierarchical)):
        wrong = 0
        for turn in range(TURNS):
            # Work on the main stream surrounds the transfer: the send must wait for it, and the result is used there.
            sent = torch.randn(rows, 64, device=device)
            sent = sent @ torch.eye(64, device=device) + turn
            posted = transfer(sent, group)
            torch.randn(rows, 256, device=device) @ torch.randn(256, 256, device=device)
            wrong += not torch.equal(posted.wait(), sent)
        found.append({"what": what, "backend": backend, "rows": rows, "turns": TURNS, "wrong turns": wrong})
    dist.destroy_process_group(group)
    return found


def _transfer(sent: torch.Tensor, group: dist.ProcessGroup) -> Transfer:
    return Transfer(_to_itself(sent, group))


def _to_itself(rows: torch.Tensor, group: dist.ProcessGroup) -> AllToAll:
    return AllToAll(rows, torch.empty_like(rows), [len(rows)], [len(rows)], group)


def _hierarchical(sent: torch.Tensor, group: dist.ProcessGroup) -> HierarchicalTransfer:
    first = Transfer(_to_itself(sent, group))
    return HierarchicalTransfer(first, lambda arrived: _to_itself(arrived, group), lambda _, again: again, (sent,))


def _check_cluster(settings: Settings) -> dict[str, Any]:
    return check_cluster(dist.group.WORLD, settings.prepare(), megabytes=settings.sized(8, 1))
