"""`ShardPlan`: an exact partition of packed documents over context-parallel ranks."""

from __future__ import annotations

import copy
import hashlib
import json
import operator
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np

from ..errors import PlanError
from .lengths import check_lengths
from .report import plan_report
from .slices import Slice, slices_by_document
from .topology import Topology
from .traffic import full_attention_traffic, traffic_matrix


class ShardPlan:
    """Assigns every token of a packed batch of documents to one context-parallel rank.

    A plain class on purpose: FSDP2 mixed precision rebuilds dataclasses, namedtuples and dicts found among a
    module's keyword arguments on every call, and passes anything else through untouched.

    Args:
        lengths (`Sequence[int]`): tokens of each document, in the order they are packed.
        cp_size (`int`): number of context-parallel ranks.
        slices (`Sequence[Sequence[Slice]]`): for each rank its `(document, start, stop)` slices. They may come in
            any order and may touch; they are stored with documents ascending, a document's slices ascending and
            maximal (never touching). Whether they partition the documents is what [`~ShardPlan.validate`] checks.
        offset_groups (`Sequence[Sequence[int]]`, *optional*): the stages in which full-attention layers exchange KV:
            each ring offset 1 .. cp_size - 1 in one group. In a stage with offset o a rank sends to rank + o and
            receives from rank - o (mod cp_size); while one stage is computed the next ones travel. One stage of all
            offsets if `None`.
        ranks_per_node (`int`, *optional*): of several full nodes; ranks r with equal r // ranks_per_node share one. KV
            that any ranks of another node need then crosses to it once and is handed on inside it; without, each rank
            gets it from where it is. `None` too where all ranks lie in one node, or each in its own.

    Attributes:
        planning_seconds (`float`, *optional*): how long [`plan_documents`] took; no part of the plan's identity.
        content_digest (`str`, *optional*): hash of the batch that the plan is for, set by whoever made the batch and
            compared between ranks; no part of the plan's identity.
        row_lengths (`tuple[int, ...]`, *optional*): tokens of each dataset row of that batch, likewise.

    Raises:
        PlanError: lengths, cp_size, offset groups or nodes that no plan can have, or slices that are not triples of
            integers.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        cp_size: int,
        slices: Sequence[Sequence[Slice]],
        offset_groups: Sequence[Sequence[int]] | None = None,
        ranks_per_node: int | None = None,
    ):
        self.lengths, self.cp_size = check_lengths(lengths, cp_size)
        self.offset_groups = _check_offset_groups(offset_groups, self.cp_size)
        self.ranks_per_node = _check_nodes(ranks_per_node, self.cp_size)
        self._moved: dict[int | None, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        self._traffic: dict[int | None, np.ndarray] = {}
        self.planning_seconds: float | None = None
        self.content_digest: str | None = None
        self.row_lengths: tuple[int, ...] | None = None
        try:
            self.slices = tuple(_maximal_slices(rank_slices) for rank_slices in slices)
        except (TypeError, ValueError):
            raise PlanError("slices must hold, for each rank, (document, start, stop) triples of integers.") from None

    def __repr__(self) -> str:
        cuts = sum(map(len, self.slices)) - len(self.lengths)
        sizes = f"documents={len(self.lengths)}, tokens={self.num_tokens}, cp_size={self.cp_size}, cuts={cuts}"
        stages = "" if self.offset_groups is None else f", offset_groups={self.offset_groups}"
        nodes = "" if self.ranks_per_node is None else f", ranks_per_node={self.ranks_per_node}"
        return f"ShardPlan({sizes}{stages}{nodes})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ShardPlan) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __getstate__(self) -> dict[str, Any]:
        # What has been counted is counted again where it is needed: a data loader worker sends the plan alone.
        return {**vars(self), "_moved": {}, "_traffic": {}}

    def _key(self):
        return self.lengths, self.cp_size, self.slices, self.offset_groups, self.ranks_per_node

    @cached_property
    def num_tokens(self) -> int:
        """Tokens of the whole packed batch."""
        return sum(self.lengths)

    @cached_property
    def longest_document(self) -> int:
        """Tokens of the longest document."""
        return max(self.lengths)

    @property
    def stage_offsets(self) -> Sequence[Sequence[int]]:
        """The ring offsets of each stage of a full-attention layer."""
        return [range(1, self.cp_size)] if self.offset_groups is None else self.offset_groups

    @cached_property
    def digest(self) -> str:
        """Hash of lengths, cp_size, slices and, where they are set, offset groups and ranks per node; equal on every
        machine and Python version for equal plans."""
        parts: list[Any] = [self.lengths, self.cp_size, self.slices]
        if self.offset_groups is not None:
            parts.append(self.offset_groups)
        if self.ranks_per_node is not None:
            parts.append(self.ranks_per_node)
        canonical = json.dumps(parts, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def with_offset_groups(self, offset_groups: Sequence[Sequence[int]] | None) -> ShardPlan:
        """The same partition, exchanged in other stages.

        Raises:
            PlanError: groups that do not hold each ring offset once.
        """
        return self._exchanged(offset_groups, self.ranks_per_node)

    def with_ranks_per_node(self, ranks_per_node: int | None) -> ShardPlan:
        """The same partition, with ranks in nodes to each of which rows cross once, or directly between ranks.

        Raises:
            PlanError: no positive whole number, or nodes that would not be full.
        """
        return self._exchanged(self.offset_groups, ranks_per_node)

    def _exchanged(self, offset_groups: Sequence[Sequence[int]] | None, ranks_per_node: int | None) -> ShardPlan:
        plan = copy.copy(self)
        plan.offset_groups = _check_offset_groups(offset_groups, self.cp_size)
        plan.ranks_per_node = _check_nodes(ranks_per_node, self.cp_size)
        plan._moved, plan._traffic = self._moved, self._traffic
        vars(plan).pop("digest", None)
        return plan

    def validate(self) -> ShardPlan:
        """Returns the plan itself if its slices partition the documents and no rank is empty.

        Raises:
            PlanError: naming the first rank, document and tokens that are wrong.
        """
        if len(self.slices) != self.cp_size:
            raise PlanError(f"The plan has slices for {len(self.slices)} ranks, but cp_size is {self.cp_size}.")
        for rank, rank_slices in enumerate(self.slices):
            if not rank_slices:
                raise PlanError(f"Rank {rank} holds no tokens: every rank needs at least one.")
            for document, start, stop in rank_slices:
                if not 0 <= document < len(self.lengths):
                    raise PlanError(
                        f"Rank {rank} holds a slice of document {document}, but the plan has "
                        f"{len(self.lengths)} documents."
                    )
                if not 0 <= start < stop <= self.lengths[document]:
                    raise PlanError(
                        f"Rank {rank} holds tokens [{start}, {stop}) of document {document}, "
                        f"which has {self.lengths[document]} tokens."
                    )
        held = slices_by_document(self.slices)
        for document, length in enumerate(self.lengths):
            if document not in held:
                raise PlanError(f"Document {document} is on no rank.")
            position = 0
            for start, stop, rank in (*held[document], (length, length, -1)):
                if start > position:
                    raise PlanError(f"Tokens [{position}, {start}) of document {document} are on no rank.")
                if rank >= 0 and start < position:
                    raise PlanError(
                        f"Tokens of document {document} from {start} are on rank {rank} and on another rank."
                    )
                position = stop
        return self

    def report(self, window: int | None = None, topology: Topology | None = None) -> dict[str, Any]:
        """What the plan costs in one layer, counted exactly from its slices (FlashCP eq. 2 to 5, with point-to-point
        exchange).

        Args:
            window (`int`, *optional*): of a sliding-window layer, in tokens, as transformers counts it: keys that a
                query sees, itself included. Full attention if `None`.
            topology (`Topology`, *optional*): ranks in nodes, to count apart what stays in one.

        Returns:
            `dict`: per rank `tokens`, `pairs` (causal attention pairs inside documents), `kv_received` and
            `kv_sent` (tokens whose K and V travel in the forward of the layer); `kv_total`,
            `kv_all_gather` (what an all-gather of every KV receives), `kv_fraction` (their ratio),
            `token_imbalance` and `pair_imbalance` (max / mean over ranks). The backward of the layer sends the
            gradients of the received tokens home: `grad_received` and `grad_sent`, also in tokens.
            [`kv_bytes`] turns tokens into bytes.

            Also per rank, of forward and backward together: `collectives` (two per stage, the same on every rank, none
            if no KV moves), `kernel_calls` (of a kernel that takes any number of sequences: one for what is local and
            one for each stage that brings something, both ways) and `copies` of rows from buffer to buffer (see
            [`~calls.full_attention_calls`]). They are those of a layer that keeps the KV it receives until backward.

            With a topology, or for a plan with `ranks_per_node`, also per rank `intra_node_received`,
            `intra_node_sent`, `inter_node_received` and `inter_node_sent`: tokens that go inside its node and between
            nodes. They add up to `kv_received` and `kv_sent` where each rank sends to those that need it. In
            a hierarchical exchange tokens on their way to others are counted too, `collectives` are four per stage,
            and handing rows on copies them besides.

        Raises:
            PlanError: a window below 1.
        """
        if window is not None and window < 1:
            raise PlanError(f"A sliding window holds at least 1 key, the query's own; got {window}.")
        return plan_report(self, window, self.ranks_per_node if topology is None else topology.ranks_per_node)

    def kv_moved(self, window: int | None = None) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """`(received, sent)`: tokens whose K and V each rank receives and sends in the forward of one layer, counted
        once per plan and window."""
        window = self.hiding_window(window)
        if window not in self._moved:
            if window is None:
                received, sent = full_attention_traffic(self.slices)
            else:
                traffic = self.kv_traffic(window)
                received, sent = traffic.sum(0).tolist(), traffic.sum(1).tolist()
            self._moved[window] = tuple(received), tuple(sent)
        return self._moved[window]

    def kv_traffic(self, window: int | None = None) -> np.ndarray:
        """(cp_size, cp_size) int64: tokens whose K and V travel in a layer's forward, from the rank of the row to
        that of the column, zero on the diagonal. They are counted once per plan and window; do not write to them. The
        backward sends gradients along the transpose."""
        window = self.hiding_window(window)
        if window not in self._traffic:
            self._traffic[window] = traffic_matrix(self.slices, window)
        return self._traffic[window]

    def hiding_window(self, window: int | None) -> int | None:
        """The sliding window of a layer in tokens, or `None` where no document is longer: attention computes such a
        layer as full attention."""
        return None if window is None or window >= self.longest_document else window

    def to_dict(self) -> dict[str, Any]:
        """JSON-serializable form, read back by [`~ShardPlan.from_dict`]."""
        data = {
            "lengths": list(self.lengths),
            "cp_size": self.cp_size,
            "slices": [[list(piece) for piece in rank_slices] for rank_slices in self.slices],
        }
        if self.offset_groups is not None:
            data["offset_groups"] = [list(group) for group in self.offset_groups]
        if self.ranks_per_node is not None:
            data["ranks_per_node"] = self.ranks_per_node
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ShardPlan:
        """Reads [`~ShardPlan.to_dict`]'s form and validates it.

        Raises:
            PlanError: no dict, a missing key, anything but integers, slices or offset groups that are no partition, or
                nodes that are not full.
        """
        if not isinstance(data, Mapping):
            raise PlanError(f"A plan is read from a dict, got {type(data).__name__}.")
        missing = [key for key in ("lengths", "cp_size", "slices") if key not in data]
        if missing:
            raise PlanError(f"A plan needs the keys lengths, cp_size and slices; {', '.join(missing)} is missing.")
        optional = data.get("offset_groups"), data.get("ranks_per_node")
        plan = cls(data["lengths"], data["cp_size"], data["slices"], *optional)
        nested = chain(chain.from_iterable(data["slices"]), data.get("offset_groups") or ())
        if bool in set(map(type, chain([data["cp_size"]], data["lengths"], chain.from_iterable(nested)))):
            raise PlanError("A plan has true or false where whole numbers belong.")
        return plan.validate()


def _check_offset_groups(
    offset_groups: Sequence[Sequence[int]] | None, cp_size: int
) -> tuple[tuple[int, ...], ...] | None:
    if offset_groups is None:
        return None
    try:
        groups = tuple(tuple(sorted(map(operator.index, group))) for group in offset_groups)
    except TypeError:
        raise PlanError(f"offset_groups are groups of whole numbers, got {reprlib.repr(offset_groups)}.") from None
    found = sorted(offset for group in groups for offset in group)
    if len(found) != cp_size - 1 or found != list(range(1, cp_size)) or not all(groups):
        raise PlanError(
            f"offset_groups are {[list(group) for group in groups]}, but for cp_size {cp_size} they hold each ring "
            f"offset from 1 to {cp_size - 1} once, and no group is empty. Leave them out for one stage."
        )
    return groups


def _check_nodes(ranks_per_node: int | None, cp_size: int) -> int | None:
    if ranks_per_node is None:
        return None
    topology = Topology(ranks_per_node)
    topology.require_full_nodes(cp_size)
    return ranks_per_node if 1 < ranks_per_node < cp_size else None


def _maximal_slices(slices: Iterable[Slice]) -> tuple[Slice, ...]:
    """Sorts by document and start, and joins slices of one document that touch."""
    joined: list[tuple[int, int, int]] = []
    previous_document = previous_stop = -1
    for document, start, stop in sorted(tuple(map(operator.index, piece)) for piece in slices):
        if document == previous_document and start == previous_stop:
            start = joined.pop()[1]
        joined.append((document, start, stop))
        previous_document, previous_stop = document, stop
    return tuple(map(Slice._make, joined))
