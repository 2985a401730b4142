"""RoPE whose frequencies depend on how long the sequence is (`dynamic` and `longrope`, modeling_rope_utils.py).

transformers takes the largest position that a call sees for that length. A rank sees part of a document, and a packed
row many documents, so the answer would depend on the cut and on the neighbours. Here each document gets the
frequencies that it would have had alone: the rotary module is called once per document, with this rank's positions of
it and one more, the document's largest, whose result is dropped. Documents come in packed order, those of which this
rank holds nothing included, because dynamic frequencies also depend on the documents before.
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
    """Puts hooks on the model's rotary modules where they need it, and returns their handles."""
    config = model.config.get_text_config()
    lengths = list(_original_lengths(getattr(config, "rope_parameters", None), config))
    if not lengths:
        return []
    rotary_modules = [module for module in model.modules() if hasattr(module, "rope_type")]
    if not rotary_modules:
        raise UnsupportedModelError(
            f"{type(model).__name__} has a RoPE that depends on the sequence length, but no rotary module of the "
            "usual kind: the frequencies would depend on what a rank holds. It cannot be trained with context "
            "parallelism."
        )
    return [handle for module in rotary_modules for handle in _PerDocumentCalls(min(lengths)).hook(module)]


def _original_lengths(parameters: Any, config: Any) -> Iterator[int]:
    """Up to which length frequencies are the original ones, of every length-dependent entry of `rope_parameters`,
    which some configs nest by layer type."""
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
        """(..., T) positions split by document, each with the document's largest position appended."""
        held = [0] * len(plan.plan.lengths)
        for piece in plan.layout.slices:
            held[piece.document] += piece.tokens
        first = 0
        # Neighbours of one length, or all with the original frequencies, share a call.
        longest = self._original_length - 2
        for _, documents in groupby(zip(_largest_positions(plan), held), key=lambda entry: max(entry[0], longest)):
            largest, counts = zip(*documents)
            local = position_ids[..., first : first + sum(counts)]
            first += sum(counts)
            yield torch.cat((local, local.new_full((*local.shape[:-1], 1), max(largest))), dim=-1)


def _largest_positions(plan: RankPlan) -> list[int]:
    """Those of each document, of which this rank may hold another part."""
    if plan.position_ids is None:
        return [length - 1 for length in plan.plan.lengths]
    documents = plan.position_ids.split(plan.plan.lengths, dim=-1)
    return torch.stack([document.max() for document in documents]).tolist()


def _with_positions(args: tuple, kwargs: dict, position_ids: torch.Tensor) -> tuple[tuple, dict]:
    if "position_ids" in kwargs:
        return args, {**kwargs, "position_ids": position_ids}
    return (args[0], position_ids, *args[2:]), kwargs


def _without_last(output: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """cos and sin (..., T, D), or complex frequencies, without the appended position."""
    return output[..., :-1, :] if isinstance(output, torch.Tensor) else tuple(part[..., :-1, :] for part in output)
