"""Estimates the memory of the loss, with the logits of all tokens or with those of a chunk of tokens at a time.

If logits are skipped, the gradients of the head and of the hidden states are computed in forward, chunk by chunk. The
head's gradient is summed in fp32, and that of the hidden states has the compute dtype. Both exist from the loss to the
head's backward.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from .memory_shape import MemoryShape
from .training_setup import TrainingSetup


CHUNK_LOGITS = 2**28
"""The most logits that a chunk has, unless a single token has more."""

LEAST_CHUNKS = 4
"""The number of chunks that tokens are divided into even if their logits are few."""


def chunk_tokens(tokens: int, vocabulary: int) -> int:
    """Return the number of tokens whose logits exist at the same time.

    Args:
        tokens (`int`): tokens that the rank holds.
        vocabulary (`int`): number of logits of a token.
    """
    return max(min(CHUNK_LOGITS // max(vocabulary, 1), math.ceil(tokens / LEAST_CHUNKS)), 1)


class LossMemory(NamedTuple):
    """Memory of the loss on one device, in bytes, without the hidden states."""

    forward: float  # at the loss
    kept: float  # kept from forward for backward
    loss_backward: float  # in the backward of the loss; 0 if that has computed its gradients in forward
    head_backward: float  # in the head's backward, without the gradients of its weight and of the hidden states


def loss_memory(shape: MemoryShape, setup: TrainingSetup, tokens: float) -> LossMemory:
    """Return the memory of the loss for a number of tokens.

    Logits are computed in the compute dtype and cast to fp32. A softcap keeps another copy of them.
    """
    c, softcap = setup.compute_bytes, setup.compute_bytes * shape.softcapped
    if not setup.skip_logits:
        logits = tokens * shape.vocabulary
        return LossMemory(
            forward=(c + 4 + 4 * (c != 4) + softcap) * logits,
            kept=(4 + softcap) * logits,
            loss_backward=(12 + softcap) * logits,
            head_backward=c * logits,
        )
    logits = chunk_tokens(math.ceil(tokens), shape.vocabulary) * shape.vocabulary
    weights = shape.embedding_parameters
    sums = 4 * weights + c * tokens * shape.hidden
    # First the logits of a chunk exist with their gradients, and then the chunk's gradient of the head, which PyTorch
    # casts before it adds it on a CPU.
    of_weights = (c + 4 * (c != 4 and setup.device == "cpu")) * weights + c * logits
    return LossMemory(
        forward=sums + max((12 + softcap) * logits, of_weights), kept=sums, loss_backward=0, head_backward=sums
    )


def loss_copies(shape: MemoryShape, tokens: int) -> float:
    """Return the bytes that are read and written to add every chunk's gradient of the head in fp32."""
    chunks = math.ceil(tokens / chunk_tokens(tokens, shape.vocabulary))
    return 2 * 4 * shape.embedding_parameters * chunks
