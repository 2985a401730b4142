"""Errors raised for users. Each message says what was wrong, where, and what to change.

Invariants of the library itself are `assert`s; everything a user can cause is one of these.
"""


class FlashCPError(ValueError):
    """Base class of every error this library raises on purpose."""


class PlanError(FlashCPError):
    """Document lengths or a shard plan that cannot be used (empty document, not a partition, too few tokens)."""


class BatchError(FlashCPError):
    """Data or a batch that cannot be tokenized, packed or sharded (corrupt lines, no chat template, mismatched
    lengths, a mask that would be dropped, no plan)."""


class ConfigurationError(FlashCPError):
    """A parallelism set-up that does not fit (cp_size against processes, mesh, DeepSpeed, tensor parallelism)."""


class UnsupportedModelError(FlashCPError):
    """A model, or a feature of one, whose training under context parallelism would not be exact."""


class UnmetCapWarning(UserWarning):
    """A plan exceeds a cap that was asked for, because no plan within it was found. Make it an error with
    `warnings.simplefilter("error", UnmetCapWarning)`."""
