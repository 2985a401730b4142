"""`PackedRows`, the base class of datasets of packed rows, which reads documents from rows and joins them."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..errors import BatchError, ConfigurationError
from .features import joined, read_documents
from .packing_options import PackingOptions


logger = logging.getLogger(__name__)

RUN_OPTIONS = ("cp_size", "dp_size", "gradient_accumulation_steps")
"""Options that a trainer fills in."""


class PackedRows:
    """Base class of datasets of packed rows, which holds the options and checks documents.

    A trainer can fill in the `RUN_OPTIONS` later, see [`~PackedRows.for_run`].
    """

    def __init__(
        self,
        dataset: Any,
        window: int,
        bad_rows: str,
        per_token_keys: Sequence[str],
        options: dict[str, Any],
    ):
        if bad_rows not in ("error", "skip"):
            raise BatchError(f'bad_rows is {bad_rows!r}: choose "error" or "skip".')
        self.dataset, self.per_token_keys = dataset, tuple(per_token_keys)
        self.skip_bad_rows = bad_rows == "skip"
        self._given = {name: options.get(name) for name in RUN_OPTIONS}
        known = {name: value for name, value in options.items() if name not in RUN_OPTIONS or value is not None}
        self.options = PackingOptions(window, **known)
        # In shared memory, because loader workers can outlive an epoch.
        self._epoch = torch.tensor(0).share_memory_()
        self._reset()

    def for_run(self, **sizes: int) -> None:
        """Fill in `cp_size`, `dp_size` and `gradient_accumulation_steps` of a run. Trainers call it.

        Raises:
            ConfigurationError: the dataset was created with another value.
        """
        for name, value in sizes.items():
            if self._given[name] not in (None, value):
                raise ConfigurationError(
                    f"The packs are made for {name} {self._given[name]}, but the run has {value}. Leave {name} out, "
                    "because the trainer fills it in."
                )
        changed = {name: value for name, value in sizes.items() if getattr(self.options, name) != value}
        if changed:
            self.options = dataclasses.replace(self.options, **changed)
            self._reset()

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which determines the order of documents. Trainer and accelerate call it."""
        self._epoch.fill_(epoch)

    def metrics(self) -> dict[str, float]:
        """Return metrics for logs, or an empty dict if nothing is packed yet."""
        report = self.report()
        names = ("fill_rate", "micro_step_imbalance", "step_imbalance", "mean_delay")
        return {f"flashcp_{name}": report[name] for name in names if report.get("packs")}

    def _document(self, index: int, row: Any) -> dict[str, list]:
        if not isinstance(row, Mapping):
            raise BatchError(f"Row {index} is a {type(row).__name__}, not a mapping with the columns of a document.")
        documents = read_documents(index, row, self.per_token_keys)
        if len(documents) > 1:
            raise BatchError(
                f"Row {index} holds {len(documents)} documents, so it is packed already. Pass one document per row; "
                "if its position_ids skip numbers, give its length as seq_lengths."
            )
        return documents[0]

    def _skip(self, error: BatchError) -> None:
        if not self.skip_bad_rows:
            raise error
        logger.warning("Skipped: %s", error)


def tokens_of(document: Mapping[str, list]) -> int:
    """Return the number of tokens of a document."""
    return len(document["input_ids"])


def cut(document: Mapping[str, list], start: int, stop: int) -> dict[str, list]:
    """Return the tokens [start, stop) of a document."""
    return {key: values[start:stop] for key, values in document.items()}


def join(documents: Sequence[Mapping[str, list]]) -> dict[str, list]:
    """Join documents into a packed row."""
    row = {key: joined(documents, key) for key in {key: None for document in documents for key in document}}
    return {**row, "seq_lengths": [tokens_of(document) for document in documents]}
