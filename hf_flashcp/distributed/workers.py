"""A persistent pool of gloo worker processes, so that hundreds of multi-process cases share one start-up.

`pool.run(world_size, function, *args)` calls `function(*args)` in `world_size` processes in which torch.distributed is
initialized. The function must be importable (defined at module level). If a worker dies or hangs, the call fails with
the end of the worker's output.
"""

from __future__ import annotations

import datetime
import faulthandler
import gc
import itertools
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import cached_property
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

from .parent_process import end_with_parent


TIMEOUT = 120


class WorkerFailure(AssertionError):
    """Raised if a worker raised an exception, died or did not answer.

    `errors` has the exception of each rank, `None` for ranks that did not fail.
    """

    def __init__(self, message, errors):
        super().__init__(message)
        self.errors = errors


class LostWorker(RuntimeError):
    """The error of a worker that died or did not answer in time."""


class WorkerPool:
    """A pool of processes on this machine, each started when it is first needed.

    `close` ends the processes, and so does the end of the process that made the pool.

    Args:
        start_method (`str`, *optional*): start method of `multiprocessing`. The default is "forkserver" if the
            platform and the device allow it, else "spawn".
        device (`str`, *optional*, defaults to `"cpu"`): "cpu" or "cuda". With "cuda", workers share GPUs if there are
            fewer GPUs than workers.
    """

    def __init__(self, start_method: str | None = None, device: str = "cpu"):
        self._start_method, self._device = start_method or _default_start_method(device), device
        self._directory = tempfile.TemporaryDirectory(prefix="flashcp-pool-")
        self._worlds = itertools.count()
        self._world = None
        self._workers = []
        # This also runs at exit, before multiprocessing would wait for workers that wait for their next function.
        Finalize(self, _end_workers, args=(self._workers,), exitpriority=0)

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def run(self, world_size: int, function: Callable, *args: Any, timeout: float = TIMEOUT) -> list[Any]:
        """Return the function's result on each rank; raise a `WorkerFailure` if any rank fails."""
        outcomes = self.outcomes(world_size, function, *args, timeout=timeout)
        failed = [rank for rank, (ok, *_) in enumerate(outcomes) if not ok]
        if failed:
            text = "\n".join(f"--- rank {rank} of {world_size}\n{outcomes[rank][2]}" for rank in failed)
            raise WorkerFailure(text, [None if ok else value for ok, value, *_ in outcomes])
        return [value for _, value, *_ in outcomes]

    def errors(
        self, world_size: int, function: Callable, *args: Any, timeout: float = 30
    ) -> list[BaseException | None]:
        """Return the exception that each rank raised within `timeout` seconds, `None` for ranks that returned."""
        return [None if ok else value for ok, value, *_ in self.outcomes(world_size, function, *args, timeout=timeout)]

    def outcomes(self, world_size: int, function: Callable, *args: Any, timeout: float = TIMEOUT) -> list[tuple]:
        """Return `(True, result, None)` or `(False, exception, traceback)` for each rank."""
        while len(self._workers) < world_size:
            self._start_worker(len(self._workers), function.__module__)
        if self._world is None or self._world[0] != world_size:
            self._world = (world_size, self._store.port, f"world-{next(self._worlds)}")
        message = pickle.dumps((self._world, function, args))
        for _, connection, _ in self._workers[:world_size]:
            connection.send_bytes(message)
        for seconds in (TIMEOUT, timeout):  # first to import the function, then to run it
            deadline = time.monotonic() + seconds
            outcomes = [self._receive(rank, deadline) for rank in range(world_size)]
            lost = any(isinstance(value, LostWorker) for _, value, _ in outcomes)
            if lost:
                break
        if lost:
            self.close()
        elif not all(ok for ok, *_ in outcomes):
            self._world = None  # a failed rank may have left collectives of the other ranks unfinished
        return outcomes

    @cached_property
    def _store(self):
        from torch.distributed import TCPStore

        return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def close(self):
        """End all worker processes."""
        _end_workers(self._workers)
        self._world = None

    def _start_worker(self, rank, module):
        context = multiprocessing.get_context(self._start_method)
        if self._start_method == "forkserver":
            context.set_forkserver_preload(["torch", module])  # imported once, in the server
        connection, child = context.Pipe()
        log = Path(self._directory.name) / f"worker-{rank}.log"
        process = context.Process(target=_worker_main, args=(rank, child, str(log), self._device), daemon=False)
        process.start()
        child.close()
        self._workers.append((process, connection, log))

    def _receive(self, rank, deadline):
        process, connection, log = self._workers[rank]
        try:
            if connection.poll(max(deadline - time.monotonic(), 0)):
                return pickle.loads(connection.recv_bytes())
            reason = "did not answer in time"
        except EOFError:
            process.join(5)
            reason = f"died with exit code {process.exitcode}"
        tail = log.read_text(errors="replace")[-4000:] if log.exists() else ""
        text = f"worker {rank} {reason}. The end of its output:\n{tail}"
        return False, LostWorker(text), text


def _end_workers(workers):
    for process, connection, _ in workers:
        process.kill()
        process.join()
        connection.close()
    workers.clear()


def _default_start_method(device):
    """Return "forkserver" if the platform and the device allow it, else "spawn".

    The server must not initialize CUDA, because the workers forked from it could not initialize it again. Modules that
    the server imports ask whether there is a GPU, and only NVML answers that without initializing CUDA.
    """
    if sys.platform != "linux":
        return "spawn"
    if device == "cuda":
        import torch

        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
        if torch.cuda._device_count_nvml() < 0:
            return "spawn"
    return "forkserver"


def _worker_main(rank, connection, log, device):
    end_with_parent()  # even while a function runs
    stream = open(log, "w", buffering=1)
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    sys.stdout = sys.stderr = stream
    faulthandler.enable()

    import numpy as np
    import torch

    np.random.seed()  # workers forked from one process would otherwise draw the same numbers
    multiprocessing.set_start_method(None, force=True)  # data loaders use the platform's default, as under a launcher
    gc.freeze()  # Trainer collects garbage, which takes a fifth of a second less without the imported objects
    torch.set_num_threads(1)
    current = None
    while True:
        try:
            world, function, args = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        connection.send_bytes(pickle.dumps((True, None, None)))
        try:
            if world != current:
                current = None
                _join_world(rank, device, *world)
                current = world
            outcome = (True, function(*args), None)
            message = pickle.dumps(outcome)
        except BaseException as error:
            message = _failure(error)
        connection.send_bytes(message)


def _failure(error):
    text = traceback.format_exc()
    try:
        message = pickle.dumps((False, error, text))
        pickle.loads(message)
        return message
    except Exception:
        return pickle.dumps((False, RuntimeError(f"{type(error).__name__}: {error}"), text))


def _join_world(rank, device, world_size, port, name):
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    os.environ.update(WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size))
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
        torch.cuda.init()  # before CUDA is initialized, a DeviceMesh would take the local rank as the GPU's index
        # accelerate would pass the local rank to DDP as the GPU's index (prepare_model in accelerator.py).
        os.environ["ACCELERATE_BYPASS_DEVICE_MAP"] = "true"
        os.environ.pop("ACCELERATE_USE_CPU", None)
    else:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    store = dist.PrefixStore(name, dist.TCPStore("127.0.0.1", port, is_master=False))
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
