"""A check in the first sharded forward that the losses of the ranks add up to the loss of the batch.

A rank can hold any part of the tokens. The ranks' losses add up if each is the sum over the targets in `shift_labels`,
divided by `num_items_in_batch`. A loss that shifts `labels` by itself would lose the targets at the ends of slices. A
loss that is a mean would give all ranks the same weight, no matter how many targets they hold. A further term in the
loss would count once per rank.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from ...data.boundaries import IGNORE_INDEX
from ...errors import UnsupportedModelError
from .logits_stand_in import LogitsStandIn
from .router_loss import router_coefficients
from .sharded_forward import ShardedForward


_POSITIONAL = ("logits", "labels", "vocab_size")  # positional arguments with which models call loss functions
_PROBED_TOKENS = 4
_TOLERANCE = 1e-3  # relative, because a loss may be summed in bf16
_ADVICE = "Use transformers' own loss, a loss that takes shift_labels (docs/turn_it_on.md), or cp_size 1."


class LossCheck:
    """A replacement for the loss function of `model` during one forward, which checks how the loss is computed.

    If the forward does not seem to call the loss function, or if `watch` is set, the batch's `shift_labels` are also
    replaced by a tensor that records whether it is used. This is not done otherwise, because compiled layers would be
    compiled again for the other tensor type.
    """

    def __init__(self, model: PreTrainedModel, batch: dict[str, Any], watch: bool):
        self._model, self._name = model, type(model).__name__
        self._function: Callable = model.loss_function
        self._own_function = vars(model).get("_loss_function")
        self._returned: torch.Tensor | None = None
        self._watched: _Watched | None = None
        if watch or not _calls_loss_function(model):
            self._watched = batch["shift_labels"] = batch["shift_labels"].as_subclass(_Watched)
        model.loss_function = self

    def restore(self) -> None:
        """Put the model's own loss function back."""
        if self._own_function is None:
            del self._model._loss_function
        else:
            self._model.loss_function = self._own_function

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        shift_labels = kwargs.get("shift_labels")
        if shift_labels is None:
            raise UnsupportedModelError(
                f"{self._name} does not pass shift_labels to its loss function, so targets at the ends of slices "
                f"would be lost. {_ADVICE}"
            )
        kwargs["shift_labels"] = shift_labels.as_subclass(torch.Tensor)
        if not isinstance(args[0] if args else kwargs["logits"], LogitsStandIn):
            self._require_sum_over_targets(args, kwargs)
        loss = self._function(*args, **kwargs)
        self._returned = loss.detach().clone()  # models add to it in place
        return loss

    def finish(self, output: Any, forward: ShardedForward, other_terms: bool) -> bool:
        """Check the loss in the forward's output, and return whether that was possible.

        `other_terms` says that the loss has further terms, which are known to be exact.
        """
        loss = output.get("loss") if isinstance(output, dict) else None
        if loss is None:
            return False
        if self._returned is None and self._watched is None:
            return False
        if self._returned is None and not self._watched.used:
            raise UnsupportedModelError(
                f"{self._name} computes its loss from labels and not from shift_labels, so targets at the ends of "
                f"slices would be lost. {_ADVICE}"
            )
        if self._returned is None or other_terms:
            return True
        rest = float(loss.detach()) - float(self._returned)
        tolerance = 8 * torch.finfo(loss.dtype).eps * abs(float(loss.detach()))
        terms = [0.0]
        if forward.router_loss is not None:
            share = float(forward.router_loss.detach()) * forward.router_weight
            terms += [coefficient * share for coefficient in router_coefficients(self._model)]
        if math.isfinite(rest) and not any(
            math.isclose(rest, term, rel_tol=1e-3, abs_tol=tolerance) for term in terms
        ):
            raise UnsupportedModelError(
                f"{self._name} adds a term of {rest:.4g} to what its loss function returns. Unless the term is a sum "
                f"over tokens, it would count once per rank. {_ADVICE}"
            )
        return True

    def _require_sum_over_targets(self, args: tuple, kwargs: dict[str, Any]) -> None:
        logits = args[0] if args else kwargs["logits"]
        tokens = logits.shape[1]
        places = torch.arange(_PROBED_TOKENS, device=logits.device) % tokens  # the same number on every rank
        targets = torch.arange(_PROBED_TOKENS, device=logits.device)[None] % logits.shape[-1]
        none = torch.full_like(targets, IGNORE_INDEX)
        first, rest = targets.where(targets == 0, none), targets.where(targets != 0, none)

        def loss(shift_labels: torch.Tensor, count: int) -> float:
            given = {"labels": none, "shift_labels": shift_labels, "num_items_in_batch": count}
            names = [*(_POSITIONAL + ("",) * len(args))[: len(args)], *kwargs]
            values = [
                given.get(name, _part(value, tokens, places)) for name, value in zip(names, (*args, *kwargs.values()))
            ]
            return float(self._function(*values[: len(args)], **dict(zip(kwargs, values[len(args) :]))))

        try:
            with torch.no_grad():
                whole, nothing = loss(targets, 3), loss(none, 3)
                parts, half = loss(first, 3) + loss(rest, 3), loss(targets, 6)
        except Exception as error:
            raise UnsupportedModelError(
                f"The loss function of {self._name} fails on {_PROBED_TOKENS} of the tokens "
                f"({type(error).__name__}: {error}), but a rank can have any part of them. {_ADVICE}"
            ) from error
        if whole == nothing or (math.isnan(whole) and math.isnan(nothing)):
            raise UnsupportedModelError(
                f"{self._name} has a loss function that ignores shift_labels, so targets at the ends of slices would "
                f"be lost. {_ADVICE}"
            )
        is_sum = nothing == 0 and math.isclose(whole, parts, rel_tol=_TOLERANCE, abs_tol=1e-6)
        if not (is_sum and math.isclose(whole, 2 * half, rel_tol=_TOLERANCE, abs_tol=1e-6)):
            raise UnsupportedModelError(
                f"{self._name} has a loss function that is not the sum over its targets divided by "
                f"num_items_in_batch, so the ranks' losses would not add up. {_ADVICE}"
            )


def _calls_loss_function(model: PreTrainedModel) -> bool:
    """Return whether the code of the model's forward names the loss function.

    If it does not, a function that it calls may still use the loss function.
    """
    code = getattr(inspect.unwrap(model.forward), "__code__", None)
    return code is not None and "loss_function" in code.co_names


class _Watched(torch.Tensor):
    """A tensor that records whether anything was computed from it."""

    used = False

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") != "__get__":  # reading shape, device or dtype does not count
            for value in tree_leaves((args, kwargs)):
                if isinstance(value, _Watched):
                    value.used = True
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def _part(value: Any, tokens: int, places: torch.Tensor) -> Any:
    """Return the tokens `places` of a tensor (1, tokens, ...), and any other value unchanged."""
    is_per_token = isinstance(value, torch.Tensor) and value.dim() >= 2 and value.shape[:2] == (1, tokens)
    return value[:, places] if is_per_token else value
