"""`HeadLoss`: lets a model compute its loss in its output head, chunk by chunk, without logits of all tokens.

In a sharded forward, the head gets hidden states (1, T_r, H) and, instead of logits, returns a [`LogitsStandIn`] with
the summed loss of this rank's targets. All hooks of the head run as usual (FSDP2 gathers its weights, PEFT adds an
adapter), because the loss is computed inside its call. The model's forward goes on with the stand-in, and hands it to
its loss function, which divides the sum.

                 head                     forward                  loss function
    hidden ---> loss of chunks ---> scale, softcap, cast ---> sum / num_items_in_batch
                (applies the known changes)   (records them)

What the forward does to logits is learned in the first forward, which runs again if it does anything.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.modules.linear import Linear
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from ...data.boundaries import IGNORE_INDEX
from ...errors import UnsupportedModelError
from ...predict.loss_memory import chunk_tokens
from .chunked_loss import leaves, losses_of_tokens, summed_loss
from .logits_stand_in import Change, LogitsStandIn


logger = logging.getLogger(__name__)


class HeadLoss:
    """A replacement for the forward of a model's head, and for its loss function, during one forward.

    Args:
        model (`PreTrainedModel`): a model with a linear output head and the loss function of causal language models.
        batch (`dict`): the forward's arguments. `shift_labels` (1, T_r) are the targets of this rank's tokens, with
            -100 where there is none.
        changes (`tuple[Change, ...]`): what the model's forward does to logits, as far as known.

    Attributes:
        changes (`tuple[Change, ...]`): what the forward did to logits.
        problem (`str`, *optional*): why whole logits are needed. Known when the forward has ended.
        token_losses (`torch.Tensor`, *optional*): (T_r,), losses of tokens. Only a forward without gradients has them.
    """

    def __init__(self, model: PreTrainedModel, batch: dict[str, Any], changes: tuple[Change, ...]):
        self._model, self._expected = model, changes
        self._targets, self._labels = batch["shift_labels"].as_subclass(torch.Tensor), batch.get("labels")
        self._head = model.get_output_embeddings()
        self._logits: LogitsStandIn | None = None  # that the head returned
        self._scored: LogitsStandIn | None = None  # that the loss function got
        self._own_forward, self._forward = vars(self._head).get("forward"), self._head.forward
        self._own_function, self._function = vars(model).get("_loss_function"), model.loss_function
        self.changes, self.problem = changes, None
        self.token_losses: torch.Tensor | None = None
        self._head.forward, model.loss_function = self._loss_of_head, self._divided

    def restore(self) -> None:
        """Put the head's forward and the model's loss function back."""
        _put_back(self._head, "forward", self._own_forward)
        _put_back(self._model, "_loss_function", self._own_function)

    def must_repeat(self, output: Any, repeated: bool) -> bool:
        """Return whether the forward with this output has to run again: with other changes, or with logits.

        `repeated` says that it has already run again.
        """
        if self._logits is None:
            self.problem = self.problem or "its forward does not call its output head"
            return False
        returned = [value for value in tree_leaves(_values(output)) if isinstance(value, LogitsStandIn)]
        used = [*returned, self._logits] if self._scored is None else [self._scored, *returned]
        self.changes = used[0].changes
        while self.changes and self.changes[-1].function is torch.Tensor.float:  # as the loss does, and autocast
            self.changes = self.changes[:-1]
        if (use := next((each.problem for each in used if each.problem is not None), None)) is not None:
            self.problem = self.problem or f"its forward uses logits in {use}"
        if repeated and self.changes != self._expected:
            self.problem = self.problem or "its forward changes logits in another way each time"
        return self.problem is not None or self.changes != self._expected

    @torch.compiler.disable
    def _loss_of_head(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self._logits is not None or args or kwargs or hidden.shape[:-1] != self._targets.shape:
            self.problem = "its forward does not call its output head once, for all tokens"
            return self._forward(hidden, *args, **kwargs)
        vocabulary, dtype = _linear_layer_of(self._head).out_features, None

        def logits_of(part: torch.Tensor) -> torch.Tensor:
            nonlocal dtype
            logits = self._forward(part)
            dtype = logits.dtype
            for change in self._expected:
                logits = change(logits)
            return logits

        chunk = chunk_tokens(self._targets.shape[1], vocabulary)
        weights = leaves(logits_of(hidden[:, :1].detach())) if torch.is_grad_enabled() else []
        if weights or (torch.is_grad_enabled() and hidden.requires_grad):
            loss = summed_loss(logits_of, hidden, self._targets, weights, chunk)
        else:
            self.token_losses = losses_of_tokens(logits_of, hidden, self._targets, chunk)
            loss = self.token_losses.sum()
        like = torch.empty(*self._targets.shape, vocabulary, dtype=dtype, device="meta")
        self._logits = LogitsStandIn.of(loss, like)
        return self._logits

    @torch.compiler.disable
    def _divided(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        vocab_size: int,
        num_items_in_batch: torch.Tensor | float | None = None,
        ignore_index: int = IGNORE_INDEX,
        shift_labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Divide the summed loss in place of [`ForCausalLMLoss`]."""
        if not isinstance(logits, LogitsStandIn):
            return self._function(
                logits,
                labels,
                vocab_size,
                num_items_in_batch=num_items_in_batch,
                ignore_index=ignore_index,
                shift_labels=shift_labels,
                **kwargs,
            )
        loss, count = logits.loss, num_items_in_batch
        self._scored = LogitsStandIn.of(loss, logits.like, logits.changes, logits.problem)
        same = _same(labels, self._labels) if shift_labels is None else _same(shift_labels, self._targets)
        if not same or ignore_index != IGNORE_INDEX:
            self.problem = self.problem or "its loss has other targets than the batch"
        if count is None:
            if shift_labels is not None:
                self.problem = self.problem or "it does not pass num_items_in_batch to its loss function"
            count = (self._targets != IGNORE_INDEX).sum()
        return loss / (count.to(loss.device) if isinstance(count, torch.Tensor) else count)


def _same(given: torch.Tensor, own: torch.Tensor | None) -> bool:
    """Return whether two tensors share memory, which does not wait for the device."""
    return own is not None and given.shape == own.shape and given.data_ptr() == own.data_ptr()


def _values(output: Any) -> Any:
    return [*output.values()] if isinstance(output, dict) else output


def without_stand_in(output: Any) -> Any:
    """Return a model's output with no logits in place of a stand-in."""
    if isinstance(output, dict):
        return type(output)(**{key: value for key, value in output.items() if not isinstance(value, LogitsStandIn)})
    return tuple(None if isinstance(value, LogitsStandIn) else value for value in output)


def without_skip_logits(model: PreTrainedModel, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return a forward's arguments without `skip_logits`, unless the model's own forward has this argument."""
    if "skip_logits" not in arguments or _takes_skip_logits(model):
        return arguments
    return {key: value for key, value in arguments.items() if key != "skip_logits"}


def _takes_skip_logits(model: PreTrainedModel) -> bool:
    return "skip_logits" in inspect.signature(model.forward).parameters


def _put_back(module: torch.nn.Module, name: str, value: Callable | None) -> None:
    if value is None:
        vars(module).pop(name, None)
    else:
        setattr(module, name, value)


class LogitsChoice:
    """Chooses for each forward of a model whether its loss is computed in its head, and keeps what forwards showed.

    Args:
        required (`bool`): whether a loss that needs whole logits is an error.
    """

    def __init__(self, required: bool):
        self._required = required
        self._changes: tuple[Change, ...] = ()
        self._problem: str | None = None

    def skips(self, model: PreTrainedModel, batch: dict[str, Any], default: bool) -> bool:
        """Return whether the loss of a sharded batch is computed without logits.

        Batches without `skip_logits` follow `default` in training mode, and in evaluation if logits must not exist.
        Takes `skip_logits` out of the batch, except for a forward that has it among its own arguments, such as
        Liger's. Such a forward and TRL's fused output head skip logits by themselves.
        """
        if _takes_skip_logits(model):
            return False
        wanted = batch.pop("skip_logits", None)
        if wanted is None:
            wanted = default and (model.training or self._required)
        if not wanted or batch.get("shift_labels") is None or batch.get("fused_lm_head"):
            return False
        if self._problem is None and (problem := _problem_of(model)) is not None:
            self._report(model, problem)
        return self._problem is None

    def begin(self, model: PreTrainedModel, batch: dict[str, Any]) -> HeadLoss:
        """Replace the head's forward and the loss function of `model` for one forward with these arguments."""
        return HeadLoss(model, batch, self._changes)

    def must_repeat(self, model: PreTrainedModel, head: HeadLoss, output: Any, repeated: bool) -> bool:
        """Return whether the forward with this output has to run again, and keep why.

        `repeated` says that it has already run again. Raises an [`UnsupportedModelError`] if logits are needed, but
        must not exist.
        """
        repeats, learned = head.must_repeat(output, repeated), head.changes != self._changes
        if head.problem is not None:
            self._report(model, head.problem)
        self._changes = head.changes
        assert learned or head.problem or not repeats
        return repeats

    def _report(self, model: PreTrainedModel, problem: str) -> None:
        self._problem, name = problem, type(model).__name__
        if self._required:
            raise UnsupportedModelError(
                f"skip_logits is True, but the loss of {name} needs whole logits: {problem}. Set skip_logits=None or "
                "False in FlashCPPlugin."
            )
        logger.warning(f"The loss of {name} is computed from whole logits, because {problem}.")


def _problem_of(model: PreTrainedModel) -> str | None:
    """Return why a model's loss cannot be computed in its head, if that is known before the forward."""
    if model.loss_function is not ForCausalLMLoss:
        return "it has a loss function of its own"
    head = _linear_layer_of(model.get_output_embeddings())
    if not isinstance(head, Linear):
        return f"its output head is a {type(head).__name__}, not a linear layer"
    return None


def _linear_layer_of(head: torch.nn.Module) -> torch.nn.Module:
    """Return the layer inside PEFT's wrappers of an output head."""
    while (inner := getattr(head, "base_layer", None)) is not None:  # adapters
        head = inner
    return getattr(head, "original_module", head)  # modules_to_save, trainable_token_indices
