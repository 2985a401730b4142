"""From documents to packed batches with a plan."""

from .collator import FlashCPCollator


__all__ = ["FlashCPCollator"]
