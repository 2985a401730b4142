"""Check a cluster in about a minute. Start this script with the launch command of the training.

    accelerate launch --config_file recipes/accelerate/fsdp2_cp8.yaml recipes/check_cluster.py
    torchrun --nproc_per_node 2 recipes/check_cluster.py --cp_size 2

It checks that every process is there, runs collectives, measures links, and compares one attention layer with a
single-process run of its documents. If a check fails, every rank prints a message and exits with status 1.
"""

import json
import os
import sys
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from rich.console import Console
from rich.table import Table
from transformers import HfArgumentParser

from hf_flashcp import FlashCPPlugin
from hf_flashcp.doctor.cluster import check_cluster
from hf_flashcp.errors import ConfigurationError, FlashCPError


@dataclass
class Arguments:
    cp_size: int | None = field(
        default=None, metadata={"help": "Processes that share each batch. Defaults to accelerate's config file."}
    )
    megabytes: int = field(default=64, metadata={"help": "Size of the transfers that measure the links."})
    timeout: int = field(default=60, metadata={"help": "Seconds to wait for a missing process."})
    json_file: str | None = field(default=None, metadata={"help": "Where to write the results as JSON."})


def tables(found):
    hosts = {}
    for rank, where in enumerate(found["ranks"]):
        hosts.setdefault((where["host"], where["device"]), []).append(rank)
    table = Table(title=f"{len(found['ranks'])} processes")
    for column in ("host", "device", "ranks"):
        table.add_column(column)
    for (host, device), ranks in hosts.items():
        table.add_row(host, device, ", ".join(map(str, ranks)))
    yield table
    table = Table(title="Links of a context-parallel group, all ranks sending and receiving at once")
    for column in ("", "GB/s per rank", "slowest GB/s", "between ranks", "latency, us"):
        table.add_column(column, justify="right")
    for kind, link in found["links"].items():
        speeds = (link["bytes_per_second"], link["slowest_bytes_per_second"])
        pair = " -> ".join(map(str, link["slowest_pair"]))
        table.add_row(kind, *(f"{speed / 1e9:.2f}" for speed in speeds), pair, f"{1e6 * link['latency_seconds']:.0f}")
    yield table
    table = Table(title="Largest relative error of one attention layer against a single-process run")
    for column in ("dtype", "kernel", "error", "allowed"):
        table.add_column(column, justify="right")
    for dtype, layer in found["layer"].items():
        table.add_row(dtype, layer["kernel"], f"{layer['error']:.1e}", f"{layer['limit']:.1e}")
    yield table


def main():
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    timeout = timedelta(seconds=arguments.timeout)
    try:
        accelerator = Accelerator(
            parallelism_config=FlashCPPlugin(cp_size=arguments.cp_size),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)],
        )
        if accelerator.parallelism_config.cp_size < 2:
            raise ConfigurationError("cp_size is 1: nothing to check. Pass --cp_size, or a config file that sets it.")
        group = accelerator.torch_device_mesh["cp"].get_group()
        found = check_cluster(group, accelerator.device, megabytes=arguments.megabytes, timeout=timeout)
    except FlashCPError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    if accelerator.is_main_process:
        console = Console()
        for table in tables(found):
            console.print(table)
        if arguments.json_file:
            Path(arguments.json_file).write_text(json.dumps(found, indent=2))
    accelerator.wait_for_everyone()
    # Everything is written and every process has arrived. Exit at once, because destroying process groups can abort in
    # gloo's threads.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
