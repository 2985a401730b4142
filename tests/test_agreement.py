"""Ranks that differ raise the same error, which names the ranks and the difference, well before any timeout."""

import threading

import pytest

from hf_flashcp.distributed.liveness import within
from tests import agreement_cases


SECONDS = 30  # no rank waits longer for the error


def check(results, kind, *fragments):
    for name, message, seconds in results:
        assert name == kind, message
        assert seconds < SECONDS
        for fragment in fragments:
            assert fragment in message


def test_different_batches(pool):
    results = pool.run(3, agreement_cases.different_batches)
    check(results, "BatchError", "Ranks disagree on the batch", "tokens is 21 on ranks 0, 2 and 22 on rank 1")


def test_different_strategies(pool):
    results = pool.run(2, agreement_cases.different_strategies)
    check(results, "BatchError", "Ranks disagree on the batch", "plan is ", "use the same strategy")
    assert all("documents is" not in message for _, message, _ in results)


def test_the_same_lengths_with_other_tokens(pool):
    for results in zip(*pool.run(3, agreement_cases.same_lengths_other_tokens)):
        check(results, "BatchError", "Ranks disagree on the batch: content is", "on ranks 0, 2 and")


def test_different_models(pool):
    results = pool.run(2, agreement_cases.different_models)
    check(
        results,
        "ConfigurationError",
        'dtype is "torch.float64" on rank 0 and "torch.float32" on rank 1',
        "heads is [4, 2] on rank 0 and [2, 2] on rank 1",
    )


def test_different_cp_sizes(pool):
    results = pool.run(4, agreement_cases.different_cp_sizes)
    check(results, "ConfigurationError", "cp_size is 2 on ranks 0, 1 and 4 on ranks 2, 3")


def test_a_missing_rank_is_named(pool):
    first, _, third = pool.run(3, agreement_cases.a_rank_that_does_not_come)
    check([first, third], "ConfigurationError", "for ranks [1] to compare a test", "Missing: rank 1", "Do this.")
    assert not any(
        "; rank" in message for _, message, _ in (first, third)
    )  # ranks that wait for the missing one wait themselves


def test_agreement_leaves_no_keys_in_the_store(pool):
    pool.run(4, agreement_cases.agree_many_times, 200)
    before = pool._store.num_keys()
    pool.run(4, agreement_cases.agree_many_times, 200)
    assert pool._store.num_keys() <= before + 8


def test_debug_mode_checks_every_exchange(pool):
    results = pool.run(2, agreement_cases.exchange_that_does_not_fit)
    check(results, "ConfigurationError", "An exchange differs between ranks", "which expects")
    assert pool.run(2, agreement_cases.exchange_that_fits)[0][0] is None


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_failed_agreement_does_not_spoil_the_next(pool, world_size):
    pool.run(world_size, agreement_cases.different_batches if world_size > 2 else agreement_cases.different_strategies)
    assert pool.errors(world_size, agreement_cases.agree_many_times, 3) == [None] * world_size


def test_calls_to_the_store_share_a_thread_until_one_does_not_return():
    first = within(60, threading.get_ident)
    assert within(60, threading.get_ident) == first != threading.get_ident()
    end, late = threading.Event(), []
    assert within(0.01, lambda: late.append(threading.current_thread()) or end.wait()) is None
    assert within(60, threading.get_ident) != first
    end.set()
    late[0].join(60)
    assert late[0].ident == first and not late[0].is_alive()


def test_a_lost_store_gives_no_answer():
    def gone():
        raise RuntimeError("Broken pipe")

    assert within(60, gone) is None and within(60, lambda: 1) == 1
