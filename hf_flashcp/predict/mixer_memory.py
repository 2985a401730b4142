"""Estimates the memory of one recurrent or convolutional layer: what it keeps, and the buffers of its backward.

The estimate assumes fused kernels, which keep the operands of a chunk's products and compute the states at the ends of
chunks again in backward. The eager code of transformers needs several times as much.

Sources: what `ChunkGatedDeltaRuleFunction` (fla/ops/gated_delta_rule/chunk.py, fla-core 0.6.0) and
`MambaChunkScanCombinedFn` (mamba_ssm/ops/triton/ssd_combined.py, 2.3.2) save for backward. Nothing was measured.
"""

from __future__ import annotations

from .attention_memory import BackwardPoint
from .memory_shape import MemoryShape
from .model_shape import STATE_BYTES, RecurrentLayers
from .training_setup import RankLoad, TrainingSetup


def mixer_bytes(shape: MemoryShape, recurrent: RecurrentLayers, setup: TrainingSetup) -> float:
    """Return the bytes per token that a mixer and the norm before it keep for backward.

    They are the input, the short convolution's input and output, the gate, and the input of the last projection. A
    recurrent mixer also keeps normed queries and keys, the inverse of every chunk, and the output of the scan with its
    norm.
    """
    c, s = setup.compute_bytes, setup.stream_bytes
    read = 2 * c if setup.autocasts else s
    kept = shape.norm_bytes(shape.hidden, s) + read * shape.hidden + 2 * c * recurrent.halo_width
    if not recurrent.summary_bytes:
        return kept + 4 * c * recurrent.inner_width  # the three factors of two products, and the last product
    inverse = recurrent.heads * recurrent.chunk if recurrent.response_width else 0
    operands = 2 * recurrent.response_width + inverse + 3 * recurrent.inner_width
    return kept + c * operands + shape.norm_bytes(recurrent.inner_width, c) + 2 * STATE_BYTES * recurrent.heads


def state_bytes(recurrent: RecurrentLayers | None, setup: TrainingSetup, load: RankLoad) -> float:
    """Return the bytes that a layer keeps for backward because documents are cut.

    They are a decay and an entry state per slice of such a document, and, for delta rules, the response of each output
    to the entry state in slices that continue a document.
    """
    if recurrent is None:
        return 0
    response = setup.compute_bytes * load.continued_tokens * recurrent.response_width
    return load.states_held * recurrent.summary_bytes + response


def mixer_backward(
    shape: MemoryShape, recurrent: RecurrentLayers, setup: TrainingSetup, load: RankLoad, freed: float
) -> BackwardPoint:
    """Return the memory in a mixer's backward.

    It holds the gradients of the scan's operands, the states at the ends of chunks with their gradients, and the
    gradients of states of other ranks.

    Args:
        shape (`MemoryShape`): sizes of the model.
        recurrent (`RecurrentLayers`): the recurrent layers.
        setup (`TrainingSetup`): how the model is trained.
        load (`RankLoad`): what the rank holds and moves.
        freed (`float`): bytes that the layer's feed-forward block has freed by then.
    """
    c, tokens = setup.compute_bytes, load.tokens
    incoming = 2 * tokens * setup.stream_bytes * shape.hidden
    operands = 2 * recurrent.halo_width + 2 * recurrent.inner_width + 2 * recurrent.response_width
    states = 2 * tokens / recurrent.chunk * recurrent.state_elements
    received = load.states_received * recurrent.summary_bytes
    return BackwardPoint(incoming + c * (tokens * operands + states) + received, 0, freed)
