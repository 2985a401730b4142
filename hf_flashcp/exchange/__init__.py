"""Exchange of keys and values (KV) between ranks, of other rows, and of their gradients, by uneven all-to-alls.

Each all-to-all carries only the rows that its receiver needs.
"""

from .checksums import debug_mode
from .kv_exchange import kv_width, pack_rows, return_grads, send_kv, send_rows, split_rows
from .token_gather import gather_tokens
from .transfer import AllToAll, Transfer, named_range, seconds_waited


__all__ = [
    "AllToAll",
    "Transfer",
    "debug_mode",
    "gather_tokens",
    "kv_width",
    "named_range",
    "pack_rows",
    "seconds_waited",
    "return_grads",
    "send_kv",
    "send_rows",
    "split_rows",
]
