"""Functions that workers run for the tests of trainers that read whole rows: real trainings of TRL's trainers."""

import contextlib
import random
import tempfile
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
import trl
from accelerate.utils import extract_model_from_parallel
from datasets import Dataset, load_from_disk
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Trainer,
)
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer
from trl.trainer import utils as trl_utils

from hf_flashcp import FlashCPPlugin, FlashCPTrainer, FlashCPTrainerMixin
from hf_flashcp.doctor.float64 import float64_throughout
from hf_flashcp.integrations.models.checkpointing import CHECKPOINTING_ARGUMENT
from tests.accelerate_state import fresh_accelerate
from tests.device import DEVICE
from tests.models import SMALL, build_model, from_one_rank
from tests.trainer_cases import USE_DEVICE, KeepGradient, training_arguments
from tests.wrapper_cases import fsdp_arguments, fsdp_on_device, full, plain_name, whole_gradients, with_lora


TRAINERS = {
    "dpo": (trl.DPOTrainer, trl.DPOConfig),
    "kto": (trl.KTOTrainer, trl.KTOConfig),
    "reward": (trl.RewardTrainer, trl.RewardConfig),
    "grpo": (trl.GRPOTrainer, trl.GRPOConfig),
    "rloo": (trl.RLOOTrainer, trl.RLOOConfig),
    "gmpo": (GMPOTrainer, GMPOConfig),
}
VOCABULARY = SMALL["vocab_size"]


def word_tokenizer(pad="<2>", side="left"):
    """Return a tokenizer of words "<3>", in which <1> ends a text."""
    tokens = Tokenizer(models.WordLevel({f"<{i}>": i for i in range(VOCABULARY)}, unk_token="<0>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<1>", pad_token=pad, padding_side=side)


class _Words:
    def __init__(self, seed=0):
        self._random = random.Random(seed)

    def __call__(self, low, high):
        return " ".join(f"<{self._random.randrange(3, VOCABULARY)}>" for _ in range(self._random.randrange(low, high)))


def examples(kind, count):
    words = _Words()
    if kind in ("dpo", "reward"):
        return [
            {"prompt": words(3, 40) + " ", "chosen": words(2, 30) + " <1>", "rejected": words(1, 25) + " <1>"}
            for _ in range(count)
        ]
    if kind == "kto":
        return [
            {"prompt": words(3, 40) + " ", "completion": words(2, 30) + " <1>", "label": bool(i % 2)}
            for i in range(count)
        ]
    return [{"prompt": words(3, 30)} for _ in range(count)]


def reward(completions, **kwargs):
    return [float(len(set(text.split())) % 5) + 0.1 * text.count("3") for text in completions]


def perturbed(model):
    """Return the model with other weights, for references."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype).to(DEVICE)
    return model


def _saved(model):
    path = tempfile.mkdtemp()
    model.save_pretrained(path)
    return path


def classifier(attn_implementation, dtype=torch.float64, **config):
    torch.manual_seed(0)
    config = LlamaConfig(**{**SMALL, "num_labels": 1, **config})
    return AutoModelForSequenceClassification.from_config(
        config, attn_implementation=attn_implementation, dtype=torch.float64
    ).to(DEVICE, dtype)


def _exact_log_probs(hidden, weight, bias, labels, temperature, chunk, softcap, scale, outputs):
    """Compute what TRL's fused output head computes in fp32, in the dtype of the hidden states."""
    logits = F.linear(hidden, weight, bias) * scale
    logits = (softcap * torch.tanh(logits / softcap) if softcap else logits) / temperature
    logs = logits.log_softmax(-1)
    found = {
        "log_probs": logs.gather(1, labels[:, None])[:, 0],
        "entropy": -(logs.exp() * logs).sum(-1),
        "log_sum_sq_probs": (2 * logs).logsumexp(-1).detach(),
        "mean_logits": logits.mean(-1).detach(),
        "is_top1": logits.argmax(-1) == labels,
    }
    return tuple(value if name in outputs or name == "log_probs" else None for name, value in found.items())


@contextlib.contextmanager
def in_precision(dtype):
    """Let everything run in fp64, including what TRL computes in fp32."""
    if dtype != torch.float64:
        yield
        return
    exact = type("Exact", (), {"apply": staticmethod(_exact_log_probs)})
    with float64_throughout(), mock.patch.object(trl_utils, "_ChunkedLogProbFunction", exact):
        yield


class _Twice:
    """Runs two forwards with gradients per step, over different rows."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        reversed_rows = {name: value.flip(0) for name, value in inputs.items()}
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        return loss + super().compute_loss(model, reversed_rows, *args, **kwargs) / 2


def train(kind, plugin=None, *, fsdp=False, **options):
    """Train with a trainer of TRL, and return what it did.

    Args:
        kind: one of `TRAINERS`.
        plugin: arguments of FlashCPPlugin for a trainer with the mixin; the plain trainer without.
        fsdp: whether FSDP2 shards the model.
        options: see [`_train`].

    Returns the gradients of the first step before the optimizer, the parameters after training, the numbers that were
    logged, and eval_loss.
    """
    with fsdp_on_device() if fsdp else contextlib.nullcontext():
        fresh_accelerate()
        with in_precision(options.get("dtype", torch.float64)):
            return _train(kind, plugin, fsdp=fsdp, **options)


def _train(
    kind,
    plugin,
    *,
    fsdp,
    dtype=torch.float64,
    family="llama",
    lora=False,
    rows=12,
    eval_rows=None,
    pad="<2>",
    **config,
):
    base, config_class = TRAINERS[kind]
    mixed = plugin is not None and not config.pop("without_mixin", False)
    behind = (FlashCPTrainerMixin, base) if mixed else (base,)
    if config.pop("twice", False):
        behind = (_Twice, *behind)
    cls = type("Trained", behind, {}) if len(behind) > 1 else base
    attention = "flashcp" if plugin is not None else "eager" if family == "gemma2" else "sdpa"
    build = classifier if kind == "reward" else lambda *args: build_model(family, *args)
    model = build(attention, dtype)
    arguments = {
        "train_dataset": Dataset.from_list(examples(kind, rows)),
        "processing_class": word_tokenizer(config.pop("pad", "<2>")),
    }
    if kind in ("grpo", "rloo", "gmpo"):
        arguments["reward_funcs"] = reward
        config = {"max_completion_length": 10, "num_generations": 4, "beta": 0.0, **config}
        if config["beta"] and not lora:
            model.config._name_or_path = from_one_rank(_saved, perturbed(build(attention, dtype)))
    elif kind in ("dpo", "kto"):
        if not lora:
            arguments["ref_model"] = perturbed(build(attention, dtype))
        config = {"beta": 0.3, **config}
    if kind not in ("grpo", "rloo", "gmpo"):
        config = {"max_length": None, **config}
    if eval_rows:
        evaluated = Dataset.from_list(examples(kind, eval_rows))
        arguments["eval_dataset"] = evaluated.to_iterable_dataset() if config.pop("streams", False) else evaluated
    if lora:
        model = with_lora(model)
    if plugin is not None:
        config["parallelism_config"] = FlashCPPlugin(**plugin)
    if fsdp:
        config |= fsdp_arguments()
    config = {
        **USE_DEVICE,
        "output_dir": tempfile.mkdtemp(),
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "bf16": False,
        CHECKPOINTING_ARGUMENT: False,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 3,
        "max_steps": 3,
        "optim": "sgd",
        "learning_rate": 0.3,
        "max_grad_norm": 0.5,
        "lr_scheduler_type": "constant",
        **config,
    }
    keep = KeepGradient(whole_gradients)
    trainer = cls(model=model, args=config_class(**config), callbacks=[keep], **arguments)
    trainer.train()
    evaluation = trainer.evaluate() if eval_rows else {}
    return found_in(trainer, keep, evaluation)


def found_in(trainer, keep, evaluation):
    trained = extract_model_from_parallel(trainer.model)
    left_out = ("runtime", "per_second", "time", "flashcp")
    logs = [
        {key: value for key, value in log.items() if isinstance(value, float) and not any(s in key for s in left_out)}
        for log in trainer.state.log_history
    ]
    parameters = {plain_name(name): full(value.detach()) for name, value in trained.named_parameters()}
    return {
        "gradients": {name: value.cpu() for name, value in keep.steps[0].items()},
        "parameters": {name: value.cpu().clone() for name, value in parameters.items()},
        "logs": logs,
        "eval_loss": evaluation.get("eval_loss"),
        "evaluation": {key: value for key, value in evaluation.items() if not any(s in key for s in left_out)},
        "sharded": getattr(getattr(trainer, "flashcp", None), "plan", None) is not None,
    }


class InOrder:
    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


HEADS = {
    "score": (AutoModelForSequenceClassification, {"num_labels": 3}),
    "regression": (AutoModelForSequenceClassification, {"num_labels": 1}),
    "multi_label": (
        AutoModelForSequenceClassification,
        {"num_labels": 4, "problem_type": "multi_label_classification"},
    ),
    "tokens": (AutoModelForTokenClassification, {"num_labels": 5}),
}


def labelled_rows(head, count, seed=0):
    """Return rows of random tokens with the labels of a head."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(3, 40, (1,), generator=generator))
        row = {"input_ids": torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()}
        label = int(torch.randint(0, 3, (1,), generator=generator))
        row |= {
            "score": {"labels": label},
            "regression": {"labels": label / 2},
            "multi_label": {"labels": [1.0, 0.0, float(label > 0), float(label > 1)]},
            "tokens": {"labels": torch.randint(0, 5, (length,), generator=generator).tolist()},
        }[head]
        rows.append(row)
    return rows


def classify(
    head, plugin=None, *, family=LlamaConfig, rows=12, eval_rows=5, side="right", compute_loss_func=None, **config
):
    """Train a model with a classification head, and return what [`train`] does.

    The evaluation includes predictions for rows without labels.
    """
    fresh_accelerate()
    auto, options = HEADS[head]
    torch.manual_seed(0)
    model_config = family(**{**SMALL, **options, "pad_token_id": 2, "classifier_dropout": 0.0})
    attention = "sdpa" if plugin is None else "flashcp"
    model = auto.from_config(model_config, attn_implementation=attention, dtype=torch.float64).to(DEVICE)
    base = Trainer if plugin is None else FlashCPTrainer
    processing_class = word_tokenizer(side=side)
    collator = DataCollatorForTokenClassification if head == "tokens" else DataCollatorWithPadding
    keep = KeepGradient()
    if plugin is not None:
        config["parallelism_config"] = FlashCPPlugin(**plugin)
    with float64_throughout():
        trainer = type("Ordered", (InOrder, base), {})(
            model=model,
            args=training_arguments(
                per_device_train_batch_size=2, per_device_eval_batch_size=3, max_steps=2, learning_rate=0.1, **config
            ),
            train_dataset=labelled_rows(head, rows),
            eval_dataset=labelled_rows(head, eval_rows, seed=1),
            data_collator=_in_fp64(collator(processing_class)),
            compute_metrics=_mean_prediction,
            compute_loss_func=compute_loss_func,
            callbacks=[keep],
        )
        trainer.train()
        evaluation = trainer.evaluate()
        unlabelled = [{"input_ids": row["input_ids"]} for row in labelled_rows(head, eval_rows, seed=1)]
        predictions = trainer.predict(unlabelled).predictions
    if head == "tokens":
        predictions = predictions[:, 0]  # of tokens, because those at padding differ
    evaluation |= {"eval_unlabelled": float(predictions.sum()), "eval_predictions": len(predictions)}
    return found_in(trainer, keep, evaluation)


def loss_of_labels(outputs, labels, num_items_in_batch=None):
    """Return a loss as transformers' documentation describes: a sum over a count, or a mean if there is none."""
    if num_items_in_batch is None:
        return F.cross_entropy(outputs.logits, labels)
    return F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


def _in_fp64(collate):
    def collated(features):
        batch = collate(features)
        return batch | {name: value.double() for name, value in batch.items() if value.is_floating_point()}

    return collated


def _mean_prediction(prediction):
    predictions, labels = prediction.predictions, prediction.label_ids
    if labels.shape == predictions.shape[:-1]:  # of tokens, or single labels
        predictions = predictions[labels != -100]
    found = {"mean": float(predictions.mean()), "rows": len(prediction.predictions), "labels": float(labels.sum())}
    if prediction.inputs is not None:
        found |= {"inputs": len(prediction.inputs), "tokens": int(prediction.inputs[prediction.inputs > 2].sum())}
    if prediction.losses is not None:
        found |= {"losses": float(prediction.losses.sum()), "examples": len(prediction.losses)}
    return found


def tokens_at_once(batches):
    """Return the tokens of each forward with gradients in the first step of a training."""
    sizes, forward = [], torch.nn.Embedding.forward

    def counted(self, ids):
        if torch.is_grad_enabled():
            sizes.append(ids.numel())
        return forward(self, ids)

    with mock.patch.object(torch.nn.Embedding, "forward", counted):
        train("dpo", batches and {"cp_size": dist.get_world_size(), "batches": batches}, max_steps=1)
    return sizes


def precompute(plugin=None, rows=7, **options):
    """Train a DPO trainer that computes the log probabilities of its reference in advance."""
    fresh_accelerate()
    path = from_one_rank(_on_disk, Dataset.from_list(examples("dpo", rows)))
    with mock.patch.object(Dataset, "from_list", lambda _: load_from_disk(path)):
        return train("dpo", plugin, rows=rows, eval_rows=rows, precompute_ref_log_probs=True, **options)


def _on_disk(dataset):
    path = tempfile.mkdtemp()
    dataset.save_to_disk(path)
    return path


def plain_trainer_with_a_plugin():
    train("dpo", {"cp_size": dist.get_world_size()}, without_mixin=True)
