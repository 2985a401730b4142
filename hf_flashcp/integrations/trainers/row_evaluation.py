"""`RowEvaluation`: one pass over an evaluation dataset whose batches are whole rows, with a single process's results.

accelerate gives the batches of the dataset to the readers (data-parallel groups, or processes) in turn, and fills the
last ones with rows from the beginning. A single process would see the same batches, but the last one without these
rows. So every reader cuts repeated rows off, and computes the metrics of its batches alone; at the end, the readers'
metrics are put together in the order of batches.
"""

from __future__ import annotations

import math
from collections.abc import Sized
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate.utils import find_batch_size, gather_object

from .evaluation import require_length
from .predictions import Tree, first_rows


if TYPE_CHECKING:
    from transformers import Trainer


class _Batch(NamedTuple):
    index: int  # in the order of a single process
    loss: float | None
    weight: int
    metrics: dict[str, list]


class RowEvaluation:
    """A pass over an evaluation dataset.

    Args:
        trainer (`Trainer`): the trainer that evaluates.
        dataset: the dataset. Several readers need its length.
        readers (`int`): how many different batches are read at a time.
        rows_per_example (`int`): rows of a batch per example of the dataset.

    Raises:
        ConfigurationError: several readers share a dataset without a length.
    """

    def __init__(self, trainer: Trainer, dataset: Any, readers: int, rows_per_example: int):
        require_length(dataset, readers)
        self._trainer, self._readers, self._rows_per_example = trainer, readers, rows_per_example
        self._processes_per_reader = trainer.accelerator.num_processes // readers
        self._reader = trainer.accelerator.process_index // self._processes_per_reader
        self._examples = len(dataset) if readers > 1 and isinstance(dataset, Sized) else None
        self._weighs_examples = isinstance(dataset, Sized)  # Trainer counts batches alike if it does not know
        self._batch_size: int | None = None  # examples of a reader's first batch, which is full
        self._step = 0
        self._rows = self.kept = 0  # of the latest batch: rows, and examples that count
        self.losses: torch.Tensor | None = None  # of all readers' examples, which the evaluation loop gets next
        self._results: list[_Batch] = []

    def begin(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return the next batch without repeated rows. A batch of nothing else stays whole, and is not counted."""
        self._rows = find_batch_size(inputs)
        self.kept = examples = self._rows // self._rows_per_example
        if self._batch_size is None:
            self._batch_size = examples
        if self._examples is not None:
            first = self._index * self._batch_size
            self.kept = min(max(self._examples - first, 0), examples)
        if not 0 < self.kept < examples:
            return inputs
        self._rows = self.kept * self._rows_per_example
        return {name: self._cut(value, examples) for name, value in inputs.items()}

    def end(self, loss: torch.Tensor | None) -> None:
        """Keep the loss and the metrics of the batch, if it counts."""
        metrics = self._take_metrics()
        if self.kept:
            weight = self.kept if self._weighs_examples else 1
            self._results.append(_Batch(self._index, None if loss is None else float(loss), weight, metrics))
        self._step += 1

    def counted(self, tree: Tree) -> Tree:
        """Return tensors of the latest batch without rows, if it does not count."""
        return tree if self.kept else first_rows(tree, 0, self._rows)

    def gathered(self, tree: Tree) -> Tree:
        """Return gathered tensors; the trainer's `gather_function`.

        The evaluation loop asks for losses first. All other tensors are already gathered.
        """
        losses, self.losses = self.losses, None
        return tree if losses is None else losses

    def finish(self) -> float:
        """Give the trainer the metrics of all batches, and return the mean loss. Every process must call it."""
        batches = [_Batch(*batch) for batch in gather_object(self._results if self._leads else [])]
        kept = getattr(self._trainer, "_metrics", None)
        for batch in sorted(batches) if kept is not None else ():
            for name, values in batch.metrics.items():
                kept["eval"][name].extend(values)
        losses = [(batch.loss, batch.weight) for batch in batches if batch.loss is not None]
        finite = [each for each in losses if math.isfinite(each[0])]
        if finite and self._trainer.args.logging_nan_inf_filter:
            losses = finite
        total = sum(weight for _, weight in losses)
        return sum(loss * weight for loss, weight in losses) / total if total else float("nan")

    @property
    def _leads(self) -> bool:
        """Whether this process is the first of those that read the same batches."""
        return self._trainer.accelerator.process_index % self._processes_per_reader == 0

    @property
    def _index(self) -> int:
        return self._step * self._readers + self._reader

    def _take_metrics(self) -> dict[str, list]:
        kept = getattr(self._trainer, "_metrics", None)
        if kept is None:
            return {}
        taken = {name: list(values) for name, values in kept["eval"].items()}
        kept["eval"].clear()
        return taken

    def _cut(self, value: Any, examples: int) -> Any:
        """Return the values of the kept examples. Rows of the same kind follow each other: [chosen, rejected]."""
        if not isinstance(value, torch.Tensor) or not value.dim():
            return value
        if len(value) == examples * self._rows_per_example:
            return torch.cat([part[: self.kept] for part in value.split(examples)])
        return value[: self.kept] if len(value) == examples else value
