"""Memory of gathered and cast weights, and of gradients that are being reduced."""

from __future__ import annotations

from typing import NamedTuple

from .memory_shape import MemoryShape
from .training_setup import TrainingSetup


class Gathered(NamedTuple):
    """Bytes of copies of weights and gradients beside the optimizer's, by moment, and what forward keeps for
    backward."""

    forward: float
    loss_backward: float
    backward: float
    first_layer: float
    embedding: float
    optimizer: float
    kept: float


def gathered_memory(shape: MemoryShape, setup: TrainingSetup) -> Gathered:
    """Returns the copies that a training setup makes."""
    return _by_fsdp2(shape, setup) if setup.sharding == "fsdp2" else _by_ddp(shape, setup)


def _by_fsdp2(shape: MemoryShape, setup: TrainingSetup) -> Gathered:
    """FSDP2 as accelerate wraps it: embedding, every layer, and final norm with head (which stays gathered until its
    backward); a layer is gathered ahead, and in backward a layer's gradients are reduced while the next computes."""
    of_layer = setup.compute_bytes * shape.layer_parameters
    tail = setup.compute_bytes * shape.embedding_parameters
    backward = 4 * of_layer + (2 * tail if shape.tied else 0)
    return Gathered(
        forward=tail + 2 * of_layer,
        loss_backward=tail + of_layer,
        backward=backward,
        first_layer=backward,
        embedding=2 * tail + 2 * of_layer,
        optimizer=0,
        kept=tail,
    )


def _by_ddp(shape: MemoryShape, setup: TrainingSetup) -> Gathered:
    """DDP's buckets hold all gradients once more. Autocast keeps what it casts until its layer's backward, or under
    checkpointing until forward ends."""
    buckets = setup.weight_bytes * shape.parameters if setup.gpus > 1 else 0
    head = setup.compute_bytes * shape.embedding_parameters * setup.autocasts
    of_layer = setup.compute_bytes * shape.layer_parameters * setup.autocasts
    casts = setup.compute_bytes * (shape.layers * shape.layer_parameters + shape.embedding_parameters)
    casts *= setup.autocasts
    checkpointing = setup.gradient_checkpointing != "none"
    kept = head if checkpointing else casts
    return Gathered(
        forward=buckets + casts,
        loss_backward=buckets + kept,
        backward=buckets + (of_layer if checkpointing else casts - head),
        first_layer=buckets + of_layer,
        embedding=buckets,
        optimizer=buckets,
        kept=kept,
    )
