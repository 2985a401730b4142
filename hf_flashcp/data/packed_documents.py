"""`PackedDocuments` and `PackedDocumentStream`: datasets of packed rows, made from datasets of documents as they are
read."""

from __future__ import annotations

import dataclasses
import logging
import math
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from tqdm import tqdm
from transformers.utils import is_datasets_available

from ..errors import BatchError, ConfigurationError
from .features import TOKEN_COLUMNS, read_documents
from .packing import EpochPacker, Packing, bar_options, imbalance
from .packing_options import Counts, PackingOptions
from .packing_steps import Waiting, arrange, pack_seconds


logger = logging.getLogger(__name__)

OF_THE_RUN = ("cp_size", "dp_size", "gradient_accumulation_steps")
"""Options that a trainer knows."""


class _Packed:
    """What both have: options, those of the run filled in late, and how rows become documents."""

    def __init__(
        self,
        dataset: Any,
        window: int,
        *,
        bad_rows: str = "error",
        per_token_keys: Sequence[str] = (),
        cp_size: int | None = None,
        dp_size: int | None = None,
        gradient_accumulation_steps: int | None = None,
        **options: Any,
    ):
        if bad_rows not in ("error", "skip"):
            raise BatchError(f'bad_rows is {bad_rows!r}: choose "error" or "skip".')
        self.dataset, self.per_token_keys = dataset, tuple(per_token_keys)
        self.skip_bad_rows = bad_rows == "skip"
        self._given = dict(zip(OF_THE_RUN, (cp_size, dp_size, gradient_accumulation_steps)))
        known = {name: value for name, value in self._given.items() if value is not None}
        self.options = PackingOptions(window, **options, **known)
        # Shared with loader workers that outlive an epoch.
        self._epoch = torch.tensor(0).share_memory_()

    def for_run(self, **sizes: int) -> None:
        """Takes what was not given from a trainer: `cp_size`, `dp_size` and `gradient_accumulation_steps`.

        Raises:
            ConfigurationError: something else was given.
        """
        for name, value in sizes.items():
            if self._given[name] not in (None, value):
                raise ConfigurationError(
                    f"The packs are made for {name} {self._given[name]}, but the run has {value}. Leave it out: the "
                    "trainer fills it in."
                )
        changed = {name: value for name, value in sizes.items() if getattr(self.options, name) != value}
        if changed:
            self.options = dataclasses.replace(self.options, **changed)
            self._reset()

    def set_epoch(self, epoch: int) -> None:
        """For the order of documents. Trainer and accelerate call it."""
        self._epoch.fill_(epoch)

    def metrics(self) -> dict[str, float]:
        """For logs; empty while nothing is packed."""
        report = self.report()
        names = ("fill_rate", "micro_step_imbalance", "step_imbalance", "mean_delay")
        return {f"flashcp_{name}": report[name] for name in names if report.get("packs")}

    def _document(self, index: int, row: Any) -> dict[str, list]:
        if not isinstance(row, Mapping):
            raise BatchError(f"Row {index} is a {type(row).__name__}, not a mapping with the columns of a document.")
        documents = read_documents(index, row, self.per_token_keys)
        if len(documents) > 1:
            raise BatchError(
                f"Row {index} holds {len(documents)} documents, so it is packed already. Pass documents; where one "
                "has position_ids that skip, give its length as seq_lengths."
            )
        return documents[0]

    def _skip(self, error: BatchError) -> None:
        if not self.skip_bad_rows:
            raise error
        logger.warning("Skipped: %s", error)


class PackedDocuments(_Packed, Dataset):
    """A map-style dataset of packed rows over a map-style dataset of documents.

    Rows have what [`FlashCPCollator`] takes: `input_ids`, `labels`, `per_token_keys` and `seq_lengths`. Documents are
    read when their row is; their lengths when the dataset is first used (from a `datasets.Dataset` without reading
    tokens). Rows come in the order of optimizer steps: read them one by one and in order, as [`FlashCPTrainer`] does.

    Args:
        dataset (`Dataset`): of documents; see [`FlashCPCollator`] for their columns.
        window (`int`): tokens of a packed row at most.
        bad_rows (`str`, *optional*, defaults to `"error"`): rows without tokens, and rows whose columns do not fit
            the tokens. With `"skip"` they are counted, logged and left out.
        per_token_keys (`Sequence[str]`, *optional*): further columns with a number for each token.
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
        super().__init__(dataset, window, bad_rows=bad_rows, per_token_keys=per_token_keys, **kwargs)
        self.seed = seed
        self._lengths: np.ndarray | None = None
        self._reset()

    def _reset(self) -> None:
        self._packer: EpochPacker | None = None
        self._packed: tuple[int, Packing] | None = None

    @property
    def packer(self) -> EpochPacker:
        if self._packer is None:
            if self._lengths is None:
                self._lengths = self._read_lengths()
            self._packer = EpochPacker(self._lengths, self.options)
        return self._packer

    @property
    def packing(self) -> Packing:
        """Of the current epoch. Its documents are indices of the dataset."""
        epoch = int(self._epoch)
        if self._packed is None or self._packed[0] != epoch:
            self._packed = (epoch, self.packer.pack(self.seed, epoch))
        return self._packed[1]

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        self.packing  # noqa: B018, before loader workers start, which would each do it

    def report(self) -> dict[str, Any]:
        """[`Packing.report`] of the current epoch, with `rows_skipped`."""
        return {**self.packing.report(), "rows_skipped": int((self._lengths == 0).sum())}

    def __len__(self) -> int:
        return self.packer.num_packs

    def __getitem__(self, index: int) -> dict[str, list]:
        pieces = self.packing[index]
        rows = _rows(self.dataset, [piece.document for piece in pieces])
        return _joined(
            [_cut(self._document(piece.document, row), piece.start, piece.stop) for piece, row in zip(pieces, rows)]
        )

    def _read_lengths(self) -> np.ndarray:
        """(rows,) int64, 0 of those to skip."""
        if is_datasets_available():
            import datasets

            if isinstance(self.dataset, datasets.Dataset):
                return self._read_arrow_lengths()
        lengths = np.zeros(len(self.dataset), dtype=np.int64)
        for index in tqdm(range(len(lengths)), **bar_options("Reading lengths", "rows")):
            try:
                lengths[index] = len(self._document(index, self.dataset[index])["input_ids"])
            except BatchError as error:
                self._skip(error)
        return lengths

    def _read_arrow_lengths(self) -> np.ndarray:
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
                try:
                    self._document(start + index, self.dataset[start + index])
                except BatchError as error:
                    self._skip(error)
            found.append(np.where(bad, 0, lengths))
        return np.concatenate(found)


class PackedDocumentStream(_Packed, IterableDataset):
    """The same over an iterable dataset, with the documents of a few steps in memory.

    Documents are packed in the order in which they come: shuffle the dataset itself. When it ends, what waits is
    packed, and the last step can have fewer packs. Every process reads the whole stream, and one loader worker at
    most, or each would read it again.

    To resume, `Trainer` reads what has been trained on again and drops it. [`~PackedDocumentStream.load_state_dict`]
    does so without making rows of it, for loaders that know it (torchdata's `StatefulDataLoader`).

    Args:
        dataset (`Iterable`): of documents.
        window (`int`): see [`PackedDocuments`], like the next ones.
        bad_rows (`str`, *optional*, defaults to `"error"`): `"error"` or `"skip"`.
        per_token_keys (`Sequence[str]`, *optional*): further columns with a number for each token.
        kwargs: options of [`pack_lengths`].

    Raises:
        ConfigurationError: several loader workers.
    """

    def __init__(
        self,
        dataset: Iterable[Mapping[str, Any]],
        window: int,
        *,
        bad_rows: str = "error",
        per_token_keys: Sequence[str] = (),
        **kwargs: Any,
    ):
        super().__init__(dataset, window, bad_rows=bad_rows, per_token_keys=per_token_keys, **kwargs)
        self._reset()

    def _reset(self) -> None:
        self._to_skip = 0
        self._start()

    def _start(self) -> None:
        self._counts, self._rows_skipped = Counts(), 0
        self._seconds = array("d")
        self._delays = self._documents_out = self._max_delay = 0
        self._read = self._tokens_out = 0

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def state_dict(self) -> dict[str, int]:
        """Where the current pass is: its epoch, and the packs that have been read."""
        return {"epoch": int(self._epoch), "packs": self._read}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """The next pass goes on there."""
        self.set_epoch(state["epoch"])
        self._to_skip = state["packs"]

    def report(self) -> dict[str, Any]:
        """[`Packing.report`] of the current pass so far, in the process that reads it, with `rows_skipped` and
        `tokens_waiting`: of those counted as packed, what has not come to its turn yet."""
        options, counts = self.options, self._counts.to_dict()
        return {
            "packs": len(self._seconds),
            **counts,
            "fill_rate": self._tokens_out / max(len(self._seconds) * options.window, 1),
            **imbalance(self._seconds, options.dp_size, options.gradient_accumulation_steps),
            "mean_delay": self._delays / max(self._documents_out, 1),
            "max_delay": self._max_delay,
            "rows_skipped": self._rows_skipped,
            "tokens_waiting": counts["tokens_packed"] - self._tokens_out,
        }

    def __iter__(self) -> Iterator[dict[str, list]]:
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise ConfigurationError(
                f"{worker.num_workers} loader workers would each read the whole stream. Set dataloader_num_workers "
                "(num_workers) to 1 or 0."
            )
        self._start()
        skipped, self._to_skip = self._to_skip, 0
        for pack in self._packs():
            self._read += 1
            if self._read > skipped:
                yield _joined(pack)

    def _packs(self) -> Iterator[list[dict[str, list]]]:
        options, packer = self.options, self.options.step_packer()
        held: dict[int, list[dict[str, list]]] = {}
        times: dict[int, tuple[float, bool]] = {}
        tokens_of_step = options.step_packs * options.window * (1 - options.spare)
        for number, unit in enumerate(self._units()):
            held[number] = unit
            weights = []
            for length in map(_tokens, unit):
                if length not in times:
                    seconds, heavy = options.times(np.array([length]))
                    times[length] = (float(seconds[0]), bool(heavy[0]))
                weights.append(times[length])
            packer.add(number, sum(map(_tokens, unit)), sum(each for each, _ in weights), any(h for _, h in weights))
            while packer.tokens >= tokens_of_step and packer.documents >= options.step_packs:
                yield from self._come_out(packer.step(options.step_packs), held)
        if rest := packer.take_rest():
            yield from self._come_out(options.place(rest, options.packs_for(rest)), held)

    def _come_out(
        self, packs: list[list[Waiting]], held: dict[int, list[dict[str, list]]]
    ) -> Iterator[list[dict[str, list]]]:
        options = self.options
        for pack in arrange(packs, options.dp_size, options.gradient_accumulation_steps):
            step = len(self._seconds) // options.step_packs
            self._seconds.append(pack_seconds(pack))
            self._tokens_out += sum(document.tokens for document in pack)
            units = [held.pop(document.item) for document in pack]
            for document, unit in zip(pack, units):
                delay = abs(step - document.step)
                self._delays += delay * len(unit)
                self._documents_out += len(unit)
                self._max_delay = max(self._max_delay, delay)
            yield [document for unit in units for document in unit]

    def _units(self) -> Iterator[list[dict[str, list]]]:
        """Documents, those of fewer than `cp_size` tokens together with others like them."""
        short, last = [], None
        for index, row in enumerate(_read(self.dataset)):
            try:
                document = self._document(index, row)
            except BatchError as error:
                self._skip(error)
                self._rows_skipped += 1
                continue
            pieces = self.options.pieces(index, _tokens(document))
            self._counts.add(_tokens(document), pieces)
            for piece in pieces:
                unit = [_cut(document, piece.start, piece.stop)]
                if _tokens(unit[0]) < self.options.cp_size:
                    unit = short = short + unit
                    if sum(map(_tokens, short)) < self.options.cp_size:
                        continue
                    short = []
                if last is not None:
                    yield last
                last = unit
        if short:
            tokens = sum(map(_tokens, short))
            if last is not None and sum(map(_tokens, last)) + tokens <= self.options.window:
                last = last + short
            else:
                logger.warning(
                    "Dropped the last %d documents: their %d tokens are fewer than cp_size.", len(short), tokens
                )
                self._counts.drop(len(short), tokens)
        if last is not None:
            yield last


def _read(stream: Iterable[Any]) -> Iterator[Any]:
    """Its rows; where it fails says after which. A stream that has failed cannot go on."""
    rows, read = iter(stream), 0
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:
            raise BatchError(
                f"The stream of documents failed after {read} rows, by {type(error).__name__}: {error}. Repair the "
                "shard that it was reading, or leave it out; to pass over single bad rows, have the stream yield them "
                'as empty ones and set bad_rows="skip".'
            ) from error
        read += 1
        yield row


def _tokens(document: Mapping[str, list]) -> int:
    return len(document["input_ids"])


def _cut(document: Mapping[str, list], start: int, stop: int) -> dict[str, list]:
    return {key: values[start:stop] for key, values in document.items()}


def _rows(dataset: Any, indices: list[int]) -> Sequence[Any]:
    return dataset.__getitems__(indices) if hasattr(dataset, "__getitems__") else [dataset[index] for index in indices]


def _joined(documents: Sequence[Mapping[str, list]]) -> dict[str, list]:
    """A packed row."""
    row: dict[str, list] = {}
    for key in {key: None for document in documents for key in document}:
        # Only position_ids can be missing.
        parts = (document.get(key, range(_tokens(document))) for document in documents)
        row[key] = [value for part in parts for value in part]
    return {**row, "seq_lengths": [_tokens(document) for document in documents]}
