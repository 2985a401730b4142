"""The single-process gradient of a batch, to compare a training run's own gradient with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from ..data.boundaries import IGNORE_INDEX
from .models.router_loss import router_coefficients, router_statistics


def per_document_gradients(model: torch.nn.Module, batches: Iterable[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Returns the gradients of the mean loss over all targets, each document run alone, without context parallelism.

    The router losses of a mixture-of-experts model (`config.output_router_logits`) come on top, one for each batch.

    Runs the model in evaluation mode, where an attached model attends without a plan, and leaves its `.grad` and its
    hooks (DDP's too) untouched. No process talks to another.

    Args:
        model (`torch.nn.Module`): a bare causal language model or PEFT model (not the DDP or FSDP2 wrapper).
        batches (`Iterable[Mapping]`): full batches of [`FlashCPCollator`], one optimizer step's worth.

    Returns:
        `dict[str, torch.Tensor]`: by name, for each parameter that requires a gradient.
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
    """(1, n) input_ids, position_ids and shift_labels of each document."""
    lengths = list(batch["flashcp_plan"].lengths)
    return zip(*(batch[name].split(lengths, dim=1) for name in ("input_ids", "position_ids", "shift_labels")))


def _alone(model: torch.nn.Module, input_ids: torch.Tensor, position_ids: torch.Tensor) -> Any:
    # With a mask transformers does not take positions that skip for the start of another document.
    mask = torch.ones_like(input_ids)
    return model(input_ids=input_ids, position_ids=position_ids, attention_mask=mask, use_cache=False)


def _router_term(
    model: torch.nn.Module, inner: torch.nn.Module, batch: Mapping[str, Any]
) -> Callable[[Any], torch.Tensor] | None:
    """What each document adds to the router loss of its batch (router_loss.py), given its output: the loss is linear
    in the documents' probabilities, once it is known how many tokens of the batch each expert has."""
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
    """Returns |ours - reference| / max(|reference|, least), Frobenius norms in float64: infinity if that is not a
    number, and the difference itself where the denominator is 0."""
    reference = reference.double()
    difference, norm = float((ours.double() - reference).norm()), max(float(reference.norm()), float(least))
    error = difference / norm if norm > 0 else difference
    return error if error == error else float("inf")


def gradient_error(
    ours: Mapping[str, torch.Tensor], reference: Mapping[str, torch.Tensor], floor: float = 0.0
) -> float:
    """Returns the largest relative difference of a parameter: max_p |ours_p - reference_p| / |reference_p|, Frobenius
    norms.

    Args:
        ours (`Mapping[str, torch.Tensor]`): gradients by the names of their parameters.
        reference (`Mapping[str, torch.Tensor]`): likewise; each of its names must be in `ours`.
        floor (`float`, *optional*, defaults to 0.0): the denominator is at least that share of the norm of all
            reference gradients together: for parameters whose true gradient is zero, such as the biases of keys.
    """
    least = floor * torch.stack([expected.double().norm() for expected in reference.values()]).norm() if floor else 0.0
    return max(relative_error(ours[name], expected, least) for name, expected in reference.items())
