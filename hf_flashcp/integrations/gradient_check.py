"""The single-process gradient of a batch, with which a training run's gradient can be compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from ..data.boundaries import IGNORE_INDEX
from .models.router_loss import router_coefficients, router_statistics


def per_document_gradients(model: torch.nn.Module, batches: Iterable[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Compute the gradients of the mean loss over all targets, running each document alone on one device.

    For a mixture-of-experts model with `config.output_router_logits`, the router loss of each batch is added.

    The model runs in evaluation mode, in which an attached model attends without a plan. Its `.grad` and its hooks
    (including those of DDP) are left untouched, and processes do not communicate.

    Args:
        model (`torch.nn.Module`): a causal language model or PEFT model, without a DDP or FSDP2 wrapper.
        batches (`Iterable[Mapping]`): full batches of [`FlashCPCollator`] that make up one optimizer step.

    Returns:
        `dict[str, torch.Tensor]`: gradient of each parameter that requires one, by name.
    """
    batches = list(batches)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    targets = sum(int((batch["shift_labels"] != IGNORE_INDEX).sum()) for batch in batches)
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    sums = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            router = _router_term(model, inner, batch)
            for input_ids, position_ids, shift_labels in _documents(batch):
                if (shift_labels == IGNORE_INDEX).all() and router is None:
                    continue
                output = _alone(model, input_ids, position_ids)
                logits = output.logits
                loss = inner.loss_function(
                    logits, None, logits.shape[-1], num_items_in_batch=targets, shift_labels=shift_labels
                )
                if router is not None:
                    loss = loss + router(output)
                for name, grad in zip(
                    parameters, torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
                ):
                    if grad is not None:
                        sums[name] += grad
    finally:
        model.train(was_training)
    return sums


def _documents(batch: Mapping[str, Any]) -> Iterator[tuple[torch.Tensor, ...]]:
    """Return the input_ids, position_ids and shift_labels of each document, all of shape (1, n)."""
    lengths = list(batch["flashcp_plan"].lengths)
    return zip(*(batch[name].split(lengths, dim=1) for name in ("input_ids", "position_ids", "shift_labels")))


def _alone(model: torch.nn.Module, input_ids: torch.Tensor, position_ids: torch.Tensor) -> Any:
    # If there is a mask, transformers does not treat positions that skip numbers as the start of another document.
    mask = torch.ones_like(input_ids)
    return model(input_ids=input_ids, position_ids=position_ids, attention_mask=mask, use_cache=False)


def _router_term(
    model: torch.nn.Module, inner: torch.nn.Module, batch: Mapping[str, Any]
) -> Callable[[Any], torch.Tensor] | None:
    """Return a function from a document's output to what it adds to the router loss of its batch, see router_loss.py.

    The loss is linear in the documents' probabilities, given the number of tokens of the batch routed to each expert.
    """
    asked = getattr(inner.config.get_text_config(), "output_router_logits", False)
    coefficient = max(router_coefficients(inner), default=0.0) if asked else 0.0
    if not coefficient:
        return None

    def statistics(output: Any) -> tuple[torch.Tensor, ...]:
        return router_statistics(output.router_logits, inner.num_experts, inner.num_experts_per_tok)

    with torch.no_grad():
        found = [statistics(_alone(model, ids, position_ids)) for ids, position_ids, _ in _documents(batch)]
    counts, _, rows = (sum(parts) for parts in zip(*found))
    return lambda output: coefficient * inner.num_experts * (counts / rows * statistics(output)[1] / rows).sum()


def relative_error(ours: torch.Tensor, reference: torch.Tensor, least: float | torch.Tensor = 0.0) -> float:
    """Return |ours - reference| / max(|reference|, least), with Frobenius norms in float64.

    Returns infinity if the result is NaN, and the absolute difference if the denominator is 0.
    """
    reference = reference.double()
    difference, norm = float((ours.double() - reference).norm()), max(float(reference.norm()), float(least))
    error = difference / norm if norm > 0 else difference
    return error if error == error else float("inf")


def gradient_error(
    ours: Mapping[str, torch.Tensor], reference: Mapping[str, torch.Tensor], floor: float = 0.0
) -> float:
    """Return the largest relative difference over parameters p, max_p |ours_p - reference_p| / |reference_p|.

    Norms are Frobenius norms.

    Args:
        ours (`Mapping[str, torch.Tensor]`): gradients by parameter name.
        reference (`Mapping[str, torch.Tensor]`): reference gradients by parameter name. All names must be in `ours`.
        floor (`float`, *optional*, defaults to 0.0): lower bound of the denominator, as a share of the norm of all
            reference gradients together. It is needed for parameters whose true gradient is zero, such as the biases
            of keys.
    """
    least = floor * torch.stack([expected.double().norm() for expected in reference.values()]).norm() if floor else 0.0
    return max(relative_error(ours[name], expected, least) for name, expected in reference.items())
