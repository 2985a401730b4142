"""Data preparation: tokenizing texts and chats into documents, and packing documents into batches with a plan.

Modules that need torch and transformers are imported on first use. Drawing and packing document lengths does not need
them.
"""

import importlib
from typing import TYPE_CHECKING

from .lengths import LENGTH_DISTRIBUTIONS, sample_lengths, sample_pack
from .packing import Packing, pack_lengths


if TYPE_CHECKING:
    from .batch import shard_inputs
    from .collator import FlashCPCollator
    from .json_lines import load_json_lines
    from .packed_document_stream import PackedDocumentStream
    from .packed_documents import PackedDocuments
    from .tokenization import TokenizedDocuments, tokenize_chats, tokenize_texts

_EXPORTS = {
    "FlashCPCollator": ".collator",
    "PackedDocumentStream": ".packed_document_stream",
    "shard_inputs": ".batch",
    "PackedDocuments": ".packed_documents",
    "TokenizedDocuments": ".tokenization",
    "load_json_lines": ".json_lines",
    "tokenize_chats": ".tokenization",
    "tokenize_texts": ".tokenization",
}
__all__ = [
    "LENGTH_DISTRIBUTIONS",
    "FlashCPCollator",
    "PackedDocumentStream",
    "PackedDocuments",
    "Packing",
    "TokenizedDocuments",
    "load_json_lines",
    "pack_lengths",
    "sample_lengths",
    "sample_pack",
    "shard_inputs",
    "tokenize_chats",
    "tokenize_texts",
]


def __getattr__(name):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name], __name__), name)


def __dir__():
    return [*globals(), *_EXPORTS]
