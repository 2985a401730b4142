"""How much memory a device needs to train, from a model's sizes: docs/estimate_command.md has every term.

A step has a few moments at which memory can be at its highest. Each is a sum of parts, the peak is the largest sum:

    forward                            backward
    layers ... logits, loss       |    loss, head, last layer ... first layer, embedding    |    optimizer
                          (1)          (2)   (3)   (4)            (5)          (6)               (7)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from ..plan.traffic import MOST_KEPT
from .attention_memory import BackwardPoint, attention_backward
from .gathered_memory import Gathered, gathered_memory
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
    """Bytes on one device, at the moments of a step.

    Args:
        moments (`dict`): by moment the bytes of each of [`PARTS`].
        kept (`float`): bytes that forward keeps for backward: activations, logits, received KV, gathered weights.
    """

    moments: dict[str, dict[str, float]]
    kept: float

    @property
    def peak(self) -> str:
        """The moment with the most bytes."""
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
        """Returns a JSON-serializable form, in whole bytes."""
        moments = {name: {part: round(n) for part, n in parts.items()} for name, parts in self.moments.items()}
        return {"total": round(self.total), "peak": self.peak, "parts": moments[self.peak], "moments": moments}


def estimate_memory(
    shape: MemoryShape, setup: TrainingSetup, load: RankLoad, *, kept: bool | None = None
) -> MemoryEstimate:
    """Predicts the memory of one device in a step after the first, with the fused AdamW that `TrainingArguments` has
    as default.

    Args:
        shape (`MemoryShape`): the model's sizes.
        setup (`TrainingSetup`): how it is trained.
        load (`RankLoad`): what the plan loads on the device's rank.
        kept (`bool`, *optional*): whether a layer keeps the KV it received until its backward; by default as this
            library does.
    """
    if kept is None:
        kept = setup.gradient_checkpointing == "full" or load.received <= MOST_KEPT * load.tokens
    step = _Step(shape, setup, load, kept)
    moments = {
        "loss": step.loss(),
        "loss backward": step.loss_backward(),
        "head backward": step.head_backward(),
        "last layer's backward": step.last_layer_backward(),
        "first layer's backward": step.first_layer_backward(),
        "embedding's backward": step.embedding_backward(),
        "optimizer": step.optimizer(),
    }
    return MemoryEstimate({name: step.parts(moment) for name, moment in moments.items()}, step.kept_bytes)


class _Moment(NamedTuple):
    """What memory holds at one moment of a step, beside what it always holds: numbers of parameters with a gradient,
    and bytes."""

    parameters: float
    activations: float = 0
    logits: float = 0
    received_kv: float = 0
    gathered: float = 0
    temporary: float = 0
    workspace: float = 0


class _Kept(NamedTuple):
    """What a layer holds in backward: bytes per token of activations, and bytes of received KV."""

    per_token: float
    received_kv: float


@dataclass(frozen=True)
class _Step:
    """A step on one device: what forward keeps for backward, and the moments."""

    shape: MemoryShape
    setup: TrainingSetup
    load: RankLoad
    keeps_kv: bool

    @cached_property
    def shards(self) -> int:
        return self.setup.gpus if self.setup.sharding == "fsdp2" else 1

    @cached_property
    def layer(self) -> _Layer:
        return _layer(self.shape, self.setup)

    @cached_property
    def gathered(self) -> Gathered:
        return gathered_memory(self.shape, self.setup)

    @cached_property
    def received_kv(self) -> float:
        """Bytes of received KV that a layer keeps, or fetches again in a forward that is repeated."""
        return self.setup.compute_bytes * self.load.received * self.shape.kv_width if self.keeps_kv else 0

    @cached_property
    def kept(self) -> _Kept:
        """What each layer keeps from forward to backward."""
        checkpointing = self.setup.gradient_checkpointing
        if checkpointing == "none":
            return _Kept(self.layer.kept, self.received_kv)
        layer_input = self.setup.stream_bytes * self.shape.hidden
        if checkpointing == "attention-saving":
            return _Kept(layer_input + self.layer.attention_result, self.received_kv)
        return _Kept(layer_input, 0)

    @cached_property
    def repeated(self) -> _Kept:
        """What the layer in backward has computed again beside what it kept."""
        checkpointing = self.setup.gradient_checkpointing
        if checkpointing == "none":
            return _Kept(0, 0)
        beside_input = self.layer.kept - self.layer.shared_input
        if checkpointing == "attention-saving":
            return _Kept(beside_input - self.layer.attention_result, 0)
        return _Kept(beside_input, self.received_kv)

    @cached_property
    def head_per_token(self) -> float:
        """Bytes per token that the final norm and the head keep."""
        shape, setup = self.shape, self.setup
        read = setup.compute_bytes if setup.autocasts else setup.stream_bytes
        return shape.norm_bytes(shape.hidden, setup.stream_bytes) + read * shape.hidden

    @cached_property
    def rope_per_token(self) -> float:
        """Bytes per token of sines and cosines."""
        return 2 * self.setup.stream_bytes * self.shape.key_dim

    @cached_property
    def stack(self) -> float:
        """Activations of all layers."""
        tokens = self.load.tokens
        always = tokens * (self.head_per_token + self.rope_per_token)
        return always + self.shape.layers * tokens * self.kept.per_token

    @cached_property
    def all_kv(self) -> float:
        return self.shape.layers * self.kept.received_kv

    @cached_property
    def logits(self) -> float:
        """Number of logits."""
        return self.load.tokens * self.shape.vocabulary

    @cached_property
    def softcap(self) -> float:
        """Bytes of the logits that softcapping keeps."""
        return self.setup.compute_bytes * self.logits * self.shape.softcapped

    @property
    def kept_bytes(self) -> float:
        """Bytes that forward keeps for backward."""
        return self.stack + (4 * self.logits + self.softcap) + self.all_kv + self.gathered.kept

    @cached_property
    def in_layer(self) -> BackwardPoint:
        """The point with the most bytes in a layer's backward."""
        freed = self.load.tokens * self.layer.block
        in_attention = attention_backward(self.shape, self.setup, self.load, kept=self.keeps_kv, freed=freed)
        in_block = BackwardPoint(self.load.tokens * self.layer.backward)
        return max((in_block, *in_attention), key=lambda point: point.total)

    def loss(self) -> _Moment:
        c = self.setup.compute_bytes
        logits = (c + 4 + 4 * (c != 4)) * self.logits + self.softcap
        return _Moment(0, self.stack, logits, self.all_kv, self.gathered.forward)

    def loss_backward(self) -> _Moment:
        return _Moment(0, self.stack, 12 * self.logits + self.softcap, self.all_kv, self.gathered.loss_backward)

    def head_backward(self) -> _Moment:
        c, embedding = self.setup.compute_bytes, self.shape.embedding_parameters
        cast_head = c * embedding * (self.setup.weight_bytes != c or self.shards > 1)
        temporary = self.load.tokens * self.setup.stream_bytes * self.shape.hidden + cast_head
        logits = c * self.logits
        return _Moment(embedding, self.stack, logits, self.all_kv, self.gathered.loss_backward, temporary)

    def last_layer_backward(self) -> _Moment:
        shape, setup, tokens, in_layer = self.shape, self.setup, self.load.tokens, self.in_layer
        head_is_reduced = setup.sharding == "fsdp2" and shape.tied
        of_layer = setup.weight_bytes * shape.layer_parameters / 3 * (self.shards == 1)
        return _Moment(
            parameters=0 if head_is_reduced else shape.embedding_parameters + shape.hidden,
            activations=self.stack - tokens * self.head_per_token + tokens * self.repeated.per_token - in_layer.freed,
            received_kv=self.all_kv + self.repeated.received_kv,
            gathered=self.gathered.backward,
            temporary=in_layer.temporary + of_layer,
            workspace=in_layer.workspace,
        )

    def first_layer_backward(self) -> _Moment:
        shape, tokens, in_layer = self.shape, self.load.tokens, self.in_layer
        one = tokens * (self.kept.per_token + self.repeated.per_token)
        without = shape.embedding_parameters * (not shape.tied)
        return _Moment(
            parameters=shape.parameters - without - shape.layer_parameters * 2 / 3,
            activations=one + tokens * self.rope_per_token - in_layer.freed,
            received_kv=self.kept.received_kv + self.repeated.received_kv,
            gathered=self.gathered.first_layer,
            temporary=in_layer.temporary,
            workspace=in_layer.workspace,
        )

    def embedding_backward(self) -> _Moment:
        shape, setup = self.shape, self.setup
        itemsize = setup.weight_bytes if self.shards == 1 else setup.compute_bytes
        temporary = self.load.tokens * setup.stream_bytes * shape.hidden
        temporary += itemsize * shape.embedding_parameters * shape.tied
        return _Moment(shape.parameters, gathered=self.gathered.embedding, temporary=temporary)

    def optimizer(self) -> _Moment:
        return _Moment(self.shape.parameters, gathered=self.gathered.optimizer)

    def parts(self, moment: _Moment) -> dict[str, float]:
        """Returns the bytes of each of [`PARTS`]."""
        w, parameters = self.setup.weight_bytes, self.shape.parameters
        batch = 8 * (3 * self.load.batch_tokens + 4 * self.load.tokens)
        return {
            "weights": w * parameters / self.shards,
            "gradients": w * moment.parameters / self.shards,
            "optimizer": 2 * w * parameters / self.shards,
            "activations": moment.activations,
            "logits": moment.logits,
            "received KV": moment.received_kv,
            "gathered": moment.gathered,
            "temporary": moment.temporary + batch,
            WORKSPACE: moment.workspace,
        }


class _Layer(NamedTuple):
    """Bytes per token of one layer.

    Attributes:
        kept: what backward needs.
        attention_result: of that, attention's output and logsumexp.
        shared_input: of that, the layer's input.
        backward: what backward has at most beside it, in the feed-forward block, weight gradients apart.
        block: of `kept`, what the feed-forward block and its norm keep, which their backward frees.
    """

    kept: float
    attention_result: float
    shared_input: float
    backward: float
    block: float


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


def largest_window(
    shape: MemoryShape,
    setup: TrainingSetup,
    cp_size: int,
    memory_bytes: float,
    load: RankLoad,
    *,
    multiple: int = 1024,
) -> int:
    """Returns the most tokens of a packed row that fit, a multiple of `multiple`; 0 if not even that many do.

    Args:
        shape (`MemoryShape`): the model's sizes.
        setup (`TrainingSetup`): how it is trained.
        cp_size (`int`): ranks that share the row.
        memory_bytes (`float`): bytes that a device has for training.
        load (`RankLoad`): what a rank holds and moves of some row, longer or shorter ones in proportion.
        multiple (`int`): step of the search, in tokens.
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
