"""Functions that workers run for the tests of TRL's SFTTrainer, and of the stock Trainer with the callback."""

import contextlib
import os
import tempfile
from unittest import mock

import torch
import torch.distributed as dist
from datasets import Dataset, IterableDataset
from transformers import Trainer
from trl import DistillationConfig, DistillationTrainer, SFTConfig, SFTTrainer
from trl.trainer import utils as trl_utils

from hf_flashcp import FlashCPCallback, FlashCPCollator, FlashCPPlugin, FlashCPTrainerMixin
from hf_flashcp.integrations.models.checkpointing import CHECKPOINTING_ARGUMENT
from tests.accelerate_state import fresh_accelerate
from tests.largest_tensor import MostElements
from tests.models import (
    SMALL,
    build_model,
    from_one_rank,
    gradients,
    largest_error,
    make_documents,
    per_document_gradients,
    target_count,
    tokenizer,
)
from tests.router_cases import ROUTER
from tests.trainer_cases import USE_DEVICE, KeepGradient, training_arguments
from tests.wrapper_cases import fsdp_arguments, fsdp_on_device, whole_gradients


LENGTHS = [40, 3, 17, 9, 25, 2, 30, 7, 12, 5, 33, 20, 8, 11, 45, 16]
WINDOW = 48


class InOrder:
    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


class _MixedSFTTrainer(InOrder, FlashCPTrainerMixin, SFTTrainer):
    pass


class _StockSFTTrainer(InOrder, SFTTrainer):
    pass


class _StockTrainer(InOrder, Trainer):
    pass


def _documents_of_first_batch(trainer, rows):
    """Return the documents in the first `rows` rows of the trainer's dataset, with the label of each first token
    masked."""
    features = []
    for row in trainer.train_dataset.select(range(rows)):
        start = 0
        for length in row.get("seq_lengths") or [len(row["input_ids"])]:
            ids = row["input_ids"][start : start + length]
            features.append({"input_ids": ids, "labels": ids})
            start += length
    return features


def _own_loss_gradients(model, features):
    return from_one_rank(per_document_gradients, model, features, own_loss=True)


def _dft_gradients(model, features):
    """Return the gradients of DFT's loss, which weights each target by its probability.

    See https://huggingface.co/papers/2508.05629.
    """
    model.zero_grad()
    total = torch.zeros(())
    for feature in features:
        ids = torch.tensor([feature["input_ids"]])
        log_probs = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        of_targets = log_probs.gather(1, ids[0, 1:, None])
        total = total - (of_targets * of_targets.exp().detach()).sum()
    loss = total / target_count(features)
    loss.backward()
    return loss.item(), gradients(model)


def sft_step(options):
    """Call [`_sft_step`], under FSDP2 if the options say so."""
    with fsdp_on_device() if options.get("fsdp") else contextlib.nullcontext():
        return _sft_step(options)


def _sft_step(options):
    """Return the gradient error of the first step, logged and expected loss, num_tokens, and the first batch's
    tokens."""
    fresh_accelerate()
    way, callback, cp_size = (
        options["way"],
        options.get("callback", False),
        options.get("cp_size", dist.get_world_size()),
    )
    keep = KeepGradient(whole_gradients)
    config = dict(
        max_length=WINDOW,
        per_device_train_batch_size=2,
        max_steps=1,
        parallelism_config=FlashCPPlugin(cp_size=cp_size),
        include_num_input_tokens_seen="all",
        dataset_num_proc=None,
        shuffle_dataset=False,
    )
    config |= {key: options[key] for key in ("loss_type",) if key in options}
    if options.get("fsdp"):
        config |= fsdp_arguments()
    config |= {"packing": False} if way == "collator" else {"packing": True, "packing_strategy": way}
    arguments = training_arguments().to_dict()
    config = {key: arguments[key] for key in ("output_dir", "use_cpu", "report_to", "save_strategy")} | config
    trainer = (_StockSFTTrainer if callback else _MixedSFTTrainer)(
        model=build_model("llama"),
        args=SFTConfig(
            **config,
            logging_steps=1,
            max_grad_norm=0,
            disable_tqdm=True,
            learning_rate=0.0,
            optim="sgd",
            **{CHECKPOINTING_ARGUMENT: False},
            bf16=False,
        ),
        train_dataset=Dataset.from_list([{"input_ids": feature["input_ids"]} for feature in make_documents(LENGTHS)]),
        processing_class=tokenizer(),
        data_collator=FlashCPCollator(cp_size) if way == "collator" else None,
        callbacks=[keep, *([FlashCPCallback()] if callback else [])],
    )
    largest = MostElements(SMALL["vocab_size"])
    with mock.patch.object(trl_utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 8), largest:
        trainer.train()
    features = _documents_of_first_batch(trainer, 2 * dist.get_world_size() // cp_size)
    reference = _dft_gradients if options.get("loss_type") == "dft" else _own_loss_gradients
    expected_loss, expected = reference(build_model("llama", "sdpa"), features)
    log = trainer.state.log_history[0]
    return {
        "gradient_error": largest_error(keep.steps[0], expected),
        "loss": log["loss"],
        "expected_loss": expected_loss,
        "num_tokens": log["num_tokens"],
        "expected_tokens": sum(len(feature["input_ids"]) for feature in features),
        "tokens_seen": trainer.state.num_input_tokens_seen,
        "log": log,
        "largest": largest.found,
        "logits": None if callback else trainer.flashcp.plan.layout.num_tokens * SMALL["vocab_size"],
    }


def stock_trainer_step(options):
    """Return the gradient error of a stock Trainer with the callback, the log of its first step, and the handle's
    plan."""
    fresh_accelerate()
    cp_size = options.pop("cp_size", dist.get_world_size())
    features, keep, callback = make_documents(LENGTHS, prompt=0.3), KeepGradient(), FlashCPCallback()
    trainer = _StockTrainer(
        model=build_model("llama"),
        args=training_arguments(
            parallelism_config=FlashCPPlugin(cp_size=cp_size),
            per_device_train_batch_size=3,
            max_steps=1,
            **options,
        ),
        train_dataset=features,
        eval_dataset=features,
        data_collator=FlashCPCollator(cp_size),
        callbacks=[keep, callback],
    )
    trainer.train()
    window = features[: 3 * options.get("gradient_accumulation_steps", 1) * dist.get_world_size() // cp_size]
    expected_loss, expected = from_one_rank(
        per_document_gradients, build_model("llama", "sdpa"), window, own_loss=True
    )
    return {
        "gradient_error": largest_error(keep.steps[0], expected),
        "loss": trainer.state.log_history[0]["loss"],
        "expected_loss": expected_loss,
        "log": trainer.state.log_history[0],
        "documents": len(callback.handle.plan.plan.lengths),
    }


def stock_trainer_without_the_callback(attn_implementation):
    fresh_accelerate()
    Trainer(
        model=build_model("llama", attn_implementation),
        args=training_arguments(parallelism_config=FlashCPPlugin(cp_size=dist.get_world_size()), max_steps=1),
        train_dataset=make_documents(LENGTHS),
        data_collator=FlashCPCollator(dist.get_world_size()),
    ).train()


def stock_evaluation(after_training):
    fresh_accelerate()
    cp_size = dist.get_world_size()
    trainer = Trainer(
        model=build_model("llama"),
        args=training_arguments(
            parallelism_config=FlashCPPlugin(cp_size=cp_size),
            eval_strategy="no" if after_training else "steps",
            max_steps=1,
        ),
        train_dataset=make_documents(LENGTHS),
        eval_dataset=make_documents(LENGTHS),
        data_collator=FlashCPCollator(cp_size),
        callbacks=[FlashCPCallback()],
    )
    trainer.train()
    trainer.evaluate()


def iterable_dataset_with_the_callback():
    fresh_accelerate()
    features = make_documents(LENGTHS)
    Trainer(
        model=build_model("llama"),
        args=training_arguments(parallelism_config=FlashCPPlugin(cp_size=dist.get_world_size()), max_steps=1),
        train_dataset=IterableDataset.from_generator(lambda: iter(features)),
        data_collator=FlashCPCollator(dist.get_world_size()),
        callbacks=[FlashCPCallback()],
    ).train()


def other_config():
    DistillationConfig(output_dir="unused", use_cpu=True, bf16=False, parallelism_config=FlashCPPlugin(cp_size=2))


class _MixedDistillationTrainer(FlashCPTrainerMixin, DistillationTrainer):
    def __init__(self, *args, **kwargs):
        FlashCPTrainerMixin.__init__(self, *args, **kwargs)


def mixed_trainer():
    fresh_accelerate()
    sizes = {"PARALLELISM_CONFIG_CP_SIZE": "2", "PARALLELISM_CONFIG_CP_BACKEND": "flashcp"}
    with mock.patch.dict(os.environ, sizes):
        _MixedDistillationTrainer(
            model=build_model("llama"),
            teacher_model=build_model("llama"),
            args=DistillationConfig(output_dir="unused", use_cpu=True, bf16=False, report_to=[]),
            train_dataset=Dataset.from_list([{"prompt": "<2>", "completion": "<3>"}]),
            processing_class=tokenizer(),
        )


def router_loss_of_sft_trainer():
    """Return loss, gradient norm and TRL's aux_loss of a step on a shared packed batch, with activation
    checkpointing."""
    fresh_accelerate()
    documents = [{"input_ids": feature["input_ids"]} for feature in make_documents([40, 3, 17, 25])]
    trainer = _MixedSFTTrainer(
        model=build_model("mixtral", **ROUTER),
        args=SFTConfig(
            output_dir=tempfile.mkdtemp(),
            **USE_DEVICE,
            report_to=[],
            max_length=100,
            packing=True,
            packing_strategy="bfd",
            per_device_train_batch_size=1,
            max_steps=1,
            logging_steps=1,
            learning_rate=0.0,
            save_strategy="no",
            disable_tqdm=True,
            bf16=False,
            parallelism_config=FlashCPPlugin(cp_size=dist.get_world_size()),
            **{CHECKPOINTING_ARGUMENT: True},
        ),
        train_dataset=Dataset.from_list(documents),
        processing_class=tokenizer(),
    )
    trainer.train()
    return [trainer.state.log_history[0][name] for name in ("loss", "grad_norm", "aux_loss")]
