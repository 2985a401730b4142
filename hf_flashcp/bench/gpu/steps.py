"""All steps, in the order in which they run."""

from __future__ import annotations

from collections.abc import Iterable

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
from .settings import Step, in_worker
from .streams import streams
from .training import trainer


CORRECTNESS, TIMING, CLUSTER = "correctness", "timing", "cluster"

STEPS = (
    Step("device", CORRECTNESS, 30, "versions, and the speed of copies and products", in_worker(device)),
    Step(
        "kernels",
        CORRECTNESS,
        60,
        "every kernel compared with float64: heads, windows, softcap, determinism",
        in_worker(kernels),
    ),
    Step("layer", CORRECTNESS, 45, "a layer on 2 and 4 ranks: stages, windows, nodes, debug mode", layer),
    Step("trainer", CORRECTNESS, 45, "first gradient of a training run on 2 and 4 ranks", trainer),
    Step("streams", CORRECTNESS, 20, "transfers over NCCL, check_cluster", streams),
    Step("plans", TIMING, 100, "kernels and copies of eight ranks, compared with one call", in_worker(plans)),
    Step(
        "rectangles",
        TIMING,
        40,
        "speed of each kernel; long and short rectangles in one call and in several",
        in_worker(rectangles),
    ),
    Step("host", TIMING, 30, "where the host waits, and how much it launches", in_worker(host)),
    Step("step", TIMING, 70, "a step of a 1B model, compared with single documents; memory", in_worker(model_step)),
    Step("calibrate", TIMING, 40, "a hardware profile, and the error of its predictions", calibrate),
    Step("compile", TIMING, 60, "compiled layers on two packs", in_worker(compile)),
)
"""Steps that run on one GPU. Their limits add up to less than the limit of a run."""


CLUSTER_STEPS = (
    Step("links", CLUSTER, 60, "collectives, and links within and between nodes", cluster.links),
    Step("exchange", CLUSTER, 60, "share of the exchange that the kernels hide", cluster.exchange),
    Step("groups", CLUSTER, 60, "a process group of its own for the exchange, beside DDP's", cluster.groups),
)
"""Steps that all ranks of a launch run together."""


def choose(names: Iterable[str], steps: Iterable[Step]) -> list[Step]:
    """Return the steps with these names or in these groups, in the order in which they run; all without names."""
    steps, wanted = list(steps), set(names)
    known = {step.name for step in steps} | {step.group for step in steps}
    if unknown := sorted(wanted - known):
        raise ConfigurationError(f"There is no step {', '.join(unknown)}. Choose from {', '.join(sorted(known))}.")
    return [step for step in steps if not wanted or wanted & {step.name, step.group}]
