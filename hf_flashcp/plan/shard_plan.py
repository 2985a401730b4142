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
from .copied_bytes import RowBytes
from .lengths import check_lengths
from .moved import kv_moved, window_moved
from .partition import is_partition, require_partition
from .report import plan_report
from .slice_table import SliceColumns, SliceTable
from .slices import Slice
from .topology import Topology
from .traffic import traffic_matrix


class ShardPlan:
    """A plan, which assigns every token of a packed batch of documents to one context-parallel rank.

    This is a plain class on purpose. FSDP2's mixed precision rebuilds the dataclasses, namedtuples and dicts among a
    module's keyword arguments on every call, and passes other objects through untouched.

    Args:
        lengths (`Sequence[int]`): tokens of each document, in packed order.
        cp_size (`int`): number of context-parallel ranks.
        slices (`Sequence[Sequence[Slice]]`): the `(document, start, stop)` slices of each rank. They may be in any
            order, and slices of a document may be adjacent. They are stored in ascending order, adjacent ones joined.
            [`~ShardPlan.validate`] checks that they partition the documents.
        offset_groups (`Sequence[Sequence[int]]`, *optional*): the stages in which full-attention layers exchange KV.
            Each ring offset from 1 to cp_size - 1 is in exactly one group. In the stage with offset o a rank sends to
            rank + o and receives from rank - o (mod cp_size). While one stage is computed, the next ones travel. By
            default a single stage has all offsets.
        ranks_per_node (`int`, *optional*): number of ranks on each node; ranks r with equal r // ranks_per_node share
            a node. KV is then sent to each node that needs it once, and forwarded inside the node. By default each
            rank receives KV directly from the rank that holds it. The value is stored as `None` if all ranks share
            one node, or if each has its own.

    Attributes:
        columns (`SliceColumns`): the slices as arrays, rank by rank, in the order of `slices`. Do not write to them.
        planning_seconds (`float`, *optional*): how long [`plan_documents`] took; ignored when plans are compared.
        content_digest (`str`, *optional*): hash of the batch that the plan was made for. The code that makes the batch
            sets it, and ranks compare it with each other; ignored when plans are compared.
        row_lengths (`tuple[int, ...]`, *optional*): tokens of each dataset row of that batch; ignored when plans are
            compared.
        checked_keys (`frozenset[str]`): which of that batch's mask and labels have been checked, so that
            [`shard_inputs`] need not read them; ignored when plans are compared.

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
        self.checked_keys: frozenset[str] = frozenset()
        self.columns = self._read(slices)

    def __repr__(self) -> str:
        cuts = len(self.columns.documents) - len(self.lengths)
        sizes = f"documents={len(self.lengths)}, tokens={self.num_tokens}, cp_size={self.cp_size}, cuts={cuts}"
        stages = "" if self.offset_groups is None else f", offset_groups={self.offset_groups}"
        nodes = "" if self.ranks_per_node is None else f", ranks_per_node={self.ranks_per_node}"
        return f"ShardPlan({sizes}{stages}{nodes})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ShardPlan) or self._sizes() != other._sizes():
            return False
        return self.columns.same(other.columns)

    def __hash__(self) -> int:
        return hash((self._sizes(), *(column.tobytes() for column in self.columns)))

    def __getstate__(self) -> dict[str, Any]:
        # Cached values are left out, so that a data loader worker sends only the plan. They are made again on demand.
        kept = {name: value for name, value in vars(self).items() if name not in ("slices", "slice_table")}
        return {**kept, "_moved": {}, "_traffic": {}}

    def _sizes(self):
        return self.lengths, self.cp_size, self.offset_groups, self.ranks_per_node

    def _read(self, slices: Iterable[Iterable[Slice]]) -> SliceColumns:
        try:
            return SliceColumns.of(slices).maximal()
        except OverflowError:
            # No document is that long, so this raises an error.
            exact = [sorted(Slice(*map(operator.index, piece)) for piece in held) for held in slices]
            require_partition(exact, self.lengths, self.cp_size)
            raise
        except (TypeError, ValueError):
            raise PlanError("slices must hold, for each rank, (document, start, stop) triples of integers.") from None

    @classmethod
    def from_columns(
        cls,
        lengths: Sequence[int],
        cp_size: int,
        columns: SliceColumns,
        offset_groups: Sequence[Sequence[int]] | None = None,
        ranks_per_node: int | None = None,
    ) -> ShardPlan:
        """Make a plan whose slices are arrays. The other arguments are those of the class.

        Args:
            columns (`SliceColumns`): the `counts` of the slices of each rank, and their `documents`, `starts` and
                `stops`, rank by rank, as int64 arrays.
        """
        plan = cls(lengths, cp_size, (), offset_groups, ranks_per_node)
        plan.columns = columns.maximal()
        return plan

    @cached_property
    def slices(self) -> tuple[tuple[Slice, ...], ...]:
        """The slices of each rank in ascending order, adjacent slices of a document joined."""
        return tuple(map(tuple, self.columns.slices()))

    @cached_property
    def num_tokens(self) -> int:
        """Number of tokens in the whole packed batch."""
        return sum(self.lengths)

    @cached_property
    def longest_document(self) -> int:
        """Length of the longest document, in tokens."""
        return max(self.lengths)

    @cached_property
    def slice_table(self) -> SliceTable:
        """The slices as arrays. They are shared between callers: do not write to them."""
        return SliceTable.of_columns(self.columns)

    @property
    def stage_offsets(self) -> Sequence[Sequence[int]]:
        """The ring offsets of each stage of a full-attention layer."""
        return [range(1, self.cp_size)] if self.offset_groups is None else self.offset_groups

    @cached_property
    def digest(self) -> str:
        """Hash of everything that identifies the plan: lengths, cp_size, slices, offset groups and ranks per node.

        Equal plans have equal digests on every machine and with every Python version.
        """
        parts: list[Any] = [self.lengths, self.cp_size, self.columns.nested()]
        if self.offset_groups is not None:
            parts.append(self.offset_groups)
        if self.ranks_per_node is not None:
            parts.append(self.ranks_per_node)
        canonical = json.dumps(parts, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def with_offset_groups(self, offset_groups: Sequence[Sequence[int]] | None) -> ShardPlan:
        """Return a plan with the same slices that exchanges KV in other stages.

        Raises:
            PlanError: groups that do not contain each ring offset exactly once.
        """
        return self._exchanged(offset_groups, self.ranks_per_node)

    def with_ranks_per_node(self, ranks_per_node: int | None) -> ShardPlan:
        """Return a plan with the same slices that sends KV to each node once, or directly between ranks if `None`.

        Raises:
            PlanError: `ranks_per_node` is not a positive whole number, or the ranks do not fill their nodes.
        """
        return self._exchanged(self.offset_groups, ranks_per_node)

    def _exchanged(self, offset_groups: Sequence[Sequence[int]] | None, ranks_per_node: int | None) -> ShardPlan:
        plan = copy.copy(self)
        vars(plan).update(vars(self))  # with cached values
        plan.offset_groups = _check_offset_groups(offset_groups, self.cp_size)
        plan.ranks_per_node = _check_nodes(ranks_per_node, self.cp_size)
        vars(plan).pop("digest", None)
        return plan

    def validate(self) -> ShardPlan:
        """Check that the slices partition the documents and that no rank is empty; return the plan itself.

        Raises:
            PlanError: the plan is not valid. The message names the first wrong rank, document and tokens.
        """
        if not is_partition(self.columns, self.lengths, self.cp_size):
            require_partition(self.slices, self.lengths, self.cp_size)
        return self

    def report(
        self,
        window: int | None = None,
        topology: Topology | None = None,
        kernel: str | None = None,
        query_heads: int = 32,
        kv_heads: int = 8,
        head_dim: int = 128,
        itemsize: int = 2,
    ) -> dict[str, Any]:
        """Return the costs of the plan in one attention layer, counted exactly from its slices.

        The counts follow FlashCP eq. 2 to 5, with a point-to-point exchange.

        Args:
            window (`int`, *optional*): sliding window of the layer in tokens, as transformers counts it: the number of
                keys that a query sees, its own included. Full attention if `None`.
            topology (`Topology`, *optional*): the ranks' nodes, to count traffic inside and between nodes separately.
            kernel (`str`, *optional*): name of a varlen kernel ([`~kernel_calls.GRIDS`]), to count its calls and
                thread blocks.
            query_heads (`int`, *optional*, defaults to 32): number of query heads of the layer. How rectangles are
                divided into calls depends on it.
            kv_heads (`int`, *optional*, defaults to 8): number of KV heads, for `bytes_copied`, like the next two.
            head_dim (`int`, *optional*, defaults to 128): elements of a head.
            itemsize (`int`, *optional*, defaults to 2): bytes per element.

        Returns:
            `dict`: per rank, `tokens`, `pairs` (causal attention pairs inside documents), `kv_received` and `kv_sent`
            (tokens whose K and V travel in the layer's forward), and `grad_received` and `grad_sent` (tokens whose KV
            gradients travel in its backward, to the ranks that hold the tokens). For the whole plan, `kv_total` (sum
            of `kv_received`), `kv_all_gather` (what an all-gather of all KV would receive), `kv_fraction` (the ratio
            of the two), `token_imbalance` and `pair_imbalance` (max / mean over ranks). [`kv_bytes`] converts tokens
            to bytes.

            For a recurrent layer, also per rank, `states_received` and `states_sent` (slices of documents that are
            cut, whose states travel in the layer's forward to all ranks with later slices of the document), and
            `state_grads_received` and `state_grads_sent` (slices whose gradients travel in its backward, to all ranks
            with earlier ones). A layer's gradient has as many bytes as its state. Attention layers send none of these.

            Also per rank, for forward and backward together: `collectives` (two per stage, the same on every rank, 0
            if no KV travels), `kernel_calls` (of a kernel that takes any number of sequences: in each direction one
            for the local slices and one for each stage that brings keys), and `copies` (passes over rows, see
            [`~calls.full_attention_calls`]). The counts assume that the layer keeps received KV until backward.

            With a topology, or if the plan has `ranks_per_node`, also per rank `intra_node_received`,
            `intra_node_sent`, `inter_node_received` and `inter_node_sent`: tokens that travel inside the node and
            between nodes. In a direct exchange they add up to `kv_received` and `kv_sent`. In a hierarchical exchange
            they also count tokens that a rank forwards, `collectives` are four per stage, and forwarding rows takes
            further copies, which `copies` does not count.

            With a kernel, also per rank, for forward and backward together: `varlen_calls` (at least `kernel_calls`,
            as rectangles whose keys overlap take several calls, and so do very different lengths), `blocks_started`
            and `blocks_useful` (thread blocks per query head that the calls start, and those that have queries or
            keys, see [`~kernel_calls`]), and `bytes_copied` (bytes read and written to pack, merge and add rows
            outside of the kernel, see [`~copied_bytes`]; like `copies`, without those of a hierarchical exchange).

        Raises:
            PlanError: a window or a size below 1, or no varlen kernel of that name.
        """
        if window is not None and window < 1:
            raise PlanError(f"A sliding window holds at least 1 key, the query's own; got {window}.")
        sizes = {"query_heads": query_heads, "kv_heads": kv_heads, "head_dim": head_dim, "itemsize": itemsize}
        for name, size in sizes.items():
            if size < 1:
                raise PlanError(f"The sizes of a layer are at least 1, got {name}={size}.")
        ranks_per_node = self.ranks_per_node if topology is None else topology.ranks_per_node
        return plan_report(self, window, ranks_per_node, kernel, query_heads, RowBytes.of(*sizes.values()))

    def kv_moved(self, window: int | None = None) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return `(received, sent)`, the tokens whose K and V each rank receives and sends in a layer's forward.

        The counts are computed once per plan and window.
        """
        window = self.hiding_window(window)
        if window not in self._moved:
            self._moved[window] = kv_moved(self) if window is None else window_moved(self, window)
        return self._moved[window]

    def kv_traffic(self, window: int | None = None) -> np.ndarray:
        """Return the tokens whose K and V travel between each two ranks in the forward of one layer.

        The array is (cp_size, cp_size) int64, with a row per sender, a column per receiver and zeros on the diagonal.
        Backward sends gradients along its transpose. It is computed once per plan and window and shared between
        callers: do not write to it.
        """
        window = self.hiding_window(window)
        if window not in self._traffic:
            self._traffic[window] = traffic_matrix(self.slices, window)
        return self._traffic[window]

    def hiding_window(self, window: int | None) -> int | None:
        """Return `window`, a sliding window in tokens, or `None` if no document is longer than it.

        Attention computes a layer whose window hides no token as full attention.
        """
        return None if window is None or window >= self.longest_document else window

    def to_dict(self) -> dict[str, Any]:
        """Return the plan in a JSON-serializable form, which [`~ShardPlan.from_dict`] reads."""
        data = {
            "lengths": list(self.lengths),
            "cp_size": self.cp_size,
            "slices": self.columns.nested(),
        }
        if self.offset_groups is not None:
            data["offset_groups"] = [list(group) for group in self.offset_groups]
        if self.ranks_per_node is not None:
            data["ranks_per_node"] = self.ranks_per_node
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ShardPlan:
        """Read the form that [`~ShardPlan.to_dict`] returns, and validate it.

        Raises:
            PlanError: `data` is not a dict, lacks a key, holds anything other than integers, or its slices, offset
                groups or nodes are not valid.
        """
        if not isinstance(data, Mapping):
            raise PlanError(f"A plan is read from a dict, got {type(data).__name__}. Pass what to_dict returned.")
        missing = [key for key in ("lengths", "cp_size", "slices") if key not in data]
        if missing:
            raise PlanError(f"A plan needs the keys lengths, cp_size and slices. Missing: {', '.join(missing)}.")
        optional = data.get("offset_groups"), data.get("ranks_per_node")
        plan = cls(data["lengths"], data["cp_size"], data["slices"], *optional)
        nested = chain(chain.from_iterable(data["slices"]), data.get("offset_groups") or ())
        if bool in set(map(type, chain([data["cp_size"]], data["lengths"], chain.from_iterable(nested)))):
            raise PlanError("A plan has true or false where whole numbers belong. Write whole numbers instead.")
        return plan.validate()


def _check_offset_groups(
    offset_groups: Sequence[Sequence[int]] | None, cp_size: int
) -> tuple[tuple[int, ...], ...] | None:
    if offset_groups is None:
        return None
    try:
        groups = tuple(tuple(sorted(map(operator.index, group))) for group in offset_groups)
    except TypeError:
        raise PlanError(
            f"offset_groups are groups of whole numbers, got {reprlib.repr(offset_groups)}. Pass lists of integers."
        ) from None
    found = sorted(offset for group in groups for offset in group)
    if len(found) != cp_size - 1 or found != list(range(1, cp_size)) or not all(groups):
        raise PlanError(
            f"offset_groups are {[list(group) for group in groups]}, but for cp_size {cp_size} they must hold each "
            f"ring offset from 1 to {cp_size - 1} exactly once, in groups that are not empty. Leave offset_groups out "
            "for a single stage."
        )
    return groups


def _check_nodes(ranks_per_node: int | None, cp_size: int) -> int | None:
    if ranks_per_node is None:
        return None
    topology = Topology(ranks_per_node)
    topology.require_full_nodes(cp_size)
    return ranks_per_node if 1 < ranks_per_node < cp_size else None
