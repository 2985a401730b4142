"""Functions that the processes of the fault tests run, and functions that start those processes.

Each case starts new processes, which are forked from a server that has imported everything. That takes a second or
two.
"""

import contextlib
import functools
import gc
import hashlib
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from hf_flashcp import FlashCPCollator, FlashCPPlugin, FlashCPTrainer, attach, name_missing_ranks
from hf_flashcp.distributed import group_timeout
from hf_flashcp.distributed import liveness as missing_ranks
from hf_flashcp.exchange import Transfer
from hf_flashcp.integrations.trainers.fault_tolerance import StopTogetherCallback
from tests.accelerate_state import fresh_accelerate
from tests.model_cases import cp_mesh
from tests.models import build_model, make_documents
from tests.trainer_cases import saving_arguments
from tests.wrapper_cases import fsdp_arguments, fsdp_on_cpu, full


LENGTHS = [40, 25, 18, 31, 22, 12, 9, 33, 27, 16, 21, 38]
OUTER_SECONDS = 100  # time limit of a case
STEPS = 4


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def stop():
    os.kill(os.getpid(), signal.SIGSTOP)


def sleep():
    time.sleep(3600)


@functools.cache  # so that only the first call sleeps
def come_late():
    time.sleep(12)


def fail():
    raise LookupError("a fault of this rank's own")


def leave():
    raise SystemExit(3)


def sigterm():
    os.kill(os.getpid(), signal.SIGTERM)


class Fault(TrainerCallback):
    """Calls `action` at a point of the training: in the forward or backward of the third step, or after it."""

    def __init__(self, point, action):
        self.point, self.action, self.steps = point, action, 0

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if self.point == "backward":
            next(model.parameters()).register_hook(self._in_third_step)
        if self.point == "forward":
            wait = Transfer.wait

            def faulty_wait(transfer):
                self._in_third_step()
                return wait(transfer)

            Transfer.wait = faulty_wait

    def _in_third_step(self, *_):
        if self.steps == 2:
            self.action()

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1
        if self.point == "between steps" and self.steps == 3:
            self.action()


class FaultyTrainer(FlashCPTrainer):
    fault = None

    def _save_rng_state(self, output_dir):
        """Fail at the moment when rank 0 has written the model and the optimizer, but not its trainer state."""
        if self.fault is not None and self.fault.point == "save" and self.state.global_step == 4:
            if not self.args.should_save:
                time.sleep(1)  # rank 0 first finishes transformers' own work
            self.fault.action()
        super()._save_rng_state(output_dir)


class FaultyDocuments(torch.utils.data.Dataset):
    """Calls the action when a data loader worker reads a document of the third step."""

    def __init__(self, action):
        self.documents, self.action = make_documents(LENGTHS), action

    def __len__(self):
        return len(self.documents)

    def __getitem__(self, index):
        if index == 5 and torch.utils.data.get_worker_info() is not None:
            self.action()
        return self.documents[index]


def train(directory, *fault, fsdp=False, **options):
    """Return a digest of the trained parameters, and the last step; see `_train`."""
    with fsdp_on_cpu() if fsdp else contextlib.nullcontext():
        return _train(directory, *fault, fsdp=fsdp, **options)


def _train(directory, point=None, action=None, victim=None, *, resume=None, timeout=60, fsdp, steps=STEPS, **more):
    """Train with the fault on the rank `victim`."""
    fresh_accelerate()
    mine = point is not None and victim == int(os.environ["RANK"])
    fault = Fault(point, action) if mine else None
    plugin = FlashCPPlugin(cp_size=more.pop("cp_size", int(os.environ["WORLD_SIZE"])))
    if fsdp:
        more.update(fsdp_arguments(state_dict_type="SHARDED_STATE_DICT"))
    trainer = FaultyTrainer(
        model=build_model("llama"),
        args=saving_arguments(
            output_dir=directory,
            parallelism_config=plugin,
            per_device_train_batch_size=2,
            max_steps=steps,
            ddp_timeout=timeout,
            **more,
        ),
        train_dataset=FaultyDocuments(action) if mine and point == "worker" else make_documents(LENGTHS),
        callbacks=[fault] if fault else [],
    )
    assert (trainer.accelerator.distributed_type == DistributedType.FSDP) == fsdp
    trainer.fault = fault
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, StopTogetherCallback):
            callback.jit_manager.kill_wait = 0
    trainer.train(resume_from_checkpoint=resume)
    return digest(trainer.model), trainer.state.global_step


def digest(model):
    result = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        result.update(name.encode() + full(parameter).detach().numpy().tobytes())
    return result.hexdigest()


def group_timeouts(cp_size, timeout):
    """Return the timeouts of all process groups of this rank, in seconds."""
    fresh_accelerate()
    plugin = FlashCPPlugin(cp_size=cp_size)
    Accelerator(
        cpu=True,
        parallelism_config=plugin,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=timeout))],
    )
    groups = dist.distributed_c10d._world.pg_map
    return [group_timeout(group).total_seconds() for group in groups]


def plain_loop(action, victim):
    """Run a user's training loop under DDP on two groups of two ranks, with the fault on a rank of one group."""
    model = build_model("llama")
    attach(model, cp_mesh())
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    batch = FlashCPCollator(dist.get_world_size())(make_documents([12, 9, 17]))
    with name_missing_ranks("my loop"):
        for step in range(3):
            wrapped(**batch).loss.backward()
            if step == 1 and victim == dist.get_rank():
                action()


def outcomes(directory, world_size, function, *args, rank_0_holds_store=False, timeout=60, victim=None, **kwargs):
    """Wait for all ranks but the victim, and return an outcome per rank.

    It is `("returned", value)`, the name and message of the error that it raised, `("ended", exit code)` if it died,
    or `None` if it did not end by itself.
    """
    context = multiprocessing.get_context("forkserver")
    store = None if rank_0_holds_store else dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    files = [Path(directory, f"outcome-{rank}") for rank in range(world_size)]
    port = store.port if store else _free_port()
    processes = [
        context.Process(
            target=_run, args=(file, rank, world_size, port, rank_0_holds_store, timeout, function, args, kwargs)
        )
        for rank, file in enumerate(files)
    ]
    for file, process in zip(files, processes):
        file.unlink(missing_ok=True)
        process.start()
    deadline = time.monotonic() + OUTER_SECONDS
    for rank, process in enumerate(processes):
        if rank != victim:
            process.join(max(deadline - time.monotonic(), 0))
    found = []
    for file, process in zip(files, processes):
        alive = process.is_alive()
        process.kill()
        process.join()
        found.append(
            pickle.loads(file.read_bytes()) if file.exists() else None if alive else ("ended", process.exitcode)
        )
    return found


def _free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _run(file, rank, world_size, port, rank_0_holds_store, timeout, function, args, kwargs):
    torch.set_num_threads(1)
    gc.freeze()
    missing_ranks.ANSWER = timedelta(seconds=4)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), ACCELERATE_USE_CPU="true")
    os.environ.update(LOCAL_WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    log = os.open(f"{file}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    is_host = rank_0_holds_store and rank == 0
    store = dist.TCPStore("127.0.0.1", port, world_size, is_master=is_host, wait_for_workers=False)
    dist.init_process_group(
        "gloo",
        store=dist.PrefixStore("faults", store),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout),
    )
    try:
        outcome = ("returned", function(*args, **kwargs))
    except BaseException as error:
        traceback.print_exc()
        outcome = (type(error).__name__, str(error))
    file.with_suffix(".part").write_bytes(pickle.dumps(outcome))
    file.with_suffix(".part").rename(file)
    os._exit(0)  # because gloo's teardown may abort


def main(directory):
    """Run as the script that torchrun starts: rank 1 is killed in the first attempt."""
    torch.set_num_threads(1)
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    result = train(
        directory, "between steps", kill, victim=1 if attempt == 0 else None, resume=get_last_checkpoint(directory)
    )
    if os.environ["RANK"] == "0":
        Path(directory, f"result-{attempt}").write_text(result[0])
    dist.barrier()


if __name__ == "__main__":
    main(sys.argv[1])
