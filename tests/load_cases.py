"""Functions for the load tests: a long training whose process is measured, and random cases by seed and number."""

import collections
import dataclasses
import gc
import math
import os
import sys
import threading
import warnings
import weakref

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import Dataset, IterableDataset
from transformers import TrainerCallback

from hf_flashcp import FlashCPPlugin, FlashCPTrainer
from hf_flashcp.data.lengths import LENGTH_DISTRIBUTIONS, sample_pack
from hf_flashcp.doctor.float64 import float64_throughout
from hf_flashcp.errors import UnmetCapWarning
from hf_flashcp.layout import RankLayout
from hf_flashcp.planning import STRATEGIES, CostModel, HardwareProfile, ShardPlan, plan_documents
from hf_flashcp.planning.algorithm1 import flashcp
from hf_flashcp.planning.caps import Caps
from hf_flashcp.planning.time_bound import step_time_bound
from hf_flashcp.predict.model_shape import LLAMA_3_8B, AttentionLayers
from tests.accelerate_state import fresh_accelerate
from tests.independent_plan_checker import assert_caps, check_plan, costs
from tests.model_cases import model_errors
from tests.models import FAMILIES, HYBRIDS, WHOLE_DOCUMENT_HYBRIDS, build_model, make_documents
from tests.trainer_cases import training_arguments


SCALE = 256  # divides lengths: a pack of 65,536 tokens becomes one of about 256


def drawn_pack(number):
    """Return the lengths of a packed row; the numbers take turns through the five distributions."""
    name = LENGTH_DISTRIBUTIONS[number % len(LENGTH_DISTRIBUTIONS)]
    lengths = [max(1, round(length / SCALE)) for length in sample_pack(name, 256 * SCALE, seed=number)]
    documents = make_documents(lengths, seed=number, prompt=0.2)
    row = {key: [value for each in documents for value in each[key]] for key in documents[0]}
    return {**row, "seq_lengths": lengths}


class _Packs(IterableDataset):
    def __iter__(self):
        number = 0
        while True:
            yield drawn_pack(number)
            number += 1


class _FewPacks(Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        return drawn_pack(10**6 + index)


def kept_by_the_library():
    """Return the sizes of all caches, dicts, lists and sets that modules of hf_flashcp hold, by name."""
    containers = (dict, list, set, collections.deque, weakref.WeakKeyDictionary)
    sizes = {}
    for module_name, module in sorted(sys.modules.items()):
        if module_name.partition(".")[0] == "hf_flashcp":
            for name, value in vars(module).items():
                if hasattr(value, "cache_info") and value.__module__ == module_name:
                    sizes[f"{module_name}.{name}"] = value.cache_info().currsize
                elif isinstance(value, containers) and not name.startswith("__"):
                    sizes[f"{module_name}.{name}"] = len(value)
    return sizes


def measured_process():
    gc.collect()
    with open("/proc/self/statm") as statm:
        resident = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return {
        "MB": resident / 1e6,
        "objects": len(gc.get_objects()),
        "process groups": len(dist.distributed_c10d._world.pg_map),
        "open files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "Python threads": threading.active_count(),
        "store keys": dist.distributed_c10d._get_default_store().num_keys(),
        "kept": kept_by_the_library(),
    }


class _Measure(TrainerCallback):
    def __init__(self, every):
        self.every, self.found = every, []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0:
            dist.barrier()
            self.found.append({"step": state.global_step, **measured_process()})
            dist.barrier()


def soak(steps, every, accumulation=1):
    """Train and evaluate a model with sliding windows, with a new plan in every step. Return the measurements."""
    fresh_accelerate()
    measure = _Measure(every)
    trainer = FlashCPTrainer(
        model=build_model("gemma3", dtype=torch.float32),
        args=training_arguments(
            parallelism_config=FlashCPPlugin(cp_size=dist.get_world_size()),
            per_device_train_batch_size=1,
            per_device_eval_batch_size=1,
            gradient_accumulation_steps=accumulation,
            max_steps=steps,
            logging_steps=every,
            eval_strategy="steps",
            eval_steps=every,
            learning_rate=1e-3,
            optim="adamw_torch",
            max_grad_norm=1.0,
        ),
        train_dataset=_Packs(),
        eval_dataset=_FewPacks(),
        callbacks=[measure],
    )
    trainer.train()
    return measure.found


def random_lengths(rng, cp_size, most=20_000):
    """Return difficult lengths: ones, a few huge documents, equal and nearly equal ones, powers of two, heavy
    tails."""
    count = int(rng.integers(1, 2 ** rng.integers(1, 8)))
    length = int(rng.integers(1, 2 ** rng.integers(1, 12)))
    lengths = {
        "tails": lambda: np.exp(rng.uniform(0, rng.uniform(1, 9), count)),
        "ones": lambda: [1] * count,
        "equal": lambda: [length] * count,
        "nearly equal": lambda: length + np.arange(count),
        "powers of two": lambda: 2 ** rng.integers(0, 11, count),
        "huge": lambda: [*rng.integers(1, 6000, rng.integers(1, 4)), *rng.integers(1, 4, count)],
        "corpus": lambda: np.ceil(np.array(sample_pack("pile", 2**17, seed=count)) / (1 + length)),
    }
    lengths = [int(each) for each in lengths[rng.choice(list(lengths))]()]
    rng.shuffle(lengths)
    while sum(lengths) > most and len(lengths) > 1:
        lengths.pop()
    return lengths + [1] * max(cp_size - sum(lengths), 0)


def check_random_plan(seed, number):
    """Check a plan with a random strategy and options.

    It must be a partition within its caps, its report must equal independent counts, and the default must not need
    more KV than Algorithm 1. Every fourth plan of "search" is made for the least predicted time, which its lower bound
    must not exceed.
    """
    rng = np.random.default_rng([seed, number])
    cp_size = int(rng.integers(1, 65))
    lengths = random_lengths(rng, cp_size)
    strategy = str(rng.choice(STRATEGIES))
    options = {}
    if strategy in ("search", "flashcp"):
        options["max_imbalance"] = float(rng.choice([1.0, 1.02, 1.05, 1.3, 3.0, math.inf]))
        options["max_token_imbalance"] = float(rng.choice([1.0, 1.0, 1.1, 2.0, math.inf]))
    model = None
    if strategy == "search":
        options["minimize_total"] = bool(rng.integers(2))
        if rng.integers(4) == 0:
            model = random_cost_model(rng)
            options |= {"minimize_total": False, "cost_model": model}
    if strategy == "per_doc":
        options["rotate_ranks"] = bool(rng.integers(2))
    num_stages = int(rng.integers(1, cp_size + 1)) if rng.integers(2) else None
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", UnmetCapWarning)
        plan = plan_documents(lengths, cp_size, strategy=strategy, num_stages=num_stages, **options)
    counts, report = check_plan(lengths, cp_size, plan.slices), plan.report()
    for name, key in {"tokens": "tokens", "pairs": "pairs", "received": "kv_received", "sent": "kv_sent"}.items():
        assert report[key] == counts[name].tolist(), key
    if plan.offset_groups is not None:
        assert sorted(offset for group in plan.offset_groups for offset in group) == list(range(1, cp_size))
    if strategy != "whole_doc":
        assert_caps(counts, options.get("max_token_imbalance", 1.0))
    if strategy in ("search", "flashcp"):
        met = counts["pairs"].max() * cp_size <= options["max_imbalance"] * counts["pairs"].sum()
        assert met == (not warned)
    if strategy == "search":
        caps = {name: options[name] for name in ("max_imbalance", "max_token_imbalance")}
        theirs = flashcp(Caps(tuple(lengths), cp_size, **caps))
        counted = check_plan(lengths, cp_size, theirs)
        theirs_met = counted["pairs"].max() * cp_size <= caps["max_imbalance"] * counts["pairs"].sum()
        assert met or not theirs_met
        if model is not None and met:
            seconds = model.step_time(plan).seconds * (1 + 1e-9)
            assert step_time_bound(lengths, cp_size, model, **caps).seconds <= seconds
            if theirs_met and num_stages is None:
                assert seconds <= model.step_time(ShardPlan(lengths, cp_size, theirs)).seconds * (1 + 1e-8)
        elif theirs_met:
            assert costs(counts)[0] <= costs(counted)[0]
            assert options["minimize_total"] or costs(counts)[1] <= costs(counted)[1]


def random_cost_model(rng):
    """Return the cost model of a model without or with windows, on nodes of some size."""
    name = str(rng.choice(["h100", "generic", "cpu"]))
    hardware = dataclasses.replace(HardwareProfile.load(name), ranks_per_node=int(rng.choice([1, 2, 4, 8])))
    if rng.integers(2):
        return CostModel.from_config(LLAMA_3_8B, hardware)
    layers = AttentionLayers(3, 8, 2, 64, 48, int(rng.integers(1, 3000))), AttentionLayers(2, 4, 4, 128, 128)
    return CostModel(hardware, 1e6, layers)


def random_training(seed, number):
    """Return `(world_size, arguments of training_errors)`."""
    rng = np.random.default_rng([seed, number])
    world_size = int(rng.integers(2, 5))
    family = str(rng.choice([*FAMILIES, *HYBRIDS, *WHOLE_DOCUMENT_HYBRIDS]))
    lengths = np.exp(rng.uniform(0, 4, rng.integers(1, 9))).astype(int).tolist()
    lengths.insert(int(rng.integers(len(lengths) + 1)), int(rng.integers(12, 60)))
    options = {
        "prompt": float(rng.choice([0.0, 0.4])),
        "keep_received_kv": [None, True, False][rng.integers(3)],
        "num_stages": [None, int(rng.integers(1, world_size))][rng.integers(2)],
    }
    strategy = str(rng.choice(STRATEGIES))
    if family in WHOLE_DOCUMENT_HYBRIDS:
        strategy, lengths = "whole_doc", lengths + [5] * max(world_size - len(lengths), 0)
    elif getattr(FAMILIES.get(family), "sliding_window", None):
        options["overrides"] = {"sliding_window": int(rng.integers(2, 40))}
    return world_size, (family, lengths, strategy, options)


def training_errors(family, lengths, strategy, options):
    with float64_throughout():
        return model_errors(family, lengths, [strategy], reference="eager", **options)


def check_layouts(plan, ranks):
    """Check that each of these ranks sends to another exactly the tokens that it needs, in order."""
    layouts = {rank: RankLayout(plan, rank) for rank in ranks}
    starts = np.concatenate(([0], np.cumsum(plan.lengths)))
    cpu = torch.device("cpu")
    travelled = 0
    for sender, layout in layouts.items():
        tokens, rows = layout.token_index, layout.send_rows(cpu)
        if rows.index is None:
            rows = torch.cat([torch.arange(0), *(torch.arange(*each) for each in rows.ranges)])
        else:
            rows = rows.index
        (stage,) = layout.stages(cpu)
        by_receiver = tokens[rows[stage.sent]].split(stage.send_splits)
        for receiver in ranks:
            expected = []
            if receiver != sender:
                last = {document: start for document, start, _ in plan.slices[receiver]}  # of the last slice
                for document, start, stop in plan.slices[sender]:
                    stop = min(stop, last.get(document, 0))
                    expected += range(starts[document] + start, starts[document] + max(start, stop))
            assert by_receiver[receiver].tolist() == expected
            assert layouts[receiver].stages(cpu)[0].recv_splits[sender] == len(expected)
            travelled += len(expected)
    return travelled
