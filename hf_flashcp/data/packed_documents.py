"""`PackedDocuments`: a map-style dataset that packs the documents of another dataset into rows."""

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

    Rows have the columns that [`FlashCPCollator`] expects: `input_ids`, `labels`, `per_token_keys` and `seq_lengths`.
    The lengths of all documents are read when the dataset is first used (for a `datasets.Dataset` without reading
    tokens), and the documents of a row when that row is read. Rows are in the order of optimizer steps. Read them one
    by one and in order, as [`FlashCPTrainer`] does.

    Args:
        dataset (`Dataset`): dataset of documents; see [`FlashCPCollator`] for their columns.
        window (`int`): largest number of tokens in a packed row.
        bad_rows (`str`, *optional*, defaults to `"error"`): what to do with rows that have no tokens, or columns that
            do not match the tokens. With `"skip"`, they are counted, logged and left out.
        per_token_keys (`Sequence[str]`, *optional*): further columns with one number per token.
        seed (`int`, *optional*, defaults to 0): seed of the random order. Every epoch shuffles and packs the documents
            again.
        kwargs: options of [`pack_lengths`]. [`FlashCPTrainer`] fills in those of the run: `cp_size`, `dp_size` and
            `gradient_accumulation_steps`.

    Raises:
        BatchError: a row is bad or already packed.
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
        """The packer of all epochs."""
        if self._packer is None:
            if self._lengths is None:
                self._lengths = self._read_lengths()
            self._packer = EpochPacker(self._lengths, self.options)
        return self._packer

    @property
    def packing(self) -> Packing:
        """The packing of the current epoch. Its documents are indices into the dataset."""
        epoch = int(self._epoch)
        if self._packed is None or self._packed[0] != epoch:
            self._packed = (epoch, self.packer.pack(self.seed, epoch))
        return self._packed[1]

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        self.packing  # noqa: B018, pack before loader workers start, because each of them would pack again

    def report(self) -> dict[str, Any]:
        """Return [`Packing.report`] of the current epoch, and the number of `rows_skipped`."""
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
        """Return the lengths of all documents, (rows,) int64, with 0 for rows to skip."""
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
        """Return the same lengths from the offsets of Arrow lists, reading tokens of bad rows only."""
        import pyarrow.compute as pc

        names = self.dataset.column_names
        if missing := [name for name in ("input_ids", *self.per_token_keys) if name not in names]:
            raise BatchError(
                f"The dataset has no column {', '.join(missing)}: its columns are {', '.join(names)}. Tokenize it "
                "first, and keep the columns in per_token_keys."
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
