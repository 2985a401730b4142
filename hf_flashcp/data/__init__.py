"""From documents to packed batches with a plan.

The collator and the datasets of packed rows are imported on first use: they need torch and transformers; drawing and
packing document lengths does not.
"""

import importlib
from typing import TYPE_CHECKING

from .lengths import LENGTH_DISTRIBUTIONS, sample_lengths, sample_pack
from .packing import Packing, pack_lengths


if TYPE_CHECKING:
    from .collator import FlashCPCollator
    from .packed_documents import PackedDocuments, PackedDocumentStream

_EXPORTS = {
    "FlashCPCollator": ".collator",
    "PackedDocumentStream": ".packed_documents",
    "PackedDocuments": ".packed_documents",
}
__all__ = [
    "LENGTH_DISTRIBUTIONS",
    "FlashCPCollator",
    "PackedDocumentStream",
    "PackedDocuments",
    "Packing",
    "pack_lengths",
    "sample_lengths",
    "sample_pack",
]


def __getattr__(name):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name], __name__), name)


def __dir__():
    return [*globals(), *_EXPORTS]
