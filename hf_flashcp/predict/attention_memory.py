"""The memory that the backward of one attention layer needs, and FlashAttention-2's workspace as a part of it.

Source of the workspace: `mha_varlen_bwd` in csrc/flash_attn/flash_api.cpp of flash-attn 2.8.3. PyTorch's own copy of
the kernel (`aten::_flash_attention_backward`) allocates the same. FlashAttention-3 and 4 allocate other buffers.
"""

from __future__ import annotations

from typing import NamedTuple

from .memory_shape import MemoryShape
from .training_setup import RankLoad, TrainingSetup


WIDEST_HEAD = 256
"""The widest head that FlashAttention-2's backward supports, in elements."""

_BLOCK = 128  # rows by which the sequences of a call are kept apart in the fp32 buffers


def backward_buffers(
    shape: MemoryShape, queries: float, keys: float, sequences: float = 1, itemsize: int = 2
) -> dict[str, float]:
    """Bytes of each buffer that one backward call of FlashAttention-2 allocates, deterministic mode aside, on rows of
    queries and keys in so many sequences, one per rectangle of both.

    With D the wider of key and value heads, rounded up to a multiple of 8 (`VarlenKernel` pads both to it):

    - `dq_accum`: fp32, for queries + 128 rows per sequence and all query heads, D rounded up to a multiple of 32, or
      of 64 above 128;
    - `softmax_d`: fp32, for the same rows and heads;
    - `expanded dk, dv`: in the compute dtype, one head per query head, unless there are as many KV heads;
    - `dq` and `dk, dv`: the results in the compute dtype, which `VarlenKernel` adds to its fp32 sums;
    - `padded inputs`: copies of those inputs (query, key, value, output and its gradient) that are narrower than D.
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
    """Sum of [`backward_buffers`]; 0 where FlashAttention-2 cannot run: in fp32, and with heads above
    [`WIDEST_HEAD`]."""
    if itemsize > 2 or max(shape.key_dim, shape.value_dim) > WIDEST_HEAD:
        return 0
    return sum(backward_buffers(shape, queries, keys, sequences, itemsize).values())


class BackwardPoint(NamedTuple):
    """Bytes at one point in a layer's backward: allocated beside what the layer keeps, by the attention kernel as
    [`backward_workspace`], and freed by then of what the layer keeps."""

    temporary: float
    workspace: float = 0
    freed: float = 0

    @property
    def total(self) -> float:
        return self.temporary + self.workspace - self.freed


def attention_backward(
    shape: MemoryShape, setup: TrainingSetup, load: RankLoad, *, kept: bool, freed: float
) -> list[BackwardPoint]:
    """The points in an attention layer's backward (`Engine.backward`) at which memory can be at its highest, `freed`
    being the bytes that the layer's feed-forward block has freed by then.

    Throughout, the gradients of the rank's queries, keys and values are summed in fp32. A stage sums those of its keys
    in fp32 too, then casts them and sends them home; the cast rows live until the local pass is done. KV that was not
    kept is fetched for all stages at once, and each stage's part is freed after its kernel call.
    """
    c, kv, tokens, stage_keys = setup.compute_bytes, shape.kv_width, load.tokens, load.largest_stage
    queries = tokens * shape.query_heads * shape.key_dim
    sums = queries + tokens * kv
    incoming = c * tokens * shape.query_heads * shape.value_dim + 2 * tokens * setup.stream_bytes * shape.hidden
    always = 4 * sums + incoming
    # Rows sent need packed KV, or room for the gradients that come home. Keys of the other stages have gradients under
    # way, or are fetched KV.
    around = always + c * kv * (load.sent + max(load.received - stage_keys, 0))
    stage = around + 4 * kv * stage_keys + (0 if kept else c * kv * stage_keys)

    def kernel_call(before: float, keys: float) -> BackwardPoint:
        if setup.device == "cuda":
            return BackwardPoint(before, backward_workspace(shape, tokens, keys, load.sequences, c), freed)
        # The call's results, of which one at a time is cast to fp32 to be added: a GPU adds them without a copy.
        widest = max(queries, keys * shape.kv_heads * max(shape.key_dim, shape.value_dim))
        return BackwardPoint(before + c * (queries + kv * keys) + 4 * widest, 0, freed)

    return [
        kernel_call(stage, stage_keys),
        BackwardPoint(stage + c * kv * stage_keys, 0, freed),  # the stage's gradients are cast
        kernel_call(always + c * kv * (load.sent + load.received), tokens),  # the local pass
        BackwardPoint(always + c * sums, 0, freed),  # all sums are cast, those from other ranks added before
    ]


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
