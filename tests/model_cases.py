"""Functions that workers run for the tests of whole models."""

from functools import partial

import torch
import torch.distributed as dist
from accelerate.state import PartialState
from torch.distributed.device_mesh import init_device_mesh

from hf_flashcp import FlashCPCollator, FlashCPPlugin, FlashCPTrainer, attach, shard_inputs
from hf_flashcp.doctor.float64 import float64_throughout
from hf_flashcp.integrations.models.checkpointing import enable_checkpointing
from hf_flashcp.planning import PlanSettings
from tests.accelerate_state import fresh_accelerate
from tests.device import DEVICE, ON_CPU, on_device
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


def cp_mesh():
    size = dist.get_world_size()
    return init_device_mesh(DEVICE.type, (size,), mesh_dim_names=("cp",)) if size > 1 else None


def sum_gradients(model):
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if dist.get_world_size() == 1 or not parameters:
        return
    zeros = (torch.zeros_like(parameter) for parameter in parameters)
    grads = [zero if parameter.grad is None else parameter.grad for parameter, zero in zip(parameters, zeros)]
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    for parameter, part in zip(parameters, flat.split([grad.numel() for grad in grads])):
        parameter.grad = part.view_as(parameter).to(parameter.dtype)


def model_errors_with(family, lengths, strategies, options):
    return model_errors(family, lengths, strategies, **options)


def family_errors_with(family, lengths, strategies, options):
    return family_errors(family, lengths, strategies, **options)


def family_errors(family, lengths, strategies, **options):
    """Return the largest `model_errors` over strategies, compared with transformers' eager attention, all in fp64."""
    with float64_throughout():
        errors = model_errors(family, lengths, strategies, reference="eager", **options)
    return max(map(max, errors.values()))


def family_errors_without_rope_hooks(family, lengths):
    from hf_flashcp.integrations import handle as module

    original = module.hook_length_dependent_rope
    module.hook_length_dependent_rope = lambda model: []
    try:
        return family_errors(family, lengths, ["per_doc"])
    finally:
        module.hook_length_dependent_rope = original


def model_errors(
    family,
    lengths,
    strategies,
    *,
    dtype="float64",
    prompt=0.0,
    overrides=None,
    frozen=(),
    checkpointing=None,
    lora=None,
    features=None,
    reference="sdpa",
    topology=None,
    num_stages=None,
    keep_received_kv=None,
):
    """By strategy: [gradient error, loss error] through a loss in the model's dtype, then through its fp32 loss."""

    def build(implementation):
        model = build_model(family, implementation, **(overrides or {}))
        model = _with_lora(model, lora) if lora else model
        for name, parameter in model.named_parameters():
            if any(part in name for part in frozen):
                parameter.requires_grad_(False)
        return model

    features = features or make_documents(lengths, prompt=prompt)
    expected = from_one_rank(lambda: per_document_gradients(build(reference), features))
    expected_own = from_one_rank(lambda: per_document_gradients(build(reference), features, own_loss=True), rank=1)
    model = build("flashcp").to(getattr(torch, dtype))
    if checkpointing is not None:
        enable_checkpointing(model, {"use_reentrant": checkpointing})
        model.train()
    cp_size = dist.get_world_size()
    attach(model, cp_mesh(), plugin=FlashCPPlugin(cp_size=cp_size, keep_received_kv=keep_received_kv))
    errors = {}
    for strategy in strategies:
        settings = PlanSettings(cp_size, strategy, topology=topology, num_stages=num_stages)
        batch = on_device(FlashCPCollator(settings=settings)(features))
        shard = shard_inputs(batch, cp_mesh())
        logits = model(**{key: value for key, value in shard.items() if "labels" not in key}).logits
        loss = exact_loss_sum(logits, shard["shift_labels"]) / target_count(features)
        errors[strategy] = _backward_errors(model, loss, *expected)
        loss = model(**batch).loss / cp_size
        errors[strategy] += _backward_errors(model, loss, *expected_own)
    return errors


def _backward_errors(model, loss, expected_loss, expected):
    model.zero_grad()
    loss.backward()
    sum_gradients(model)
    return [largest_error(gradients(model), expected), abs(total(loss) - expected_loss) / expected_loss]


def _with_lora(model, targets):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def rank_without_targets():
    features = make_documents([30, 12])
    features[0]["labels"] = [-100] * 30
    return model_errors("llama", [30, 12], ["whole_doc"], features=features)


def loss_of_skipped_positions():
    """Return the loss that the trainer logs for one document of 30 tokens."""
    from tests.trainer_cases import training_arguments

    fresh_accelerate()
    (feature,) = make_documents([30])
    feature |= {"position_ids": [*range(12), *range(100, 118)], "seq_lengths": [30]}
    cp_size = dist.get_world_size()
    plugin = FlashCPPlugin(cp_size=cp_size)
    trainer = FlashCPTrainer(
        model=build_model("llama"),
        args=training_arguments(parallelism_config=plugin, max_steps=1),
        train_dataset=[feature],
        data_collator=FlashCPCollator(cp_size),
    )
    trainer.train()
    return trainer.state.log_history[0]["loss"] - per_document_gradients(build_model("llama"), [feature], True)[0]


def window_of_the_mask_alone(lengths, features=None):
    """Run a model whose mask has a window of 5 tokens, which its attention calls do not pass on."""
    from transformers.masking_utils import create_causal_mask, sliding_window_overlay
    from transformers.models.llama import modeling_llama as module

    module.create_causal_mask = partial(create_causal_mask, and_mask_function=sliding_window_overlay(5))
    try:
        model = build_model("llama").train()
        attach(model, cp_mesh())
        model(**on_device(FlashCPCollator(dist.get_world_size())(features or make_documents(lengths))))
    finally:
        module.create_causal_mask = create_causal_mask


def without_exchange(family, lengths):
    """Return the gradient error if every rank attends only to its own tokens."""
    from hf_flashcp.layout import RankLayout

    original = RankLayout.stages
    RankLayout.stages = lambda self, device: ()
    try:
        return model_errors(family, lengths, ["per_doc"])["per_doc"][0]
    finally:
        RankLayout.stages = original


def total(loss):
    total = loss.detach().double()
    if dist.get_world_size() > 1:
        dist.all_reduce(total)
    return float(total)


def fully_sharded_errors(family, lengths, cp_size=None, mixed_precision=False, small_units=False):
    """Return [gradient error, loss error] with FSDP2 over all ranks, and the bf16 error of a single process.

    FSDP2 shards over data- and context-parallel ranks, with one unit per layer, or for each module of a layer too.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import DTensor

    world_size = dist.get_world_size()
    plugin = FlashCPPlugin(cp_size=cp_size or world_size)
    if plugin.cp_size < world_size:
        plugin.dp_shard_size = plugin._sizes["dp_shard"] = world_size // plugin.cp_size
    fresh_accelerate()
    PartialState(cpu=ON_CPU)
    mesh = plugin.build_device_mesh(DEVICE.type)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if mixed_precision else None
    options = {"mesh": mesh["dp_shard_cp"], **({"mp_policy": policy} if policy else {})}
    model = build_model(family, dtype=torch.float32 if mixed_precision else torch.float64)
    for layer in model.model.layers:
        for module in [*(layer.children() if small_units else ()), layer]:
            fully_shard(module, **options)
    fully_shard(model, **options)
    attach(model, mesh)
    features = make_documents(lengths, prompt=0.3)

    def reference(dtype):
        return per_document_gradients(build_model(family, "sdpa", dtype), features, own_loss=True)

    expected_loss, expected = from_one_rank(reference, torch.float64)
    _, single = from_one_rank(reference, torch.bfloat16, rank=1)
    # Each data-parallel group has its share of the documents; the loss is scaled as in Trainer.
    groups = world_size // plugin.cp_size
    mine = features[dist.get_rank() // plugin.cp_size :: groups]
    batch = on_device(FlashCPCollator(plugin.cp_size)(mine))
    loss = model(**batch, num_items_in_batch=target_count(features)).loss * world_size
    loss.backward()
    ours = {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in gradients(model).items()}
    return (
        largest_error(ours, expected),
        abs(total(loss) / world_size - expected_loss) / expected_loss,
        largest_error(single, expected),
    )
