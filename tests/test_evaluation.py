"""Evaluation compared with one document at a time on one device."""

import pytest

from hf_flashcp.errors import ConfigurationError
from hf_flashcp.integrations import plugin
from tests import evaluation_cases


LOSS = 1e-6  # relative, because the models compute their loss in fp32


@pytest.mark.parametrize("per_batch", [1, 2])
@pytest.mark.parametrize("cp_size", [1, 2, 3])
def test_evaluation_loss_is_the_mean_over_all_targets(pool, cp_size, per_batch):
    """Documents have unequal lengths, so that the mean of batches' means is a different number."""
    for measured, expected in pool.run(cp_size, evaluation_cases.evaluation_loss, [40, 3, 17, 25], cp_size, per_batch):
        assert measured == pytest.approx(expected, rel=LOSS)


@pytest.mark.parametrize("num_documents, per_batch", [(3, 2), (4, 2), (5, 2), (5, 3), (7, 1)])
@pytest.mark.parametrize("cp_size", [1, 2])
def test_evaluation_counts_each_document_once(pool, num_documents, per_batch, cp_size):
    """accelerate completes the last batches of two data-parallel groups with documents from the beginning."""
    lengths = [40, 25, 18, 31, 22, 12, 9][:num_documents]
    for measured, expected in pool.run(2 * cp_size, evaluation_cases.evaluation_loss, lengths, cp_size, per_batch):
        assert measured == pytest.approx(expected, rel=LOSS)


@pytest.mark.parametrize("preprocess", [None, evaluation_cases.most_likely])
@pytest.mark.parametrize(
    "world_size, cp_size, num_documents, per_batch",
    [(1, 1, 5, 2), (2, 1, 5, 2), (2, 2, 5, 2), (3, 3, 4, 3), (4, 2, 5, 2), (4, 2, 3, 1)],
)
def test_metrics_see_whole_documents_in_order(pool, world_size, cp_size, num_documents, per_batch, preprocess):
    lengths = [40, 25, 18, 31, 22][:num_documents]
    for found in pool.run(world_size, evaluation_cases.predictions, lengths, cp_size, per_batch, preprocess):
        assert found["rows"] == num_documents and max(found["errors"]) < 1e-5
        assert found["accuracy"] == pytest.approx(found["expected_accuracy"])
        assert found["predict_is_the_same"]


@pytest.mark.parametrize("world_size, cp_size", [(1, 1), (2, 1), (2, 2), (4, 2)])
def test_padding_is_not_a_document(pool, world_size, cp_size):
    for found in pool.run(world_size, evaluation_cases.padded_predictions, [40, 25, 18], cp_size, 2):
        assert found["rows"] == 3 and max(found["errors"]) < 1e-5


def test_callbacks_may_generate(pool):
    assert pool.run(2, evaluation_cases.generated_in_callbacks, [40, 25, 18, 31]) == [(4, True)] * 2


@pytest.mark.parametrize(
    "world_size, cp_size, num_documents, per_batch",
    [(1, 1, 4, 3), (2, 1, 5, 2), (2, 2, 5, 2), (3, 3, 4, 3), (4, 2, 5, 2)],
)
def test_perplexity_by_document(pool, world_size, cp_size, num_documents, per_batch):
    """Prompts are masked, one document has no target, and the last batches of groups repeat rows."""
    lengths = [40, 25, 18, 31, 22][:num_documents]
    for found in pool.run(world_size, evaluation_cases.document_losses, lengths, cp_size, per_batch):
        assert found["sums"] == pytest.approx(found["expected"], rel=LOSS)
        assert found["targets"] == found["expected_targets"]
        assert found["perplexity_is_that"] and found["metrics_are_left"]


@pytest.mark.parametrize("with_metrics", [False, True])
@pytest.mark.parametrize("world_size, cp_size, per_batch", [(1, 1, 5), (2, 1, 3), (2, 2, 5), (4, 2, 3)])
def test_sft_trainer_evaluates(pool, world_size, cp_size, per_batch, with_metrics):
    """TRL's own metrics are compared too. With two groups of three, the first document completes the last batch."""
    lengths = [40, 25, 18, 31, 22]
    for found in pool.run(world_size, evaluation_cases.sft_evaluation, lengths, cp_size, per_batch, with_metrics):
        assert found["metrics"]["eval_loss"] == pytest.approx(found["loss"], rel=LOSS)
        assert found["metrics"]["eval_mean_token_accuracy"] == pytest.approx(found["accuracy"], rel=LOSS)
        assert found["metrics"]["eval_entropy"] == pytest.approx(found["entropy"], rel=1e-5)
        assert found["documents_seen"] == ([len(lengths)] if with_metrics else [])


@pytest.mark.parametrize("kind", evaluation_cases.ON_ONE_RANK)
@pytest.mark.parametrize("world_size", [1, 2])
def test_evaluation_that_only_cp_size_1_supports(pool, kind, world_size):
    """Options that are refused at larger cp_sizes, and padded rows. The loss is weighted by targets where possible."""
    for found in pool.run(world_size, evaluation_cases.on_one_rank, [40, 3, 17, 25, 9], kind):
        assert found["loss"] == pytest.approx(found["expected"], rel=LOSS)
        assert found["rows"] == found["expected_rows"]
        assert found["trained"]


def test_every_option_refused_above_cp_size_1_is_tested_at_1():
    refused = {*plugin._REFUSED_ARGUMENTS} | {"compute_loss_func"}
    assert refused - {"auto_find_batch_size", "neftune_noise_alpha", "train_sampling_strategy"} <= {
        *evaluation_cases.ON_ONE_RANK
    }


@pytest.mark.parametrize(
    "kind, message",
    [
        ("no length", "The evaluation set has no length"),
        ("one of two sets without a length", "The evaluation set has no length"),
        ("rows that cannot be told apart", "cannot tell the dataset's rows apart"),
        ("router logits", "The model's outputs aux_loss, router_logits belong to a packed batch"),
    ],
)
def test_training_does_not_begin_when_evaluation_would_fail(pool, kind, message):
    errors = pool.errors(4, evaluation_cases.refused_before_training, kind)
    assert len(errors) == 4
    for error in errors:
        assert type(error) is ConfigurationError and message in str(error) and "step 0" in str(error.__notes__)


def test_router_logits_may_be_ignored(pool):
    for seen in pool.run(2, evaluation_cases.router_logits_ignored):
        assert seen == [(2, 25, 67)]


def test_one_packed_row_per_batch_is_a_dataset_row(pool):
    for measured, expected in pool.run(4, evaluation_cases.loss_of_flattened_rows):
        assert measured == pytest.approx(expected, rel=LOSS)
