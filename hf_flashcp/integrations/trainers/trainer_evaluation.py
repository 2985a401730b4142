"""The part of `FlashCPTrainerMixin` that evaluates: eval_loss over all targets, and predictions of whole documents."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Seq2SeqTrainer, Trainer
from transformers.trainer_utils import EvalLoopOutput, IntervalStrategy

from ...data import FlashCPCollator
from ...data.boundaries import IGNORE_INDEX
from ...distributed.process_group import context_parallel_group
from ...errors import ConfigurationError
from ...layout import RankPlan
from ..handle import ContextParallelHandle
from .evaluation import EvaluationPass, require_known_rows, require_length, target_labels
from .plan_metrics import PlanMetrics
from .predictions import (
    Tree,
    documents_of,
    first_rows,
    losses_by_document,
    losses_by_row,
    losses_of_logits,
    per_token_outputs,
    refuse_outputs,
    whole_documents,
    whole_rows,
)
from .trl_guards import is_sft_trainer


_OUTPUTS_OF_A_BATCH = {"output_router_logits": ("aux_loss", "router_logits"), "output_attentions": ("attentions",)}


class EvaluatingTrainerMixin:
    """The part of [`FlashCPTrainerMixin`] that evaluates, with the same results for every cp_size, including 1.

    `eval_loss` is the mean over all targets. The predictions, labels, inputs and losses that `compute_metrics` gets
    have one row per document. A padded batch, which runs unsharded with cp_size 1, keeps its rows.
    """

    flashcp: ContextParallelHandle
    plan_metrics: PlanMetrics
    _pass: EvaluationPass | None = None
    _losses_by_document = False

    def train(self, *args: Any, **kwargs: Any) -> Any:
        if self.args.eval_strategy != IntervalStrategy.NO or self.args.eval_on_start:
            self._check_evaluation(kwargs.get("ignore_keys_for_eval", args[2] if len(args) > 2 else None))
        return super().train(*args, **kwargs)

    def _check_evaluation(self, ignore_keys: list[str] | None) -> None:
        """Raise the error that the first evaluation would raise."""
        if self._reads_rows:
            return self._check_row_evaluation()
        flashcp_collator = isinstance(self.data_collator, FlashCPCollator)
        datasets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {None: self.eval_dataset}
        for name in datasets if self.get_cp_size() > 1 else ():
            require_length(datasets[name], self._dp_size)
            if not flashcp_collator and self._dp_size > 1:
                require_known_rows(self.get_eval_dataloader(name), self.args.eval_batch_size)
        predicts = self.compute_metrics is not None and not self.args.prediction_loss_only
        if predicts:
            self._refuse_predictions()
        if predicts and (self.get_cp_size() > 1 or flashcp_collator) and not is_sft_trainer(self):
            config, ignored = self.model.config.get_text_config(), self._ignored_outputs(ignore_keys)
            for option, keys in _OUTPUTS_OF_A_BATCH.items():
                if getattr(config, option, False) and not {*keys} <= {*ignored}:
                    refuse_outputs(keys)

    def _refuse_predictions(self) -> None:
        if self.args.parallelism_config.skip_logits:
            raise ConfigurationError(
                "skip_logits is True, but compute_metrics and predictions need logits. Leave it out, or set "
                "prediction_loss_only=True."
            )

    def _ignored_outputs(self, ignore_keys: list[str] | None) -> list[str]:
        if ignore_keys is not None:
            return ignore_keys
        return getattr(self.model.config, "keys_to_ignore_at_inference", ["cache", "past_key_values"])

    def _own_prediction_step(self) -> type | None:
        """Return the class behind this one whose `prediction_step` does more than this class can replace, if any."""
        behind = type(self).__mro__[type(self).__mro__.index(EvaluatingTrainerMixin) + 1 :]
        owner = next(each for each in behind if "prediction_step" in vars(each))
        generates = owner is Seq2SeqTrainer and self.args.predict_with_generate
        known = owner in (Trainer, Seq2SeqTrainer) or is_sft_trainer(self, owner)
        return owner if generates or not known else None

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        evaluation, cp_size = self._pass, self.get_cp_size()
        if evaluation is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        batch = evaluation.mask_repeated_rows(self._prepare_inputs(inputs))
        labels = tuple(batch.get(name) for name in self.label_names)
        if not labels or any(each is None for each in labels):
            return self._predict_without_labels(model, batch, prediction_loss_only, ignore_keys)
        labels = labels[0] if len(labels) == 1 else labels
        targets = target_labels(batch).ne(IGNORE_INDEX).sum()
        num_items = None if self._losses_by_document else self._count_for_loss(batch, targets)
        shard = self.flashcp.shard(batch)
        if not (prediction_loss_only or self._losses_by_document):
            self._refuse_predictions()
        if self.args.use_liger_kernel:  # Liger's forward takes this argument, but has no losses of tokens
            shard["skip_logits"] = prediction_loss_only and not self._losses_by_document
        elif isinstance(shard.get("flashcp_plan"), RankPlan):
            shard["skip_logits"] = self.flashcp.skip_logits and (prediction_loss_only or self._losses_by_document)
        loss = None
        with torch.no_grad(), self.compute_loss_context_manager():
            if self._losses_by_document:
                outputs = model(**{key: value for key, value in shard.items() if key != "labels"})
            else:
                loss = self.compute_loss(
                    model, dict(shard), return_outputs=not prediction_loss_only, num_items_in_batch=num_items
                )
                loss, outputs = loss if isinstance(loss, tuple) else (loss, None)
        if loss is not None:
            # Either compute_loss multiplies by the number of processes, or the ranks' mean is the group's loss.
            multiplied = num_items is not None and self.args.average_tokens_across_devices
            weight = targets.double() / (self.accelerator.num_processes if multiplied else cp_size)
            group, _, _ = context_parallel_group(self.flashcp.mesh)
            loss = evaluation.add(loss.detach().mean() * weight, targets, group)
        if outputs is None:
            return loss, None, None
        predictions, label_ids = self._predictions(outputs, labels, batch, shard, ignore_keys)
        if loss is not None and "loss" in self.args.include_for_metrics:
            documents = len(label_ids[0] if isinstance(label_ids, tuple) else label_ids)
            evaluation.losses = evaluation.gather(loss.expand(documents))
        if "inputs" in self.args.include_for_metrics:  # the loop reads them from the batch that it passed
            shown = self._inputs_for_metrics(batch, shard)
            inputs.clear()
            inputs.update(shown)
        return loss, evaluation.gather(predictions), evaluation.gather(label_ids)

    def _count_for_loss(self, batch: dict[str, Any], targets: torch.Tensor) -> torch.Tensor | float | None:
        """Return `num_items_in_batch` if the loss accepts it.

        It counts the targets of this group's batch, so that loss terms that are not sums over targets count once per
        batch.
        """
        if not (self.model_accepts_loss_kwargs or self.compute_loss_func is not None):
            return None
        if self.args.average_tokens_across_devices:
            return targets.clamp(min=1)
        return self._get_num_items_in_batch([batch], self.args.device)

    def _predict_without_labels(self, model, batch, prediction_loss_only, ignore_keys):
        if self.get_cp_size() > 1 and not prediction_loss_only:
            raise ConfigurationError(
                "Predictions under context parallelism need labels, but this batch has none. Add labels (-100 where "
                "there is no target), or predict with cp_size 1."
            )
        loss, outputs, labels = super().prediction_step(model, batch, prediction_loss_only, ignore_keys)
        if outputs is None:
            return loss, None, None
        kept, rows = self._pass.kept_rows, self._pass.rows
        outputs, labels = whole_rows(outputs, labels, kept, rows, self._pass.preprocess)
        return loss, self._pass.gather(outputs), self._pass.gather(labels)

    def _predictions(
        self, outputs: Any, labels: Tree, batch: dict[str, Any], shard: dict[str, Any], ignore_keys: list[str] | None
    ) -> tuple[Tree, Tree]:
        """Return the predictions and labels of this group's batch that the evaluation loop collects."""
        evaluation, plan = self._pass, shard.get("flashcp_plan")
        sharded = isinstance(plan, RankPlan)
        if self._losses_by_document:
            losses = self.flashcp.token_losses if sharded else None
            if losses is None:
                logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
                if not sharded:
                    return losses_by_row(logits, batch["labels"], evaluation.kept_rows)
                losses = losses_of_logits(logits, shard["shift_labels"])
            return losses_by_document(losses, shard["shift_labels"], plan, evaluation.kept_tokens)
        if is_sft_trainer(self):
            outputs = {"logits": outputs["logits"]}
        tokens = len(plan.layout.token_index) if sharded else None
        outputs = per_token_outputs(outputs, self._ignored_outputs(ignore_keys), tokens)
        if sharded:
            return whole_documents(outputs, labels, plan, evaluation.kept_tokens, evaluation.preprocess)
        return whole_rows(outputs, labels, evaluation.kept_rows, evaluation.rows, evaluation.preprocess)

    def _inputs_for_metrics(self, batch: dict[str, Any], shard: dict[str, Any]) -> dict[str, torch.Tensor]:
        evaluation, plan = self._pass, shard.get("flashcp_plan")
        if isinstance(plan, RankPlan):
            return evaluation.gather(documents_of(batch, plan, evaluation.kept_tokens))
        tensors = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}
        return evaluation.gather(first_rows(tensors, evaluation.kept_rows, evaluation.rows))

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        arguments = (dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        # With cp_size 1, some options need the evaluation of the class behind this one.
        as_stock = self._own_prediction_step() is not None or self.args.eval_use_gather_object
        with self.plan_metrics.paused():
            if self._reads_rows and not self._generates:
                run = functools.partial(super().evaluation_loop, *arguments)
                return self._evaluate_rows(run, dataloader.dataset, metric_key_prefix)
            if as_stock and self.get_cp_size() == 1 and not self._losses_by_document:
                return super().evaluation_loop(*arguments)
            return self._evaluation_loop(*arguments)

    def _evaluation_loop(self, dataloader: DataLoader, *arguments: Any) -> EvalLoopOutput:
        evaluation = EvaluationPass(self, dataloader.dataset)
        compute_metrics, gather_for_metrics = self.compute_metrics, self.accelerator.gather_for_metrics
        self._pass, self.preprocess_logits_for_metrics = evaluation, None  # the pass calls it for each document
        self.gather_function = evaluation.gathered
        # gather_for_metrics drops the results of processes beyond the dataset's last row, but here every rank has a
        # part of each batch.
        self.accelerator.gather_for_metrics = self.accelerator.gather
        if compute_metrics is not None:
            self.compute_metrics = evaluation.recording(compute_metrics)
        try:
            output = super().evaluation_loop(dataloader, *arguments)
        finally:
            self._pass, self.preprocess_logits_for_metrics = None, evaluation.preprocess
            self.compute_metrics = compute_metrics
            self.gather_function = self.accelerator.gather_for_metrics = gather_for_metrics
        # Trainer averages the losses of batches. A "loss" returned by compute_metrics replaces that average.
        loss_key = f"{arguments[-1]}_loss"
        mean_loss = evaluation.mean_loss()
        if loss_key in output.metrics and not evaluation.loss_is_a_metric:
            output.metrics[loss_key] = mean_loss
        return output
