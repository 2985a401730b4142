"""Times one attention layer under each strategy on drawn packs, relative to the ideal; see [`~bench.attention`]."""

from __future__ import annotations

from statistics import median
from typing import Any

from ..data.lengths import sample_pack
from ..tables import counted, table
from . import attention


def measure(packs: int, corpus: str, window: int, seed: int, cp_size: int, **layer: Any) -> dict[str, Any]:
    """Draw packs of `window` tokens with consecutive seeds, and measure each with the KV that each rank needs.

    `layer` has further arguments of [`~bench.attention.measure`]. The result has an entry per pack in `packs`: its
    seed and lengths, the median seconds of the single process, and by strategy the share of the ideal.
    """
    drawn = []
    for number in range(seed, seed + packs):
        found = attention.measure(sample_pack(corpus, window, seed=number), cp_size, exchanges=["needed"], **layer)
        shares = {case["strategy"]: case["ideal_share"] for case in found.pop("cases")}
        drawn.append(
            {"seed": number, "lengths": found.pop("lengths"), "seconds": found.pop("seconds"), "ideal_share": shares}
        )
    return {"corpus": corpus, "window": window, "seed": seed, **found, "packs": drawn}


def text(found: dict[str, Any]) -> str:
    """Return a table with one row per pack, and the lowest and median shares."""
    packs = found["packs"]
    strategies = list(packs[0]["ideal_share"])
    columns = {"seed": "", "documents": "", "longest": ",", "single process\nms": "ms:.1f"}
    columns |= {f"{strategy}\nof ideal": ".1%" for strategy in strategies}
    shares = [[pack["ideal_share"][strategy] for strategy in strategies] for pack in packs]
    rows = [
        (pack["seed"], len(pack["lengths"]), max(pack["lengths"]), pack["seconds"], *each)
        for pack, each in zip(packs, shares)
    ]
    for name, of in (("lowest", min), ("median", median)):
        rows.append((name, None, None, None, *map(of, zip(*shares))))
    return (
        f"{counted(len(packs), 'pack')} of {found['window']:,} tokens drawn from {found['corpus']}, "
        f"{found['cp_size']} processes, {found['heads']}/{found['kv_heads']} heads of {found['head_dim']}, "
        f"{found['dtype']}; forward and backward, medians of {found['rounds']} rounds\n\n" + table(columns, rows)
    )
