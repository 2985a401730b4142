"""Estimates the memory that a device needs for training, from a model's sizes. docs/sizing.md lists every term.

A step has a few moments at which memory can be at its highest. The memory of a moment is a sum of parts, and the peak
is the largest of these sums:

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
from .mixer_memory import mixer_backward, mixer_bytes, state_bytes
from .training_setup import RankLoad, TrainingSetup


WORKSPACE = "attention workspace"
PARTS = (
    "weights",
    "gradients",
    "optimizer",
    "activations",
    "logits",
    "received KV",
    "states",
    "gathered",
    "temporary",
    WORKSPACE,
)
"""The names of the parts that add up to the memory of each moment."""


@dataclass(frozen=True)
class MemoryEstimate:
    """The estimated memory of one device in a training step, in bytes.

    Args:
        moments (`dict[str, dict[str, float]]`): bytes of each of [`PARTS`], by moment of the step.
        kept (`float`): bytes that forward keeps for backward: activations, logits, received KV, states and gathered
            weights.
    """

    moments: dict[str, dict[str, float]]
    kept: float

    @property
    def peak(self) -> str:
        """Name of the moment at which memory is at its highest."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def parts(self) -> dict[str, float]:
        """Bytes of each of [`PARTS`] at the peak."""
        return self.moments[self.peak]

    @property
    def total(self) -> float:
        """Bytes at the peak."""
        return sum(self.parts.values())

    def to_dict(self) -> dict[str, Any]:
        """Return the estimate in a JSON-serializable form, in whole bytes."""
        moments = {name: {part: round(n) for part, n in parts.items()} for name, parts in self.moments.items()}
        return {"total": round(self.total), "peak": self.peak, "parts": moments[self.peak], "moments": moments}


def estimate_memory(
    shape: MemoryShape, setup: TrainingSetup, load: RankLoad, *, kept: bool | None = None
) -> MemoryEstimate:
    """Estimate the memory of one device in any step after the first, with fused AdamW (the default optimizer).

    Args:
        shape (`MemoryShape`): sizes of the model.
        setup (`TrainingSetup`): how the model is trained.
        load (`RankLoad`): what the rank holds and moves.
        kept (`bool`, *optional*): whether a layer keeps received KV until its backward. The default is this library's
            own choice.
    """
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
            "states": moment.states,
            "gathered": moment.gathered,
            "temporary": moment.temporary,
            WORKSPACE: moment.workspace,
        }
        moments[name] = {part: at_moment.get(part, 0) + always.get(part, 0) for part in PARTS}
    return MemoryEstimate(moments, step.kept_bytes)


class _Moment(NamedTuple):
    """Memory at one moment of a step, in bytes, without the parts that are the same at every moment."""

    parameters: float  # number of parameters that have a gradient
    activations: float = 0
    logits: float = 0
    received_kv: float = 0
    states: float = 0
    gathered: float = 0
    temporary: float = 0
    workspace: float = 0


class _Held(NamedTuple):
    """Memory that a layer holds for its backward."""

    per_token: float  # bytes of activations per token, mean over layers
    received_kv: float  # bytes of received KV in an attention layer
    states: float  # bytes in a recurrent layer that are kept because documents are cut


class _Step:
    """Computes the memory of each moment of a step on one device, and the memory that forward keeps for backward."""

    def __init__(self, shape: MemoryShape, setup: TrainingSetup, load: RankLoad, keeps_kv: bool):
        self.shape, self.setup, self.tokens = shape, setup, load.tokens
        self.shards = setup.gpus if setup.sharding == "fsdp2" else 1
        c, s, layer = setup.compute_bytes, setup.stream_bytes, _layer(shape, setup)
        received_kv = c * load.received * shape.kv_width if keeps_kv else 0
        layer_input, beside_input = s * shape.hidden, layer.kept - layer.shared_input
        states = state_bytes(shape.recurrent, setup, load)
        match setup.gradient_checkpointing:
            case "none":
                self.kept, self.repeated = _Held(layer.kept, received_kv, states), _Held(0, 0, 0)
            case "full":
                self.kept, self.repeated = _Held(layer_input, 0, 0), _Held(beside_input, received_kv, states)
            case "attention-saving":
                self.kept = _Held(layer_input + layer.attention_result, received_kv, 0)
                self.repeated = _Held(beside_input - layer.attention_result, 0, states)
        self.head = shape.norm_bytes(shape.hidden, s) + (c if setup.autocasts else s) * shape.hidden
        self.rope = 2 * s * shape.key_dim
        self.stack = load.tokens * (self.head + self.rope) + shape.layers * load.tokens * self.kept.per_token
        self.all_kv = shape.attention_layers * self.kept.received_kv
        self.all_states = shape.recurrent.count * self.kept.states if shape.recurrent else 0
        self.logits = load.tokens * shape.vocabulary
        self.softcap = c * self.logits * shape.softcapped
        self.gathered = (_by_fsdp2 if setup.sharding == "fsdp2" else _by_ddp)(shape, setup)
        in_block = BackwardPoint(load.tokens * layer.backward)
        freed = load.tokens * layer.block
        in_mixer = attention_backward(shape, setup, load, kept=keeps_kv, freed=freed) if shape.attention_layers else []
        if shape.recurrent:
            in_mixer.append(mixer_backward(shape, shape.recurrent, setup, load, freed))
        self.in_layer = max((in_block, *in_mixer), key=lambda point: point.total)

    @property
    def kept_bytes(self) -> float:
        """Bytes that forward keeps for backward."""
        return self.stack + (4 * self.logits + self.softcap) + self.all_kv + self.all_states + self.gathered.kept

    def moments(self) -> dict[str, _Moment]:
        """Return the moments at which memory can be at its highest, by name."""
        shape, gathered, c = self.shape, self.gathered, self.setup.compute_bytes
        everything, embedding = shape.parameters, shape.embedding_parameters
        row_gradient, held = self.tokens * self.setup.stream_bytes * shape.hidden, (self.all_kv, self.all_states)
        loss_logits = (c + 4 + 4 * (c != 4)) * self.logits + self.softcap
        cast_head = c * embedding * (self.setup.weight_bytes != c or self.shards > 1)
        tied_gradient = (self.setup.weight_bytes if self.shards == 1 else c) * embedding * shape.tied
        return {
            "loss": _Moment(0, self.stack, loss_logits, *held, gathered.forward),
            "loss backward": _Moment(0, self.stack, 12 * self.logits + self.softcap, *held, gathered.loss_backward),
            "head backward": _Moment(
                embedding, self.stack, c * self.logits, *held, gathered.loss_backward, row_gradient + cast_head
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
            states=self.all_states + self.repeated.states,
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
            states=self.kept.states + self.repeated.states,
            gathered=self.gathered.first_layer,
            temporary=in_layer.temporary,
            workspace=in_layer.workspace,
        )


class _Layer(NamedTuple):
    """Memory of one layer, in bytes per token. In a hybrid model the parts are means over layers."""

    kept: float  # everything that is kept for backward
    attention_result: float  # the part of `kept` that is attention's output and logsumexp
    shared_input: float  # the part of `kept` that is the layer's input
    backward: float  # the most that the feed-forward block's backward allocates on top, without weight gradients
    block: float  # the part of `kept` that the feed-forward block and its norm keep and free in their backward


def _block_bytes(shape: MemoryShape, setup: TrainingSetup) -> float:
    """Return the bytes per token that the feed-forward block and the norm before it keep."""
    c, s, readers = setup.compute_bytes, setup.stream_bytes, 2 if shape.gated else 1
    read = c * readers if setup.autocasts else s
    inner = shape.kept_widths * c * shape.intermediate
    # Each expert keeps a copy of its tokens, and its output before it is weighted.
    routed = 2 * c * shape.hidden * shape.experts_per_token
    return shape.block_share * (shape.norm_bytes(shape.hidden, s) + read * shape.hidden) + inner + routed


def _layer(shape: MemoryShape, setup: TrainingSetup) -> _Layer:
    c, s = setup.compute_bytes, setup.stream_bytes
    block = _block_bytes(shape, setup)
    read = 3 * c if setup.autocasts else s
    result = shape.attention_share * (c * shape.query_heads * shape.value_dim + 4 * shape.query_heads)
    attention = shape.attention_share * (
        shape.norm_bytes(shape.hidden, s)
        + read * shape.hidden
        + shape.norm_bytes(shape.normed_width + shape.latent_width, c)
        + c * (shape.latent_width + shape.latent_keys)
        + c * (shape.query_heads * shape.key_dim + shape.kv_width + 2 * shape.output_gates)
    )
    mixing = 0.0
    if shape.recurrent:
        mixing = shape.recurrent.count / shape.layers * mixer_bytes(shape, shape.recurrent, setup)
    more_norms = (shape.norms - 2) * shape.norm_bytes(shape.hidden, s)
    # The gradients of both factors of the gated product are allocated in addition to the factors.
    backward = (2 if shape.gated else 1) * c * shape.intermediate + 2 * s * shape.hidden
    kept = attention + result + mixing + block + more_norms
    return _Layer(kept, result, 4 * shape.hidden if s == 4 else 0, backward, block)


class _Gathered(NamedTuple):
    """Bytes of additional copies of weights and gradients, by moment."""

    forward: float
    loss_backward: float
    backward: float
    first_layer: float
    embedding: float
    optimizer: float
    kept: float  # kept from forward for backward


def _by_fsdp2(shape: MemoryShape, setup: TrainingSetup) -> _Gathered:
    """Return the copies under FSDP2 as accelerate wraps a model.

    The wrapped units are the embedding, each layer, and the final norm with the head, which stays gathered until its
    backward. One layer is gathered ahead. In backward, a layer's gradients are reduced while the next layer computes.
    """
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
    """Return the copies under DDP, whose buckets hold a second copy of all gradients.

    Autocast keeps cast weights until their layer's backward, or with gradient checkpointing until forward ends.
    """
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
    """Return the longest packed row that fits in `memory_bytes`, in tokens, rounded down to a multiple of `multiple`.

    `load` is the load of some row. Longer and shorter rows are assumed to have proportional loads. The result is 0 if
    not even `multiple` tokens fit.
    """

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
