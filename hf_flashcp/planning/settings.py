"""`PlanSettings`: how batches are planned. [`FlashCPPlugin`] makes it for collator and attached model."""

from __future__ import annotations

import dataclasses
import math
import os
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import ConfigurationError, PlanError
from ..plan.lengths import MOST_TOKENS, check_size
from ..plan.topology import Topology, check_topology
from ..predict.cost_model import CostModel
from ..predict.hardware_profile import HardwareProfile


if TYPE_CHECKING:
    from transformers import PreTrainedConfig

STRATEGIES = ("whole_doc", "per_doc", "per_seq", "flashcp", "search")
"""Names that `plan_documents` takes as `strategy`."""

DEFAULT_STRATEGY = "search"
"""The strategy of batches for which no other is chosen."""


@dataclass
class PlanSettings:
    """How the documents of a batch are planned: [`plan_documents`] has what each option does.

    One object is shared by plugin, collator and attached model, so that none of them can plan otherwise.

    Args:
        cp_size (`int`): number of context-parallel ranks.
        hardware (`str`, `Path` or `HardwareProfile`, *optional*): with the strategy "search", plan for the least
            predicted step time on it. It takes a model's sizes to predict ([`~PlanSettings.for_model`]).

    The others are options of [`plan_documents`].

    Raises:
        PlanError: a cp_size below 1, an unknown strategy, a cap below 1, an option that the strategy does not have,
            two goals at once, ranks that do not fill their nodes.
        ConfigurationError: an unknown hardware profile.
    """

    cp_size: int
    strategy: str = DEFAULT_STRATEGY
    hardware: str | Path | HardwareProfile | None = None
    cost_model: CostModel | None = None
    max_imbalance: float = 1.05
    max_token_imbalance: float = 1.0
    minimize_total: bool = False
    num_stages: int | None = None
    rotate_ranks: bool = False
    topology: Topology | None = None

    def __post_init__(self):
        self.cp_size = check_size("cp_size", self.cp_size)
        if self.strategy not in STRATEGIES:
            raise PlanError(f"Unknown strategy {self.strategy!r}: choose one of {', '.join(map(repr, STRATEGIES))}.")
        for name in ("max_imbalance", "max_token_imbalance"):
            cap = getattr(self, name)
            if not isinstance(cap, (int, float)) or not (1 <= cap <= MOST_TOKENS or cap == math.inf):
                raise PlanError(
                    f"{name} is {reprlib.repr(cap)}: it is max / mean over ranks, a number not below 1 (no cap: "
                    "infinity)."
                )
        self._check_owners()
        if self.num_stages is not None:
            self.num_stages = check_size("num_stages", self.num_stages)
        if self.topology is not None:
            check_topology(self.topology, self.cp_size)
        if self.hardware is not None:
            self.hardware = HardwareProfile.load(self.hardware)
        self._check_goals()

    def _check_owners(self) -> None:
        owners = {
            "rotate_ranks": (self.rotate_ranks, "per_doc"),
            "minimize_total": (self.minimize_total, "search"),
            "cost_model": (self.cost_model is not None, "search"),
            "hardware": (self.hardware is not None, "search"),
        }
        for name, (given, owner) in owners.items():
            if given and self.strategy != owner:
                raise PlanError(
                    f"{name} is an option of the strategy {owner!r}, not of {self.strategy!r}: leave it out."
                )

    def _check_goals(self) -> None:
        if self.cost_model is not None and not isinstance(self.cost_model, CostModel):
            raise PlanError(
                f"cost_model is {reprlib.repr(self.cost_model)}, not a CostModel: pass "
                "CostModel.from_config(config, hardware)."
            )
        timed = self.hardware is not None or self.cost_model is not None
        if self.minimize_total and (timed or self.topology is not None):
            raise PlanError("minimize_total is a goal of its own: leave out cost_model, hardware and topology.")

    def for_model(self, config: PreTrainedConfig | Mapping[str, Any], itemsize: int = 2) -> None:
        """Predicts step times for a model from now on, if there is a `hardware` to predict them on.

        Args:
            config (`PreTrainedConfig` or `Mapping`): config of the model.
            itemsize (`int`, *optional*, defaults to 2): bytes of an element in the training dtype.

        Raises:
            ConfigurationError: a config without the sizes of its attention.
        """
        if self.hardware is not None:
            self.cost_model = CostModel.from_config(config, self.hardware, itemsize=itemsize)

    def timing(self) -> CostModel | None:
        """What predicts step times, with the nodes of `topology` where there is one; `None` for plans of little KV.

        Raises:
            ConfigurationError: `hardware` without a model.
        """
        if self.cost_model is None:
            if self.hardware is not None:
                raise ConfigurationError(
                    "FlashCPPlugin has a hardware to plan for, but no model is attached yet, whose sizes it takes. "
                    "Call hf_flashcp.attach(model, accelerator) before the first batch is read."
                )
            return None
        if self.topology is None:
            return self.cost_model
        hardware = dataclasses.replace(self.cost_model.hardware, ranks_per_node=self.topology.ranks_per_node)
        return dataclasses.replace(self.cost_model, hardware=hardware)

    def with_whole_documents(self) -> PlanSettings:
        """Settings that keep documents whole, for models that need that."""
        return PlanSettings(self.cp_size, "whole_doc")


class SettingsOwner(Protocol):
    """What [`FlashCPPlugin`] is for planning."""

    plan_settings: PlanSettings


_owner: SettingsOwner | None = None


def remember_owner(owner: SettingsOwner | None) -> None:
    """Makes an owner's settings the current ones of this process; `None` forgets them."""
    global _owner
    _owner = owner


def current_owner(cp_size: int | None = None) -> SettingsOwner | None:
    """The [`FlashCPPlugin`] that this process made last, if it has `cp_size` ranks or none are asked for."""
    return _owner if _owner is not None and cp_size in (None, _owner.plan_settings.cp_size) else None


def current_settings(cp_size: int | None = None) -> PlanSettings:
    """The settings of the [`FlashCPPlugin`] that this process made last, if it has `cp_size` ranks or none are asked
    for; else default ones for `cp_size` ranks, else those of the launcher's environment."""
    if (owner := current_owner(cp_size)) is not None:
        return owner.plan_settings
    if cp_size is not None:
        return PlanSettings(cp_size)
    if os.environ.get("PARALLELISM_CONFIG_CP_BACKEND") != "flashcp":
        raise ConfigurationError(
            "No cp_size is known: make a FlashCPPlugin(cp_size=...) before the collator, start with `accelerate "
            "launch` and a config file that has parallelism_config_cp_backend: flashcp, or pass cp_size."
        )
    return PlanSettings(size_from_environment("cp_size"), strategy_from_environment())


def size_from_environment(name: str) -> Any:
    """What `accelerate launch` exports for a size of the parallelism config, unchecked; 1 where it exports nothing."""
    value = os.environ.get(f"PARALLELISM_CONFIG_{name.upper()}", "1")
    try:
        return int(value)
    except ValueError:
        return value


def strategy_from_environment() -> str:
    """The strategy in `FLASHCP_STRATEGY`, or the default one."""
    return os.environ.get("FLASHCP_STRATEGY", DEFAULT_STRATEGY)
