"""Compares the estimated memory of small training steps with measured memory, on CPU.

Memory is measured with PyTorch's profiler (`profile_memory=True`), which records every allocation and release, also
inside operators. `torch.distributed._tools.mem_tracker.MemTracker` is not used: it counts storages, does not see
inside `flashcp::attention`, and misses releases under checkpointing or autocast, so that it reports 6 to 13% too much
on these steps.

Offloaded activations cannot be told from others on CPU, where both are in the same memory. So NumPy's memory stands in
for that of the host: PyTorch's profiler does not see it, and tensors that come back are allocated again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ..attention import save_attention_context_fn
from ..distributed.workers import WorkerPool
from ..integrations.attach import attach
from ..integrations.models.checkpointing import enable_checkpointing
from ..integrations.plugin import FlashCPPlugin
from ..predict.memory import estimate_memory
from ..predict.memory_shape import MemoryShape
from ..predict.training_setup import RankLoad, TrainingSetup
from ..tables import table
from .traces import FORWARD_DONE, kept_and_peak, trace_events


LLAMA = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "tie_word_embeddings": False,
}
QWEN3 = {**LLAMA, "model_type": "qwen3", "head_dim": 32, "num_attention_heads": 4, "tie_word_embeddings": True}
BIG_VOCABULARY = {**LLAMA, "vocab_size": 8192, "num_hidden_layers": 2}

WIDE_ATTENTION = {
    **LLAMA,
    "vocab_size": 16,
    "hidden_size": 64,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_key_value_heads": 8,
    "head_dim": 32,
}

BF16 = {"dtype": "bfloat16", "mixed_precision": "no"}
FSDP2 = {"sharding": "fsdp2", "gpus": 2}
FP32 = {"dtype": "float32", "mixed_precision": "no"}

NO_LOGITS = {"skip_logits": True}
OFFLOAD = {"offload": True}
NOT_KEPT = {"keep_received_kv": False}
IN_PARTS = {"head_groups": 2, "mlp_tiles": 4}

CASES = {
    "llama, fp32": (LLAMA, FP32),
    "llama, bf16": (LLAMA, BF16),
    "llama, fp32, autocast": (LLAMA, {"dtype": "float32"}),
    "llama, fp32, autocast, checkpointing": (LLAMA, {"dtype": "float32", "gradient_checkpointing": "full"}),
    "qwen3, tied, bf16": (QWEN3, BF16),
    "qwen3, tied, bf16, checkpointing": (QWEN3, {**BF16, "gradient_checkpointing": "full"}),
    "qwen3, tied, bf16, attention-saving": (QWEN3, {**BF16, "gradient_checkpointing": "attention-saving"}),
    "big vocabulary, bf16": (BIG_VOCABULARY, BF16),
    "big vocabulary, fp32, checkpointing": (BIG_VOCABULARY, {**FP32, "gradient_checkpointing": "full"}),
    "big vocabulary, bf16, no logits": (BIG_VOCABULARY, {**BF16, **NO_LOGITS}),
    "big vocabulary, fp32, autocast, no logits": (BIG_VOCABULARY, {"dtype": "float32", **NO_LOGITS}),
    "llama, bf16, no logits, offload": (LLAMA, {**BF16, **NO_LOGITS, "gradient_checkpointing": "full", **OFFLOAD}),
    "qwen3, tied, bf16, attention-saving, offload": (
        QWEN3,
        {**BF16, "gradient_checkpointing": "attention-saving", **OFFLOAD},
    ),
    "llama, bf16, 4 MLP tiles": (LLAMA, {**BF16, **NO_LOGITS, "mlp_tiles": 4}),
    "llama, bf16, every 4 layers": (LLAMA, {**BF16, "gradient_checkpointing": "full", "every_n_layers": 4}),
}
"""Cases on one process: for each name, the config and the options of [`TrainingSetup`]."""

RANK_CASES = {
    "llama, bf16, cp 2": (LLAMA, BF16),
    "qwen3, bf16, attention-saving, cp 2": (QWEN3, {**BF16, "gradient_checkpointing": "attention-saving"}),
    "llama, ddp, autocast, cp 2": (LLAMA, {"sharding": "ddp", "gpus": 2, "dtype": "float32"}),
    "llama, fsdp2, bf16, cp 2": (LLAMA, FSDP2),
    "qwen3, fsdp2, bf16, checkpointing, cp 2": (QWEN3, {**FSDP2, "gradient_checkpointing": "full"}),
    "wide attention, bf16, cp 2": (WIDE_ATTENTION, {**BF16, **NO_LOGITS, **NOT_KEPT}),
    "wide attention, bf16, 4 head groups, cp 2": (
        WIDE_ATTENTION,
        {**BF16, **NO_LOGITS, **NOT_KEPT, "head_groups": 4},
    ),
    "qwen3, fsdp2, bf16, as for a million tokens, cp 2": (
        QWEN3,
        {**FSDP2, **NO_LOGITS, "gradient_checkpointing": "attention-saving", **OFFLOAD, **NOT_KEPT, **IN_PARTS},
    ),
}
"""Cases on two ranks that share the batch, in the same form."""

LENGTHS = (700, 250, 74)


def compare(config: dict[str, Any], options: dict[str, Any], lengths=LENGTHS, mesh=None) -> dict[str, Any]:
    """Measure one training step on this process, and return estimated and measured bytes.

    `peak` is at the peak, and `kept` is what forward keeps for backward. Three steps run and the last one is measured,
    because optimizer state and DDP's buckets exist by then. `options` are those of [`TrainingSetup`]; without
    `sharding`, the model is not wrapped, and without `skip_logits`, logits are kept. `mesh` has the context-parallel
    ranks, all of which must call this function.
    """
    setup = TrainingSetup(**{"sharding": "ddp", "device": "cpu", "skip_logits": False, **options})
    model = random_model(config, torch.float32 if setup.weight_bytes == 4 else torch.bfloat16)
    _checkpoint(model, setup)
    if "sharding" in options:
        model = _wrapped(model, setup, mesh)
    ranks = 1 if mesh is None else mesh.size()
    plugin = FlashCPPlugin(
        cp_size=ranks,
        head_groups=setup.head_groups,
        mlp_tiles=setup.mlp_tiles,
        keep_received_kv=setup.keep_received_kv,
        hardware=None,  # the estimate is for the plan that is made without a cost model
        topology=None,
    )
    handle = attach(model, mesh, plugin=plugin)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    batch = random_batch(lengths, config["vocab_size"])
    with _numpy_as_host() if setup.offload else nullcontext():
        for _ in range(2):
            _step(model, optimizer, batch, setup)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            _step(model, optimizer, batch, setup)
    kept, peak = kept_and_peak(trace_events(profiler))
    states = [value for state in optimizer.state.values() for value in state.values()]
    tensors = [*model.parameters(), *states, *batch.values()]
    before = sum((t.to_local() if hasattr(t, "to_local") else t).nbytes for t in tensors)
    if "sharding" in options and setup.sharding == "ddp":
        before += sum(parameter.nbytes for parameter in model.parameters())
    report, rank = handle.plan.plan.report(), handle.plan.rank
    handle.remove()
    load = RankLoad(
        report["tokens"][rank], report["kv_received"][rank], report["kv_sent"][rank], batch_tokens=sum(lengths)
    )
    estimate = estimate_memory(MemoryShape.from_config(config), setup, load)
    return {
        "peak": {"estimated": estimate.total, "measured": before + peak},
        "kept": {"estimated": estimate.kept, "measured": kept},
        "moment": estimate.peak,
    }


def random_model(config: dict[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    """Return a model in training mode, with random weights that depend only on its config."""
    torch.manual_seed(0)
    values = {name: value for name, value in config.items() if name != "model_type"} | {"use_cache": False}
    config = AutoConfig.for_model(config["model_type"], **values)
    return AutoModelForCausalLM.from_config(config, attn_implementation="flashcp", dtype=dtype).train()


def _checkpoint(model: PreTrainedModel, setup: TrainingSetup) -> None:
    """Turn activation checkpointing on, as a setup says."""
    if setup.gradient_checkpointing == "none":
        return
    saving = {"context_fn": save_attention_context_fn} if setup.gradient_checkpointing == "attention-saving" else {}
    more = {"every_n_layers": setup.every_n_layers, "offload": setup.offload}
    given = {name: value for name, value in more.items() if value != getattr(TrainingSetup, name)}
    enable_checkpointing(model, {"use_reentrant": False, **saving}, **given)


@contextmanager
def _numpy_as_host() -> Iterator[None]:
    """Let activation checkpointing offload to NumPy's memory."""

    def pack(tensor: torch.Tensor) -> tuple[torch.Tensor, np.ndarray]:
        return torch.empty_like(tensor, device="meta"), tensor.detach().contiguous().flatten().view(
            torch.uint8
        ).numpy().copy()

    def unpack(packed: tuple[torch.Tensor, np.ndarray]) -> torch.Tensor:
        like, saved = packed
        return torch.from_numpy(saved).clone().view(like.dtype).view(like.shape)

    def hooks(**options: Any) -> saved_tensors_hooks:
        return saved_tensors_hooks(pack, unpack)

    with patch("transformers.modeling_utils.save_on_cpu", hooks):
        yield


def _wrapped(model, setup: TrainingSetup, mesh):
    """Wrap a model in DDP, or in FSDP2 with the same units as accelerate."""
    if setup.sharding == "ddp":
        return DistributedDataParallel(model)
    dtype = torch.bfloat16 if setup.mixed_precision == "bf16" else None
    options = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(dtype, dtype, dtype)}
    for layer in model.model.layers:
        fully_shard(layer, **options, reshard_after_forward=True)
    tail = [model.model.norm, model.lm_head]
    if model.config.tie_word_embeddings:
        tail.insert(1, model.model.embed_tokens)
    else:
        fully_shard(model.model.embed_tokens, **options, reshard_after_forward=True)
    fully_shard(tail, **options, reshard_after_forward=False)
    return fully_shard(model, **options)


def random_batch(lengths, vocabulary: int) -> dict[str, torch.Tensor]:
    position_ids = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    input_ids = torch.randint(vocabulary, position_ids.shape, generator=torch.Generator().manual_seed(0))
    return {
        "input_ids": input_ids,
        "labels": input_ids.masked_fill(position_ids == 0, -100),
        "position_ids": position_ids,
    }


def _step(model, optimizer, batch, setup: TrainingSetup) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=setup.autocasts):
        loss = model(**batch, skip_logits=setup.skip_logits).loss
    with record_function(FORWARD_DONE):
        pass
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def compare_on_ranks(config: dict[str, Any], options: dict[str, Any], lengths=LENGTHS) -> dict[str, Any]:
    """Call [`compare`] on each process of a group whose ranks share a batch."""
    return compare(config, options, lengths, init_device_mesh("cpu", (dist.get_world_size(),)))


def measure() -> dict[str, Any]:
    """Measure all cases; of two ranks, return the one whose estimate has the larger error."""
    found = {name: compare(config, options) for name, (config, options) in CASES.items()}
    with WorkerPool() as pool:
        for name, (config, options) in RANK_CASES.items():
            found[name] = max(pool.run(2, compare_on_ranks, config, options), key=_error)
    return found


def _error(case: dict[str, Any]) -> float:
    return max(abs(case[key]["estimated"] / case[key]["measured"] - 1) for key in ("peak", "kept"))


def text(found: dict[str, Any]) -> str:
    """Return a table with one row per case."""
    columns = {"": ""}
    for what in ("at the peak", "for backward"):
        columns |= {f"estimated\n{what}": "MiB:.1f", f"measured\n{what}": "MiB:.1f", f"error\n{what}": "+.1%"}
    rows = []
    for name, case in found.items():
        sizes = [(case[key]["estimated"], case[key]["measured"]) for key in ("peak", "kept")]
        rows.append((name, *(figure for e, m in sizes for figure in (e, m, e / m - 1))))
    return f"one step of {sum(LENGTHS):,} tokens on CPU; MiB per process\n\n" + table(columns, rows)
