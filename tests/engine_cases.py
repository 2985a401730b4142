"""Functions that workers run to count and trace the engine's work in one layer, forward and backward."""

import contextlib
import json
import re
from collections import Counter

import torch
import torch.distributed as dist
from torch._dynamo.utils import counters
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_flashcp import FlashCPCollator, FlashCPPlugin, attach, shard_inputs
from hf_flashcp.attention import Layer, document_attention, float64_reference, function
from hf_flashcp.integrations.models.checkpointing import enable_checkpointing
from hf_flashcp.planning import PlanSettings
from tests import attention_cases as cases
from tests import debug_cases, trainer_cases
from tests.device import ON_CPU, ExactKernel, make_kernel, on_device, usable_kernels
from tests.model_cases import cp_mesh, sum_gradients
from tests.models import (
    build_model,
    exact_loss_sum,
    from_one_rank,
    gradients,
    largest_error,
    make_documents,
    per_document_gradients,
    target_count,
)


class CountingKernel(ExactKernel):
    """A kernel that counts its calls and records ranges while it runs."""

    def __init__(self):
        super().__init__()
        self.calls = 0
        self.running = False

    @contextlib.contextmanager
    def _call(self):
        self.calls += 1
        self.running = True
        try:
            yield
        finally:
            self.running = False

    def forward(self, *args, **kwargs):
        with self._call():
            return super().forward(*args, **kwargs)

    def backward(self, *args, **kwargs):
        with self._call():
            return super().backward(*args, **kwargs)


@contextlib.contextmanager
def transparent_forward():
    """Remove the operator around the engine's forward, which hides the operators inside it from dispatch modes."""
    original = function.run_forward
    function.run_forward = lambda engine, *tensors: engine.forward(*tensors)
    try:
        yield
    finally:
        function.run_forward = original


class OperationCount(TorchDispatchMode):
    """Counts operators outside the kernel, by name."""

    def __init__(self, kernel):
        super().__init__()
        self.kernel = kernel
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self.kernel.running:
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


CPU = torch.device("cpu")
COPIES = (
    "cat",
    "index_select",
    "index_copy_",
    "index_add_",
    "copy_",
    "lerp_",
    "add_",
    "clone",
    "_to_copy",
    "scatter_",
)
# Operators that read a tensor's values on the host, or turn them into shapes.
SYNCHRONISING = ("_local_scalar_dense", "nonzero", "masked_select", "index", "item", "is_nonzero", "equal")


def counts(plan, options=None):
    """Return `collectives`, `kernel_calls`, and the engine's copying and synchronizing operators by name."""
    bound, options, kernel = cases.bind(plan), options or {}, CountingKernel()
    inputs = cases.make_inputs(plan.lengths, 4, 2, 8, 12, torch.float32, 0)
    query, key, value, grad_out = cases.local_rows(bound, inputs)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    bound.layout_for(options.get("window")).stages(
        query.device
    )  # index maps, which are moved to the device once per batch
    collectives = 0
    original = dist.all_to_all_single

    def counting(*args, **kwargs):
        nonlocal collectives
        collectives += 1
        return original(*args, **kwargs)

    dist.all_to_all_single = counting
    try:
        with transparent_forward(), OperationCount(kernel) as operations:
            out = document_attention(*leaves, bound, kernel=kernel, **options)
            torch.autograd.grad(out, leaves, grad_out)
    finally:
        dist.all_to_all_single = original
    return {
        "collectives": collectives,
        "kernel_calls": kernel.calls,
        "copies": {name: operations.counts[name] for name in COPIES if operations.counts[name]},
        "synchronising": {name: operations.counts[name] for name in SYNCHRONISING if operations.counts[name]},
    }


def ranges(plan):
    """Return the named ranges that a profiler sees in one layer, in the order in which they begin."""
    bound = cases.bind(plan)
    inputs = cases.make_inputs(plan.lengths, 4, 2, 8, 8, torch.float32, 0)
    query, key, value, grad_out = cases.local_rows(bound, inputs)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        torch.autograd.grad(document_attention(*leaves, bound), leaves, grad_out)
    events = sorted(profiler.events(), key=lambda event: event.time_range.start)
    return [event.name.removeprefix("flashcp: ") for event in events if event.name.startswith("flashcp: ")]


def errors_in_bf16(plan, shape):
    """Return the errors of out, dq, dk, dv in bf16 with the best kernel, compared with fp64 on the same inputs."""
    return cases.attention_error(plan, shape, "bfloat16", usable_kernels(Layer(torch.bfloat16, *shape[2:]))[0])


def differences_between_runs(plan, options):
    """Return how many numbers of out, dq, dk, dv differ in any bit between two runs with the best kernel."""
    inputs = cases.make_inputs(plan.lengths, 4, 2, 16, 16, torch.bfloat16, 0)
    kernel = make_kernel(usable_kernels(Layer(torch.bfloat16, 16, 16))[0], deterministic=True)
    first, second = (
        cases.sharded_attention(plan, [each.clone() for each in inputs], kernel, **options)[0] for _ in range(2)
    )
    return [int((a != b).sum()) for a, b in zip(first, second)]


# Memory


def saved_bytes(plan, shape, dtype, options):
    """Return the bytes that one layer saves for backward."""
    bound = cases.bind(plan)
    inputs = cases.make_inputs(plan.lengths, *shape, getattr(torch, dtype), 0)
    query, key, value, _ = cases.local_rows(bound, inputs)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    found = []

    def pack(tensor):
        found.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        document_attention(*leaves, bound, **options)
    return sum(found)


class LiveBytes(TorchDispatchMode):
    """Records the peak of live bytes after any operator, and the largest number of elements that an operator
    returned."""

    def __init__(self):
        super().__init__()
        self.peak = self.largest = 0
        self._storages = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
                storage = tensor.untyped_storage()
                self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._storages = {key: entry for key, entry in self._storages.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._storages.values()))
        return found


def peak_memory(plan, shape, options, backward=True):
    """Return the peak bytes of one bf16 layer, forward and backward, beyond its inputs, and its largest tensor's
    elements."""
    bound = cases.bind(plan)
    inputs = cases.make_inputs(plan.lengths, *shape, torch.bfloat16, 0)
    query, key, value, grad_out = cases.local_rows(bound, inputs)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    with transparent_forward(), LiveBytes() as live:
        out = document_attention(*leaves, bound, **options)
        if backward:
            torch.autograd.grad(out, leaves, grad_out)
    return live.peak, live.largest


def largest_tensor_of_a_check(plan, most_scores):
    """Return the elements of the largest tensor in a layer that debug mode checks, with small kernel blocks."""
    limit, value = ("_MASK_KEYS", 64) if ON_CPU else ("_MAX_SCORES", most_scores)
    with (
        debug_cases.replaced(ExactKernel, limit, lambda _: value),
        debug_cases.replaced(float64_reference, "MOST_SCORES", lambda _: most_scores),
        transparent_forward(),
        LiveBytes() as live,
    ):
        debug_cases.layer(plan, (4, 2, 8, 8))
    return live.largest


# Whole models


class _Calls:
    """Counts exchanges and kernel calls inside the context."""

    def __enter__(self):
        self.exchanges = self.forwards = self.backwards = 0
        self._originals = dist.all_to_all_single, ExactKernel.forward, ExactKernel.backward

        def counting(name, original):
            def call(*args, **kwargs):
                setattr(self, name, getattr(self, name) + 1)
                return original(*args, **kwargs)

            return call

        dist.all_to_all_single = counting("exchanges", self._originals[0])
        ExactKernel.forward = counting("forwards", self._originals[1])
        ExactKernel.backward = counting("backwards", self._originals[2])
        return self

    def __exit__(self, *_):
        dist.all_to_all_single, ExactKernel.forward, ExactKernel.backward = self._originals


def checkpointed(family, lengths, kwargs, keep_received_kv, head_groups=1):
    """Return the gradient error, and the exchanges, kernel forwards and kernel backwards per layer."""
    features = make_documents(lengths)
    _, expected = from_one_rank(per_document_gradients, build_model(family, "sdpa"), features)
    model = build_model(family)
    if kwargs is not None:
        enable_checkpointing(model, kwargs)
    model.train()
    settings = {"keep_received_kv": keep_received_kv, "head_groups": head_groups}
    attach(model, cp_mesh(), plugin=FlashCPPlugin(cp_size=dist.get_world_size(), **settings))
    batch = on_device(FlashCPCollator(settings=PlanSettings(dist.get_world_size(), "per_doc"))(features))
    shard = shard_inputs(batch, cp_mesh())
    inputs = {key: value for key, value in shard.items() if "labels" not in key}
    with _Calls() as calls:
        loss = exact_loss_sum(model(**inputs).logits, shard["shift_labels"]) / target_count(features)
        loss.backward()
    sum_gradients(model)
    layers = model.config.num_hidden_layers
    counts = calls.exchanges / layers, calls.forwards / layers, calls.backwards / layers
    return largest_error(gradients(model), expected), counts


def compiled(packs, backend, whole, family="llama", overrides=None):
    """Run a model with and without torch.compile on several packs.

    Returns the largest relative difference of gradients, the number of compiled graphs after each pack, and the
    functions at which graphs break.
    """
    torch._dynamo.reset()
    counters.clear()
    plain, model = (build_model(family, **(overrides or {})) for _ in range(2))
    run = model
    for each in (plain, model):
        attach(each, cp_mesh())
        each.train()
    if whole:
        run = torch.compile(model, backend=backend, dynamic=True)
    else:
        for layer in model.model.layers:
            layer.compile(backend=backend, dynamic=True)
    errors, graphs = [], []
    for seed, lengths in enumerate(packs):
        batch = debug_cases.make_batch(lengths, seed)
        for each in (plain, run):
            each.zero_grad()
            with debug_cases.debug_mode(FLASHCP_DEBUG_EVERY="1"):
                each(**batch, use_cache=False).loss.backward()
        errors.append(largest_error(gradients(model), gradients(plain)))
        graphs.append(counters["stats"]["unique_graphs"])
    # Models with experts have graph breaks without a function, where tokens are routed.
    found = (re.search(r"function `?<function (\w+)", reason) for reason in counters["graph_break"])
    breaks = {match.group(1) for match in found if match}
    torch._dynamo.reset()
    return errors, graphs, sorted(breaks)


def selective_trainer(lengths, kwargs):
    """Run a Trainer's step with these kwargs, and return exchanges, kernel forwards and kernel backwards per layer."""
    json.loads(trainer_cases.training_arguments(activation_checkpointing_kwargs=kwargs).to_json_string())
    with _Calls() as calls:
        result = trainer_cases.trainer_step(
            lengths, activation_checkpointing=True, activation_checkpointing_kwargs=kwargs
        )
    return result["gradient_error"], (calls.exchanges / 2, calls.forwards / 2, calls.backwards / 2)


def keep_on_one_rank():
    model = build_model("llama")
    attach(
        model, cp_mesh(), plugin=FlashCPPlugin(cp_size=dist.get_world_size(), keep_received_kv=dist.get_rank() == 0)
    )
    model.train()
    model(**on_device(FlashCPCollator(2)(make_documents([30, 12]))))
