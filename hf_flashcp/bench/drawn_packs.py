"""Times one attention layer under each strategy on drawn packs, relative to the ideal; see [`~bench.attention`]."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from ..data.lengths import sample_pack
from ..tables import counted, table
from . import attention
from .arguments import with_arguments


@with_arguments("corpus", "window", "seed", "cp_size", "heads", "kv_heads", "head_dim", "dtype", "rounds")
def measure(
    packs: int,
    corpus: str,
    window: int,
    seed: int,
    cp_size: int,
    *,
    heads: int = 32,
    kv_heads: int = 8,
    head_dim: int = 128,
    dtype: str = "bf16",
    strategies: Sequence[str] = ("per_doc", "flashcp", "search"),
    num_stages: int | None = None,
    max_imbalance: float = 1.05,
    rounds: int = 10,
) -> dict[str, Any]:
    """Draw packs of `window` tokens with consecutive seeds, and measure each with the KV that each rank needs.

    The result has an entry per pack in `packs`: its seed and lengths, the median seconds of the single process, and by
    strategy the share of the ideal.
    """
    drawn = []
    for number in range(seed, seed + packs):
        lengths = sample_pack(corpus, window, seed=number)
        found = attention.measure(
            lengths,
            cp_size,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            dtype=dtype,
            strategies=strategies,
            exchanges=["needed"],
            num_stages=num_stages,
            max_imbalance=max_imbalance,
            rounds=rounds,
        )
        shares = {case["strategy"]: case["ideal_share"] for case in found["cases"]}
        drawn.append({"seed": number, "lengths": lengths, "seconds": found["seconds"], "ideal_share": shares})
    return {"packs": drawn}


def text(found: dict[str, Any]) -> str:
    """Return a table with one row per pack, and the lowest and median shares."""
    packs = found["packs"]
    strategies = list(packs[0]["ideal_share"])
    columns = {"seed": "", "documents": "", "longest": ",", "single process\nms": ".1f"}
    columns |= {f"{strategy}\nof ideal": ".1%" for strategy in strategies}
    shares = [[pack["ideal_share"][strategy] for strategy in strategies] for pack in packs]
    rows = [
        (pack["seed"], len(pack["lengths"]), max(pack["lengths"]), 1000 * pack["seconds"], *each)
        for pack, each in zip(packs, shares)
    ]
    for name, of in (("lowest", min), ("median", median)):
        rows.append((name, None, None, None, *map(of, zip(*shares))))
    return (
        f"{counted(len(packs), 'pack')} of {found['window']:,} tokens drawn from {found['corpus']}, "
        f"{found['cp_size']} processes, {found['heads']}/{found['kv_heads']} heads of {found['head_dim']}, "
        f"{found['dtype']}; forward and backward, medians of {found['rounds']} rounds\n\n" + table(columns, rows)
    )
