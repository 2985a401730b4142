"""The merge of partial outputs in one fused kernel, for CUDA.

PyTorch's own operators, which [`~attention.merge`] calls on other devices, would run about ten kernels for each part
and move 30 bytes per element in bf16. This kernel moves 6 where one part is merged into another, and 2 more for every
further part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..layout.fused import launch, launches_of, next_total, places_from, steps_of
from ..layout.parts import Parts


if TYPE_CHECKING:
    from .merge import Partial


def merge_parts(
    out: torch.Tensor, lse: torch.Tensor, others: Sequence[Partial], where: Parts, sinks: torch.Tensor | None
) -> Partial:
    """Merge `others`, which cover the rows of `where` from its second part on, and `sinks` into `out` and `lse`.

    See [`~attention.merge.merge_parts`]. Returns the results in the dtype of `out`; `out` and `lse` are overwritten.
    """
    from .triton_merge import merge_rows

    launches = launches_of(len(others))
    source = out
    for first, stop in launches:
        parts, part_lses = zip(*others[first:stop]) if first < stop else ((), ())
        ends = stop == len(others)
        target = out if len(launches) == 1 else next_total(where, out, ends)
        launch(
            merge_rows,
            target,
            source,
            parts,
            steps_of(target, source, *parts),
            lse,
            part_lses,
            # Triton compiles a kernel again for numbers that are multiples of 16, and these differ between batches.
            tuple(2 * step + 1 for step in steps_of(lse, *part_lses)),
            *places_from(where, 1 + first),
            sinks if ends else None,
            HAS_SINKS=ends and sinks is not None,
            IN_PLACE=target is source,
        )
        source = target
    return source, lse
