"""Moving KV between ranks and its gradients home: uneven all-to-alls that carry only what is needed."""

from .agreement import require_agreement
from .checksums import debug_mode
from .gather import add_over_ranks, gather_numbers, gather_rows
from .kv_exchange import kv_width, pack_rows, send_grads_home, send_kv, split_rows
from .missing_ranks import group_timeout, name_missing_ranks
from .ranges import named_range
from .transfer import Transfer, seconds_waited


__all__ = [
    "Transfer",
    "add_over_ranks",
    "debug_mode",
    "gather_numbers",
    "gather_rows",
    "group_timeout",
    "kv_width",
    "name_missing_ranks",
    "named_range",
    "pack_rows",
    "require_agreement",
    "seconds_waited",
    "send_grads_home",
    "send_kv",
    "split_rows",
]
