"""Finds the cp_size that a window needs, from the memory, step time and traffic of all sizes that divide the GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..errors import ConfigurationError, PlanError
from ..plan.moved import states_moved
from ..plan.shard_plan import ShardPlan
from ..planning.strategies import plan_documents
from ..predict.cost_model import CostModel
from ..predict.hardware_profile import HardwareProfile
from ..predict.layer_memory import LayerStack
from ..predict.layer_work import largest_calls
from ..predict.memory import MemoryEstimate, estimate_memory, largest_window
from ..predict.memory_shape import MemoryShape
from ..predict.training_setup import RankLoad, TrainingSetup
from .step_costs import remedy_seconds, step_seconds


USABLE_MEMORY = 0.9
"""The fraction of a device's memory that training can use. The rest is for the CUDA context, the buffers of NCCL and
cuBLAS, and fragmentation."""

MOST_GPUS = 2**20
"""The most GPUs, because the divisors of their number are found by trying every smaller number."""

AS_FAST = 0.99
"""Sizes whose predicted throughput is at least this fraction of the highest count as equally fast, and the smallest of
them is chosen."""


@dataclass(frozen=True)
class Choice:
    """The predicted costs of one cp_size, for the forward and backward of one packed row.

    Args:
        cp_size (`int`): number of context-parallel ranks.
        memory (`MemoryEstimate`): memory of the busiest rank.
        largest_window (`int`): the most tokens of a row that fit in memory; 0 if no row fits.
        fits (`bool`): whether the row fits in memory.
        step_seconds (`float`): step time of the slowest rank.
        tokens_per_second (`float`): throughput of all devices together.
        kv_bytes (`float`): bytes of KV that the busiest rank receives in the forward of all layers.
        state_bytes (`float`): bytes of recurrent layers' states that the busiest rank receives in the forward of all
            layers.
        exposed_seconds (`float`): time for which ranks wait for transfers, on the rank that waits longest.
        setup (`TrainingSetup`): how the model is trained.
    """

    cp_size: int
    memory: MemoryEstimate
    largest_window: int
    fits: bool
    step_seconds: float
    tokens_per_second: float
    kv_bytes: float
    state_bytes: float
    exposed_seconds: float
    setup: TrainingSetup

    def to_dict(self) -> dict[str, Any]:
        """Return the costs in a JSON-serializable form."""
        return {**vars(self), "memory": self.memory.to_dict(), "setup": asdict(self.setup)}


def cp_sizes(gpus: int, window: int) -> list[int]:
    """Return the divisors of the number of GPUs that are at most the window's number of tokens."""
    return [size for size in range(1, gpus + 1) if gpus % size == 0 and size <= window]


def usable_bytes(hardware: HardwareProfile) -> float:
    """Return the bytes of a device's memory that training can use."""
    if hardware.memory_bytes is None:
        raise ConfigurationError("The hardware profile has no memory_bytes: add the memory of a device, in bytes.")
    return USABLE_MEMORY * hardware.memory_bytes


def choices(
    config: Any,
    hardware: HardwareProfile,
    setup: TrainingSetup,
    lengths: Sequence[int],
    sizes: Sequence[int] | None = None,
) -> list[Choice]:
    """Return the predicted costs of each cp_size under one setup. [`sizings`] describes arguments and errors."""
    return [sizing.choice(setup) for sizing in sizings(config, hardware, setup, lengths, sizes)]


def sizings(
    config: Any,
    hardware: HardwareProfile,
    setup: TrainingSetup,
    lengths: Sequence[int],
    sizes: Sequence[int] | None = None,
) -> list[Sizing]:
    """Return a plan of the documents for each cp_size, with what predictions need.

    Args:
        config (`PreTrainedConfig` or `Mapping`): the model's config.
        hardware (`HardwareProfile`): profile of the devices.
        setup (`TrainingSetup`): how the model is trained.
        lengths (`Sequence[int]`): tokens of each document in a packed row. They determine how much KV travels.
        sizes (`Sequence[int]`, *optional*): the cp_sizes. By default these are all divisors of the number of GPUs that
            are at most the window's number of tokens.

    Raises:
        ConfigurationError: a number of GPUs out of range, a size that does not divide it, a profile without memory, or
            a config that lacks sizes.
        PlanError: a window with fewer tokens than ranks.
    """
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
                f"A window of {window} tokens is too short for cp_size {size}: every rank needs at least one token. "
                "Choose a longer window or a smaller cp_size."
            )
    shape = MemoryShape.from_config(config)
    cost_model = CostModel.from_config(config, hardware, itemsize=setup.compute_bytes)
    return [Sizing(shape, cost_model, lengths, size, usable) for size in sizes or cp_sizes(setup.gpus, window)]


class Sizing:
    """The plan of one packed row for one cp_size, from which the costs under any setup are predicted.

    Args:
        shape (`MemoryShape`): sizes of the model.
        cost_model (`CostModel`): the model's cost model.
        lengths (`Sequence[int]`): tokens of each document.
        cp_size (`int`): number of context-parallel ranks.
        usable (`float`): bytes of a device's memory that training can use.
    """

    def __init__(self, shape: MemoryShape, cost_model: CostModel, lengths: Sequence[int], cp_size: int, usable: float):
        self.shape, self.cost_model, self.usable = shape, cost_model, usable
        self.plan = plan_documents(lengths, cp_size, cost_model=cost_model)
        self.load = busiest_load(self.plan, cost_model)
        self.time = cost_model.step_time(self.plan)

    def memory(self, setup: TrainingSetup) -> MemoryEstimate:
        """Return the memory of the busiest rank."""
        return estimate_memory(self.shape, setup, self.load)

    def seconds(self, setup: TrainingSetup) -> float:
        """Return the step time of the slowest rank."""
        stack = LayerStack(self.shape, setup, self.load)
        return step_seconds(self.time, setup) + remedy_seconds(self.plan, self.time, stack, self.cost_model)

    def choice(self, setup: TrainingSetup) -> Choice:
        """Return all costs under a setup."""
        shape, plan, load, memory, seconds = self.shape, self.plan, self.load, self.memory(setup), self.seconds(setup)
        states, recurrent = max(states_moved(plan)[0]), shape.recurrent
        return Choice(
            cp_size=plan.cp_size,
            memory=memory,
            largest_window=largest_window(shape, setup, plan.cp_size, self.usable, load),
            fits=memory.total <= self.usable,
            step_seconds=seconds,
            tokens_per_second=setup.gpus / plan.cp_size * plan.num_tokens / seconds,
            kv_bytes=float(load.received * shape.kv_width * setup.compute_bytes * shape.attention_layers),
            state_bytes=float(states * recurrent.count * recurrent.summary_bytes) if recurrent else 0.0,
            exposed_seconds=float(self.time.exposed.max()),
            setup=setup,
        )


def busiest_load(plan: ShardPlan, cost_model: CostModel) -> RankLoad:
    """Return the most that any rank of a plan holds and moves in a layer.

    Received and sent KV are means over attention layers. The stage and the kernel call are the largest in any layer.
    States are the most that any rank receives in forward or backward.
    """
    received, sent = np.zeros((2, plan.cp_size))
    for layers in cost_model.layers:
        received_in_layer, sent_in_layer = plan.kv_moved(layers.window)
        received += layers.count * np.array(received_in_layer)
        sent += layers.count * np.array(sent_in_layer)
    count = sum(layers.count for layers in cost_model.layers)
    largest = largest_calls(plan, cost_model.layers)
    columns, tokens = plan.columns, plan.columns.tokens
    cut = tokens < np.array(plan.lengths)[columns.documents]
    states = [max(states_moved(plan, backwards=backwards)[0]) for backwards in (False, True)]
    return RankLoad(
        tokens=int(columns.sums(tokens).max()),
        received=float(received.max()) / max(count, 1),
        sent=float(sent.max()) / max(count, 1),
        stage_keys=largest.keys,
        sequences=largest.sequences,
        batch_tokens=plan.num_tokens,
        stage_masked=largest.masked,
        states_received=max(states),
        states_held=int(columns.sums(cut).max()),
        continued_tokens=int(columns.sums(tokens * (columns.starts > 0)).max()),
    )


def best(found: Sequence[Choice]) -> tuple[Choice | None, str]:
    """Return the smallest size that fits and is as fast as any ([`AS_FAST`]), or `None`, and the reason in words."""
    fitting = [choice for choice in found if choice.fits]
    if not fitting:
        return None, "nothing fits"
    fastest = max(choice.tokens_per_second for choice in fitting)
    chosen = next(choice for choice in fitting if choice.tokens_per_second >= AS_FAST * fastest)
    smallest = fitting[0]
    if len(found) == 1:
        return chosen, "the size that was asked for, and it fits"
    if len(fitting) == 1:
        return chosen, "the only one that fits"
    if chosen is smallest:
        return (
            chosen,
            "the smallest that fits; it leaves the most data parallelism, and no other size is predicted to be more "
            "than 1% faster",
        )
    gain = chosen.tokens_per_second / smallest.tokens_per_second - 1
    return chosen, f"predicted to be {gain:.0%} faster than cp_size {smallest.cp_size}, the smallest that fits"
