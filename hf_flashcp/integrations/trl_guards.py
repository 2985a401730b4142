"""TRL's own refusals, which our plugin would disarm.

TRL's online trainers build their batches after generation, so context parallelism cannot shard them; their configs
raise where `parallelism_config.cp_enabled`, which `FlashCPPlugin` keeps False. Here they raise for the plugin too.
"""

from __future__ import annotations

import functools
import sys

from ..errors import ConfigurationError


GUARDED_CONFIGS = {
    "trl.trainer.grpo_config": "GRPOConfig",
    "trl.trainer.rloo_config": "RLOOConfig",
    "trl.trainer.distillation_config": "DistillationConfig",
}


def guard_config(module_name: str) -> None:
    """Makes the config class of an imported TRL module refuse a `FlashCPPlugin` with cp_size above 1."""
    config_class = getattr(sys.modules[module_name], GUARDED_CONFIGS[module_name])
    post_init = config_class.__post_init__

    @functools.wraps(post_init)
    def refuse_plugin(self, *args, **kwargs):
        from .plugin import FlashCPPlugin

        if isinstance(self.parallelism_config, FlashCPPlugin) and self.parallelism_config.cp_size > 1:
            trainer = type(self).__name__.replace("Config", "Trainer")
            raise ConfigurationError(
                f"{trainer} cannot run under context parallelism: it builds its batches after generation, on each "
                "process, where they cannot be sharded. Leave parallelism_config out, or train with SFTTrainer."
            )
        post_init(self, *args, **kwargs)

    config_class.__post_init__ = refuse_plugin
