"""Context parallelism for document-packed long-context fine-tuning with Hugging Face models.

`import hf_flashcp` registers `attn_implementation="flashcp"` with transformers. The import itself loads neither torch
nor transformers, so planning in a data loader worker or on the command line stays light.
"""

import importlib
from typing import TYPE_CHECKING

from ._when_imported import when_imported
from .integrations.trainers.trl_guards import BASE_CONFIG, BASE_TRAINER, guard_configs, guard_trainers


__version__ = "0.1.0.dev0"

_EXPORTS = {
    "CostModel": ".predict",
    "FlashCPCallback": ".integrations.trainers.callback",
    "FlashCPCollator": ".data",
    "FlashCPPlugin": ".integrations.plugin",
    "FlashCPTrainer": ".integrations.trainers.trainer",
    "FlashCPTrainerMixin": ".integrations.trainers.trainer",
    "PackedDocumentStream": ".data",
    "PackedDocuments": ".data",
    "RankPlan": ".layout",
    "ShardPlan": ".plan",
    "Topology": ".plan",
    "attach": ".integrations.attach",
    "errors": None,
    "flashcp_attention": ".integrations.registration",
    "gather_tokens": ".exchange",
    "name_missing_ranks": ".distributed",
    "pack_lengths": ".data",
    "plan_documents": ".planning",
    "save_attention_context_fn": ".attention",
    "shard_inputs": ".data",
}
__all__ = sorted(_EXPORTS)

if TYPE_CHECKING:
    from . import errors
    from .attention import save_attention_context_fn
    from .data import FlashCPCollator, PackedDocuments, PackedDocumentStream, pack_lengths
    from .data.batch import shard_inputs
    from .distributed import name_missing_ranks
    from .exchange import gather_tokens
    from .integrations.attach import attach
    from .integrations.plugin import FlashCPPlugin
    from .integrations.registration import flashcp_attention
    from .integrations.trainers.callback import FlashCPCallback
    from .integrations.trainers.trainer import FlashCPTrainer, FlashCPTrainerMixin
    from .layout import RankPlan
    from .plan import ShardPlan, Topology
    from .planning import plan_documents
    from .predict import CostModel


def __getattr__(name):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if (module := _EXPORTS[name]) is None:
        return importlib.import_module(f".{name}", __name__)
    return getattr(importlib.import_module(module, __name__), name)


def __dir__():
    return [*globals(), *_EXPORTS]


def _register():
    importlib.import_module(".integrations.registration", __name__).register()


when_imported("transformers.modeling_utils", _register)
when_imported(BASE_CONFIG, guard_configs)
when_imported(BASE_TRAINER, guard_trainers)
