"""Step "host": does the host wait for the device, and how long does it take to launch a layer?

A layer with few tokens is limited by launches: the host then takes longer than the device.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from ...attention import Layer, select_kernel
from ...data.batch import shard_inputs
from ...integrations.attach import attach
from ...planning import plan_documents
from ..kernels import RankWork
from ..turns import median_seconds
from .settings import Found, Record, Settings
from .small_models import packed_batch, small_llama


ROUNDS = 5
LENGTHS = (300, 150, 31), (300, 151, 31)
"""Document lengths of two batches. They differ, so that nothing built for the first can be reused for the second."""

_LAUNCHES = (
    "cudaLaunchKernel",
    "cudaLaunchKernelExC",
    "cuLaunchKernel",
    "cuLaunchKernelEx",
    "cudaMemcpyAsync",
    "cudaMemsetAsync",
)


def host(settings: Settings) -> Found:
    """Count launches, time the host, and find the first place where it waits for the device."""
    device, found = settings.prepare(), Found()
    for tokens in settings.sized((1024, 4096, 16384), (64, 256)):
        if found.has_time(settings, settings.sized(3, 0), f"{tokens} tokens"):
            title = "One attention layer of a rank, forward and backward, seven stages"
            found.add(title, _launches(tokens, settings, device))
    model = small_llama(128).to(device, torch.bfloat16)
    attach(model, None)
    batches = (iter([packed_batch(lengths, device) for lengths in LENGTHS]) for _ in range(3))
    sharded, forward, whole = batches
    for what, function, must_not_wait in (
        ("a layer", _rank_work(settings.sized(4096, 64), settings, device).engine, True),
        ("shard_inputs", lambda: shard_inputs(next(sharded), None), True),
        ("a model's forward", lambda: model(**next(forward)), True),
        ("a model's forward and backward", lambda: model(**next(whole)).loss.backward(), False),
    ):
        first_wait = _first_wait(function, device)
        nowhere = settings.sized("nowhere", "a CPU does not wait")
        found.add("Where the host waits for the device", {"part": what, "first wait": first_wait or nowhere})
        found.require(not (must_not_wait and first_wait), f"{what} waits for the device: {first_wait}")
    return found


def _rank_work(tokens: int, settings: Settings, device: torch.device) -> RankWork:
    """Return the work of the first of eight ranks that share one document, `tokens` each, in seven stages."""
    plan = plan_documents([8 * tokens], 8, strategy="per_doc", num_stages=7)
    shape = settings.sized((32, 8, 128), (4, 2, 16))
    kernel = select_kernel(device, Layer(torch.bfloat16, shape[2], shape[2]))
    return RankWork(plan, 0, kernel, shape, torch.bfloat16, device)


def _launches(tokens: int, settings: Settings, device: torch.device) -> Record:
    work = _rank_work(tokens, settings, device)
    work.engine()
    seconds = median_seconds(ROUNDS, device, engine=work.engine)["engine"]
    issued = []
    for _ in range(ROUNDS):
        _wait_for(device)
        begin = time.perf_counter()
        work.engine()
        issued.append(time.perf_counter() - begin)
    _wait_for(device)
    with _Dispatches() as dispatches:
        work.engine()
    return {
        "tokens per rank": tokens,
        "device ms": 1000 * seconds,
        "host ms": 1000 * median(issued),
        "host / device": median(issued) / seconds,
        "launches": _count_launches(work.engine, device),
        "dispatches": dispatches.count,
    }


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _count_launches(function: Callable[[], Any], device: torch.device) -> int:
    """Count the kernels and copies that a call launches on CUDA."""
    if device.type == "cpu":
        return 0
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        function()
        _wait_for(device)
    return sum(event.name in _LAUNCHES for event in profiler.events())


class _Dispatches(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def _first_wait(function: Callable[[], Any], device: torch.device) -> str | None:
    """Return PyTorch's error at the first operation that waits for the device, in a second call of the function."""
    function()
    if device.type == "cpu":
        return None
    _wait_for(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        function()
    except RuntimeError as error:
        return f"{' '.join(str(error).split())[:120]} ({_place(error)})"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


def _place(error: BaseException) -> str:
    """Return file and line of the innermost frame in this library, or of the innermost frame if there is none."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "hf_flashcp" in frame.filename and "bench" not in frame.filename]
    innermost = (ours or frames)[-1]
    return f"{'/'.join(innermost.filename.split('/')[-3:])}:{innermost.lineno}"
