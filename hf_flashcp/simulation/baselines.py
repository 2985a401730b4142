"""How other implementations of context parallelism would run a layer: their kernels, copies and transfers as events.

Each is taken at its best: no padding of documents, one kernel call where the code may make several, no work between
launches, collectives that cross InfiniBand once for each node, copies of what has to change its place and no others.

    scheme         who computes what              what travels
    llama3         zigzag of the packed row       all-gather of all KV before attention, reduce-scatter after
    per_doc_cp     zigzag of every document       the same
    flashcp_paper  FlashCP's Algorithm 1          the same, of what any rank shares at most (eq. 5)
    ring           every document in N pieces     KV hop by hop while the hop before is computed, its gradients in fp32
    zigzag_ring    zigzag of every document       the same
    ulysses        all documents, some heads      all-to-all of queries, keys, values, and of the output
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..plan.shard_plan import ShardPlan
from ..plan.slices import Lengths, Slice, Slices
from ..planning.algorithm1 import flashcp
from ..planning.caps import Caps
from ..planning.sharding import per_doc, per_seq
from ..predict.cost_model import CostModel
from ..predict.layer_work import call_seconds
from ..predict.model_shape import AttentionLayers
from ..predict.timeline import COLLECTIVE, COPY, HOP, KERNEL, Event, parts


_FP32 = 4


@dataclass(frozen=True)
class Layer:
    """One attention layer under a plan: what schemes build their events from."""

    model: CostModel
    layers: AttentionLayers
    plan: ShardPlan

    @property
    def cp_size(self) -> int:
        return self.plan.cp_size

    @property
    def ranks_in_node(self) -> int:
        return min(self.model.hardware.ranks_per_node, self.cp_size)

    @property
    def kv_bytes(self) -> int:
        """Of a token's keys and values."""
        return self.layers.kv_elements_per_token * self.model.itemsize

    def kernel(self, rectangles: np.ndarray, backward: bool, *, causal: bool = True, heads: int = 0) -> np.ndarray:
        """(cp_size,) seconds of one call, see [`call_seconds`]; of all query heads, or of `heads`."""
        layers = dataclasses.replace(self.layers, query_heads=heads) if heads else self.layers
        window = self.plan.hiding_window(layers.window)
        options: dict[str, Any] = {"window": window, "causal": causal, "backward": backward}
        return call_seconds(self.model.hardware.kernel, rectangles, cp_size=self.cp_size, layers=layers, **options)

    def copied(self, bytes_touched: float) -> np.ndarray:
        """(cp_size,) seconds of reading and writing so many bytes in all."""
        return np.full(self.cp_size, bytes_touched / self.model.hardware.memory_bytes_per_second)

    def gathered(self, bytes_each: float) -> np.ndarray:
        """(2, cp_size) bytes that ranks receive, inside nodes and between them, when each gives the same to all: they
        cross to a node once."""
        crossing = self.cp_size // self.ranks_in_node - 1
        return np.outer([self.cp_size - 1 - crossing, crossing], np.full(self.cp_size, bytes_each))

    def exchanged(self, bytes_each: float) -> np.ndarray:
        """(2, cp_size) bytes that ranks receive when each gives so many to every other, to each its own."""
        inside = self.ranks_in_node - 1
        return np.outer([inside, self.cp_size - 1 - inside], np.full(self.cp_size, bytes_each))

    def hop(self, bytes_each: np.ndarray) -> np.ndarray:
        """(2, cp_size) bytes that ranks receive when the rank before gives them so many (cp_size,)."""
        enters = (np.arange(self.cp_size) % self.ranks_in_node == 0) & (self.ranks_in_node < self.cp_size)
        return np.array([bytes_each * ~enters, bytes_each * enters])


class Scheme(NamedTuple):
    """A way to run attention under context parallelism.

    Attributes:
        title (`str`): for a table.
        slices (`Callable`): of lengths and cp_size: the tokens whose linear layers a rank computes.
        events (`Callable`): of a [`Layer`] and whether it is the backward: the events of the pass.
        received (`Callable`): of a [`Layer`]: (2, cp_size) bytes received in a forward, inside nodes and between them.
        held (`Callable`): of a [`Layer`]: tokens of other ranks whose KV a rank holds at a time.
        kept (`bool`): whether it holds them until backward, in every layer.
    """

    title: str
    slices: Callable[[Lengths, int], Slices]
    events: Callable[[Layer, bool], list[Event]]
    received: Callable[[Layer], np.ndarray]
    held: Callable[[Layer], float]
    kept: bool = False


def shared_tokens(plan: ShardPlan) -> int:
    """FlashCP eq. 5: what each rank gives to the padded all-gather, the most that any rank has to give. A document's
    last shard, which nobody after it needs, stays home. A slice is a shard here."""
    return max(
        sum(stop - start for document, start, stop in slices if stop != plan.lengths[document])
        for slices in plan.slices
    )


def _all_tokens(layer: Layer) -> int:
    return -(-layer.plan.num_tokens // layer.cp_size)


def _all_gather(given: Callable[..., int], packs: bool) -> dict[str, Any]:
    """Gathers what each rank gives, brings it into the order of documents, and computes each slice against all of its
    document before it; in backward gradients of the gathered KV go the other way."""

    def received(layer: Layer) -> np.ndarray:
        return layer.gathered(given(layer) * layer.kv_bytes)

    def events(layer: Layer, backward: bool) -> list[Event]:
        rows = [(rank, stop - start, start) for rank, held in enumerate(layer.plan.slices) for _, start, stop in held]
        kernel = Event(KERNEL, layer.kernel(np.array(rows), backward))
        moved = given(layer)
        if not moved:
            return [kernel]
        own = Event(COPY, layer.copied(packs * 2 * moved * layer.kv_bytes))
        ordered = Event(COPY, layer.copied(2 * layer.cp_size * moved * layer.kv_bytes))
        wire = layer.model.wire_seconds(received(layer))
        if backward:
            return [kernel, ordered, Event(COLLECTIVE, wire, (1,)), own._replace(after=(2,))]
        return [own, Event(COLLECTIVE, wire, (0,)), ordered._replace(after=(1,)), kernel]

    return {
        "events": events,
        "received": received,
        "held": lambda layer: (layer.cp_size - 1) * given(layer),
    }


def _contiguous(lengths: Lengths, cp_size: int) -> Slices:
    """Every document in N near-equal pieces, one for each rank in order."""
    cuts = np.arange(cp_size + 1) * np.array(lengths)[:, None] // cp_size
    return [
        [
            Slice(document, int(row[rank]), int(row[rank + 1]))
            for document, row in enumerate(cuts)
            if row[rank] < row[rank + 1]
        ]
        for rank in range(cp_size)
    ]


def ring_pieces(plan: ShardPlan) -> tuple[np.ndarray, np.ndarray]:
    """(documents, cp_size) tokens of each rank's first pieces, and of its second ones: along a document ranks go up,
    then down."""
    both = np.zeros((2, len(plan.lengths), plan.cp_size), dtype=np.int64)
    pieces = sorted((*piece, rank) for rank, held in enumerate(plan.slices) for piece in held)
    before = (-1, -1)
    for document, start, stop, rank in pieces:
        both[int((document, rank) < before), document, rank] += stop - start
        before = (document, rank)
    return both[0], both[1]


def ring_rectangles(early: np.ndarray, late: np.ndarray, step: int) -> np.ndarray:
    """(n, 3): rank, queries, keys that they all see, when KV has made `step` hops. Of an earlier rank's block all of a
    rank's queries see the first piece; a later rank's block is seen whole, by the second piece."""
    ranks = np.arange(early.shape[1])
    from_before = ranks >= step
    queries = late + early * from_before
    keys = np.roll(early, step, 1) + np.roll(late, step, 1) * ~from_before
    rows = np.stack([np.broadcast_to(ranks, early.shape), queries, keys], -1).reshape(-1, 3)
    return rows[(rows[:, 1] > 0) & (rows[:, 2] > 0)]


def _ring(zigzag: bool) -> dict[str, Any]:
    """Each rank's KV visits all ranks; while a block is computed the next one arrives. In backward its gradients, in
    fp32, follow it, and one hop more brings them home."""

    def events(layer: Layer, backward: bool) -> list[Event]:
        early, late = ring_pieces(layer.plan)
        tokens = (early + late).sum(0)
        held = np.argwhere(early + late)
        local = np.stack([held[:, 1], (early + late)[tuple(held.T)], 0 * held[:, 1]], -1)
        layers, model, cp_size = layer.layers, layer.model, layer.cp_size
        found: list[Event] = []

        def add(*event) -> int:
            found.append(Event(*event))
            return len(found) - 1

        def wire(step: int, itemsize: int) -> np.ndarray:
            return model.wire_seconds(layer.hop(np.roll(tokens, step) * layers.kv_elements_per_token * itemsize))

        arrived: tuple[int, ...] = ()
        computed: tuple[int, ...] = ()
        gradients: tuple[int, ...] = ()
        for step in range(cp_size):
            ready = arrived
            if step + 1 < cp_size:
                # Posted when the step before is computed and its block is here.
                arrived = (add(HOP, wire(step + 1, model.itemsize), computed + ready),)
            rows = ring_rectangles(early, late, step) if step else local
            kernel = add(KERNEL, layer.kernel(rows, backward, causal=not step), ready)
            if not backward:
                merged = model.merge_seconds(rows, layers, cp_size) if step else np.zeros(cp_size)
                computed = (add(COPY, merged),) if step else (kernel,)
                continue
            added = np.bincount(rows[:, 0], rows[:, 1], cp_size) * layers.query_heads * layers.key_dim
            added = added + np.roll(tokens, step) * layers.kv_elements_per_token
            adding = add(
                COPY,
                (step > 0) * added * (8 + model.grad_itemsize) / model.hardware.memory_bytes_per_second,
                gradients,
            )
            computed = (adding,)
            gradients = (add(HOP, wire(step + 1, _FP32), computed),)
        return found

    def received(layer: Layer) -> np.ndarray:
        early, late = ring_pieces(layer.plan)
        return sum(
            (layer.hop(np.roll((early + late).sum(0), step) * layer.kv_bytes) for step in range(1, layer.cp_size)),
            np.zeros((2, layer.cp_size)),
        )

    return {
        "slices": per_doc if zigzag else _contiguous,
        "events": events,
        "received": received,
        "held": lambda layer: 2 * _all_tokens(layer),
    }


def _ulysses_bytes(layer: Layer) -> tuple[float, float]:
    """Of a token's queries, keys and values of one rank's heads, and of its output. Where KV heads are fewer than
    ranks, several ranks get the same one."""
    heads, kv_heads = layer.layers.query_heads / layer.cp_size, max(layer.layers.kv_heads / layer.cp_size, 1)
    inputs = heads * layer.layers.key_dim + kv_heads * (layer.layers.key_dim + layer.layers.value_dim)
    return inputs * layer.model.itemsize, heads * layer.layers.value_dim * layer.model.itemsize


def _ulysses_received(layer: Layer) -> np.ndarray:
    return layer.exchanged(_all_tokens(layer) * sum(_ulysses_bytes(layer)))


def _ulysses_events(layer: Layer, backward: bool) -> list[Event]:
    """Tensors are packed by head, sent, and unpacked by document, before the kernel and after it; in backward the
    output's gradient comes first and the inputs' gradients leave."""
    rows = np.array([(rank, length, 0) for rank in range(layer.cp_size) for length in layer.plan.lengths])
    kernel = layer.kernel(rows, backward, heads=layer.layers.query_heads // layer.cp_size)
    found: list[Event] = []
    inputs, output = _ulysses_bytes(layer)
    for size in (output, inputs) if backward else (inputs, output):
        copy = layer.copied(2 * layer.plan.num_tokens * size)
        wire = layer.model.wire_seconds(layer.exchanged(_all_tokens(layer) * size))
        first = len(found)
        found += [Event(COPY, copy), Event(COLLECTIVE, wire, (first,)), Event(COPY, copy, (first + 1,))]
        if not first:
            found.append(Event(KERNEL, kernel))
    return found


SCHEMES = {
    "llama3": Scheme("all-gather, Llama 3", per_seq, **_all_gather(_all_tokens, False), kept=True),
    "per_doc_cp": Scheme("all-gather, Per-Doc (WLB-LLM)", per_doc, **_all_gather(_all_tokens, False), kept=True),
    "flashcp_paper": Scheme(
        "padded all-gather, FlashCP",
        lambda lengths, cp_size: flashcp(Caps(lengths, cp_size)),
        **_all_gather(lambda layer: shared_tokens(layer.plan), True),
        kept=True,
    ),
    "ring": Scheme("ring", **_ring(zigzag=False)),
    "zigzag_ring": Scheme("zigzag ring", **_ring(zigzag=True)),
    "ulysses": Scheme("all-to-all, Ulysses", per_seq, _ulysses_events, _ulysses_received, lambda layer: 0),
}


def why_not(name: str, model: CostModel, cp_size: int) -> str | None:
    """Why a scheme cannot run a model, or `None`."""
    if name == "ulysses":
        heads = {layers.query_heads for layers in model.layers}
        if any(count % cp_size for count in heads):
            return f"{cp_size} ranks do not divide {min(heads)} query heads"
    if name in ("ring", "zigzag_ring") and any(layers.window for layers in model.layers):
        return "rings do not know sliding windows"
    return None


def passes(name: str, model: CostModel, plan: ShardPlan, layers: AttentionLayers) -> list[tuple[np.ndarray, ...]]:
    """`(attention, copies, exposed, transfer)` of one layer's forward, and of its backward, as [`CostModel.passes`]
    has them for this library's exchange."""
    layer = Layer(model, layers, plan)
    return [parts(SCHEMES[name].events(layer, backward), plan.cp_size) for backward in (False, True)]
