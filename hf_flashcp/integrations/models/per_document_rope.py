"""Support for RoPE whose frequencies depend on the sequence length (`dynamic` and `longrope`, modeling_rope_utils.py).

transformers takes the largest position in a call for the sequence length. A rank holds parts of several documents, so
the frequencies would depend on how the batch is sharded and on the other documents. Here each document gets the
frequencies that it would have alone: the rotary module is called once per document, with this rank's positions in the
document and with the document's largest position, whose result is dropped. All documents are processed in packed
order, including those of which this rank does not hold any tokens, because dynamic frequencies also depend on earlier
documents.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any

import torch
from transformers import PreTrainedModel

from ...errors import UnsupportedModelError
from ...layout import RankPlan
from .sharded_forward import current_sharded_forward


def hook_length_dependent_rope(model: PreTrainedModel) -> list[Any]:
    """Add hooks to the model's rotary modules, if their frequencies depend on the length, and return the handles."""
    config = model.config.get_text_config()
    lengths = list(_original_lengths(getattr(config, "rope_parameters", None), config))
    if not lengths:
        return []
    rotary_modules = [module for module in model.modules() if hasattr(module, "rope_type")]
    if not rotary_modules:
        raise UnsupportedModelError(
            f"{type(model).__name__} has a RoPE that depends on the sequence length, but no rotary module of "
            "transformers' usual kind, so frequencies would depend on how batches are sharded. It cannot be trained "
            "with context parallelism."
        )
    return [handle for module in rotary_modules for handle in _PerDocumentCalls(min(lengths)).hook(module)]


def follows_earlier_documents(model: PreTrainedModel) -> bool:
    """Return whether the frequencies of the model's RoPE also depend on earlier documents (`dynamic`)."""
    parameters = getattr(model.config.get_text_config(), "rope_parameters", None)
    entries = [parameters, *parameters.values()] if isinstance(parameters, Mapping) else []
    return any("dynamic" in (entry.get("rope_type") or "") for entry in entries if isinstance(entry, Mapping))


def _original_lengths(parameters: Any, config: Any) -> Iterator[int]:
    """Yield the sequence length up to which frequencies are unchanged, for every length-dependent entry.

    `parameters` are `rope_parameters` of the config, which some configs nest by layer type.
    """
    if not isinstance(parameters, Mapping):
        return
    rope_type = parameters.get("rope_type")
    if rope_type == "longrope":
        yield parameters["original_max_position_embeddings"]
    elif rope_type is not None and "dynamic" in rope_type:
        yield config.max_position_embeddings
    else:
        for entry in parameters.values():
            yield from _original_lengths(entry, config)


class _PerDocumentCalls:
    def __init__(self, original_length: int):
        self._original_length = original_length
        self._calls: list[torch.Tensor] = []

    def hook(self, module: torch.nn.Module) -> list[Any]:
        return [
            module.register_forward_pre_hook(self._before, with_kwargs=True),
            module.register_forward_hook(self._after, with_kwargs=True),
        ]

    def _before(self, module, args, kwargs):
        forward = current_sharded_forward()
        if forward is None:
            return None
        position_ids = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
        first, *self._calls = self._positions_of_calls(position_ids, forward.plan)
        return _with_positions(args, kwargs, first)

    def _after(self, module, args, kwargs, output):
        if current_sharded_forward() is None:
            return None
        outputs = [_without_last(output)]
        for position_ids in self._calls:
            args, kwargs = _with_positions(args, kwargs, position_ids)
            outputs.append(_without_last(module.forward(*args, **kwargs)))
        self._calls = []
        if isinstance(output, torch.Tensor):
            return torch.cat(outputs, dim=-2)
        return type(output)(torch.cat(parts, dim=-2) for parts in zip(*outputs))

    def _positions_of_calls(self, position_ids: torch.Tensor, plan: RankPlan) -> Iterator[torch.Tensor]:
        """Split positions (..., T) by document, and append each document's largest position."""
        held = [0] * len(plan.plan.lengths)
        for piece in plan.layout.slices:
            held[piece.document] += piece.tokens
        first = 0
        # Consecutive documents share a call if they have the same length, or if their frequencies are unchanged.
        longest = self._original_length - 2
        for _, documents in groupby(zip(_largest_positions(plan), held), key=lambda entry: max(entry[0], longest)):
            largest, counts = zip(*documents)
            local = position_ids[..., first : first + sum(counts)]
            first += sum(counts)
            yield torch.cat((local, local.new_full((*local.shape[:-1], 1), max(largest))), dim=-1)


def _largest_positions(plan: RankPlan) -> list[int]:
    """Return the largest position of each document, which another rank may hold."""
    if plan.position_ids is None:
        return [length - 1 for length in plan.plan.lengths]
    documents = plan.position_ids.split(plan.plan.lengths, dim=-1)
    return torch.stack([document.max() for document in documents]).tolist()


def _with_positions(args: tuple, kwargs: dict, position_ids: torch.Tensor) -> tuple[tuple, dict]:
    if "position_ids" in kwargs:
        return args, {**kwargs, "position_ids": position_ids}
    return (args[0], position_ids, *args[2:]), kwargs


def _without_last(output: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Return cos and sin (..., T, D), or complex frequencies, without the appended position."""
    return output[..., :-1, :] if isinstance(output, torch.Tensor) else tuple(part[..., :-1, :] for part in output)
