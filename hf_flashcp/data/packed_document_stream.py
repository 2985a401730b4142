"""`PackedDocumentStream`: an iterable dataset that packs a stream of documents into rows."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from ..errors import BatchError, ConfigurationError
from .packed_rows import PackedRows, cut, join, logger, tokens_of
from .packing import imbalance
from .packing_options import Counts
from .packing_steps import Waiting, arrange, pack_seconds


class PackedDocumentStream(PackedRows, IterableDataset):
    """An iterable dataset of packed rows over an iterable dataset of documents.

    It keeps the documents of a few optimizer steps in memory. Documents are packed in the order in which they arrive,
    so shuffle the dataset itself. When the dataset ends, the waiting documents are packed, and the last step can have
    fewer packs. Every process reads the whole stream, with at most one loader worker, because each worker would read
    the stream again.

    To resume a run, `Trainer` reads the documents that it has already trained on again and discards them.
    [`~PackedDocumentStream.load_state_dict`] skips them without making rows, for loaders that support it (torchdata's
    `StatefulDataLoader`).

    Args:
        dataset (`Iterable`): iterable of documents.
        window (`int`): largest number of tokens in a packed row.
        bad_rows (`str`, *optional*, defaults to `"error"`): `"error"` or `"skip"`, see [`PackedDocuments`].
        per_token_keys (`Sequence[str]`, *optional*): further columns with one number per token.
        kwargs: options of [`pack_lengths`].

    Raises:
        ConfigurationError: there are several loader workers.
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
        super().__init__(dataset, window, bad_rows, per_token_keys, kwargs)

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
        """Return the position in the current pass: its epoch, and the number of packs that have been read."""
        return {"epoch": int(self._epoch), "packs": self._read}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue the next pass at the position that [`~PackedDocumentStream.state_dict`] returned."""
        self.set_epoch(state["epoch"])
        self._to_skip = state["packs"]

    def report(self) -> dict[str, Any]:
        """Return [`Packing.report`] of the current pass so far, in the process that reads the stream.

        It also has `rows_skipped`, and `tokens_waiting`: tokens counted as packed that are not in a pack yet.
        """
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
                "(num_workers of a DataLoader) to 1 or 0."
            )
        self._start()
        skipped, self._to_skip = self._to_skip, 0
        for pack in self._packs():
            self._read += 1
            if self._read > skipped:
                yield join(pack)

    def _packs(self) -> Iterator[list[dict[str, list]]]:
        options, packer = self.options, self.options.step_packer()
        held: dict[int, list[dict[str, list]]] = {}

        @cache
        def times(tokens: int) -> tuple[float, bool]:
            seconds, heavy = options.times(np.array([tokens]))
            return float(seconds[0]), bool(heavy[0])

        tokens_of_step = options.step_packs * options.window * (1 - options.spare)
        for number, unit in enumerate(self._units()):
            held[number] = unit
            seconds, heavy = zip(*(times(tokens_of(document)) for document in unit))
            packer.add(number, sum(map(tokens_of, unit)), sum(seconds), any(heavy))
            while packer.tokens >= tokens_of_step and packer.documents >= options.step_packs:
                yield from self._emit(packer.step(options.step_packs), held)
        if rest := packer.take_rest():
            yield from self._emit(options.place(rest, options.packs_for(rest)), held)

    def _emit(
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
        """Yield units of documents that stay together: single documents, or several of fewer than `cp_size` tokens."""
        short, last = [], None
        for index, row in enumerate(_read(self.dataset)):
            try:
                document = self._document(index, row)
            except BatchError as error:
                self._skip(error)
                self._rows_skipped += 1
                continue
            parts = self.options.parts(index, tokens_of(document))
            self._counts.add(tokens_of(document), parts)
            for part in parts:
                unit = [cut(document, part.start, part.stop)]
                if tokens_of(unit[0]) < self.options.cp_size:
                    unit = short = short + unit
                    if sum(map(tokens_of, short)) < self.options.cp_size:
                        continue
                    short = []
                if last is not None:
                    yield last
                last = unit
        if short:
            tokens = sum(map(tokens_of, short))
            if last is not None and sum(map(tokens_of, last)) + tokens <= self.options.window:
                last = last + short
            else:
                logger.warning(
                    "Dropped the last %d documents, whose %d tokens are fewer than cp_size.", len(short), tokens
                )
                self._counts.drop(len(short), tokens)
        if last is not None:
            yield last


def _read(stream: Iterable[Any]) -> Iterator[Any]:
    """Yield the rows of a stream, and raise a `BatchError` that tells after which row the stream failed."""
    rows, read = iter(stream), 0
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:
            raise BatchError(
                f"The stream of documents failed after {read} rows with {type(error).__name__}: {error}. Repair the "
                "shard that it was reading, or leave it out. To skip single bad rows, let the stream yield empty rows "
                'in their place, and set bad_rows="skip".'
            ) from error
        read += 1
        yield row
