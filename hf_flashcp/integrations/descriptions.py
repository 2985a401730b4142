"""What ranks compare of their models and batches, and the advice if they differ."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel
from transformers import __version__ as transformers_version

from .. import __version__ as hf_flashcp_version
from ..distributed.exchange_group import exchange_number
from ..layout import RankPlan
from ..predict.model_config import config_value


if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


SAME_MODEL = (
    "Start every process with the same packages, model and cp_size, and call attach and remove alike on every rank."
)
SAME_BATCH = (
    "All processes of a context-parallel group must read the same batch: let accelerate prepare the data loader, give "
    "a loader that shuffles a generator with the same seed on every rank, and use the same strategy, kernel, "
    "head_groups, mlp_tiles, skip_logits and FLASHCP_DEBUG settings everywhere."
)


def describe_model(model: PreTrainedModel, group: ProcessGroup) -> dict[str, Any]:
    """Describe a model and the packages in which it runs."""
    config = model.config.get_text_config()
    shapes = str([(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()])
    return {
        "cp_size": group.size(),
        "exchange groups made": exchange_number(group),
        "hf_flashcp": hf_flashcp_version,
        "torch": torch.__version__,
        "transformers": transformers_version,
        "model class": type(model).__name__,
        "dtype": str(model.dtype),
        "layers": config.num_hidden_layers,
        "heads": [config_value(config, "num_attention_heads"), config_value(config, "num_key_value_heads")],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "shapes": hashlib.blake2b(shapes.encode(), digest_size=8).hexdigest(),
    }


def describe_batch(bound: RankPlan, skip_logits: bool, mlp_tiles: int) -> dict[str, Any]:
    """Describe a batch and the settings of its forward."""
    return {
        "documents": len(bound.plan.lengths),
        "tokens": bound.plan.num_tokens,
        "plan": bound.plan.digest[:16],
        "content": bound.plan.content_digest,
        "keep_received_kv": bound.keep_received_kv,
        "layers_run_again": sorted(bound.layers_run_again),
        "kernel": bound.kernel,
        "head_groups": bound.head_groups,
        "mlp_tiles": mlp_tiles,
        "skip_logits": skip_logits,
        **{name: os.environ.get(name) for name in ("FLASHCP_DEBUG", "FLASHCP_DEBUG_EVERY")},
    }
