"""Functions that workers run to compare our evaluation with the stock Trainer's.

Both get the same options; the stock Trainer has one document per row on one device.
"""

import numpy as np
import torch
import torch.distributed as dist
from transformers import Trainer
from transformers.trainer_pt_utils import nested_concat, nested_numpify

from hf_flashcp import FlashCPCollator, FlashCPPlugin, FlashCPTrainer
from tests.accelerate_state import fresh_accelerate
from tests.models import build_model, make_documents, per_document_gradients
from tests.trainer_cases import training_arguments


def as_pair(logits, labels):
    return logits.argmax(-1), logits.logsumexp(-1)


def as_nested(logits, labels):
    """Return outputs of every structure and shape: per token, one token less, one number per row, a single number."""
    right = logits[:, :-1].argmax(-1) == labels[:, 1:]
    return {
        "likely": [logits.argmax(-1), (right, right.sum(-1))],
        "flat": right[labels[:, 1:] != -100],
        "wide": logits[..., :3],
        "number": right.float().mean(),
    }


def likely_and_last_hidden(outputs, labels):
    logits, hidden_states = outputs
    return logits.argmax(-1), hidden_states[-1]


# Options of TrainingArguments, the trainer, the model's config and `predict`, all of which give exact results.
OPTIONS = {
    "logits": {},
    "preprocess_logits_for_metrics: tuple": {"trainer": {"preprocess_logits_for_metrics": as_pair}},
    "preprocess_logits_for_metrics: nested": {"trainer": {"preprocess_logits_for_metrics": as_nested}},
    "hidden states": {"config": {"output_hidden_states": True}},
    "hidden states: preprocess": {
        "config": {"output_hidden_states": True},
        "trainer": {"preprocess_logits_for_metrics": likely_and_last_hidden},
    },
    "ignore_keys": {"config": {"output_hidden_states": True}, "call": {"ignore_keys": ["hidden_states"]}},
    "include_for_metrics: loss": {"args": {"include_for_metrics": ["loss"]}},
    "include_for_metrics: inputs": {"args": {"include_for_metrics": ["inputs"]}},
    "include_for_metrics: both": {"args": {"include_for_metrics": ["inputs", "loss"]}},
    "batch_eval_metrics": {"args": {"batch_eval_metrics": True, "include_for_metrics": ["loss"]}},
    "batch_eval_metrics: nested": {
        "args": {"batch_eval_metrics": True},
        "trainer": {"preprocess_logits_for_metrics": as_nested},
    },
    "eval_accumulation_steps": {
        "args": {"eval_accumulation_steps": 1, "include_for_metrics": ["inputs", "loss"]},
        "trainer": {"preprocess_logits_for_metrics": as_nested},
    },
    "eval_do_concat_batches": {
        "args": {"eval_do_concat_batches": False, "include_for_metrics": ["loss"]},
        "trainer": {"preprocess_logits_for_metrics": as_pair},
    },
    "prediction_loss_only": {"args": {"prediction_loss_only": True}},
    "label_names": {"args": {"label_names": ["labels"]}},
    "metric_key_prefix": {"call": {"metric_key_prefix": "held_out"}},
    "a metric called loss": {"metrics": {"loss": 5.0}},
    "metrics that end in _loss": {"metrics": {"eval_answer_loss": 123.0, "answer_loss": 7.0, "eval_loss": 9.0}},
    "logging_nan_inf_filter": {"args": {"logging_nan_inf_filter": False}},
}


class _Collect:
    """A `compute_metrics` that records its inputs; with `batch_eval_metrics`, it is called once per step."""

    def __init__(self, metrics):
        self.metrics, self.seen = metrics, []

    def __call__(self, prediction, compute_result=True):
        parts = {key: getattr(prediction, key) for key in ("predictions", "label_ids", "inputs", "losses")}
        self.seen.append({key: value for key, value in parts.items() if value is not None})
        return {**self.metrics, "calls": 1} if compute_result else {}


def _joined(parts):
    """Concatenate batches that evaluation passed one at a time."""
    joined = parts[0]
    for part in parts[1:]:
        joined = nested_concat(joined, part)
    return joined


def _evaluated(trainer_class, model, name, features, per_batch, **arguments):
    options = OPTIONS[name]
    collect = _Collect(options.get("metrics", {}))
    collator = arguments.pop("data_collator")
    trainer = trainer_class(
        model=model,
        args=training_arguments(per_device_eval_batch_size=per_batch, **options.get("args", {}), **arguments),
        eval_dataset=features,
        data_collator=collator,
        compute_metrics=collect,
        **options.get("trainer", {}),
    )
    metrics = trainer.evaluate(**options.get("call", {}))
    seen = list(collect.seen)
    if trainer.args.batch_eval_metrics:
        seen = [_joined([{k: nested_numpify(v) for k, v in part.items() if k != "inputs"} for part in seen])]
    if not trainer.args.eval_do_concat_batches:
        seen = [{key: _joined(parts) for key, parts in part.items()} for part in seen]
    predicted = trainer.predict(features, **options.get("call", {}))
    predictions, label_ids = predicted.predictions, predicted.label_ids
    if not trainer.args.eval_do_concat_batches:
        predictions, label_ids = _joined(predictions), _joined(label_ids)
    times = ("runtime", "per_second", "preparation_time")
    return {
        "metrics": {key: value for key, value in metrics.items() if not key.endswith(times)},
        "test_metrics": {key: value for key, value in predicted.metrics.items() if not key.endswith(times)},
        "seen": seen,
        "predictions": predictions,
        "label_ids": label_ids,
    }


def one_document_per_row(features):
    """Collate documents, one per row.

    The first label is -100, because nothing predicts the first token of a document.
    """
    (feature,) = features
    labels = [-100, *feature["labels"][1:]]
    return {"input_ids": torch.tensor([feature["input_ids"]]), "labels": torch.tensor([labels])}


def stock(name, lengths):
    """Evaluate with the stock Trainer on one process, but with the mean loss over all targets instead of batches."""
    fresh_accelerate()
    options, features = OPTIONS[name], make_documents(lengths, prompt=0.3)
    model = build_model("llama", "sdpa", **options.get("config", {}))
    found = _evaluated(Trainer, model, name, features, 1, data_collator=one_document_per_row)
    if "loss" not in options.get("metrics", {}):
        loss, _ = per_document_gradients(build_model("llama", "sdpa"), features, own_loss=True)
        for key, prefix in (("metrics", "eval"), ("test_metrics", "test")):
            found[key][f"{options.get('call', {}).get('metric_key_prefix', prefix)}_loss"] = loss
    return found


def ours(name, lengths, cp_size, per_batch):
    fresh_accelerate()
    config = OPTIONS[name].get("config", {})
    return _evaluated(
        FlashCPTrainer,
        build_model("llama", **config),
        name,
        make_documents(lengths, prompt=0.3),
        per_batch,
        parallelism_config=FlashCPPlugin(cp_size=cp_size),
        data_collator=FlashCPCollator(cp_size),
    )


def differences(left, right, path=""):
    """Return the paths at which two results differ in structure, shape or padding, or by more than 1e-5."""
    if isinstance(left, (np.ndarray, np.generic, int, float)) and not isinstance(left, bool):
        one, other = np.asarray(left), np.asarray(right)
        if one.shape != other.shape or one.dtype.kind != other.dtype.kind:
            return [f"{path}: {one.dtype} {one.shape} and {other.dtype} {other.shape}"]
        close = np.allclose(one.astype(float), other.astype(float), rtol=1e-5, atol=1e-5, equal_nan=True)
        return [] if close else [f"{path}: {np.abs(one.astype(float) - other.astype(float)).max()}"]
    if type(left) is not type(right):
        return [f"{path}: {type(left).__name__} and {type(right).__name__}"]
    if isinstance(left, dict):
        if left.keys() != right.keys():
            return [f"{path}: {sorted(left)} and {sorted(right)}"]
        return [found for key in left for found in differences(left[key], right[key], f"{path}.{key}")]
    if isinstance(left, (list, tuple)):
        if len(left) != len(right):
            return [f"{path}: {len(left)} and {len(right)}"]
        pairs = enumerate(zip(left, right))
        return [found for index, each in pairs for found in differences(*each, f"{path}[{index}]")]
    return [] if left == right else [f"{path}: {left} and {right}"]


def losses_of_batches(lengths, cp_size, per_batch):
    """Return the `losses` that compute_metrics gets, and for each document the mean over the targets of its batch."""
    fresh_accelerate()
    features, seen = make_documents(lengths, prompt=0.3), []
    trainer = FlashCPTrainer(
        model=build_model("llama"),
        args=training_arguments(
            parallelism_config=FlashCPPlugin(cp_size=cp_size),
            per_device_eval_batch_size=per_batch,
            include_for_metrics=["loss"],
        ),
        eval_dataset=features,
        data_collator=FlashCPCollator(cp_size),
        compute_metrics=lambda prediction: seen.append(prediction.losses.tolist()) or {},
    )
    trainer.evaluate()
    each = trainer.document_losses()
    expected = []
    for start in range(0, len(features), per_batch):
        batch = slice(start, start + per_batch)
        mean = each.loss_sum[batch].sum() / each.targets[batch].sum()
        expected += [mean] * len(features[batch])
    return seen[0], expected


class _OneBatchIsNotFinite(FlashCPTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if bool((inputs["input_ids"] == 66).any()) and dist.get_rank() == 0:
            loss = loss * float("nan")
        return (loss, outputs) if return_outputs else loss


def without_finite_loss(lengths, cp_size, filters):
    """Return eval_loss when the first document's loss is not finite, and the mean over the other documents."""
    fresh_accelerate()
    features = make_documents(lengths)
    for number, feature in enumerate(features):
        feature["input_ids"] = [66 if number == 0 else min(token, 65) for token in feature["input_ids"]]
        feature["labels"] = feature["input_ids"]
    trainer = _OneBatchIsNotFinite(
        model=build_model("llama"),
        args=training_arguments(
            parallelism_config=FlashCPPlugin(cp_size=cp_size),
            per_device_eval_batch_size=1,
            logging_nan_inf_filter=filters,
        ),
        eval_dataset=features,
    )
    each = trainer.document_losses()
    return trainer.evaluate()["eval_loss"], float(each.loss_sum[1:].sum() / each.targets[1:].sum())
