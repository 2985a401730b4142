"""Loss functions that ranks can share train exactly; all others are detected and refused on every rank."""

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
    """The loss is also refused on ranks without targets."""
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
    """No token of a document is trained to predict the first token of the next document."""
    assert pool.run(1, loss_cases.first_step, family, "own_shift") == [None]
    if family == "llama":
        assert pool.run(1, loss_cases.gradient_error, family, "own_shift")[0] < 1e-12


@pytest.mark.parametrize("extra", [0.0, 0.25])
def test_a_loss_inside_the_forward(pool, extra):
    """The check does not rely on the value of the loss, because further terms change it."""
    assert pool.run(2, loss_cases.losses_inside_the_forward, True, extra) == [None] * 2
    for message in pool.run(2, loss_cases.losses_inside_the_forward, False, extra):
        assert "computes its loss from labels and not from shift_labels" in message


def test_a_model_that_does_not_hand_shift_labels_on(pool):
    for message in pool.run(2, loss_cases.handed_on_by_nobody):
        assert "does not pass shift_labels to its loss function" in message


def test_a_forward_that_only_mentions_its_loss_function_is_refused_in_the_second_step(pool):
    for first, second in pool.run(2, loss_cases.loss_function_mentioned_alone):
        assert first is None and "computes its loss from labels and not from shift_labels" in second


def test_sharding_by_caller_or_hooks_gives_the_same_loss(pool):
    for ratio in pool.run(2, loss_cases.already_sharded):
        assert ratio == 1.0
