"""Activation checkpointing that keeps the results of attention.

Activation checkpointing discards a layer's activations and runs the layer again in backward. With
[`save_attention_context_fn`] the second run takes the results of attention from the first one. Tensors that a
checkpoint keeps pass through the saved-tensor hooks around it. `offload` of transformers and of accelerate are such
hooks (`torch.autograd.graph.save_on_cpu`), so these results pass through them too.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import torch


Results = tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]
"""Out, lse and the KV of each stage, see [`Engine.forward`]."""

_thread = threading.local()


def kept_or_computed(compute: Callable[[], Results]) -> Results:
    """Return the results of attention: those that the checkpoint around this layer keeps, or computed ones."""
    around = getattr(_thread, "around", None)
    return compute() if around is None else around(compute)


class _SaveAttention(str):
    """A string that can be called. A plain function would fail when trackers write TrainingArguments as JSON."""

    def __call__(self) -> tuple[Any, Any]:
        """Return the contexts of a layer's first and second run."""
        results = _KeptResults(torch._C._autograd._top_saved_tensors_default_hooks(True))
        return _Around(results.keep), _Around(results.take)


save_attention_context_fn = _SaveAttention("hf_flashcp.save_attention_context_fn")
"""Activation checkpointing that does not compute attention again in backward. Pass it as `context_fn`:

    TrainingArguments(
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": False, "context_fn": hf_flashcp.save_attention_context_fn},
    )

(Before transformers 5.24 the arguments are called `gradient_checkpointing` and `gradient_checkpointing_kwargs`.)

Backward runs a layer's projections, norms and MLP again, but not its attention and exchange, whose results are kept
from the first run. Per layer this takes H_q * D_v elements and 4 bytes per query head for each token of the rank
(output and logsumexp), and H_kv * (D_k + D_v) elements for each received token. If received KV is not kept (see
`keep_received_kv` of [`FlashCPPlugin`]), backward fetches it again, without computing attention again. Plain
activation checkpointing computes attention twice and exchanges three times instead of twice. With `offload`, these
results move to the host together with the layer's input.
"""


class _Around:
    """A context in which attention's results come from `run`."""

    def __init__(self, run: Callable[[Callable[[], Results]], Results]):
        self._run = run

    def __enter__(self) -> None:
        self._outer = getattr(_thread, "around", None)
        _thread.around = self._run

    def __exit__(self, *error: Any) -> None:
        _thread.around = self._outer


class _KeptResults:
    """The results of attention between the two runs of a checkpointed layer.

    Args:
        hooks: the pair of saved-tensor hooks through which results pass, or `None`.
    """

    def __init__(self, hooks: tuple[Callable, Callable] | None):
        self._pack, self._unpack = hooks or (_with_version, _unchanged)
        self._kept: deque[list[tuple[list[int], Any]]] = deque()

    def keep(self, compute: Callable[[], Results]) -> Results:
        out, lse, received = compute()
        self._kept.append([self._packed(tensor) for tensor in (out, lse, *received)])
        return out, lse, received

    def take(self, compute: Callable[[], Results]) -> Results:
        if not self._kept:
            raise RuntimeError(
                "save_attention_context_fn keeps the results of attention for one backward pass, but there was a "
                "second one. Run forward again before it."
            )
        out, lse, *received = (self._unpacked(*each) for each in self._kept.popleft())
        return out, lse, received

    def _packed(self, tensor: torch.Tensor) -> tuple[list[int], Any]:
        # In the order in which it lies in memory: save_on_cpu copies other tensors twice and changes their strides.
        order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
        return order, self._pack(tensor.detach().permute(order))

    def _unpacked(self, order: list[int], packed: Any) -> torch.Tensor:
        return self._unpack(packed).permute([order.index(dim) for dim in range(len(order))])


def _with_version(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    return tensor, tensor._version


def _unchanged(kept: tuple[torch.Tensor, int]) -> torch.Tensor:
    tensor, version = kept
    if tensor._version != version:
        raise RuntimeError(
            "A layer changed the output of its attention in place, after save_attention_context_fn had kept it. Use "
            "activation checkpointing without it for this model."
        )
    return tensor
