"""Code that runs in the processes of `bench step`: they keep a model and run the same step under many plans."""

from __future__ import annotations

import functools
import json
import time
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile, record_function
from transformers.modeling_layers import GradientCheckpointingLayer

from ..data.batch import shard_inputs
from ..integrations.attach import attach
from ..plan import ShardPlan
from . import traces
from .attention import DTYPES, AllGatherLayout
from .memory import random_batch, random_model


class Trainer:
    """A model and its optimizer. The learning rate is 0, so that every step starts from the same weights."""

    def __init__(self, config: dict[str, Any], dtype: torch.dtype, device: torch.device, mesh: DeviceMesh | None):
        model = random_model(config, dtype).to(device)
        layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)] or [model]
        _name_forward(layers[len(layers) // 2])
        self.mesh, self.device, self.vocabulary = mesh, device, model.config.get_text_config().vocab_size
        self.model = model if mesh is None else DistributedDataParallel(model, process_group=mesh.get_group())
        self.attach()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def attach(self) -> None:
        """Attach the model, and skip logits as trainers do."""
        self.handle = attach(self.model, self.mesh)
        self.handle.skip_logits = True

    def step(self, batch: dict[str, Any], layout: AllGatherLayout | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Run one step. Return this rank's loss and the norm of the whole batch's gradient."""
        with record_function(traces.STEP):
            shard = shard_inputs(batch, self.mesh)
            if layout is not None:
                shard["flashcp_plan"].layout = layout
            loss = self.model(**shard).loss
            with record_function(traces.FORWARD_DONE):
                pass
            with record_function(traces.BACKWARD):
                loss.backward()
            norm = self.update()
        return loss.detach(), norm

    def update(self) -> torch.Tensor:
        """Clip the gradient, update the weights and wait for the device. Return the norm of the gradient."""
        with record_function(traces.OPTIMIZER):
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return norm

    def bytes_between_steps(self) -> int:
        """Return the bytes of the weights, the optimizer state and DDP's gradient buckets."""
        weights = sum(parameter.nbytes for parameter in self.model.parameters())
        states = sum(value.nbytes for state in self.optimizer.state.values() for value in state.values())
        return weights + states + (weights if self.mesh is not None else 0)


def _name_forward(layer: torch.nn.Module) -> None:
    """Record a range `LAYER` around a layer's forward while a profiler runs."""
    ranges: list[Any] = []

    def enter(*_: Any) -> None:
        ranges.append(record_function(traces.LAYER) if torch.autograd._profiler_enabled() else nullcontext())
        ranges[-1].__enter__()

    layer.register_forward_pre_hook(enter)
    layer.register_forward_hook(lambda *_: ranges.pop().__exit__(None, None, None))


@functools.lru_cache(maxsize=1)
def _trainers(
    world: dist.ProcessGroup, config: str, dtype: str, device: str, threads: int
) -> tuple[Trainer, Trainer | None]:
    """Return this process's trainer in the group and, on the first rank, the trainer of the single process.

    Both are kept from turn to turn.
    """
    torch.set_num_threads(threads)
    rank, size = world.rank(), world.size()
    chosen = torch.device(device, rank if device == "cuda" else None)
    if device == "cuda":
        torch.cuda.set_device(chosen)
    group = dist.new_group(backend="nccl" if device == "cuda" else "gloo")
    mesh = DeviceMesh.from_group(group, device, mesh=list(range(size)), mesh_dim_names=("cp",))
    values = json.loads(config)
    single = Trainer(values, DTYPES[dtype], chosen, None) if rank == 0 else None
    return Trainer(values, DTYPES[dtype], chosen, mesh), single


Case = tuple[ShardPlan, bool]
"""A plan, and whether all KV is sent instead of the needed KV."""


def run_turn(
    setting: tuple[str, str, str, int], cases: list[Case], order: list[int], profiled: bool
) -> dict[int, Any]:
    """Run one step of every case in the given order, and return this rank's figures by case.

    Cases with cp_size 1 run on the first rank, while the others wait.
    """
    shared, single = _trainers(dist.group.WORLD, *setting)
    found = {}
    for index in order:
        plan, send_all = cases[index]
        trainer = single if plan.cp_size == 1 else shared
        if trainer is None:
            dist.barrier()
            dist.barrier()
            continue
        batch: dict[str, Any] = {"flashcp_plan": plan}
        for name, rows in random_batch(plan.lengths, trainer.vocabulary).items():
            batch[name] = rows.to(trainer.device)
        layout = AllGatherLayout(plan, dist.get_rank()) if send_all else None
        found[index] = _measured(trainer, batch, layout, profiled)
        dist.barrier()
    return found


def _measured(
    trainer: Trainer, batch: dict[str, Any], layout: AllGatherLayout | None, profiled: bool
) -> dict[str, Any]:
    on_gpu = trainer.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(trainer.device)
        before = torch.cuda.memory_allocated(trainer.device)
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True) if profiled and not on_gpu else None
    with profiler or nullcontext():
        dist.barrier()  # profilers do not start at the same time on all ranks
        begin, cpu_begin = time.perf_counter(), time.process_time()
        loss, norm = trainer.step(batch, layout)
        seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu_begin
    row: dict[str, Any] = {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "loss": float(loss),
        "grad_norm": float(norm),
    }
    if on_gpu:
        row["peak"] = trainer.bytes_between_steps() + torch.cuda.max_memory_allocated(trainer.device) - before
    elif profiler is not None:
        events = traces.trace_events(profiler)
        row["peak"] = trainer.bytes_between_steps() + traces.kept_and_peak(events)[1]
        row["parts"], row["layer"] = traces.seconds_by_part(events), traces.layer_bars(events)
    return row
