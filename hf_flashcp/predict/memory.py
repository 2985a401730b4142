"""How much memory a device needs to train, from a model's sizes: docs/sizing.md has every term.

A step has a few moments at which memory can be at its highest. Each is a sum of parts, the peak is the largest sum:

    forward                            backward
    layers ... logits, loss       |    loss, head, last layer ... first layer, embedding    |    optimizer
                          (1)          (2)   (3)   (4)            (5)          (6)               (7)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from ..plan.traffic import MOST_KEPT
from .attention_memory import BackwardPoint, attention_backward
from .memory_shape import MemoryShape
from .training_setup import RankLoad, TrainingSetup


WORKSPACE = "attention workspace"
PARTS = (
    "weights",
    "gradients",
    "optimizer",
    "activations",
    "logits",
    "received KV",
    "gathered",
    "temporary",
    WORKSPACE,
)
"""The parts that add up to the memory of every moment."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device: by moment of a step those of each of [`PARTS`], and what forward keeps for backward
    (activations, logits, received KV, gathered weights)."""

    moments: dict[str, dict[str, float]]
    kept: float

    @property
    def peak(self) -> str:
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def parts(self) -> dict[str, float]:
        """Bytes of each of [`PARTS`] at that moment."""
        return self.moments[self.peak]

    @property
    def total(self) -> float:
        """Bytes at that moment."""
        return sum(self.parts.values())

    def to_dict(self) -> dict[str, Any]:
        """JSON-serializable, in whole bytes."""
        moments = {name: {part: round(n) for part, n in parts.items()} for name, parts in self.moments.items()}
        return {"total": round(self.total), "peak": self.peak, "parts": moments[self.peak], "moments": moments}


def estimate_memory(
    shape: MemoryShape, setup: TrainingSetup, load: RankLoad, *, kept: bool | None = None
) -> MemoryEstimate:
    """Predicts the memory of one device in a step after the first, with the fused AdamW that `TrainingArguments` has
    as default. `kept` says whether a layer keeps the KV it received until its backward; by default as this library
    does."""
    if kept is None:
        kept = setup.gradient_checkpointing == "full" or load.received <= MOST_KEPT * load.tokens
    step = _Step(shape, setup, load, kept)
    always = {
        "weights": setup.weight_bytes * shape.parameters / step.shards,
        "optimizer": 2 * setup.weight_bytes * shape.parameters / step.shards,
        "temporary": 8 * (3 * load.batch_tokens + 4 * load.tokens),  # the batch
    }
    moments = {}
    for name, moment in step.moments().items():
        at_moment = {
            "gradients": setup.weight_bytes * moment.parameters / step.shards,
            "activations": moment.activations,
            "logits": moment.logits,
            "received KV": moment.received_kv,
            "gathered": moment.gathered,
            "temporary": moment.temporary,
            WORKSPACE: moment.workspace,
        }
        moments[name] = {part: at_moment.get(part, 0) + always.get(part, 0) for part in PARTS}
    return MemoryEstimate(moments, step.kept_bytes)


class _Moment(NamedTuple):
    """Memory at one moment of a step but for the constant parts: parameters that have a gradient, and bytes."""

    parameters: float
    activations: float = 0
    logits: float = 0
    received_kv: float = 0
    gathered: float = 0
    temporary: float = 0
    workspace: float = 0


class _Held(NamedTuple):
    """Memory of a layer in backward: bytes per token of activations, and bytes of received KV."""

    per_token: float
    received_kv: float


class _Step:
    """A step on one device: what forward keeps for backward, and the moments at which memory can be at its highest."""

    def __init__(self, shape: MemoryShape, setup: TrainingSetup, load: RankLoad, keeps_kv: bool):
        self.shape, self.setup, self.tokens = shape, setup, load.tokens
        self.shards = setup.gpus if setup.sharding == "fsdp2" else 1
        c, s, layer = setup.compute_bytes, setup.stream_bytes, _layer(shape, setup)
        received_kv = c * load.received * shape.kv_width if keeps_kv else 0
        layer_input, beside_input = s * shape.hidden, layer.kept - layer.shared_input
        match setup.gradient_checkpointing:
            case "none":
                self.kept, self.repeated = _Held(layer.kept, received_kv), _Held(0, 0)
            case "full":
                self.kept, self.repeated = _Held(layer_input, 0), _Held(beside_input, received_kv)
            case "attention-saving":
                self.kept = _Held(layer_input + layer.attention_result, received_kv)
                self.repeated = _Held(beside_input - layer.attention_result, 0)
        self.head = shape.norm_bytes(shape.hidden, s) + (c if setup.autocasts else s) * shape.hidden
        self.rope = 2 * s * shape.key_dim
        self.stack = load.tokens * (self.head + self.rope) + shape.layers * load.tokens * self.kept.per_token
        self.all_kv = shape.layers * self.kept.received_kv
        self.logits = load.tokens * shape.vocabulary
        self.softcap = c * self.logits * shape.softcapped
        self.gathered = (_by_fsdp2 if setup.sharding == "fsdp2" else _by_ddp)(shape, setup)
        in_block = BackwardPoint(load.tokens * layer.backward)
        in_attention = attention_backward(shape, setup, load, kept=keeps_kv, freed=load.tokens * layer.block)
        self.in_layer = max((in_block, *in_attention), key=lambda point: point.total)

    @property
    def kept_bytes(self) -> float:
        return self.stack + (4 * self.logits + self.softcap) + self.all_kv + self.gathered.kept

    def moments(self) -> dict[str, _Moment]:
        shape, gathered, c = self.shape, self.gathered, self.setup.compute_bytes
        everything, embedding = shape.parameters, shape.embedding_parameters
        row_gradient = self.tokens * self.setup.stream_bytes * shape.hidden
        loss_logits = (c + 4 + 4 * (c != 4)) * self.logits + self.softcap
        cast_head = c * embedding * (self.setup.weight_bytes != c or self.shards > 1)
        tied_gradient = (self.setup.weight_bytes if self.shards == 1 else c) * embedding * shape.tied
        return {
            "loss": _Moment(0, self.stack, loss_logits, self.all_kv, gathered.forward),
            "loss backward": _Moment(
                0, self.stack, 12 * self.logits + self.softcap, self.all_kv, gathered.loss_backward
            ),
            "head backward": _Moment(
                embedding, self.stack, c * self.logits, self.all_kv, gathered.loss_backward, row_gradient + cast_head
            ),
            "last layer's backward": self._last_layer(),
            "first layer's backward": self._first_layer(),
            "embedding's backward": _Moment(
                everything, gathered=gathered.embedding, temporary=row_gradient + tied_gradient
            ),
            "optimizer": _Moment(everything, gathered=gathered.optimizer),
        }

    def _last_layer(self) -> _Moment:
        shape, in_layer = self.shape, self.in_layer
        head_is_reduced = self.setup.sharding == "fsdp2" and shape.tied
        of_layer = self.setup.weight_bytes * shape.layer_parameters / 3 * (self.shards == 1)
        return _Moment(
            parameters=0 if head_is_reduced else shape.embedding_parameters + shape.hidden,
            activations=self.stack - self.tokens * self.head + self.tokens * self.repeated.per_token - in_layer.freed,
            received_kv=self.all_kv + self.repeated.received_kv,
            gathered=self.gathered.backward,
            temporary=in_layer.temporary + of_layer,
            workspace=in_layer.workspace,
        )

    def _first_layer(self) -> _Moment:
        shape, in_layer = self.shape, self.in_layer
        one = self.tokens * (self.kept.per_token + self.repeated.per_token)
        embedding = shape.embedding_parameters * (not shape.tied)
        return _Moment(
            parameters=shape.parameters - embedding - shape.layer_parameters * 2 / 3,
            activations=one + self.tokens * self.rope - in_layer.freed,
            received_kv=self.kept.received_kv + self.repeated.received_kv,
            gathered=self.gathered.first_layer,
            temporary=in_layer.temporary,
            workspace=in_layer.workspace,
        )


class _Layer(NamedTuple):
    """Bytes per token of one layer."""

    kept: float  # what backward needs
    attention_result: float  # of that, attention's output and logsumexp
    shared_input: float  # of that, the layer's input
    backward: float  # what backward has at most beside it, in the feed-forward block, weight gradients apart
    block: float  # of `kept`, what the feed-forward block and its norm keep, which their backward frees


def _block_bytes(shape: MemoryShape, setup: TrainingSetup) -> float:
    """Bytes per token that the feed-forward block and the norm before it keep."""
    c, s, readers = setup.compute_bytes, setup.stream_bytes, 2 if shape.gated else 1
    read = c * readers if setup.autocasts else s
    inner = shape.kept_widths * c * shape.intermediate
    # Every expert gathers its tokens, and what it gives is weighted.
    routed = 2 * c * shape.hidden * shape.experts_per_token
    return shape.norm_bytes(shape.hidden, s) + read * shape.hidden + inner + routed


def _layer(shape: MemoryShape, setup: TrainingSetup) -> _Layer:
    c, s = setup.compute_bytes, setup.stream_bytes
    block = _block_bytes(shape, setup)
    read = 3 * c if setup.autocasts else s
    result = c * shape.query_heads * shape.value_dim + 4 * shape.query_heads
    attention = (
        shape.norm_bytes(shape.hidden, s)
        + read * shape.hidden
        + shape.norm_bytes(shape.normed_width + shape.latent_width, c)
        + c * (shape.latent_width + shape.latent_keys)
        + c * (shape.query_heads * shape.key_dim + shape.kv_width)
        + result
    )
    more_norms = (shape.norms - 2) * shape.norm_bytes(shape.hidden, s)
    # The gradients of both factors of the gated product stand beside them.
    backward = (2 if shape.gated else 1) * c * shape.intermediate + 2 * s * shape.hidden
    return _Layer(attention + block + more_norms, result, 4 * shape.hidden if s == 4 else 0, backward, block)


class _Gathered(NamedTuple):
    """Bytes of copies of weights and gradients beside the optimizer's, by moment, and what forward keeps."""

    forward: float
    loss_backward: float
    backward: float
    first_layer: float
    embedding: float
    optimizer: float
    kept: float


def _by_fsdp2(shape: MemoryShape, setup: TrainingSetup) -> _Gathered:
    """FSDP2 as accelerate wraps it: embedding, every layer, and final norm with head (which stays gathered until its
    backward); a layer is gathered ahead, and in backward a layer's gradients are reduced while the next computes."""
    of_layer = setup.compute_bytes * shape.layer_parameters
    tail = setup.compute_bytes * shape.embedding_parameters
    backward = 4 * of_layer + (2 * tail if shape.tied else 0)
    return _Gathered(
        forward=tail + 2 * of_layer,
        loss_backward=tail + of_layer,
        backward=backward,
        first_layer=backward,
        embedding=2 * tail + 2 * of_layer,
        optimizer=0,
        kept=tail,
    )


def _by_ddp(shape: MemoryShape, setup: TrainingSetup) -> _Gathered:
    """DDP's buckets hold all gradients once more. Autocast keeps what it casts until its layer's backward, or under
    checkpointing until forward ends."""
    buckets = setup.weight_bytes * shape.parameters if setup.gpus > 1 else 0
    head = setup.compute_bytes * shape.embedding_parameters * setup.autocasts
    of_layer = setup.compute_bytes * shape.layer_parameters * setup.autocasts
    casts = setup.compute_bytes * (shape.layers * shape.layer_parameters + shape.embedding_parameters)
    casts *= setup.autocasts
    checkpointing = setup.gradient_checkpointing != "none"
    kept = head if checkpointing else casts
    return _Gathered(
        forward=buckets + casts,
        loss_backward=buckets + kept,
        backward=buckets + (of_layer if checkpointing else casts - head),
        first_layer=buckets + of_layer,
        embedding=buckets,
        optimizer=buckets,
        kept=kept,
    )


def largest_window(
    shape: MemoryShape,
    setup: TrainingSetup,
    cp_size: int,
    memory_bytes: float,
    load: RankLoad,
    *,
    multiple: int = 1024,
) -> int:
    """The most tokens of a packed row that fit in `memory_bytes`, a multiple of `multiple`; 0 if not even that many
    do. `load` is that of some row, which longer and shorter ones have in proportion."""

    def fits(units: int) -> bool:
        scaled = load.scaled(units * multiple / cp_size, batch_tokens=units * multiple)
        return estimate_memory(shape, setup, scaled).total <= memory_bytes

    low, high = 0, 1
    while fits(high) and high < 2**24:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * multiple
