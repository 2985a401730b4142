"""The model that a Trainer trains and evaluates is the attached one, wherever it comes from."""

import pytest
import transformers
from packaging.version import Version

from hf_flashcp.errors import ConfigurationError, UnsupportedModelError
from tests import lifecycle_cases


EXACT = 1e-6
SIZES = [1, 2, 3]


def check(results, models, tolerance=EXACT):
    for found in results:
        assert found["gradient_error"] < tolerance and found["loss_error"] < tolerance
        assert found["handle_is_current"] and not found["others_are_attached"]
        assert found["models"] == models


@pytest.mark.parametrize("world_size", SIZES)
@pytest.mark.parametrize("times", [1, 2])
def test_model_init(pool, world_size, times):
    """`model_init` creates a model for `__init__` and one for each `train`."""
    check(pool.run(world_size, lifecycle_cases.model_init, times), 1 + times)


@pytest.mark.parametrize("world_size", [1, 2])
def test_training_twice(pool, world_size):
    results = pool.run(world_size, lifecycle_cases.train_twice)
    check(results, 1)
    assert all(found["same_handle"] for found in results)


@pytest.mark.parametrize(
    "world_size, how, arguments, cp_size",
    [
        (1, "evaluate", {}, 1),
        (2, "evaluate", {}, 1),
        (2, "evaluate", {}, 2),
        (2, "predict", {}, 2),
        (2, "document_losses", {}, 2),
        (4, "evaluate", {}, 2),
        (2, "evaluate", {"bf16": True}, 2),
    ],
    ids=str,
)
def test_training_after_an_evaluation(pool, world_size, how, arguments, cp_size):
    results = pool.run(world_size, lifecycle_cases.evaluated_first, how, arguments, cp_size)
    check(results, 1, tolerance=3e-2 if "bf16" in arguments else EXACT)


@pytest.mark.parametrize(
    "how", ["before training", "after training", "and evaluated", "a copy", "a copy of a trained one"]
)
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_model_that_is_assigned(pool, world_size, how):
    results = pool.run(world_size, lifecycle_cases.assigned, how)
    check(results, 1 if "copy" in how else 2)
    assert all(found["trained"] for found in results)


@pytest.mark.parametrize("world_size", [1, 2])
def test_adapters_that_are_added(pool, world_size):
    check(pool.run(world_size, lifecycle_cases.wrapped_in_lora), 1)


def test_model_init_under_fsdp2(pool):
    check(pool.run(2, lifecycle_cases.sharded_with_model_init), 2)


@pytest.mark.parametrize("world_size", SIZES)
def test_hyperparameter_search(pool, world_size):
    results = pool.run(world_size, lifecycle_cases.search)
    check(results, 4)
    assert all(found["losses"] == 3 for found in results)


def test_a_trial_cannot_set_a_refused_option(pool):
    for error in pool.errors(2, lifecycle_cases.search_with_a_refused_option):
        assert type(error) is ConfigurationError and "auto_find_batch_size cannot be used" in str(error)


def test_a_model_that_cannot_be_attached_is_refused_when_training_begins(pool):
    for error in pool.errors(2, lifecycle_cases.model_init_with_another_attention):
        assert type(error) is UnsupportedModelError and "attn_implementation" in str(error)


@pytest.mark.parametrize("how", ["best", "resumed", "resumed, model_init"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_saved_models(pool, world_size, how):
    if world_size > 1 and "resumed" in how and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("transformers 5.17 loads optimizer state to the device 'cpu:0', which torch.load does not know")
    for found in pool.run(world_size, lifecycle_cases.saved, how):
        assert found["loss_error"] < EXACT and found["best_error"] < EXACT
        assert found["worst"] > 1e-3 and found["handle_is_current"]


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_callback_attaches_each_model(pool, world_size):
    for found in pool.run(world_size, lifecycle_cases.callback_with_model_init):
        assert max(found["errors"]) < EXACT
        assert found["handles"] == 2 and found["handle_is_current"]
