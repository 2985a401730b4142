"""Combines what saves memory, and finds the fastest combination with which a window fits."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import fields, replace
from itertools import product
from typing import Any

from ..errors import ConfigurationError
from ..predict.training_setup import GRADIENT_CHECKPOINTING, TrainingSetup
from .sizing import AS_FAST, Choice, Sizing


_TRIED: dict[str, tuple[Any, ...]] = {
    "gradient_checkpointing": GRADIENT_CHECKPOINTING,
    "every_n_layers": (1, 2, 4),
    "offload": (False, True),
    "head_groups": (1, 2, 4, 8),
    "mlp_tiles": (1, 4, 16),
    "keep_received_kv": (None, False),
}
REMEDIES = tuple(_TRIED)
"""The fields of [`TrainingSetup`] that are proposed unless they are given."""

_DEFAULTS = {field.name: field.default for field in fields(TrainingSetup)}


def combinations(setup: TrainingSetup, free: Collection[str], sizing: Sizing) -> list[TrainingSetup]:
    """Return the setups that differ from the given one in the fields of [`REMEDIES`] that are free.

    Args:
        setup (`TrainingSetup`): the given setup.
        free (`Collection[str]`): names of the fields that may change.
        sizing (`Sizing`): the plan. With a single rank no KV is received, and hardware profiles without a
            `host_bandwidth` cannot offload.

    Raises:
        ConfigurationError: what was given needs activation checkpointing, which was turned off.
    """
    values = {name: tried if name in free else (getattr(setup, name),) for name, tried in _TRIED.items()}
    if "head_groups" in free:
        values["head_groups"] = tuple(n for n in values["head_groups"] if n <= max(sizing.shape.kv_heads, 1))
    if "mlp_tiles" in free and not sizing.shape.dense_width:
        values["mlp_tiles"] = (1,)
    if "keep_received_kv" in free and sizing.plan.cp_size == 1:
        values["keep_received_kv"] = (None,)
    if "offload" in free and sizing.cost_model.hardware.host_bandwidth is None:
        values["offload"] = (False,)
    found = [replace(setup, **dict(zip(values, each))) for each in product(*values.values())]
    found = [each for each in found if each.gradient_checkpointing != "none" or not _needs_checkpointing(each)]
    if not found:
        raise ConfigurationError(
            "offload and every_n_layers need activation checkpointing, which is turned off. Leave them out, or choose "
            "another kind of activation checkpointing."
        )
    return found


def _needs_checkpointing(setup: TrainingSetup) -> bool:
    return setup.offload or setup.every_n_layers > 1


def propose(setup: TrainingSetup, free: Collection[str], sizing: Sizing) -> tuple[Choice, Choice]:
    """Return the costs of the cheapest combination that fits, and of the one that needs the least memory.

    The cheapest has the fewest settings of those that are as fast as any ([`AS_FAST`]). If none fits, it is the one
    with the least memory.
    """
    found = [(each, sizing.memory(each).total, sizing.seconds(each)) for each in combinations(setup, free, sizing)]
    least, _, _ = min(found, key=lambda each: (round(each[1]), each[2], number_of_settings(each[0])))
    smallest = sizing.choice(least)
    fitting = [each for each in found if each[1] <= sizing.usable]
    if not fitting:
        return smallest, smallest
    fastest = min(seconds for _, _, seconds in fitting)
    as_fast = [each for each in fitting if AS_FAST * each[2] <= fastest]
    cheapest, _, _ = min(as_fast, key=lambda each: (number_of_settings(each[0]), each[2]))
    return sizing.choice(cheapest), smallest


def number_of_settings(setup: TrainingSetup) -> int:
    """Return how many of [`REMEDIES`] differ from their defaults."""
    return sum(getattr(setup, name) != _DEFAULTS[name] for name in REMEDIES)


def compare(setup: TrainingSetup, free: Collection[str], sizing: Sizing) -> Iterator[Choice]:
    """Yield the costs with logits kept, with each remedy alone, and with those that only go with others.

    Fields that are not free keep their values.
    """
    single: list[dict[str, Any]] = [
        {"skip_logits": False},
        {},
        {"gradient_checkpointing": "full"},
        {"gradient_checkpointing": "attention-saving"},
        {"gradient_checkpointing": "full", "every_n_layers": 2},
        {"gradient_checkpointing": "full", "offload": True},
        {"gradient_checkpointing": "attention-saving", "offload": True},
        {"head_groups": max(each.head_groups for each in combinations(setup, free, sizing))},
        {"mlp_tiles": max(each.mlp_tiles for each in combinations(setup, free, sizing))},
        {"keep_received_kv": False},
    ]
    allowed, seen = set(combinations(setup, free, sizing)), set()
    for changes in single:
        changed = replace(setup, **changes)
        if changed not in seen and (changed in allowed or replace(changed, skip_logits=setup.skip_logits) in allowed):
            seen.add(changed)
            yield sizing.choice(changed)


def described(setup: TrainingSetup) -> str:
    """Return the remedies of a setup in words."""
    mode = setup.gradient_checkpointing
    words = ["no checkpointing" if mode == "none" else mode]
    if setup.every_n_layers > 1:
        words.append(f"every {setup.every_n_layers} layers")
    if setup.offload:
        words.append("offload")
    if setup.head_groups > 1:
        words.append(f"{setup.head_groups} head groups")
    if setup.mlp_tiles > 1:
        words.append(f"{setup.mlp_tiles} MLP tiles")
    if setup.keep_received_kv is not None:
        words.append("received KV kept" if setup.keep_received_kv else "received KV not kept")
    if not setup.skip_logits:
        words.append("logits kept")
    return ", ".join(words)


def as_arguments(setup: TrainingSetup, cp_size: int) -> str:
    """Return the Python code that turns the remedies of a setup on."""
    options = ['"use_reentrant": False']
    if setup.gradient_checkpointing == "attention-saving":
        options.append('"context_fn": save_attention_context_fn')
    if setup.offload:
        options.append('"offload": True')
    if setup.every_n_layers > 1:
        options.append(f'"every_n_layers": {setup.every_n_layers}')
    of_plugin = [f"cp_size={cp_size}"]
    of_plugin += [
        f"{name}={getattr(setup, name)}"
        for name in ("head_groups", "mlp_tiles", "keep_received_kv", "skip_logits")
        if getattr(setup, name) != _DEFAULTS[name]
    ]
    lines = [f"parallelism_config=FlashCPPlugin({', '.join(of_plugin)}),"]
    if setup.gradient_checkpointing != "none":
        kwargs = f"activation_checkpointing_kwargs={{{', '.join(options)}}},"
        lines = ["activation_checkpointing=True,", kwargs, *lines]
    return "\n".join(["TrainingArguments(", *(f"    {line}" for line in lines), ")"])
