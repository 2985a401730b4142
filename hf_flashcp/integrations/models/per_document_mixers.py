"""Support for recurrent and convolutional layers on plans that keep every document whole.

The state of such a layer flows from token to token, so a rank cannot start in the middle of a document. In a packed
row, the state would also flow into the next document (transformers' own kernels prevent this only with CUDA packages,
and not in all families). If each rank holds whole documents, it is enough to call such a module once per document:

    local row   A A A A B B C C C        mixer(A A A A), mixer(B B), mixer(C C C), concatenated

The rest of the layer (norms, projections, experts) processes tokens independently, and gets the whole row.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils.operations import recursively_apply
from transformers import PreTrainedModel

from ...errors import BatchError, UnsupportedModelError
from ...layout import RankPlan
from ...plan import ShardPlan
from .checkpointing import inside_wrappers
from .sharded_forward import current_sharded_forward


MIXERS = {
    "bailing_hybrid": "BailingHybridDeltaAttention",
    "bamba": "BambaMixer",
    "falcon_h1": "FalconH1Mixer",
    "granitemoehybrid": "GraniteMoeHybridMambaLayer",
    "jamba": "JambaMambaMixer",
    "kimi_linear": "KimiLinearDeltaAttention",
    "lfm2": "Lfm2ShortConv",
    "lfm2_moe": "Lfm2MoeShortConv",
    "lfm3": "Lfm3ShortConv",
    "minimax": "MiniMaxLightningAttention",
    "nemotron_h": "NemotronHMamba2Mixer",
    "olmo_hybrid": "OlmoHybridGatedDeltaNet",
    "qwen3_5_moe_text": "Qwen3_5MoeGatedDeltaNet",
    "qwen3_5_text": "Qwen3_5GatedDeltaNet",
    "qwen3_next": "Qwen3NextGatedDeltaNet",
    "recurrent_gemma": "RecurrentGemmaRecurrentBlock",
    "zamba": "ZambaMambaMixer",
    "zamba2": "Zamba2MambaMixer",
    "zaya": "ZayaCCAProjection",
}
"""The class of each family's module that mixes tokens by other means than attention, by model type."""


def needs_whole_documents(model: PreTrainedModel) -> bool:
    """Return whether the model has such layers and belongs to a family in `MIXERS`."""
    mixer = MIXERS.get(model.config.get_text_config().model_type)
    return mixer is not None and any(type(module).__name__ == mixer for module in model.modules())


def count_attention_modules(model: PreTrainedModel) -> int:
    """Return how many modules call transformers' attention interface, as not every layer of a hybrid model does."""
    return sum(
        "attention_interface(" in inspect.getsource(type(module).forward)
        for module in model.modules()
        if type(module).__module__.startswith("transformers.")
    )


def require_whole_documents(plan: ShardPlan, model: PreTrainedModel) -> None:
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
                    f"{type(model).__name__} has recurrent or convolutional layers, which need whole documents, but "
                    f"the plan gives rank {rank} tokens [{start}, {stop}) of document {document}, which has "
                    f"{plan.lengths[document]}. {advice}"
                )


def hook_mixers(model: PreTrainedModel) -> list[Any]:
    """Make the mixers of an attached model run once per document, and return the handles of the hooks."""
    if not needs_whole_documents(model):
        return []
    mixer = MIXERS[model.config.get_text_config().model_type]
    handles = []
    for name, module in model.named_modules():
        if type(module).__name__ == mixer:
            path = name.split(".")
            depth = max(index for index, part in enumerate(path) if part.isdigit())
            layer = inside_wrappers(model.get_submodule(".".join(path[: depth + 1])))
            handles += _PerDocument().hook(module, layer)
    return handles


class _PerDocument:
    """The hooks of one mixer, which gets its plan from the keyword arguments of its decoder layer.

    A checkpointed layer runs again in backward, perhaps after other forwards, and without its hooks (in transformers
    5.23 hooks run outside the checkpoint, see GradientCheckpointingLayer in modeling_layers.py). Therefore the
    checkpointed function carries the plan.
    """

    def __init__(self):
        self._plan: RankPlan | None = None
        self._calls: list[tuple[tuple, dict]] = []
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

    def _before(self, mixer, args, kwargs):
        if self._plan is None:
            if current_sharded_forward() is not None:
                raise UnsupportedModelError(
                    f"{type(mixer).__name__} ran inside a sharded forward, but its layer was not given flashcp_plan, "
                    "so its state would leak from document to document. This model cannot be trained with context "
                    "parallelism."
                )
            return None
        layout = self._plan.layout
        first, *self._calls = [
            recursively_apply(_cut, (args, kwargs), layout.num_tokens, piece.row, piece.row + piece.tokens)
            for piece in layout.slices
        ]
        return first

    def _after(self, mixer, args, output):
        outputs = [output]
        calls, self._calls = self._calls, []
        for document_args, document_kwargs in calls:
            outputs.append(mixer.forward(*document_args, **document_kwargs))
        return output if len(outputs) == 1 else _joined(outputs)


def _cut(tensor: torch.Tensor, num_tokens: int, start: int, stop: int) -> torch.Tensor:
    """Return the tokens [start, stop) of a tensor (1, num_tokens, ...), and any other tensor unchanged."""
    return tensor[:, start:stop] if tensor.dim() >= 2 and tensor.shape[:2] == (1, num_tokens) else tensor


def _joined(outputs: list[Any]) -> Any:
    if isinstance(outputs[0], torch.Tensor):
        return torch.cat(outputs, dim=1)
    if isinstance(outputs[0], tuple):
        return tuple(_joined(list(parts)) for parts in zip(*outputs))
    return outputs[0]
