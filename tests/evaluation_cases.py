"""What workers run for the tests of evaluation."""

import numpy as np
import torch
import torch.distributed as dist
from datasets import Dataset
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from hf_flashcp import FlashCPCollator, FlashCPPlugin, FlashCPTrainer, FlashCPTrainerMixin
from hf_flashcp.integrations.checkpointing import CHECKPOINTING_ARGUMENT
from tests.accelerate_state import fresh_accelerate
from tests.models import build_model, make_documents, per_document_gradients, target_count, tokenizer
from tests.trainer_cases import training_arguments


def evaluation_loss(lengths, cp_size=None, per_batch=2):
    """eval_loss, and the mean over all targets of the evaluation set. The last batch is smaller than the others."""
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
    return measured, per_document_gradients(reference, features, own_loss=True)[0]


def most_likely(logits, labels):
    """As preprocess_logits_for_metrics: a row of logits and one of labels come in."""
    assert logits.shape[:2] == labels.shape and len(labels) == 1
    return logits.argmax(-1)


def predictions(lengths, cp_size, per_batch, preprocess=None, **collator_options):
    """`evaluate` with compute_metrics: what that sees, the metric it returns, and what each document alone gives."""
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
            errors.append(float((ours - logits).norm() / logits.norm()))
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
    """Ten tokens from every rank's own prompt, after a training step and during evaluation."""

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
    """Whether `generate` on the model in training equals that of the same parameters under sdpa (learning rate 0)."""
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
    """Loss sums and targets by document, the documents' own, and the perplexity of one without targets."""
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
    """eval_loss, TRL's own eval_mean_token_accuracy and eval_entropy, and what the documents alone give (for one batch
    of all of them, since TRL averages batches)."""
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
    loss = per_document_gradients(reference, features, own_loss=True)[0]
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
