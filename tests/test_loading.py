"""Data loading: ranks of a group read the same documents, groups read different ones, and an epoch has each once."""

import pytest

from hf_flashcp.errors import BatchError, ConfigurationError, PlanError
from tests import loading_cases
from tests.test_resume import resumes


WORKERS = {"dataloader_num_workers": 2, "dataloader_multiprocessing_context": "fork"}
SPLIT = {"accelerator_config": {"split_batches": True}}


def flat(steps):
    return [number for step in steps for number in step]


@pytest.mark.parametrize("world_size, cp_size", [(2, 2), (3, 3), (4, 2)])
@pytest.mark.parametrize(
    "kind, options",
    [
        ("list", {"num_train_epochs": 2}),
        ("table", {"num_train_epochs": 2, **WORKERS}),
        ("stream", {}),
        ("stream", WORKERS),
        ("torch stream", {}),
    ],
    ids=["list", "table, workers", "stream", "stream, workers", "torch stream"],
)
def test_an_epoch_has_each_document_once(pool, kind, options, world_size, cp_size):
    """Streams keep their own order; lists and tables are shuffled anew in each epoch."""
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


def test_persistent_workers(pool):
    """Each loader has one worker, because PyTorch waits five seconds for every worker of a garbage-collected
    loader."""
    kept = {"dataloader_persistent_workers": True, "dataloader_prefetch_factor": 2}
    options = {"num_train_epochs": 2, **WORKERS, "dataloader_num_workers": 1, **kept}
    first, second = pool.run(2, loading_cases.documents_by_step_with, "table", 16, 2, options)
    assert first == second and sorted(flat(first[:8])) == sorted(flat(first[8:])) == list(range(16))
    assert first[:8] != first[8:]


@pytest.mark.parametrize("kind, options", [("list", {"num_train_epochs": 1}), ("stream", {"max_steps": 8})])
def test_split_batches_gives_each_group_a_part_of_a_batch(pool, kind, options):
    seen = pool.run(4, loading_cases.documents_by_step_with, kind, 16, 2, {**options, **SPLIT})
    assert seen[0] == seen[1] and seen[2] == seen[3]
    assert all(len(step) == 1 for group in seen for step in group)
    assert sorted(flat(seen[0]) + flat(seen[2])) == list(range(16))


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_that_are_not_copies_of_their_rank(pool, method):
    """With forkserver, the default in Python 3.14 on Linux, workers are not copies of their rank."""
    options = {"max_steps": 2, "dataloader_num_workers": 1, "dataloader_multiprocessing_context": method}
    first, second = pool.run(2, loading_cases.documents_by_step_with, "table", 16, 2, options)
    assert first == second and len(set(flat(first))) == 4


@pytest.mark.parametrize("options", [{}, WORKERS], ids=["0 workers", "2 workers"])
def test_ranks_of_a_group_draw_the_same_random_data(pool, options):
    """Workers of another group draw other data, because Trainer seeds them differently."""
    rows = pool.run(4, loading_cases.rows_by_step, "augmented", 12, 2, {"num_train_epochs": 1, **options})
    assert rows[0] == rows[1] and rows[2] == rows[3]
    if options:
        drawn = [{tuple(row[-3:]) for row in rows[rank]} for rank in (0, 2)]
        assert not drawn[0] & drawn[1]


def test_a_stream_that_ends_before_another_groups(pool):
    """The shorter stream starts again: one group has three documents, the other thirteen.

    Losses still cover both groups.
    """
    results = pool.run(4, loading_cases.uneven_stream, {"max_steps": 5})
    seen = [seen for seen, _ in results]
    assert seen[0] == seen[1] == [[0, 1], [2], [0, 1], [2], [0, 1]]
    assert seen[2] == seen[3] == [[3, 4], [5, 6], [7, 8], [9, 10], [11, 12]]
    assert all(losses == results[0][1] and len(losses) == 5 for _, losses in results)


def test_streams_that_end_apart_while_batches_are_accumulated(pool):
    """An optimizer step would have one batch in one group and two in the other, so that they would wait forever."""
    options = {"max_steps": 9, "gradient_accumulation_steps": 2}
    for error in pool.errors(4, loading_cases.uneven_stream, options):
        assert isinstance(error, BatchError) and "batches is 2 on ranks 0, 1 and 1 on ranks 2, 3" in str(error), error


@pytest.mark.parametrize("kind", ["list", "stream"])
@resumes
def test_resuming_in_an_epoch_goes_on_with_the_same_batches(pool, tmp_path, kind):
    for seen, resumed in pool.run(2, loading_cases.resumed_documents, kind, str(tmp_path)):
        assert len(seen) == 8 and resumed == seen[3:]


@pytest.mark.parametrize("last", [1, 2])
def test_a_last_batch_with_fewer_documents(pool, last):
    """One group reads fifteen documents, two per step; the last document alone still has more tokens than ranks."""
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
