"""The single-process gradient of a batch, to hold a training run's own gradient against."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..layout.batch import IGNORE_INDEX


def per_document_gradients(model: torch.nn.Module, batches: Iterable[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Gradients of the mean loss over all targets of `batches`, each document run alone, without context parallelism.

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
            lengths = list(batch["flashcp_plan"].lengths)
            columns = [batch[name].split(lengths, dim=1) for name in ("input_ids", "position_ids", "shift_labels")]
            for input_ids, position_ids, shift_labels in zip(*columns):
                if (shift_labels == IGNORE_INDEX).all():
                    continue
                # With a mask transformers does not take positions that skip for the start of another document.
                mask = torch.ones_like(input_ids)
                logits = model(
                    input_ids=input_ids, position_ids=position_ids, attention_mask=mask, use_cache=False
                ).logits
                loss = inner.loss_function(
                    logits, None, logits.shape[-1], num_items_in_batch=targets, shift_labels=shift_labels
                )
                for name, grad in zip(
                    parameters, torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
                ):
                    if grad is not None:
                        sums[name] += grad
    finally:
        model.train(was_training)
    return sums


def gradient_error(
    ours: Mapping[str, torch.Tensor], reference: Mapping[str, torch.Tensor], floor: float = 0.0
) -> float:
    """Largest relative difference over parameters: max_p |ours_p - reference_p| / |reference_p|, Frobenius norms.

    Args:
        ours (`Mapping[str, torch.Tensor]`): gradients by the names of their parameters.
        reference (`Mapping[str, torch.Tensor]`): likewise; each of its names must be in `ours`.
        floor (`float`, *optional*, defaults to 0.0): the denominator is at least that share of the norm of all
            reference gradients together: for parameters whose true gradient is zero, such as the biases of keys.
    """
    norms = {name: expected.double().norm() for name, expected in reference.items()}
    least = floor * torch.stack(list(norms.values())).norm()
    errors = []
    for name, expected in reference.items():
        difference, norm = (ours[name] - expected).double().norm(), torch.maximum(norms[name], least)
        errors.append(float(difference / norm if norm > 0 else difference))
    return max(errors)
