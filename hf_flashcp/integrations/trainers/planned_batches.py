"""Plans the batches of a data loader where it collates them, before they move to the device.

Document boundaries, masks and labels are read on the host, in loader workers if there are any. A sharded forward then
needs no values from the device, for which it would have to wait.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

from accelerate.data_loader import DataLoaderDispatcher
from torch.utils.data import DataLoader

from ...data.batch import plan_batch
from ...errors import FlashCPError
from ...planning import PlanSettings
from ..models.forward_arguments import can_shard


class PlannedBatches:
    """A collate function that adds a plan to the batches of another collate function.

    Batches without labels get no plan, because a forward in evaluation mode does not shard them. Nor do batches that
    cannot be sharded: their forward raises the error, at the same step on every rank.

    Args:
        collate (`Callable`): the other collate function.
        settings (`PlanSettings`): settings of the attached model.
    """

    def __init__(self, collate: Callable[[Any], Any], settings: PlanSettings):
        self._collate, self._settings = collate, settings

    def __call__(self, features: Any) -> Any:
        batch = self._collate(features)
        if isinstance(batch, MutableMapping) and self._needs_plan(batch):
            try:
                batch["flashcp_plan"] = plan_batch(batch, self._settings)
            except FlashCPError:
                pass
        return batch

    def _needs_plan(self, batch: MutableMapping[str, Any]) -> bool:
        has_labels = any(batch.get(key) is not None for key in ("labels", "shift_labels"))
        on_one_rank = self._settings.cp_size == 1
        return has_labels and batch.get("flashcp_plan") is None and can_shard(batch, on_one_rank)


def plan_where_collated(loader: DataLoader, settings: PlanSettings) -> None:
    """Make a data loader plan its batches, unless it cuts batches of one process into those of others."""
    if not isinstance(loader, DataLoaderDispatcher):
        inner = getattr(loader, "base_dataloader", loader)
        inner.collate_fn = PlannedBatches(inner.collate_fn, settings)
