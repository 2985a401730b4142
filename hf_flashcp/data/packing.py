"""`pack_lengths`: decides from lengths which documents share a packed row, and which rows share an optimizer step.

An optimizer step has `dp_size * gradient_accumulation_steps` packs. Documents arrive in random order and fill one step
after another. Documents that a step has no room for come first in the next step. The method "balanced" is the
variable-length packing of WLB-LLM (arXiv 2503.17924, section 4): documents are placed from long to short, each in the
pack that takes the least time. A document with so much attention that other documents cannot balance it waits until
there is one of similar length for every data-parallel group. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from ..errors import PlanError
from ..predict import CostModel
from .packing_options import Counts, DocumentPart, PackingOptions
from .packing_steps import Waiting, arrange, pack_seconds
from .progress import bar_options


MOST_WAITING = 0.1
"""Largest share of an epoch's remaining tokens that may wait, so that the last steps still get short documents."""

MOST_TRIED = 20_000
"""Largest number of documents in the trial that chooses an epoch's number of spare packs."""

MOST_SPARE = 0.2
"""Share of spare packs above which that trial stops."""


@dataclass(frozen=True)
class Packing:
    """The packs of an epoch in training order, in which `dp_size` consecutive packs form a micro-step.

    Args:
        documents (`np.ndarray`): (n,) int64, index of each part's document in the lengths, ordered by pack.
        starts (`np.ndarray`): (n,) int64, first token of each part.
        stops (`np.ndarray`): (n,) int64, end of each part (exclusive).
        offsets (`np.ndarray`): (packs + 1,) int64, index of each pack's first part.
        seconds (`np.ndarray`): (packs,) predicted seconds of a training step on one device.
        delays (`np.ndarray`): (n,) delays in optimizer steps, see [`~Packing.report`].
        options (`PackingOptions`): options of the packing.
        counts (`dict[str, int]`): numbers of documents and tokens that came in, were packed, dropped and truncated.
    """

    documents: np.ndarray
    starts: np.ndarray
    stops: np.ndarray
    offsets: np.ndarray
    seconds: np.ndarray
    delays: np.ndarray
    options: PackingOptions
    counts: dict[str, int]

    def __len__(self) -> int:
        return len(self.seconds)

    def __getitem__(self, index: int) -> list[DocumentPart]:
        """Return the parts of documents in a pack."""
        where = slice(self.offsets[index], self.offsets[index + 1])
        columns = (self.documents[where], self.starts[where], self.stops[where])
        return [DocumentPart(*row) for row in zip(*(column.tolist() for column in columns))]

    def __iter__(self) -> Iterator[list[DocumentPart]]:
        return map(self.__getitem__, range(len(self)))

    def report(self) -> dict[str, Any]:
        """Return statistics as a JSON-serializable dict.

        - `packs`: number of packs;
        - `documents_in` and `tokens_in`, and how many of them were `packed`, `dropped` and `truncated`;
        - `documents_split`: number of documents that were split;
        - `fill_rate`: packed tokens as a share of the tokens that the packs have room for;
        - `micro_step_imbalance` and `step_imbalance`, see [`imbalance`];
        - `mean_delay` and `max_delay`: number of optimizer steps between the step that was being filled when a
          document's turn came in the random order, and the step that contains it.
        """
        options = self.options
        return {
            "packs": len(self),
            **self.counts,
            "fill_rate": self.counts["tokens_packed"] / max(len(self) * options.window, 1),
            **imbalance(self.seconds, options.dp_size, options.gradient_accumulation_steps),
            "mean_delay": float(self.delays.mean()) if len(self.delays) else 0.0,
            "max_delay": int(self.delays.max(initial=0)),
        }


def imbalance(seconds: np.ndarray, dp_size: int, gradient_accumulation_steps: int) -> dict[str, float]:
    """Return how much data-parallel groups lose by waiting for the slowest group: its time divided by the mean.

    `micro_step_imbalance` applies if groups wait for each other in every micro-step, as under FSDP2, and
    `step_imbalance` if they wait at the end of an optimizer step. A last micro-step that does not have a pack for
    every group is ignored.
    """
    micro_steps = np.asarray(seconds)[: len(seconds) // dp_size * dp_size].reshape(-1, dp_size)
    if not len(micro_steps):
        return {"micro_step_imbalance": 1.0, "step_imbalance": 1.0}
    steps = np.add.reduceat(micro_steps, np.arange(0, len(micro_steps), gradient_accumulation_steps))
    return {
        name: float(times.max(1).sum() / times.mean(1).sum())
        for name, times in (("micro_step_imbalance", micro_steps), ("step_imbalance", steps))
    }


def pack_lengths(
    lengths: Sequence[int] | np.ndarray,
    window: int,
    *,
    method: str = "balanced",
    overlong: str = "error",
    max_length: int | None = None,
    cp_size: int = 1,
    dp_size: int = 1,
    gradient_accumulation_steps: int = 1,
    look_ahead: int = 16,
    cost_model: CostModel | None = None,
    seed: int = 0,
    epoch: int = 0,
) -> Packing:
    """Pack the documents of one epoch. Every epoch has the same number of packs.

    Args:
        lengths (`Sequence[int]`): number of tokens of each document.
        window (`int`): number of tokens that a pack has room for.
        method (`str`, *optional*, defaults to `"balanced"`): `"balanced"` gives the packs of a micro-step about the
            same time, and `"best_fit"` leaves as little unused room as possible.
        overlong (`str`, *optional*, defaults to `"error"`): what to do with documents of more than `max_length`
            tokens: `"error"`, `"truncate"` (leave out the tokens beyond it), `"split"` (make each piece a document) or
            `"drop"`.
        max_length (`int`, *optional*): largest number of tokens of a document; defaults to `window`. Packs are better
            balanced if the window is longer.
        cp_size (`int`, *optional*, defaults to 1): number of ranks that share a pack. Every pack has at least this
            many tokens.
        dp_size (`int`, *optional*, defaults to 1): number of data-parallel groups. Each reads one pack per micro-step.
        gradient_accumulation_steps (`int`, *optional*, defaults to 1): number of micro-steps per optimizer step.
        look_ahead (`int`, *optional*, defaults to 16): number of optimizer steps that a long document may wait for
            others of similar length.
        cost_model (`CostModel`, *optional*): cost model of the model and hardware; defaults to Llama 3 8B on H100s.
            Only the share of attention in its times matters.
        seed (`int`, *optional*, defaults to 0): seed of the random order of documents.
        epoch (`int`, *optional*, defaults to 0): number of the epoch. The order differs between epochs.

    Returns:
        `Packing`: packs in the order of optimizer steps.

    Raises:
        PlanError: a document is empty, or too long with `overlong="error"`, there are too few tokens for `cp_size`, or
            an option is invalid.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(empty := np.flatnonzero(lengths < 1)):
        raise PlanError(
            f"Document {empty[0]} has {lengths[empty[0]]} tokens, but every document needs at least one. Leave empty "
            f"documents out ({len(empty)} of {len(lengths)})."
        )
    options = PackingOptions(
        window,
        method=method,
        overlong=overlong,
        max_length=max_length,
        cp_size=cp_size,
        dp_size=dp_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        look_ahead=look_ahead,
        cost_model=cost_model,
    )
    return EpochPacker(lengths, options).pack(seed, epoch)


class EpochPacker:
    """A packer that packs the documents of every epoch into the same number of packs, see [`pack_lengths`].

    Rows of length 0 are left out. Documents with fewer than `cp_size` tokens are too short for a pack of their own, so
    those that are neighbours in the dataset are kept together.
    """

    def __init__(self, lengths: np.ndarray, options: PackingOptions):
        self.options, self.counts = options, Counts()
        fits = (lengths > 0) & (lengths <= options.longest)
        self.counts.add_whole(int(fits.sum()), int(lengths[fits].sum()))
        cut: list[DocumentPart] = []
        for document in np.flatnonzero(lengths > options.longest).tolist():
            parts = options.parts(document, int(lengths[document]))
            self.counts.add(int(lengths[document]), parts)
            cut += parts
        whole = np.flatnonzero(fits)
        columns = np.stack([whole, np.zeros_like(whole), lengths[whole]])
        documents, starts, stops = np.append(columns, np.array(cut, dtype=np.int64).reshape(-1, 3).T, axis=1)
        if not len(documents):
            raise PlanError("There are no documents to pack: the dataset is empty, or all rows were left out.")
        tokens = stops - starts
        unit = _units(tokens, options)
        by_unit = np.argsort(unit, kind="stable")
        self._parts = documents[by_unit], starts[by_unit], stops[by_unit]
        self._offsets = np.append(0, np.bincount(unit).cumsum()).astype(np.int64)
        seconds, heavy = options.times(tokens)
        self._tokens = np.bincount(unit, tokens).astype(np.int64).tolist()
        self._seconds = np.bincount(unit, seconds).tolist()
        self._heavy = (np.bincount(unit, heavy) > 0).tolist()
        self.num_packs = options.packs_for(self._waiting(range(len(self._tokens))), self._spare())

    def _waiting(self, units: Iterable[int]) -> list[Waiting]:
        return [Waiting(self._seconds[unit], unit, self._tokens[unit], 0) for unit in units]

    def _spare(self) -> float:
        """Return the share of spare packs with which a trial does not have to pack many steps again.

        More spare packs are needed if many documents are long for the window, and there are too few short documents to
        fill the room that they leave.
        """
        order = np.random.default_rng(0).permutation(len(self._tokens))[:MOST_TRIED].tolist()
        spare = self.options.spare
        while True:
            packs = self.options.packs_for(self._waiting(order), spare)
            steps, rest = self._steps(order, packs)
            _, again = self._with_rest(steps, rest, packs, most=max(1, len(steps) // 50))
            if again is not None or spare > MOST_SPARE:
                return spare
            spare *= 2

    def pack(self, seed: int = 0, epoch: int = 0) -> Packing:
        """Pack an epoch. Equal seeds and epochs give equal packs."""
        order = np.random.default_rng((seed, epoch)).permutation(len(self._tokens)).tolist()
        packs, _ = self._with_rest(*self._steps(order, self.num_packs), self.num_packs)
        return self._packing(packs)

    def _steps(self, order: list[int], packs: int) -> tuple[list[list[list[Waiting]]], list[Waiting]]:
        """Pack documents in this order into steps of at most `packs` packs in total.

        Returns the packs of each step, and the documents for which there was no room.
        """
        options, coming = self.options, iter(order)
        packer, steps = options.step_packer(), []
        tokens = sum(self._tokens[unit] for unit in order)
        with tqdm(total=packs, **bar_options("Packing", "packs")) as bar:
            while packs:
                size = min(options.step_packs, packs)
                while packer.tokens * packs < tokens * size or packer.documents < size:
                    unit = next(coming, None)
                    if unit is not None:
                        packer.add(unit, self._tokens[unit], self._seconds[unit], self._heavy[unit])
                    elif not packer.release():
                        break
                while packer.waiting_tokens > MOST_WAITING * tokens:
                    packer.release()
                steps.append(packer.step(size))
                packs -= size
                tokens -= sum(document.tokens for pack in steps[-1] for document in pack)
                bar.update(size)
        steps = [arrange(step, options.dp_size, options.gradient_accumulation_steps) for step in steps]
        return steps, packer.take_rest()

    def _with_rest(
        self, steps: list[list[list[Waiting]]], rest: list[Waiting], num_packs: int, most: int | None = None
    ) -> tuple[list[list[Waiting]], int | None]:
        """Add the documents without room by packing the last 1, 2, 4, ... steps again until all documents fit.

        Returns the packs of all steps, and the number of steps that were packed again, or `([], None)` if more than
        `most` steps would have to be.
        """
        options, again = self.options, 1
        if not rest and sum(map(len, steps)) == num_packs:
            return [pack for step in steps for pack in step], 0
        while most is None or again <= most:
            kept, redone = steps[: max(len(steps) - again, 0)], steps[max(len(steps) - again, 0) :]
            documents = rest + [document for step in redone for pack in step for document in pack]
            packs = options.place(documents, num_packs - sum(map(len, kept)))
            if packs is not None:
                packs = arrange(packs, options.dp_size, options.gradient_accumulation_steps)
                return [pack for step in kept for pack in step] + packs, again
            assert kept, "best fit over all documents gave the number of packs"
            again *= 2
        return [], None

    def _packing(self, packs: list[list[Waiting]]) -> Packing:
        units = np.array([document.item for pack in packs for document in pack], dtype=np.int64)
        sizes = self._offsets[units + 1] - self._offsets[units]
        ends = sizes.cumsum()
        where = np.repeat(self._offsets[units] - ends + sizes, sizes) + np.arange(sizes.sum())
        documents, starts, stops = (column[where] for column in self._parts)
        step_of = np.repeat(np.arange(len(packs)) // self.options.step_packs, [len(pack) for pack in packs])
        turn = np.array([document.step for pack in packs for document in pack], dtype=np.int64)
        return Packing(
            documents,
            starts,
            stops,
            offsets=np.append(0, ends)[np.append(0, np.cumsum([len(pack) for pack in packs], dtype=np.int64))],
            seconds=np.array([pack_seconds(pack) for pack in packs]),
            delays=np.repeat(np.abs(step_of - turn), sizes),
            options=self.options,
            counts=self.counts.to_dict(),
        )


def _units(tokens: np.ndarray, options: PackingOptions) -> np.ndarray:
    """Return the unit of each part, (n,) int64.

    The parts of a unit stay together. Parts that are long enough for a pack of their own are units of one part.
    """
    short = tokens < options.cp_size
    unit = np.cumsum(~short) - 1
    units, held = int((~short).sum()), 0
    for part in np.flatnonzero(short).tolist():
        unit[part] = units
        held += int(tokens[part])
        if held >= options.cp_size:
            units, held = units + 1, 0
    if held:
        rest = unit == units
        others = np.bincount(unit[~rest], tokens[~rest]) if len(tokens) > rest.sum() else np.array([options.window])
        if others.min() + held > options.window:
            raise PlanError(
                f"{rest.sum()} documents with {held} tokens in total are too short for a pack of their own with "
                f"cp_size {options.cp_size}, and no other pack has room for them. Leave them out."
            )
        unit[rest] = others.argmin()
    return unit
