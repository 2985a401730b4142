"""A table of TRL's trainers that run under context parallelism, and guards that make all others refuse the plugin.

`SFTTrainer` trains on packed batches of documents. The preference and RL trainers read per-token outputs of whole
rows, which TRL's fused output head computes, and `RewardTrainer` reads scores. The others read the logits of all
tokens, or models that are not attached. (Configs of online trainers refuse `parallelism_config.cp_enabled`, but that
is False for `FlashCPPlugin`.)
"""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from ...errors import ConfigurationError


if TYPE_CHECKING:
    from ..plugin import FlashCPPlugin

BASE_CONFIG = "trl.trainer.base_config"
BASE_TRAINER = "trl.trainer.base_trainer"


class RowTrainer(NamedTuple):
    """A trainer of TRL that reads whole padded rows.

    Attributes:
        batches (`str`): the `batches` that it runs with by default.
        rows_per_example (`int`): rows of a batch per example of the dataset: 2 where they are [chosen, rejected].
        generates (`bool`): whether it trains on what the model generates.
    """

    batches: str = "shared"
    rows_per_example: int = 1
    generates: bool = False


ROW_TRAINERS = {
    "trl.trainer.dpo_trainer.DPOTrainer": RowTrainer(rows_per_example=2),
    "trl.trainer.kto_trainer.KTOTrainer": RowTrainer(),
    "trl.trainer.reward_trainer.RewardTrainer": RowTrainer(rows_per_example=2),
    "trl.trainer.grpo_trainer.GRPOTrainer": RowTrainer("own", generates=True),
    "trl.trainer.rloo_trainer.RLOOTrainer": RowTrainer("own", generates=True),
    "trl.experimental.bema_for_ref_model.dpo_trainer.DPOTrainer": RowTrainer(rows_per_example=2),
    "trl.experimental.kto.KTOTrainer": RowTrainer(),
    "trl.experimental.gmpo.gmpo_trainer.GMPOTrainer": RowTrainer("own", generates=True),
}
_SFT = "trl.trainer.sft_trainer.SFTTrainer"
_CONFIGS = {name.replace("_trainer.", "_config.").removesuffix("Trainer") + "Config" for name in (*ROW_TRAINERS, _SFT)}
_FULL_LOGITS = "it reads the logits of all tokens, which no rank has"
_PREFERENCE = "Train with DPOTrainer, KTOTrainer or RewardTrainer"
_RL = "Train with GRPOTrainer or RLOOTrainer"
_SUPERVISED = "Train with SFTTrainer"
REFUSED_TRAINERS = {
    "ORPO": (_FULL_LOGITS, _PREFERENCE),
    "CPO": (_FULL_LOGITS, _PREFERENCE),
    "TPO": (_FULL_LOGITS, _PREFERENCE),
    "OnlineDPO": (_FULL_LOGITS, _RL),
    "A2PO": (_FULL_LOGITS, _RL),
    "AsyncGRPO": ("its rollouts come from another process, which has not been compared with a single process", _RL),
    "SDFT": (_FULL_LOGITS, _SUPERVISED),
    "SDPO": (_FULL_LOGITS, _RL),
    "Distillation": (_FULL_LOGITS, f"{_SUPERVISED}, or write a loop with hf_flashcp.gather_tokens"),
    "AsyncDistillation": (_FULL_LOGITS, f"{_SUPERVISED}, or write a loop with hf_flashcp.gather_tokens"),
    "ServerDistillation": (_FULL_LOGITS, f"{_SUPERVISED}, or write a loop with hf_flashcp.gather_tokens"),
    "IWOPD": (_FULL_LOGITS, f"{_SUPERVISED}, or write a loop with hf_flashcp.gather_tokens"),
    "GKD": (_FULL_LOGITS, f"{_SUPERVISED}, or write a loop with hf_flashcp.gather_tokens"),
    "GOLD": (_FULL_LOGITS, f"{_SUPERVISED}, or write a loop with hf_flashcp.gather_tokens"),
}
"""Reason and advice for each trainer of TRL that is refused, by its name without "Trainer"."""


def guard_configs() -> None:
    """Make the configs of an imported TRL refuse a `FlashCPPlugin` with a cp_size above 1, unless it supports them."""
    base = sys.modules[BASE_CONFIG]._BaseConfig
    post_init = base.__post_init__

    @functools.wraps(post_init)
    def refuse_plugin(self, *args, **kwargs):
        refuse_other_configs(self)
        post_init(self, *args, **kwargs)

    base.__post_init__ = refuse_plugin


def guard_trainers() -> None:
    """Make TRL's trainers of whole rows refuse a `FlashCPPlugin` with a cp_size above 1 without the mixin."""
    base = sys.modules[BASE_TRAINER]._BaseTrainer
    init = base.__init__

    @functools.wraps(init)
    def refuse_without_mixin(self, *args, **kwargs):
        init(self, *args, **kwargs)
        has_mixin = "FlashCPTrainerMixin" in {each.__name__ for each in type(self).__mro__}
        if row_trainer(type(self)) is not None and _plugin_above_1(self.args) is not None and not has_mixin:
            raise ConfigurationError(
                f"{type(self).__name__} has a FlashCPPlugin, but would run each batch on every process of a group. "
                f"Put the mixin before it: class MyTrainer(FlashCPTrainerMixin, {type(self).__name__})."
            )

    base.__init__ = refuse_without_mixin


def refuse_other_configs(arguments: Any) -> None:
    """Raise a `ConfigurationError` if `arguments` with a plugin belong to a TRL trainer that is not supported."""
    if _plugin_above_1(arguments) is None:
        return
    name = _nearest_trl_class(type(arguments))
    if name is not None and name not in _CONFIGS:
        _refuse(name.rpartition(".")[2].replace("Config", "Trainer"))


def refuse_other_trainers(trainer: Any) -> None:
    """Raise a `ConfigurationError` if a trainer with a plugin is, or extends, a TRL trainer that is not supported."""
    refuse_other_configs(trainer.args)
    name = _nearest_trl_class(type(trainer))
    if _plugin_above_1(trainer.args) is not None and name is not None and name not in (*ROW_TRAINERS, _SFT):
        _refuse(name.rpartition(".")[2])


def row_trainer(trainer: type) -> RowTrainer | None:
    """Return what is known about a class that extends one of TRL's trainers of whole rows, otherwise `None`."""
    return ROW_TRAINERS.get(_nearest_trl_class(trainer) or "")


def is_sft_trainer(trainer: Any, owner: type | None = None) -> bool:
    """Return whether a trainer is an SFTTrainer of TRL, or, if `owner` is given, whether this class is SFTTrainer."""
    classes = type(trainer).__mro__ if owner is None else (owner,)
    return _SFT in {_full_name(each) for each in classes}


def computes_fused_loss(owner: type) -> bool:
    """Return whether a class is an SFTTrainer whose loss comes from TRL's fused output head, without logits."""
    return is_sft_trainer(None, owner) and hasattr(sys.modules[owner.__module__], "add_fused_lm_head")


def _plugin_above_1(arguments: Any) -> FlashCPPlugin | None:
    from ..plugin import FlashCPPlugin

    plugin = arguments.parallelism_config
    return plugin if isinstance(plugin, FlashCPPlugin) and plugin.cp_size > 1 else None


def _nearest_trl_class(cls: type) -> str | None:
    """Return the full name of the first class of TRL among a class and those behind it."""
    names = (_full_name(each) for each in cls.__mro__)
    return next((name for name in names if name.startswith("trl.")), None)


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__name__}"


def _refuse(trainer: str) -> None:
    reason, advice = REFUSED_TRAINERS.get(
        trainer.removesuffix("Trainer"), ("hf_flashcp does not know it", f"{_SUPERVISED}, DPOTrainer or GRPOTrainer")
    )
    raise ConfigurationError(
        f"{trainer} cannot run under context parallelism: {reason}. {advice}, or leave parallelism_config out."
    )
