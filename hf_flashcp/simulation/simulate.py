"""Predicts a training step on one packed batch: every strategy with this library's exchange, and every baseline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from ..errors import ConfigurationError, PlanError
from ..plan.hierarchical_traffic import traffic_by_link
from ..plan.shard_plan import ShardPlan
from ..plan.slices import attention_pairs
from ..plan.topology import Topology
from ..planning.settings import STRATEGIES
from ..planning.strategies import plan_documents
from ..predict.cost_model import BACKWARD_OF_LINEAR, CostModel, StepTime
from ..predict.joined_plans import JoinedPlans
from ..predict.memory import estimate_memory
from ..predict.memory_shape import MemoryShape
from ..predict.recurrent_costs import RecurrentCosts
from ..predict.training_setup import RankLoad, TrainingSetup
from .baselines import BASELINES, Layer, passes, why_not
from .sizing import busiest_load
from .step_costs import step_seconds


TIMED = "search_timed"
"""Name of the plan that "search" makes with a cost model."""

EXACT = (*STRATEGIES, TIMED)
"""Names of the plans that are run with this library's exchange."""

NAMES = (*EXACT, *BASELINES)

MAX_CP_SIZE = 256


def title_of(name: str) -> str:
    """Return the name of a strategy or baseline in tables and plots."""
    return BASELINES[name].title if name in BASELINES else f"ours, {name}"


@dataclass(frozen=True)
class Outcome:
    """The predicted training step on one packed batch.

    Args:
        time (`StepTime`): times of each rank, without gradient checkpointing.
        step_seconds (`float`): step time of the slowest rank, including what gradient checkpointing repeats.
        received (`np.ndarray`): bytes received in the forward of all layers, (2, cp_size): inside nodes and between
            nodes.
        memory_bytes (`float`): memory of the rank that needs the most.
        mfu (`float`): model FLOPs utilization: the model's FLOPs divided by the peak FLOPs of all devices in the same
            time. Attention's backward counts as twice its forward, and repeated work is not counted (PaLM, arXiv
            2204.02311).
    """

    time: StepTime
    step_seconds: float
    received: np.ndarray
    memory_bytes: float
    mfu: float

    def to_dict(self) -> dict[str, Any]:
        """Return the step in a JSON-serializable form.

        It has the times of the slowest rank (of several, the one with the most attention), the time that gradient
        checkpointing adds, and the most bytes that any rank receives.
        """
        parts = vars(self.time)
        # Ranks that wait for each other end at the same time, up to rounding.
        totals = self.time.of_ranks
        slowest = max(
            range(len(totals)), key=lambda rank: (totals[rank] >= totals.max() * 0.999999, parts["attention"][rank])
        )
        inside, between = self.received.max(1)
        return {
            "step_seconds": self.step_seconds,
            "attention_module_seconds": self.time.attention_seconds,
            "repeated_seconds": max(self.step_seconds - float(totals.max()), 0.0),
            **{f"{name}_seconds": max(float(values[slowest]), 0.0) for name, values in parts.items()},
            "busiest_attention_seconds": float(parts["attention"].max()),
            "mfu": None if math.isnan(self.mfu) else self.mfu,
            "intra_node_bytes": float(inside),
            "inter_node_bytes": float(between),
            "memory_bytes": self.memory_bytes,
        }


def check_ranks(cp_size: int, ranks_per_node: int) -> None:
    """Raise a `PlanError` or `ConfigurationError` unless `cp_size` ranks can be simulated and fill their nodes."""
    if not 2 <= cp_size <= MAX_CP_SIZE:
        raise PlanError(f"cp_size {cp_size} cannot be simulated: give 2 to {MAX_CP_SIZE} ranks.")
    if cp_size > ranks_per_node and cp_size % ranks_per_node:
        raise ConfigurationError(
            f"cp_size {cp_size} does not fill nodes of {ranks_per_node} ranks, and collectives are only simulated for "
            f"equal nodes. Give at most {ranks_per_node} ranks or a multiple of that, or change --ranks-per-node."
        )


def simulate(
    lengths: Sequence[int],
    cp_size: int,
    config: Any,
    model: CostModel,
    *,
    names: Sequence[str] = NAMES,
    gradient_checkpointing: str = "none",
) -> dict[str, Outcome]:
    """Predict a training step on one batch under each strategy and baseline, with FSDP2 over the ranks in bf16.

    Args:
        lengths (`Sequence[int]`): tokens of each document.
        cp_size (`int`): number of ranks, from 2 to 256. They lie within one node or fill several.
        config (`PreTrainedConfig` or `Mapping`): the model's config.
        model (`CostModel`): the model's cost model.
        names (`Sequence[str]`, *optional*): names from [`EXACT`] and [`BASELINES`]. Baselines that cannot run the
            model ([`why_not`]) are left out.
        gradient_checkpointing (`str`, *optional*, defaults to `"none"`): see [`TrainingSetup`].

    Raises:
        PlanError: a `cp_size` that cannot be simulated.
        ConfigurationError: ranks that do not fill their nodes, or a model without attention layers.
    """
    check_ranks(cp_size, model.hardware.ranks_per_node)
    if not model.layers:
        raise ConfigurationError(
            "The model's config has no layers with attention, so there is nothing to simulate. Pass the config of a "
            "model with attention layers."
        )
    setup = TrainingSetup(gpus=cp_size, gradient_checkpointing=gradient_checkpointing)
    shape = MemoryShape.from_config(config)
    flops = model_flops(lengths, model)
    found = {}
    for name in names:
        if name in BASELINES:
            if why_not(name, model, cp_size):
                continue
            step = _baseline_step(name, lengths, cp_size, model)
        else:
            step = _exact_step(name, lengths, cp_size, model)
        memory = estimate_memory(shape, replace(setup, keep_received_kv=step.kept), step.load)
        seconds = step_seconds(step.time, setup)
        peak = model.hardware.peak_flops_per_second or float("nan")
        found[name] = Outcome(step.time, seconds, step.received, memory.total, flops / (seconds * cp_size * peak))
    return found


def model_flops(lengths: Sequence[int], model: CostModel) -> float:
    """Return the floating-point operations of one training step, as they are counted for the MFU of [`Outcome`]."""
    forward = sum(lengths) * model.linear_flops_per_token
    for layers in model.layers:
        pairs = sum(attention_pairs(0, length, layers.window) for length in lengths)
        forward += layers.count * layers.query_heads * pairs * layers.forward_flops_per_pair
    if model.recurrent is not None:
        forward += sum(lengths) * model.recurrent.count * model.recurrent.flops_per_token
    return forward * (1 + BACKWARD_OF_LINEAR)


class _Step(NamedTuple):
    """A predicted step whose memory has not been estimated yet."""

    time: StepTime
    received: np.ndarray  # as in `Outcome`
    load: RankLoad  # load of the busiest rank
    kept: bool | None = None  # whether received KV is kept until backward, see [`TrainingSetup`]


def _exact_step(name: str, lengths: Sequence[int], cp_size: int, model: CostModel) -> _Step:
    if name == TIMED:
        plan = plan_documents(lengths, cp_size, cost_model=model)
    else:
        topology = Topology(model.hardware.ranks_per_node)
        price = model.state_tokens if name == "search" else 0.0
        plan = plan_documents(lengths, cp_size, strategy=name, topology=topology, state_tokens=price)
    received = np.zeros((2, cp_size))
    for layers in model.layers:
        width = layers.count * layers.kv_elements_per_token * model.itemsize
        window = plan.hiding_window(layers.window)
        received += width * traffic_by_link(plan, model.hardware.ranks_per_node, window)[0]
    if model.recurrent is not None:
        hierarchical = plan.ranks_per_node is not None
        costs = RecurrentCosts(model.hardware, model.recurrent, JoinedPlans([plan]), model.itemsize, hierarchical)
        received += model.recurrent.count * costs.received()
    return _Step(model.step_time(plan), received, busiest_load(plan, model))


def _baseline_step(name: str, lengths: Sequence[int], cp_size: int, model: CostModel) -> _Step:
    baseline = BASELINES[name]
    plan = ShardPlan(lengths, cp_size, baseline.slices(tuple(lengths), cp_size))
    time = model.sum_up(JoinedPlans([plan]), [passes(name, model, plan, layers) for layers in model.layers])
    every = [Layer(model, layers, plan) for layers in model.layers]
    received = sum(layer.layers.count * baseline.exchange.received(layer) for layer in every)
    held = baseline.exchange.held(every[0])
    # Published implementations do not fold query heads, see `attention_memory`.
    load = RankLoad(
        int(plan.columns.sums(plan.columns.tokens).max()), held, batch_tokens=plan.num_tokens, stage_masked=True
    )
    return _Step(time, received, load, baseline.kept)
