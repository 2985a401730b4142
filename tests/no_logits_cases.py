"""Functions that workers run for the tests of losses that are computed without logits of all tokens."""

import contextlib
import logging
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from hf_flashcp import FlashCPCollator, FlashCPPlugin, attach
from hf_flashcp.doctor.float64 import float64_throughout
from hf_flashcp.doctor.tiny import build, default_config, tiny_copy
from hf_flashcp.errors import FlashCPError
from hf_flashcp.integrations.models import head_loss
from hf_flashcp.integrations.registration import NAME
from hf_flashcp.planning import PlanSettings
from hf_flashcp.predict import loss_memory
from tests.accelerate_state import fresh_accelerate
from tests.largest_tensor import MostElements
from tests.loss_cases import focal
from tests.model_cases import cp_mesh, sum_gradients, total
from tests.models import (
    build_model,
    from_one_rank,
    gradients,
    largest_error,
    make_documents,
    per_document_gradients,
    target_count,
)
from tests.trainer_cases import InOrder, KeepGradient, training_arguments
from tests.wrapper_cases import fsdp_on_device, whole_gradients


@contextlib.contextmanager
def logged():
    """Yield a list of what the loss says about models whose logits it needs."""
    messages, handler = [], logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    head_loss.logger.addHandler(handler)
    try:
        yield messages
    finally:
        head_loss.logger.removeHandler(handler)


class Shifted(nn.Module):
    """An output head that is more than a linear layer."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, hidden):
        return self.linear(hidden) + 1


def with_head_adapter(model):
    torch.manual_seed(1)
    model.requires_grad_(False)
    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def with_saved_head(model):
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    return get_peft_model(model, config)


def with_trained_tokens(model):
    """Return a model whose tied head adds the adapter of the embedding, which is not among its own parameters."""
    torch.manual_seed(1)
    model.requires_grad_(False)
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 4])).double()


def with_bias(model):
    torch.manual_seed(1)
    head = model.lm_head
    model.lm_head = nn.Linear(head.in_features, head.out_features, dtype=head.weight.dtype)
    return model


def with_frozen_head(model):
    model.lm_head.requires_grad_(False)
    return model


CHANGES = {
    "adapter": with_head_adapter,
    "saved head": with_saved_head,
    "trained tokens": with_trained_tokens,
    "bias": with_bias,
    "frozen": with_frozen_head,
    None: lambda model: model,
}


LARGE = 997
"""A vocabulary with which logits of all tokens have more elements than any other tensor."""


def small_chunks():
    return mock.patch.object(loss_memory, "CHUNK_LOGITS", 5 * LARGE)


def without_logits(family, change, lengths, overrides=None):
    """Return the [gradient error, loss error] of two steps without logits, and the most elements of any tensor beside
    those of this rank's logits."""
    features, size = make_documents(lengths, prompt=0.3), dist.get_world_size()
    features[1]["labels"] = [-100] * lengths[1]
    overrides = {"vocab_size": LARGE, **(overrides or {})}
    with float64_throughout(), small_chunks():

        def reference():
            return per_document_gradients(CHANGES[change](build_model(family, "eager", **overrides)), features)

        expected_loss, expected = from_one_rank(reference)
        model = CHANGES[change](build_model(family, **overrides))
        handle = attach(model, cp_mesh(), plugin=FlashCPPlugin(cp_size=size, skip_logits=True))
        batch = FlashCPCollator(settings=PlanSettings(size, "per_doc"))(features)
        errors, largest = [], MostElements(LARGE)
        for _ in range(2):  # the first forward learns what the model does to logits
            model.zero_grad()
            with largest:
                output = model(**batch, num_items_in_batch=target_count(features))
                output.loss.backward()
            assert output.logits is None
            sum_gradients(model)
            errors.append((largest_error(gradients(model), expected), abs(total(output.loss) / expected_loss - 1)))
    return errors, largest.found, handle.plan.layout.num_tokens * LARGE


def no_targets(lengths):
    """Return the loss and the largest gradient of a batch without targets."""
    features = make_documents(lengths, prompt=1.0)
    model = build_model("llama")
    attach(model, cp_mesh())
    output = model(**FlashCPCollator(dist.get_world_size())(features), skip_logits=True, num_items_in_batch=1)
    output.loss.backward()
    return float(output.loss), max(float(grad.abs().max()) for grad in gradients(model).values())


def bf16_errors(lengths):
    """Return the gradient error in bf16 without logits, and that of a single process."""
    features = make_documents(lengths, prompt=0.3)
    _, expected = from_one_rank(per_document_gradients, build_model("llama", "sdpa"), features)
    bf16 = build_model("llama", "sdpa", torch.bfloat16)
    _, single = from_one_rank(per_document_gradients, bf16, features, own_loss=True)
    model = build_model("llama", dtype=torch.bfloat16)
    attach(model, cp_mesh())
    batch = FlashCPCollator(dist.get_world_size())(features)
    with mock.patch.object(loss_memory, "CHUNK_LOGITS", 67):  # one token per chunk, the most roundings
        model(**batch, skip_logits=True, num_items_in_batch=target_count(features)).loss.backward()
    sum_gradients(model)
    return largest_error(gradients(model), expected), largest_error(single, expected)


def trained_and_evaluated(lengths, family="gemma2", fsdp=False):
    """Return what a trainer that skips logits and one that keeps them log and find, and for the former the most
    elements of a tensor beside those of a rank's logits."""
    found = []
    for skip_logits in (None, False):
        with fsdp_on_device() if fsdp else contextlib.nullcontext(), small_chunks():
            fresh_accelerate()
            size, features = dist.get_world_size(), make_documents(lengths, prompt=0.3)
            arguments = {"fsdp_config": {"transformer_layer_cls_to_wrap": ["Gemma2DecoderLayer"]}, "fsdp": True}
            keep, largest = KeepGradient(whole_gradients), MostElements(LARGE)
            trainer = InOrder(
                model=build_model(family, vocab_size=LARGE),
                args=training_arguments(
                    parallelism_config=FlashCPPlugin(cp_size=size, skip_logits=skip_logits),
                    per_device_train_batch_size=len(lengths),
                    per_device_eval_batch_size=len(lengths),
                    max_steps=2,
                    **(arguments if fsdp else {}),
                ),
                train_dataset=features,
                eval_dataset=features,
                data_collator=FlashCPCollator(),
                callbacks=[keep],
            )
            with float64_throughout(), largest:
                trainer.train()
                losses = trainer.document_losses()
                metrics = trainer.evaluate()
            logged_loss = [log["loss"] for log in trainer.state.log_history if "loss" in log]
            found.append((keep.steps, logged_loss, metrics["eval_loss"], losses.loss_sum.tolist()))
            if skip_logits is None:
                beside = largest.found, trainer.flashcp.plan.layout.num_tokens * LARGE
    return found, beside


def attached_after_fully_shard(lengths):
    """Return the gradient and loss error of a softcapped model that FSDP2 sharded as a whole before it was
    attached."""
    size, features, mesh = dist.get_world_size(), make_documents(lengths, prompt=0.3), cp_mesh()
    with float64_throughout():
        expected_loss, expected = from_one_rank(per_document_gradients, build_model("gemma2", "eager"), features)
        model = build_model("gemma2")
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        attach(model, mesh, plugin=FlashCPPlugin(cp_size=size, skip_logits=True))
        batch = FlashCPCollator(size)(features)
        for _ in range(2):
            model.zero_grad()
            loss = model(**batch, num_items_in_batch=target_count(features)).loss * size
            loss.backward()
    return largest_error(whole_gradients(model), expected), abs(total(loss) / size / expected_loss - 1)


class ReadsLogits(LlamaForCausalLM):
    """Models that use logits in ways that a stand-in cannot take part in."""

    use = None

    def forward(self, input_ids=None, labels=None, position_ids=None, logits_to_keep=0, **kwargs):
        hidden = self.model(input_ids=input_ids, position_ids=position_ids, **kwargs).last_hidden_state
        if self.use == "linear":
            logits = F.linear(hidden, self.lm_head.weight)
        elif self.use == "twice":
            logits = self.lm_head(hidden) + self.lm_head(hidden)
        else:
            logits = self.lm_head(hidden)
        if self.use == "mask":
            logits[..., 5] = -10.0
        if self.use == "mean":
            logits = logits - logits.mean(-1, keepdim=True)
        if self.use == "branch" and logits.isnan().any():
            raise AssertionError
        if self.use == "in place":
            same = logits.to(logits.device, logits.dtype)
            same /= 2.0
            logits.mul_(3.0)
        if self.use == "view":
            logits[..., :5].fill_(-10.0)
        if self.use == "masked_fill_":
            logits.masked_fill_(torch.arange(logits.shape[-1], device=hidden.device) < 5, -10.0)
        if self.use == "split":
            logits = torch.cat(logits.split(1, dim=1), dim=1)
        if self.use == "random":
            logits = logits * (0.5 + float(torch.rand(())) * 1e-15)
        if self.use == "targets":
            kwargs["shift_labels"] = kwargs["shift_labels"].masked_fill(input_ids % 2 == 0, -100)
        if self.use == "ignore":
            kwargs["ignore_index"] = 0
        if self.use == "mean of targets":
            del kwargs["num_items_in_batch"]
        if self.use == "own loss":
            targets, count = kwargs["shift_labels"].flatten(), kwargs["num_items_in_batch"]
            loss = F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=-100, reduction="sum") / count
        else:
            loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        if self.use == "after the loss":
            logits = logits * 3.0
        return CausalLMOutputWithPast(loss=loss, logits=logits)


def fallen_back(use, required):
    """Return how far loss and gradients are from those with logits, whether there were logits, and what was logged;
    or the error."""
    size, features = dist.get_world_size(), make_documents([40, 3, 17], prompt=0.3)
    batch = FlashCPCollator(size)(features)
    results = []
    for skip_logits in (False, True):
        model = build_model("llama")
        if use == "loss function":
            model.loss_function = focal
        elif use == "head":
            model.lm_head = Shifted(model.lm_head)
        else:
            model.__class__ = type("ReadsLogits", (ReadsLogits,), {"use": use})
        plugin = FlashCPPlugin(cp_size=size, skip_logits=skip_logits and required or None)
        attach(model, cp_mesh(), plugin=plugin)
        with logged() as messages, float64_throughout():
            try:
                for _ in range(2):
                    model.zero_grad()
                    output = model(**batch, skip_logits=skip_logits, num_items_in_batch=target_count(features))
                    output.loss.backward()
            except FlashCPError as error:
                return f"{type(error).__name__}: {error}"
        sum_gradients(model)
        results.append((total(output.loss), gradients(model)))
    (expected_loss, expected), (loss, found) = results
    error = max(largest_error(found, expected), abs(loss / expected_loss - 1))
    return error, output.logits is not None, messages


def without_changes(lengths):
    """Return the errors of a softcapped model whose changes of logits are not applied."""
    with mock.patch.object(head_loss.HeadLoss, "must_repeat", lambda *args: False):
        return without_logits("gemma2", None, lengths, {"final_logit_softcapping": 0.5})


def beside_logits(model_types, mixing_dtypes):
    """Return the largest gradient error of each model type against its gradient with logits, what its forward does to
    logits, and why it needs them, if it does."""
    found = {}
    for name in model_types:
        config, results = tiny_copy(default_config(name)), []
        batch = FlashCPCollator(settings=PlanSettings(1, "per_doc"))(make_documents([9, 4, 30], prompt=0.3))
        for skip_logits in (False, True):
            torch.manual_seed(0)
            model = build(config, NAME).eval()
            handle = attach(model, None)
            exact = contextlib.nullcontext() if name in mixing_dtypes else float64_throughout()
            with exact, mock.patch.object(loss_memory, "CHUNK_LOGITS", 1):
                output = model(**batch, skip_logits=skip_logits)
                output.loss.backward()
            results.append(gradients(model))
        scale = max(float(grad.norm()) for grad in results[0].values())
        error = max(float((results[1][key] - grad).norm()) for key, grad in results[0].items()) / scale
        changes = [change.function.__name__ for change in handle._logits_choice._changes]
        found[name] = (error, output.logits is not None, changes)
    return found


def skipped_on_one_rank():
    model = build_model("llama")
    attach(model, cp_mesh())
    model(**FlashCPCollator(dist.get_world_size())(make_documents([9, 5])), skip_logits=dist.get_rank() == 0)
