"""Estimates the memory for the backward of one attention layer, including the workspace of FlashAttention-2.

The workspace follows `mha_varlen_bwd` in csrc/flash_attn/flash_api.cpp of flash-attn 2.8.3. PyTorch's copy of that
kernel (`aten::_flash_attention_backward`) allocates the same buffers. FlashAttention-3 and 4 allocate others.
"""

from __future__ import annotations

from typing import NamedTuple

from .memory_shape import MemoryShape
from .training_setup import RankLoad, TrainingSetup


WIDEST_HEAD = 256
"""The widest head that FlashAttention-2's backward supports, in elements."""

_BLOCK = 128  # rows of padding per sequence in the fp32 buffers


def backward_buffers(
    shape: MemoryShape, queries: float, keys: float, sequences: float = 1, itemsize: int = 2
) -> dict[str, float]:
    """Return the bytes of each buffer that one backward call of FlashAttention-2 allocates.

    The buffers of deterministic mode are not counted. Below, D is the wider of key and value heads, rounded up to a
    multiple of 8, to which `VarlenKernel` pads both.

    Args:
        shape (`MemoryShape`): sizes of the model.
        queries (`float`): number of query rows.
        keys (`float`): number of key rows.
        sequences (`float`, *optional*, defaults to 1): number of sequences in the call, one per rectangle.
        itemsize (`int`, *optional*, defaults to 2): bytes per element of the compute dtype.

    Returns:
        `dict[str, float]`: bytes by buffer.

        - `dq_accum`: fp32, for queries + 128 rows per sequence and for all query heads. The width is D rounded up to a
          multiple of 32, or of 64 above 128.
        - `softmax_d`: fp32, for the same rows and heads.
        - `expanded dk, dv`: compute dtype, with one head per query head; 0 if there are as many KV heads.
        - `dq` and `dk, dv`: the results in the compute dtype, which `VarlenKernel` adds to its fp32 sums.
        - `padded inputs`: copies of the inputs (query, key, value, output, output gradient) that are narrower than D.
    """
    heads, kv_heads = shape.query_heads, shape.kv_heads
    width = _round_up(max(shape.key_dim, shape.value_dim), 8)
    rows = queries + _BLOCK * sequences
    query_bytes, key_bytes = itemsize * queries * heads * width, itemsize * keys * kv_heads * width
    padded = (query_bytes + key_bytes) * (shape.key_dim < width)
    padded += (2 * query_bytes + key_bytes) * (shape.value_dim < width)
    return {
        "dq_accum": 4 * rows * heads * _round_up(width, 32 if width <= 128 else 64),
        "softmax_d": 4 * rows * heads,
        "expanded dk, dv": 2 * itemsize * keys * heads * width if heads != kv_heads else 0,
        "dq": query_bytes,
        "dk, dv": 2 * key_bytes,
        "padded inputs": padded,
    }


def backward_workspace(
    shape: MemoryShape, queries: float, keys: float, sequences: float = 1, itemsize: int = 2
) -> float:
    """Return the sum of [`backward_buffers`], or 0 if FlashAttention-2 cannot run.

    It cannot run in fp32 or with heads wider than [`WIDEST_HEAD`].
    """
    if itemsize > 2 or max(shape.key_dim, shape.value_dim) > WIDEST_HEAD:
        return 0
    return sum(backward_buffers(shape, queries, keys, sequences, itemsize).values())


class BackwardPoint(NamedTuple):
    """Memory at one point in a layer's backward, in bytes, on top of what the layer has kept for backward."""

    temporary: float  # all other buffers
    workspace: float = 0  # buffers of the attention kernel, see `backward_workspace`
    freed: float = 0  # the part of the kept memory that has been freed by then

    @property
    def total(self) -> float:
        """Bytes on top of what the layer has kept, less the freed part."""
        return self.temporary + self.workspace - self.freed


def attention_backward(
    shape: MemoryShape, setup: TrainingSetup, load: RankLoad, *, kept: bool, freed: float
) -> list[BackwardPoint]:
    """Return the points in an attention layer's backward (`Engine.backward`) at which memory can be at its highest.

    The gradients of the rank's queries, keys and values are summed in fp32 from beginning to end. A stage sums the
    gradients of its keys in fp32, too. It then casts them and sends them to the ranks that hold the keys; the cast
    rows stay allocated until the local pass is done. KV that was not kept is fetched for all stages at once, and the
    part of each stage is freed after its kernel call.

    Args:
        shape (`MemoryShape`): sizes of the model.
        setup (`TrainingSetup`): how the model is trained.
        load (`RankLoad`): what the rank holds and moves.
        kept (`bool`): whether received KV was kept from forward.
        freed (`float`): bytes that the layer's feed-forward block has freed by then.
    """
    c, kv, tokens, stage_keys = setup.compute_bytes, shape.kv_width, load.tokens, load.largest_stage
    queries = tokens * shape.query_heads * shape.key_dim
    sums = queries + tokens * kv
    incoming = c * tokens * shape.query_heads * shape.value_dim + 2 * tokens * setup.stream_bytes * shape.hidden
    always = 4 * sums + incoming
    # Rows that were sent need room for packed KV, or for the gradients that come back. Keys of the other stages need
    # room for gradients on their way, or for fetched KV.
    around = always + c * kv * (load.sent + max(load.received - stage_keys, 0))
    stage = around + 4 * kv * stage_keys + (0 if kept else c * kv * stage_keys)

    def kernel_call(before: float, keys: float) -> BackwardPoint:
        if setup.device == "cuda":
            return BackwardPoint(before, backward_workspace(shape, tokens, keys, load.sequences, c), freed)
        # On a CPU the call's results are cast to fp32, one at a time, before they are added. A GPU needs no such copy.
        widest = max(queries, keys * shape.kv_heads * max(shape.key_dim, shape.value_dim))
        return BackwardPoint(before + c * (queries + kv * keys) + 4 * widest, 0, freed)

    return [
        kernel_call(stage, stage_keys),
        BackwardPoint(stage + c * kv * stage_keys, 0, freed),  # the stage's gradients are cast
        kernel_call(always + c * kv * (load.sent + load.received), tokens),  # the local pass
        BackwardPoint(always + c * sums, 0, freed),  # all sums are cast, after gradients from other ranks were added
    ]


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
