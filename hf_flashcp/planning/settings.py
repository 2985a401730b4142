"""`PlanSettings`: the options of planning, which [`FlashCPPlugin`] shares with the collator and the attached model."""

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
from ..predict.model_config import has_known_mixers
from ..predict.model_shape import ModelShape
from .devices import Surroundings


if TYPE_CHECKING:
    from transformers import PreTrainedConfig

STRATEGIES = ("whole_doc", "per_doc", "per_seq", "flashcp", "search")
"""The names that `plan_documents` takes as `strategy`."""

DEFAULT_STRATEGY = "search"
"""The strategy that is used if no other is chosen."""


@dataclass
class PlanSettings:
    """The options with which the documents of a batch are planned.

    The plugin, the collator and the attached model share one object, so that all of them make the same plans.

    Args:
        cp_size (`int`): number of context-parallel ranks.
        hardware (`str`, `Path` or `HardwareProfile`, *optional*): with the strategy "search", plan for the least
            predicted step time on this hardware. The prediction needs the sizes of a model, which
            [`~PlanSettings.for_model`] takes. "auto" is the hardware that [`~PlanSettings.adopt`] takes, and `None`
            until then, with another strategy and beside another goal.
        topology (`Topology`, *optional*): the ranks' nodes, see [`plan_documents`]. "auto" is likewise the nodes that
            [`~PlanSettings.adopt`] takes, and `None` until then.

    [`plan_documents`] describes all other arguments.

    Attributes:
        automatic (`frozenset[str]`): which of `hardware` and `topology` take what is found.
        surroundings (`Surroundings`, *optional*): what was found.

    Raises:
        PlanError: a cp_size below 1, an unknown strategy, a cap below 1, an option that the strategy does not have,
            two goals at once, or ranks that do not fill their nodes.
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
    state_tokens: float = 0.0

    def __post_init__(self):
        self.cp_size = check_size("cp_size", self.cp_size)
        if self.strategy not in STRATEGIES:
            raise PlanError(f"Unknown strategy {self.strategy!r}: choose one of {', '.join(map(repr, STRATEGIES))}.")
        for name in ("max_imbalance", "max_token_imbalance"):
            cap = getattr(self, name)
            if not isinstance(cap, (int, float)) or not (1 <= cap <= MOST_TOKENS or cap == math.inf):
                raise PlanError(
                    f"{name} is {reprlib.repr(cap)}: it is max / mean over ranks, so it must be a number of at least "
                    "1. Pass infinity for no cap."
                )
        if not isinstance(self.state_tokens, (int, float)) or not 0 <= self.state_tokens < math.inf:
            raise PlanError(
                f"state_tokens is {reprlib.repr(self.state_tokens)}: it is the price of a state in tokens of KV, so "
                "it must be a number of at least 0. Pass 0 for models without recurrent layers."
            )
        self._set_automatic()
        self._check_owners()
        if self.num_stages is not None:
            self.num_stages = check_size("num_stages", self.num_stages)
        if self.topology is not None:
            check_topology(self.topology, self.cp_size)
        if self.hardware is not None:
            self.hardware = HardwareProfile.load(self.hardware)
        self._check_goals()

    def _set_automatic(self) -> None:
        """Replace "auto" by `None`, and remember where it was."""
        self.surroundings: Surroundings | None = None
        self.automatic = frozenset(name for name in ("hardware", "topology") if getattr(self, name) == "auto")
        for name in self.automatic:
            setattr(self, name, None)
        if self.minimize_total:
            self.automatic = frozenset()
        elif self.strategy != "search" or self.cost_model is not None or self.state_tokens:
            self.automatic -= {"hardware"}

    def _check_owners(self) -> None:
        owners = {
            "rotate_ranks": (self.rotate_ranks, "per_doc"),
            "minimize_total": (self.minimize_total, "search"),
            "cost_model": (self.cost_model is not None, "search"),
            "hardware": (self.hardware is not None, "search"),
            "state_tokens": (self.state_tokens != 0, "search"),
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
        if timed and self.state_tokens:
            raise PlanError(
                "state_tokens cannot be combined with cost_model or hardware, which price states themselves. Leave "
                "state_tokens out."
            )
        if self.minimize_total and (timed or self.topology is not None):
            raise PlanError(
                "minimize_total is a goal of its own, which cannot be combined with cost_model, hardware or topology. "
                "Leave it out, or leave those out."
            )

    def adopt(self, found: Surroundings) -> None:
        """Plan for what was found, where `hardware` and `topology` are "auto". Call [`~PlanSettings.for_model`] next.

        Without a topology, all ranks count as one node, whose links have the speed of those between nodes if it is
        not really one.
        """
        self.surroundings = found
        if "topology" in self.automatic:
            ranks_per_node = found.ranks_per_node or self.cp_size
            self.topology = Topology(ranks_per_node) if ranks_per_node < self.cp_size else None
        if "hardware" in self.automatic:
            profile = HardwareProfile.load(found.profile)
            if self.topology is None and found.ranks_per_node != self.cp_size:
                profile = dataclasses.replace(profile, intra_node=profile.inter_node)
            in_node = self.cp_size if self.topology is None else self.topology.ranks_per_node
            self.hardware = dataclasses.replace(profile, ranks_per_node=in_node)

    def for_model(self, config: PreTrainedConfig | Mapping[str, Any], itemsize: int = 2) -> str | None:
        """Set the model to plan for.

        With `hardware`, its step times are predicted. Otherwise its recurrent layers, if any, set `state_tokens`, the
        price at which the strategy "search" counts states.

        Args:
            config (`PreTrainedConfig` or `Mapping`): config of the model.
            itemsize (`int`, *optional*, defaults to 2): bytes per element in the training dtype.

        Returns:
            `str`, *optional*: why step times cannot be predicted although the hardware was found. Plans are then made
            for little KV traffic.

        Raises:
            ConfigurationError: the config lacks the sizes of its attention layers, and `hardware` is not "auto".
        """
        problem = None
        if self.hardware is not None:
            try:
                self.cost_model = CostModel.from_config(config, self.hardware, itemsize=itemsize)
                self.state_tokens = 0.0
            except ConfigurationError as error:
                if "hardware" not in self.automatic:
                    raise
                self.hardware = self.cost_model = None
                problem = str(error)
        if self.strategy == "search" and self.cost_model is None:
            recurrent = problem is None and has_known_mixers(config)
            self.state_tokens = ModelShape.from_config(config).state_tokens(itemsize) if recurrent else 0.0
        return problem

    def timing(self) -> CostModel | None:
        """Return the cost model that predicts step times, with the nodes of `topology` if that is set.

        The result is `None` if plans are made for little KV instead of little time.

        Raises:
            ConfigurationError: `hardware` is set, but no model.
        """
        if self.cost_model is None:
            if self.hardware is not None:
                raise ConfigurationError(
                    "FlashCPPlugin has a hardware profile to plan for, but no model is attached yet. Planning needs "
                    "the model's sizes: call hf_flashcp.attach(model, accelerator) before the first batch is read."
                )
            return None
        if self.topology is None:
            return self.cost_model
        hardware = dataclasses.replace(self.cost_model.hardware, ranks_per_node=self.topology.ranks_per_node)
        return dataclasses.replace(self.cost_model, hardware=hardware)

    def with_whole_documents(self) -> PlanSettings:
        """Return settings with which documents stay whole, for models that need whole documents."""
        return PlanSettings(self.cp_size, "whole_doc")


class SettingsOwner(Protocol):
    """An object that owns plan settings. [`FlashCPPlugin`] is one."""

    plan_settings: PlanSettings


_owner: SettingsOwner | None = None


def remember_owner(owner: SettingsOwner | None) -> None:
    """Make an owner's settings the current settings of this process; `None` clears them."""
    global _owner
    _owner = owner


def current_owner(cp_size: int | None = None) -> SettingsOwner | None:
    """Return the [`FlashCPPlugin`] that this process made last, or `None` if there is none or its cp_size differs.

    With `cp_size=None` any cp_size matches.
    """
    return _owner if _owner is not None and cp_size in (None, _owner.plan_settings.cp_size) else None


def current_settings(cp_size: int | None = None) -> PlanSettings:
    """Return the settings with which this process plans.

    These are the settings of the [`FlashCPPlugin`] that this process made last, unless a different `cp_size` is given.
    Without such a plugin they are the default settings for `cp_size` ranks or, if no `cp_size` is given, those in the
    launcher's environment.

    Raises:
        ConfigurationError: there is no plugin, no `cp_size`, and nothing in the environment.
    """
    if (owner := current_owner(cp_size)) is not None:
        return owner.plan_settings
    if cp_size is not None:
        return PlanSettings(cp_size)
    if os.environ.get("PARALLELISM_CONFIG_CP_BACKEND") != "flashcp":
        raise ConfigurationError(
            "No cp_size is known: make a FlashCPPlugin(cp_size=...) before the collator, or pass cp_size. Or start "
            "with `accelerate launch` and a config file that has parallelism_config_cp_backend: flashcp."
        )
    return PlanSettings(size_from_environment("cp_size"), strategy_from_environment())


def size_from_environment(name: str) -> Any:
    """Return a size of the parallelism config that `accelerate launch` exports, unchecked; 1 if it exports none."""
    value = os.environ.get(f"PARALLELISM_CONFIG_{name.upper()}", "1")
    try:
        return int(value)
    except ValueError:
        return value


def strategy_from_environment() -> str:
    """Return the strategy in `FLASHCP_STRATEGY`, or the default strategy."""
    return os.environ.get("FLASHCP_STRATEGY", DEFAULT_STRATEGY)
