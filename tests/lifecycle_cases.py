"""Functions that workers run for the tests of Trainers whose model changes."""

import copy
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist
from transformers import Trainer
from transformers.trainer_utils import HPSearchBackend

from hf_flashcp import FlashCPCallback, FlashCPCollator, FlashCPPlugin
from hf_flashcp.integrations.attach import attached_handle, transformers_model
from tests.accelerate_state import fresh_accelerate
from tests.models import build_model, from_one_rank, largest_error, make_documents, per_document_gradients
from tests.trainer_cases import InOrder, KeepGradient, saving_arguments, training_arguments
from tests.wrapper_cases import fsdp_arguments, fsdp_on_device, full, plain_name, whole_gradients, with_lora


LENGTHS = [40, 3, 17, 25]


def other_model():
    """Return a model with other weights than `build_model`."""
    model = build_model("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    return model


def _trainer(make=training_arguments, cp_size=None, **options):
    cp_size = cp_size or dist.get_world_size()
    arguments = options.pop("arguments", {})
    keep = KeepGradient(whole_gradients)
    features = make_documents(LENGTHS, prompt=0.3)
    trainer = InOrder(
        args=make(
            parallelism_config=FlashCPPlugin(cp_size=cp_size),
            per_device_train_batch_size=len(LENGTHS) * cp_size // dist.get_world_size(),
            per_device_eval_batch_size=1,
            **{"max_steps": 1, **arguments},
        ),
        train_dataset=features,
        eval_dataset=features,
        callbacks=[keep],
        **options,
    )
    return trainer, keep, features


def _reference_of(model, lora=False):
    """Return a model with the same parameters under sdpa."""
    reference = build_model("llama", "sdpa")
    reference = with_lora(reference) if lora else reference
    values = {plain_name(name): full(value.detach()) for name, value in model.named_parameters()}
    reference.load_state_dict(values, strict=False)
    return reference


def _checked(trainer, keep, features, models, lora=False):
    """Return the errors of the last gradient and of eval_loss, and whether only the current model has a handle."""
    reference = _reference_of(trainer.model, lora)
    expected_loss, expected = from_one_rank(per_document_gradients, reference, features, own_loss=True)
    current = transformers_model(trainer.model)
    others = [transformers_model(model) for model in models if transformers_model(model) is not current]
    return {
        "gradient_error": largest_error(keep.steps[-1], expected),
        "loss_error": abs(trainer.evaluate()["eval_loss"] - expected_loss) / expected_loss,
        "handle_is_current": attached_handle(current) is trainer.flashcp and trainer.flashcp.plan is not None,
        "others_are_attached": any(attached_handle(model) is not None for model in others),
        "models": len({id(transformers_model(model)) for model in models}),
    }


class _Models(list):
    """A `model_init` that keeps the models that it creates."""

    def __call__(self, trial=None):
        torch.manual_seed(0)
        self.append(build_model("llama"))
        return self[-1]


def model_init(times):
    fresh_accelerate()
    models = _Models()
    trainer, keep, features = _trainer(model_init=lambda: models())
    for _ in range(times):
        trainer.train()
    return _checked(trainer, keep, features, models)


def train_twice():
    fresh_accelerate()
    model = build_model("llama")
    trainer, keep, features = _trainer(model=model)
    before = trainer.flashcp
    trainer.train()
    trainer.train()
    return _checked(trainer, keep, features, [model]) | {"same_handle": trainer.flashcp is before}


def evaluated_first(how, arguments, cp_size=None):
    """Train after an evaluation, for which accelerate prepares the model differently."""
    fresh_accelerate()
    model = build_model("llama", dtype=torch.float32 if "bf16" in arguments else torch.float64)
    trainer, keep, features = _trainer(model=model, arguments=arguments, cp_size=cp_size)
    getattr(trainer, how)(*[features] if how == "predict" else [])
    trainer.train()
    return _checked(trainer, keep, features, [model])


def assigned(how):
    """Assign `trainer.model = other` before or after training."""
    fresh_accelerate()
    first = build_model("llama")
    trainer, keep, features = _trainer(model=first)
    if how in ("after training", "a copy of a trained one"):
        trainer.train()
        trainer.evaluate()
    second = copy.deepcopy(first) if "copy" in how else other_model()
    trainer.model = second
    if how == "and evaluated":
        trainer.evaluate()
    trainer.train()
    models = [second] if "copy" in how else [first, second]
    return _checked(trainer, keep, features, models) | {"trained": trainer.model is second}


def wrapped_in_lora():
    """Add adapters to a model after its trainer has been created."""
    fresh_accelerate()
    model = build_model("llama")
    trainer, keep, features = _trainer(model=model)
    trainer.model = trainer.model_wrapped = with_lora(model)
    trainer.train()
    return _checked(trainer, keep, features, [model], lora=True)


def sharded_with_model_init():
    with fsdp_on_device():
        models = _Models()
        trainer, keep, features = _trainer(model_init=models, arguments=fsdp_arguments())
        trainer.train()
        return _checked(trainer, keep, features, models)


def _searched(trainer, trials):
    """Run `hyperparameter_search` with our own backend, and return the evaluation of each trial."""
    losses = []

    class Backend:
        def ensure_available(self):
            pass

        def run(self, trainer, n_trials, direction, **kwargs):
            for number, params in enumerate(trials):
                trainer.objective = None
                trainer.train(trial=SimpleNamespace(number=number, params=params))
                losses.append(trainer.evaluate()["eval_loss"])

    backends = {HPSearchBackend.OPTUNA: Backend}
    with (
        mock.patch("transformers.trainer.ALL_HYPERPARAMETER_SEARCH_BACKENDS", backends),
        mock.patch("transformers.integrations.hp_params", lambda trial: trial.params if trial else {}),
    ):
        trainer.hyperparameter_search(lambda trial: trial.params, backend="optuna")
    return losses


def search():
    """Run three trials, each with its own model, the last with a learning rate of 0."""
    fresh_accelerate()
    models = _Models()
    trainer, keep, features = _trainer(model_init=models)
    trials = [{"learning_rate": 0.5}, {"learning_rate": 0.1, "num_train_epochs": 1}, {"learning_rate": 0.0}]
    losses = _searched(trainer, trials)
    return _checked(trainer, keep, features, models) | {"losses": len(set(losses))}


def search_with_a_refused_option():
    fresh_accelerate()
    trainer, *_ = _trainer(model_init=_Models())
    _searched(trainer, [{"auto_find_batch_size": True}])


def model_init_with_another_attention():
    fresh_accelerate()
    made = iter(["flashcp", "sdpa"])
    trainer, *_ = _trainer(model_init=lambda: build_model("llama", next(made)))
    trainer.train()


def saved(how):
    """Use load_best_model_at_end, and resume. The trainer's model must be the attached one in both cases."""
    fresh_accelerate()
    directory = Path(tempfile.mkdtemp())
    shared = [str(directory)]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(shared, src=0)
    options = {"model_init": _Models()} if how == "resumed, model_init" else {"model": build_model("llama")}
    arguments = {"max_steps": 4, "output_dir": shared[0], "learning_rate": 0.5, "lr_scheduler_type": "constant"}
    if how == "best":
        arguments |= {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    trainer, keep, features = _trainer(saving_arguments, arguments=arguments, **options)
    trainer.train()
    if how != "best":
        trainer.train(resume_from_checkpoint=str(Path(shared[0]) / "checkpoint-2"))
    reference = _reference_of(trainer.model)
    expected, _ = from_one_rank(per_document_gradients, reference, features, own_loss=True)
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    found = trainer.evaluate()["eval_loss"]
    return {
        "loss_error": abs(found - expected) / expected,
        "best_error": abs(min(losses) - found) if losses else 0.0,
        "worst": max(losses) - min(losses) if losses else 1.0,
        "handle_is_current": attached_handle(trainer.model) is trainer.flashcp,
    }


def callback_with_model_init():
    """Train twice with a stock Trainer, which creates a new model each time."""
    fresh_accelerate()
    models, keep, callback = _Models(), KeepGradient(), FlashCPCallback()
    features = make_documents(LENGTHS, prompt=0.3)
    handles, errors = [], []
    trainer = Trainer(
        model_init=models,
        args=training_arguments(
            parallelism_config=FlashCPPlugin(cp_size=dist.get_world_size()),
            per_device_train_batch_size=len(LENGTHS),
            max_steps=1,
        ),
        train_dataset=features,
        data_collator=FlashCPCollator(dist.get_world_size()),
        callbacks=[keep, callback],
    )
    _, expected = from_one_rank(per_document_gradients, build_model("llama", "sdpa"), features, own_loss=True)
    for _ in range(2):
        trainer.train()
        handles.append(callback.handle)
        errors.append(largest_error(keep.steps[-1], expected))
    current = attached_handle(trainer.model) is callback.handle
    return {"errors": errors, "handles": len({*map(id, handles)}), "handle_is_current": current}
