"""The Triton kernel behind [`~layout.fused`]."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["place_step", "count"])
def sum_rows(
    target,
    base,
    parts,
    steps,
    places,
    place_step,
    count,
    HAS_BASE: tl.constexpr,
    IN_PLACE: tl.constexpr,
    DOUBLE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write `base`, which has the rows of `target`, plus the rows of all parts to `target`.

    If `IN_PLACE`, `base` is `target`, and rows without parts are neither read nor written. `steps` are those of
    `target`, `base` and the parts.
    """
    dtype: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    head = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = (rows < count)[:, None] & (columns < WIDTH)[None, :]
    wanted = rows < (0 if IN_PLACE else count)
    for part in tl.static_range(len(parts)):
        wanted |= tl.load(places + rows * place_step + part, mask=rows < count, other=-1) >= 0
    total = tl.full((ROWS, COLUMNS), 0.0, dtype)
    if HAS_BASE:
        at = base + head * steps[2] + rows[:, None] * steps[3] + columns[None, :]
        total = tl.load(at, mask=inside & wanted[:, None], other=0.0).to(dtype)
    for part in tl.static_range(len(parts)):
        place = tl.load(places + rows * place_step + part, mask=rows < count, other=-1).to(tl.int64)
        at = parts[part] + head * steps[4 + 2 * part] + place[:, None] * steps[5 + 2 * part] + columns[None, :]
        total += tl.load(at, mask=inside & (place >= 0)[:, None], other=0.0).to(dtype)
    at = target + head * steps[0] + rows[:, None] * steps[1] + columns[None, :]
    tl.store(at, total.to(target.dtype.element_ty), mask=inside & wanted[:, None])
