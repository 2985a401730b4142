"""Data loading: ranks of a group read the same documents, groups different ones, an epoch each once."""

import pytest

from hf_flashcp.errors import ConfigurationError, PlanError
from tests import loading_cases
from tests.test_resume import resumes


KEPT_WORKERS = {
    "dataloader_num_workers": 2,
    "dataloader_persistent_workers": True,
    "dataloader_prefetch_factor": 2,
}


def flat(steps):
    return [number for step in steps for number in step]


@pytest.mark.parametrize("world_size, cp_size", [(2, 2), (3, 3), (4, 2)])
@pytest.mark.parametrize(
    "kind, options",
    [
        ("list", {"num_train_epochs": 2}),
        ("table", {"num_train_epochs": 2, **KEPT_WORKERS}),
        ("stream", {}),
        ("torch stream", {}),
    ],
    ids=["list", "table, workers kept", "stream", "torch stream"],
)
def test_an_epoch_has_each_document_once(pool, kind, options, world_size, cp_size):
    """Streams in their order, as on one device; lists and tables shuffled, anew each epoch."""
    groups, count = world_size // cp_size, 16
    steps = count // (2 * groups)
    if "stream" in kind:
        options = {**options, "max_steps": steps}
    seen = pool.run(world_size, loading_cases.documents_by_step_with, kind, count, cp_size, options)
    for rank in range(world_size):
        assert seen[rank] == seen[rank // cp_size * cp_size]
    of_groups = seen[::cp_size]
    starts = range(0, len(seen[0]), steps)
    epochs = [[flat(each[first : first + steps]) for each in of_groups] for first in starts]
    for epoch in epochs:
        assert sorted(flat(epoch)) == list(range(count))
    if "stream" not in kind:
        assert len(epochs) == 2 and epochs[0] != epochs[1]


@pytest.mark.parametrize("kind", ["list", "stream"])
@resumes
def test_resuming_in_an_epoch_goes_on_with_the_same_batches(pool, tmp_path, kind):
    for seen, resumed in pool.run(2, loading_cases.resumed_documents, kind, str(tmp_path)):
        assert len(seen) == 8 and resumed == seen[3:]


@pytest.mark.parametrize("last", [1, 2])
def test_a_last_batch_with_fewer_documents(pool, last):
    """Fifteen documents at two a step for one group; the last one alone is still more tokens than ranks."""
    count = 14 + last
    (seen, _) = pool.run(2, loading_cases.documents_by_step_with, "list", count, 2, {"num_train_epochs": 1})
    assert [len(step) for step in seen] == [2] * 7 + [last]


def test_a_batch_with_fewer_tokens_than_ranks_is_named_on_every_rank(pool):
    for error in pool.errors(4, loading_cases.documents_by_step_with, "list", 1, 4, {"num_train_epochs": 1}):
        assert isinstance(error, PlanError) and "3 tokens for cp_size 4" in str(error), error


def test_dispatched_batches_are_refused(pool):
    options = {"max_steps": 2, "accelerator_config": {"dispatch_batches": True}}
    for error in pool.errors(2, loading_cases.documents_by_step_with, "stream", 8, 2, options):
        assert isinstance(error, ConfigurationError) and "dispatch_batches" in str(error), error
