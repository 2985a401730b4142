"""`EvaluationSums`: the loss of an evaluation set, each of its rows counted once whatever the batches."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

import torch

from ..errors import ConfigurationError
from ..layout.batch import IGNORE_INDEX


class EvaluationSums:
    """Sums of losses and targets on this rank.

    accelerate gives every data-parallel group as many batches, and fills the last ones up with rows from the
    beginning. Batch s of group g holds the rows from (s * groups + g) * rows a batch on: those beyond the dataset's
    end have been counted before, so their targets are masked.

    Args:
        dataset: of the evaluation; without a length no row can be told from a repeated one.
        groups (`int`): data-parallel groups.
        group (`int`): this rank's.
    """

    def __init__(self, dataset: Any, groups: int, group: int):
        if groups > 1 and not isinstance(dataset, Sized):
            raise ConfigurationError(
                f"The evaluation set has no length, and {groups} data-parallel groups share it: rows that fill up the "
                "last batches could not be told from new ones, and eval_loss would count them twice. Give it a length "
                "(a map-style dataset), or evaluate with cp_size equal to the number of processes."
            )
        self._num_rows = len(dataset) if groups > 1 else None
        self._groups, self._group = groups, group
        self._step = 0
        self._rows_a_batch: int | None = None
        self.sums = torch.zeros(2, dtype=torch.float64)

    def mask_repeated_rows(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The next full batch, without targets in rows that stand in for others. To be called once a batch."""
        if self._num_rows is None:
            return inputs
        lengths = _row_lengths(inputs)
        if self._rows_a_batch is None:
            self._rows_a_batch = len(lengths)
        first = (self._step * self._groups + self._group) * self._rows_a_batch
        self._step += 1
        new_rows = max(self._num_rows - first, 0)
        if new_rows >= len(lengths):
            return inputs
        repeated_from = sum(lengths[:new_rows])
        masked = {
            key: inputs[key].clone(memory_format=torch.contiguous_format)
            for key in ("labels", "shift_labels")
            if inputs.get(key) is not None
        }
        for labels in masked.values():
            labels.view(-1)[repeated_from:] = IGNORE_INDEX
        return {**inputs, **masked}

    def add(self, loss: torch.Tensor, targets: torch.Tensor) -> None:
        """A batch's mean loss and its number of targets, both of the whole batch."""
        loss_sum = torch.where(targets > 0, loss.double() * targets, 0.0)  # nothing but prompts: 0 / 0
        self.sums = self.sums.to(loss.device) + torch.stack((loss_sum, targets.double()))


def _row_lengths(inputs: dict[str, Any]) -> tuple[int, ...]:
    """Tokens of each dataset row of a batch."""
    plan, (rows, tokens) = inputs.get("flashcp_plan"), inputs["labels"].shape
    if plan is not None and plan.row_lengths is not None:
        return plan.row_lengths
    if rows > 1:
        return (tokens,) * rows
    raise ConfigurationError(
        "Evaluation with several data-parallel groups cannot tell the dataset's rows apart in this packed batch, and "
        "would count those twice that fill up the last ones. Collate with FlashCPCollator, or evaluate with cp_size "
        "equal to the number of processes."
    )
