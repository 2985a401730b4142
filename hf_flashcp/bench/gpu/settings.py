"""Arguments and results of the steps of `flashcp bench gpu`, and what steps need to know about the GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from ...attention.kernels import load_kernel_library


OUT_OF_MEMORY = "out of memory"
"""Replaces, in a record, a figure that could not be measured because memory ran out."""

Record = dict[str, Any]
"""A row of a table: numbers and text by column."""


@dataclass(frozen=True)
class Settings:
    """Settings of a step, which are passed to workers with every call.

    `device` is "cuda", or "cpu" for a quick trial. `kernel_library` is the file of FlashAttention-3, if given.
    `deadline` is the `time.monotonic()` at which the step ends; all processes of a machine share that clock.
    """

    device: str
    kernel_library: str | None = None
    deadline: float = float("inf")

    @property
    def rehearses(self) -> bool:
        """Whether this is a trial on a CPU, with sizes so small that its figures mean nothing."""
        return self.device == "cpu"

    def sized(self, on_gpu: Any, rehearsed: Any) -> Any:
        return rehearsed if self.rehearses else on_gpu

    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def until(self, deadline: float) -> Settings:
        return replace(self, deadline=deadline)

    def prepare(self) -> torch.device:
        """Load the kernel library, if there is one, and return the device of this process. Called in workers."""
        if self.kernel_library is not None:
            load_kernel_library(self.kernel_library)
        if self.device == "cuda":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")


Run = Callable[..., list[Any]]
"""Calls a function in several processes: `run(processes, function, *args)` returns a list of results by rank.

Each process calls `function(settings, *args)`.
"""


class Step(NamedTuple):
    """A part of the run, whose failure does not affect the others.

    `seconds` is its time limit, and `shows` describes its purpose. `run` takes a [`Run`], or the ranks if the step
    needs several GPUs, and the settings.
    """

    name: str
    group: str
    seconds: int
    shows: str
    run: Callable[[Any, Settings], Found]


def in_worker(function: Callable[[Settings], Found]) -> Callable[[Run, Settings], Found]:
    """Return a step that calls `function` once in one process."""
    return lambda run, settings: run(1, function)[0]


class Found:
    """The results of a step.

    `tables` holds records by title. A step with `problems` has failed. `cut` names what was left out for lack of time,
    and `more` is JSON that is saved but not printed.
    """

    def __init__(self) -> None:
        self.tables: dict[str, list[Record]] = {}
        self.problems: list[str] = []
        self.cut: list[str] = []
        self.more: dict[str, Any] = {}

    def add(self, title: str, *records: Record) -> None:
        self.tables.setdefault(title, []).extend(records)

    def require(self, right: bool, problem: str) -> None:
        if not right:
            self.problems.append(problem)

    def add_error(self, title: str, record: Record, what: str) -> None:
        """Add a record, and require that its `error` is within its `bound`."""
        self.add(title, record)
        problem = f"{what} is off by {record['error']:.1e}, more than {record['bound']:.1e}"
        self.require(record["error"] <= record["bound"], problem)

    def has_time(self, settings: Settings, seconds: float, name: str) -> bool:
        """Return whether so many seconds are left. If not, record that `name` was left out."""
        if settings.seconds_left() < seconds:
            self.cut.append(name)
            return False
        return True


def compile_seconds(kernel: str) -> float:
    """Return about how many seconds a kernel compiles for a new kind of call (estimated, not measured)."""
    return {"flash_attn_4": 5.0, "cudnn": 2.0}.get(kernel, 0.0)


def fits_in_memory(function: Callable[[], Any]) -> bool:
    """Call `function` and wait for the device. If memory runs out, empty PyTorch's cache and return `False`."""
    try:
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return True
    except torch.OutOfMemoryError:
        pass  # the cache is emptied below, once the error no longer keeps the tensors of its frames alive
    torch.cuda.empty_cache()
    return False
