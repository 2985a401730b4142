"""Functions that workers run for the tests of evaluation."""

import tempfile

import numpy as np
import torch
import torch.distributed as dist
from datasets import Dataset
from torch.utils.data import IterableDataset
from transformers import (
    DataCollatorWithFlattening,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
)
from transformers.trainer_pt_utils import LabelSmoother
from trl import SFTConfig, SFTTrainer

from hf_flashcp import FlashCPCollator, FlashCPPlugin, FlashCPTrainer, FlashCPTrainerMixin
from hf_flashcp.integrations.gradient_check import relative_error
from hf_flashcp.integrations.models.checkpointing import CHECKPOINTING_ARGUMENT
from tests.accelerate_state import fresh_accelerate
from tests.models import build_model, from_one_rank, make_documents, per_document_gradients, target_count, tokenizer
from tests.trainer_cases import USE_DEVICE, training_arguments


def evaluating_arguments(**arguments):
    """Return the arguments of a run with two ranks per group that evaluates after each step."""
    defaults = dict(parallelism_config=FlashCPPlugin(cp_size=2), max_steps=1, eval_strategy="steps", eval_steps=1)
    return training_arguments(**{**defaults, **arguments})


def evaluation_loss(lengths, cp_size=None, per_batch=2):
    """Return eval_loss and the mean over all targets of the evaluation set, whose last batch is smaller."""
    fresh_accelerate()
    plugin = FlashCPPlugin(cp_size=cp_size or dist.get_world_size())
    features = make_documents(lengths)
    trainer = FlashCPTrainer(
        model=build_model("llama"),
        args=training_arguments(parallelism_config=plugin, per_device_eval_batch_size=per_batch),
        eval_dataset=features,
    )
    measured = trainer.evaluate()["eval_loss"]
    reference = build_model("llama", "sdpa")
    return measured, from_one_rank(per_document_gradients, reference, features, own_loss=True)[0]


def most_likely(logits, labels):
    """Serve as preprocess_logits_for_metrics: reduce a row of logits to the most likely tokens."""
    assert logits.shape[:2] == labels.shape and len(labels) == 1
    return logits.argmax(-1)


def predictions(lengths, cp_size, per_batch, preprocess=None, **collator_options):
    """Call `evaluate`, and return the inputs of compute_metrics, its metric, and the results for single documents."""
    fresh_accelerate()
    features, seen = make_documents(lengths), []

    def accuracy(prediction):
        seen.append(prediction)
        guessed = prediction.predictions if preprocess else prediction.predictions.argmax(-1)
        targets = prediction.label_ids[:, 1:]
        return {"accuracy": float((guessed[:, :-1] == targets)[targets != -100].mean())}

    trainer = FlashCPTrainer(
        model=build_model("llama"),
        args=training_arguments(
            parallelism_config=FlashCPPlugin(cp_size=cp_size), per_device_eval_batch_size=per_batch
        ),
        eval_dataset=features,
        data_collator=FlashCPCollator(cp_size, **collator_options),
        compute_metrics=accuracy,
        preprocess_logits_for_metrics=preprocess,
    )
    metrics = trainer.evaluate()
    reference, expected, right, total = build_model("llama", "sdpa"), [], 0, 0
    for feature in features:
        tokens = torch.tensor([feature["input_ids"]])
        with torch.no_grad():
            expected.append(reference(input_ids=tokens).logits[0])
        targets = torch.tensor(feature.get("labels", feature["input_ids"]))[1:]
        right += int((expected[-1][:-1].argmax(-1) == targets)[targets != -100].sum())
        total += int((targets != -100).sum())
    (found,) = seen
    errors = []
    for document, (feature, logits) in enumerate(zip(features, expected)):
        length = len(logits)
        labels = torch.tensor(feature.get("labels", feature["input_ids"]))
        assert found.label_ids[document, 1:length].tolist() == labels[1:].tolist()
        assert (found.label_ids[document, length:] == -100).all()
        ours = torch.from_numpy(found.predictions[document, :length])
        if preprocess:
            errors.append(float((ours != logits.argmax(-1)).sum()))
        else:
            errors.append(relative_error(ours, logits))
    return {
        "rows": len(found.predictions),
        "errors": errors,
        "accuracy": metrics["eval_accuracy"],
        "expected_accuracy": right / total,
        "predict_is_the_same": bool((trainer.predict(features).predictions == found.predictions).all()),
    }


def padded_predictions(lengths, cp_size, per_batch):
    return predictions(lengths, cp_size, per_batch, pad_to_multiple_of=64)


class _Generate(TrainerCallback):
    """Generates ten tokens from a prompt of each rank, after a training step and during evaluation."""

    def __init__(self):
        self.found = []

    def generate(self, model):
        was_training = model.training
        prompt = torch.arange(3, 9 + dist.get_rank())[None]
        with torch.no_grad():
            self.found.append(model.eval().generate(prompt, max_new_tokens=10, do_sample=False, eos_token_id=None))
        model.train(was_training)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.generate(model)

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        self.generate(model)


def generated_in_callbacks(lengths):
    """Return whether the trained model generates the same tokens as its parameters under sdpa (learning rate 0)."""
    fresh_accelerate()
    callback, features = _Generate(), make_documents(lengths)
    trainer = FlashCPTrainer(
        model=build_model("llama"),
        args=training_arguments(
            parallelism_config=FlashCPPlugin(cp_size=dist.get_world_size()),
            per_device_train_batch_size=2,
            max_steps=2,
            eval_strategy="steps",
            eval_steps=1,
        ),
        train_dataset=features,
        eval_dataset=features,
        callbacks=[callback],
    )
    trainer.train()
    reference = _Generate()
    reference.generate(build_model("llama", "sdpa"))
    return len(callback.found), all(torch.equal(tokens, reference.found[0]) for tokens in callback.found)


def document_losses(lengths, cp_size, per_batch):
    """Return loss sums and targets by document, their references, and the perplexity of a document without targets."""
    fresh_accelerate()
    features = make_documents(lengths, prompt=0.3)
    features[1]["labels"] = [-100] * lengths[1]
    trainer = FlashCPTrainer(
        model=build_model("llama"),
        args=training_arguments(
            parallelism_config=FlashCPPlugin(cp_size=cp_size), per_device_eval_batch_size=per_batch
        ),
        eval_dataset=features,
        compute_metrics=lambda prediction: {"never": 0.0},
    )
    found = trainer.document_losses()
    reference = build_model("llama", "sdpa")
    sums = [per_document_gradients(reference, [f], own_loss=True)[0] * target_count([f]) for f in features]
    sums[1] = 0.0
    return {
        "sums": found.loss_sum.tolist(),
        "expected": sums,
        "targets": found.targets.tolist(),
        "expected_targets": [target_count([feature]) for feature in features],
        "perplexity_is_that": bool(
            np.allclose(found.perplexity, np.exp(found.loss_sum / found.targets), equal_nan=True, rtol=1e-12)
        ),
        "metrics_are_left": trainer.compute_metrics is not None,
    }


class _SFTTrainer(FlashCPTrainerMixin, SFTTrainer):
    pass


def sft_evaluation(lengths, cp_size, per_batch, with_metrics):
    """Return eval_loss, TRL's eval_mean_token_accuracy and eval_entropy, and the references from single documents.

    The references treat all documents as one batch, because TRL averages over batches.
    """
    fresh_accelerate()
    features, seen = make_documents(lengths), []

    def compute_metrics(prediction):
        seen.append(prediction)
        return {}

    plain = training_arguments().to_dict()
    trainer = _SFTTrainer(
        model=build_model("llama"),
        args=SFTConfig(
            **{key: plain[key] for key in ("output_dir", "use_cpu", "report_to", "save_strategy", "disable_tqdm")},
            bf16=False,
            **{CHECKPOINTING_ARGUMENT: False},
            dataset_kwargs={"skip_prepare_dataset": True},
            remove_unused_columns=False,
            parallelism_config=FlashCPPlugin(cp_size=cp_size),
            per_device_eval_batch_size=per_batch,
        ),
        train_dataset=Dataset.from_list(features),
        eval_dataset=Dataset.from_list(features),
        processing_class=tokenizer(),
        data_collator=FlashCPCollator(cp_size),
        compute_metrics=compute_metrics if with_metrics else None,
    )
    metrics = trainer.evaluate()
    reference = build_model("llama", "sdpa")
    loss = from_one_rank(per_document_gradients, reference, features, own_loss=True)[0]
    right, entropy = 0, 0.0
    for feature in features:
        tokens = torch.tensor([feature["input_ids"]])
        with torch.no_grad():
            log_probs = reference(input_ids=tokens).logits[0, :-1].log_softmax(-1)
        right += int((log_probs.argmax(-1) == tokens[0, 1:]).sum())
        entropy -= float((log_probs.exp() * log_probs).sum())
    targets = target_count(features)
    return {
        "metrics": metrics,
        "loss": loss,
        "accuracy": right / targets,
        "entropy": entropy / targets,
        "documents_seen": [prediction.predictions.shape[0] for prediction in seen],
    }


def padded_rows(features):
    """Pad rows on the right, as transformers' collators do."""
    longest = max(len(feature["input_ids"]) for feature in features)

    def pad(values, fill):
        return [*values, *[fill] * (longest - len(values))]

    return {
        "input_ids": torch.tensor([pad(feature["input_ids"], 0) for feature in features]),
        "attention_mask": torch.tensor([pad([1] * len(feature["input_ids"]), 0) for feature in features]),
        "labels": torch.tensor([pad(feature["labels"], -100) for feature in features]),
    }


def summed_loss(outputs, labels, num_items_in_batch=None):
    logits, targets = outputs["logits"][..., :-1, :].flatten(0, 1), labels[..., 1:].flatten()
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum") / num_items_in_batch


class _OwnStep(Trainer):
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        loss, *_ = super().prediction_step(model, inputs, True, ignore_keys)
        return loss, torch.ones(1, 1), torch.ones(1, 1)


# Trainer class behind the mixin, arguments, trainer options, and whether evaluation is the stock one.
ON_ONE_RANK = {
    "label_smoothing_factor": (Trainer, {"label_smoothing_factor": 0.1}, {}, False),
    "compute_loss_func": (Trainer, {}, {"compute_loss_func": summed_loss}, False),
    "padded rows": (Trainer, {}, {"data_collator": padded_rows}, False),
    "padded rows, smoothed": (Trainer, {"label_smoothing_factor": 0.1}, {"data_collator": padded_rows}, False),
    "average_tokens_across_devices": (Trainer, {"average_tokens_across_devices": False}, {}, False),
    "eval_use_gather_object": (Trainer, {"eval_use_gather_object": True}, {}, True),
    "predict_with_generate": (
        Seq2SeqTrainer,
        {"predict_with_generate": True, "generation_max_length": 50},
        {"data_collator": padded_rows},
        True,
    ),
    "own prediction_step": (_OwnStep, {}, {}, True),
}


def on_one_rank(lengths, kind):
    """Evaluate with cp_size 1, train, and return the references from single documents as well."""
    fresh_accelerate()
    base, arguments, options, as_stock = ON_ONE_RANK[kind]
    features, seen = make_documents(lengths, prompt=0.3), []
    arguments = (
        dict(parallelism_config=FlashCPPlugin(cp_size=1), per_device_eval_batch_size=1 + (not as_stock), max_steps=1)
        | arguments
    )
    if base is Seq2SeqTrainer:
        plain = {**USE_DEVICE, "output_dir": tempfile.mkdtemp(), "report_to": [], "save_strategy": "no", "seed": 0}
        training = Seq2SeqTrainingArguments(**plain, learning_rate=0.0, disable_tqdm=True, **arguments)
    else:
        training = training_arguments(**arguments)
    trainer = type("Mixed", (FlashCPTrainerMixin, base), {})(
        model=build_model("llama", pad_token_id=0),
        args=training,
        train_dataset=features,
        eval_dataset=features,
        compute_metrics=lambda prediction: seen.append(prediction) or {},
        **{"data_collator": FlashCPCollator(1), **options},
    )
    loss = trainer.evaluate()["eval_loss"]
    trainer.train()
    reference, sums, targets = build_model("llama", "sdpa", pad_token_id=0), [], []
    for feature in features:
        inputs = {key: torch.tensor([value]) for key, value in feature.items()}
        with torch.no_grad():
            outputs = reference(**inputs)
        targets.append(int((inputs["labels"][:, 1:] != -100).sum()))
        if "label_smoothing_factor" in arguments:
            outputs["loss"] = LabelSmoother(0.1)(outputs, inputs["labels"], shift_labels=True)
        sums.append(float(outputs["loss"]) * targets[-1])
    if as_stock and dist.get_world_size() == 1:
        expected = sum(loss_sum / count for loss_sum, count in zip(sums, targets)) / len(sums)
    elif as_stock:
        expected = loss  # as in the stock Trainer with unequal processes
    else:
        expected = sum(sums) / sum(targets)
    shape = np.shape(seen[0].predictions)
    return {
        "loss": loss,
        "expected": expected,
        # Python objects are gathered in lists, and Seq2SeqTrainer keeps the rows that complete the last batch.
        "rows": len(lengths) if kind in ("eval_use_gather_object", "predict_with_generate") else shape[0],
        "expected_rows": len(lengths),
        "trained": trainer.state.global_step == 1,
    }


class _Endless(IterableDataset):
    def __init__(self, features):
        self.features = features

    def __iter__(self):
        return iter(self.features)


def refused_before_training(kind):
    """Train on dp 2 x cp 2 until evaluation raises; the error's note has the step."""
    fresh_accelerate()
    features = make_documents([40, 25, 18, 31])
    family, overrides, options = "llama", {}, {"eval_dataset": features}
    if kind == "no length":
        options["eval_dataset"] = _Endless(features)
    elif kind == "one of two sets without a length":
        options["eval_dataset"] = {"a": features, "b": _Endless(features)}
    elif kind == "rows that cannot be told apart":
        options["data_collator"] = DataCollatorWithFlattening()
    else:
        family, overrides = "qwen3_moe", {"output_router_logits": True}
        options["compute_metrics"] = lambda prediction: {}
    trainer = FlashCPTrainer(
        model=build_model(family, **overrides),
        args=evaluating_arguments(per_device_eval_batch_size=2, max_steps=2),
        train_dataset=features,
        **options,
    )
    try:
        trainer.train()
    except ValueError as error:
        error.__notes__ = [*getattr(error, "__notes__", []), f"step {trainer.state.global_step}"]
        raise


def router_logits_ignored():
    """Return the shapes of the inputs of compute_metrics during training."""
    fresh_accelerate()
    features, seen = make_documents([25, 18]), []
    trainer = FlashCPTrainer(
        model=build_model("qwen3_moe", output_router_logits=True),
        args=evaluating_arguments(),
        train_dataset=features,
        eval_dataset=features,
        compute_metrics=lambda prediction: seen.append(prediction.predictions.shape) or {},
    )
    trainer.train(ignore_keys_for_eval=["aux_loss", "router_logits"])
    return seen


def loss_of_flattened_rows():
    """Evaluate three rows that others packed, one per batch, on dp 2 x cp 2."""
    fresh_accelerate()
    features = make_documents([40, 25, 18])
    trainer = FlashCPTrainer(
        model=build_model("llama"),
        args=evaluating_arguments(per_device_eval_batch_size=1),
        train_dataset=features,
        eval_dataset=features,
        data_collator=DataCollatorWithFlattening(),
    )
    trainer.train()
    measured = next(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    return measured, from_one_rank(per_document_gradients, build_model("llama", "sdpa"), features, own_loss=True)[0]
