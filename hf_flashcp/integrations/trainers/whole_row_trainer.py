"""The part of `FlashCPTrainerMixin` for trainers that read whole padded rows: preference, RL and classification."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate.utils.operations import recursively_apply
from torch.utils.data import DataLoader, IterableDataset
from transformers.trainer_utils import EvalLoopOutput

from ...data import FlashCPCollator
from ...data.boundaries import IGNORE_INDEX
from ...errors import ConfigurationError, FlashCPError
from ..attach import attach, attached_handle, transformers_model
from ..handle import ContextParallelHandle
from ..models.classification import is_classifier
from ..plugin import FlashCPPlugin
from ..replacement import replaced
from .evaluation import gather_in_order, require_length
from .gathered_loss import GatheredLoss
from .predictions import Tree
from .row_evaluation import RowEvaluation
from .trl_guards import RowTrainer, row_trainer


class WholeRowTrainerMixin:
    """The part of [`FlashCPTrainerMixin`] for trainers that read whole rows.

    TRL's code stays as it is. With shared batches, its gathering functions see one process of each group, and in
    evaluation only the process itself.
    """

    flashcp: ContextParallelHandle
    _row_pass: RowEvaluation | None = None

    @property
    def _plugin(self) -> FlashCPPlugin:
        return self.args.parallelism_config

    @property
    def _row_trainer(self) -> RowTrainer | None:
        return row_trainer(type(self))

    @property
    def _reads_rows(self) -> bool:
        """Whether batches are whole padded rows, and not packed documents."""
        return self._row_trainer is not None or self._classifies

    @property
    def _classifies(self) -> bool:
        return is_classifier(transformers_model(self.model))

    @property
    def _batches(self) -> str:
        """What the processes of a group read, see [`FlashCPPlugin`]."""
        known = self._row_trainer
        return self._plugin.batches or ("shared" if known is None else known.batches)

    def get_cp_size(self) -> int:
        """Return how many processes read the same batch, which is what Trainer needs to know."""
        return self._plugin.cp_size if self._batches == "shared" else 1

    def _refuse_shared_rollouts(self) -> None:
        known = self._row_trainer
        if known is not None and known.generates and self._batches == "shared":
            raise ConfigurationError(
                f"batches is 'shared', but {type(self).__name__} generates with a seed of each process, so the "
                "processes of a group would not have the same rows, and would count as several generations per "
                "prompt. Leave it out (each process's rollouts are pooled), or use 'turns'."
            )

    def _refuse_batches(self) -> None:
        """Raise a `ConfigurationError` if the model cannot be trained with the plugin's `batches`, or the collator."""
        if self._batches != "shared" and not self._reads_rows:
            raise ConfigurationError(
                f"batches is {self._batches!r}, but {type(self).__name__} trains on packed batches, which the "
                "processes of a group share. Leave it out."
            )
        if self._classifies and isinstance(self.data_collator, FlashCPCollator):
            raise ConfigurationError(
                f"FlashCPCollator packs documents, but {type(self.model).__name__} scores rows. Use "
                "DataCollatorWithPadding, which is the default if processing_class is given."
            )

    def _read_rows(self, model: torch.nn.Module, handle: ContextParallelHandle) -> ContextParallelHandle:
        if self._row_trainer is not None and handle.rows is None:
            handle.read_rows(transformers_model(model), self._batches)
        return handle

    def _attach_reference(self) -> None:
        """Attach the reference model, if it is a separate model and not yet attached."""
        reference = getattr(self, "ref_model", None)
        if reference is None or self._row_trainer is None or attached_handle(reference) is not None:
            return
        try:
            self._read_rows(reference, attach(reference, self.accelerator))
        except FlashCPError as error:
            raise type(error)(f"The reference model cannot be attached: {error}") from error

    # Reading: with rows of its own, a process is a data-parallel reader, as without context parallelism.

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Context manager in which accelerate prepares data loaders for the readers of this trainer."""
        state = self.accelerator.state
        mesh = getattr(state, "device_mesh", None)
        if self._batches != "shared" and mesh is not None:
            state.device_mesh = None
        try:
            yield
        finally:
            if mesh is not None:
                state.device_mesh = mesh

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        with self._reading():
            return super()._get_dataloader(*args, **kwargs)

    def _gathering(self) -> contextlib.AbstractContextManager:
        """Return a context manager in which the accelerator gathers the values of readers, not of all processes."""
        if self._row_trainer is None or self._row_trainer.generates:
            return contextlib.nullcontext()
        if self._row_pass is not None:
            return replaced(self.accelerator, "gather", _unchanged)
        if self.get_cp_size() == 1:
            return contextlib.nullcontext()
        gather = type(self.accelerator).gather.__get__(self.accelerator)
        return replaced(self.accelerator, "gather", lambda tree: _one_per_group(gather(tree), self))

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.compute_loss_func, GatheredLoss):
            inputs = self.compute_loss_func.prepare(inputs)
        with self._gathering():
            return super().compute_loss(model, inputs, *args, **kwargs)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | int | None:
        if not self._reads_rows:
            return super()._get_num_items_in_batch(batch_samples, device)
        counted = [batch["labels"].ne(IGNORE_INDEX).sum() for batch in batch_samples if "labels" in batch]
        if self.compute_loss_func is None or not counted:
            # TRL's losses and those of heads are means. With a count, Trainer would multiply them by the number of
            # processes, and leave out the division by gradient_accumulation_steps.
            return None
        count = torch.stack(counted).sum().to(device)
        if self._row_pass is not None or not self.args.average_tokens_across_devices:
            return count
        return self.accelerator.gather(count).sum() // self.get_cp_size()

    def _loss_of_rows(
        self,
        function: Callable[..., torch.Tensor],
        outputs: Any,
        labels: torch.Tensor | None,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the loss of a `compute_loss_func` for whole rows, scaled as Trainer expects."""
        loss = function(outputs, labels, num_items_in_batch=num_items_in_batch)
        if num_items_in_batch is None or not self.args.average_tokens_across_devices:
            return loss
        # Trainer multiplies by the number of processes. In evaluation, the count is that of this reader's batch.
        return loss / (self.get_cp_size() if self._row_pass is None else self.accelerator.num_processes)

    def _precompute_ref_logps(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        self._attach_models()
        if self.accelerator.num_processes > 1 and not getattr(dataset, "cache_files", None):
            raise ConfigurationError(
                "precompute_ref_log_probs stores log probabilities beside the dataset's files, but this dataset is in "
                "memory, so processes would not find them. Save it with save_to_disk, and load it with "
                "datasets.load_from_disk."
            )
        with self._reading(), self._gathering():
            return super()._precompute_ref_logps(dataset, *args, **kwargs)

    # Training

    def training_step(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        turns = self.flashcp.turns
        if turns is None:
            return super().training_step(model, *args, **kwargs)

        def no_sync() -> contextlib.AbstractContextManager:
            if self.is_fsdp_enabled and self.accelerator.sync_gradients:
                return contextlib.nullcontext()  # reduced in each turn, because whole gradients would take memory
            return self.accelerator.no_sync(model)

        with turns.recording(), no_sync():
            loss = super().training_step(model, *args, **kwargs)
        with self.compute_loss_context_manager():
            turns.replay(model, self.accelerator.sync_gradients, no_sync)
        return loss

    # Evaluation

    def _check_row_evaluation(self) -> None:
        """Raise the error that the first evaluation would raise."""
        datasets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {None: self.eval_dataset}
        for dataset in datasets.values():
            if isinstance(dataset, IterableDataset) and not self._generates:
                require_length(dataset, self._readers)

    @property
    def _generates(self) -> bool:
        return self._row_trainer is not None and self._row_trainer.generates

    @property
    def _readers(self) -> int:
        """Number of different batches that are read at a time."""
        return self.accelerator.num_processes // self.get_cp_size()

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> tuple[Tree, Tree, Tree]:
        evaluation = self._row_pass
        if evaluation is None:
            return super().prediction_step(model, inputs, *args, **kwargs)
        batch = evaluation.begin(self._prepare_inputs(inputs))
        loss, predictions, labels = super().prediction_step(model, batch, *args, **kwargs)
        evaluation.end(loss)

        def of_readers(tree: Tree) -> Tree:
            return gather_in_order(self.accelerator, tree, self.get_cp_size())

        if loss is not None and "loss" in self.args.include_for_metrics:
            evaluation.losses = of_readers(loss.expand(evaluation.kept))
        if "inputs" in self.args.include_for_metrics:  # the loop reads them from the batch that it passed
            rows = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor) and value.dim()}
            inputs.update(of_readers(evaluation.counted(rows)))
        return loss, of_readers(evaluation.counted(predictions)), of_readers(evaluation.counted(labels))

    def _evaluate_rows(
        self, run: Callable[[], EvalLoopOutput], dataset: Any, metric_key_prefix: str
    ) -> EvalLoopOutput:
        """Run an evaluation loop, and give it the loss and metrics of a single process."""
        per_example = 1 if self._row_trainer is None else self._row_trainer.rows_per_example
        self._row_pass = evaluation = RowEvaluation(self, dataset, self._readers, per_example)
        try:
            # The loop gathers what prediction_step has already gathered.
            with replaced(self.accelerator, "gather_for_metrics", _unchanged):
                self.gather_function = evaluation.gathered
                output = run()
        finally:
            self._row_pass, self.gather_function = None, self.accelerator.gather_for_metrics
        loss, key = evaluation.finish(), f"{metric_key_prefix}_loss"
        if key in output.metrics:
            output.metrics[key] = loss
        return output


def _unchanged(tree: Tree, *args: Any, **kwargs: Any) -> Tree:
    return tree


def _one_per_group(gathered: Tree, trainer: Any) -> Tree:
    """Return the values of the first process of each group from those of all processes."""
    groups, size = trainer._readers, trainer.get_cp_size()
    return recursively_apply(lambda tensor: tensor.unflatten(0, (groups, size, -1))[:, 0].flatten(0, 1), gathered)
