"""`PackedDocuments`: a dataset of packed rows, made from a dataset of documents as they are read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers.utils import is_datasets_available

from ..errors import BatchError
from .features import TOKEN_COLUMNS
from .packed_rows import PackedRows, cut, join, tokens_of
from .packing import EpochPacker, Packing
from .progress import bar_options


class PackedDocuments(PackedRows, Dataset):
    """A map-style dataset of packed rows over a map-style dataset of documents.

    Rows have what [`FlashCPCollator`] takes: `input_ids`, `labels`, `per_token_keys` and `seq_lengths`. Documents are
    read when their row is; their lengths when the dataset is first used (from a `datasets.Dataset` without reading
    tokens). Rows come in the order of optimizer steps: read them one by one and in order, as [`FlashCPTrainer`] does.

    Args:
        dataset (`Dataset`): of documents; see [`FlashCPCollator`] for their columns.
        window (`int`): tokens of a packed row at most.
        bad_rows (`str`, *optional*, defaults to `"error"`): rows without tokens, and rows whose columns do not fit
            the tokens. With `"skip"` they are counted, logged and left out.
        per_token_keys (`Sequence[str]`, *optional*): further columns with one number per token.
        seed (`int`, *optional*, defaults to 0): every epoch shuffles documents by it, and packs them anew.
        kwargs: options of [`pack_lengths`]; those of the run (`cp_size`, `dp_size`, `gradient_accumulation_steps`)
            are filled in by [`FlashCPTrainer`].

    Raises:
        BatchError: bad rows, packed rows.
        PlanError: see [`pack_lengths`].
    """

    def __init__(
        self,
        dataset: Any,
        window: int,
        *,
        bad_rows: str = "error",
        per_token_keys: Sequence[str] = (),
        seed: int = 0,
        **kwargs: Any,
    ):
        super().__init__(dataset, window, bad_rows, per_token_keys, kwargs)
        self.seed = seed
        self._lengths: np.ndarray | None = None

    def _reset(self) -> None:
        self._packer: EpochPacker | None = None
        self._packed: tuple[int, Packing] | None = None

    @property
    def packer(self) -> EpochPacker:
        """Packer of all epochs."""
        if self._packer is None:
            if self._lengths is None:
                self._lengths = self._read_lengths()
            self._packer = EpochPacker(self._lengths, self.options)
        return self._packer

    @property
    def packing(self) -> Packing:
        """Packing of the current epoch. Its documents are indices of the dataset."""
        epoch = int(self._epoch)
        if self._packed is None or self._packed[0] != epoch:
            self._packed = (epoch, self.packer.pack(self.seed, epoch))
        return self._packed[1]

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        self.packing  # noqa: B018, before loader workers start, each of which would pack

    def report(self) -> dict[str, Any]:
        """Returns [`Packing.report`] of the current epoch, with `rows_skipped`."""
        return {**self.packing.report(), "rows_skipped": int((self._lengths == 0).sum())}

    def __len__(self) -> int:
        return self.packer.num_packs

    def __getitem__(self, index: int) -> dict[str, list]:
        parts = self.packing[index]
        indices = [part.document for part in parts]
        if hasattr(self.dataset, "__getitems__"):
            rows = self.dataset.__getitems__(indices)
        else:
            rows = [self.dataset[each] for each in indices]
        return join([cut(self._document(part.document, row), part.start, part.stop) for part, row in zip(parts, rows)])

    def _read_lengths(self) -> np.ndarray:
        """Returns the lengths of all documents, (rows,) int64, 0 of those to skip."""
        if is_datasets_available():
            import datasets

            if isinstance(self.dataset, datasets.Dataset):
                return self._read_arrow_lengths()
        rows = tqdm(range(len(self.dataset)), **bar_options("Reading lengths", "rows"))
        return np.array([self._length_or_skip(index) for index in rows], dtype=np.int64)

    def _length_or_skip(self, index: int) -> int:
        try:
            return tokens_of(self._document(index, self.dataset[index]))
        except BatchError as error:
            self._skip(error)
            return 0

    def _read_arrow_lengths(self) -> np.ndarray:
        """The same from the offsets of Arrow's lists; tokens are read of bad rows alone."""
        import pyarrow.compute as pc

        names = self.dataset.column_names
        if missing := [name for name in ("input_ids", *self.per_token_keys) if name not in names]:
            raise BatchError(
                f"The dataset has no column {', '.join(missing)}: its columns are {', '.join(names)}. Tokenize it "
                "first, and keep what per_token_keys asks for."
            )
        columns = [name for name in (*TOKEN_COLUMNS, *self.per_token_keys) if name in names]
        found = [np.zeros(0, dtype=np.int64)]
        tables = self.dataset.select_columns(columns).with_format("arrow").iter(batch_size=10_000)
        batches = math.ceil(len(self.dataset) / 10_000)
        for table in tqdm(tables, total=batches, **bar_options("Reading lengths", "batches")):
            by_column = {name: pc.fill_null(pc.list_value_length(table[name]), -1).to_numpy() for name in columns}
            lengths = by_column["input_ids"].astype(np.int64)
            bad = lengths < 1
            for name, values in by_column.items():
                bad |= (values != lengths) & ((values >= 0) | (name in self.per_token_keys))
            start = sum(map(len, found))
            for index in np.flatnonzero(bad).tolist():
                self._length_or_skip(start + index)
            found.append(np.where(bad, 0, lengths))
        return np.concatenate(found)
