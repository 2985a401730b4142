"""Functions that workers run for the tests of ranks that disagree; each returns (error type, message, seconds)."""

import os
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator

from hf_flashcp import FlashCPCollator, FlashCPPlugin, attach, plan_documents
from hf_flashcp.distributed import require_agreement
from hf_flashcp.planning import PlanSettings
from tests.accelerate_state import fresh_accelerate
from tests.attention_cases import make_inputs, sharded_attention
from tests.device import ExactKernel
from tests.model_cases import cp_mesh
from tests.models import build_model, make_documents


def timed(function, *args):
    begin = time.monotonic()
    try:
        function(*args)
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - begin
    return None, "", time.monotonic() - begin


def different_batches():
    model = build_model("llama")
    attach(model, cp_mesh())
    lengths = [12, 9] if dist.get_rank() != 1 else [12, 10]
    return timed(lambda: model(**FlashCPCollator(dist.get_world_size())(make_documents(lengths))))


def different_strategies():
    model = build_model("llama")
    attach(model, cp_mesh())
    strategy = "per_doc" if dist.get_rank() == 0 else "per_seq"
    batch = FlashCPCollator(settings=PlanSettings(dist.get_world_size(), strategy))(make_documents([12, 9]))
    return timed(lambda: model(**batch))


def same_lengths_other_tokens():
    """Batches of equal lengths but other tokens, as from a loader that shuffles differently on each rank."""
    model = build_model("llama")
    attach(model, cp_mesh())
    features = make_documents([12, 9], seed=int(dist.get_rank() == 1))
    batch = FlashCPCollator(dist.get_world_size())(features)
    bare = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "labels": batch["labels"]}
    return timed(lambda: model(**batch)), timed(lambda: model(**bare))


def different_models():
    dtype = torch.float64 if dist.get_rank() == 0 else torch.float32
    heads = 4 if dist.get_rank() == 0 else 2
    return timed(lambda: attach(build_model("llama", dtype=dtype, num_attention_heads=heads), cp_mesh()))


def different_cp_sizes():
    fresh_accelerate()
    cp_size = 2 if dist.get_rank() < 2 else 4
    return timed(lambda: Accelerator(cpu=True, parallelism_config=FlashCPPlugin(cp_size=cp_size)))


def a_rank_that_does_not_come():
    group = dist.group.WORLD
    if dist.get_rank() == 1:
        time.sleep(4)
        return None
    return timed(lambda: require_agreement("a test", {"a": 1}, group, advice="Do this.", timeout=timedelta(seconds=2)))


def agree_many_times(rounds):
    for turn in range(rounds):
        require_agreement("many rounds", {"turn": turn}, dist.group.WORLD, advice="")


def exchange_that_does_not_fit():
    """Exchange under plans that differ, bypassing the model's check: only FLASHCP_DEBUG=1 notices before the
    collective."""
    os.environ["FLASHCP_DEBUG"] = "1"
    lengths = [16] if dist.get_rank() == 0 else [10]
    plan = plan_documents(lengths, 2, strategy="per_doc")
    try:
        inputs = make_inputs(lengths, 4, 2, 8, 8, torch.float32, 0)
        return timed(lambda: sharded_attention(plan, inputs, ExactKernel()))
    finally:
        del os.environ["FLASHCP_DEBUG"]


def exchange_that_fits():
    os.environ["FLASHCP_DEBUG"] = "1"
    try:
        inputs = make_inputs([16], 4, 2, 8, 8, torch.float32, 0)
        return timed(lambda: sharded_attention(plan_documents([16], 2), inputs, ExactKernel()))
    finally:
        del os.environ["FLASHCP_DEBUG"]
