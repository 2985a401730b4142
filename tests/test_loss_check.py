"""Loss functions: those that ranks can share train exactly, all others are refused on every rank by what they do."""

import pytest

from tests import loss_cases


FAMILIES = ["llama", "qwen3_moe"]
IGNORES = "has a loss function that ignores shift_labels"
NO_SUM = "has a loss function that is not the sum over its targets divided by num_items_in_batch"
REFUSED = {
    "own_shift": IGNORES,
    "mean_of_targets": NO_SUM,
    "not_divided": NO_SUM,
    "squared": NO_SUM,
    "pairs_of_tokens": "fails on 4 of the tokens (AssertionError: rows of eight",
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("loss", loss_cases.LOSSES)
@pytest.mark.parametrize("cp_size", [2, 3])
def test_a_loss_that_ranks_cannot_share_is_refused(pool, cp_size, loss, family):
    """On ranks that have no targets, too."""
    for prompt in (0.3, 1.0):
        for message in pool.run(cp_size, loss_cases.first_step, family, loss, prompt):
            if loss in REFUSED:
                assert REFUSED[loss] in message and "cp_size 1" in message
            else:
                assert message is None


@pytest.mark.parametrize("loss", ["transformers", "focal"])
@pytest.mark.parametrize("cp_size", [1, 2, 3])
def test_other_sums_over_targets_are_exact(pool, cp_size, loss):
    for error in pool.run(cp_size, loss_cases.gradient_error, "llama", loss):
        assert error < (1e-6 if loss == "transformers" else 1e-12)  # transformers casts logits to fp32


@pytest.mark.parametrize("family", FAMILIES)
def test_one_rank_may_have_a_loss_that_shifts_labels_by_itself(pool, family):
    """No token of one document is trained to predict the first of the next."""
    assert pool.run(1, loss_cases.first_step, family, "own_shift") == [None]
    if family == "llama":
        assert pool.run(1, loss_cases.gradient_error, family, "own_shift")[0] < 1e-12


@pytest.mark.parametrize("extra", [0.0, 0.25])
def test_a_loss_inside_the_forward(pool, extra):
    """Nothing is told from the loss's value: a further term changes it."""
    assert pool.run(2, loss_cases.losses_inside_the_forward, True, extra) == [None] * 2
    for message in pool.run(2, loss_cases.losses_inside_the_forward, False, extra):
        assert "computes its loss from labels and not from shift_labels" in message


def test_a_model_that_does_not_hand_shift_labels_on(pool):
    for message in pool.run(2, loss_cases.shift_labels_not_passed_on):
        assert "does not hand shift_labels on to its loss function" in message


def test_a_forward_that_seems_to_call_its_loss_function_is_found_out_in_the_second_step(pool):
    for first, second in pool.run(2, loss_cases.loss_function_mentioned_alone):
        assert first is None and "computes its loss from labels and not from shift_labels" in second


def test_who_shards_the_batch_makes_no_difference(pool):
    for ratio in pool.run(2, loss_cases.already_sharded):
        assert ratio == 1.0
