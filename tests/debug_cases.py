"""Functions that workers run for the tests of debug mode."""

import contextlib
import os

import torch
import torch.distributed as dist

from hf_flashcp import FlashCPCollator, attach
from hf_flashcp.attention import document_attention, reference_check
from hf_flashcp.integrations.models.checkpointing import enable_checkpointing
from hf_flashcp.layout import RankLayout
from hf_flashcp.planning import PlanSettings
from tests import attention_cases as cases
from tests.device import ExactKernel, on_device
from tests.model_cases import cp_mesh
from tests.models import build_model, make_documents


@contextlib.contextmanager
def replaced(owner, name, make):
    """Replace `owner.name` by `make(original)` inside the context."""
    original = getattr(owner, name)
    setattr(owner, name, make(original))
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextlib.contextmanager
def debug_mode(**environment):
    environment = {"FLASHCP_DEBUG": "1", **environment}
    os.environ.update(environment)
    try:
        yield
    finally:
        for name in environment:
            os.environ.pop(name)


def layer(plan, shape, dtype="float64", checked=True, frozen_kv=False, change=None, **options):
    """Run forward and backward of one layer in debug mode."""
    inputs = cases.make_inputs(plan.lengths, *shape, getattr(torch, dtype), 0)
    if change is not None:
        change(inputs)
    bound = cases.bind(plan)
    query, key, value, grad_out = cases.local_rows(bound, inputs)
    for leaf in (query,) if frozen_kv else (query, key, value):
        leaf.requires_grad_()
    if options.get("sinks"):
        options["sinks"] = cases.make_sinks(len(query), query.dtype).requires_grad_()
    with debug_mode():
        out = document_attention(query, key, value, bound, check_as="the layer" if checked else None, **options)
        out.backward(grad_out)


def layers(todo):
    for args, options in todo:
        layer(*args, **options)


def sick_key(inputs):
    inputs[1][:, 20] = torch.nan


def sick_value(inputs):
    inputs[2][:, 20, 3] = torch.inf


# Transfers that deliver wrong data


def flip(rows):
    rows.view(torch.int64)[1, 2] ^= 1 << 40


def swap(rows):
    rows[[0, 1]] = rows[[1, 0]]


@contextlib.contextmanager
def bad_transfer(number, rank, change, buffer):
    """Let `change` modify the received or sent rows of all-to-all number `number` on `rank`."""
    posted = []

    def make(original):
        def call(received, sent, *args, **kwargs):
            work = original(received, sent, *args, **kwargs)
            posted.append(work)
            if len(posted) - 1 != number or dist.get_rank() != rank:
                return work

            class Work:
                def wait(self):
                    work.wait()
                    change(received if buffer == "received" else sent)

            return Work()

        return call

    with replaced(dist, "all_to_all_single", make):
        yield


def layer_with_a_bad_transfer(plan, *bad):
    with bad_transfer(*bad):
        layer(plan, (4, 2, 8, 8), checked=False)


# Layers with errors


def wrong_layer(plan, dtype, what):
    """Run a layer in which rank 1 computes a wrong number."""

    def forward(original):
        def call(self, query, key, value, rectangles, options):
            out, lse = original(self, query, key, value, rectangles, options)
            if dist.get_rank() == 1 and options.causal:
                if what == "the output":
                    out[1, 5] *= 2
                else:
                    lse[1, 5] += 0.5
            return out, lse

        return call

    def backward(original):
        def call(self, inputs, rectangles, options):
            grads = original(self, inputs, rectangles, options)
            if dist.get_rank() == 1 and options.causal:
                dict(zip(("dQ", "dK", "dV"), grads))[what][1, 5] *= 2
            return grads

        return call

    name, make = ("backward", backward) if what.startswith("d") else ("forward", forward)
    with replaced(ExactKernel, name, make):
        layer(plan, (4, 2, 8, 8), dtype, kernel=ExactKernel())


def layer_without_exchange(plan, dtype):
    with replaced(RankLayout, "stages", lambda original: lambda self, device: ()):
        layer(plan, (4, 2, 32, 32), dtype)


# Whole models


def make_batch(lengths, seed=0):
    features = make_documents(lengths, seed=seed)
    return on_device(FlashCPCollator(settings=PlanSettings(dist.get_world_size(), "per_doc"))(features))


def checked_layers(steps, every, options):
    return _checked_layers(steps, every, **options)


def _checked_layers(steps, every, family="llama", dtype="float64", checkpointing=None):
    """Return the layers that were compared, in forward and backward, step by step."""
    model = build_model(family, dtype=getattr(torch, dtype))
    if checkpointing is not None:
        enable_checkpointing(model, checkpointing)
    model.train()
    attach(model, cp_mesh())
    seen = []

    def noting(name):
        def make(original):
            def call(self, *args):
                seen[-1].append((name, self._layer))
                return original(self, *args)

            return call

        return make

    with (
        debug_mode(FLASHCP_DEBUG_EVERY=str(every)),
        replaced(reference_check.CheckedEngine, "forward", noting("forward")),
        replaced(reference_check.CheckedEngine, "backward", noting("backward")),
    ):
        for step in range(steps):
            seen.append([])
            model(**make_batch([30, 9, 14], seed=step)).loss.backward()
    return seen


def model_with_a_wrong_layer():
    """Train a model whose layer 1 is wrong on rank 0; layer 0 is checked first."""
    model = build_model("llama")
    attach(model, cp_mesh())
    inside = []
    attention = model.model.layers[1].self_attn
    attention.register_forward_pre_hook(lambda *_: inside.append(True))
    attention.register_forward_hook(lambda *_: inside.clear())

    def make(original):
        def call(self, query, key, value, rectangles, options):
            out, lse = original(self, query, key, value, rectangles, options)
            if inside and dist.get_rank() == 0 and not options.causal:
                out[3, 1] += 0.01
            return out, lse

        return call

    batch = make_batch([30, 9, 14])
    with debug_mode(FLASHCP_DEBUG_EVERY="1"), replaced(ExactKernel, "forward", make):
        model(**batch).loss.backward()
        model(**batch)


def one_forward(environment):
    """Run one forward with a different environment on each rank."""
    model = build_model("llama")
    attach(model, cp_mesh())
    batch = on_device(FlashCPCollator(dist.get_world_size())(make_documents([12, 9])))
    mine = environment[dist.get_rank()]
    with debug_mode(**mine) if mine is not None else contextlib.nullcontext():
        model(**batch)


# Costs


def collectives(plan, shape, dtype, checked):
    """Return name and received bytes of each collective of one layer, except those of the exchange."""
    seen = []

    def noting(name):
        def make(original):
            def call(tensor, *args, **kwargs):
                seen.append((name, tensor.numel() * tensor.element_size()))
                return original(tensor, *args, **kwargs)

            return call

        return make

    with (
        replaced(dist, "all_gather_into_tensor", noting("gather")),
        replaced(dist, "all_reduce", noting("sum")),
    ):
        layer(plan, shape, dtype, checked)
    return seen
