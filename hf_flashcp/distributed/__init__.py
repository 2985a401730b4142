"""Communication between ranks other than KV: process groups, agreement, liveness, gathering numbers, and workers."""

from .agreement import gather_values, require_agreement
from .failures import name_missing_ranks
from .gather import add_over_ranks, gather_numbers, gather_rows
from .process_group import context_parallel_group, group_timeout


__all__ = [
    "add_over_ranks",
    "context_parallel_group",
    "gather_numbers",
    "gather_rows",
    "gather_values",
    "group_timeout",
    "name_missing_ranks",
    "require_agreement",
]
