"""What does attaching change about a model on one rank, and what does it leave alone?"""

import copy
import gc
import weakref

import pytest
import torch
import transformers
from transformers import DynamicCache

from hf_flashcp import FlashCPCollator, attach
from hf_flashcp.errors import UnsupportedModelError
from hf_flashcp.integrations import gradient_check
from hf_flashcp.integrations.models.forward_arguments import CACHES, has_cache
from tests import attach_cases
from tests.models import (
    FAMILIES,
    KINDS,
    build_model,
    largest_error,
    make_documents,
    per_document_gradients,
    with_skipped_positions,
)
from tests.recurrence_cases import stock_functions


pytestmark = pytest.mark.smoke


def padded_batch():
    ids = torch.randint(1, 67, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 8:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def test_padded_batches_on_one_rank_train_as_with_sdpa():
    model, reference = build_model("llama").train(), build_model("llama", "sdpa").train()
    attach(model, None)
    assert torch.equal(model(**padded_batch()).loss, reference(**padded_batch()).loss)


def test_positional_inputs_are_sharded_too():
    model = build_model("llama").train()
    handle = attach(model, None)
    batch = FlashCPCollator(1)(make_documents([12, 9]))
    ids = batch.pop("input_ids")
    assert torch.isfinite(model(ids, **batch).loss)
    assert handle.plan.plan.lengths == (12, 9)


def test_attaching_again_replaces_the_handle():
    model = build_model("llama").train()
    plans = []
    first = attach(model, None, on_plan=plans.append)
    second = attach(model, None)
    model(**FlashCPCollator(1)(make_documents([12, 9])))
    assert first.plan is None and second.plan is not None and not plans
    second.remove()
    assert not model._forward_pre_hooks and not model._forward_hooks


def test_an_attached_model_can_be_copied_and_collected():
    model = build_model("llama").train()
    attach(model, None, on_plan=lambda plan, kept=model: None)
    copied = copy.deepcopy(model)
    batch = FlashCPCollator(1)(make_documents([12, 9]))
    assert torch.equal(copied(**batch).loss, model(**batch).loss)
    alive = weakref.ref(model)
    del model, copied
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("training", [False, True])
def test_generate_on_an_attached_model(training):
    model, reference = build_model("llama"), build_model("llama", "sdpa")
    attach(model.train(), None)
    model(**FlashCPCollator(1)(make_documents([12, 9]))).loss.backward()
    ids = torch.randint(1, 67, (2, 9), generator=torch.Generator().manual_seed(0))
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    expected = reference.eval().generate(ids, **options)
    assert torch.equal(model.train(training).generate(ids, **options), expected)


@pytest.mark.parametrize("name", [*CACHES, "states_under_another_name"])
def test_caches_are_recognized_under_every_name(name):
    """Caches are also recognized by their type, in case the argument is renamed again."""
    batch = {"input_ids": torch.tensor([[1]]), name: DynamicCache()}
    assert has_cache(batch) and not has_cache({**batch, name: None})
    model = build_model("llama").train()
    handle = attach(model, None)
    assert handle.shard(batch) is batch


@pytest.mark.parametrize("family", ["llama", *(name for name in KINDS if name != "bamba")])
def test_generate_on_attached_ranks(pool, family):
    """Each rank generates on its own, also in training mode; a forward with labels and a cache is refused.

    A tiny Bamba has no attention layer, without which transformers cannot generate.
    """
    for tokens, expected, message in pool.run(2, attach_cases.generate_in_training_mode, family):
        assert tokens == expected
        assert "has labels and a key-value cache" in message


def test_a_model_is_saved_as_a_whole(tmp_path, pool, monkeypatch):
    """A saved model loads with flashcp attention for one process, and can be attached again."""
    for path in pool.run(2, attach_cases.save_whole_models, str(tmp_path)):
        for family in attach_cases.SAVED:
            model = torch.load(f"{path}/{family}.pt", weights_only=False)
            batch = FlashCPCollator(1)(make_documents([12, 9]))
            if family == "granitemoehybrid":  # as in a process in which no such model has been attached
                module, functions = stock_functions(model)
                for name, function in functions.items():
                    monkeypatch.setattr(module, name, function)
            first = model(**batch).loss
            expected = attach_cases.saved_model(family)
            attach(expected, None)
            loss = expected(**batch).loss
            assert torch.equal(first, loss) and torch.equal(model(**batch).loss, loss)
            hooks = len(model._forward_pre_hooks)
            attach(model, None)
            assert len(model._forward_pre_hooks) == hooks and torch.equal(model(**batch).loss, loss)


@pytest.mark.parametrize(
    "config", [transformers.T5Config, transformers.BartConfig, transformers.SwitchTransformersConfig]
)
def test_encoder_decoder_models_are_refused_by_name(config):
    model = transformers.AutoModelForSeq2SeqLM.from_config(
        config(d_model=32, num_layers=1, num_heads=2, d_ff=16, vocab_size=67)
    )
    with pytest.raises(UnsupportedModelError, match="is an encoder-decoder model"):
        attach(model, None)


@pytest.mark.parametrize("family", ["llama", "llama, dynamic"])
def test_the_gradient_check_gives_documents_their_positions(family):
    features = with_skipped_positions(make_documents([21, 5]))
    model = build_model(family)
    attach(model, None)
    ours = gradient_check.per_document_gradients(model, [FlashCPCollator(1)(features)])
    _, expected = per_document_gradients(build_model(family, "sdpa"), features, own_loss=True)
    assert largest_error(ours, expected) < 1e-6


def test_models_with_a_loss_over_padding_are_refused():
    model = transformers.AutoModelForQuestionAnswering.from_config(FAMILIES["qwen2"], attn_implementation="flashcp")
    with pytest.raises(UnsupportedModelError, match="Qwen2ForQuestionAnswering has a loss over all positions"):
        attach(model, None)


def test_quantized_weights_are_refused():
    model = build_model("llama")
    model.is_quantized = True  # as set by transformers' quantizers
    with pytest.raises(UnsupportedModelError, match="has quantized weights"):
        attach(model, None)
