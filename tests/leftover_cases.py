"""Functions for the tests of leftover processes. They run below a process that adopts orphaned processes.

Spawned workers import this file, so it imports little.
"""

import multiprocessing
import os
import signal
import time
from multiprocessing import forkserver
from pathlib import Path

from tests.leftovers import adopt_orphans, descendants, wait_for_the_end


ENDINGS = {
    "os._exit": lambda: os._exit(3),
    "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "exception": lambda: 1 / 0,
}


class Documents:
    """A dataset that records in a directory which processes have read it.

    It has many documents, because accelerate reads a batch ahead, and workers end after the last batch.
    """

    def __init__(self, directory):
        self.directory = directory

    def __len__(self):
        return 1000

    def __getitem__(self, index):
        Path(self.directory, str(os.getpid())).touch()
        return {"input_ids": [1, 2, 3]}


def as_they_are(rows):
    return rows


def trainer_s_loader(directory, method):
    from hf_flashcp import FlashCPTrainer
    from tests.models import build_model
    from tests.trainer_cases import training_arguments

    options = {"dataloader_num_workers": 1, "dataloader_multiprocessing_context": method}
    trainer = FlashCPTrainer(
        model=build_model("llama"),
        args=training_arguments(remove_unused_columns=False, **options),
        eval_dataset=Documents(directory),
        data_collator=as_they_are,
    )
    return trainer.get_eval_dataloader()


def own_loader(directory, method):
    from torch.utils.data import DataLoader

    from hf_flashcp import FlashCPCollator

    collator = FlashCPCollator(cp_size=1)
    return DataLoader(Documents(directory), collate_fn=collator, num_workers=1, multiprocessing_context=method)


def ranks_that_end(arguments):
    """Start a rank for each way to end, each with a waiting worker, and check that nothing is left, fork servers
    included."""
    make_loader, method, directory = arguments
    adopt_orphans()
    _forget_fork_server()
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_read_and_end, args=(make_loader, directory, method, each)) for each in ENDINGS]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [3, -9, 1]
    assert len(os.listdir(directory)) == len(ENDINGS), "workers have read"
    assert not wait_for_the_end()


def _read_and_end(make_loader, directory, method, ending):
    batches = iter(make_loader(directory, method))
    next(batches)
    ENDINGS[ending]()


def pool_that_is_killed(directory):
    """Kill a pool while its workers run a function."""
    adopt_orphans()
    _forget_fork_server()
    process = multiprocessing.get_context("fork").Process(target=_run_pool, args=(directory,))
    process.start()
    deadline = time.monotonic() + 120
    while len(os.listdir(directory)) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(descendants()) >= 3
    process.kill()
    process.join()
    assert not wait_for_the_end()


def _run_pool(directory):
    from hf_flashcp.distributed.workers import WorkerPool

    WorkerPool().run(2, _sleep, directory)


def _sleep(directory):
    Path(directory, str(os.getpid())).touch()
    time.sleep(3600)


def pool_that_is_forgotten(_):
    """Leave a pool open; its process must end nevertheless."""
    from hf_flashcp.distributed.workers import WorkerPool

    _kept.append(WorkerPool())
    _kept[0].run(1, os.getpid)


_kept = []


def _forget_fork_server():
    """Forget the tests' fork server, which is not a descendant of this process, so that a new one is started if
    needed."""
    server = forkserver._forkserver
    server._forkserver_address = server._forkserver_alive_fd = server._forkserver_pid = None
    server.set_forkserver_preload([])
