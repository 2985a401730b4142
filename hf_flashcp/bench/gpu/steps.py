"""All steps, in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from ...errors import ConfigurationError
from . import cluster
from .calibration import calibrate
from .compiled import compile
from .environment import device
from .host import host
from .kernels import kernels
from .layers import layer
from .model_step import model_step
from .rectangles import plans, rectangles
from .settings import Found, Settings, Step
from .streams import streams
from .training import trainer


CORRECTNESS, TIMING, CLUSTER = "correctness", "timing", "cluster"

STEPS = (
    Step("device", CORRECTNESS, 30, "versions, and what copies and products reach", device),
    Step("kernels", CORRECTNESS, 40, "every kernel against float64: heads, windows, determinism", kernels),
    Step("layer", CORRECTNESS, 45, "a layer on 2 and 4 ranks: stages, windows, nodes, debug mode", layer),
    Step("trainer", CORRECTNESS, 45, "first gradient of a training run on 2 and 4 ranks", trainer),
    Step("streams", CORRECTNESS, 20, "transfers over NCCL, check_cluster", streams),
    Step("plans", TIMING, 100, "kernels and copies of eight ranks against one call on their work", plans),
    Step("rectangles", TIMING, 30, "speed of each kernel; long and short rectangles in one call", rectangles),
    Step("host", TIMING, 30, "where the host waits, and what it launches", host),
    Step("step", TIMING, 70, "a step of 1B parameters beside its documents alone; memory", model_step),
    Step("calibrate", TIMING, 40, "a hardware profile, and how it predicts layers", calibrate),
    Step("compile", TIMING, 60, "compiled layers on two packs", compile),
)
"""Their limits add up to less than a run may take."""


class ClusterStep(NamedTuple):
    """A [`Step`] that every rank of a launch calls."""

    name: str
    group: str
    seconds: int
    shows: str
    run: Callable[[cluster.Ranks, Settings], Found]


CLUSTER_STEPS = (
    ClusterStep("links", CLUSTER, 60, "collectives, and links inside and between nodes", cluster.links),
    ClusterStep("exchange", CLUSTER, 60, "how much of the exchange the kernels hide", cluster.exchange),
    ClusterStep("groups", CLUSTER, 60, "a process group of its own for the exchange, beside DDP's", cluster.groups),
)


def choose(names: Iterable[str], steps: Iterable[Step | ClusterStep]) -> list[Step | ClusterStep]:
    """Picks the steps with these names or of these groups, in their own order; all if there are no names.

    Raises:
        ConfigurationError: a name is neither.
    """
    steps, wanted = list(steps), set(names)
    known = {step.name for step in steps} | {step.group for step in steps}
    if unknown := sorted(wanted - known):
        raise ConfigurationError(f"There is no step {', '.join(unknown)}: choose from {', '.join(sorted(known))}.")
    return [step for step in steps if not wanted or wanted & {step.name, step.group}]
