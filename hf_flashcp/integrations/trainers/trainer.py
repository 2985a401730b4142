"""`FlashCPTrainerMixin` and `FlashCPTrainer`: Trainer with context parallelism and correct counters and losses."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, IterableDataset, Sampler, SequentialSampler
from transformers import Trainer

from ...data import FlashCPCollator, PackedDocuments, PackedDocumentStream
from ...data.boundaries import IGNORE_INDEX
from ...data.features import LOSS_MASKS
from ...distributed import require_agreement
from ...distributed.parent_process import init_loader_worker
from ...errors import BatchError, ConfigurationError
from ..attach import attach, attached_handle, transformers_model
from ..handle import ContextParallelHandle
from ..models.checkpointing import complete_checkpointing_options
from ..plugin import FlashCPPlugin, require_exact_arguments
from .evaluation import DocumentLosses, target_labels
from .fault_tolerance import ReliableTrainerMixin
from .gathered_loss import GatheredLoss, gathers
from .plan_metrics import PlanMetrics
from .planned_batches import plan_where_collated
from .trainer_evaluation import EvaluatingTrainerMixin
from .trl_guards import computes_fused_loss, is_sft_trainer, refuse_other_trainers
from .whole_row_trainer import WholeRowTrainerMixin


STATE_KEY = "hf_flashcp"
"""Where trainer_state.json has the kernels that ran, among the states of callbacks."""


class FlashCPTrainerMixin(WholeRowTrainerMixin, EvaluatingTrainerMixin, ReliableTrainerMixin):
    """A mixin that adds context parallelism to a Trainer class: `class MyTrainer(FlashCPTrainerMixin, Trainer)`.

    It takes the [`FlashCPPlugin`] from `TrainingArguments(parallelism_config=...)`, or creates one from the
    environment of `accelerate launch`. It attaches the model, and shards each batch after the trainer has counted its
    tokens and targets. Before TRL's preference and RL trainers, and with models that have a classification head, it
    shards the forwards of whole rows (docs/preference.md). A model that replaces the first one (`model_init`, a
    hyperparameter search, `trainer.model = other`) is attached too. Plan metrics are reported wherever the trainer
    reports its logs. Evaluation gives the same results for every cp_size, including 1.

    Args:
        args: arguments of the Trainer class behind the mixin.
        kwargs: keyword arguments of the Trainer class behind the mixin.

    Attributes:
        flashcp (`ContextParallelHandle`): handle of the current model, see [`attach`].
        plan_metrics (`PlanMetrics`): means over the run so far.

    Raises:
        ConfigurationError: there is another parallelism_config, DeepSpeed, an every_n_layers below 1, `batches` that
            do not suit the trainer, or `skip_logits=True` beside something that needs logits. With a cp_size above 1
            also for other trainers of TRL, and on packed batches for options that would combine full labels with
            this rank's logits (label smoothing, a compute_loss_func without a parameter `flashcp_plan`, a
            prediction_step of the class behind). When training begins, also for an evaluation that would be refused
            later.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._refuse_options()
        if gathers(self.compute_loss_func) and not isinstance(self.compute_loss_func, GatheredLoss):
            self.compute_loss_func = GatheredLoss(self.compute_loss_func, self._plugin.cp_size)
        elif self._classifies and self.compute_loss_func is not None:
            self.compute_loss_func = functools.partial(self._loss_of_rows, self.compute_loss_func)
        if isinstance(self.data_collator, FlashCPCollator):
            self.data_collator.share_settings(self._plugin.plan_settings)
        self._attach_models()

    def _attach_models(self) -> None:
        if "flashcp" not in vars(self):
            self.plan_metrics: PlanMetrics = PlanMetrics(self.args.world_size // self._plugin.cp_size)
            self.flashcp: ContextParallelHandle = self._attach(self.model)
        self._attach_reference()

    def _attach(self, model: torch.nn.Module) -> ContextParallelHandle:
        handle = attach(model, self.accelerator, on_plan=self.plan_metrics.add)
        handle.losses_add_up = self.args.average_tokens_across_devices
        if self._reads_rows:
            return self._read_rows(model, handle)
        wanted, reader = self.args.parallelism_config.skip_logits, self._reader_of_logits()
        if wanted and reader is not None:
            raise ConfigurationError(f"skip_logits is True, but {reader} needs logits. Leave one of them out.")
        handle.skip_logits = wanted is not False and reader is None
        return handle

    def _reader_of_logits(self) -> str | None:
        """Return what uses the logits of training batches, or `None`."""
        if self.compute_loss_func is not None:
            return "compute_loss_func"
        if self.label_smoother is not None:
            return "label_smoothing_factor"
        classes = [each for each in type(self).__mro__ if each is not WholeRowTrainerMixin]
        owner = next(each for each in classes if "compute_loss" in vars(each))
        return None if owner is Trainer or computes_fused_loss(owner) else f"compute_loss of {owner.__name__}"

    @property
    def model(self) -> torch.nn.Module:
        """The attached model. If there is a `model_init`, `train()` replaces it."""
        return self._model

    @model.setter
    def model(self, model: torch.nn.Module) -> None:
        earlier = getattr(self, "flashcp", None)
        if earlier is not None and transformers_model(model) is not transformers_model(self._model):
            if attached_handle(model) is not earlier:  # a copy of the model keeps its handle
                self.flashcp = self._attach(model)
                earlier.remove()
            self.model_wrapped = model  # the model that train() uses
        self._model = model

    def create_accelerator_and_postprocess(self) -> None:
        config = self.args.parallelism_config
        if config is None:
            self.args.parallelism_config = FlashCPPlugin()
        elif not isinstance(config, FlashCPPlugin):
            raise ConfigurationError(
                f"parallelism_config is a {type(config).__name__}. Use FlashCPPlugin(cp_size={config.cp_size})."
            )
        refuse_other_trainers(self)
        self._refuse_shared_rollouts()
        complete_checkpointing_options(self.args)
        if self.args.deepspeed is not None:
            raise ConfigurationError("flashcp does not run under DeepSpeed. Use FSDP2 (fsdp_version: 2) or DDP.")
        if self.args.accelerator_config.dispatch_batches and self.args.parallelism_config.cp_size > 1:
            raise ConfigurationError(
                "accelerator_config has dispatch_batches: one process would read batches for all others, without "
                "taking cp_size into account. Leave it out, or set it to False."
            )
        if self.args.accelerator_config.dispatch_batches is None:
            # Dispatching reads on rank 0 only, and ignores the mesh dimension "cp" (accelerate/data_loader.py).
            self.args.accelerator_config.dispatch_batches = False
        # Batches in pinned memory move to the device while the host goes on.
        if self.args.dataloader_pin_memory:
            self.args.accelerator_config.non_blocking = True
        super().create_accelerator_and_postprocess()
        if hasattr(self, "flashcp"):  # a trial of a hyperparameter search has set arguments
            self._refuse_options()

    def _wrap_model(self, model: torch.nn.Module, training: bool = True, dataloader: Any = None) -> torch.nn.Module:
        bare = getattr(model, "_orig_mod", model)
        prepared = any(getattr(each, "_is_accelerate_prepared", False) for each in (model, bare))
        if training and prepared and not self.is_fsdp_enabled and not isinstance(bare, DistributedDataParallel):
            # The model was prepared for evaluation, without DDP. accelerate would not wrap it again, so gradients
            # would not be averaged.
            model = self.accelerator.unwrap_model(bare, keep_fp32_wrapper=False)
            model._is_accelerate_prepared = False
            self.accelerator._models.clear()
        return super()._wrap_model(model, training, dataloader)

    @property
    def _dp_size(self) -> int:
        """Number of data-parallel groups."""
        return self.args.world_size // self.get_cp_size()

    def _refuse_options(self) -> None:
        self._refuse_batches()
        if self._plugin.cp_size == 1:
            return
        require_exact_arguments(self.args, reads_rows=self._reads_rows)
        if self._reads_rows:
            return
        if (owner := self._own_prediction_step()) is not None:
            raise ConfigurationError(
                f"{owner.__name__} has a prediction_step of its own, which would get only this rank's part of the "
                f"batch. Remove it, or override prediction_step in a subclass of {type(self).__name__}."
            )
        known = {"labels", "shift_labels", *getattr(self.data_collator, "per_token_keys", ())}
        if not self.label_names or not {*self.label_names} <= known:
            raise ConfigurationError(
                f"label_names is {self.label_names}, but under context parallelism labels must have one value per "
                "token. Leave it out, or add the other columns to per_token_keys of FlashCPCollator."
            )
        if self.compute_loss_func and (not gathers(self.compute_loss_func) or is_sft_trainer(self)):
            raise ConfigurationError(
                "compute_loss_func needs whole documents, but under context parallelism each rank has the logits of "
                "its own tokens only. Give it a parameter flashcp_plan, and bring values of tokens together with "
                "hf_flashcp.gather_tokens(values, flashcp_plan), or use cp_size 1."
            )

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        wanted = ["seq_lengths"]
        if isinstance(self.data_collator, FlashCPCollator):
            wanted += [*LOSS_MASKS, *self.data_collator.per_token_keys]
        self._signature_columns += [column for column in wanted if column not in self._signature_columns]

    def _get_dataloader(self, *args: Any, is_training: bool = False, **kwargs: Any) -> DataLoader:
        loader = super()._get_dataloader(*args, is_training=is_training, **kwargs)
        inner = getattr(loader, "base_dataloader", loader)
        if isinstance(seed := inner.worker_init_fn, functools.partial) and "rank" in seed.keywords:
            # Trainer seeds the workers of every process differently, but those of a group must draw the same numbers.
            group = self.args.process_index // self.get_cp_size()
            inner.worker_init_fn = functools.partial(seed.func, **{**seed.keywords, "rank": group})
        inner.worker_init_fn = functools.partial(init_loader_worker, inner.worker_init_fn)
        # Another prediction step may not take plans.
        if not self._reads_rows and (is_training or self._own_prediction_step() is None):
            plan_where_collated(loader, self.flashcp.plan_settings)
        return loader

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        batches, targets = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches and num_batches > 1 and self._dp_size > 1 and isinstance(self.train_dataset, IterableDataset):
            require_agreement(
                "accumulated batches",
                {"batches": len(batches)},
                dist.group.WORLD,
                advice="The streams of data-parallel groups end at different steps, so some would wait for others "
                "until they time out. Give all shards the same number of rows, set gradient_accumulation_steps=1 (a "
                'stream that ends early starts again), or set accelerator_config={"split_batches": True} (every group '
                "reads the whole stream).",
                error=BatchError,
            )
        return batches, targets

    def get_train_dataloader(self) -> DataLoader:
        if isinstance(self.train_dataset, (PackedDocuments, PackedDocumentStream)):
            if self.args.train_batch_size != 1:
                raise ConfigurationError(
                    f"per_device_train_batch_size is {self.args.train_batch_size}, but packed rows are batches "
                    "already. Set per_device_train_batch_size to 1."
                )
            self.train_dataset.for_run(
                cp_size=self.get_cp_size(),
                dp_size=self._dp_size,
                gradient_accumulation_steps=self.args.gradient_accumulation_steps,
            )
        return super().get_train_dataloader()

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        # In order, because consecutive packs take about the same time. Their documents are already shuffled.
        return (
            SequentialSampler(dataset) if isinstance(dataset, PackedDocuments) else super()._get_train_sampler(dataset)
        )

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | int | None:
        targets = super()._get_num_items_in_batch(batch_samples, device)
        if targets is None or self._reads_rows:
            return targets
        if not self.args.average_tokens_across_devices:
            # The process's own targets divided by cp_size, which transformers 5.17 would round down to an integer.
            # A Python number, because FSDP2 casts floating-point tensors to its param_dtype, and bf16 rounds counts.
            own = sum(target_labels(batch).ne(IGNORE_INDEX).sum() for batch in batch_samples)
            return max(int(own), 1) / self.get_cp_size()
        # An integer, for the same reason. At least 1, because the mean over no targets, 0 / 0, would end the run.
        return torch.as_tensor(targets, device=device).round().long().clamp(min=1)

    def _prepare_context_parallel_inputs(
        self, model: torch.nn.Module, inputs: dict[str, Any]
    ) -> tuple[Callable[[], contextlib.AbstractContextManager], dict[str, Any]]:
        if self._reads_rows:  # which the model's forward shards
            return super()._prepare_context_parallel_inputs(model, inputs)
        return contextlib.nullcontext, self.flashcp.shard(self._prepare_inputs(inputs))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs.update(self.plan_metrics.take_interval_means())
            if isinstance(self.train_dataset, (PackedDocuments, PackedDocumentStream)):
                logs.update(self.train_dataset.metrics())
        if self.flashcp.kernels:
            # Logs hold numbers only. The state of callbacks is saved in trainer_state.json, where the report finds it.
            self.state.stateful_callbacks[STATE_KEY] = {"args": {}, "attributes": {"kernels": self.flashcp.kernels}}
        super().log(logs, *args, **kwargs)

    def _load_callback_state(self) -> None:
        self.state.stateful_callbacks.pop(STATE_KEY, None)  # not a callback: Trainer would warn that it is missing
        super()._load_callback_state()

    def document_losses(self, dataset: Any = None) -> DocumentLosses:
        """Compute the loss and perplexity of each document of a dataset, independent of batches and ranks.

        Args:
            dataset (`Dataset`, *optional*): dataset with rows as for evaluation; defaults to the `eval_dataset`.

        Returns:
            `DocumentLosses`: losses in the order of the dataset, on every process.
        """
        if self._reads_rows:
            raise ConfigurationError(f"{type(self).__name__} trains on whole rows, so it has no losses of documents.")
        compute_metrics, self.compute_metrics = self.compute_metrics, None
        concatenates, self.args.eval_do_concat_batches = self.args.eval_do_concat_batches, True
        self._losses_by_document = True
        try:
            output = self.predict(self.eval_dataset if dataset is None else dataset)
        finally:
            self._losses_by_document, self.compute_metrics = False, compute_metrics
            self.args.eval_do_concat_batches = concatenates
        return DocumentLosses(output.predictions[:, 0], output.label_ids[:, 0])

    # Trainer sums the following counts over all processes, but cp_size processes work on the same batch.

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        before = self.state.num_input_tokens_seen
        super()._track_num_input_tokens(inputs)
        self.state.num_input_tokens_seen = before + (self.state.num_input_tokens_seen - before) // self.get_cp_size()

    def floating_point_ops(self, inputs: dict[str, Any]) -> float:
        return super().floating_point_ops(inputs) / self.get_cp_size()


class FlashCPTrainer(FlashCPTrainerMixin, Trainer):
    """`transformers.Trainer` with context parallelism, see [`FlashCPTrainerMixin`].

    Its default `data_collator` is a [`FlashCPCollator`].

    Args:
        args: arguments of `Trainer`.
        kwargs: keyword arguments of `Trainer`.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if kwargs.get("data_collator") is None and len(args) < 3 and not self._classifies:
            self.data_collator = FlashCPCollator(settings=self.args.parallelism_config.plan_settings)
