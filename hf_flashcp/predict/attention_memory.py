"""Estimates the memory for the backward of one attention layer, including the buffers of the attention kernel.

A varlen call of backward allocates buffers for its sums, and copies what it cannot read in place. Which ones depends
on the kernel. With H query heads and H_kv KV heads, D wide, for Q queries and K keys, the largest are

    FlashAttention-2     sums of dq in fp32 (Q, H, D); dk and dv for every query head, in the compute dtype (K, H, D)
    cuDNN                the same, with dk and dv in fp32
    FlashAttention-3, 4  sums of dq in fp32 (Q, H, D); sums of dk and dv in fp32 (K, H_kv, D)

Gradients of keys for every query head are large where a rank has few queries for many keys. There `VarlenKernel`
folds query heads into queries ([`~plan.kernel_calls.folds_heads`]), for which it copies queries, outputs and the
gradients of outputs.

Sources: `mha_varlen_bwd` in csrc/flash_attn/flash_api.cpp of flash-attn 2.8.3, of which PyTorch has a copy
(`aten::_flash_attention_backward`); `mha_bwd` in hopper/flash_api_stable.cpp of FlashAttention-3; `_flash_attn_bwd` in
flash_attn/cute/interface.py of flash-attn-4 4.0.0b36; for cuDNN, whose source is closed, the workspace sizes of the
plans that cuDNN 9.20 makes through nvidia-cudnn-frontend 1.18.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

from ..plan.kernel_calls import declared_rows, folds_heads, kernel_grids
from .memory_shape import MemoryShape
from .training_setup import RankLoad, TrainingSetup


WIDEST_HEAD = 256
"""The widest head that the fused kernels support in backward, in elements."""

_BLOCK = 128  # rows of padding per sequence in the fp32 buffers
_EXPANDING = ("torch_flash", "flash_attn_2", "cudnn")  # kernels with gradients of keys for every query head


class _Call(NamedTuple):
    """Sizes of one backward call as the kernel sees it: query heads may be folded into queries."""

    queries: float
    keys: float
    sequences: float
    heads: int
    kv_heads: int
    key_width: int
    value_width: int
    itemsize: int

    @property
    def grouped(self) -> bool:
        """Whether query heads share KV heads."""
        return self.heads != self.kv_heads

    @property
    def widest(self) -> int:
        """The wider of key and value heads."""
        return max(self.key_width, self.value_width)


def backward_buffers(
    shape: MemoryShape,
    queries: float,
    keys: float,
    sequences: float = 1,
    itemsize: int = 2,
    *,
    kernel: str = "torch_flash",
    masked: bool = False,
) -> dict[str, float]:
    """Return the bytes of each buffer that one backward call of a kernel allocates.

    The buffers of deterministic mode are not counted, nor the semaphores of FlashAttention-3. Below, D is
    the width to which `VarlenKernel` pads heads: for cuDNN, that of keys and that of values rounded up to multiples of
    16; for the other kernels, the wider of the two rounded up to a multiple of 8.

    Args:
        shape (`MemoryShape`): sizes of the model.
        queries (`float`): number of query rows.
        keys (`float`): number of key rows.
        sequences (`float`, *optional*, defaults to 1): number of sequences in the call, one per rectangle.
        itemsize (`int`, *optional*, defaults to 2): bytes per element of the compute dtype.
        kernel (`str`, *optional*, defaults to `"torch_flash"`): name of a varlen kernel, see
            [`~plan.kernel_calls.GRIDS`].
        masked (`bool`, *optional*, defaults to `False`): whether the call has a causal mask. If so, query heads are
            not folded.

    Returns:
        `dict[str, float]`: bytes by buffer.

        - `dq_accum`: fp32, for all query heads. FlashAttention-2 has one row per query and 128 more per sequence,
          FlashAttention-3 and 4 round that up to a multiple of 128, and for cuDNN queries are rounded up, see
          [`~plan.kernel_calls.declared_rows`]. FlashAttention-2 and 4 round D up to a multiple of 32, or of 64 above
          128, FlashAttention-3 to 64, 96, 128, 192 or 256.
        - `softmax_d`: fp32, one element for the same rows and heads; with FlashAttention-3 and 4 also `lse_log2`, with
          cuDNN also `statistics`, the logsumexp in another order.
        - `expanded dk, dv`: FlashAttention-2 and cuDNN, for all query heads; 0 if there are as many KV heads.
          FlashAttention-2 has one row per key in the compute dtype, cuDNN rounds the keys up and uses fp32.
        - `dk_accum, dv_accum`: FlashAttention-3 and 4, fp32, for all KV heads, with rows as for `dq_accum`; 0 if there
          are as many KV heads as query heads.
        - `dq` and `dk, dv`: the results in the compute dtype, which `VarlenKernel` adds to its fp32 sums.
        - `padded inputs`: copies of the inputs (query, key, value, output, output gradient) that are narrower than D.
        - `folded inputs`: copies of query, output, output gradient and logsumexp in which query heads are folded. With
          a single KV head, the first three are not copied. Unfolding copies dq once more, but only when `dq_accum`,
          which is larger, has been freed.

    Raises:
        PlanError: there is no varlen kernel of that name.
    """
    kernel_grids(kernel)
    heads, kv_heads = shape.query_heads, shape.kv_heads
    key_width, value_width = _widths(shape, kernel)
    of_queries, of_outputs = (itemsize * queries * heads * width for width in (key_width, value_width))
    of_keys, of_values = (itemsize * keys * kv_heads * width for width in (key_width, value_width))
    padded = (of_queries + of_keys) * (shape.key_dim < key_width)
    padded += (2 * of_outputs + of_values) * (shape.value_dim < value_width)
    copied = 0.0
    call = _Call(queries, keys, sequences, heads, kv_heads, key_width, value_width, itemsize)
    if kernel in _EXPANDING and not masked and call.grouped and folds_heads(queries, keys):
        copied = (of_queries + 2 * of_outputs) * (kv_heads > 1) + 4 * queries * heads
        call = call._replace(queries=queries * heads / kv_heads, heads=kv_heads)
    return {
        **_KERNEL_BUFFERS.get(kernel, _flash_attention_2)(call),
        "dq": of_queries,
        "dk, dv": of_keys + of_values,
        "padded inputs": padded,
        "folded inputs": copied,
    }


def backward_workspace(
    shape: MemoryShape,
    queries: float,
    keys: float,
    sequences: float = 1,
    itemsize: int = 2,
    *,
    kernel: str = "torch_flash",
    masked: bool = False,
) -> float:
    """Return the sum of [`backward_buffers`], or 0 if no fused kernel can run.

    None can run in fp32 or with heads wider than [`WIDEST_HEAD`].
    """
    if itemsize > 2 or max(shape.key_dim, shape.value_dim) > WIDEST_HEAD:
        return 0
    return sum(backward_buffers(shape, queries, keys, sequences, itemsize, kernel=kernel, masked=masked).values())


def _widths(shape: MemoryShape, kernel: str) -> tuple[int, int]:
    if kernel == "cudnn":
        return _round_up(shape.key_dim, 16), _round_up(shape.value_dim, 16)
    width = _round_up(max(shape.key_dim, shape.value_dim), 8)
    return width, width


def _flash_attention_2(call: _Call) -> dict[str, float]:
    rows = call.heads * (call.queries + _BLOCK * call.sequences)
    expanded = call.itemsize * call.keys * call.heads * (call.key_width + call.value_width)
    return {
        "dq_accum": 4 * rows * _width_of_sums(call.widest),
        "softmax_d": 4 * rows,
        "expanded dk, dv": expanded * call.grouped,
    }


def _flash_attention_3(call: _Call) -> dict[str, float]:
    return _with_kv_sums(call, next(width for width in (64, 96, 128, 192, 256) if width >= call.widest))


def _flash_attention_4(call: _Call) -> dict[str, float]:
    return _with_kv_sums(call, _width_of_sums(call.widest))


def _with_kv_sums(call: _Call, width: int) -> dict[str, float]:
    query_rows, key_rows = (
        _round_up(rows + _BLOCK * call.sequences, _BLOCK) * heads
        for rows, heads in ((call.queries, call.heads), (call.keys, call.kv_heads))
    )
    return {
        "dq_accum": 4 * query_rows * width,
        "softmax_d": 4 * query_rows,
        "lse_log2": 4 * query_rows,
        "dk_accum, dv_accum": 2 * 4 * key_rows * width * call.grouped,
    }


def _cudnn(call: _Call) -> dict[str, float]:
    query_rows, key_rows = (call.heads * declared_rows(rows) for rows in (call.queries, call.keys))
    return {
        "dq_accum": 4 * query_rows * call.key_width,
        "softmax_d": 4 * query_rows,
        "expanded dk, dv": 4 * key_rows * (call.key_width + call.value_width) * call.grouped,
        "statistics": 4 * call.queries * call.heads,
    }


def _width_of_sums(width: int) -> int:
    return _round_up(width, 32 if width <= 128 else 64)


_KERNEL_BUFFERS = {
    "flash_attn_3": _flash_attention_3,
    "flash_attn_4": _flash_attention_4,
    "cudnn": _cudnn,
}  # the other kernels are FlashAttention-2


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

    The gradients that kernels return stay allocated: those of queries until all of them are added, those of a stage's
    keys until they are packed to be sent. Packed rows stay allocated until the local pass is done. KV that was not
    kept is fetched for all stages at once, and the local pass runs first; the part of each stage is freed after its
    kernel call. On a GPU, kernels return gradients of keys in the dtype of the keys, on a CPU in at least fp32.

    With `head_groups`, all of this exists for one group of KV heads at a time, except the gradients of attention's
    inputs and output, which have all heads, and KV that was kept.

    Args:
        shape (`MemoryShape`): sizes of the model.
        setup (`TrainingSetup`): how the model is trained.
        load (`RankLoad`): what the rank holds and moves.
        kept (`bool`): whether received KV was kept from forward.
        freed (`float`): bytes that the layer's feed-forward block has freed by then.
    """
    c, tokens, stage_keys = setup.compute_bytes, load.tokens, load.largest_stage
    incoming = c * tokens * shape.query_heads * shape.value_dim + 2 * tokens * setup.stream_bytes * shape.hidden
    if (groups := min(setup.head_groups, shape.kv_heads)) > 1:
        incoming += c * tokens * (shape.query_heads * shape.key_dim + shape.kv_width)  # gradients of all heads
        kv_heads = math.ceil(shape.kv_heads / groups)
        shape = replace(shape, query_heads=kv_heads * (shape.query_heads // shape.kv_heads), kv_heads=kv_heads)
    kv = shape.kv_width
    summed = c if setup.device == "cuda" else max(c, 4)  # bytes of an element in a kernel's gradients of keys
    queries = c * tokens * shape.query_heads * shape.key_dim
    stages = math.ceil(load.received / stage_keys) if stage_keys else 0
    # Rows that were sent need room for packed KV, or for the gradients that come back. Keys of the other stages need
    # room for gradients on their way, or for fetched KV.
    around = incoming + c * kv * (load.sent + max(load.received - stage_keys, 0)) + queries * max(stages - 1, 0)
    if not kept:
        around += queries + summed * kv * tokens + c * kv * stage_keys

    def kernel_call(before: float, keys: float, masked: bool) -> BackwardPoint:
        if setup.device == "cuda":
            sizes = tokens, keys, load.sequences, c
            return BackwardPoint(before, backward_workspace(shape, *sizes, kernel=setup.kernel, masked=masked), freed)
        # A CPU kernel adds the results of blocks, which are as large as all of them if there is a single block. To be
        # added, gradients of keys are cast to fp32, and then those of values.
        cast = summed * keys * shape.kv_heads * max(shape.key_dim, shape.value_dim) if summed > c else 0
        return BackwardPoint(before + 2 * queries + (c + summed) * kv * keys + cast, 0, freed)

    end = incoming + c * kv * load.sent + queries * (stages + 1) + summed * kv * tokens
    return [
        kernel_call(around, stage_keys, load.stage_masked),
        BackwardPoint(around + queries + (summed + c) * kv * stage_keys, 0, freed),  # the gradients of keys are packed
        kernel_call(incoming + c * kv * (load.sent + load.received) + queries * stages, tokens, masked=True),
        BackwardPoint(end + (c * kv * tokens if summed > c else 0), 0, freed),  # gradients have been added
    ]


def _round_up(number: float, multiple: int) -> int:
    return math.ceil(number / multiple) * multiple
