"""`PackingOptions` and `Counts`: the options of packing, and counts of packed, dropped and truncated documents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..errors import PlanError
from ..predict import CostModel
from ..predict.model_shape import LLAMA_3_8B
from .packing_steps import StepPacker, Waiting, best_fit, least_time


SPARE_PACKS = {"balanced": 0.03, "best_fit": 0.005}
"""Packing strategies, with the share of packs that each adds to the number that best fit over all documents needs."""

OVERLONG = ("error", "truncate", "split", "drop")

HEAVY_ATTENTION = 0.02
"""A document waits for similar ones if its attention takes more than this share of a full pack's linear time."""


class DocumentPart(NamedTuple):
    """Tokens [start, stop) of a document of the dataset, which form a separate document in their pack."""

    document: int
    start: int
    stop: int


@dataclass(frozen=True)
class PackingOptions:
    """The checked options of [`pack_lengths`], and quantities derived from them."""

    window: int
    method: str = "balanced"
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
        if self.method not in SPARE_PACKS:
            choices = ", ".join(map(repr, SPARE_PACKS))
            raise PlanError(f"There is no packing method {self.method!r}: choose one of {choices}.")
        if self.overlong not in OVERLONG:
            choices = ", ".join(map(repr, OVERLONG))
            raise PlanError(f"overlong is {self.overlong!r}: choose what happens to long documents, one of {choices}.")
        if self.window < 2 * self.cp_size:
            raise PlanError(
                f"A window of {self.window} tokens is too small for cp_size {self.cp_size}: it must have at least two "
                "tokens per rank."
            )
        if self.longest > self.window:
            raise PlanError(
                f"Documents of max_length {self.longest} do not fit in a window of {self.window} tokens: lower "
                "max_length, or leave it out."
            )

    @property
    def longest(self) -> int:
        """Tokens of the longest document that is packed whole."""
        return self.max_length or self.window

    @property
    def step_packs(self) -> int:
        """Packs per optimizer step."""
        return self.dp_size * self.gradient_accumulation_steps

    @property
    def spare(self) -> float:
        """Share of additional packs, see `SPARE_PACKS`."""
        return SPARE_PACKS[self.method]

    def packs_for(self, documents: Sequence[Waiting], spare: float | None = None) -> int:
        """Return how many packs have room for the documents in any order, if a share of `spare` packs is added.

        The number is rounded up to whole optimizer steps if there are enough documents.
        """
        least = len(best_fit(sorted(documents, reverse=True), self.window)[0])
        steps = math.ceil(least * (1 + (self.spare if spare is None else spare)) / self.step_packs)
        return max(least, min(steps * self.step_packs, len(documents)))

    def place(self, documents: Sequence[Waiting], packs: int) -> list[list[Waiting]] | None:
        """Place all documents in this number of packs, or return `None` if they do not fit."""
        documents = sorted(documents, reverse=True)
        for fill in (least_time, best_fit) if self.method == "balanced" else (best_fit,):
            found, left = fill(documents, self.window, packs)
            if not left and len(found) == packs:
                return found
        return None

    def step_packer(self) -> StepPacker:
        """Return a new packer with these options."""
        return StepPacker(self.window, self.method == "balanced", self.dp_size, self.look_ahead)

    def times(self, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the predicted seconds (n,) of documents on one device, and whether each waits for similar ones."""
        model = self.cost_model or CostModel.from_config(LLAMA_3_8B, "h100")
        different, which = np.unique(np.append(lengths, self.window), return_inverse=True)
        linear, attention = model.document_times(different)
        heavy = attention > HEAVY_ATTENTION * linear[-1]
        return (linear + attention)[which[:-1]], heavy[which[:-1]]

    def parts(self, document: int, length: int) -> list[DocumentPart]:
        """Return the parts of a document that are packed, or an empty list if it is dropped."""
        longest = self.longest
        if length <= longest:
            return [DocumentPart(document, 0, length)]
        if self.overlong == "error":
            raise PlanError(
                f"Document {document} has {length} tokens, more than the {longest} that fit. Choose what to do with "
                'such documents: overlong="truncate", "split" or "drop".'
            )
        if self.overlong == "split":
            return [DocumentPart(document, at, min(at + longest, length)) for at in range(0, length, longest)]
        return [DocumentPart(document, 0, longest)] if self.overlong == "truncate" else []


class Counts:
    """Counts of documents and tokens that came in, and how many of them were packed, dropped, truncated or split."""

    def __init__(self):
        names = ("in", "packed", "dropped", "truncated")
        self.documents, self.tokens = dict.fromkeys((*names, "split"), 0), dict.fromkeys(names, 0)

    def count(self, name: str, documents: int, tokens: int) -> None:
        self.documents[name] += documents
        self.tokens[name] += tokens

    def add_whole(self, documents: int, tokens: int) -> None:
        """Count documents that are packed whole."""
        self.count("in", documents, tokens)
        self.count("packed", documents, tokens)

    def add(self, length: int, parts: Sequence[DocumentPart]) -> None:
        """Count a document of `length` tokens, of which `parts` are packed."""
        packed = sum(part.stop - part.start for part in parts)
        self.count("in", 1, length)
        self.count("packed", int(packed > 0), packed)
        if packed < length:
            self.count("truncated" if packed else "dropped", 1, length - packed)
        self.documents["split"] += len(parts) > 1

    def drop(self, documents: int, tokens: int) -> None:
        """Change the count of documents from packed to dropped."""
        self.count("packed", -documents, -tokens)
        self.count("dropped", documents, tokens)

    def to_dict(self) -> dict[str, int]:
        both = (("documents", self.documents), ("tokens", self.tokens))
        return {f"{what}_{name}": number for what, counts in both for name, number in counts.items()}
