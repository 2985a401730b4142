"""Fault tolerance of trainers: errors that name failed ranks, complete checkpoints, and a common stop of all ranks."""

from __future__ import annotations

import contextlib
import os
import shutil
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from ...distributed import name_missing_ranks


STAGING = "incomplete"  # directory in output_dir for checkpoints that are being written


class ReliableTrainerMixin:
    """The part of [`FlashCPTrainerMixin`] that handles failures of ranks.

    A checkpoint is written to `output_dir/incomplete/checkpoint-N`, and moved to `output_dir/checkpoint-N` when all
    ranks have written their part. Older checkpoints are deleted after that. Every `checkpoint-N` is therefore
    complete, no matter when a process dies.
    """

    _staging: str | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if (stock := self.pop_callback(JITCheckpointCallback)) is not None:
            self.add_callback(StopTogetherCallback(stock))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with name_missing_ranks(lambda: f"training step {self.state.global_step + 1}"):
            return super().train(*args, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        if self.state.global_step >= self.state.max_steps:  # resumed at its end, Trainer would run one more step
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        with name_missing_ranks("evaluation"):
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        with name_missing_ranks("prediction"):
            return super().predict(*args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or super()._get_output_dir(trial)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with name_missing_ranks(f"saving {name}"):
            run_dir = self._get_output_dir(trial)
            staged, final = os.path.join(run_dir, STAGING, name), os.path.join(run_dir, name)
            if self.is_local_process_zero():  # remove files of a run that died
                shutil.rmtree(os.path.dirname(staged), ignore_errors=True)
            self.accelerator.wait_for_everyone()
            self._staging = os.path.dirname(staged)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            if self.state.best_model_checkpoint == staged:
                self.state.best_model_checkpoint = final
                if self.args.should_save:
                    self.state.save_to_json(os.path.join(staged, TRAINER_STATE_NAME))
            self.accelerator.wait_for_everyone()
            # Runs once if nodes share the file system, and once per node otherwise.
            for is_mine in (self.is_world_process_zero(), self.is_local_process_zero()):
                if is_mine:
                    _put_in_place(staged, final)
                self.accelerator.wait_for_everyone()
            if self.args.should_save:
                limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
                rotate_checkpoints(
                    output_dir=run_dir, save_total_limit=limit, best_model_checkpoint=best, use_mtime=True
                )
            if self.args.push_to_hub:
                self._push_from_checkpoint(final)


def _put_in_place(staged: str, final: str) -> None:
    whole = f"{staged}.whole"
    try:
        os.rename(staged, whole)  # fails if another node has done it on a shared file system
    except FileNotFoundError:
        return
    with contextlib.suppress(FileNotFoundError):
        os.rename(final, f"{staged}.replaced")
    os.rename(whole, final)
    shutil.rmtree(os.path.dirname(staged), ignore_errors=True)


class StopTogetherCallback(JITCheckpointCallback):
    """A version of `enable_jit_checkpoint` for ranks that share a batch: all save and stop after the same step.

    When SIGTERM has reached one rank, all ranks save a checkpoint and stop at the end of the step. The callback of
    transformers saves on each rank when that rank receives its signal. Ranks that are in different steps at that time
    would wait for each other in different collectives.

    This costs an all-reduce of one number per step.
    """

    def __init__(self, stock: JITCheckpointCallback):
        super().__init__()
        self.trainer, self.jit_manager = stock.trainer, stock.jit_manager

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        requested = torch.tensor(float(self.jit_manager.is_checkpoint_requested), device=args.device)
        if args.world_size > 1:
            dist.all_reduce(requested, op=dist.ReduceOp.MAX)
        if requested.item():
            self.jit_manager.is_checkpoint_requested = False
            control.should_save = control.should_training_stop = True

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        pass

    on_pre_optimizer_step = on_epoch_end = on_step_begin
