"""Checks in the first sharded forward that ranks can share a model's loss, by what its loss function is given.

A rank has any part of the tokens, so its loss must be the sum over the targets in `shift_labels`, divided by
`num_items_in_batch`: the ranks' losses then add up. One that shifts `labels` by itself would lose the targets at cuts,
one that takes a mean would weigh ranks alike whatever they hold, and a further term would count once per rank.
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
from .router_loss import router_coefficients
from .sharded_forward import ShardedForward


_POSITIONAL = ("logits", "labels", "vocab_size")  # of loss functions, as models call them
_PROBED_TOKENS = 4
_TOLERANCE = 1e-3  # relative: a loss may add up in bf16
_ADVICE = "Use transformers' own loss, or one that takes shift_labels (docs/turn_it_on.md), or cp_size 1."


class LossCheck:
    """Stands in for the loss function of `model` during one forward.

    If that seems to compute the loss by itself, or with `watch`, the batch's `shift_labels` are replaced by a tensor
    that records whether it is used. Only then, because compiled layers are compiled again for another type of tensor.
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
        if self._own_function is None:
            del self._model._loss_function
        else:
            self._model.loss_function = self._own_function

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        shift_labels = kwargs.get("shift_labels")
        if shift_labels is None:
            raise UnsupportedModelError(
                f"{self._name} does not hand shift_labels on to its loss function: targets at the cuts would be lost. "
                f"{_ADVICE}"
            )
        kwargs["shift_labels"] = shift_labels.as_subclass(torch.Tensor)
        self._require_sum_over_targets(args, kwargs)
        loss = self._function(*args, **kwargs)
        self._returned = loss.detach().clone()  # models add to it in place
        return loss

    def finish(self, output: Any, forward: ShardedForward, other_terms: bool) -> bool:
        """Checks the loss of the forward's output, and returns whether it could. `other_terms`: it has further ones,
        which are exact."""
        loss = output.get("loss") if isinstance(output, dict) else None
        if loss is None:
            return False
        if self._returned is None and self._watched is None:
            return False
        if self._returned is None and not self._watched.used:
            raise UnsupportedModelError(
                f"{self._name} computes its loss from labels and not from shift_labels: targets at the cuts would be "
                f"lost. {_ADVICE}"
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
                f"{self._name} adds a term of {rest:.4g} to what its loss function returns. If it is not a sum over "
                f"tokens, it would count once per rank. {_ADVICE}"
            )
        return True

    def _require_sum_over_targets(self, args: tuple, kwargs: dict[str, Any]) -> None:
        logits = args[0] if args else kwargs["logits"]
        tokens = logits.shape[1]
        places = torch.arange(_PROBED_TOKENS, device=logits.device) % tokens  # as many on every rank
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
                f"({type(error).__name__}: {error}), but a rank has any part. {_ADVICE}"
            ) from error
        if whole == nothing or (math.isnan(whole) and math.isnan(nothing)):
            raise UnsupportedModelError(
                f"{self._name} has a loss function that ignores shift_labels: targets at the cuts would be lost. "
                f"{_ADVICE}"
            )
        is_sum = nothing == 0 and math.isclose(whole, parts, rel_tol=_TOLERANCE, abs_tol=1e-6)
        if not (is_sum and math.isclose(whole, 2 * half, rel_tol=_TOLERANCE, abs_tol=1e-6)):
            raise UnsupportedModelError(
                f"{self._name} has a loss function that is not the sum over its targets divided by "
                f"num_items_in_batch: the ranks' losses would not add up. {_ADVICE}"
            )


def _calls_loss_function(model: PreTrainedModel) -> bool:
    """Whether the code of its forward names the loss function. A forward that calls another one may use it too."""
    code = getattr(inspect.unwrap(model.forward), "__code__", None)
    return code is not None and "loss_function" in code.co_names


class _Watched(torch.Tensor):
    """Remembers whether anything was computed from it."""

    used = False

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") != "__get__":  # shape, device, dtype
            for value in tree_leaves((args, kwargs)):
                if isinstance(value, _Watched):
                    value.used = True
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def _part(value: Any, tokens: int, places: torch.Tensor) -> Any:
    """`places` of a tensor (1, tokens, ...)."""
    is_per_token = isinstance(value, torch.Tensor) and value.dim() >= 2 and value.shape[:2] == (1, tokens)
    return value[:, places] if is_per_token else value
