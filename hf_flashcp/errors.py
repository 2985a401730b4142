"""Errors that the library raises for its users. Each message says what was wrong, where, and what to change.

Anything that a user can cause raises one of these classes. Invariants of the library itself are `assert`s.
"""


class FlashCPError(ValueError):
    """Base class of every error that this library raises on purpose."""


class PlanError(FlashCPError):
    """Raised for document lengths or plans that cannot be used: empty documents, too few tokens, missing tokens."""


class BatchError(FlashCPError):
    """Raised for data that cannot be tokenized, packed or sharded.

    Examples are corrupt lines, a missing chat template, lengths that do not match, a mask that would be dropped, and a
    batch without a plan.
    """


class ConfigurationError(FlashCPError):
    """Raised for settings that do not fit together, such as cp_size and the number of processes, or a mesh without a
    "cp" dimension, and for settings that are not supported, such as DeepSpeed and tensor parallelism."""


class UnsupportedModelError(FlashCPError):
    """Raised for a model, or a feature of a model, whose training under context parallelism would not be exact."""


class UnmetCapWarning(UserWarning):
    """Issued when a plan exceeds `max_imbalance` because no plan within the cap was found.

    `warnings.simplefilter("error", UnmetCapWarning)` turns it into an error.
    """
