"""Arguments and results of every step of `flashcp bench gpu`, and what steps ask about the GPU."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from ...attention.kernels import explain_kernels, load_kernel_library
from ...predict import HARDWARE


OUT_OF_MEMORY = "out of memory"
"""Stands in a record in place of the figure that could not be measured."""

Record = dict[str, Any]
"""A row of a table: by column, numbers and texts."""


@dataclass(frozen=True)
class Settings:
    """Settings of a step, which workers get with every call: "cuda", or "cpu" to rehearse; FlashAttention-3's library;
    the `time.monotonic()`, equal in all processes of a machine, at which the step is ended."""

    device: str
    kernel_library: str | None = None
    deadline: float = float("inf")

    @property
    def rehearses(self) -> bool:
        """Whether sizes are so small that a CPU finishes in seconds, so that figures mean nothing."""
        return self.device == "cpu"

    def sized(self, on_gpu: Any, rehearsed: Any) -> Any:
        return rehearsed if self.rehearses else on_gpu

    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def until(self, deadline: float) -> Settings:
        return replace(self, deadline=deadline)

    def prepare(self) -> torch.device:
        """In a worker: loads what was brought along and names the device of this process."""
        if self.kernel_library is not None:
            load_kernel_library(self.kernel_library)
        if self.device == "cuda":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")


Run = Callable[..., list[Any]]
"""`run(processes, function, *args)` calls `function(settings, *args)` in that many processes; results by rank."""


class Step(NamedTuple):
    """A part of the run that fails alone: `seconds` is its time limit, `shows` what it establishes, and `run` takes a
    [`Run`], or for several GPUs the ranks, and the settings."""

    name: str
    group: str
    seconds: int
    shows: str
    run: Callable[[Any, Settings], Found]


def in_worker(function: Callable[[Settings], Found]) -> Callable[[Run, Settings], Found]:
    """A step that is one call in one process."""
    return lambda run, settings: run(1, function)[0]


class Found:
    """A step's results: tables by title, problems (with any the step has failed), what was left out because the time
    was over, and JSON that is saved and not shown."""

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
        """Adds a record and requires that its `error` is within its `bound`."""
        self.add(title, record)
        problem = f"{what} is off by {record['error']:.1e}, more than {record['bound']:.1e}"
        self.require(record["error"] <= record["bound"], problem)

    def has_time(self, settings: Settings, seconds: float, name: str) -> bool:
        """Whether so many seconds are left for `name`, which is noted as cut if not."""
        if settings.seconds_left() < seconds:
            self.cut.append(name)
            return False
        return True


def fused_kernels(device: torch.device, dtype: torch.dtype, key_dim: int, value_dim: int) -> list[str]:
    """Kernels other than the formulas that can run such a layer here, best first."""
    explained = explain_kernels(device.type, dtype=dtype, key_dim=key_dim, value_dim=value_dim)
    return [name for name, reason in explained if reason is None and name != "eager"]


def packaged_hardware(name: str) -> str | None:
    """Name of the packaged profile for a GPU that PyTorch calls `name`, if there is one."""
    words = re.findall("[a-z0-9]+", name.lower())  # so that a GH200 is not taken for an H200
    return next((hardware for hardware in HARDWARE if hardware in words), None)


def fits_in_memory(function: Callable[[], Any]) -> bool:
    """Calls `function` and waits for the device. `False`, with PyTorch's cache emptied, if memory ran out."""
    try:
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return True
    except torch.OutOfMemoryError:
        pass  # the cache is emptied below, when the error no longer holds the tensors of its frames
    torch.cuda.empty_cache()
    return False
