"""`LogitsStandIn`: takes the place of logits between a model's output head and its loss function.

After the head, a model's forward changes logits element by element, if at all: it casts, scales or softcaps them. A
stand-in has the shape and dtype of logits (1, T, V), but its data is the summed loss alone. It records the changes, so
that a chunk of logits can be changed in the same way, whatever the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch._dynamo
from torch.utils._pytree import tree_leaves, tree_map

from ...errors import UnsupportedModelError


# Functions of a tensor and numbers that treat all elements alike.
_ELEMENTWISE = frozenset(
    "abs add bfloat16 clamp contiguous div double exp float half mul neg negative pow sub tanh to true_divide type "
    "__add__ __mul__ __neg__ __radd__ __rmul__ __rsub__ __sub__ __truediv__".split()
)
_IN_PLACE = frozenset("add_ clamp_ div_ mul_ sub_ tanh_ __iadd__ __imul__ __isub__ __itruediv__".split())
_PLAIN = (bool, int, float, str, torch.dtype, torch.memory_format, torch.layout, torch.device, type(None))
# Properties that are those of the logits, and properties that are new tensors. All others are those of the loss, for
# autograd, FSDP2 and DDP, and so are the methods by which they add hooks.
_OF_LOGITS = frozenset("dtype itemsize layout nbytes ndim shape".split())
_VIEWS = frozenset("H T data imag mH mT real".split())
_OF_LOSS = frozenset("as_subclass data_ptr register_hook retain_grad untyped_storage".split())


class Change(NamedTuple):
    """A change that a model applies to logits: a function, called with the logits as its first argument."""

    function: Callable
    arguments: tuple
    options: tuple[tuple[str, Any], ...]

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        return self.function(logits, *self.arguments, **dict(self.options))


class LogitsStandIn(torch.Tensor):
    """A tensor that behaves like logits (1, T, V) of the meta device, while its data is a summed loss.

    Attributes:
        like (`torch.Tensor`): meta tensor with the shape and dtype of the logits.
        changes (`tuple[Change, ...]`): what was applied to the logits.
        problem (`str`, *optional*): a use of the logits that is not elementwise, if there was one. If it wrote to the
            logits, or to a view of them, it is the problem of all stand-ins of one call of the head.
    """

    like: torch.Tensor
    changes: tuple[Change, ...]
    _use: str | None
    _writes: list[str]

    @classmethod
    def of(
        cls,
        loss: torch.Tensor,
        like: torch.Tensor,
        changes: tuple[Change, ...] = (),
        use: str | None = None,
        writes: list[str] | None = None,
    ) -> LogitsStandIn:
        """Return a stand-in with the data of `loss`, whose gradient passes through it."""
        with torch._C.DisableTorchFunctionSubclass():
            made = loss.as_subclass(cls)
        made.like, made.changes, made._use, made._writes = like, changes, use, [] if writes is None else writes
        return made

    @property
    def problem(self) -> str | None:
        return self._use or next(iter(self._writes), None)

    @property
    def loss(self) -> torch.Tensor:
        """The summed loss, a scalar."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(torch.Tensor)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        of_loss = name in _OF_LOSS
        if name in ("__get__", "__set__"):
            name = getattr(func.__self__, "__name__", "")
            of_loss = name not in _OF_LOGITS | _VIEWS
        if of_loss:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        result = _on_meta(func, name, args, kwargs)
        if result is not None and not any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(result)):
            return result
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, LogitsStandIn)]
        return next((each for each in given if each.problem is not None), given[0])._changed(
            func, name, args, kwargs, result
        )

    def _changed(self, func: Callable, name: str, args: tuple, kwargs: dict, result: Any) -> Any:
        others = tree_leaves((args[1:], kwargs))
        known = self.problem is None and args and args[0] is self and all(isinstance(each, _PLAIN) for each in others)
        if known and name in _ELEMENTWISE and result is self.like:
            return self  # not copied, for example by a cast to the same dtype
        if known and name in _ELEMENTWISE | _IN_PLACE and result.shape == self.like.shape:
            changes = (*self.changes, Change(func, args[1:], tuple(kwargs.items())))
            if name in _IN_PLACE:
                self.changes = changes
                return self
            return LogitsStandIn.of(self.loss, result, changes, None, self._writes)
        if result is None or result is self.like or "out" in kwargs or _writes_in_place(name):
            self._writes.append(name)

        def made(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            return LogitsStandIn.of(self.loss, value, self.changes, self._use or name, self._writes)

        return tree_map(made, result)


def _writes_in_place(name: str) -> bool:
    return name.startswith("__i") or name.endswith("_") and not name.endswith("__")


def _on_meta(func: Callable, name: str, args: tuple, kwargs: dict) -> Any:
    """Return what `func` gives for meta tensors in place of all tensors, on the meta device."""

    def meta(value: Any) -> Any:
        if isinstance(value, LogitsStandIn):
            return value.like
        if isinstance(value, torch.device):
            return torch.device("meta")
        return value.detach().to("meta") if isinstance(value, torch.Tensor) else value

    try:
        return func(*tree_map(meta, args), **tree_map(meta, kwargs))
    except Exception as error:
        raise UnsupportedModelError(
            f"The model's forward uses the values of its logits ({name}), which were not computed, because "
            "skip_logits is on. Set skip_logits=False in FlashCPPlugin."
        ) from error


# In a model that is compiled as a whole, what happens to logits runs without compilation.
torch._dynamo.config.nontraceable_tensor_subclasses.add(LogitsStandIn)
