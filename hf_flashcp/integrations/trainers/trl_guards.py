"""TRL's trainers that cannot be sharded refuse our plugin.

Only `SFTTrainer`'s batches are documents. The online trainers build theirs after generation (their configs raise where
`parallelism_config.cp_enabled`, which `FlashCPPlugin` keeps False), the preference and reward trainers compare whole
padded sequences.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

from ...errors import ConfigurationError


BASE_CONFIG = "trl.trainer.base_config"


def guard_configs() -> None:
    """Makes the configs of an imported TRL refuse a `FlashCPPlugin` with cp_size above 1, SFTConfig apart."""
    base = sys.modules[BASE_CONFIG]._BaseConfig
    post_init = base.__post_init__

    @functools.wraps(post_init)
    def refuse_plugin(self, *args, **kwargs):
        refuse_other_trainers(self)
        post_init(self, *args, **kwargs)

    base.__post_init__ = refuse_plugin


def refuse_other_trainers(arguments: Any) -> None:
    """Raises a `ConfigurationError` if `arguments` are a TRL trainer's other than SFTTrainer's, with a plugin."""
    from ..plugin import FlashCPPlugin

    plugin = arguments.parallelism_config
    if not isinstance(plugin, FlashCPPlugin) or plugin.cp_size == 1:
        return
    ancestors = {f"{each.__module__}.{each.__name__}" for each in type(arguments).__mro__}
    if f"{BASE_CONFIG}._BaseConfig" in ancestors and "trl.trainer.sft_config.SFTConfig" not in ancestors:
        trainer = type(arguments).__name__.replace("Config", "Trainer")
        raise ConfigurationError(
            f"{trainer} cannot run under context parallelism: of TRL's trainers only SFTTrainer has batches of "
            "documents. Others build theirs after generation, or compare whole sequences, of which a rank would have "
            "parts. Leave parallelism_config out, or train with SFTTrainer."
        )


def is_sft_trainer(trainer: Any, owner: type | None = None) -> bool:
    """Whether a trainer is TRL's SFTTrainer, or `owner`, one of its classes, is that itself."""
    classes = type(trainer).__mro__ if owner is None else (owner,)
    return "trl.trainer.sft_trainer.SFTTrainer" in {f"{each.__module__}.{each.__name__}" for each in classes}
