"""Baselines: how other implementations of context parallelism run a layer, with their kernels, copies and transfers.

Every baseline is given its best case: documents are not padded, kernel calls that could be combined are one call,
nothing runs between kernels, collectives cross InfiniBand once per node, and only data that has to change its place is
copied.

    baseline       computed by each rank          sent between ranks
    llama3         zigzag of the packed row       all KV: all-gather before attention, reduce-scatter in backward
    per_doc_cp     zigzag of every document       the same
    flashcp_paper  FlashCP's Algorithm 1          the same, for the most tokens that any rank shares (eq. 5)
    ring           every document in N pieces     KV in N - 1 hops, each during the computation of the hop before it;
                                                  gradients likewise, in fp32
    zigzag_ring    zigzag of every document       the same
    ulysses        all documents, some heads      queries, keys, values and outputs, by all-to-all
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..plan.shard_plan import ShardPlan
from ..plan.slices import Lengths, Slice, Slices
from ..planning.algorithm1 import flashcp
from ..planning.caps import Caps
from ..planning.sharding import per_doc, per_seq
from ..predict.cost_model import CostModel, LayerCosts
from ..predict.layer_work import Rectangles
from ..predict.model_shape import AttentionLayers
from ..predict.timeline import PassTimes, Timeline


_FP32 = 4


class Layer(LayerCosts):
    """Predicts the times of one attention layer under a plan, with collectives between equal nodes.

    Numbers of received bytes are (2, cp_size): inside nodes and between nodes.
    """

    plan: ShardPlan

    @property
    def ranks_in_node(self) -> int:
        """Number of the group's ranks on each node."""
        return min(self.model.hardware.ranks_per_node, self.cp_size)

    @property
    def kv_bytes(self) -> int:
        """Bytes of a token's K and V."""
        return self.layers.kv_elements_per_token * self.model.itemsize

    @property
    def most_tokens(self) -> int:
        """Number of tokens per rank if all ranks have equally many, rounded up."""
        return -(-self.plan.num_tokens // self.cp_size)

    def copy_seconds(self, bytes_touched: float) -> np.ndarray:
        """Return the time to read and write some number of bytes, reads and writes together."""
        return np.full(self.cp_size, bytes_touched / self.model.hardware.memory_bytes_per_second)

    def gathered(self, bytes_each: float) -> np.ndarray:
        """Return the bytes that ranks receive in an all-gather of `bytes_each` per rank, which enter a node once."""
        crossing = self.cp_size // self.ranks_in_node - 1
        return np.outer([self.cp_size - 1 - crossing, crossing], np.full(self.cp_size, bytes_each))

    def exchanged(self, bytes_each: float) -> np.ndarray:
        """Return the bytes that ranks receive in an all-to-all of `bytes_each` between every two ranks."""
        inside = self.ranks_in_node - 1
        return np.outer([inside, self.cp_size - 1 - inside], np.full(self.cp_size, bytes_each))

    def hop(self, bytes_each: np.ndarray) -> np.ndarray:
        """Return the bytes that ranks receive when each gets `bytes_each`, (cp_size,), from the rank before it."""
        enters = (np.arange(self.cp_size) % self.ranks_in_node == 0) & (self.ranks_in_node < self.cp_size)
        return np.array([bytes_each * ~enters, bytes_each * enters])


def shared_tokens(plan: ShardPlan) -> int:
    """Return the tokens that each rank contributes to the padded all-gather of FlashCP eq. 5: the most of any rank.

    The last slice of a document is not shared, because no other rank needs it.
    """
    columns = plan.columns
    shared = columns.stops != np.array(plan.lengths)[columns.documents]
    return int(columns.sums(columns.tokens * shared).max())


@dataclass(frozen=True)
class AllGather:
    """Attention after an all-gather of KV. In backward, the gradients of the gathered KV take the opposite way.

    Gathered KV is put in the order of documents. Each slice then attends to its document up to its own end.

    Args:
        shared_alone (`bool`, *optional*, defaults to `False`): gather only the tokens that other ranks need, packed
            and padded to the same number on every rank, instead of all tokens.
    """

    shared_alone: bool = False

    def given(self, layer: Layer) -> int:
        """Return the number of tokens that each rank contributes."""
        return shared_tokens(layer.plan) if self.shared_alone else layer.most_tokens

    def received(self, layer: Layer) -> np.ndarray:
        """Return the bytes that each rank receives in forward."""
        return layer.gathered(self.given(layer) * layer.kv_bytes)

    def held(self, layer: Layer) -> int:
        """Return the number of tokens of other ranks whose KV a rank holds at a time."""
        return (layer.cp_size - 1) * self.given(layer)

    def passes(self, layer: Layer) -> tuple[PassTimes, PassTimes]:
        """Predict the times of forward and backward."""
        return self._pass(layer, backward=False), self._pass(layer, backward=True)

    def _pass(self, layer: Layer, backward: bool) -> PassTimes:
        columns = layer.plan.columns
        slices = Rectangles(columns.ranks, columns.tokens, columns.starts)
        kernel = layer.kernel_seconds(slices, causal=True, backward=backward)
        line, moved = Timeline(layer.cp_size), self.given(layer)
        if not moved:
            line.kernel(kernel)
            return line.times()
        packing = layer.copy_seconds(self.shared_alone * 2 * moved * layer.kv_bytes)
        ordering = layer.copy_seconds(2 * layer.cp_size * moved * layer.kv_bytes)
        wire = layer.model.hardware.wire_seconds(self.received(layer))
        if backward:
            line.kernel(kernel)
            line.copy(packing, line.collective(wire, line.copy(ordering)))
        else:
            line.copy(ordering, line.collective(wire, line.copy(packing)))
            line.kernel(kernel)
        return line.times()


def in_order(lengths: Lengths, cp_size: int) -> Slices:
    """Cut every document into N nearly equal pieces, one for each rank in order."""
    cuts = (np.arange(cp_size + 1) * np.array(lengths)[:, None] // cp_size).tolist()
    return [
        [Slice(document, row[rank], row[rank + 1]) for document, row in enumerate(cuts) if row[rank] < row[rank + 1]]
        for rank in range(cp_size)
    ]


class RingPieces(NamedTuple):
    """Numbers of tokens in the ranks' pieces of documents, (documents, cp_size) int64 each.

    Along a document the ranks ascend from piece to piece, then in a zigzag descend.
    """

    early: np.ndarray  # pieces in the ascending part
    late: np.ndarray  # pieces in the descending part

    @classmethod
    def of(cls, plan: ShardPlan) -> RingPieces:
        """Return the pieces of a plan."""
        both = np.zeros((2, len(plan.lengths), plan.cp_size), dtype=np.int64)
        table = plan.slice_table.by_position
        late = np.append(0, (table.ranks[1:] < table.ranks[:-1]) & (table.documents[1:] == table.documents[:-1]))
        np.add.at(both, (late, table.documents, table.ranks), table.spans.lengths)
        return cls(*both)

    def local(self) -> Rectangles:
        """Return the squares that ranks compute from their own KV."""
        tokens = self.early + self.late
        documents, ranks = np.nonzero(tokens)
        return Rectangles(ranks, tokens[documents, ranks], np.zeros_like(ranks))

    def remote(self, step: int) -> Rectangles:
        """Return the rectangles that ranks compute when KV has made `step` hops.

        If the KV comes from an earlier rank, all queries of a rank see its first piece. If it comes from a later rank,
        the queries of the second piece see all of it.
        """
        ranks = np.arange(self.early.shape[1])
        from_before = ranks >= step
        queries = self.late + self.early * from_before
        keys = np.roll(self.early + self.late * ~(ranks + step < len(ranks)), step, 1)
        seen = (queries > 0) & (keys > 0)
        return Rectangles(np.broadcast_to(ranks, seen.shape)[seen], queries[seen], keys[seen])


class Ring:
    """Ring attention: the KV of each rank visits all other ranks, in hops that overlap with computation.

    In backward the gradients of a block, in fp32, travel after it, and one more hop brings them back to its rank.
    """

    def received(self, layer: Layer) -> np.ndarray:
        """Return the bytes that each rank receives in forward."""
        tokens = layer.plan.columns.sums(layer.plan.columns.tokens)
        hops = (layer.hop(np.roll(tokens, step) * layer.kv_bytes) for step in range(1, layer.cp_size))
        return sum(hops, np.zeros((2, layer.cp_size)))

    def held(self, layer: Layer) -> int:
        """Return the number of tokens of other ranks whose KV a rank holds at a time."""
        return 2 * layer.most_tokens

    def passes(self, layer: Layer) -> tuple[PassTimes, PassTimes]:
        """Predict the times of forward and backward."""
        pieces, forward, backward = RingPieces.of(layer.plan), _RingPass(layer, False), _RingPass(layer, True)
        for step in range(layer.cp_size):
            block = pieces.remote(step) if step else pieces.local()
            forward.add(step, block)
            backward.add(step, block)
        return forward.line.times(), backward.line.times()


class _RingPass:
    """Schedules the steps of a ring's forward or backward."""

    def __init__(self, layer: Layer, backward: bool):
        self.layer, self.backward, self.line = layer, backward, Timeline(layer.cp_size)
        self.tokens = layer.plan.columns.sums(layer.plan.columns.tokens)
        self.arrived = self.computed = self.gradients = self.line.nothing

    def add(self, step: int, block: Rectangles) -> None:
        """Add the rectangles of a step, and the hop that brings the KV of the next one."""
        layer, line, ready = self.layer, self.line, self.arrived
        if step + 1 < layer.cp_size:
            # The hop is posted once the step before is computed and this step's block has arrived.
            self.arrived = line.hop(self._wire_seconds(step + 1, layer.model.itemsize), self.computed, ready)
        self.computed = line.kernel(layer.kernel_seconds(block, causal=not step, backward=self.backward), ready)
        if self.backward:
            adding = self._adding_seconds(step, block) if step else line.nothing
            self.computed = line.copy(adding, self.gradients)
            self.gradients = line.hop(self._wire_seconds(step + 1, _FP32), self.computed)
        elif step:
            self.computed = line.copy(layer.merge_seconds(block))

    def _wire_seconds(self, step: int, itemsize: int) -> np.ndarray:
        layer, tokens = self.layer, np.roll(self.tokens, step)
        return layer.model.hardware.wire_seconds(layer.hop(tokens * layer.layers.kv_elements_per_token * itemsize))

    def _adding_seconds(self, step: int, block: Rectangles) -> np.ndarray:
        """Return the time to add the gradients of a block to the sums of earlier steps."""
        layer, layers, model = self.layer, self.layer.layers, self.layer.model
        queries = np.bincount(block.ranks, block.queries, layer.cp_size) * layers.query_heads * layers.key_dim
        elements = queries + np.roll(self.tokens, step) * layers.kv_elements_per_token
        return elements * (8 + model.grad_itemsize) / model.hardware.memory_bytes_per_second


class Ulysses:
    """Ulysses: all-to-alls before and after the kernel, which computes all documents with some of the heads.

    Each all-to-all packs its tensors and unpacks them at the receiver. In backward, the output's gradient is exchanged
    before the kernel and the gradients of the inputs after it.
    """

    def received(self, layer: Layer) -> np.ndarray:
        """Return the bytes that each rank receives in forward."""
        return layer.exchanged(layer.most_tokens * (self._input_bytes(layer) + self._output_bytes(layer)))

    def held(self, layer: Layer) -> int:
        """Return the number of tokens of other ranks whose KV a rank holds at a time, which is 0."""
        return 0

    def passes(self, layer: Layer) -> tuple[PassTimes, PassTimes]:
        """Predict the times of forward and backward."""
        return self._pass(layer, backward=False), self._pass(layer, backward=True)

    def _pass(self, layer: Layer, backward: bool) -> PassTimes:
        line = Timeline(layer.cp_size)
        lengths = np.tile(layer.plan.lengths, layer.cp_size)
        squares = Rectangles(np.repeat(np.arange(layer.cp_size), len(layer.plan.lengths)), lengths, 0 * lengths)
        heads = layer.layers.query_heads // layer.cp_size
        kernel = layer.kernel_seconds(squares, causal=True, backward=backward, heads=heads)
        before, after = self._input_bytes(layer), self._output_bytes(layer)
        if backward:
            before, after = after, before
        self._exchange(line, layer, before)
        line.kernel(kernel)
        self._exchange(line, layer, after)
        return line.times()

    def _exchange(self, line: Timeline, layer: Layer, bytes_per_token: float) -> None:
        copying = layer.copy_seconds(2 * layer.plan.num_tokens * bytes_per_token)
        wire = layer.model.hardware.wire_seconds(layer.exchanged(layer.most_tokens * bytes_per_token))
        line.copy(copying, line.collective(wire, line.copy(copying)))

    def _input_bytes(self, layer: Layer) -> float:
        """Return the bytes of a token's queries, keys and values for one rank's heads.

        Ranks share KV heads if there are fewer KV heads than ranks.
        """
        sizes, kv_heads = layer.layers, max(layer.layers.kv_heads / layer.cp_size, 1)
        elements = sizes.query_heads / layer.cp_size * sizes.key_dim + kv_heads * (sizes.key_dim + sizes.value_dim)
        return elements * layer.model.itemsize

    def _output_bytes(self, layer: Layer) -> float:
        return layer.layers.query_heads / layer.cp_size * layer.layers.value_dim * layer.model.itemsize


class Baseline(NamedTuple):
    """Another way to run attention under context parallelism."""

    title: str  # name in tables and plots
    slices: Callable[[Lengths, int], Slices]  # the tokens for which each rank computes the linear layers
    exchange: AllGather | Ring | Ulysses  # predicts the times, traffic and memory of attention
    kept: bool = False  # whether ranks keep the KV of other ranks until backward, in every layer


BASELINES = {
    "llama3": Baseline("all-gather, Llama 3", per_seq, AllGather(), kept=True),
    "per_doc_cp": Baseline("all-gather, Per-Doc (WLB-LLM)", per_doc, AllGather(), kept=True),
    "flashcp_paper": Baseline(
        "padded all-gather, FlashCP",
        lambda lengths, cp_size: flashcp(Caps(lengths, cp_size)),
        AllGather(shared_alone=True),
        kept=True,
    ),
    "ring": Baseline("ring", in_order, Ring()),
    "zigzag_ring": Baseline("zigzag ring", per_doc, Ring()),
    "ulysses": Baseline("all-to-all, Ulysses", per_seq, Ulysses()),
}


def why_not(name: str, model: CostModel, cp_size: int) -> str | None:
    """Return the reason why a baseline cannot run a model, or `None` if it can."""
    if model.recurrent is not None:
        return "it has no exchange for recurrent and convolutional layers"
    if name == "ulysses":
        heads = {layers.query_heads for layers in model.layers}
        if any(count % cp_size for count in heads):
            return f"{cp_size} ranks do not divide {min(heads)} query heads"
    if name in ("ring", "zigzag_ring") and any(layers.window for layers in model.layers):
        return "rings do not support sliding windows"
    return None


def passes(name: str, model: CostModel, plan: ShardPlan, layers: AttentionLayers) -> tuple[PassTimes, PassTimes]:
    """Predict the times of one layer's forward and backward, as [`CostModel.passes`] does for this library."""
    return BASELINES[name].exchange.passes(Layer(model, layers, plan))
