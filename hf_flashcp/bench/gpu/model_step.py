"""Step "step": times a training step of a 1B-parameter model, on a packed batch and on one document at a time.

The packed batch runs through this library. The single documents run through PyTorch's `scaled_dot_product_attention`,
which needs no mask for them; their gradients are accumulated and divided by the number of targets of the whole batch.
Model, weights and optimizer are the same. Both ways compute the same step, so losses and gradient norms must agree.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch

from ...attention import Layer, select_kernel
from ...data.boundaries import IGNORE_INDEX
from ...data.lengths import sample_pack
from ...planning import plan_documents
from ...planning.devices import packaged_hardware
from ...predict import CostModel
from ...predict.memory import estimate_memory
from ...predict.memory_shape import MemoryShape
from ...predict.training_setup import RankLoad, TrainingSetup
from ...simulation.simulate import model_flops
from ..kernels import device_name
from ..memory import random_batch
from ..step import TOLERANCES
from ..step_worker import Trainer
from ..turns import median_seconds
from .settings import OUT_OF_MEMORY, Found, Record, Settings, fits_in_memory


CORPUS = "pile"
TOKENS = (16_384, 32_768)
LLAMA_1B = {
    "model_type": "llama",
    "vocab_size": 32_768,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": True,
}

FEW_TOKENS = (256, 512)
TINY = {
    **LLAMA_1B,
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
"""Config of the model that is trained on a CPU."""

SETUP = TrainingSetup(gpus=1, sharding="ddp", dtype="bfloat16", mixed_precision="no", skip_logits=False)
STEPS, MEMORY = "One training step", "Peak memory of the training step"


class Measured(NamedTuple):
    """Measurements of the step: median seconds, and peak bytes allocated (0 on a CPU).

    The loss is the mean over the batch's targets, and `grad_norm` the norm of the batch's gradient.
    """

    seconds: float
    peak_bytes: int
    loss: float
    grad_norm: float


def model_step(settings: Settings) -> Found:
    """Measure the step in a worker, for every number of tokens, the smallest first."""
    device = settings.prepare()
    found = Found()
    config, sizes = settings.sized((LLAMA_1B, TOKENS), (TINY, FEW_TOKENS))
    trainer, needed = None, settings.sized(15.0, 0.2)
    for tokens in sizes:
        if not found.has_time(settings, needed, f"a step of {tokens:,} tokens"):
            continue
        if trainer is None:
            with device:  # initialize weights on the device
                trainer = Trainer(config, torch.bfloat16, device, None)
        begin = time.monotonic()
        _compare(found, settings, trainer, config, tokens)
        needed = 2.5 * (time.monotonic() - begin)
    return found


def _compare(found: Found, settings: Settings, trainer: Trainer, config: dict[str, Any], tokens: int) -> None:
    """Add a record for the packed batch and one for its documents, and require that they agree."""
    lengths = sample_pack(CORPUS, tokens)
    rows = {name: row.to(trainer.device) for name, row in random_batch(lengths, trainer.vocabulary).items()}
    batch = {"flashcp_plan": plan_documents(lengths, 1), **rows}
    packed = _run(settings, trainer, partial(trainer.step, batch, None))
    with _stock_attention(trainer):
        alone = _run(settings, trainer, partial(_step_by_document, trainer, rows, lengths))
    kernel = select_kernel(trainer.device, Layer(torch.bfloat16, config["head_dim"], config["head_dim"]))
    for attention, measured in ((f"flashcp, {kernel.name}", packed), ("sdpa, document by document", alone)):
        record: Record = {"tokens": tokens, "documents": len(lengths), "attention": attention}
        if measured is None:
            record["ms per step"] = OUT_OF_MEMORY
        else:
            record |= _figures(measured, lengths, config, trainer.device)
            if alone is not None:
                record["speed over sdpa"] = alone.seconds / measured.seconds
        found.add(STEPS, record)
    if trainer.device.type == "cuda":
        found.add(MEMORY, _memory(packed, lengths, config, kernel.name))
    if packed is None or alone is None:
        return
    for name, ours, stock in (("loss", packed.loss, alone.loss), ("gradient norm", packed.grad_norm, alone.grad_norm)):
        found.require(
            math.isclose(ours, stock, rel_tol=TOLERANCES["bf16"]),
            f"{name} of {tokens:,} packed tokens is {ours:.6g}, but {stock:.6g} with sdpa on single documents",
        )


def _run(
    settings: Settings, trainer: Trainer, step: Callable[[], tuple[torch.Tensor, torch.Tensor]]
) -> Measured | None:
    """Run a step twice, so that the optimizer has its state in the second, and then time it.

    Returns `None` if memory runs out.
    """
    on_gpu = trainer.device.type == "cuda"
    figures: dict[str, float] = {}

    def run_twice() -> None:
        step()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(trainer.device)
        begin = time.monotonic()
        loss, norm = step()
        figures.update(loss=float(loss), grad_norm=float(norm), seconds=time.monotonic() - begin)

    if not fits_in_memory(run_twice):
        trainer.optimizer.zero_grad()
        return None
    peak = torch.cuda.max_memory_allocated(trainer.device) if on_gpu else 0
    # Use a quarter of the remaining time, because the other way to run the step takes about as long.
    rounds = min(settings.sized(5, 1), settings.seconds_left() / 4 / figures["seconds"] - 1)
    seconds = median_seconds(max(int(rounds), 1), trainer.device, step=step)["step"]
    return Measured(seconds, peak, figures["loss"], figures["grad_norm"])


@contextmanager
def _stock_attention(trainer: Trainer) -> Iterator[None]:
    """Use the stock transformers model with sdpa inside the context."""
    trainer.handle.remove()
    trainer.model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        trainer.model.set_attn_implementation("flashcp")
        trainer.attach()


def _step_by_document(
    trainer: Trainer, rows: dict[str, torch.Tensor], lengths: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the step on one document at a time. Return loss and gradient norm, as [`Trainer.step`] does."""
    targets = (rows["labels"] != IGNORE_INDEX).sum()
    loss = torch.zeros((), device=trainer.device)
    for ids, labels in zip(rows["input_ids"].split(lengths, 1), rows["labels"].split(lengths, 1)):
        part = trainer.model(input_ids=ids, labels=labels, num_items_in_batch=targets).loss
        part.backward()
        loss += part.detach()
    return loss, trainer.update()


def _figures(measured: Measured, lengths: Sequence[int], config: dict[str, Any], device: torch.device) -> Record:
    figures: Record = {
        "ms per step": 1000 * measured.seconds,
        "tokens/s": sum(lengths) / measured.seconds,
        "loss": measured.loss,
        "gradient norm": measured.grad_norm,
    }
    if hardware := packaged_hardware(device_name(device)):
        model = CostModel.from_config(config, hardware)
        if peak := model.hardware.peak_flops_per_second:
            figures["MFU"] = model_flops(lengths, model) / measured.seconds / peak
    return figures


def _memory(packed: Measured | None, lengths: Sequence[int], config: dict[str, Any], kernel: str) -> Record:
    tokens = sum(lengths)
    load = RankLoad(tokens, sequences=len(lengths), batch_tokens=tokens)
    setup = replace(SETUP, kernel=kernel)
    estimate = estimate_memory(MemoryShape.from_config(config), setup, load)
    record: Record = {"tokens": tokens, "estimated GiB": estimate.total / 2**30, "at": estimate.peak}
    if packed is None:
        return {**record, "measured GiB": OUT_OF_MEMORY}
    measured = packed.peak_bytes
    return {**record, "measured GiB": measured / 2**30, "estimated / measured": estimate.total / measured}
