"""Functions that workers run for the tests of the groups in which attached models exchange KV."""

import copy
import functools
import pickle
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from hf_flashcp import FlashCPCollator, attach, plan_documents, shard_inputs
from hf_flashcp.distributed import group_timeout, process_group
from hf_flashcp.distributed.exchange_group import second_step_group
from hf_flashcp.exchange import transfer
from hf_flashcp.planning import PlanSettings
from tests.agreement_cases import timed
from tests.load_cases import measured_process
from tests.models import build_model, make_documents


LENGTHS = [12, 9, 17, 8]


@functools.cache
def mesh_of(cp_size, world):
    """Return a mesh whose "cp" groups have `cp_size` ranks. Rank 0 knows one process group more than the others."""
    dist.new_group([0])
    return init_device_mesh("cpu", (dist.get_world_size() // cp_size, cp_size), mesh_dim_names=("dp", "cp"))


def cp_mesh(cp_size):
    return mesh_of(cp_size, dist.group.WORLD)


def batch_of(cp_size, ranks_per_node=None):
    plan = plan_documents(LENGTHS, cp_size, strategy="per_doc").with_ranks_per_node(ranks_per_node)
    batch = FlashCPCollator(settings=PlanSettings(cp_size, "per_doc"))(make_documents(LENGTHS))
    plan.content_digest = batch["flashcp_plan"].content_digest
    return {**batch, "flashcp_plan": plan}


def groups_of_calls(function):
    """Return the description of the process group of each all-to-all in `function`, and its result."""
    found, original = [], dist.all_to_all_single

    def recorded(*args, group, **kwargs):
        found.append(group.group_desc)
        return original(*args, group=group, **kwargs)

    transfer.dist.all_to_all_single = recorded
    try:
        return found, function()
    finally:
        transfer.dist.all_to_all_single = original


def step(model, batch):
    model.zero_grad()
    model(**batch).loss.backward()
    return next(model.parameters()).grad.clone()


def cycles(cp_size, times, ranks_per_node=None, only=None):
    """Attach a model, train and remove the handle `times` times, on the ranks `only`; return what the process holds
    early and late."""
    mesh, model = cp_mesh(cp_size), build_model("llama").train()
    hooks = len(model._forward_pre_hooks) + len(model._forward_hooks)
    batch, found = batch_of(cp_size, ranks_per_node), []
    for number in range(1, times + 1):
        if only is None or dist.get_rank() in only:
            handle = attach(model, mesh)
            if number in (1, 10, times):
                step(model, batch)
            handle.remove()
        if number in (10, times):
            dist.barrier()
            found.append(measured_process())
            dist.barrier()
    assert hooks == len(model._forward_pre_hooks) + len(model._forward_hooks)
    return found


def groups_of_a_step(cp_size, ranks_per_node):
    mesh, model = cp_mesh(cp_size), build_model("llama").train()
    handle = attach(model, mesh)
    batch = batch_of(cp_size, ranks_per_node)
    calls, grad = groups_of_calls(lambda: step(model, batch))
    mesh_group = mesh["cp"].get_group()
    alike = [
        (dist.get_process_group_ranks(group), group.rank(), group_timeout(group))
        for group in (mesh_group, handle.group, second_step_group(handle.group))
    ]
    plans_group = handle.plan.group
    sharded = shard_inputs(batch, mesh)
    again = step(model, sharded)
    found = {
        "calls": calls,
        "alike": alike[0] == alike[1] == alike[2],
        "plan": plans_group is handle.group and handle.plan.group is handle.group,
        "without attach": sharded["flashcp_plan"].group is mesh_group,
        "same gradient": torch.equal(grad, again),
    }
    handle.remove()
    return found


def sharing():
    """Several models, copies, pickles and repeated removals of one mesh's group."""
    mesh = cp_mesh(dist.get_world_size())
    first, second = build_model("llama").train(), build_model("llama").train()
    one = attach(first, mesh)
    group, others = one.group, len(dist.distributed_c10d._world.pg_map)
    again = attach(first, mesh)
    other = attach(second, mesh)
    assert one.group is None and again.group is other.group is group
    assert len(dist.distributed_c10d._world.pg_map) == others
    copied = copy.deepcopy(first)
    batch = batch_of(dist.get_world_size())
    assert torch.equal(step(copied, batch), step(first, batch))
    saved = vars(pickle.loads(pickle.dumps(other)))
    assert saved["group"] is saved["_mesh_group"] is saved["mesh"] is None
    for _ in range(2):
        again.remove()
    assert again.plan.group is None and again.plan.plan.cp_size == dist.get_world_size()
    step(second, batch)
    other.remove()
    assert group not in dist.distributed_c10d._world.pg_map
    assert len(dist.distributed_c10d._world.pg_map) == others - 1
    third = attach(first, mesh)
    assert third.group.group_name != group.group_name
    third.remove()


def one_rank_removes():
    """Return the error of attaching again after one rank alone has removed its handle."""
    mesh, model = cp_mesh(dist.get_world_size()), build_model("llama")
    handle = attach(model, mesh)
    if dist.get_rank() == 0:
        handle.remove()
    found = timed(lambda: attach(model, mesh))
    if dist.get_rank() > 0:
        handle.remove()
    attach(model, mesh).remove()
    return found


def arguments_under_nccl(backend):
    """Return how the group would be made if the mesh's group had this backend."""
    c10d, made = dist.distributed_c10d, {}

    def helper(*args, **kwargs):
        made.update(kwargs, backend=str(args[3]), bound=dist.group.WORLD.bound_device_id)
        raise InterruptedError

    nccl = SimpleNamespace(Options=lambda is_high_priority_stream: SimpleNamespace(high=is_high_priority_stream))
    kept = c10d._new_process_group_helper, dist.get_backend
    c10d._new_process_group_helper, dist.get_backend = helper, lambda group: backend
    dist.ProcessGroupNCCL = nccl
    dist.group.WORLD.bound_device_id = torch.device("cuda:0")
    try:
        process_group.new_group(dist.group.WORLD, "a name", "a description")
    except InterruptedError:
        pass
    finally:
        c10d._new_process_group_helper, dist.get_backend = kept
        del dist.ProcessGroupNCCL
        after, dist.group.WORLD.bound_device_id = dist.group.WORLD.bound_device_id, None
    options = made["backend_options"]
    return {
        "backend": made["backend"],
        "high priority": options and options.high,
        "timeouts": {made["timeout"], options._timeout if options else made["timeout"]} == {group_timeout()},
        "name": made["group_desc"],
        "bound": (made["bound"], str(after)),
    }


def destroyed_before_removal():
    model = build_model("llama").train()
    handle = attach(model, cp_mesh(dist.get_world_size()))
    step(model, batch_of(dist.get_world_size()))
    dist.destroy_process_group()
    handle.remove()
    assert handle.group is None
