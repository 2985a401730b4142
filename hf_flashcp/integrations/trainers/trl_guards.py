"""Guards that make TRL's trainers other than `SFTTrainer` refuse a `FlashCPPlugin`.

Only the batches of `SFTTrainer` consist of documents. The online trainers build their batches after generation. (Their
configs refuse `parallelism_config.cp_enabled`, but that is False for `FlashCPPlugin`.) The preference and reward
trainers compare whole padded sequences.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

from ...errors import ConfigurationError


BASE_CONFIG = "trl.trainer.base_config"


def guard_configs() -> None:
    """Make all configs of an imported TRL except SFTConfig refuse a `FlashCPPlugin` with a cp_size above 1."""
    base = sys.modules[BASE_CONFIG]._BaseConfig
    post_init = base.__post_init__

    @functools.wraps(post_init)
    def refuse_plugin(self, *args, **kwargs):
        refuse_other_trainers(self)
        post_init(self, *args, **kwargs)

    base.__post_init__ = refuse_plugin


def refuse_other_trainers(arguments: Any) -> None:
    """Raise a `ConfigurationError` if `arguments` with a plugin belong to a TRL trainer other than SFTTrainer."""
    from ..plugin import FlashCPPlugin

    plugin = arguments.parallelism_config
    if not isinstance(plugin, FlashCPPlugin) or plugin.cp_size == 1:
        return
    ancestors = {f"{each.__module__}.{each.__name__}" for each in type(arguments).__mro__}
    if f"{BASE_CONFIG}._BaseConfig" in ancestors and "trl.trainer.sft_config.SFTConfig" not in ancestors:
        trainer = type(arguments).__name__.replace("Config", "Trainer")
        raise ConfigurationError(
            f"{trainer} cannot run under context parallelism: of TRL's trainers, only SFTTrainer trains on batches of "
            "documents. The others build their batches after generation or compare whole sequences. Leave "
            "parallelism_config out, or train with SFTTrainer."
        )


def is_sft_trainer(trainer: Any, owner: type | None = None) -> bool:
    """Return whether a trainer is an SFTTrainer of TRL, or, if `owner` is given, whether this class is SFTTrainer."""
    classes = type(trainer).__mro__ if owner is None else (owner,)
    return "trl.trainer.sft_trainer.SFTTrainer" in {f"{each.__module__}.{each.__name__}" for each in classes}


def computes_fused_loss(owner: type) -> bool:
    """Return whether a class is an SFTTrainer whose loss comes from TRL's fused output head, without logits."""
    return is_sft_trainer(None, owner) and hasattr(sys.modules[owner.__module__], "add_fused_lm_head")
