"""Evaluation with the result of one device: each row of the dataset counts once in the sums of losses and targets."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sized
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from accelerate.utils.operations import recursively_apply

from ...data.boundaries import IGNORE_INDEX
from ...errors import ConfigurationError
from .predictions import Tree, pad_rows, token_shape


if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import Trainer


class EvaluationPass:
    """One pass over an evaluation dataset: sums of losses and targets on this rank, and which rows count.

    accelerate gives every data-parallel group the same number of batches, and fills the last ones with rows from the
    beginning of the dataset. Batch s of group g starts at row (s * groups + g) * rows_per_batch. Rows beyond the end
    of the dataset have been counted before, so their targets are masked. If rows cannot be told apart, for example in
    a dataset without a length, all of them count with cp_size 1, as in transformers, and they are refused above 1.
    """

    def __init__(self, trainer: Trainer, dataset: Any):
        self._accelerator, self._cp_size = trainer.accelerator, trainer.get_cp_size()
        self._batch_size, self._filter_nan = trainer.args.eval_batch_size, trainer.args.logging_nan_inf_filter
        self.preprocess: Callable[[Tree, Tree], Tree] | None = trainer.preprocess_logits_for_metrics
        self._groups = self._accelerator.num_processes // self._cp_size
        self._group = self._accelerator.process_index // self._cp_size
        if self._cp_size > 1:
            require_length(dataset, self._groups)
        self._dataset_rows = len(dataset) if self._groups > 1 and isinstance(dataset, Sized) else None
        self._step = 0
        self._rows_per_batch: int | None = None
        self._sums = torch.zeros(2, dtype=torch.float64)  # loss and targets
        self.rows = self.kept_rows = self.kept_tokens = 0  # of the last batch, in which kept rows come first
        self.losses: torch.Tensor | None = None  # (documents,), losses that the evaluation loop gets for this step
        self.loss_is_a_metric = False  # whether `compute_metrics` returned a "loss", which replaces this one

    def mask_repeated_rows(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return the next full batch without targets in repeated rows. Must be called once per batch."""
        lengths = row_lengths(inputs, self._batch_size)
        self.rows, tokens = token_shape(inputs)
        if self._dataset_rows is not None and lengths is None and self._cp_size > 1:
            refuse_unknown_rows()
        if self._dataset_rows is None or lengths is None:
            self.kept_rows = len(lengths) if lengths else self.rows
            self.kept_tokens = sum(lengths) if lengths else self.rows * tokens
            return inputs
        if self._rows_per_batch is None:
            self._rows_per_batch = len(lengths)
        first = (self._step * self._groups + self._group) * self._rows_per_batch
        self._step += 1
        self.kept_rows = min(max(self._dataset_rows - first, 0), len(lengths))
        self.kept_tokens = sum(lengths[: self.kept_rows])
        if self.kept_rows == len(lengths):
            return inputs
        masked = {
            key: inputs[key].clone(memory_format=torch.contiguous_format)
            for key in ("labels", "shift_labels")
            if inputs.get(key) is not None
        }
        for labels in masked.values():
            labels.view(-1)[self.kept_tokens :] = IGNORE_INDEX
        return {**inputs, **masked}

    def add(self, share: torch.Tensor, targets: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
        """Add a batch, and return its mean loss in fp64, which is the same on all ranks of `group`.

        Args:
            share: this rank's share of the batch's summed loss.
            targets: number of targets of the whole batch. Without targets, the mean loss is 0.
            group: ranks that share the batch, or `None` if there is only one.
        """
        loss_sum = torch.where(targets > 0, share.double(), 0.0)  # a batch of prompts only may give 0 / 0
        if group is not None:
            dist.all_reduce(loss_sum, group=group)
        mean = loss_sum / targets.clamp(min=1)
        added = torch.stack((loss_sum, targets.double()))
        if self._filter_nan:
            added = torch.where(mean.isfinite(), added, 0.0)
        self._sums = self._sums.to(share.device) + added
        return mean

    def recording(self, compute_metrics: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
        """Return `compute_metrics`, wrapped to record whether it returns a loss."""

        @functools.wraps(compute_metrics)
        def recorded(*args: Any, **kwargs: Any) -> dict[str, Any]:
            metrics = compute_metrics(*args, **kwargs)
            self.loss_is_a_metric = "loss" in (metrics or ())
            return metrics

        return recorded

    def mean_loss(self) -> float:
        """Return the mean loss over all targets of the dataset, or NaN without targets. Every rank must call it."""
        loss_sum, targets = self._accelerator.reduce(self._sums.to(self._accelerator.device), "sum").tolist()
        return loss_sum / targets if targets else float("nan")

    def gathered(self, tensors: Tree) -> Tree:
        """Return gathered tensors; the trainer's `gather_function`.

        The evaluation loop asks for losses first. All other tensors are already gathered.
        """
        losses, self.losses = self.losses, None
        return tensors if losses is None else losses

    def gather(self, tree: Tree) -> Tree:
        """Gather the rows of all data-parallel groups, in the order of the dataset.

        The ranks of a group have the same rows, and groups can have different numbers of rows.
        """
        return gather_in_order(self._accelerator, tree, self._cp_size)


def gather_in_order(accelerator: Accelerator, tree: Tree, stride: int) -> Tree:
    """Return the rows of all readers, in the order of the dataset. Readers can have different numbers of rows.

    Args:
        accelerator (`Accelerator`): accelerator of all processes.
        tree: tensors (rows, ...) of this process.
        stride (`int`): how many processes in a row have the same rows.
    """
    if accelerator.num_processes == 1:
        return tree

    def of_tensor(rows: torch.Tensor) -> torch.Tensor:
        shapes = accelerator.gather(torch.tensor([(*rows.shape, 1)[:2]], device=rows.device))
        most, width = shapes.amax(0).tolist()
        if most == 0:
            return rows
        by_rank = accelerator.gather(pad_rows(rows, most, width)).split(most)
        counts = shapes[:, 0].tolist()
        return torch.cat([by_rank[rank][: counts[rank]] for rank in range(0, len(counts), stride)])

    return recursively_apply(of_tensor, tree)


def require_length(dataset: Any, groups: int) -> None:
    """Raise a `ConfigurationError` if several data-parallel groups would share a dataset without a length."""
    if groups > 1 and not isinstance(dataset, Sized):
        raise ConfigurationError(
            f"The evaluation set has no length, and {groups} data-parallel groups share it, so eval_loss would count "
            "the rows that fill the last batches twice. Use a map-style dataset, or evaluate with cp_size equal to "
            "the number of processes."
        )


def require_known_rows(loader: Any, batch_size: int) -> None:
    """Raise a `ConfigurationError` if the batches of a data loader do not show which dataset rows they hold.

    Collates the first batch to find out.
    """
    rows = [loader.dataset[index] for index in range(min(batch_size, len(loader.dataset)))]
    with torch.random.fork_rng(devices=[]):
        batch = loader.collate_fn(rows)
    if row_lengths(batch, batch_size) is None:
        refuse_unknown_rows()


def refuse_unknown_rows() -> None:
    """Raise a `ConfigurationError` for a packed batch that does not show its dataset rows."""
    raise ConfigurationError(
        "Evaluation with several data-parallel groups cannot tell the dataset's rows apart in this packed batch, so "
        "it would count the rows that fill the last batches twice. Collate with FlashCPCollator, set "
        "per_device_eval_batch_size to 1, or evaluate with cp_size equal to the number of processes."
    )


def row_lengths(inputs: Mapping[str, Any], batch_size: int) -> tuple[int, ...] | None:
    """Return the number of tokens of each dataset row in a full batch, or `None` if a packed row hides them."""
    plan = inputs.get("flashcp_plan")
    if getattr(plan, "row_lengths", None) is not None:
        return plan.row_lengths
    rows, tokens = token_shape(inputs)
    if rows > 1 or batch_size == 1:
        return (tokens,) * rows
    return None


def target_labels(inputs: Mapping[str, Any]) -> torch.Tensor:
    """Return the targets of a full batch: shifted labels, which are IGNORE_INDEX where there is no target."""
    return inputs["shift_labels"] if inputs.get("shift_labels") is not None else inputs["labels"][..., 1:]


class DocumentLosses(NamedTuple):
    """The losses of documents.

    Attributes:
        loss_sum (`np.ndarray`): (documents,), float64; negative log-likelihood in nats, summed over each document's
            targets.
        targets (`np.ndarray`): (documents,), int64; number of targets of each document.
    """

    loss_sum: np.ndarray
    targets: np.ndarray

    @property
    def perplexity(self) -> np.ndarray:
        """Perplexity (documents,): exp of the mean loss over a document's targets, or NaN without targets."""
        with np.errstate(invalid="ignore"):
            return np.exp(self.loss_sum / self.targets)
