"""Estimates what the layers of a model hold for their backward, on the device and on the host."""

from __future__ import annotations

import math
from typing import NamedTuple

from ..plan.traffic import MOST_KEPT
from .attention_memory import BackwardPoint
from .memory_shape import MemoryShape
from .mixer_memory import mixer_bytes, state_bytes
from .training_setup import RankLoad, TrainingSetup


class Layer(NamedTuple):
    """Memory of one layer, in bytes per token. In a hybrid model the parts are means over layers."""

    kept: float  # everything that is kept for backward
    attention_result: float  # the part of `kept` that is attention's output and logsumexp
    shared_input: float  # the part of `kept` that is the layer's input
    block: float  # the part of `kept` that the feed-forward block and its norm keep and free in their backward


def layer_bytes(shape: MemoryShape, setup: TrainingSetup) -> Layer:
    """Return what one layer keeps for its backward."""
    c, s = setup.compute_bytes, setup.stream_bytes
    block = _block_bytes(shape, setup)
    read = 3 * c if setup.autocasts else s
    attention = shape.attention_share * (
        shape.norm_bytes(shape.hidden, s)
        + read * shape.hidden
        + shape.norm_bytes(shape.normed_width + shape.latent_width, c)
        + c * (shape.latent_width + shape.latent_keys)
        + c * (shape.query_heads * shape.key_dim + shape.kv_width + 2 * shape.output_gates)
    )
    result = shape.attention_share * sum(_attention_result(shape, setup))
    mixing = 0.0
    if shape.recurrent:
        mixing = shape.recurrent.count / shape.layers * mixer_bytes(shape, shape.recurrent, setup)
    more_norms = (shape.norms - 2) * shape.norm_bytes(shape.hidden, s)
    kept = attention + result + mixing + block + more_norms
    return Layer(kept, result, 4 * shape.hidden if s == 4 else 0, block)


def _attention_result(shape: MemoryShape, setup: TrainingSetup) -> tuple[float, float]:
    """Return the bytes per token of an attention layer's output and of its logsumexp."""
    return setup.compute_bytes * shape.query_heads * shape.value_dim, 4 * shape.query_heads


def _block_bytes(shape: MemoryShape, setup: TrainingSetup) -> float:
    """Return the bytes per token that the feed-forward block and the norm before it keep."""
    c, s, readers = setup.compute_bytes, setup.stream_bytes, 2 if shape.gated else 1
    read = c * readers if setup.autocasts else s
    tiled = shape.dense_share if setup.mlp_tiles > 1 else 0.0
    inputs = (shape.block_share - tiled) * read + tiled * s
    inner = shape.kept_widths * c * (shape.intermediate - tiled * shape.dense_width)
    # Each expert keeps a copy of its tokens, and its output before it is weighted.
    routed = 2 * c * shape.hidden * shape.experts_per_token
    return shape.block_share * shape.norm_bytes(shape.hidden, s) + inputs * shape.hidden + inner + routed


def block_backward(shape: MemoryShape, setup: TrainingSetup, tokens: float) -> list[BackwardPoint]:
    """Return the points in a feed-forward block's backward at which memory can be at its highest.

    The gradients of both factors of a gated product are allocated in addition to the factors. A block in tiles has
    fp32 sums of its weights' gradients, and either the inner activations of a tile with their gradients or the tile's
    gradients of the weights, of which PyTorch casts one after another to add them on a CPU. Other gradients of weights
    are not included. Under FSDP2 they are the same for all points, so the block's own, which come after the sums, are
    taken off.
    """
    c, s, factors = setup.compute_bytes, setup.stream_bytes, 2 if shape.gated else 1
    around = 2 * s * shape.hidden * tokens
    tiled = shape.dense_share if setup.mlp_tiles > 1 else 0.0
    points = [BackwardPoint(around + factors * c * (shape.intermediate - tiled * shape.dense_width) * tokens)]
    if tiled:
        tile, weights = math.ceil(tokens / setup.mlp_tiles), shape.dense_parameters
        inner = (shape.kept_widths + factors) * c * shape.dense_width + c * factors * shape.hidden * setup.autocasts
        cast = 4 * weights / (factors + 1) * (c != 4 and setup.device == "cpu")
        sums = (4 - c * (setup.sharding == "fsdp2")) * weights
        points.append(BackwardPoint(around + sums + max(tile * inner, c * weights + cast)))
    return points


class Held(NamedTuple):
    """Device memory that one or more layers hold for their backward, in bytes."""

    activations: float
    received_kv: float
    states: float  # kept in recurrent layers because documents are cut

    def plus(self, other: Held) -> Held:
        """Return the sum of both."""
        return Held(*map(sum, zip(self, other)))


class LayerStack:
    """What the layers of a model hold for their backward under a kind of activation checkpointing.

    Args:
        shape (`MemoryShape`): sizes of the model.
        setup (`TrainingSetup`): how the model is trained. Of `every_n_layers` layers the first is checkpointed.
        load (`RankLoad`): what the rank holds and moves.
    """

    def __init__(self, shape: MemoryShape, setup: TrainingSetup, load: RankLoad):
        self.shape, self.setup, self.load = shape, setup, load
        mode, layer = setup.gradient_checkpointing, layer_bytes(shape, setup)
        within_bound = load.received <= MOST_KEPT * load.tokens
        given = setup.keep_received_kv
        self.keeps_kv = within_bound if given is None else given
        """Whether attention layers that do not run again keep received KV until their backward."""
        self.keeps_kv_again = True if mode == "full" and given is None else self.keeps_kv
        """The same of attention layers that run again."""
        self.every = setup.every_n_layers if mode != "none" else 0  # 0: no layer is checkpointed
        self.received_kv = setup.compute_bytes * load.received * shape.kv_width
        states = state_bytes(shape.recurrent, setup, load)
        layer_input = setup.stream_bytes * shape.hidden
        whole = layer_input + layer.kept - layer.shared_input
        kv, kv_again = (self.received_kv * keeps for keeps in (self.keeps_kv, self.keeps_kv_again))
        self._not_checkpointed = Held(load.tokens * layer.kept, kv, states)
        match mode:
            case "none":
                kept, again = self._not_checkpointed, Held(0, 0, 0)
            case "full":
                kept = Held(load.tokens * layer_input, 0, 0)
                again = Held(load.tokens * (whole - layer_input), kv_again, states)
            case "attention-saving":
                results = layer_input + layer.attention_result
                kept, again = Held(load.tokens * results, kv, 0), Held(load.tokens * (whole - results), 0, states)
        if setup.offload and mode != "none":
            kept, again = Held(0, 0, 0), kept.plus(again)
        self._kept, self._again = kept, again

    def runs_again(self, index: int) -> bool:
        """Return whether the layer with this index, from 0, is checkpointed."""
        return bool(self.every) and index % self.every == 0

    @property
    def last_checkpointed(self) -> int | None:
        """Index of the last layer that is checkpointed, or `None` if none is."""
        return (self.shape.layers - 1) // self.every * self.every if self.every else None

    def up_to(self, index: int) -> Held:
        """Return what all layers up to the one with this index hold before any backward.

        Received KV and states are those of the attention layers and recurrent layers among them, at least one of each.
        """
        count, layers = index + 1, self.shape.layers
        checkpointed = index // self.every + 1 if self.every else 0
        shares = (
            1.0,
            max(self.shape.attention_layers / layers, 1 / count) if self.shape.attention_layers else 0,
            max(self.shape.recurrent.count / layers, 1 / count) if self.shape.recurrent else 0,
        )
        return Held(
            *(
                share * (checkpointed * kept + (count - checkpointed) * other)
                for share, kept, other in zip(shares, self._kept, self._not_checkpointed)
            )
        )

    def in_backward(self, index: int) -> Held:
        """Return what the layers up to this one hold when its backward begins and, if need be, it has run again."""
        held = self.up_to(index)
        return held.plus(self._again) if self.runs_again(index) else held

    @property
    def offloaded(self) -> float:
        """Bytes that are copied to the host in forward, and back in backward."""
        return sum(layers * size for layers, size in self._on_host())

    @property
    def on_host(self) -> float:
        """Bytes of pinned host memory that offloading needs.

        PyTorch rounds every pinned tensor up to a power of two (c10/core/CachingHostAllocator.h).
        """
        return sum(layers * _pinned(size) for layers, size in self._on_host())

    def _on_host(self) -> list[tuple[float, float]]:
        """Return the tensors that are offloaded, as the number of layers that have one and its bytes."""
        setup, shape, tokens = self.setup, self.shape, self.load.tokens
        if not (setup.offload and self.last_checkpointed is not None):
            return []
        layers = self.last_checkpointed // self.every + 1
        found = [(float(layers), tokens * setup.stream_bytes * shape.hidden)]
        if setup.gradient_checkpointing == "attention-saving":
            found += [(layers * shape.attention_share, tokens * each) for each in _attention_result(shape, setup)]
            found += [(layers * shape.attention_layers / shape.layers, self.received_kv * self.keeps_kv)]
        return found


def _pinned(size: float) -> int:
    """Return the size of a pinned tensor, which is rounded up to a power of two."""
    return 1 << (round(size) - 1).bit_length() if size >= 1 else 0
