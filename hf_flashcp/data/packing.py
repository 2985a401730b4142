"""`pack_lengths`: which documents share a packed row, and which rows an optimizer step, from their lengths alone.

An optimizer step has `dp_size * gradient_accumulation_steps` packs. Documents come in random order and fill one step
after the other; what a step has no room for is first in the next. "balanced" is the variable-length packing of
WLB-LLM (arXiv 2503.17924, section 4): the longest first, each to the pack that takes the least time, while documents
whose attention no mix of others evens out wait until there is one of about their length for every data-parallel
group. Nothing here imports torch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from ..errors import PlanError
from ..planning import CostModel
from ..planning.model_shape import LLAMA_3_8B
from .packing_steps import StepPacker, Waiting, arrange, best_fit, least_time, pack_seconds


SPARE_PACKS = {"balanced": 0.03, "best_fit": 0.005}
"""The strategies, and packs of an epoch beyond those that best fit over all documents needs, as a share of them."""

OVERLONG = ("error", "truncate", "split", "drop")

HEAVY_ATTENTION = 0.02
"""Documents wait for others if their attention takes more than this share of the linear work of a full pack."""

MOST_WAITING = 0.1
"""Of the tokens that are left in an epoch. Else the last steps would have no short documents to fill up with."""


class Piece(NamedTuple):
    """Tokens [start, stop) of document `document` of the dataset: a document of its own in its pack."""

    document: int
    start: int
    stop: int


@dataclass(frozen=True)
class PackingOptions:
    """Options of [`pack_lengths`], checked; with what follows from them."""

    window: int
    strategy: str = "balanced"
    overlong: str = "error"
    max_length: int | None = None
    cp_size: int = 1
    dp_size: int = 1
    gradient_accumulation_steps: int = 1
    look_ahead: int = 16
    cost_model: CostModel | None = None

    def __post_init__(self):
        numbers = ("window", "cp_size", "dp_size", "gradient_accumulation_steps")
        for name in (*numbers, "look_ahead", *(["max_length"] if self.max_length is not None else [])):
            value, least = getattr(self, name), 0 if name == "look_ahead" else 1
            if not isinstance(value, (int, np.integer)) or value < least:
                raise PlanError(f"{name} must be a whole number from {least}, got {value!r}.")
        if self.strategy not in SPARE_PACKS:
            choices = ", ".join(map(repr, SPARE_PACKS))
            raise PlanError(f"There is no packing strategy {self.strategy!r}: choose one of {choices}.")
        if self.overlong not in OVERLONG:
            choices = ", ".join(map(repr, OVERLONG))
            raise PlanError(f"overlong is {self.overlong!r}: choose what happens to long documents, one of {choices}.")
        if self.window < 2 * self.cp_size:
            raise PlanError(
                f"A window of {self.window} tokens is too small for cp_size {self.cp_size}: give it two for each rank."
            )
        if self.longest > self.window:
            raise PlanError(f"Documents of max_length {self.longest} do not fit in a window of {self.window} tokens.")

    @property
    def longest(self) -> int:
        return self.max_length or self.window

    @property
    def step_packs(self) -> int:
        return self.dp_size * self.gradient_accumulation_steps

    @property
    def spare(self) -> float:
        return SPARE_PACKS[self.strategy]

    def packs_for(self, documents: Sequence[Waiting]) -> int:
        """Packs that have room for them in whatever order they come; those of whole steps if there are documents for
        them."""
        least = len(best_fit(sorted(documents, reverse=True), self.window)[0])
        steps = math.ceil(least * (1 + self.spare) / self.step_packs)
        return max(least, min(steps * self.step_packs, len(documents)))

    def place(self, documents: Sequence[Waiting], packs: int) -> list[list[Waiting]] | None:
        """All documents in as many packs, if they fit."""
        documents = sorted(documents, reverse=True)
        for fill in (least_time, best_fit) if self.strategy == "balanced" else (best_fit,):
            found, left = fill(documents, self.window, packs)
            if not left and len(found) == packs:
                return found
        return None

    def step_packer(self) -> StepPacker:
        return StepPacker(self.window, self.strategy == "balanced", self.dp_size, self.look_ahead)

    def times(self, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`(seconds, heavy)` of documents: predicted, on one device; whether they wait for others like them."""
        model = self.cost_model or CostModel.from_config(LLAMA_3_8B, "h100")
        different, which = np.unique(np.append(lengths, self.window), return_inverse=True)
        linear, attention = model.document_times(different)
        heavy = attention > HEAVY_ATTENTION * linear[-1]
        return (linear + attention)[which[:-1]], heavy[which[:-1]]

    def pieces(self, document: int, length: int) -> list[Piece]:
        """Of one document; none if it is dropped.

        Raises:
            PlanError: it is too long, and `overlong` is "error".
        """
        longest = self.longest
        if length <= longest:
            return [Piece(document, 0, length)]
        if self.overlong == "error":
            raise PlanError(
                f"Document {document} has {length} tokens, more than the {longest} that fit. Choose what happens to "
                'such documents: overlong="truncate", "split" or "drop".'
            )
        if self.overlong == "split":
            return [Piece(document, at, min(at + longest, length)) for at in range(0, length, longest)]
        return [Piece(document, 0, longest)] if self.overlong == "truncate" else []


class Counts:
    """What became of documents and their tokens: those in are those packed, dropped and, of tokens, truncated."""

    def __init__(self):
        names = ("packed", "dropped", "truncated", "split")
        self.documents = dict.fromkeys(("in", *names), 0)
        self.tokens = dict.fromkeys(("in", *names[:3]), 0)

    def add(self, length: int, pieces: Sequence[Piece]) -> None:
        packed = sum(piece.stop - piece.start for piece in pieces)
        self.add_whole(1, packed) if packed == length else self._add_cut(length, packed)
        self.documents["split"] += len(pieces) > 1

    def add_whole(self, documents: int, tokens: int) -> None:
        for counts, number in ((self.documents, documents), (self.tokens, tokens)):
            counts["in"] += number
            counts["packed"] += number

    def _add_cut(self, length: int, packed: int) -> None:
        self.documents["in"] += 1
        self.tokens["in"] += length
        self.tokens["packed"] += packed
        self.tokens["truncated" if packed else "dropped"] += length - packed
        self.documents["dropped"] += not packed
        self.documents["packed"] += packed > 0
        self.documents["truncated"] += packed > 0

    def drop(self, documents: int, tokens: int) -> None:
        """Of those packed."""
        for counts, number in ((self.documents, documents), (self.tokens, tokens)):
            counts["packed"] -= number
            counts["dropped"] += number

    def to_dict(self) -> dict[str, int]:
        both = (("documents", self.documents), ("tokens", self.tokens))
        return {f"{what}_{name}": number for what, counts in both for name, number in counts.items()}


@dataclass(frozen=True)
class Packing:
    """Packs in the order in which they are trained on: `dp_size` after each other are a micro-step.

    Args:
        documents, starts, stops (`np.ndarray`): (n,) int64, the pieces, pack after pack.
        offsets (`np.ndarray`): (packs + 1,) int64, where each pack's pieces begin.
        seconds (`np.ndarray`): (packs,) predicted, of a training step on one device.
        delays (`np.ndarray`): (n,) optimizer steps, see [`~Packing.report`].
        options (`PackingOptions`): that it was made with.
        counts (`dict[str, int]`): documents and tokens that came in, and what became of them.
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

    def __getitem__(self, index: int) -> list[Piece]:
        """The pieces of a pack."""
        where = slice(self.offsets[index], self.offsets[index + 1])
        columns = (self.documents[where], self.starts[where], self.stops[where])
        return [Piece(*row) for row in zip(*(column.tolist() for column in columns))]

    def __iter__(self) -> Iterator[list[Piece]]:
        return map(self.__getitem__, range(len(self)))

    def report(self) -> dict[str, Any]:
        """JSON-serializable: `packs`, `documents_in` and `tokens_in`, how many of them were `packed`, `dropped` and
        `truncated`, `documents_split`, and

        - `fill_rate`: tokens packed, over those that the packs have room for;
        - `micro_step_imbalance` and `step_imbalance`, see [`imbalance`];
        - `mean_delay` and `max_delay`: optimizer steps between the one that was being filled when a document's turn
          came in the random order, and the one it is in.
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


def bar_options(description: str, unit: str) -> dict[str, Any]:
    """Of a progress bar for work that may take long, on the first process if that has a terminal."""
    hidden = True if os.environ.get("RANK", "0") != "0" else None
    return {"desc": description, "unit": f" {unit}", "delay": 2, "leave": False, "disable": hidden}


def imbalance(seconds: np.ndarray, dp_size: int, gradient_accumulation_steps: int) -> dict[str, float]:
    """What data-parallel groups lose by waiting for the slowest: its time over the mean, 1.1 if it is a tenth. Where
    groups wait in every micro-step, as under FSDP2, that is `micro_step_imbalance`, where they wait at the end of an
    optimizer step, `step_imbalance`. A last micro-step that not every group has a pack for does not count."""
    micro_steps = np.asarray(seconds)[: len(seconds) // dp_size * dp_size].reshape(-1, dp_size)
    if not len(micro_steps):
        return {"micro_step_imbalance": 1.0, "step_imbalance": 1.0}
    steps = np.add.reduceat(micro_steps, np.arange(0, len(micro_steps), gradient_accumulation_steps))
    return {
        name: float(times.max(1).sum() / times.mean(1).sum())
        for name, times in (("micro_step_imbalance", micro_steps), ("step_imbalance", steps))
    }


def pack_lengths(lengths: Sequence[int] | np.ndarray, window: int, *, seed: int = 0, epoch: int = 0, **options):
    """Packs the documents of one epoch. Every epoch has as many packs.

    Args:
        lengths: tokens of each document.
        window (`int`): tokens that a pack has room for.
        strategy (`str`, *optional*, defaults to `"balanced"`): packs of a micro-step take about the same time.
            `"best_fit"`: they leave as little room as possible.
        overlong (`str`, *optional*, defaults to `"error"`): what happens to documents of more than `max_length`
            tokens: `"error"`, `"truncate"` (tokens beyond it are left out), `"split"` (its pieces are documents of
            their own) or `"drop"`.
        max_length (`int`, *optional*): defaults to `window`. Balance is better with a window above it.
        cp_size (`int`, *optional*, defaults to 1): ranks that share a pack; it gets at least as many tokens.
        dp_size (`int`, *optional*, defaults to 1): data-parallel groups. Each reads one pack of a micro-step.
        gradient_accumulation_steps (`int`, *optional*, defaults to 1): micro-steps of an optimizer step.
        look_ahead (`int`, *optional*, defaults to 16): optimizer steps that a long document may wait for others of
            about its length.
        cost_model (`CostModel`, *optional*): of the model and hardware; defaults to Llama 3 8B on H100s. Only the
            share of attention in its times matters.
        seed, epoch (`int`, *optional*, default to 0): documents have a random order in every epoch.

    Returns:
        [`Packing`]

    Raises:
        PlanError: documents without tokens, too long ones with `overlong="error"`, too few tokens for `cp_size`, or an
            option that is none of those above.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(empty := np.flatnonzero(lengths < 1)):
        raise PlanError(
            f"Document {empty[0]} has {lengths[empty[0]]} tokens, as have {len(empty) - 1} others: a document has at "
            "least one. Leave them out."
        )
    return EpochPacker(lengths, PackingOptions(window, **options)).pack(seed, epoch)


class EpochPacker:
    """Packs documents anew for each epoch, with an equal number of packs; see [`pack_lengths`].

    Documents with fewer than `cp_size` tokens cannot have a pack to themselves: those next to each other in the
    dataset are kept together.

    Args:
        lengths (`np.ndarray`): int64, 0 of what is no document.
        options (`PackingOptions`)
    """

    def __init__(self, lengths: np.ndarray, options: PackingOptions):
        self.options, self.counts = options, Counts()
        fits = (lengths > 0) & (lengths <= options.longest)
        self.counts.add_whole(int(fits.sum()), int(lengths[fits].sum()))
        cut = []
        for document in np.flatnonzero(lengths > options.longest).tolist():
            pieces = options.pieces(document, int(lengths[document]))
            self.counts.add(int(lengths[document]), pieces)
            cut += pieces
        whole = np.flatnonzero(fits)
        pieces = np.concatenate(
            [np.stack([whole, 0 * whole, lengths[whole]], 1), np.array(cut, dtype=np.int64).reshape(-1, 3)]
        )
        if not len(pieces):
            raise PlanError("There are no documents to pack: all rows were left out, or there are none.")
        tokens = pieces[:, 2] - pieces[:, 1]
        unit = _units(tokens, options)
        by_unit = np.argsort(unit, kind="stable")
        self._pieces = pieces[by_unit]
        self._offsets = np.append(0, np.bincount(unit).cumsum()).astype(np.int64)
        seconds, heavy = options.times(tokens)
        self._tokens = np.bincount(unit, tokens).astype(np.int64).tolist()
        self._seconds = np.bincount(unit, seconds).tolist()
        self._heavy = (np.bincount(unit, heavy) > 0).tolist()
        rows = zip(self._seconds, range(len(self._tokens)), self._tokens)
        self.num_packs = options.packs_for([Waiting(*row, 0) for row in rows])

    def pack(self, seed: int = 0, epoch: int = 0) -> Packing:
        """The packs of an epoch: equal seeds and epochs give equal packs."""
        order = np.random.default_rng((seed, epoch)).permutation(len(self._tokens)).tolist()
        options, coming = self.options, iter(order)
        packer, steps = options.step_packer(), []
        tokens, packs = sum(self._tokens), self.num_packs
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
        return self._packing(self._with_rest(steps, packer.take_rest()))

    def _with_rest(self, steps: list[list[list[Waiting]]], rest: list[Waiting]) -> list[list[Waiting]]:
        """The packs of all steps, as many of the last ones packed together as are needed for all documents to fit."""
        options, again = self.options, 1
        if not rest and sum(map(len, steps)) == self.num_packs:
            return [pack for step in steps for pack in step]
        while True:
            kept, redone = steps[: max(len(steps) - again, 0)], steps[max(len(steps) - again, 0) :]
            documents = rest + [document for step in redone for pack in step for document in pack]
            packs = options.place(documents, self.num_packs - sum(map(len, kept)))
            if packs is not None:
                packs = arrange(packs, options.dp_size, options.gradient_accumulation_steps)
                return [pack for step in kept for pack in step] + packs
            assert kept, "best fit over all documents gave the number of packs"
            again *= 2

    def _packing(self, packs: list[list[Waiting]]) -> Packing:
        units = np.array([document.item for pack in packs for document in pack], dtype=np.int64)
        sizes = self._offsets[units + 1] - self._offsets[units]
        ends = sizes.cumsum()
        pieces = self._pieces[np.repeat(self._offsets[units] - ends + sizes, sizes) + np.arange(sizes.sum())]
        step_of = np.repeat(np.arange(len(packs)) // self.options.step_packs, [len(pack) for pack in packs])
        turn = np.array([document.step for pack in packs for document in pack], dtype=np.int64)
        return Packing(
            *pieces.T,
            offsets=np.append(0, ends)[np.append(0, np.cumsum([len(pack) for pack in packs], dtype=np.int64))],
            seconds=np.array([pack_seconds(pack) for pack in packs]),
            delays=np.repeat(np.abs(step_of - turn), sizes),
            options=self.options,
            counts=self.counts.to_dict(),
        )


def _units(tokens: np.ndarray, options: PackingOptions) -> np.ndarray:
    """(n,) which pieces stay together: those that are long enough for a pack are alone."""
    short = tokens < options.cp_size
    unit = np.cumsum(~short) - 1
    units, held = int((~short).sum()), 0
    for piece in np.flatnonzero(short).tolist():
        unit[piece] = units
        held += int(tokens[piece])
        if held >= options.cp_size:
            units, held = units + 1, 0
    if held:
        rest = unit == units
        others = np.bincount(unit[~rest], tokens[~rest]) if len(tokens) > rest.sum() else np.array([options.window])
        if others.min() + held > options.window:
            raise PlanError(
                f"{rest.sum()} documents with {held} tokens in all are too short for a pack of their own, which "
                f"cp_size {options.cp_size} ranks share, and no other has room for them. Leave them out."
            )
        unit[rest] = others.argmin()
    return unit
