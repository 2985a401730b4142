"""Finds the cp_size that a window needs: memory, step time and traffic of every size that divides the devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ConfigurationError, PlanError
from ..plan.shard_plan import ShardPlan
from ..plan.slices import rank_tokens
from ..planning.strategies import plan_documents
from ..predict.cost_model import CostModel, StepTime
from ..predict.hardware_profile import HardwareProfile
from ..predict.layer_work import largest_calls
from ..predict.memory import MemoryEstimate, estimate_memory, largest_window
from ..predict.memory_shape import MemoryShape
from ..predict.training_setup import RankLoad, TrainingSetup


USABLE_MEMORY = 0.9
"""The assumed share of a device's memory: the rest is for the CUDA context, NCCL's and cuBLAS's buffers and
fragmentation."""

MOST_GPUS = 2**20
"""The most GPUs whose divisors are looked for one by one."""

AS_FAST = 0.99
"""Predicted throughputs within this factor of the best count as equal: the smallest of their sizes is chosen."""

# Forward's share of attention's seconds: two matrix products of seven, five of them in backward.
_RECOMPUTED_ATTENTION = 2 / 7
_RECOMPUTED_LINEAR = 1 / 3


@dataclass(frozen=True)
class Choice:
    """The costs of a cp_size: of the rank that needs most or waits longest, of one row's forward and backward.
    `largest_window` is in tokens, 0 if none fits; `tokens_per_second` is of all devices together, `kv_bytes` of all
    layers' forward."""

    cp_size: int
    memory: MemoryEstimate
    largest_window: int
    fits: bool
    step_seconds: float
    tokens_per_second: float
    kv_bytes: float
    exposed_seconds: float

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "memory": self.memory.to_dict()}


def cp_sizes(gpus: int, window: int) -> list[int]:
    """Returns the divisors of the number of devices that are no larger than the window, in tokens."""
    return [size for size in range(1, gpus + 1) if gpus % size == 0 and size <= window]


def usable_bytes(hardware: HardwareProfile) -> float:
    """Bytes of a device's memory that training can use."""
    if hardware.memory_bytes is None:
        raise ConfigurationError("The hardware profile has no memory_bytes: add the bytes of a device's memory to it.")
    return USABLE_MEMORY * hardware.memory_bytes


def choices(
    config: Any,
    hardware: HardwareProfile,
    setup: TrainingSetup,
    lengths: Sequence[int],
    sizes: Sequence[int] | None = None,
) -> list[Choice]:
    """A choice for each of `sizes`, by default every cp_size that divides the devices and is no larger than the
    window. `lengths` are the tokens of a row's documents, which decide what travels."""
    window, usable = sum(lengths), usable_bytes(hardware)
    if setup.gpus < 1:
        raise ConfigurationError(f"gpus must be at least 1, got {setup.gpus}.")
    if setup.gpus > MOST_GPUS:
        raise ConfigurationError(f"gpus must be at most {MOST_GPUS:,}, got {setup.gpus:,}.")
    for size in sizes or ():
        if size < 1 or setup.gpus % size:
            raise ConfigurationError(
                f"cp_size {size} does not divide the {setup.gpus} GPUs: choose one of "
                f"{', '.join(map(str, cp_sizes(setup.gpus, setup.gpus)))}."
            )
        if size > window:
            raise PlanError(
                f"A window of {window} tokens is too short for cp_size {size}: every rank needs at least one token."
            )
    shape = MemoryShape.from_config(config)
    cost_model = CostModel.from_config(config, hardware, itemsize=setup.compute_bytes)
    return [_choice(shape, cost_model, setup, lengths, size, usable) for size in sizes or cp_sizes(setup.gpus, window)]


def _choice(
    shape: MemoryShape,
    cost_model: CostModel,
    setup: TrainingSetup,
    lengths: Sequence[int],
    cp_size: int,
    usable: float,
) -> Choice:
    plan = plan_documents(lengths, cp_size, cost_model=cost_model)
    load = busiest_load(plan, cost_model)
    memory = estimate_memory(shape, setup, load)
    time = cost_model.step_time(plan)
    seconds = step_seconds(time, setup.gradient_checkpointing)
    return Choice(
        cp_size=cp_size,
        memory=memory,
        largest_window=largest_window(shape, setup, cp_size, usable, load),
        fits=memory.total <= usable,
        step_seconds=seconds,
        tokens_per_second=setup.gpus / cp_size * plan.num_tokens / seconds,
        kv_bytes=float(load.received * shape.kv_width * setup.compute_bytes * shape.layers),
        exposed_seconds=float(time.exposed.max()),
    )


def busiest_load(plan: ShardPlan, cost_model: CostModel) -> RankLoad:
    """The most that any rank of a plan holds and moves in a layer: received and sent KV as the mean over layers with
    attention, stages and calls as the largest in any of them."""
    received, sent = np.zeros((2, plan.cp_size))
    for layers in cost_model.layers:
        received_in_layer, sent_in_layer = plan.kv_moved(layers.window)
        received += layers.count * np.array(received_in_layer)
        sent += layers.count * np.array(sent_in_layer)
    count = sum(layers.count for layers in cost_model.layers)
    keys, sequences = largest_calls(plan, cost_model.layers)
    return RankLoad(
        tokens=max(rank_tokens(plan.slices)),
        received=float(received.max()) / max(count, 1),
        sent=float(sent.max()) / max(count, 1),
        stage_keys=keys,
        sequences=sequences,
        batch_tokens=plan.num_tokens,
    )


def step_seconds(time: StepTime, gradient_checkpointing: str) -> float:
    """Returns the step time of the slowest rank, with what gradient checkpointing computes and exchanges again."""
    exchanged = time.copies + time.exposed
    seconds = time.linear + time.attention + exchanged
    if gradient_checkpointing != "none":
        seconds = seconds + _RECOMPUTED_LINEAR * time.linear
    if gradient_checkpointing == "full":
        seconds = seconds + _RECOMPUTED_ATTENTION * time.attention + exchanged / 2
    return float(seconds.max())


def best(found: Sequence[Choice]) -> tuple[Choice | None, str]:
    """The smallest size that fits and is within [`AS_FAST`] of the highest throughput, if any, and why."""
    fitting = [choice for choice in found if choice.fits]
    if not fitting:
        return None, "nothing fits"
    fastest = max(choice.tokens_per_second for choice in fitting)
    chosen = next(choice for choice in fitting if choice.tokens_per_second >= AS_FAST * fastest)
    smallest = fitting[0]
    if len(found) == 1:
        return chosen, "it is the one asked for, and fits"
    if len(fitting) == 1:
        return chosen, "the only one that fits"
    if chosen is smallest:
        return (
            chosen,
            "the smallest that fits: the most data parallelism, and none is predicted to be more than 1% faster",
        )
    gain = chosen.tokens_per_second / smallest.tokens_per_second - 1
    return chosen, f"predicted to be {gain:.0%} faster than cp_size {smallest.cp_size}, the smallest that fits"
