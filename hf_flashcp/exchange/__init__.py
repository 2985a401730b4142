"""Moving KV between ranks and its gradients home: uneven all-to-alls that carry only what is needed."""

from .checksums import debug_mode
from .kv_exchange import kv_width, pack_rows, send_grads_home, send_kv, split_rows
from .transfer import AllToAll, Transfer, named_range, seconds_waited


__all__ = [
    "AllToAll",
    "Transfer",
    "debug_mode",
    "kv_width",
    "named_range",
    "pack_rows",
    "seconds_waited",
    "send_grads_home",
    "send_kv",
    "split_rows",
]
