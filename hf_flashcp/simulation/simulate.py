"""One packed batch under every strategy with this library's exchange, and under every rival scheme, side by side."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ConfigurationError, PlanError
from ..plan.hierarchical_traffic import traffic_by_link
from ..plan.shard_plan import ShardPlan
from ..plan.slices import attention_pairs, rank_tokens
from ..plan.topology import Topology
from ..planning.strategies import STRATEGIES, plan_documents
from ..predict.cost_model import BACKWARD_OF_LINEAR, CostModel, StepTime
from ..predict.layer_work import largest_calls
from ..predict.memory import TrainingSetup, estimate_memory
from ..predict.memory_shape import MemoryShape
from . import baselines as schemes
from .sizing import step_seconds


TIMED = "search_timed"
"""The plan that the cost model chose."""

EXACT = (*STRATEGIES, TIMED)
RIVALS = tuple(schemes.SCHEMES)

MAX_CP_SIZE = 256


def scheme_title(scheme: str) -> str:
    """Returns the name of a scheme in tables and plots."""
    return schemes.SCHEMES[scheme].title if scheme in schemes.SCHEMES else f"ours, {scheme}"


@dataclass(frozen=True)
class Outcome:
    """A training step of one packed batch.

    Args:
        time (`StepTime`): by rank.
        step_seconds (`float`): of the slowest rank, with what gradient checkpointing repeats.
        received (`np.ndarray`): (2, cp_size) bytes that ranks receive in the forward of all attention layers, inside
            nodes and between them.
        memory_bytes (`float`): of the rank that needs most.
        mfu (`float`): model FLOPs over what all devices could do meanwhile; attention's backward counts twice its
            forward and nothing is counted that is computed again (PaLM, arXiv 2204.02311). NaN without a peak.
    """

    time: StepTime
    step_seconds: float
    received: np.ndarray
    memory_bytes: float
    mfu: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-serializable: the parts of the step of the rank that sets its pace (of several, the one with the most
        attention), what gradient checkpointing repeats, and the most bytes that any rank receives."""
        parts = vars(self.time)
        # Ranks that wait for each other end together, up to rounding.
        totals = sum(parts[name] for name in ("linear", "attention", "copies", "exposed"))
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
    """Raises unless so many ranks fill their nodes."""
    if not 2 <= cp_size <= MAX_CP_SIZE:
        raise PlanError(f"cp_size {cp_size} cannot be simulated: give 2 to {MAX_CP_SIZE} ranks.")
    if cp_size > ranks_per_node and cp_size % ranks_per_node:
        raise ConfigurationError(
            f"cp_size {cp_size} does not fill nodes of {ranks_per_node} ranks: collectives are simulated for equal "
            f"nodes. Give at most {ranks_per_node} ranks, a multiple of that, or other nodes with --ranks-per-node."
        )


def simulate(
    lengths: Sequence[int],
    cp_size: int,
    config: Any,
    model: CostModel,
    *,
    names: Sequence[str] = EXACT + RIVALS,
    gradient_checkpointing: str = "none",
) -> dict[str, Outcome]:
    """Every scheme on one batch.

    Args:
        lengths (`Sequence[int]`): tokens of its documents.
        cp_size (`int`): ranks, 2 to 256, which fill their nodes.
        config: of the model, see [`CostModel.from_config`].
        model (`CostModel`): of that config.
        names (`Sequence[str]`): of `EXACT` (strategies with this library's exchange) and `RIVALS`; those that
            cannot run the model ([`schemes.why_not`]) are left out.
        gradient_checkpointing (`str`): see [`TrainingSetup`]; the rest of the setup is FSDP2 over the ranks in bf16.

    Raises:
        PlanError, ConfigurationError: a cp_size that cannot be simulated, fewer tokens than ranks, a bad config.
    """
    check_ranks(cp_size, model.hardware.ranks_per_node)
    if not model.layers:
        raise ConfigurationError("The model's config has no layers with attention, so there is nothing to simulate.")
    setup = TrainingSetup(gpus=cp_size, gradient_checkpointing=gradient_checkpointing)
    shape = MemoryShape.from_config(config)
    flops = model_flops(lengths, model)
    found = {}
    for name in names:
        if name in RIVALS:
            if schemes.why_not(name, model, cp_size):
                continue
            time, received, memory = _rival(name, lengths, cp_size, model, shape, setup)
        else:
            time, received, memory = _exact(name, lengths, cp_size, model, shape, setup)
        seconds = step_seconds(time, gradient_checkpointing)
        peak = model.hardware.peak_flops_per_second or float("nan")
        found[name] = Outcome(time, seconds, received, memory, flops / (seconds * cp_size * peak))
    return found


def model_flops(lengths: Sequence[int], model: CostModel) -> float:
    """Returns the floating-point operations of one training step, as [`Outcome`] counts them for its MFU."""
    forward = sum(lengths) * model.linear_flops_per_token
    for layers in model.layers:
        pairs = sum(attention_pairs(0, length, layers.window) for length in lengths)
        forward += layers.count * layers.query_heads * pairs * layers.forward_flops_per_pair
    return forward * (1 + BACKWARD_OF_LINEAR)


def _exact(name, lengths, cp_size, model, shape, setup) -> tuple[StepTime, np.ndarray, float]:
    if name == TIMED:
        plan = plan_documents(lengths, cp_size, cost_model=model)
    else:
        topology = Topology(model.hardware.ranks_per_node)
        plan = plan_documents(lengths, cp_size, strategy=name, topology=topology)
    received, needed, sent = np.zeros((2, cp_size)), np.zeros(cp_size), np.zeros(cp_size)
    for layers in model.layers:
        width = layers.count * layers.kv_elements_per_token * model.itemsize
        window = plan.hiding_window(layers.window)
        received += width * traffic_by_link(plan, model.hardware.ranks_per_node, window)[0]
        report = plan.report(window)
        needed += width * np.array(report["kv_received"])
        sent += width * np.array(report["kv_sent"])
    every_layer = model.itemsize * sum(layers.count * layers.kv_elements_per_token for layers in model.layers)
    most_received, most_sent = (moved.max() / every_layer for moved in (needed, sent))
    keys, sequences = largest_calls(plan, model.layers)
    memory = estimate_memory(
        shape,
        setup,
        max(rank_tokens(plan.slices)),
        most_received,
        most_sent,
        sum(lengths),
        stage_keys=keys,
        sequences=sequences,
    )
    return model.step_time(plan), received, memory.total


def _rival(name, lengths, cp_size, model, shape, setup) -> tuple[StepTime, np.ndarray, float]:
    scheme = schemes.SCHEMES[name]
    plan = ShardPlan(lengths, cp_size, scheme.slices(tuple(lengths), cp_size))
    nothing = np.zeros(cp_size)
    # Linear layers as everyone's, attention as the scheme has it.
    linear = dataclasses.replace(model, layers=()).step_time(plan).linear
    sums, received = [nothing] * 4, np.zeros((2, cp_size))
    for layers in model.layers:
        forward, backward = schemes.passes(name, model, plan, layers)
        sums = [total + layers.count * (one + other) for total, one, other in zip(sums, forward, backward)]
        received = received + layers.count * scheme.received(schemes.Layer(model, layers, plan))
    held = scheme.held(schemes.Layer(model, model.layers[0], plan))
    tokens = max(rank_tokens(plan.slices))
    memory = estimate_memory(shape, setup, tokens, held, 0, sum(lengths), kept=scheme.kept)
    return StepTime(linear, *sums), received, memory.total
