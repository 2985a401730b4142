"""Evaluation as on one device: each row of the set counts once in the sums of losses and targets."""

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
from .predictions import Tree, filled_up, token_shape


if TYPE_CHECKING:
    from transformers import Trainer


class EvaluationPass:
    """One pass over an evaluation set: sums of losses and targets on this rank, and which rows count.

    accelerate gives every data-parallel group as many batches, and fills the last ones up with rows from the
    beginning. Batch s of group g holds the rows from (s * groups + g) * rows per batch on: those beyond the dataset's
    end have been counted before, so their targets are masked. With cp_size 1, rows that cannot be told apart, such as
    those of a dataset without a length, all count, as they do in transformers; above 1 they are refused.
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
        self.rows = self.kept_rows = self.kept_tokens = 0  # of the last batch; kept ones come before repeated ones
        self.losses: torch.Tensor | None = None  # (documents,), for this step's one loss in the evaluation loop
        self.loss_is_a_metric = False  # `compute_metrics` returned a "loss", which replaces this one

    def mask_repeated_rows(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The next full batch, without targets in rows that stand in for others. To be called once per batch."""
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
        """Adds a batch: this rank's `share` of its summed loss, and its `targets` on all ranks of `group`, which share
        it. Returns its mean loss (0 without targets), fp64 and the same on these ranks."""
        loss_sum = torch.where(targets > 0, share.double(), 0.0)  # nothing but prompts: may be 0 / 0
        if group is not None:
            dist.all_reduce(loss_sum, group=group)
        mean = loss_sum / targets.clamp(min=1)
        if self._filter_nan and not mean.isfinite():
            return mean
        self._sums = self._sums.to(share.device) + torch.stack((loss_sum, targets.double()))
        return mean

    def recording(self, compute_metrics: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
        """`compute_metrics`, and whether it returned a loss of its own is kept."""

        @functools.wraps(compute_metrics)
        def recorded(*args: Any, **kwargs: Any) -> dict[str, Any]:
            metrics = compute_metrics(*args, **kwargs)
            self.loss_is_a_metric = "loss" in (metrics or ())
            return metrics

        return recorded

    def mean_loss(self) -> float:
        """Mean over all targets of the evaluation set; NaN where there are none. Every rank calls."""
        loss_sum, targets = self._accelerator.reduce(self._sums.to(self._accelerator.device), "sum").tolist()
        return loss_sum / targets if targets else float("nan")

    def gathered(self, tensors: Tree) -> Tree:
        """The trainer's `gather_function`: the loop asks for losses first, and the rest has been gathered already."""
        losses, self.losses = self.losses, None
        return tensors if losses is None else losses

    def gather(self, tree: Tree) -> Tree:
        """Rows of all data-parallel groups in the order of the dataset, from any number per group; the ranks of a
        group have the same ones."""
        return tree if self._accelerator.num_processes == 1 else recursively_apply(self._gather_tensor, tree)

    def _gather_tensor(self, rows: torch.Tensor) -> torch.Tensor:
        shapes = self._accelerator.gather(torch.tensor([(*rows.shape, 1)[:2]], device=rows.device))
        most, width = shapes.amax(0).tolist()
        if most == 0:
            return rows
        by_rank = self._accelerator.gather(filled_up(rows, most, width)).split(most)
        counts = shapes[:, 0].tolist()
        return torch.cat([by_rank[rank][: counts[rank]] for rank in range(0, len(counts), self._cp_size)])


def require_length(dataset: Any, groups: int) -> None:
    """Raises a `ConfigurationError` if several data-parallel groups would share a dataset without a length."""
    if groups > 1 and not isinstance(dataset, Sized):
        raise ConfigurationError(
            f"The evaluation set has no length, and {groups} data-parallel groups share it: rows that fill up the "
            "last batches could not be told from new ones, and eval_loss would count them twice. Give it a length "
            "(a map-style dataset), or evaluate with cp_size equal to the number of processes."
        )


def require_known_rows(loader: Any, batch_size: int) -> None:
    """Raises a `ConfigurationError` if a data loader's batches do not show which dataset rows they hold. Collates the
    first one."""
    rows = [loader.dataset[index] for index in range(min(batch_size, len(loader.dataset)))]
    with torch.random.fork_rng(devices=[]):
        batch = loader.collate_fn(rows)
    if row_lengths(batch, batch_size) is None:
        refuse_unknown_rows()


def refuse_unknown_rows() -> None:
    raise ConfigurationError(
        "Evaluation with several data-parallel groups cannot tell the dataset's rows apart in this packed batch, and "
        "would count those twice that fill up the last ones. Collate with FlashCPCollator, set "
        "per_device_eval_batch_size to 1, or evaluate with cp_size equal to the number of processes."
    )


def row_lengths(inputs: Mapping[str, Any], batch_size: int) -> tuple[int, ...] | None:
    """Tokens of each dataset row of a full batch; None if it is a packed row that does not show them."""
    plan = inputs.get("flashcp_plan")
    if getattr(plan, "row_lengths", None) is not None:
        return plan.row_lengths
    rows, tokens = token_shape(inputs)
    if rows > 1 or batch_size == 1:
        return (tokens,) * rows
    return None


def target_labels(inputs: Mapping[str, Any]) -> torch.Tensor:
    """The targets of a full batch: shifted labels, IGNORE_INDEX where there is none."""
    return inputs["shift_labels"] if inputs.get("shift_labels") is not None else inputs["labels"][..., 1:]


class DocumentLosses(NamedTuple):
    """Losses of documents.

    Attributes:
        loss_sum (`np.ndarray`): (documents,), float64: negative log likelihood summed over its targets, in nats.
        targets (`np.ndarray`): (documents,), int64: how many targets it has.
    """

    loss_sum: np.ndarray
    targets: np.ndarray

    @property
    def perplexity(self) -> np.ndarray:
        """(documents,): exp of the mean loss over a document's targets; NaN where it has none."""
        with np.errstate(invalid="ignore"):
            return np.exp(self.loss_sum / self.targets)
