"""What one exchange brings and the attention that waits for it."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Rectangle(NamedTuple):
    """Queries [q_start, q_stop) against keys [k_start, k_stop), as rows of a query and a key buffer; never empty."""

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int


class Stage(NamedTuple):
    """One uneven all-to-all of KV and the attention that waits for it.

    Attributes:
        send_rows (`torch.Tensor`): (n_sent,) int64 local rows, destination after destination, in document order.
        send_splits (`list[int]`): rows for each rank of the group.
        recv_splits (`list[int]`): rows from each rank of the group.
        local_rows (`torch.Tensor`, *optional*): (n_local,) int64 rows of the rank's own KV that join the received.
        key_order (`torch.Tensor`, *optional*): (n_keys,) int64 into the received rows followed by the local ones, in
            which the rectangles find their keys; a row may be named twice. `None` where they lie right already.
        rectangles (`tuple[Rectangle, ...]`): local rows against rows of the ordered keys. Query ranges are disjoint
            and ascending.
        causal (`bool`): whether the rectangles are causal, aligned bottom-right; without a mask if not.
        rows (`torch.Tensor`, *optional*): (R,) int64 local rows covered by the rectangles; `None` for all of them.
    """

    send_rows: torch.Tensor
    send_splits: list[int]
    recv_splits: list[int]
    local_rows: torch.Tensor | None
    key_order: torch.Tensor | None
    rectangles: tuple[Rectangle, ...]
    causal: bool
    rows: torch.Tensor | None

    def to(self, device: torch.device) -> Stage:
        return Stage(*(x.to(device, non_blocking=True) if isinstance(x, torch.Tensor) else x for x in self))
