"""Moving KV between ranks and its gradients home: uneven all-to-alls that carry only what is needed."""

from .agreement import require_agreement
from .kv_exchange import Transfer, kv_width, pack_rows, send_grads_home, send_kv, split_rows
from .missing_ranks import group_timeout, name_missing_ranks


__all__ = [
    "Transfer",
    "group_timeout",
    "kv_width",
    "name_missing_ranks",
    "pack_rows",
    "require_agreement",
    "send_grads_home",
    "send_kv",
    "split_rows",
]
