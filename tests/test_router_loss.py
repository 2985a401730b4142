"""Router losses of mixture-of-experts models, which are not sums over tokens."""

import importlib
import inspect
import pkgutil

import pytest
import torch
import transformers.models
from transformers import BambaConfig

from hf_flashcp.integrations.models.router_loss import FUNCTION, router_loss, share_router_losses
from tests import router_cases
from tests.models import build_model


LENGTHS = [40, 3, 17, 1, 25]
MANY = [40, 3, 17, 9, 25, 1, 30, 7, 12, 5, 5, 5]
EXACT = 1e-12  # relative Frobenius norm of each parameter's gradient, relative difference of a loss; all in fp64
LOGGED = 1e-6  # relative, because Trainer adds up losses in fp32

OTHER_FORMULAS = {"doge", "nllb_moe", "switch_transformers"}
"""Encoder-decoder models, which are refused anyway, and a model with two routers per layer."""


def modeling_files():
    """Yield (name, module) of transformers' modeling files with a router loss."""
    for package in pkgutil.iter_modules(transformers.models.__path__):
        name = f"transformers.models.{package.name}.modeling_{package.name}"
        if (spec := importlib.util.find_spec(name)) is not None:
            if f"def {FUNCTION}(" in open(spec.origin, encoding="utf-8").read():
                yield package.name, importlib.import_module(name)


def test_every_copy_of_the_function_has_the_formula():
    """A family whose copy differs would be refused in its first step: list it above, and mention it in
    docs/models.md."""
    torch.manual_seed(0)
    logits = tuple(torch.randn(9, 6) for _ in range(3))
    found = dict(modeling_files())
    assert {"mixtral", "qwen3_moe", "gpt_oss"} | OTHER_FORMULAS <= found.keys()
    for name in found.keys() - OTHER_FORMULAS:
        function = getattr(found[name], FUNCTION)
        stock = getattr(function, "_flashcp_stock", function)
        assert list(inspect.signature(stock).parameters) == ["gate_logits", "num_experts", "top_k", "attention_mask"]
        assert torch.allclose(stock(logits, 6, 2), router_loss(logits, 6, 2, None), rtol=1e-6), name


@pytest.mark.parametrize("losses_add_up", [True, False])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("cp_size", [1, 2, 3, 4])
def test_the_router_loss_equals_that_of_the_packed_batch(pool, cp_size, family, losses_add_up):
    """Gradients, loss and `aux_loss` are compared here; `python -m hf_flashcp doctor` checks all families."""
    for strategy in ("per_doc", "whole_doc"):
        for errors in pool.run(cp_size, router_cases.router_errors, family, LENGTHS, strategy, losses_add_up):
            assert max(errors) < EXACT


def test_a_mean_over_the_ranks_own_tokens_would_be_noticed(pool):
    for gradient, loss, aux in pool.run(2, router_cases.router_errors, "mixtral", LENGTHS, "per_doc", True, False):
        assert gradient > 1e-3 and loss > 1e-6 and aux > 1e-6


@pytest.mark.parametrize(
    "world_size, cp_size, options",
    [
        (1, 1, {}),
        (2, 2, {}),
        (3, 3, {"gradient_accumulation_steps": 2}),
        (2, 1, {}),
        (4, 2, {}),
        (4, 2, {"gradient_accumulation_steps": 2}),
        (2, 1, {"average_tokens_across_devices": False}),
        (4, 2, {"average_tokens_across_devices": False}),
        (2, 2, {"callback": True}),
        (4, 2, {"callback": True}),
        (2, 2, {"callback": True, "average_tokens_across_devices": False}),
        (2, 1, {"global_router_loss": True}),
        (4, 2, {"global_router_loss": True}),
        (4, 2, {"global_router_loss": True, "callback": True}),
    ],
    ids=str,
)
def test_trainers_count_it_as_they_do_without_context_parallelism(pool, world_size, cp_size, options):
    for gradient, logged in pool.run(world_size, router_cases.trainer_router_errors_with, MANY, cp_size, options):
        assert gradient < EXACT and logged < LOGGED


@pytest.mark.parametrize("world_size, cp_size", [(1, 1), (2, 2), (3, 3), (2, 1), (4, 2)])
def test_eval_loss_has_each_batch_s_router_loss_once(pool, world_size, cp_size):
    for error in pool.run(world_size, router_cases.evaluation_error, MANY, cp_size, 3):
        assert error < EXACT


def test_a_term_that_is_not_computed_over_all_ranks_is_refused(pool):
    for message in pool.run(2, router_cases.unknown_term):
        assert "MixtralForCausalLM adds a term of" in message and "would count once per rank" in message


def test_another_formula_is_refused(pool):
    for message in pool.run(2, router_cases.other_formula):
        assert "computes its router loss differently from Switch Transformers" in message


@pytest.mark.parametrize("losses_add_up", [True, False])
@pytest.mark.parametrize("cp_size", [1, 2, 3])
def test_z_losses_are_means_over_the_packed_batch(pool, cp_size, losses_add_up):
    assert "z_loss_coefficient" in inspect.signature(BambaConfig.__init__).parameters
    for errors in pool.run(cp_size, router_cases.z_loss_errors, LENGTHS, losses_add_up):
        assert max(errors) < EXACT


def test_without_a_sharded_forward_transformers_function_runs():
    """Modules that already use transformers' function are not modified."""
    model = build_model("mixtral", "sdpa", **router_cases.ROUTER)
    ids = torch.tensor([[1, 2, 3, 4]])
    before = model(ids, labels=ids).aux_loss
    share_router_losses(model)
    function = getattr(importlib.import_module(type(model).__module__), FUNCTION)
    share_router_losses(model)
    assert getattr(importlib.import_module(type(model).__module__), FUNCTION) is function
    assert torch.equal(model(ids, labels=ids).aux_loss, before)


def test_the_gradient_check_of_recipes_includes_router_losses():
    assert router_cases.checked_gradient_error(LENGTHS) < EXACT
