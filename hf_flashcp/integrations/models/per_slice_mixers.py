"""Mixers that run once per slice: those that need whole documents, and those that see only a few tokens back.

The states of some recurrent layers cannot be passed on, so a rank cannot start in the middle of a document. In a
packed row, the state would also flow into the next document. If each rank holds whole documents, it is enough to call
such a module once per document:

    local row   A A A A B B C C C        mixer(A A A A), mixer(B B), mixer(C C C), concatenated

ZAYA's projection sees a few tokens back. It is called on each slice behind the tokens before it, whose outputs are
dropped, so documents may be cut. The rest of a layer (norms, projections, experts) processes tokens independently, and
gets the whole row.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils.operations import recursively_apply
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ...errors import BatchError, UnsupportedModelError
from ...layout import RankPlan
from ...plan import ShardPlan
from ...recurrence.halo import with_halo
from .hybrids import Mixer, mixer_modules, mixer_of
from .sharded_forward import current_sharded_forward


def count_attention_modules(model: PreTrainedModel) -> int:
    """Return how many modules call transformers' attention interface, as not every layer of a hybrid model does."""
    return sum(
        "attention_interface(" in inspect.getsource(type(module).forward)
        for module in model.modules()
        if type(module).forward.__module__.startswith("transformers.")
    )


def require_whole_documents(plan: ShardPlan, model: PreTrainedModel, mixer: Mixer) -> None:
    """Raise a `BatchError` if `plan` cuts a document."""
    documents = len(plan.lengths)
    if documents < plan.cp_size:
        advice = (
            f"The batch has {documents} document{'s' * (documents > 1)} for {plan.cp_size} ranks: put at least "
            "cp_size documents in a batch, or lower cp_size."
        )
    else:
        advice = 'Plan with strategy="whole_doc", a setting of FlashCPPlugin.'
    for rank, slices in enumerate(plan.slices):
        for document, start, stop in slices:
            if stop - start != plan.lengths[document]:
                raise BatchError(
                    f"{type(model).__name__} has layers ({mixer.kind}) that need whole documents, but the plan gives "
                    f"rank {rank} tokens [{start}, {stop}) of document {document}, which has "
                    f"{plan.lengths[document]}. {advice}"
                )


def hook_mixers(model: PreTrainedModel) -> list[Any]:
    """Make the mixers of an attached model run once per slice, and return the handles of the hooks."""
    mixer, handles = mixer_of(model), []
    if mixer is None or mixer.functions:
        return []
    for name, module in mixer_modules(model).items():
        # A layer may contain another one (zamba), and both run again in backward.
        parents = [model.get_submodule(name[:end]) for end, part in enumerate(name) if part == "."]
        layer = [parent for parent in parents if isinstance(parent, GradientCheckpointingLayer)][-1]
        width = 1 if mixer.sees_back is None else getattr(module, mixer.sees_back) + 1
        handles += _PerSlice(width).hook(module, layer)
    return handles


class _PerSlice:
    """The hooks of one mixer, which gets its plan from the keyword arguments of its decoder layer.

    A checkpointed layer runs again in backward, perhaps after other forwards, and without its hooks (in transformers
    5.23 hooks run outside the checkpoint, see GradientCheckpointingLayer in modeling_layers.py). Therefore the
    checkpointed function carries the plan.
    """

    def __init__(self, width: int):
        self._width = width  # number of tokens that an output depends on, its own included
        self._plan: RankPlan | None = None
        self._calls: list[tuple[tuple, dict]] = []
        self._dropped: list[int] = []  # outputs of tokens before each slice
        self._checkpoint: Callable | None = None

    def hook(self, mixer: torch.nn.Module, layer: torch.nn.Module) -> list[Any]:
        return [
            layer.register_forward_pre_hook(self._enter_layer, with_kwargs=True),
            layer.register_forward_hook(self._leave_layer, always_call=True),
            mixer.register_forward_pre_hook(self._before, with_kwargs=True),
            mixer.register_forward_hook(self._after),
        ]

    def _enter_layer(self, layer, args, kwargs):
        self._plan = plan = kwargs.get("flashcp_plan")
        self._checkpoint = checkpoint = getattr(layer, "_gradient_checkpointing_func", None)
        if checkpoint is not None:
            layer._gradient_checkpointing_func = lambda function, *inputs: checkpoint(
                functools.partial(self._run_with, plan, function), *inputs
            )

    def _leave_layer(self, layer, args, output):
        self._plan = None
        if self._checkpoint is not None:
            layer._gradient_checkpointing_func = self._checkpoint

    def _run_with(self, plan: RankPlan | None, function: Callable, *inputs: Any) -> Any:
        self._plan = plan
        try:
            return function(*inputs)
        finally:
            self._plan = None

    @torch.compiler.disable
    def _before(self, mixer, args, kwargs):
        if self._plan is None:
            if current_sharded_forward() is not None:
                raise UnsupportedModelError(
                    f"{type(mixer).__name__} ran inside a sharded forward, but its layer was not given flashcp_plan, "
                    "so its state would leak from document to document. This model cannot be trained with context "
                    "parallelism."
                )
            return None
        layout, num_tokens = self._plan.layout, self._plan.layout.num_tokens
        pieces = [(piece.row, piece.row + piece.tokens) for piece in layout.slices]
        if self._width > 1:
            args, kwargs = recursively_apply(_behind_its_halo, (args, kwargs), self._plan, self._width)
            halo = self._plan.halo_for(self._width)
            num_tokens, pieces, self._dropped = halo.num_padded, halo.pieces, halo.halo_tokens
        first, *self._calls = [
            recursively_apply(_cut, (args, kwargs), num_tokens, start, stop) for start, stop in pieces
        ]
        return first

    @torch.compiler.disable
    def _after(self, mixer, args, output):
        if self._plan is None:
            return None
        outputs, calls, self._calls = [output], self._calls, []
        for slice_args, slice_kwargs in calls:
            outputs.append(mixer.forward(*slice_args, **slice_kwargs))
        if self._width > 1:
            outputs = [recursively_apply(_without_first, *pair) for pair in zip(outputs, self._dropped)]
        return outputs[0] if len(outputs) == 1 else _joined(outputs)


def _behind_its_halo(tensor: torch.Tensor, plan: RankPlan, width: int) -> torch.Tensor:
    """Return a tensor (1, T_r, ...) with the tokens before each slice, and any other tensor unchanged."""
    if tensor.dim() < 3 or tensor.shape[:2] != (1, plan.layout.num_tokens):
        return tensor
    return with_halo(tensor[0].flatten(1), plan, width).unflatten(1, tensor.shape[2:])[None]


def _without_first(tensor: torch.Tensor, count: int) -> torch.Tensor:
    return tensor[:, count:]


def _cut(tensor: torch.Tensor, num_tokens: int, start: int, stop: int) -> torch.Tensor:
    """Return the tokens [start, stop) of a tensor (1, num_tokens, ...), and any other tensor unchanged."""
    return tensor[:, start:stop] if tensor.dim() >= 2 and tensor.shape[:2] == (1, num_tokens) else tensor


def _joined(outputs: list[Any]) -> Any:
    if isinstance(outputs[0], torch.Tensor):
        return torch.cat(outputs, dim=1)
    if isinstance(outputs[0], tuple):
        return tuple(_joined(list(parts)) for parts in zip(*outputs))
    return outputs[0]
