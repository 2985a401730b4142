"""Finds out which ranks are missing when a collective fails or times out, with the same result on all other ranks.

A backend reports that a connection was closed or that a timeout expired, but not which rank caused it. So each process
has a thread that answers requests through the process group's key-value store, even while the main thread is stuck in
a collective. The first rank whose collective fails asks all others. A rank that does not answer was killed or is
stopped; a rank that answers says where its main thread is. The conclusion of the first rank is the result for all
ranks. A rank that ends because of an exception of its own publishes that exception as the result.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import queue
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ..errors import FlashCPError


ANSWER = timedelta(seconds=10)  # how long a live process may take to answer, unless the group's timeout is shorter
_POLL = 1.0  # seconds
_LATE_ANSWER = 20.0  # seconds; the store's process stalls for 5 when DNS cannot resolve a new connection
_MOST_NAMED = 8
_ADVICE = (
    "Look at the output of these ranks first. Saved checkpoints are complete: start again with "
    "resume_from_checkpoint=True (docs/reliability.md)."
)
_FAILED_COLLECTIVE = re.compile(
    r"\bgloo/|Connection (closed|reset) by peer|Timed out waiting \d+ms|Broken pipe|NCCL (error|communicator)|ncclUnh"
)
_WAITING_CODE = ("/torch/distributed/", "/torch/nn/parallel/", "/hf_flashcp/distributed/", "/hf_flashcp/exchange/")
_activities: list[str | Callable[[], str]] = []
_watch: _Watch | None = None


def group_timeout(group: dist.ProcessGroup | None = None) -> timedelta:
    """Return the timeout of a group's collectives; of the group of all ranks (`TrainingArguments.ddp_timeout`) by
    default."""
    group = group or dist.group.WORLD
    options = getattr(group._get_backend(group._device_types[0]), "options", None)
    return getattr(options, "_timeout", None) or dist.distributed_c10d.default_pg_timeout


def is_failed_collective(error: BaseException) -> bool:
    """Return whether an error says that other ranks could not be reached, rather than that this rank failed."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and _FAILED_COLLECTIVE.search(str(error)) is not None
    )


@contextlib.contextmanager
def name_missing_ranks(activity: str | Callable[[], str] = "training") -> Iterator[None]:
    """Context manager in which a collective that fails or times out raises an error that names the missing ranks.

    The [`FlashCPError`] is the same on all ranks, and gives the host of each missing rank. An exception that ends this
    rank is reported to the other ranks, so that their errors name it.

    `FlashCPTrainer` and the mixin train and evaluate inside this context manager. Put it around a training loop of
    your own, on every rank. If no launcher (torchrun, accelerate) holds the key-value store, the process of rank 0
    does; once that process is gone, the error says so and cannot name other ranks.

    Args:
        activity (`str` or `Callable[[], str]`): what the ranks are doing, for the message, or a function that returns
            it.

    Raises:
        FlashCPError: a collective failed. The backend's error is its cause.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        yield
        return
    watch = watch_liveness()
    _activities.append(activity)
    try:
        with naming("a collective"):
            yield
    except FlashCPError as error:
        if not (error.__cause__ is not None and is_failed_collective(error.__cause__)):
            _tell_others(error)
        raise
    except (Exception, SystemExit) as error:
        _tell_others(error)
        raise
    finally:
        _activities.pop()
        watch.run += not _activities  # all ranks may continue after a failure, which must not explain the next one


@contextlib.contextmanager
def naming(waited_for: str) -> Iterator[None]:
    """Context manager that turns the failure of a collective into the error that names the missing ranks.

    The message calls what the collective should have brought `waited_for`.
    """
    try:
        yield
    except FlashCPError:
        raise
    except RuntimeError as error:
        if not is_failed_collective(error):
            raise
        place = f" during {_activity()}" if _activities else ""
        timed_out = re.search("time(d )?out", str(error), re.IGNORECASE)
        how = "timed out waiting for" if timed_out else "lost the connection while waiting for"
        raise FlashCPError(
            f"R{_name(dist.get_rank())[1:]} {how} {waited_for}{place}. {find_missing_ranks()} "
            f"{_ADVICE} The backend said: {_first_line(error)}"
        ) from error


def find_missing_ranks() -> str:
    """Return a sentence that names the missing ranks, the same on every rank that asks after the same failure.

    This takes as long as `ANSWER` if a rank does not answer.
    """
    watch, most = watch_liveness(), _longest_answer()
    if watch.result is None:
        within(3 * most + 5 * _POLL, lambda: _check_liveness(watch, most))
        watch.keep_result(watch.run, _store_is_gone())
    return watch.result


def result_of_others() -> str | None:
    """Return the result that another rank has published, or `None` if there is none."""
    return _watch.result if _watch is not None else None


def within(seconds: float, function: Callable[[], Any]) -> Any:
    """Call a function in another thread; return its result, or `None` if it takes too long or the store is gone.

    Another thread is needed because a call to a store whose process is stopped never returns.
    """
    helper = _idle_helpers.pop() if _idle_helpers else _Helper()
    helper.functions.put(function)
    try:
        result, error = helper.outcomes.get(timeout=seconds)
    except queue.Empty:
        helper.functions.put(None)  # ends the helper's thread if the call ever returns
        return None
    _idle_helpers.append(helper)
    if error is not None and not isinstance(error, (dist.DistError, RuntimeError)):
        raise error
    return result


class _Helper:
    """A thread that calls functions one after the other until it receives `None`."""

    def __init__(self) -> None:
        self.functions: queue.SimpleQueue = queue.SimpleQueue()
        self.outcomes: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=self._run, name="flashcp-helper", daemon=True).start()

    def _run(self) -> None:
        while (function := self.functions.get()) is not None:
            try:
                outcome = function(), None
            except Exception as error:
                outcome = None, error
            self.outcomes.put(outcome)
            del function, outcome  # do not keep them alive until the next call


_idle_helpers: list[_Helper] = []
os.register_at_fork(after_in_child=_idle_helpers.clear)  # a forked process does not have its parent's threads


def watch_liveness() -> _Watch:
    """Start the thread that answers for this process, once per default process group, and return its state."""
    global _watch
    store = dist.distributed_c10d._get_default_store()
    if _watch is None or _watch.shared_store is not store:
        if _watch is not None:
            _watch.stop()
        _watch = _Watch(store)
    return _watch


class _Watch:
    """The thread that answers liveness checks for this process, and the results of these checks."""

    def __init__(self, shared_store: dist.Store):
        # The thread has its own connection to the store: a wait on the shared connection blocks all other calls.
        self.shared_store, self.store = shared_store, shared_store.clone()
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.hosts: dict[int, str] = {}  # by rank, as far as ranks have published theirs
        self.run = 0  # how many outermost `name_missing_ranks` have ended; each has its own check
        self._results: dict[int, str] = {}
        self._answered: set[str] = set()
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

    def keep_result(self, run: int, result: str) -> None:
        self._results.setdefault(run, result)

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
            while not self._end.wait(_POLL):
                self.learn_hosts()
                for run in (self.run, self.run - 1):  # other ranks may still be in the previous run
                    self._answer(run)

    def _answer(self, run: int) -> None:
        called, here, result, heard = (_key(run, name) for name in ("call", "here", "result", "heard"))
        if here not in self._answered and self.store.check([called]):
            self.store.set(f"{here}/{self.rank}", json.dumps(_location()))
            self._answered.add(here)
        if here in self._answered and heard not in self._answered and self.store.check([result]):
            self.keep_result(run, self.store.get(result).decode())
            self.store.set(f"{heard}/{self.rank}", "null")
            self._answered.add(heard)


def _key(run: int, name: str) -> str:
    return f"flashcp/missing/{run}/{name}"


def _host_key(rank: int) -> str:
    return f"flashcp/host/{rank}"


def _longest_answer() -> float:
    return min(ANSWER, group_timeout()).total_seconds()


def _check_liveness(watch: _Watch, most: float) -> None:
    """Ask all ranks, draw a conclusion, publish it, and wait until the ranks that answered have read it.

    The wait is needed because the store may end together with this process.
    """
    run = watch.run
    watch.store.set(_key(run, "call"), str(watch.rank))
    able = [rank for rank in watch.others if watch.store.check([_host_key(rank)])]
    answers = _collect(watch, run, "here", able, most, until=_key(run, "result"))
    _publish(watch, run, _conclude(watch, answers), list(answers), most)


def _tell_others(error: BaseException) -> None:
    """Publish that this rank ends because of an exception of its own."""
    if not dist.is_initialized():
        return
    watch, most = watch_liveness(), min(_longest_answer(), 3 * _POLL)
    run = watch.run
    if watch.result is not None:
        return
    result = f"Missing: {_name(watch.rank)}, which raised {type(error).__name__}: {_first_line(error)}."

    def tell():
        watch.store.set(_key(run, "call"), str(watch.rank))
        _publish(watch, run, result, watch.others, most)

    within(most + 5 * _POLL, tell)


def _publish(watch: _Watch, run: int, result: str, readers: list[int], most: float) -> None:
    watch.keep_result(run, watch.store.compare_set(_key(run, "result"), "", result).decode())
    _collect(watch, run, "heard", readers, most)


def _collect(
    watch: _Watch, run: int, name: str, ranks: list[int], most: float, until: str | None = None
) -> dict[int, Any]:
    """Return what ranks write under `name` within `most` seconds and before the key `until` exists, by rank."""
    found: dict[int, Any] = {}
    deadline = time.monotonic() + most
    while len(found) < len(ranks) and time.monotonic() < deadline and not (until and watch.store.check([until])):
        for rank in ranks:
            key = f"{_key(run, name)}/{rank}"
            if rank not in found and watch.store.check([key]):
                found[rank] = json.loads(watch.store.get(key))
        time.sleep(0.1)
    return found


def _conclude(watch: _Watch, answers: dict[int, dict[str, Any]]) -> str:
    silent = [rank for rank in watch.others if rank not in answers]
    known = [rank for rank in silent if watch.store.check([_host_key(rank)])]
    if known:
        return f"Missing: {_do_not_answer(known)}: killed or stopped."
    if silent:
        return f"Missing: {_do_not_answer(silent)} and never reached hf_flashcp."
    elsewhere = {rank: answer["at"] for rank, answer in answers.items() if not answer["waits"]}
    if elsewhere:
        texts = [f"{_name(rank)}, which is at {at}" for rank, at in elsewhere.items()]
        return f"Missing: {'; '.join(_shortened(texts))}."
    texts = [f"{_name(rank)} at {answer['at']}" for rank, answer in answers.items()]
    return (
        "All ranks answer and are in collectives: either they wait for each other in different collectives, or the "
        f"network between them failed. They are {'; '.join(_shortened(texts))}."
    )


def _location() -> dict[str, Any]:
    """Return the line that this process's main thread is at, and whether it seems to wait for other ranks there.

    The line is the innermost one outside installed packages, if there is one. Whether the thread waits is judged by
    its innermost function.
    """
    frame = sys._current_frames().get(threading.main_thread().ident)
    while frame is not None and frame.f_code.co_filename == threading.__file__ and frame.f_back:
        frame = frame.f_back  # the caller of a lock or join says more than the lock itself
    innermost, shown = frame, frame
    while shown is not None and f"{os.sep}site-packages{os.sep}" in shown.f_code.co_filename and shown.f_back:
        shown = shown.f_back
    if innermost is None:
        return {"at": "an unknown line", "waits": False}
    path, function = innermost.f_code.co_filename.replace(os.sep, "/"), innermost.f_code.co_name
    waits = function == "_engine_run_backward" or any(part in path for part in _WAITING_CODE)
    at = f"{shown.f_code.co_filename}:{shown.f_lineno} in {shown.f_code.co_name}"
    return {"at": f"{at} ({_activity()})" if _activities else at, "waits": waits}


def _store_is_gone() -> str:
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return (
            "Missing: the launcher of the first node, which holds the key-value store. Without the store, no other "
            "rank can be asked."
        )
    return (
        f"Missing: {_name(0)}, whose process holds the key-value store. Without the store, no other rank can be asked."
    )


def _activity() -> str:
    activity = _activities[-1] if _activities else "a collective"
    return activity() if callable(activity) else activity


def _name(rank: int) -> str:
    host = _watch.hosts.get(rank) if _watch is not None else None
    if host is None and rank == dist.get_rank():
        host = socket.gethostname()
    return f"rank {rank}" + (f" (host {host})" if host else "")


def _shortened(texts: list[str]) -> list[str]:
    more = len(texts) - _MOST_NAMED
    return texts if more <= 0 else [*texts[:_MOST_NAMED], f"and {more} more"]


def _do_not_answer(ranks: list[int]) -> str:
    names = ", ".join(_shortened([_name(rank) for rank in ranks]))
    return f"{names}, which {'does' if len(ranks) == 1 else 'do'} not answer"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")[:300]
