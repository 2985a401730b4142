"""How other implementations of context parallelism would run a layer: their kernels, copies and transfers.

Each is taken at its best: no padding of documents, one kernel call where the code may make several, no work between
launches, collectives that cross InfiniBand once per node, copies of what has to change its place and no others.

    baseline       who computes what              what travels
    llama3         zigzag of the packed row       all-gather of all KV before attention, reduce-scatter after
    per_doc_cp     zigzag of every document       the same
    flashcp_paper  FlashCP's Algorithm 1          the same, of what any rank shares at most (eq. 5)
    ring           every document in N pieces     KV hop by hop while the hop before is computed, its gradients in fp32
    zigzag_ring    zigzag of every document       the same
    ulysses        all documents, some heads      all-to-all of queries, keys, values, and of the output
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..plan.shard_plan import ShardPlan
from ..plan.slices import Lengths, Slice, Slices, rank_tokens, slices_by_document
from ..planning.algorithm1 import flashcp
from ..planning.caps import Caps
from ..planning.sharding import per_doc, per_seq
from ..predict.cost_model import CostModel, LayerCosts
from ..predict.layer_work import Rectangles
from ..predict.model_shape import AttentionLayers
from ..predict.timeline import PassTimes, Timeline


_FP32 = 4


class Layer(LayerCosts):
    """One attention layer under a plan, with the costs of collectives between equal nodes. Received bytes are (2,
    cp_size), inside nodes and between them."""

    @property
    def ranks_in_node(self) -> int:
        return min(self.model.hardware.ranks_per_node, self.cp_size)

    @property
    def kv_bytes(self) -> int:
        return self.layers.kv_elements_per_token * self.model.itemsize

    @property
    def most_tokens(self) -> int:
        """Tokens of a rank where all have as many, rounded up."""
        return -(-self.plan.num_tokens // self.cp_size)

    def copy_seconds(self, bytes_touched: float) -> np.ndarray:
        """Reading and writing so many bytes in all."""
        return np.full(self.cp_size, bytes_touched / self.model.hardware.memory_bytes_per_second)

    def gathered(self, bytes_each: float) -> np.ndarray:
        """Bytes that ranks receive when each gives the same to all: they cross to a node once."""
        crossing = self.cp_size // self.ranks_in_node - 1
        return np.outer([self.cp_size - 1 - crossing, crossing], np.full(self.cp_size, bytes_each))

    def exchanged(self, bytes_each: float) -> np.ndarray:
        """Bytes that ranks receive when each gives so many to every other, to each its own."""
        inside = self.ranks_in_node - 1
        return np.outer([inside, self.cp_size - 1 - inside], np.full(self.cp_size, bytes_each))

    def hop(self, bytes_each: np.ndarray) -> np.ndarray:
        """Bytes that ranks receive when the rank before gives them so many (cp_size,)."""
        enters = (np.arange(self.cp_size) % self.ranks_in_node == 0) & (self.ranks_in_node < self.cp_size)
        return np.array([bytes_each * ~enters, bytes_each * enters])


def shared_tokens(plan: ShardPlan) -> int:
    """What each rank gives to the padded all-gather of FlashCP eq. 5, the most that any has to. A document's last
    shard (a slice is a shard here), which nobody after it needs, stays home."""
    return max(
        sum(piece.tokens for piece in held if piece.stop != plan.lengths[piece.document]) for held in plan.slices
    )


@dataclass(frozen=True)
class AllGather:
    """Gathers what each rank gives, brings it into the order of documents, and computes each slice against all of its
    document before it; in backward gradients of the gathered KV go the other way. With `shared_alone` ranks pack and
    give the tokens that others need, padded to the same number, instead of all that they hold."""

    shared_alone: bool = False

    def given(self, layer: Layer) -> int:
        return shared_tokens(layer.plan) if self.shared_alone else layer.most_tokens

    def received(self, layer: Layer) -> np.ndarray:
        return layer.gathered(self.given(layer) * layer.kv_bytes)

    def held(self, layer: Layer) -> int:
        return (layer.cp_size - 1) * self.given(layer)

    def run(self, layer: Layer, backward: bool) -> PassTimes:
        rows = [(rank, piece.tokens, piece.start) for rank, held in enumerate(layer.plan.slices) for piece in held]
        kernel = layer.kernel_seconds(Rectangles.of(rows), causal=True, backward=backward)
        line, moved = Timeline(layer.cp_size), self.given(layer)
        if not moved:
            line.kernel(kernel)
            return line.times()
        packing = layer.copy_seconds(self.shared_alone * 2 * moved * layer.kv_bytes)
        ordering = layer.copy_seconds(2 * layer.cp_size * moved * layer.kv_bytes)
        wire = layer.model.wire_seconds(self.received(layer))
        if backward:
            line.kernel(kernel)
            line.copy(packing, line.collective(wire, line.copy(ordering)))
        else:
            line.copy(ordering, line.collective(wire, line.copy(packing)))
            line.kernel(kernel)
        return line.times()


def in_order(lengths: Lengths, cp_size: int) -> Slices:
    """Cuts every document into N near-equal pieces, one for each rank in order."""
    cuts = (np.arange(cp_size + 1) * np.array(lengths)[:, None] // cp_size).tolist()
    return [
        [Slice(document, row[rank], row[rank + 1]) for document, row in enumerate(cuts) if row[rank] < row[rank + 1]]
        for rank in range(cp_size)
    ]


class RingPieces(NamedTuple):
    """Tokens of ranks' pieces of documents, along which ranks go up, then down: (documents, cp_size) int64."""

    early: np.ndarray
    late: np.ndarray

    @classmethod
    def of(cls, plan: ShardPlan) -> RingPieces:
        both = np.zeros((2, len(plan.lengths), plan.cp_size), dtype=np.int64)
        for document, held in slices_by_document(plan.slices).items():
            before = -1
            for start, stop, rank in held:
                both[int(rank < before), document, rank] += stop - start
                before = rank
        return cls(*both)

    def local(self) -> Rectangles:
        tokens = self.early + self.late
        documents, ranks = np.nonzero(tokens)
        return Rectangles(ranks, tokens[documents, ranks], np.zeros_like(ranks))

    def remote(self, step: int) -> Rectangles:
        """What ranks compute when KV has made `step` hops. All of a rank's queries see the first piece of an earlier
        rank's block; the second piece sees all of a later rank's block."""
        ranks = np.arange(self.early.shape[1])
        from_before = ranks >= step
        queries = self.late + self.early * from_before
        keys = np.roll(self.early, step, 1) + np.roll(self.late, step, 1) * ~from_before
        seen = (queries > 0) & (keys > 0)
        return Rectangles(np.broadcast_to(ranks, seen.shape)[seen], queries[seen], keys[seen])


class Ring:
    """Each rank's KV visits all ranks; while a block is computed the next one arrives. In backward its gradients, in
    fp32, follow it, and one hop more brings them home."""

    def received(self, layer: Layer) -> np.ndarray:
        tokens = np.array(rank_tokens(layer.plan.slices))
        hops = (layer.hop(np.roll(tokens, step) * layer.kv_bytes) for step in range(1, layer.cp_size))
        return sum(hops, np.zeros((2, layer.cp_size)))

    def held(self, layer: Layer) -> int:
        return 2 * layer.most_tokens

    def run(self, layer: Layer, backward: bool) -> PassTimes:
        pieces, line = RingPieces.of(layer.plan), Timeline(layer.cp_size)
        tokens = np.array(rank_tokens(layer.plan.slices))
        arrived = computed = gradients = line.nothing
        for step in range(layer.cp_size):
            ready = arrived
            if step + 1 < layer.cp_size:
                # Posted when the step before is computed and its block is here.
                arrived = line.hop(
                    self._wire_seconds(layer, np.roll(tokens, step + 1), layer.model.itemsize), computed, ready
                )
            block = pieces.remote(step) if step else pieces.local()
            computed = line.kernel(layer.kernel_seconds(block, causal=not step, backward=backward), ready)
            if backward:
                adding = self._adding_seconds(layer, block, np.roll(tokens, step)) if step else line.nothing
                computed = line.copy(adding, gradients)
                gradients = line.hop(self._wire_seconds(layer, np.roll(tokens, step + 1), _FP32), computed)
            elif step:
                computed = line.copy(layer.merge_seconds(block))
        return line.times()

    def _wire_seconds(self, layer: Layer, tokens: np.ndarray, itemsize: int) -> np.ndarray:
        return layer.model.wire_seconds(layer.hop(tokens * layer.layers.kv_elements_per_token * itemsize))

    def _adding_seconds(self, layer: Layer, block: Rectangles, tokens: np.ndarray) -> np.ndarray:
        """Adding the gradients of a block of `tokens` (cp_size,) to the sums of the steps before."""
        layers, model = layer.layers, layer.model
        queries = np.bincount(block.ranks, block.queries, layer.cp_size) * layers.query_heads * layers.key_dim
        elements = queries + tokens * layers.kv_elements_per_token
        return elements * (8 + model.grad_itemsize) / model.hardware.memory_bytes_per_second


class Ulysses:
    """Tensors are packed by head, sent, and unpacked by document, before the kernel and after it; in backward the
    output's gradient comes first and the inputs' gradients leave."""

    def received(self, layer: Layer) -> np.ndarray:
        return layer.exchanged(layer.most_tokens * (self._input_bytes(layer) + self._output_bytes(layer)))

    def held(self, layer: Layer) -> int:
        return 0

    def run(self, layer: Layer, backward: bool) -> PassTimes:
        line = Timeline(layer.cp_size)
        squares = [(rank, length, 0) for rank in range(layer.cp_size) for length in layer.plan.lengths]
        heads = layer.layers.query_heads // layer.cp_size
        kernel = layer.kernel_seconds(Rectangles.of(squares), causal=True, backward=backward, heads=heads)
        before, after = self._input_bytes(layer), self._output_bytes(layer)
        if backward:
            before, after = after, before
        self._exchange(line, layer, before)
        line.kernel(kernel)
        self._exchange(line, layer, after)
        return line.times()

    def _exchange(self, line: Timeline, layer: Layer, bytes_per_token: float) -> None:
        copying = layer.copy_seconds(2 * layer.plan.num_tokens * bytes_per_token)
        wire = layer.model.wire_seconds(layer.exchanged(layer.most_tokens * bytes_per_token))
        line.copy(copying, line.collective(wire, line.copy(copying)))

    def _input_bytes(self, layer: Layer) -> float:
        """Bytes of a token's queries, keys and values, one rank's heads; ranks share KV heads if these are fewer."""
        sizes, kv_heads = layer.layers, max(layer.layers.kv_heads / layer.cp_size, 1)
        elements = sizes.query_heads / layer.cp_size * sizes.key_dim + kv_heads * (sizes.key_dim + sizes.value_dim)
        return elements * layer.model.itemsize

    def _output_bytes(self, layer: Layer) -> float:
        return layer.layers.query_heads / layer.cp_size * layer.layers.value_dim * layer.model.itemsize


class Baseline(NamedTuple):
    """Another way to run attention under context parallelism; `slices` are what ranks compute of the linear layers.
    An exchange predicts one pass (`run`), the bytes that ranks receive in a forward, (2, cp_size), and how many tokens
    of other ranks are `held` at a time."""

    title: str
    slices: Callable[[Lengths, int], Slices]
    exchange: AllGather | Ring | Ulysses
    kept: bool = False  # whether ranks hold the KV of others until backward, in every layer


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
    """Returns why a baseline cannot run a model, or `None`."""
    if name == "ulysses":
        heads = {layers.query_heads for layers in model.layers}
        if any(count % cp_size for count in heads):
            return f"{cp_size} ranks do not divide {min(heads)} query heads"
    if name in ("ring", "zigzag_ring") and any(layers.window for layers in model.layers):
        return "rings do not know sliding windows"
    return None


def passes(name: str, model: CostModel, plan: ShardPlan, layers: AttentionLayers) -> tuple[PassTimes, PassTimes]:
    """Predicts the forward and the backward of one layer, as [`CostModel.passes`] does for this library's exchange."""
    layer, exchange = Layer(model, layers, plan), BASELINES[name].exchange
    return exchange.run(layer, backward=False), exchange.run(layer, backward=True)
