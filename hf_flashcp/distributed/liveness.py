"""Finds out which ranks are missing when a collective fails or stalls, with the same result on all other ranks.

A backend reports that a connection was closed or that a timeout expired, but not which rank caused it. So each process
has a thread that answers requests through the process group's key-value store, even while the main thread is stuck in
a collective. The first rank whose collective fails asks all others. A rank that does not answer was killed or is
stopped; a rank that answers says where its main thread is. The conclusion of the first rank is the result for all
ranks. A rank that ends because of an exception of its own publishes that exception as the result.

Under NCCL no collective fails in Python: the GPU waits, and after the timeout the watchdog ends the process. So the
thread also asks when an exchange is about to time out, and logs the conclusion. It logs a published result too, if the
main thread has not raised it soon. Both happen with every backend.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from .conclusions import conclude, raised, store_is_gone
from .helper_thread import within
from .location import activities, activity, current_wait, location
from .process_group import group_timeout


logger = logging.getLogger(__name__)

ANSWER = timedelta(seconds=10)  # how long a live process may take to answer, unless the group's timeout is shorter
_POLL = 1.0  # seconds
_BEFORE_TIMEOUT = 60.0  # seconds before its timeout, but not in its first half, in which a stall is reported
_RAISED_WITHIN = 5.0  # seconds; after this long, the main thread does not raise a published result
_LATE_ANSWER = 20.0  # seconds; the store's process stalls for 5 when DNS cannot resolve a new connection
_watch: _Watch | None = None


def find_missing_ranks() -> str:
    """Return a sentence that names the missing ranks, the same on every rank that asks after the same failure.

    This takes as long as `ANSWER` if a rank does not answer.
    """
    watch, most = watch_liveness(), _longest_answer()
    watch.raised_in = watch.run
    if watch.result is None:
        within(3 * most + 5 * _POLL, lambda: _check_liveness(watch, watch.run, most))
        watch.keep_result(watch.run, store_is_gone(name_of_rank))
    return watch.result


def result_of_others() -> str | None:
    """Return the result that another rank has published, or `None` if there is none."""
    return _watch.result if _watch is not None else None


def tell_others(error: BaseException) -> None:
    """Publish that this rank ends because of an exception of its own."""
    if not dist.is_initialized():
        return
    watch, most = watch_liveness(), min(_longest_answer(), 3 * _POLL)
    run = watch.raised_in = watch.run
    if watch.result is not None:
        return

    def tell() -> None:
        watch.store.set(_key(run, "call"), str(watch.rank))
        watch.publish(run, raised(name_of_rank(watch.rank), error))
        _wait_until_heard(watch, run, watch.others, most)

    within(most + 5 * _POLL, tell)


def watch_liveness() -> _Watch:
    """Start the thread that answers for this process, once per default process group, and return its state."""
    global _watch
    store = dist.distributed_c10d._get_default_store()
    if _watch is None or _watch.shared_store is not store:
        if _watch is not None:
            _watch.stop()
        _watch = _Watch(store)
    return _watch


def name_of_rank(rank: int) -> str:
    """Return the name of a rank in messages, with its host if it is known."""
    host = _watch.hosts.get(rank) if _watch is not None else None
    if host is None and rank == dist.get_rank():
        host = socket.gethostname()
    return f"rank {rank}" + (f" (host {host})" if host else "")


class _Watch:
    """The thread that answers liveness checks for this process, and the results of these checks.

    Checks have names. That of a failure is the number of the run, that of a stall `"RUN/stall NUMBER"`.
    """

    def __init__(self, shared_store: dist.Store):
        # The thread has its own connection to the store: a wait on the shared connection blocks all other calls.
        self.shared_store, self.store = shared_store, shared_store.clone()
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.hosts: dict[int, str] = {}  # by rank, as far as ranks have published theirs
        self.run = 0  # how many outermost `name_missing_ranks` have ended; each has its own check
        self.raised_in = -1  # last run whose failure the main thread knows
        self._results: dict[int | str, str] = {}
        self._heard: dict[int, float] = {}  # when the thread read the result of a run
        self._answered: set[str] = set()
        self._stalls: Counter[int] = Counter()  # how many checks of stalls have ended, by run
        self._asking: Iterator[None] | None = None  # the check of a stall, one step per poll
        self._stall: tuple[float, str] | None = None  # when the thread read the result of the last stall, and it
        self._reported_since: float | None = None  # begin of the wait that was reported last
        self._end = threading.Event()
        self.store.set(_host_key(self.rank), socket.gethostname())
        self._thread = threading.Thread(target=self._run, name="flashcp-liveness", daemon=True)
        self._thread.start()
        atexit.register(self.stop)

    @property
    def others(self) -> list[int]:
        return [rank for rank in range(self.world_size) if rank != self.rank]

    @property
    def result(self) -> str | None:
        """The result of the current run's check, or `None` before there is one."""
        return self._results.get(self.run)

    def keep_result(self, check: int | str, result: str) -> None:
        self._results.setdefault(check, result)

    def publish(self, check: int | str, result: str) -> None:
        """Make `result` the result of a check on all ranks, unless another rank has published one before."""
        self.keep_result(check, self.store.compare_set(_key(check, "result"), "", result).decode())

    def stop(self) -> None:
        """End the thread."""
        # This runs before the interpreter shuts down: a thread that returns from the store after that aborts it.
        atexit.unregister(self.stop)
        self._end.set()
        self._thread.join(_LATE_ANSWER)

    def learn_hosts(self) -> None:
        """Read the hosts of the other ranks, once all of them have published theirs."""
        keys = {rank: _host_key(rank) for rank in range(self.world_size) if rank not in self.hosts}
        if keys and self.store.check(list(keys.values())):
            self.hosts.update(zip(keys, (host.decode() for host in self.store.multi_get(list(keys.values())))))

    def _run(self) -> None:
        with contextlib.suppress(dist.DistError, RuntimeError):
            while not self._end.wait(_POLL if self._asking is None else _POLL / 10):
                self.learn_hosts()
                run = self.run
                for each in (run, run - 1):  # other ranks may still be in the previous run
                    if self._answer(each):
                        self._heard[each] = time.monotonic()
                self._report_result(run)
                self._look_for_stall(run)

    def _answer(self, check: int | str) -> bool:
        """Answer a check if there is one, and return whether its result was read just now."""
        called, here, result, heard = (_key(check, name) for name in ("call", "here", "result", "heard"))
        if here not in self._answered and self.store.check([called]):
            self.store.set(f"{here}/{self.rank}", json.dumps(location()))
            self._answered.add(here)
        if here in self._answered and heard not in self._answered and self.store.check([result]):
            self.keep_result(check, self.store.get(result).decode())
            self.store.set(f"{heard}/{self.rank}", "null")
            self._answered.add(heard)
            return True
        return False

    def _report_result(self, run: int) -> None:
        """Log the result of a run that the main thread has not raised, because it waits for a GPU."""
        if (
            activities
            and self.raised_in < run
            and time.monotonic() > self._heard.get(run, float("inf")) + _RAISED_WITHIN
        ):
            self.raised_in = run
            logger.error(f"R{name_of_rank(self.rank)[1:]} is in {activity()}. {self._results[run]}")

    def _look_for_stall(self, run: int) -> None:
        """Report an exchange that is about to time out: take part in a check of all ranks, and log its result.

        The missing rank may still come, and another exchange may stall later, so this is not the result of the run.
        """
        check = f"{run}/stall {self._stalls[run]}"
        if self._answer(check):
            self._stalls[run] += 1
            self._stall, self._asking = (time.monotonic(), self._results[check]), None
        if self._asking is not None:
            next(self._asking, None)
        wait = current_wait()
        if wait is None or wait.since == self._reported_since:
            return
        seconds, timeout = time.monotonic() - wait.since, group_timeout().total_seconds()
        if seconds < max(timeout / 2, timeout - _BEFORE_TIMEOUT):
            return
        if self._stall is not None and self._stall[0] > wait.since:
            self._reported_since = wait.since
            logger.error(
                f"R{name_of_rank(self.rank)[1:]} has waited {seconds:.0f} of {timeout:.0f} seconds for "
                f"{wait.waited_for} during {activity()}. {self._stall[1]}"
            )
        elif self._asking is None:
            self._asking = _ask(self, f"{run}/stall {self._stalls[run]}", _longest_answer())


def _key(check: int | str, name: str) -> str:
    return f"flashcp/missing/{check}/{name}"


def _host_key(rank: int) -> str:
    return f"flashcp/host/{rank}"


def _longest_answer() -> float:
    return min(ANSWER, group_timeout()).total_seconds()


def _check_liveness(watch: _Watch, run: int, most: float) -> None:
    """Ask all ranks, and wait until those that answered have read the result.

    The wait is needed because the store may end together with this process.
    """
    answers: dict[int, Any] = {}
    for _ in _ask(watch, run, most, answers):
        time.sleep(0.1)
    _wait_until_heard(watch, run, list(answers), most)


def _ask(watch: _Watch, check: int | str, most: float, answers: dict[int, Any] | None = None) -> Iterator[None]:
    """Ask all ranks and publish a conclusion, in steps; `answers` receives what ranks answer within `most` seconds."""
    answers = {} if answers is None else answers
    watch.store.set(_key(check, "call"), str(watch.rank))
    able = [rank for rank in watch.others if watch.store.check([_host_key(rank)])]
    yield from _collect(watch, check, "here", able, most, answers, until=_key(check, "result"))
    silent = [rank for rank in watch.others if rank not in answers]
    known = [rank for rank in silent if watch.store.check([_host_key(rank)])]
    watch.publish(check, conclude(name_of_rank, answers, known, silent))


def _wait_until_heard(watch: _Watch, run: int, readers: list[int], most: float) -> None:
    for _ in _collect(watch, run, "heard", readers, most, {}):
        time.sleep(0.1)


def _collect(
    watch: _Watch,
    check: int | str,
    name: str,
    ranks: list[int],
    most: float,
    found: dict[int, Any],
    until: str | None = None,
) -> Iterator[None]:
    """Read what ranks write under `name` into `found`, in steps, for `most` seconds or until there is `until`."""
    deadline = time.monotonic() + most
    while len(found) < len(ranks) and time.monotonic() < deadline and not (until and watch.store.check([until])):
        for rank in ranks:
            key = f"{_key(check, name)}/{rank}"
            if rank not in found and watch.store.check([key]):
                found[rank] = json.loads(watch.store.get(key))
        yield
