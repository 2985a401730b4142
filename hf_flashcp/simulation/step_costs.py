"""Step times with activation checkpointing and with what saves further memory."""

from __future__ import annotations

from ..errors import ConfigurationError
from ..plan.shard_plan import ShardPlan
from ..predict.cost_model import CostModel, StepTime
from ..predict.layer_memory import LayerStack
from ..predict.loss_memory import loss_copies
from ..predict.training_setup import TrainingSetup


# Forward's share of attention's time: two of seven matrix products; the other five are in backward.
_RECOMPUTED_ATTENTION = 2 / 7
_RECOMPUTED_LINEAR = 1 / 3  # also of scans


def step_seconds(time: StepTime, setup: TrainingSetup) -> float:
    """Return the step time of the slowest rank, including what activation checkpointing computes and exchanges again.

    Of `every_n_layers` layers, one is computed again.
    """
    exchanged = time.copies + time.exposed
    seconds = time.of_ranks
    if setup.gradient_checkpointing != "none":
        seconds = seconds + _RECOMPUTED_LINEAR / setup.every_n_layers * (time.linear + time.scan)
    if setup.gradient_checkpointing == "full":
        again = _RECOMPUTED_ATTENTION * time.attention + exchanged / 2
        seconds = seconds + again / setup.every_n_layers
    return float(seconds.max())


def remedy_seconds(plan: ShardPlan, time: StepTime, stack: LayerStack, model: CostModel) -> float:
    """Return the seconds that saving memory adds to a step beside what activation checkpointing repeats.

    - Offloaded activations are copied to the host and back on the stream that computes.
    - Received KV that was not kept is exchanged once more.
    - Every further group of KV heads starts kernels and transfers of its own.
    - A feed-forward block in tiles computes its forward once more, and reads and writes the fp32 sums of its weights'
      gradients for every tile. A checkpointed layer that ends with the block does not run it again by itself.
    - Skipping logits reads and writes the fp32 gradient of the head for every chunk of tokens.
    """
    setup, load, hardware = stack.setup, stack.load, model.hardware
    checkpointed = 1 / setup.every_n_layers if setup.gradient_checkpointing != "none" else 0.0
    seconds = 0.0
    if stack.offloaded:
        if hardware.host_bandwidth is None:
            raise ConfigurationError(
                "The hardware profile has no host_bandwidth, which offloading needs: add the bytes per second between "
                "a device and its host."
            )
        seconds += 2 * stack.offloaded / hardware.host_bandwidth
    if setup.skip_logits:
        seconds += loss_copies(stack.shape, round(load.tokens)) / hardware.memory_bytes_per_second
    if setup.mlp_tiles > 1:
        weights = stack.shape.layers * stack.shape.dense_share * stack.shape.dense_parameters
        repeated = 1 - checkpointed * stack.shape.ends_with_block
        seconds += 2 * load.tokens * weights * repeated / hardware.linear_flops_per_second
        seconds += 2 * 4 * weights * setup.mlp_tiles / hardware.memory_bytes_per_second
    if plan.cp_size == 1:
        return seconds
    fetched = checkpointed * (not stack.keeps_kv_again) + (1 - checkpointed) * (not stack.keeps_kv)
    seconds += fetched * float((time.copies + time.exposed).max()) / 2
    again = checkpointed * (setup.gradient_checkpointing == "full")
    stages = len(plan.stage_offsets) if load.received else 0
    link = hardware.intra_node if plan.cp_size <= hardware.ranks_per_node else hardware.inter_node
    calls, transfers = (1 + stages) * (2 + again), stages * (2 + again + fetched)
    for layers in model.layers:
        more = min(setup.head_groups, layers.kv_heads) - 1
        seconds += layers.count * more * (calls * hardware.kernel.call_seconds + transfers * link.latency_seconds)
    return seconds
