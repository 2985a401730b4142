"""Runs `accelerate launch` and torchrun in processes that are forked from one that has imported everything.

They run their own code, except that no new interpreter is started.
"""

import multiprocessing
import os
import runpy
import signal
import sys
from pathlib import Path

import torch
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.autograd.graph import save_on_cpu
from torch.distributed import run as torchrun
from torch.distributed.launcher.api import elastic_launch


ROOT = Path(__file__).parent.parent


def accelerate(arguments):
    launch_command(launch_command_parser().parse_args(arguments))


def accelerate_fsdp(arguments):
    """Launch a configuration with FSDP2 on the CPU, which accelerate itself refuses, and print whenever a layer is
    offloaded."""
    init = save_on_cpu.__init__

    def printing(self, *args, **kwargs):
        print("a layer is offloaded\n", end="")
        init(self, *args, **kwargs)

    save_on_cpu.__init__ = printing
    PartialState._prepare_backend = lambda *args: ("gloo", DistributedType.MULTI_GPU)
    os.environ.update(ACCELERATE_TORCH_DEVICE="cpu", ACCELERATE_USE_CPU="false")
    accelerate(arguments)


def run_forked(main, arguments, output, cwd=ROOT, **environment):
    """Run `main`, and write its output and that of the processes it launches to a file. Fail if one of them fails."""
    process = multiprocessing.get_context("forkserver").Process(
        target=_run, args=(main, arguments, output, cwd, environment)
    )
    process.start()
    process.join(300)
    process.kill()
    process.join()
    text = output.read_text()
    assert process.exitcode == 0, text[-4000:]
    return text


def _run(main, arguments, output, cwd, environment):
    stream = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    os.chdir(cwd)
    os.environ.update(environment, ACCELERATE_USE_CPU="true")
    torchrun.elastic_launch = _forking_launch
    main(arguments)


def _forking_launch(config, entrypoint):
    config.start_method = "fork"
    return elastic_launch(config, _python)


def _python(_, *arguments):
    """Run a script, or a module with -m, as the interpreter does; the first argument is -u."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "0")) or torch.get_num_threads())
    is_module = arguments[0] == "-m"
    sys.argv = list(arguments[is_module:])
    if is_module:
        runpy.run_module(sys.argv[0], run_name="__main__")
    else:
        sys.path.insert(0, str(Path(sys.argv[0]).parent))
        runpy.run_path(sys.argv[0], run_name="__main__")
