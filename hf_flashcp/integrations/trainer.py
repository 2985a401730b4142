"""`FlashCPTrainerMixin` and `FlashCPTrainer`: Trainer under context parallelism, counters and losses right."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset, Sampler, SequentialSampler
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from .._parent_process import init_loader_worker
from ..data import FlashCPCollator, PackedDocuments, PackedDocumentStream
from ..data.features import LOSS_MASKS
from ..errors import BatchError, ConfigurationError
from ..exchange import require_agreement
from ..layout.batch import IGNORE_INDEX, context_parallel_group
from .attach import ContextParallelHandle, attach
from .evaluation import DocumentLosses, EvaluationSums, gather_rows, losses_by_document, whole_documents
from .plan_metrics import PlanMetrics
from .plugin import FlashCPPlugin, require_exact_arguments
from .reliable import ReliableTrainerMixin
from .trl_guards import refuse_other_trainers


class FlashCPTrainerMixin(ReliableTrainerMixin):
    """Put in front of a Trainer class: `class MyTrainer(FlashCPTrainerMixin, Trainer)`.

    Takes the [`FlashCPPlugin`] from `TrainingArguments(parallelism_config=...)`, or makes one from the environment
    that `accelerate launch` sets, attaches the model, and shards each batch after it has been counted. Plan metrics go
    to whatever the trainer reports to.

    Args:
        args: those of the Trainer class behind it.
        kwargs: likewise.

    Attributes:
        flashcp (`ContextParallelHandle`): see [`attach`].
        plan_metrics (`PlanMetrics`): means over the run so far.

    Raises:
        ConfigurationError: another parallelism_config, a TRL trainer other than SFTTrainer, DeepSpeed, or an option
            that would see full labels beside this rank's logits (label smoothing, compute_loss_func).
    """

    _losses_by_document = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._refuse_options()
        self.plan_metrics: PlanMetrics = PlanMetrics(self._dp_size)
        self.flashcp: ContextParallelHandle = attach(self.model, self.accelerator, on_plan=self.plan_metrics.add)
        self.flashcp.losses_add_up = self.args.average_tokens_across_devices

    def create_accelerator_and_postprocess(self) -> None:
        config = self.args.parallelism_config
        if config is None:
            self.args.parallelism_config = FlashCPPlugin()
        elif not isinstance(config, FlashCPPlugin):
            raise ConfigurationError(
                f"parallelism_config is a {type(config).__name__}. Use FlashCPPlugin(cp_size={config.cp_size})."
            )
        refuse_other_trainers(self.args)
        if self.args.deepspeed is not None:
            raise ConfigurationError("flashcp does not run under DeepSpeed. Use FSDP2 (fsdp_version: 2) or DDP.")
        if self.args.accelerator_config.dispatch_batches and self.args.parallelism_config.cp_size > 1:
            raise ConfigurationError(
                "accelerator_config has dispatch_batches: one process would read for all, which knows nothing of "
                "cp_size. Leave it out, or set it to False."
            )
        if self.args.accelerator_config.dispatch_batches is None:
            # Dispatching reads on rank 0 alone and does not know "cp" (accelerate/data_loader.py).
            self.args.accelerator_config.dispatch_batches = False
        super().create_accelerator_and_postprocess()

    @property
    def _dp_size(self) -> int:
        """Data-parallel groups."""
        return self.args.world_size // self.get_cp_size()

    @property
    def _dp_rank(self) -> int:
        """The group of this process."""
        return self.args.process_index // self.get_cp_size()

    def _refuse_options(self) -> None:
        if self.get_cp_size() == 1:
            return
        require_exact_arguments(self.args)
        if "inputs" in self.args.include_for_metrics:
            raise ConfigurationError(
                'include_for_metrics has "inputs", but under context parallelism the inputs are packed rows and the '
                "predictions documents. Leave it out: label_ids has a document's tokens wherever it has labels."
            )
        if self.compute_loss_func:
            raise ConfigurationError(
                "compute_loss_func needs whole documents, but under context parallelism each rank has the logits of "
                "its own tokens only. Leave it out, or evaluate with cp_size 1."
            )

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        wanted = ["seq_lengths"]
        if isinstance(self.data_collator, FlashCPCollator):
            wanted += [*LOSS_MASKS, *self.data_collator.per_token_keys]
        self._signature_columns += [column for column in wanted if column not in self._signature_columns]

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        loader = super()._get_dataloader(*args, **kwargs)
        inner = getattr(loader, "base_dataloader", loader)
        if isinstance(seed := inner.worker_init_fn, functools.partial) and "rank" in seed.keywords:
            # Trainer seeds every process's workers apart, but those of a group must draw alike.
            inner.worker_init_fn = functools.partial(seed.func, **{**seed.keywords, "rank": self._dp_rank})
        inner.worker_init_fn = functools.partial(init_loader_worker, inner.worker_init_fn)
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
                advice="The streams of data-parallel groups end at different steps, and some would wait for others in "
                "vain. Give all shards as many rows, gradient_accumulation_steps=1 (a stream that ends earlier begins "
                'again), or accelerator_config={"split_batches": True} (every group reads the whole stream).',
                error=BatchError,
            )
        return batches, targets

    def get_train_dataloader(self) -> DataLoader:
        if isinstance(self.train_dataset, (PackedDocuments, PackedDocumentStream)):
            if self.args.train_batch_size != 1:
                raise ConfigurationError(
                    f"per_device_train_batch_size is {self.args.train_batch_size}, but packed rows are batches "
                    "already. Set it to 1."
                )
            self.train_dataset.for_run(
                cp_size=self.get_cp_size(),
                dp_size=self._dp_size,
                gradient_accumulation_steps=self.args.gradient_accumulation_steps,
            )
        return super().get_train_dataloader()

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        # In order: packs next to each other take about the same time, and their documents are shuffled.
        return (
            SequentialSampler(dataset) if isinstance(dataset, PackedDocuments) else super()._get_train_sampler(dataset)
        )

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | int | None:
        targets = super()._get_num_items_in_batch(batch_samples, device)
        if targets is None:
            return None
        if not self.args.average_tokens_across_devices:
            # A process's own targets over cp_size: transformers 5.17 rounds that down to a whole number.
            labels = (
                batch["shift_labels"] if "shift_labels" in batch else batch["labels"][..., 1:]
                for batch in batch_samples
            )
            # A number and no tensor, since FSDP2 casts tensors of floats to its param_dtype, and bf16 cannot count.
            return max(int(sum(each.ne(IGNORE_INDEX).sum() for each in labels)), 1) / self.get_cp_size()
        # A whole number, for the same reason. Without any target the mean is 0 / 0, which would end the run.
        return torch.as_tensor(targets, device=device).round().long().clamp(min=1)

    def _prepare_context_parallel_inputs(
        self, model: torch.nn.Module, inputs: dict[str, Any]
    ) -> tuple[Callable[[], contextlib.AbstractContextManager], dict[str, Any]]:
        return contextlib.nullcontext, self.flashcp.shard(self._prepare_inputs(inputs))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs.update(self.plan_metrics.take_interval_means())
            if isinstance(self.train_dataset, (PackedDocuments, PackedDocumentStream)):
                logs.update(self.train_dataset.metrics())
        super().log(logs, *args, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        group, _, cp_size = context_parallel_group(self.flashcp.mesh)
        if cp_size > 1 and inputs.get("labels") is None and not prediction_loss_only:
            raise ConfigurationError(
                "Predictions under context parallelism are put together from documents with labels, which this batch "
                "has not. Give it labels (-100 where there is no target), or predict with cp_size 1."
            )
        if (cp_size == 1 and not self._losses_by_document) or inputs.get("labels") is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        labels = inputs["labels"]
        inputs = self.flashcp.shard(self._evaluated.mask_repeated_rows(inputs))
        # The batch's targets (1 if it has none), and no factor for the number of processes: the ranks' losses add up
        # to the batch's mean.
        inputs["num_items_in_batch"] = inputs["num_items_in_batch"] * cp_size
        outputs = None
        with torch.no_grad(), self.compute_loss_context_manager(), _loss_not_scaled(self.args):
            if self._losses_by_document:
                outputs = model(**inputs)
                loss = outputs["loss"]
            else:
                loss = self.compute_loss(
                    model,
                    inputs,
                    return_outputs=not prediction_loss_only,
                    num_items_in_batch=inputs["num_items_in_batch"],
                )
        if isinstance(loss, tuple):
            loss, outputs = loss
        loss, targets = loss.detach(), inputs["shift_labels"].ne(IGNORE_INDEX).sum()
        if group is not None:
            dist.all_reduce(loss, group=group)
            dist.all_reduce(targets, group=group)
        self._evaluated.add(loss, targets)
        if outputs is None:
            return loss, None, None
        plan, kept_tokens, logits = inputs["flashcp_plan"], self._evaluated.kept_tokens, outputs["logits"].detach()
        if self._losses_by_document:
            return loss, *losses_by_document(logits, inputs["shift_labels"], plan, kept_tokens)
        return loss, *whole_documents(logits, labels, plan, kept_tokens, self._preprocess_document)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        with self.plan_metrics.paused():
            return self._evaluation_loop(*args, **kwargs)

    def _evaluation_loop(self, dataloader: DataLoader, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        cp_size = self.get_cp_size()
        if cp_size == 1 and not self._losses_by_document:
            return super().evaluation_loop(dataloader, *args, **kwargs)
        self._evaluated = EvaluationSums(dataloader.dataset, self._dp_size, self._dp_rank)
        # Documents are preprocessed one by one, and gathered from one rank of each group.
        self._preprocess_document, self.preprocess_logits_for_metrics = self.preprocess_logits_for_metrics, None
        self.gather_function = functools.partial(gather_rows, accelerator=self.accelerator, cp_size=cp_size)
        # It drops what processes beyond the dataset's last row bring, of a batch that every rank has a part of.
        gather_for_metrics, self.accelerator.gather_for_metrics = (
            self.accelerator.gather_for_metrics,
            self.accelerator.gather,
        )
        try:
            output = super().evaluation_loop(dataloader, *args, **kwargs)
        finally:
            self.preprocess_logits_for_metrics = self._preprocess_document
            self.gather_function = self.accelerator.gather_for_metrics = gather_for_metrics
        # Trainer averages batches, and drops part of the last one as if every process had had its own.
        loss_sum, targets = self.accelerator.reduce(self._evaluated.sums.to(self.args.device), "sum").tolist()
        loss_key = next((key for key in output.metrics if key.endswith("_loss")), None)
        if loss_key is not None and targets > 0:
            output.metrics[loss_key] = loss_sum / targets
        return output

    def document_losses(self, dataset: Any = None) -> DocumentLosses:
        """Loss and perplexity of each document of a dataset, whatever batches and ranks share it.

        Args:
            dataset (`Dataset`, *optional*): rows as for evaluation; defaults to the `eval_dataset`.

        Returns:
            `DocumentLosses`: in the order of the dataset, on every process.
        """
        compute_metrics, self.compute_metrics = self.compute_metrics, None
        self._losses_by_document = True
        try:
            output = self.predict(self.eval_dataset if dataset is None else dataset)
        finally:
            self._losses_by_document, self.compute_metrics = False, compute_metrics
        return DocumentLosses(output.predictions[:, 0], output.label_ids[:, 0])

    # Trainer adds these up over all processes, but cp_size of them work on the same batch.

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        before = self.state.num_input_tokens_seen
        super()._track_num_input_tokens(inputs)
        self.state.num_input_tokens_seen = before + (self.state.num_input_tokens_seen - before) // self.get_cp_size()

    def floating_point_ops(self, inputs: dict[str, Any]) -> float:
        return super().floating_point_ops(inputs) / self.get_cp_size()


class FlashCPTrainer(FlashCPTrainerMixin, Trainer):
    """`transformers.Trainer` with context parallelism: [`FlashCPTrainerMixin`] in front of it.

    Without a `data_collator` it uses a [`FlashCPCollator`] with the plugin's strategy.

    Args:
        args: those of `Trainer`.
        kwargs: likewise.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if kwargs.get("data_collator") is None and len(args) < 3:
            self.data_collator = FlashCPCollator(self.get_cp_size(), strategy=self.args.parallelism_config.strategy)


@contextlib.contextmanager
def _loss_not_scaled(args: TrainingArguments) -> Iterator[None]:
    """`compute_loss` without the factor that makes up for DDP's mean of gradients."""
    averages, args.average_tokens_across_devices = args.average_tokens_across_devices, False
    try:
        yield
    finally:
        args.average_tokens_across_devices = averages
