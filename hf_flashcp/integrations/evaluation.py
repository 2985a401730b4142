"""Evaluation as on one device: each row of the set counted once, and predictions of whole documents."""

from __future__ import annotations

from collections.abc import Callable, Sized
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate.utils import pad_across_processes
from torch.nn.utils.rnn import pad_sequence

from ..errors import ConfigurationError
from ..layout import RankPlan
from ..layout.batch import IGNORE_INDEX
from ..layout.rank_layout import token_index


if TYPE_CHECKING:
    from accelerate import Accelerator


class EvaluationSums:
    """Sums of losses and targets on this rank.

    accelerate gives every data-parallel group as many batches, and fills the last ones up with rows from the
    beginning. Batch s of group g holds the rows from (s * groups + g) * rows a batch on: those beyond the dataset's
    end have been counted before, so their targets are masked.

    Args:
        dataset: of the evaluation; without a length no row can be told from a repeated one.
        groups (`int`): data-parallel groups.
        group (`int`): this rank's.

    Attributes:
        kept_tokens (`int`): of the last batch, how many come before the first repeated row.
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
        self.kept_tokens: int | None = None
        self._rows_a_batch: int | None = None
        self.sums = torch.zeros(2, dtype=torch.float64)

    def mask_repeated_rows(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The next full batch, without targets in rows that stand in for others. To be called once a batch."""
        if self._num_rows is None:
            plan = inputs.get("flashcp_plan")
            self.kept_tokens = sum(getattr(plan, "row_lengths", None) or (inputs["labels"].numel(),))
            return inputs
        lengths = _row_lengths(inputs)
        if self._rows_a_batch is None:
            self._rows_a_batch = len(lengths)
        first = (self._step * self._groups + self._group) * self._rows_a_batch
        self._step += 1
        new_rows = max(self._num_rows - first, 0)
        self.kept_tokens = sum(lengths[:new_rows])
        if new_rows >= len(lengths):
            return inputs
        masked = {
            key: inputs[key].clone(memory_format=torch.contiguous_format)
            for key in ("labels", "shift_labels")
            if inputs.get(key) is not None
        }
        for labels in masked.values():
            labels.view(-1)[self.kept_tokens :] = IGNORE_INDEX
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


def whole_documents(
    logits: torch.Tensor,
    labels: torch.Tensor,
    plan: RankPlan,
    kept_tokens: int,
    preprocess: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Predictions of a sharded batch, a row for each document, as a padded batch on one device would give them.

    Documents are put together one by one, so that of the full logits only one document's are there at a time where
    `preprocess` makes them smaller.

    Args:
        logits: (1, T_r, ...) of this rank's tokens.
        labels: of the whole batch, not shifted: (1, C) or rows of it.
        plan: of the batch. Every rank of its group calls.
        kept_tokens: documents from there on are left out.
        preprocess: `preprocess_logits_for_metrics` of transformers' Trainer, given (1, tokens, ...) and (1, tokens).

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: (documents, longest, ...) predictions and (documents, longest) labels, on
        every rank of the group; -100 behind the end of a document.
    """
    lengths, cp_size = plan.plan.lengths, plan.plan.cp_size
    places = [torch.from_numpy(token_index(plan.plan, rank)).to(logits.device) for rank in range(cp_size)]
    kept = sum(1 for stop in accumulate(lengths) if stop <= kept_tokens)
    predictions, targets = [], []
    # At least one, for the shape of what `preprocess` makes of it.
    bounds = pairwise(accumulate(lengths[: max(kept, 1)], initial=0))
    for (start, stop), document_labels in zip(bounds, labels.flatten().split(lengths)):
        held = [((place >= start) & (place < stop)).nonzero().flatten() for place in places]
        document = _document(logits[0], plan, places, held, start, stop)[None]
        if preprocess is not None:
            document = preprocess(document, document_labels[None])
        predictions.append(document[0])
        targets.append(document_labels)
    padded = (pad_sequence(rows, batch_first=True, padding_value=IGNORE_INDEX) for rows in (predictions, targets))
    return tuple(rows[:kept] for rows in padded)


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


def losses_by_document(
    logits: torch.Tensor, shift_labels: torch.Tensor, plan: RankPlan, kept_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed loss and number of targets of each document of a sharded batch.

    Args:
        logits: (1, T_r, V) of this rank's tokens.
        shift_labels: (1, T_r).
        plan: of the batch. Every rank of its group calls.
        kept_tokens: documents from there on are left out.

    Returns:
        two tensors (documents, 1), float64 and int64, on every rank of the group.
    """
    stops = torch.tensor(plan.plan.lengths).cumsum(0)
    documents = torch.searchsorted(stops, torch.from_numpy(token_index(plan.plan, plan.rank)), right=True)
    targets = shift_labels[0]
    losses = F.cross_entropy(logits[0].float(), targets, ignore_index=IGNORE_INDEX, reduction="none")
    sums = torch.zeros(2, len(stops), dtype=torch.float64, device=logits.device)
    per_token = torch.stack((losses.double(), (targets != IGNORE_INDEX).double()))
    sums.index_add_(1, documents.to(logits.device), per_token)
    if plan.group is not None:
        dist.all_reduce(sums, group=plan.group)
    kept = int((stops <= kept_tokens).sum())
    return sums[0, :kept, None], sums[1, :kept, None].long()


def _document(
    logits: torch.Tensor, plan: RankPlan, places: list[torch.Tensor], held: list[torch.Tensor], start: int, stop: int
) -> torch.Tensor:
    """(stop - start, ...): the rows of one document from all ranks."""
    most = max(map(len, held))
    mine = logits.new_zeros(most, *logits.shape[1:])
    mine[: len(held[plan.rank])] = logits[held[plan.rank]]
    parts = [torch.empty_like(mine) for _ in held]
    dist.all_gather(parts, mine, group=plan.group)
    document = logits.new_empty(stop - start, *logits.shape[1:])
    for part, place, rows in zip(parts, places, held):
        document[place[rows] - start] = part[: len(rows)]
    return document


def gather_rows(rows: torch.Tensor, accelerator: Accelerator, cp_size: int) -> torch.Tensor:
    """(n, ...) rows of all data-parallel groups in the order of the dataset, from any number a group; the ranks of a
    group have the same ones."""
    counts = accelerator.gather(torch.tensor([len(rows)], device=rows.device)).tolist()
    gathered = accelerator.gather(pad_across_processes(rows, dim=0, pad_index=IGNORE_INDEX))
    by_rank = gathered.split(max(counts))
    return torch.cat([by_rank[rank][: counts[rank]] for rank in range(0, len(counts), cp_size)])
