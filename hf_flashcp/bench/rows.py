"""Times a training step on rollouts of unequal length: padded on each process, pooled into one plan, or in turns.

Every process has rollouts of its own, as in GRPO. All ways run in turn, round after round, on the same processes, and
must compute the same loss and gradient. One more round with PyTorch's profiler gives the peak of memory.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from ..distributed.workers import WorkerPool
from ..extras import require_extra
from ..integrations.attach import attach
from ..tables import counted, records_table
from . import traces
from .arguments import with_arguments
from .memory import random_model
from .step import QWEN3


WAYS = ("padded", "own", "turns")
_WARM_UP = 1


def rollout_lengths(rows: int, longest: int, seed: int) -> list[int]:
    """Return the tokens of rollouts, between 1/16 of the longest and the longest, log-uniformly."""
    generator = torch.Generator().manual_seed(seed)
    return (longest * 16 ** -torch.rand(rows, generator=generator)).long().clamp(min=2).tolist()


@with_arguments("rows", "longest", "cp_size", "config", "rounds")
def measure(
    rows: int, longest: int, cp_size: int, *, config: dict[str, Any] = QWEN3, rounds: int = 5
) -> dict[str, Any]:
    """Train on `rows` rollouts per process in each way, on the CPU.

    `tokens` and `peak_bytes` are those of the rank with the most: tokens of one forward, and bytes allocated in a
    step. `relative_seconds` is the median over rounds of a way's time / that of padded rows.
    """
    require_extra("Benchmarks of rollouts", "trl", "trl")
    turns, found = _WARM_UP + rounds + 1, []
    with WorkerPool() as pool, tqdm(total=turns, unit="round", leave=False, disable=None) as bar:
        for turn in range(turns):
            order = [WAYS[(place + turn) % len(WAYS)] for place in range(len(WAYS))]
            arguments = json.dumps(config), rows, longest, order, turn == turns - 1
            found.append(pool.run(cp_size, run_turn, *arguments, timeout=3600))
            bar.update()
    *timed, profiled = found[_WARM_UP:]
    seconds = {way: [max(rank[way]["seconds"] for rank in turn) for turn in timed] for way in WAYS}
    cases = [
        {
            "way": way,
            "tokens": max(rank[way]["tokens"] for rank in profiled),
            "seconds": median(seconds[way]),
            "relative_seconds": median(each / padded for each, padded in zip(seconds[way], seconds["padded"])),
            "peak_bytes": max(rank[way]["peak"] for rank in profiled),
            "grad_norm": profiled[0][way]["grad_norm"],
        }
        for way in WAYS
    ]
    for case in cases:
        assert math.isclose(case["grad_norm"], cases[0]["grad_norm"], rel_tol=1e-4), cases
    return {"lengths": [rollout_lengths(rows, longest, rank) for rank in range(cp_size)], "cases": cases}


class _Way:
    """A model under DDP whose forwards run in one way."""

    def __init__(self, way: str, config: dict[str, Any], mesh: DeviceMesh):
        from trl.trainer.utils import add_fused_lm_head

        model = random_model(config, torch.float32)
        if way == "padded":
            model.set_attn_implementation("sdpa")
        add_fused_lm_head(model)
        self.turns = None
        if way != "padded":
            handle = attach(model, mesh)
            handle.read_rows(model, way)
            self.turns = handle.turns
        self.tokens = 0
        model.get_input_embeddings().register_forward_pre_hook(self._count)
        self.model = DistributedDataParallel(model, process_group=mesh.get_group())

    def _count(self, module: torch.nn.Module, args: tuple) -> None:
        self.tokens = max(self.tokens, args[0].numel())

    def step(self, batch: dict[str, torch.Tensor]) -> float:
        """Run forward and backward, and return the norm of the gradient."""
        if self.turns is None:
            self._loss(batch).backward()
        else:
            with self.turns.recording(), self.model.no_sync():
                self._loss(batch).backward()
            self.turns.replay(self.model, True, self.model.no_sync)
        norm = torch.nn.utils.get_total_norm(parameter.grad for parameter in self.model.parameters())
        self.model.zero_grad()
        return float(norm)

    def _loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        log_probs = self.model(**batch, fused_lm_head=True).log_probs
        advantages = torch.linspace(-1, 1, len(log_probs))[:, None]
        return -(log_probs * advantages).sum() / log_probs.numel()


@functools.lru_cache(maxsize=1)
def _ways(world: dist.ProcessGroup, config: str) -> dict[str, _Way]:
    """Return the models of this process, which are kept from turn to turn."""
    torch.set_num_threads(1)
    ranks = list(range(world.size()))
    mesh = DeviceMesh.from_group(dist.new_group(), "cpu", mesh=ranks, mesh_dim_names=("cp",))
    return {way: _Way(way, json.loads(config), mesh) for way in WAYS}


def run_turn(config: str, rows: int, longest: int, order: list[str], profiled: bool) -> dict[str, dict[str, Any]]:
    """Run one step in each way, in the given order, and return this rank's figures by way."""
    ways = _ways(dist.group.WORLD, config)
    batch = padded_batch(rollout_lengths(rows, longest, dist.get_rank()), json.loads(config)["vocab_size"])
    return {name: _measured(functools.partial(ways[name].step, batch), ways[name], profiled) for name in order}


def padded_batch(lengths: list[int], vocabulary: int) -> dict[str, torch.Tensor]:
    """Return rows (B, T), padded at the end, in whose second halves all tokens are targets."""
    places = torch.arange(max(lengths))[None]
    mask = places < torch.tensor(lengths)[:, None]
    ids = torch.randint(vocabulary, mask.shape, generator=torch.Generator().manual_seed(dist.get_rank()))
    targets = mask & (places >= torch.tensor(lengths)[:, None] // 2)
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~targets, -100)}


def _measured(step: Callable[[], float], way: _Way, profiled: bool) -> dict[str, Any]:
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True) if profiled else None
    with profiler or contextlib.nullcontext():
        dist.barrier()
        begin = perf_counter()
        norm = step()
        seconds = perf_counter() - begin
    peak = 0 if profiler is None else traces.kept_and_peak(traces.trace_events(profiler))[1]
    return {"seconds": seconds, "grad_norm": norm, "tokens": way.tokens, "peak": peak}


def text(found: dict[str, Any]) -> str:
    """Return a table with one row per way."""
    columns = {
        "way": ("rollouts", ""),
        "tokens": ("tokens at once", ",.0f"),
        "seconds": ("ms", "ms:.0f"),
        "relative_seconds": ("time", ".2f"),
        "peak_bytes": ("peak MiB", "MiB:.0f"),
    }
    lengths = [length for each in found["lengths"] for length in each]
    return (
        f"{counted(found['rows'], 'rollout')} of {min(lengths):,} to {max(lengths):,} tokens on each of "
        f"{found['cp_size']} processes, CPU; medians of {found['rounds']} rounds\n\n"
        + records_table(columns, found["cases"])
    )
