"""Losses that are computed without the logits of all tokens, compared with per-document runs and with logits."""

import copy
import re
import weakref
from pathlib import Path
from unittest import mock

import pytest
import torch
from accelerate.utils import convert_outputs_to_fp32
from transformers import Trainer

from hf_flashcp import FlashCPCallback, FlashCPCollator, FlashCPPlugin, FlashCPTrainer, FlashCPTrainerMixin, attach
from hf_flashcp.errors import BatchError, ConfigurationError, UnsupportedModelError
from hf_flashcp.integrations.gradient_check import gradient_error
from hf_flashcp.integrations.models.chunked_loss import leaves, summed_loss
from hf_flashcp.integrations.models.logits_stand_in import LogitsStandIn
from tests import no_logits_cases, router_cases
from tests.accelerate_state import fresh_accelerate
from tests.models import build_model
from tests.no_logits_cases import CHANGES
from tests.trainer_cases import training_arguments


LENGTHS = [40, 3, 17, 9, 25, 1, 30, 7, 12, 5, 33, 20]
EXACT = 1e-12  # relative Frobenius norm of each parameter's gradient, and loss, in fp64
SAME = 1e-12  # of runs that differ in the order of sums

# Plain logits, softcapped, multiplied and divided ones, and tied embeddings.
MODELS = [("llama", {}), ("gemma2", {}), ("cohere2", {}), ("granite", {}), ("qwen3", {"tie_word_embeddings": True})]


@pytest.mark.parametrize(
    "family, overrides, cp_size",
    [
        pytest.param(*model, cp_size, marks=() if number < 2 or cp_size == 4 else pytest.mark.load)
        for number, model in enumerate(MODELS)
        for cp_size in (1, 2, 4)
    ],
    ids=str,
)
def test_gradients_are_exact_and_no_tensor_has_the_size_of_logits(pool, cp_size, family, overrides):
    """A document has no target. Each batch has more chunks than tokens per chunk."""
    case = no_logits_cases.without_logits
    for errors, largest, logits in pool.run(cp_size, case, family, None, LENGTHS, overrides):
        assert max(map(max, errors)) < EXACT
        assert largest < logits


@pytest.mark.parametrize("change", [change for change in CHANGES if change])
def test_heads(pool, change):
    """Adapters of the head and of other layers, a head among modules_to_save, a bias, a head that is not trained."""
    overrides = {"tie_word_embeddings": change == "trained tokens"}
    for errors, largest, logits in pool.run(2, no_logits_cases.without_logits, "llama", change, LENGTHS, overrides):
        assert max(map(max, errors)) < EXACT
        assert largest < logits


@pytest.mark.parametrize("cp_size", [1, 3])
def test_router_loss(pool, cp_size):
    for errors in pool.run(cp_size, router_cases.router_errors, "qwen3_moe", LENGTHS[:5], "per_doc", True, True, True):
        assert max(errors) < EXACT


def test_a_batch_without_targets(pool):
    assert pool.run(2, no_logits_cases.no_targets, LENGTHS[:4]) == [(0.0, 0.0)] * 2


def test_bf16(pool):
    for ours, single in pool.run(2, no_logits_cases.bf16_errors, LENGTHS):
        assert ours < 2 * single


@pytest.mark.parametrize("world_size, fsdp", [(1, False), (2, False), (2, True)])
def test_trainer(pool, world_size, fsdp):
    """Training, evaluation and losses of documents are those with logits, and no tensor has the size of logits."""
    for (ours, expected), (largest, logits) in pool.run(
        world_size, no_logits_cases.trained_and_evaluated, LENGTHS, "gemma2", fsdp
    ):
        assert largest < logits
        for found, reference in zip(ours[0], expected[0]):
            assert no_logits_cases.largest_error(found, reference) < SAME
        for found, reference in zip(ours[1:], expected[1:]):
            assert found == pytest.approx(reference, rel=1e-6)


def test_fsdp2_before_attach(pool):
    """The first forward, which runs again because logits are softcapped, is inside FSDP2's root unit."""
    for errors in pool.run(2, no_logits_cases.attached_after_fully_shard, LENGTHS):
        assert max(errors) < EXACT


SUPPORTED = sorted(
    name
    for line in (Path(__file__).parent.parent / "docs" / "models.md").read_text(encoding="utf-8").splitlines()
    if re.search(r"\| \d+e-\d+ \|$", line)
    for name in re.findall(r"`([\w.-]+)`", line)
)
# What they do to logits differs, and so do the heads.
SAMPLE = ["cohere", "falcon_h1", "nanochat", "nemotron_h", "opt"]
# They compute partly in fp32 whatever the dtype, and cannot run in fp64 throughout.
MIXING_DTYPES = ("bailing_hybrid", "hunyuan_v1_moe")


@pytest.mark.parametrize("names", [SAMPLE, pytest.param(SUPPORTED, marks=pytest.mark.load)], ids=["sample", "all"])
def test_every_supported_model_type(pool, names):
    (found,) = pool.run(1, no_logits_cases.beside_logits, names, MIXING_DTYPES, timeout=1800)
    assert found.keys() == {*names} and len(SUPPORTED) > 100
    for name, (error, has_logits, changes) in found.items():
        assert error < (1e-5 if name in MIXING_DTYPES else EXACT) and not has_logits, (name, error, changes)


FALL_BACK = {
    "loss function": "it has a loss function of its own",
    "head": "its output head is a Shifted, not a linear layer",
    "linear": "its forward does not call its output head",
    "twice": "its forward does not call its output head once, for all tokens",
    "mask": "its forward uses logits in __setitem__",
    "mean": "its forward uses logits in mean",
    "view": "its forward uses logits in fill_",
    "masked_fill_": "its forward uses logits in masked_fill_",
    "split": "its forward uses logits in split",
    "random": "its forward changes logits in another way each time",
    "targets": "its loss has other targets than the batch",
    "own loss": "its forward uses logits in flatten",
}


@pytest.mark.parametrize("use", FALL_BACK)
def test_fall_back_to_logits(pool, use):
    """What needs logits gets them, with a line in the log; the results are those with logits."""
    for error, has_logits, messages in pool.run(2, no_logits_cases.fallen_back, use, False):
        assert error < SAME and has_logits
        (message,) = messages
        assert "is computed from whole logits" in message and FALL_BACK[use] in message
    for message in pool.run(2, no_logits_cases.fallen_back, use, True):
        assert message.startswith("UnsupportedModelError: skip_logits is True, but the loss of ")
        assert FALL_BACK[use] in message


@pytest.mark.parametrize(
    "use, problem",
    [
        ("ignore", "its loss has other targets than the batch"),
        ("mean of targets", "it does not pass num_items_in_batch to its loss function"),
    ],
)
def test_arguments_of_the_loss_function(use, problem):
    model = build_model("llama")
    model.__class__ = type("ReadsLogits", (no_logits_cases.ReadsLogits,), {"use": use})
    attach(model, None, plugin=FlashCPPlugin(skip_logits=True))
    with pytest.raises(UnsupportedModelError, match=problem):
        model(**FlashCPCollator(1)(no_logits_cases.make_documents([5, 6])))


def test_losses_of_tokens_where_outputs_are_tuples():
    model, found = build_model("gemma2", final_logit_softcapping=0.5), []
    batch = FlashCPCollator(1)(no_logits_cases.make_documents([5, 6]))
    batch = {**batch, "labels": None, "shift_labels": batch["labels"]}
    for return_dict in (True, False):
        handle = attach(model, None, plugin=FlashCPPlugin(skip_logits=True))  # has learned nothing
        with torch.no_grad():
            model(**batch, return_dict=return_dict)
        found.append(handle.token_losses)
    assert torch.equal(*found)


@pytest.mark.parametrize("use", ["in place", "after the loss"])
def test_changes_are_those_before_the_loss(pool, use):
    for error, has_logits, messages in pool.run(2, no_logits_cases.fallen_back, use, True):
        assert error < SAME and not has_logits and not messages


def test_a_forward_that_branches_on_logits(pool):
    for message in pool.run(2, no_logits_cases.fallen_back, "branch", False):
        assert "uses the values of its logits (__bool__), which were not computed" in message


class _OwnLoss(FlashCPTrainerMixin, Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        raise NotImplementedError


@pytest.mark.parametrize(
    "trainer_class, options, arguments, reader",
    [
        (_OwnLoss, {}, {}, "compute_loss of _OwnLoss"),
        (FlashCPTrainer, {"compute_loss_func": lambda *args, **kwargs: None}, {}, "compute_loss_func"),
        (FlashCPTrainer, {}, {"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        (FlashCPTrainer, {}, {}, None),
    ],
)
def test_a_trainer_keeps_logits_for_what_reads_them(trainer_class, options, arguments, reader):
    def make(skip_logits=None):
        fresh_accelerate()
        arguments_ = training_arguments(parallelism_config=FlashCPPlugin(skip_logits=skip_logits), **arguments)
        return trainer_class(model=build_model("llama"), args=arguments_, **options)

    assert make().flashcp.skip_logits == (reader is None)
    assert not make(False).flashcp.skip_logits
    if reader is None:
        assert make(True).flashcp.skip_logits
        return
    with pytest.raises(ConfigurationError, match=f"skip_logits is True, but {reader} needs logits"):
        make(True)


@pytest.mark.parametrize("skip_logits", [None, True])
def test_a_trainer_keeps_logits_in_forwards_of_an_evaluation_of_your_own(skip_logits):
    fresh_accelerate()
    trainer = FlashCPTrainer(
        model=build_model("llama"), args=training_arguments(parallelism_config=FlashCPPlugin(skip_logits=skip_logits))
    )
    batch = trainer.data_collator(no_logits_cases.make_documents([5, 6]))
    assert trainer.model.train()(**batch).logits is None
    assert (trainer.model.eval()(**batch).logits is None) == (skip_logits is True)


@pytest.mark.parametrize("layer", ["model", "lm_head"])
@pytest.mark.parametrize("run", [1, 2])
def test_everything_is_put_back(layer, run):
    """Also after an error in a forward, or when it runs again because logits are softcapped."""
    model, runs = build_model("gemma2"), []
    handle = attach(model, None, plugin=FlashCPPlugin(skip_logits=True))
    batch = FlashCPCollator(1)(no_logits_cases.make_documents([5, 6]))

    def fail(*given):
        runs.append(None)
        if len(runs) == run:
            raise KeyError

    hook = model.get_submodule(layer).register_forward_hook(fail)
    with pytest.raises(KeyError):
        model(**batch)
    hook.remove()
    with torch.no_grad():
        loss = model(**batch).loss
    assert handle.token_losses.shape == (11,)
    assert model(**batch).loss.item() == pytest.approx(loss.item()) and handle.token_losses is None
    assert "forward" not in vars(model.lm_head) and "_loss_function" not in vars(model)


def test_batches_that_are_not_sharded_keep_logits():
    model, ids = build_model("llama"), torch.arange(12).view(2, 6)
    attach(model, None)
    arguments = []
    model.model.register_forward_pre_hook(lambda *given: arguments.extend(given[2]), with_kwargs=True)
    output = model(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids), skip_logits=True)
    assert output.logits.shape == (2, 6, 67) and "skip_logits" not in arguments


def test_casts_to_fp32_are_no_changes_to_learn():
    """Under autocast, accelerate casts the logits of outputs."""
    model, runs = build_model("llama", dtype=torch.bfloat16), []
    model.model.register_forward_hook(lambda *given: runs.append(None))
    attach(model, None, plugin=FlashCPPlugin(skip_logits=True))
    forward = model.forward
    model.forward = lambda **kwargs: convert_outputs_to_fp32(forward)(**kwargs)
    batch = FlashCPCollator(1)(no_logits_cases.make_documents([5, 6]))
    for given in (batch, {**batch, "labels": None, "shift_labels": batch["labels"]}):
        assert "logits" not in model(**given)
    assert len(runs) == 2


@pytest.mark.parametrize("options", [{"label_smoothing_factor": 0.1}, {"eval_strategy": "epoch"}], ids=str)
def test_the_callback_refuses_what_reads_logits(options):
    fresh_accelerate()
    features = no_logits_cases.make_documents([5, 6])
    trainer = Trainer(
        model=build_model("llama"),
        args=training_arguments(parallelism_config=FlashCPPlugin(skip_logits=True), **options),
        train_dataset=features,
        eval_dataset=features,
        callbacks=[FlashCPCallback()],
    )
    with pytest.raises(ConfigurationError, match="skip_logits is True, but a stock Trainer may read logits"):
        trainer.train()


def test_ranks_that_differ_in_skip_logits(pool):
    for error in pool.errors(2, no_logits_cases.skipped_on_one_rank):
        assert type(error) is BatchError
        assert "Ranks disagree on the batch: skip_logits is true on rank 0 and false on rank 1" in str(error)


def test_predictions_need_logits():
    fresh_accelerate()
    features = no_logits_cases.make_documents([5, 6])
    trainer = FlashCPTrainer(
        model=build_model("llama"),
        args=training_arguments(parallelism_config=FlashCPPlugin(skip_logits=True), eval_strategy="epoch"),
        train_dataset=features,
        eval_dataset=features,
        compute_metrics=lambda prediction: {},
    )
    for call in (trainer.train, trainer.evaluate, lambda: trainer.predict(features)):
        with pytest.raises(ConfigurationError, match="skip_logits is True, but compute_metrics and predictions need"):
            call()
    trainer.args.prediction_loss_only = True
    assert trainer.predict(features).metrics["test_loss"] > 0


def test_gradients_of_weights_are_added_up_in_fp32():
    torch.manual_seed(0)
    head, hidden = torch.nn.Linear(8, 16, dtype=torch.bfloat16), torch.randn(1, 400, 8, dtype=torch.bfloat16)
    targets, exact = torch.randint(16, (1, 400)), copy.deepcopy(head).double()
    summed_loss(head, hidden, targets, leaves(head(hidden)), 1).backward()
    torch.nn.functional.cross_entropy(exact(hidden.double())[0], targets[0], reduction="sum").backward()
    expected = {name: parameter.grad for name, parameter in exact.named_parameters()}
    assert gradient_error({name: each.grad for name, each in head.named_parameters()}, expected) < 2**-7


def test_a_chunk_is_freed_before_the_next():
    linear, found, grad = torch.nn.Linear(8, 16), [], torch.autograd.grad

    def head(hidden):
        assert not any(each() is not None for each in found)
        found.append(weakref.ref(logits := linear(hidden)))
        return logits

    def kept_in_view(*args):
        gradients = grad(*args)
        found.extend(map(weakref.ref, gradients))
        return gradients

    hidden = torch.randn(1, 12, 8, requires_grad=True)
    with mock.patch.object(torch.autograd, "grad", kept_in_view):
        summed_loss(head, hidden, torch.arange(12)[None], [linear.weight, linear.bias], 4)
    assert len(found) == 3 * 4


def test_setting():
    with pytest.raises(ConfigurationError, match="skip_logits is 'yes'. Set it to True or False, or leave it out."):
        FlashCPPlugin(skip_logits="yes")


def test_a_stand_in_has_the_properties_of_logits():
    loss = torch.tensor(3.0, requires_grad=True) * 2
    logits = LogitsStandIn.of(loss, torch.empty(1, 7, 67, dtype=torch.bfloat16, device="meta"))
    assert logits.shape == (1, 7, 67) and logits.dtype == torch.bfloat16 and logits.dim() == 3
    assert logits.device == loss.device and logits.requires_grad and logits.size(-1) == 67
    changed = torch.tanh(logits.float() / 5) * 5
    assert changed.dtype == torch.float32 and changed.problem is None and changed.loss == 6
    assert [change.function.__name__ for change in changed.changes] == ["float", "div", "tanh", "mul"]
    assert logits.clamp(None, 5.0).problem is None and logits.bfloat16() is logits
    assert logits.max(-1).values.problem == "max" and logits.to(loss.device, torch.bfloat16) is logits
    assert logits.softmax(-1).problem == "softmax" and logits[0].problem == "__getitem__"
    assert (logits + torch.ones(67)).problem == "add"
    with pytest.raises(UnsupportedModelError, match="uses the values of its logits"):
        logits.max().item()


def test_a_wrong_change_would_be_noticed(pool):
    """A forward that skipped what the model does to logits would be far off."""
    for errors, *_ in pool.run(2, no_logits_cases.without_changes, LENGTHS):
        assert min(gradient for gradient, _ in errors) > 1e-2
