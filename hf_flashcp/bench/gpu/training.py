"""Step "trainer": compares the first gradient of `FlashCPTrainer` with the gradient of each document run alone.

The ranks of the trainer share the device.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from ...attention import save_attention_context_fn
from ...data import FlashCPCollator
from ...integrations.gradient_check import gradient_error, per_document_gradients
from ...integrations.models.checkpointing import CHECKPOINTING_ARGUMENT
from ...integrations.plugin import FlashCPPlugin
from ...integrations.trainers.trainer import FlashCPTrainer
from .settings import Found, Record, Run, Settings
from .small_models import HYBRIDS, packed_batch, random_documents, small_hybrid, small_llama


SIZES = (2, 4)
LENGTHS = (900, 300, 77, 3, 500)
FEW_LENGTHS = (50, 20, 3)
EXACT = 1e-5
"""Largest allowed relative error of a parameter's gradient in float32."""

TIMES = 2.0
"""Largest allowed ratio of the error in bf16 to the error of one process in bf16; both are relative to float32."""

CHECKPOINTING: dict[str, dict[str, Any]] = {
    "none": {},
    "plain": {CHECKPOINTING_ARGUMENT: True},
    "attention kept": {
        CHECKPOINTING_ARGUMENT: True,
        f"{CHECKPOINTING_ARGUMENT}_kwargs": {"use_reentrant": False, "context_fn": save_attention_context_fn},
    },
}


def trainer(run: Run, settings: Settings) -> Found:
    """Check the first gradient of a training run on 2 and 4 ranks."""
    found = Found()
    for size in settings.sized(SIZES, (2,)):
        if not found.has_time(settings, 10, f"{size} ranks"):
            break
        for record in run(size, _steps)[0]:
            what = (
                f"the gradient of {record['model']} in {record['dtype']} with checkpointing "
                f"{record['checkpointing']} on {size} ranks"
            )
            found.add_error("First gradient of a training run, largest relative error of a parameter", record, what)
    return found


def _steps(settings: Settings) -> list[Record]:
    found = []
    for model_type in ("llama", *HYBRIDS):
        for dtype in (torch.float32, torch.bfloat16):
            found += _steps_of(model_type, dtype, settings)
    return found


def _steps_of(model_type: str, dtype: torch.dtype, settings: Settings) -> list[Record]:
    device = settings.prepare()
    batch = packed_batch(settings.sized(LENGTHS, FEW_LENGTHS), device)
    exact = per_document_gradients(_model(model_type, "sdpa", dtype, settings).float().to(device), [batch])
    bound = EXACT
    if dtype == torch.bfloat16:
        single = per_document_gradients(_model(model_type, "sdpa", dtype, settings).to(device), [batch])
        bound = TIMES * gradient_error(single, exact)
    found = []
    for name, options in CHECKPOINTING.items():
        if settings.rehearses and (name == "plain" or dtype == torch.bfloat16 and name == "none"):
            continue
        if model_type != "llama" and name != "none":
            continue
        error = gradient_error(_first_gradient(model_type, dtype, options, settings), exact)
        case = {"model": model_type, "dtype": str(dtype).removeprefix("torch."), "checkpointing": name}
        found.append({"ranks": dist.get_world_size(), **case, "error": error, "bound": bound})
    return found


def _model(model_type: str, attention: str, dtype: torch.dtype, settings: Settings) -> PreTrainedModel:
    """Return a small model with its weights rounded to `dtype`."""
    width = settings.sized(512, 128)
    if model_type == "llama":
        return small_llama(width, attention=attention).to(dtype)
    return small_hybrid(model_type, width, attention).to(dtype)


class _KeepFirstGradient(TrainerCallback):
    gradient: dict[str, torch.Tensor] | None = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradient = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def _first_gradient(
    model_type: str, dtype: torch.dtype, options: dict[str, Any], settings: Settings
) -> dict[str, torch.Tensor]:
    """Return the first gradient of a Trainer with a learning rate of 0.

    DDP runs over gloo, so that its processes can share one GPU.
    """
    _forget_accelerate()
    size, keep = dist.get_world_size(), _KeepFirstGradient()
    documents = random_documents(settings.sized(LENGTHS, FEW_LENGTHS))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            **settings.sized({"ddp_backend": "gloo"}, {"use_cpu": True}),
            report_to=[],
            save_strategy="no",
            max_steps=1,
            max_grad_norm=0,
            learning_rate=0.0,
            optim="sgd",
            disable_tqdm=True,
            per_device_train_batch_size=len(documents),
            parallelism_config=FlashCPPlugin(cp_size=size, strategy="per_doc"),
            **options,
        )
        FlashCPTrainer(
            model=_model(model_type, "flashcp", dtype, settings),
            args=arguments,
            train_dataset=documents,
            data_collator=FlashCPCollator(),
            callbacks=[keep],
        ).train()
    assert keep.gradient is not None
    return keep.gradient


def _forget_accelerate() -> None:
    """Reset accelerate's state, of which there is one per process, so that every run can have its own."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    PartialState._reset_state()
