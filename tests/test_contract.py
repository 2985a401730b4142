"""Evaluation compared with the stock Trainer, which has one document per row on one device."""

import dataclasses
import inspect
import math
import re

import pytest
import torch
from transformers import Trainer, TrainingArguments

from hf_flashcp.errors import ConfigurationError
from hf_flashcp.integrations import plugin
from hf_flashcp.integrations.trainers.predictions import per_token_outputs
from tests import contract_cases


LENGTHS = [40, 3, 17, 25, 9]
LAYOUTS = [(1, 1, 2), (2, 1, 1), (3, 3, 1), (4, 2, 1)]  # processes, cp_size, documents per batch

# Further arguments of Trainer's evaluation, which affect only where and how fast it runs.
OTHER_ARGUMENTS = {
    "bf16_full_eval",
    "debug",
    "device",
    "eval_batch_size",
    "fp16_full_eval",
    "torch_compile",
    "use_liger_kernel",
    "world_size",
}
# Fields of TrainingArguments about evaluation, and whether they are supported; all others are refused.
EVALUATION_ARGUMENTS = {
    "batch_eval_metrics": True,
    "bf16_full_eval": True,
    "do_eval": True,
    "do_predict": True,
    "eval_accumulation_steps": True,
    "eval_delay": True,
    "eval_do_concat_batches": True,
    "eval_on_start": True,
    "eval_steps": True,
    "eval_strategy": True,
    "eval_use_gather_object": False,
    "fp16_full_eval": True,
    "include_for_metrics": True,
    "metric_for_best_model": True,
    "per_device_eval_batch_size": True,
    "prediction_loss_only": True,
}


def needs_one_document_per_batch(name):
    """Return whether an option must run with one document per batch, because the stock Trainer has losses per
    batch."""
    return "loss" in contract_cases.OPTIONS[name].get("args", {}).get("include_for_metrics", [])


@pytest.mark.parametrize("name", contract_cases.OPTIONS)
def test_evaluation_equals_the_stock_trainers(pool, name):
    (expected,) = pool.run(1, contract_cases.stock, name, LENGTHS)
    for world_size, cp_size, per_batch in LAYOUTS:
        if needs_one_document_per_batch(name):
            per_batch = 1
        for found in pool.run(world_size, contract_cases.ours, name, LENGTHS, cp_size, per_batch):
            layout = f"{world_size} processes, cp_size {cp_size}"
            for key in ("seen", "predictions", "label_ids"):
                assert not contract_cases.differences(expected[key], found[key], key), layout
            for key in ("metrics", "test_metrics"):
                assert found[key] == pytest.approx(expected[key], rel=1e-6), layout


def test_every_option_of_the_evaluation_is_in_the_table():
    """A new upstream option must be supported or refused: add it to OPTIONS, or to plugin.py's refused arguments."""
    methods = (Trainer.evaluation_loop, Trainer.prediction_step, Trainer.evaluate, Trainer.predict)
    read = {name for method in methods for name in re.findall(r"\bargs\.(\w+)", inspect.getsource(method))}
    covered = {name for options in contract_cases.OPTIONS.values() for name in options.get("args", {})}
    assert read - OTHER_ARGUMENTS <= covered
    about = re.compile("eval|predict(?!_with)|for_metrics|metric_for")
    fields = {field.name for field in dataclasses.fields(TrainingArguments) if about.search(field.name)}
    assert fields == EVALUATION_ARGUMENTS.keys()
    refused = {name for name, served in EVALUATION_ARGUMENTS.items() if not served}
    assert refused == fields & plugin._REFUSED_ARGUMENTS.keys()


def test_outputs_that_are_tuples():
    """Models without `return_dict` return the loss first."""
    logits, hidden = torch.zeros(1, 5, 7, requires_grad=True), torch.ones(1, 5, 3)
    found = per_token_outputs((torch.tensor(2.0), logits, (hidden,)), [], tokens=5)
    assert found[0].shape == logits.shape and not found[0].requires_grad and torch.equal(found[1][0], hidden)
    with pytest.raises(ConfigurationError, match=r"output 2 belong to a packed batch"):
        per_token_outputs((torch.tensor(2.0), logits, torch.zeros(())), [], tokens=5)


@pytest.mark.parametrize("world_size, cp_size, per_batch", [(1, 1, 2), (2, 1, 2), (2, 2, 3), (4, 2, 2)])
def test_losses_for_metrics_are_those_of_batches(pool, world_size, cp_size, per_batch):
    for found, expected in pool.run(world_size, contract_cases.losses_of_batches, LENGTHS, cp_size, per_batch):
        assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("world_size, cp_size", [(1, 1), (2, 2), (4, 2)])
def test_batches_without_a_finite_loss_are_left_out(pool, world_size, cp_size):
    for found, expected in pool.run(world_size, contract_cases.without_finite_loss, LENGTHS, cp_size, True):
        assert found == pytest.approx(expected, rel=1e-6)
    for found, _ in pool.run(world_size, contract_cases.without_finite_loss, LENGTHS, cp_size, False):
        assert math.isnan(found)
