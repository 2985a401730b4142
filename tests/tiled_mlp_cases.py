"""Functions that workers run for the tests of feed-forward blocks in tiles of tokens."""

import contextlib
import functools
import math

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import fully_shard

from hf_flashcp import FlashCPCollator, FlashCPPlugin, attach
from hf_flashcp.doctor.float64 import float64_throughout
from hf_flashcp.errors import FlashCPError
from hf_flashcp.integrations.models.checkpointing import enable_checkpointing
from hf_flashcp.planning import PlanSettings
from tests import checkpointing_cases, engine_cases
from tests.device import offload_on_cpu
from tests.largest_tensor import MostElements
from tests.model_cases import cp_mesh, sum_gradients, total
from tests.models import (
    build_model,
    from_one_rank,
    gradients,
    largest_error,
    make_documents,
    per_document_gradients,
    target_count,
)
from tests.wrapper_cases import whole_gradients


def plugin(tiles, **options):
    return FlashCPPlugin(cp_size=dist.get_world_size(), mlp_tiles=tiles, **options)


def collated(features):
    return FlashCPCollator(settings=PlanSettings(dist.get_world_size(), "per_doc"))(features)


def with_adapters(model):
    """Return a model with adapters in its feed-forward blocks."""
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=["up_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def build(family, implementation="flashcp", **overrides):
    name, _, adapters = family.partition(" + ")
    model = build_model(name, implementation, **overrides)
    return with_adapters(model) if adapters else model


def errors(families, lengths, tiles, options):
    """Return the gradient error and the loss error of each family."""
    features, found = make_documents(lengths, prompt=0.3), {}
    for family, overrides in families:
        with float64_throughout():
            reference = build(family, "eager", **overrides)
            expected_loss, expected = from_one_rank(per_document_gradients, reference, features)
            model = build(family, **overrides).train()
            handle = attach(model, cp_mesh(), plugin=plugin(tiles, **options))
            loss = model(**collated(features), num_items_in_batch=target_count(features)).loss
            loss.backward()
            sum_gradients(model)
            handle.remove()
        found[family] = largest_error(gradients(model), expected), abs(total(loss) / expected_loss - 1)
    return found


KINDS = [(None, False), *((kind, offload) for kind in checkpointing_cases.KINDS for offload in (False, True))]


def count(calls, *_):
    calls.append(1)


def checkpointed(tiles, family="llama"):
    """Return the largest gradient difference in tiles from that without, and the largest difference of each kind of
    checkpointing from none, with the number of times that it runs a tile per tile and layer."""
    features, found, runs = make_documents(checkpointing_cases.LENGTHS), {}, {}
    for how in KINDS:
        model = build(family, num_hidden_layers=3).train()
        kind, offload = how
        if kind is not None:
            enable_checkpointing(model, checkpointing_cases.KINDS[kind], offload=offload)
        calls = []
        for layer in model.get_decoder().layers:
            layer.mlp.down_proj.register_forward_hook(functools.partial(count, calls))
        attach(model, cp_mesh(), plugin=plugin(tiles))
        with offload_on_cpu():
            found[how] = checkpointing_cases.backward(model, features)
        runs[how] = len(calls) / 3 / tiles
    whole = build(family, num_hidden_layers=3).train()
    attach(whole, cp_mesh(), plugin=plugin(1))
    error = largest_error(found[None, False], checkpointing_cases.backward(whole, features))
    return error, {how: (largest_error(each, found[None, False]), runs[how]) for how, each in found.items()}


INNER = 997
"""A width of blocks with which inner activations of all tokens have more elements than any other tensor."""


def largest_tensor(lengths, tiles, checkpointing):
    """Return the most elements of a tensor in forward and backward, those of one tile's inner activations or of a
    weight, and those of the inner activations of all tokens."""
    model = build_model("llama", intermediate_size=INNER).train()
    if checkpointing:
        enable_checkpointing(model)
    handle = attach(model, cp_mesh(), plugin=plugin(tiles, skip_logits=True))
    batch, largest = collated(make_documents(lengths)), MostElements(INNER)
    with largest:
        model(**batch).loss.backward()
        model.eval()
        with torch.no_grad():
            model(**batch)
    tokens = handle.plan.layout.num_tokens
    return largest.found, INNER * max(math.ceil(tokens / tiles), model.config.hidden_size), INNER * tokens


def bf16_errors(lengths, tiles, autocast):
    """Return the gradient error in bf16, and that of a single process without tiles, against fp64."""
    dtype = torch.float32 if autocast else torch.bfloat16
    features = make_documents(lengths)
    _, expected = from_one_rank(per_document_gradients, build_model("llama", "sdpa"), features)

    def context():
        return torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()

    with context():
        _, single = per_document_gradients(build_model("llama", "sdpa", dtype), features, own_loss=True)
    model = build_model("llama", dtype=dtype).train()
    attach(model, cp_mesh(), plugin=plugin(tiles))
    with context():
        loss = model(**collated(features), num_items_in_batch=target_count(features)).loss
    loss.backward()
    sum_gradients(model)
    return largest_error(gradients(model), expected), largest_error(single, expected)


def fully_sharded(lengths, units):
    """Return the gradient error of two steps under FSDP2 with blocks, or parts of them, as units of their own."""
    features, size = make_documents(lengths), dist.get_world_size()
    _, expected = from_one_rank(per_document_gradients, build_model("llama", "sdpa"), features, own_loss=True)
    model, mesh = build_model("llama").train(), cp_mesh()
    attach(model, mesh, plugin=plugin(3))
    for layer in model.model.layers:
        fully_shard({"blocks": layer.mlp, "parts": layer.mlp.up_proj}[units], mesh=mesh)
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    found = []
    for _ in range(2):
        model.zero_grad()
        try:
            loss = model(**collated(features), num_items_in_batch=target_count(features)).loss * size
        except FlashCPError as error:
            return f"{type(error).__name__}: {error}"
        loss.backward()
        found.append(largest_error(whole_gradients(model), expected))
    return found


def tiles_on_one_rank():
    model = build_model("llama").train()
    attach(model, cp_mesh(), plugin=plugin(1 + dist.get_rank()))
    model(**collated(make_documents([30, 12])))


def compiled(packs):
    plugin(3)  # attached models take it from here
    return engine_cases.compiled(packs, "aot_eager", whole=False)
