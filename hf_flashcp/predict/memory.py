"""Estimates the memory that a device needs for training, from a model's sizes. README.md lists every term.

A step has a few moments at which memory can be at its highest. The memory of a moment is a sum of parts, and the peak
is the largest of these sums:

    forward                            backward
    layers ... logits, loss       |    loss, head, last layer ... first layer, embedding    |    optimizer
                          (1)          (2)   (3)   (4)            (5)          (6)               (7)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from .attention_memory import BackwardPoint, attention_backward
from .layer_memory import LayerStack, block_backward, layer_bytes
from .loss_memory import loss_memory
from .memory_shape import MemoryShape
from .mixer_memory import mixer_backward
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
        host (`float`): bytes of the host's memory that offloaded activations take.
    """

    moments: dict[str, dict[str, float]]
    kept: float
    host: float = 0

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
        return {
            "total": round(self.total),
            "host": round(self.host),
            "peak": self.peak,
            "parts": moments[self.peak],
            "moments": moments,
        }


def estimate_memory(shape: MemoryShape, setup: TrainingSetup, load: RankLoad) -> MemoryEstimate:
    """Estimate the memory of one device in any step after the first, with fused AdamW (the default optimizer).

    Args:
        shape (`MemoryShape`): sizes of the model.
        setup (`TrainingSetup`): how the model is trained.
        load (`RankLoad`): what the rank holds and moves.
    """
    step = _Step(shape, setup, load)
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
    return MemoryEstimate(moments, step.kept_bytes, step.stack.on_host)


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


class _Step:
    """Computes the memory of each moment of a step on one device, and the memory that forward keeps for backward."""

    def __init__(self, shape: MemoryShape, setup: TrainingSetup, load: RankLoad):
        self.shape, self.setup, self.load, self.tokens = shape, setup, load, load.tokens
        self.shards = setup.gpus if setup.sharding == "fsdp2" else 1
        c, s = setup.compute_bytes, setup.stream_bytes
        self.norm = load.tokens * shape.norm_bytes(shape.hidden, s)
        self.head_input = load.tokens * (c if setup.autocasts else s) * shape.hidden
        self.rope = load.tokens * 2 * s * shape.key_dim
        self.stack = LayerStack(shape, setup, load)
        self.loss = loss_memory(shape, setup, load.tokens)
        self.gathered = (_by_fsdp2 if setup.sharding == "fsdp2" else _by_ddp)(shape, setup)

    @property
    def kept_bytes(self) -> float:
        """Bytes that forward keeps for backward."""
        held = self.stack.up_to(self.shape.layers - 1)
        of_head = self.norm + self.head_input * (not self.setup.skip_logits)
        return sum(held) + of_head + self.rope + self.loss.kept + self.gathered.kept

    def moments(self) -> dict[str, _Moment]:
        """Return the moments at which memory can be at its highest, by name."""
        shape, gathered, c, last = self.shape, self.gathered, self.setup.compute_bytes, self.shape.layers - 1
        everything, embedding = shape.parameters, shape.embedding_parameters
        row_gradient = self.tokens * self.setup.stream_bytes * shape.hidden
        layers, kv, states = self.stack.up_to(last)
        at_loss = layers + self.norm + self.head_input + self.rope
        at_head = at_loss - self.head_input * self.setup.skip_logits
        cast_head = c * embedding * (self.setup.weight_bytes != c or self.shards > 1)
        of_head = row_gradient + cast_head
        tied_gradient = (self.setup.weight_bytes if self.shards == 1 else c) * embedding * shape.tied
        moments = {
            "loss": _Moment(0, at_loss, self.loss.forward, kv, states, gathered.forward),
            "loss backward": _Moment(0, at_loss, self.loss.loss_backward, kv, states, gathered.loss_backward),
            "head backward": _Moment(
                embedding, at_head, self.loss.head_backward, kv, states, gathered.loss_backward, of_head
            ),
            "last layer's backward": self._in_layer(last),
            "last checkpointed layer's backward": self._in_layer(self.stack.last_checkpointed or 0),
            "first layer's backward": self._in_layer(0, is_first=True),
            "embedding's backward": _Moment(
                everything, gathered=gathered.embedding, temporary=row_gradient + tied_gradient
            ),
            "optimizer": _Moment(everything, gathered=gathered.optimizer),
        }
        if self.setup.skip_logits:
            del moments["loss backward"]
        if self.stack.last_checkpointed in (None, 0, last):
            del moments["last checkpointed layer's backward"]
        return moments

    def _in_layer(self, index: int, is_first: bool = False) -> _Moment:
        """Return the moment in a layer's backward at which memory is at its highest."""
        shape, last, point = self.shape, self.shape.layers - 1, self._highest_point(self.stack.runs_again(index))
        of_layer = self.setup.weight_bytes * shape.layer_parameters / 3 * (self.shards == 1)
        if is_first:
            done = shape.parameters - shape.embedding_parameters * (not shape.tied) - shape.layer_parameters * 2 / 3
        else:
            # FSDP2 reduces the gradient of a tied head together with that of the embedding.
            head_is_reduced = self.setup.sharding == "fsdp2" and shape.tied
            done = 0 if head_is_reduced else shape.embedding_parameters + shape.hidden
            done += (last - index) * shape.layer_parameters
        activations, received_kv, states = self.stack.in_backward(index)
        return _Moment(
            parameters=done,
            activations=activations + self.rope - point.freed,
            received_kv=received_kv,
            states=states,
            gathered=self.gathered.first_layer if is_first else self.gathered.backward,
            temporary=point.temporary + of_layer * (not is_first),
            workspace=point.workspace,
        )

    def _highest_point(self, runs_again: bool) -> BackwardPoint:
        shape, setup, load = self.shape, self.setup, self.load
        freed = load.tokens * layer_bytes(shape, setup).block
        points = block_backward(shape, setup, load.tokens)
        if shape.attention_layers:
            kept = self.stack.keeps_kv_again if runs_again else self.stack.keeps_kv
            points += attention_backward(shape, setup, load, kept=kept, freed=freed)
        if shape.recurrent:
            points.append(mixer_backward(shape, shape.recurrent, setup, load, freed))
        return max(points, key=lambda point: point.total)


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

    Autocast keeps cast weights until their layer's backward, or in checkpointed layers until forward ends. Without
    logits, the head's backward does not need its weight. A feed-forward block in tiles casts its weights again.
    """
    buckets = setup.weight_bytes * shape.parameters if setup.gpus > 1 else 0
    head = setup.compute_bytes * shape.embedding_parameters * setup.autocasts
    of_layer = setup.compute_bytes * shape.layer_parameters * setup.autocasts
    of_block = setup.compute_bytes * shape.dense_parameters * setup.autocasts * (setup.mlp_tiles > 1)
    casts = head + shape.layers * (of_layer - shape.dense_share * of_block)
    checkpointed = setup.gradient_checkpointing != "none"
    whole = (1 - 1 / setup.every_n_layers if checkpointed else 1) * (casts - head)  # of layers that keep everything
    kept = head * (not setup.skip_logits) + whole
    return _Gathered(
        forward=buckets + casts,
        loss_backward=buckets + kept,
        backward=buckets + max(of_layer, whole + of_block),
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
