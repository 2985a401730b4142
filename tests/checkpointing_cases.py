"""Functions that workers run to check gradients under all kinds of activation checkpointing."""

import itertools

import torch
import torch.distributed as dist
from torch.autograd.graph import save_on_cpu
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    checkpoint_wrapper,
    offload_wrapper,
)
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_flashcp import FlashCPCollator, FlashCPPlugin, attach, save_attention_context_fn, shard_inputs
from hf_flashcp.integrations.models.checkpointing import enable_checkpointing
from hf_flashcp.planning import PlanSettings
from tests.device import DEVICE, ON_CPU, offload_on_cpu, on_device
from tests.engine_cases import _Calls
from tests.model_cases import cp_mesh, sum_gradients
from tests.models import (
    build_model,
    exact_loss_sum,
    from_one_rank,
    gradients,
    largest_error,
    make_documents,
    per_document_gradients,
)
from tests.wrapper_cases import with_lora


LENGTHS = [40, 3, 17, 1, 25]
KINDS = {
    "plain": {"use_reentrant": False},
    "reentrant": {"use_reentrant": True},
    "attention kept": {"use_reentrant": False, "context_fn": save_attention_context_fn},
}
COMBINATIONS = list(itertools.product(KINDS, (1, 2, 3), (False, True), (None, False)))
"""Kind, every_n_layers, offload, keep_received_kv."""


def build(family, lora, implementation="flashcp"):
    model = build_model(family, implementation, num_hidden_layers=3)
    return with_lora(model) if lora else model


def backward(model, features, strategy="per_doc"):
    """Return an attached model's gradients of the mean loss over all targets."""
    batch = on_device(FlashCPCollator(settings=PlanSettings(dist.get_world_size(), strategy))(features))
    shard = shard_inputs(batch, cp_mesh())
    inputs = {key: value for key, value in shard.items() if "labels" not in key}
    count = sum(len(feature["input_ids"]) - 1 for feature in features)
    (exact_loss_sum(model(**inputs).logits, shard["shift_labels"]) / count).backward()
    sum_gradients(model)
    return gradients(model)


def errors(lora):
    """Return the gradient error without checkpointing, compared with single documents on one device, and the largest
    gradient difference of each combination from it."""
    features, found = make_documents(LENGTHS), {}
    for how in (None, *COMBINATIONS):
        model = build("llama", lora).train()
        kind, every, offload, keep = how or (None, 1, False, None)
        if how is not None:
            enable_checkpointing(model, KINDS[kind], every_n_layers=every, offload=offload)
        attach(model, cp_mesh(), plugin=FlashCPPlugin(cp_size=dist.get_world_size(), keep_received_kv=keep))
        with offload_on_cpu() as copies:
            found[how] = backward(model, features)
        assert bool(copies.call_count) == (offload and ON_CPU)
    without = found.pop(None)
    _, expected = from_one_rank(per_document_gradients, build("llama", lora, "sdpa"), features)
    return largest_error(without, expected), {how: largest_error(grads, without) for how, grads in found.items()}


def hybrid_differences(family, strategy):
    """Return the largest gradient difference between a hybrid model with and without checkpointing, by kind, number of
    layers and offload.

    Gradients are not compared with single documents, because these layers compute partly in fp32; other tests check
    the gradients without checkpointing.
    """
    features, found = make_documents(LENGTHS), {}
    # transformers itself cannot run zamba with the reentrant kind around every second layer.
    how_often = (1,) if strategy == "whole_doc" else (1, 2)
    for how in (None, *itertools.product(KINDS, how_often, (False, True))):
        model = build_model(family).train()
        if how is not None:
            kind, every, offload = how
            enable_checkpointing(model, KINDS[kind], every_n_layers=every, offload=offload)
        attach(model, cp_mesh())
        with offload_on_cpu():
            found[how] = backward(model, features, strategy)
    without = found.pop(None)
    return {how: largest_error(grads, without) for how, grads in found.items()}


def wrapped_errors(family, strategy, attach_first):
    """Return the gradient error with PyTorch's wrappers around every layer, as under accelerate's FSDP2, by kind.

    Gradients are compared with each document alone or, for hybrid models, with the model without wrappers.
    """
    features = make_documents(LENGTHS)
    model = build_model(family).train()
    attach(model, cp_mesh())
    expected = backward(model, features, strategy)
    wrappers = {
        "plain": checkpoint_wrapper,
        "reentrant": lambda layer: checkpoint_wrapper(layer, checkpoint_impl=CheckpointImpl.REENTRANT),
        "attention kept": lambda layer: checkpoint_wrapper(layer, context_fn=save_attention_context_fn),
        "offloaded": lambda layer: offload_wrapper(checkpoint_wrapper(layer)),
        "everything offloaded": offload_wrapper,
    }
    found = {}
    for kind, wrap in wrappers.items():
        model = build_model(family).train()
        if attach_first:
            attach(model, cp_mesh())
        layers = model.model.layers
        for index, layer in enumerate(layers):
            layers[index] = wrap(layer)
        if not attach_first:
            attach(model, cp_mesh())
        model.enable_input_require_grads()  # for the reentrant kind
        with offload_on_cpu():
            ours = backward(model, features, strategy)
        ours = {name.replace("_checkpoint_wrapped_module.", ""): grad for name, grad in ours.items()}
        found[kind] = largest_error(ours, expected)
    return found


def offloaded_forward_error(keep):
    """Return the gradient error when all tensors that forward saves are offloaded to the host, including received
    KV."""
    features = make_documents(LENGTHS)
    _, expected = from_one_rank(per_document_gradients, build("llama", False, "sdpa"), features)
    model = build("llama", False).train()
    attach(model, cp_mesh(), plugin=FlashCPPlugin(cp_size=dist.get_world_size(), keep_received_kv=keep))
    with offload_on_cpu() as copies, save_on_cpu(pin_memory=True, device_type=DEVICE.type):
        error = largest_error(backward(model, features), expected)
    assert copies.call_count or not ON_CPU
    return error


def exchanges(kind, every, keep, kept_by_plan):
    """Return the number of exchanges in forward and backward of four layers."""
    model = build_model("llama", num_hidden_layers=4).train()
    if kind:
        enable_checkpointing(model, KINDS[kind], every_n_layers=every)
    handle = attach(model, cp_mesh(), plugin=FlashCPPlugin(cp_size=dist.get_world_size(), keep_received_kv=keep))
    batch = on_device(
        FlashCPCollator(settings=PlanSettings(dist.get_world_size(), "per_doc"))(make_documents(LENGTHS))
    )
    shard = handle.shard(batch)
    shard["flashcp_plan"] = shard["flashcp_plan"].with_layers(kept_by_plan, frozenset(), None)
    with _Calls() as calls:
        model(**shard).loss.backward()
    return calls.exchanges


class _DeviceBytes(TorchDispatchMode):
    """Counts the live bytes of tensors that operators have returned, except those in host memory."""

    def __init__(self, host):
        super().__init__()
        self._host, self._storages = host, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._storages[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        return results

    def live(self):
        at_host = {tensor.data_ptr() for tensor in self._host}
        return sum(size for at, (ref, size) in self._storages.items() if not ref.expired() and at not in at_host)


def bytes_on_device(kind, every, offload):
    """Return the bytes that three layers keep on the device between forward and backward, and the number of exchanges
    and kernel forwards until the end of backward."""
    model = build("llama", False).train()
    enable_checkpointing(model, KINDS[kind], every_n_layers=every, offload=offload)
    attach(model, cp_mesh())
    batch = FlashCPCollator(settings=PlanSettings(dist.get_world_size(), "per_doc"))(make_documents(LENGTHS))
    shard = shard_inputs(batch, cp_mesh())
    inputs = {key: value for key, value in shard.items() if "labels" not in key}
    with _Calls() as calls, offload_on_cpu() as copies, _DeviceBytes(copies.made) as kept:
        logits = model(**inputs).logits
        live = kept.live()
        logits.sum().backward()
    return live, calls.exchanges, calls.forwards


def kept_bytes_by_kind():
    """Return [`bytes_on_device`] of some combinations, and the bytes of one layer's input and attention results."""
    found = {
        how: bytes_on_device(*how) for how in itertools.product(("plain", "attention kept"), (1, 2), (False, True))
    }
    batch = FlashCPCollator(settings=PlanSettings(dist.get_world_size(), "per_doc"))(make_documents(LENGTHS))
    layout = shard_inputs(batch, cp_mesh())["flashcp_plan"].layout
    config = build("llama", False).config
    received = sum(stage.received for stage in layout.stages(torch.device("cpu")))
    heads, dim = config.num_attention_heads, config.head_dim
    results = layout.num_tokens * heads * (dim + 1) + received * config.num_key_value_heads * 2 * dim
    return found, 8 * layout.num_tokens * config.hidden_size, 8 * results


def checkpointed_on_one_rank():
    model = build_model("llama").train()
    if dist.get_rank() == 0:
        enable_checkpointing(model)
    attach(model, cp_mesh())
    model(**on_device(FlashCPCollator(2)(make_documents([30, 12]))))
