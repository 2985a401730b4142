"""The Triton kernel behind [`~attention.fused_merge`]."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["place_step", "count"])
def merge_rows(
    target,
    source,
    parts,
    steps,
    lse,
    part_lses,
    lse_steps,
    places,
    place_step,
    sinks,
    count,
    HAS_SINKS: tl.constexpr,
    IN_PLACE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Merge partial outputs by their logsumexp, with `source` and `lse` as the first, and write `target` and `lse`.

    If `IN_PLACE`, `source` is `target`, and rows without parts are neither read nor written, unless there are sinks.
    `steps` are those of `target`, `source` and the parts. `lse_steps` are those of `lse` and `part_lses`, each as
    2 n + 1. Computed in the dtype of `lse`. As in [`~kernels.base.merge_logsumexp`], a logsumexp of inf or -inf means
    that there are no keys.
    """
    dtype: tl.constexpr = lse.dtype.element_ty
    head = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    exist = rows < count
    inside = exist[:, None] & (columns < WIDTH)[None, :]
    merged = rows < (count if HAS_SINKS else 0)
    for part in tl.static_range(len(parts)):
        merged |= tl.load(places + rows * place_step + part, mask=exist, other=-1) >= 0
    wanted = merged if IN_PLACE else exist
    lse_at = lse + head * (lse_steps[0] // 2) + rows * (lse_steps[1] // 2)
    own = _known(tl.load(lse_at, mask=wanted, other=float("-inf")))
    largest = own
    for part in tl.static_range(len(parts)):
        place = tl.load(places + rows * place_step + part, mask=exist, other=-1).to(tl.int64)
        at = part_lses[part] + head * (lse_steps[2 + 2 * part] // 2) + place * (lse_steps[3 + 2 * part] // 2)
        largest = tl.maximum(largest, _known(tl.load(at, mask=place >= 0, other=float("-inf"))))
    if HAS_SINKS:
        sink = tl.load(sinks + head).to(dtype)
        largest = tl.maximum(largest, sink)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    share = tl.exp(own - largest)
    at = source + head * steps[2] + rows[:, None] * steps[3] + columns[None, :]
    out = tl.load(at, mask=inside & wanted[:, None], other=0.0).to(dtype) * share[:, None]
    total = share
    for part in tl.static_range(len(parts)):
        place = tl.load(places + rows * place_step + part, mask=exist, other=-1).to(tl.int64)
        at = part_lses[part] + head * (lse_steps[2 + 2 * part] // 2) + place * (lse_steps[3 + 2 * part] // 2)
        share = tl.exp(_known(tl.load(at, mask=place >= 0, other=float("-inf"))) - largest)
        at = parts[part] + head * steps[4 + 2 * part] + place[:, None] * steps[5 + 2 * part] + columns[None, :]
        out += tl.load(at, mask=inside & (place >= 0)[:, None], other=0.0).to(dtype) * share[:, None]
        total += share
    if HAS_SINKS:
        total += tl.exp(sink - largest)
    out = out / tl.where(total == 0.0, 1.0, total)[:, None]
    at = target + head * steps[0] + rows[:, None] * steps[1] + columns[None, :]
    tl.store(at, out.to(target.dtype.element_ty), mask=inside & wanted[:, None])
    tl.store(lse_at, largest + tl.log(total), mask=merged & exist)


@triton.jit
def _known(lse):
    """Return -inf in place of inf, which FlashAttention-2 writes for rows without keys."""
    return tl.where(lse == float("inf"), float("-inf"), lse)
