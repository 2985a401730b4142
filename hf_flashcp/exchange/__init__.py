"""Moving KV between ranks and its gradients home: uneven all-to-alls that carry only what is needed."""

from .agreement import require_agreement
from .kv_exchange import Transfer, kv_width, pack_rows, send_grads_home, send_kv, split_rows


__all__ = ["Transfer", "kv_width", "pack_rows", "require_agreement", "send_grads_home", "send_kv", "split_rows"]
