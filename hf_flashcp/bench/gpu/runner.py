"""Runs steps in turn, each in new processes and with a time limit, so that a failure affects only its own step."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch

from ... import __version__
from ...distributed.workers import LostWorker, WorkerFailure, WorkerPool
from ...errors import ConfigurationError, FlashCPError
from .settings import Found, Settings, Step


TOTAL_SECONDS = 540
"""Time limit of a run in seconds; steps that would begin later are not run."""

PASSED, FAILED, CUT_SHORT, NOT_RUN = "passed", "failed", "cut short", "not run"
OUT_OF_MEMORY, OUT_OF_TIME, CRASHED = "out of memory", "out of time", "crashed"

Row = dict[str, Any]
"""The result of a step, as written to `steps.jsonl`. It has `_KEYS`; `machine` identifies the machine it ran on."""
_KEYS = {"step", "status", "seconds", "limit", "message", "problems", "cut", "tables", "more", "machine"}


class Results:
    """The rows of a run, kept in memory and, if there is a folder, in its file `steps.jsonl`.

    The folder is created if it does not exist. Raises a `ConfigurationError` if the file comes from another machine or
    cannot be read.
    """

    def __init__(self, folder: Path | None, machine: dict[str, str]):
        self.machine = machine
        self._file = folder / "steps.jsonl" if folder is not None else None
        self._rows: dict[str, Row] = {}
        if folder is None or self._file is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lines = self._file.read_text(encoding="utf-8").splitlines() if self._file.exists() else []
        except (OSError, UnicodeError) as error:
            raise ConfigurationError(f"--output {folder} cannot be used: {error}.") from None
        self._rows = {row["step"]: row for row in (_read(self._file, *line) for line in enumerate(lines, 1))}
        if other := next((row["machine"] for row in self._rows.values() if row["machine"] != machine), None):
            raise ConfigurationError(
                f"{self._file} has results of {_named(other)}, but this machine is {_named(machine)}. Pass another "
                "--output, or delete the file."
            )

    def has_passed(self, step: str) -> bool:
        return self._rows.get(step, {}).get("status") == PASSED

    def add(self, row: Row) -> None:
        self._rows[row["step"]] = row
        if self._file is not None:
            with self._file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(row) + "\n")

    def rows(self, names: Iterable[str]) -> list[Row]:
        return [self._rows[name] for name in names if name in self._rows]


def _read(file: Path, number: int, line: str) -> Row:
    """Parse a line of the file. A run that was killed while writing leaves an incomplete line."""
    try:
        row = json.loads(line)
        if row.keys() >= _KEYS and all(isinstance(value, str) for value in row["machine"].values()):
            return row
    except (ValueError, AttributeError):
        pass
    raise ConfigurationError(
        f"Line {number} of {file} is not the result of a step. Delete the line, and the step will run again."
    )


def _named(machine: dict[str, str]) -> str:
    return ", ".join(machine.values())


def run_steps(
    steps: Sequence[Step],
    settings: Settings,
    pools: Pools,
    results: Results,
    on_row: Callable[[Step, Row | None], None],
) -> None:
    """Run the steps that have not passed yet.

    Calls `on_row(step, None)` before each step, and `on_row(step, row)` after it.
    """
    begin = time.monotonic()
    for step in steps:
        if results.has_passed(step.name):
            continue
        on_row(step, None)
        left = begin + TOTAL_SECONDS - time.monotonic()
        if left < 1:
            row = row_of(
                step, results.machine, NOT_RUN, 0.0, message=f"the run's limit of {TOTAL_SECONDS} seconds was reached"
            )
        else:
            row = _run_step(step, settings, results.machine, pools, min(step.seconds, left))
        results.add(row)
        on_row(step, row)


def row_of(
    step: Step, machine: dict[str, str], status: str, seconds: float, found: Found | None = None, message: str = ""
) -> Row:
    found = found or Found()
    return {
        "step": step.name,
        "status": status,
        "seconds": round(seconds, 1),
        "limit": step.seconds,
        "message": message,
        "problems": found.problems,
        "cut": found.cut,
        "tables": _numbers(found.tables),
        "more": _numbers(found.more),
        "machine": machine,
    }


def _numbers(value: Any) -> Any:
    """Return the same data with `None` in place of NaN and infinity, which JSON cannot express."""
    if isinstance(value, dict):
        return {name: _numbers(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_numbers(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _run_step(step: Step, settings: Settings, machine: dict[str, str], pools: Pools, limit: float) -> Row:
    begin = time.monotonic()
    settings = settings.until(begin + limit)
    pool = pools.new()

    def run(processes: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        return pool.run(processes, function, settings, *args, timeout=max(settings.seconds_left(), 0.1))

    found, message = None, ""
    try:
        found = step.run(run, settings)
        status = status_of_found(found)
    except WorkerFailure as failure:
        error = next(error for error in failure.errors if error is not None)
        status = status_of(error, settings)
        message = f"{error}" if isinstance(error, FlashCPError) else str(failure)[-2000:]
    except Exception as error:  # a step must not end the run
        status, message = status_of(error, settings), f"{type(error).__name__}: {error}"
    finally:
        pool.close()
    return row_of(step, machine, status, time.monotonic() - begin, found, message)


def status_of_found(found: Found) -> str:
    """Return the status of a step that ran to its end. A step that left something out has not passed."""
    return FAILED if found.problems else CUT_SHORT if found.cut else PASSED


def status_of(error: BaseException, settings: Settings) -> str:
    if isinstance(error, LostWorker):
        return OUT_OF_TIME if settings.seconds_left() <= 0 else CRASHED
    if isinstance(error, torch.OutOfMemoryError):
        return OUT_OF_MEMORY
    return FAILED


class Pools:
    """Creates worker pools: a new one per step, so that no step finds memory in use by an earlier one.

    Workers are forked from a server that has imported everything but never touched the GPU. They are spawned instead
    if the GPU cannot be used in forked workers.
    """

    def __init__(self, device: str):
        self._device = device
        self._method: dict[str, str] = {}
        self.device_name = "CPU (rehearsal)"
        if device == "cuda":
            # Imports in the server check for a GPU; only the check through NVML does not initialize CUDA.
            os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
            self.device_name = self._gpu_name()

    def new(self) -> WorkerPool:
        self._start_server()
        return WorkerPool(device=self._device, **self._method)

    @staticmethod
    def _start_server() -> None:
        if sys.platform == "linux":
            forkserver.set_forkserver_preload(
                ["hf_flashcp.bench.gpu.steps", "hf_flashcp.integrations.trainers.trainer"]
            )
            forkserver.ensure_running()

    def machine(self) -> dict[str, str]:
        """Return the properties that must be equal for results to share a file."""
        return {"device": self.device_name, "torch": torch.__version__, "hf_flashcp": __version__}

    def _gpu_name(self) -> str:
        self._start_server()
        for method in ({}, {"start_method": "spawn"}):
            with WorkerPool(**method) as pool:
                ((right, name, _),) = pool.outcomes(1, _gpu_name, timeout=60)
            if right and name is not None:
                self._method = method
                return name
        raise ConfigurationError(
            "PyTorch sees no GPU here. Run this on a machine with a GPU, or try it out with --device cpu."
        )


def _gpu_name() -> str | None:
    if not torch.cuda.is_available():
        return None
    torch.zeros(1, device="cuda").item()
    return torch.cuda.get_device_name()
