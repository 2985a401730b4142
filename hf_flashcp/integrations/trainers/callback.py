"""`FlashCPCallback`: context parallelism for a stock Trainer."""

from __future__ import annotations

from typing import Any

from accelerate.data_loader import DataLoaderDispatcher
from accelerate.state import AcceleratorState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from ...errors import ConfigurationError
from ..attach import attach, transformers_model
from ..handle import ContextParallelHandle
from ..models.classification import is_classifier
from ..plugin import FlashCPPlugin, require_exact_arguments
from .plan_metrics import PlanMetrics
from .planned_batches import plan_where_collated


class FlashCPCallback(TrainerCallback):
    """A callback that attaches the model of a stock Trainer: `Trainer(..., callbacks=[FlashCPCallback()])`.

    The Trainer's arguments need `parallelism_config=FlashCPPlugin(cp_size=...)`. Losses and gradients are exact. The
    following limits do not apply to [`FlashCPTrainer`] and [`FlashCPTrainerMixin`]:

    - `num_input_tokens_seen` and `total_flos` count a shared batch cp_size times;
    - plan metrics are added to `trainer.state.log_history`, but reach only those trackers that come after this
      callback in the list of callbacks;
    - evaluation is refused, because Trainer averages losses as if every process had a separate batch.

    Attributes:
        handle (`ContextParallelHandle`, *optional*): handle of the attached model, see [`attach`].
        plan_metrics (`PlanMetrics`): means over the run so far.

    Raises:
        ConfigurationError: when training begins, if there is no [`FlashCPPlugin`], or if the model scores rows. With a
            cp_size above 1, or with `skip_logits=True`, also for evaluation and label smoothing, and with a cp_size
            above 1 for other options that would not be exact.
    """

    def __init__(self):
        self.handle: ContextParallelHandle | None = None
        self.plan_metrics: PlanMetrics = PlanMetrics()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model=None, **kwargs: Any
    ) -> None:
        config = args.parallelism_config
        if not isinstance(config, FlashCPPlugin):
            raise ConfigurationError(
                f"parallelism_config is {config!r}: FlashCPCallback needs "
                "TrainingArguments(parallelism_config=FlashCPPlugin(cp_size=...))."
            )
        inner = transformers_model(model)
        if is_classifier(inner):
            raise ConfigurationError(
                f"{type(inner).__name__} scores rows, and a stock Trainer would multiply its loss by the number of "
                "processes. Use FlashCPTrainer or FlashCPTrainerMixin."
            )
        if config.cp_size > 1:
            require_exact_arguments(args)
            if args.eval_strategy != IntervalStrategy.NO:
                self._refuse_evaluation()
            if isinstance(kwargs.get("train_dataloader"), DataLoaderDispatcher):
                raise ConfigurationError(
                    "The data loader dispatches batches from one process, which does not take cp_size into account. "
                    'Set TrainingArguments(accelerator_config={"dispatch_batches": False}).'
                )
        if config.skip_logits and (args.label_smoothing_factor or args.eval_strategy != IntervalStrategy.NO):
            raise ConfigurationError(
                "skip_logits is True, but a stock Trainer may read logits in evaluation, and does so with "
                "label_smoothing_factor. Use FlashCPTrainer or FlashCPTrainerMixin, or leave skip_logits out."
            )
        self.plan_metrics = PlanMetrics(args.world_size // config.cp_size)
        mesh = AcceleratorState().device_mesh if config.cp_size > 1 else None
        self.handle = attach(model, mesh, plugin=config, on_plan=self.plan_metrics.add)
        self.handle.losses_add_up = args.average_tokens_across_devices
        if (loader := kwargs.get("train_dataloader")) is not None:
            plan_where_collated(loader, self.handle.plan_settings)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if getattr(args.parallelism_config, "cp_size", 1) > 1:
            self._refuse_evaluation()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs=None, **kwargs: Any
    ) -> None:
        if logs is not None and "loss" in logs:
            means = self.plan_metrics.take_interval_means()
            for where in (logs, state.log_history[-1]):
                where.update(means)

    @staticmethod
    def _refuse_evaluation() -> None:
        raise ConfigurationError(
            "A stock Trainer cannot evaluate under context parallelism, because it averages and truncates losses as "
            "if every process had a separate batch. Use FlashCPTrainer or FlashCPTrainerMixin, or set "
            "eval_strategy='no'."
        )
