"""From documents to packed batches with a plan.

The collator is imported on first use: it needs torch and transformers, drawing document lengths does not.
"""

from typing import TYPE_CHECKING

from .lengths import LENGTH_DISTRIBUTIONS, sample_lengths, sample_pack


if TYPE_CHECKING:
    from .collator import FlashCPCollator

__all__ = ["LENGTH_DISTRIBUTIONS", "FlashCPCollator", "sample_lengths", "sample_pack"]


def __getattr__(name):
    if name != "FlashCPCollator":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .collator import FlashCPCollator

    return FlashCPCollator


def __dir__():
    return [*globals(), "FlashCPCollator"]
