"""What workers run for the whole-model tests."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from hf_flashcp import FlashCPCollator, attach, shard_inputs
from tests.models import (
    build_model,
    exact_loss_sum,
    gradients,
    largest_error,
    make_documents,
    per_document_gradients,
    target_count,
)


def cp_mesh():
    size = dist.get_world_size()
    return init_device_mesh("cpu", (size,), mesh_dim_names=("cp",)) if size > 1 else None


def sum_gradients(model):
    for parameter in model.parameters():
        if parameter.requires_grad and dist.get_world_size() > 1:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)


def model_errors_with(family, lengths, strategy, options):
    return model_errors(family, lengths, strategy, **options)


def model_errors(
    family,
    lengths,
    strategy,
    *,
    dtype="float64",
    prompt=0.0,
    overrides=None,
    frozen=(),
    checkpointing=None,
    lora=None,
    features=None,
):
    """[gradient error, loss error] through a loss in the model's dtype, then through its own fp32 loss."""
    features = features or make_documents(lengths, prompt=prompt)
    reference = build_model(family, "sdpa", **(overrides or {}))
    model = build_model(family, "flashcp", **(overrides or {}))
    if lora:
        reference, model = (_with_lora(each, lora) for each in (reference, model))
    for name, parameter in [*reference.named_parameters(), *model.named_parameters()]:
        if any(part in name for part in frozen):
            parameter.requires_grad_(False)
    model = model.to(getattr(torch, dtype))
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.train()
    cp_size = dist.get_world_size()
    attach(model, cp_mesh())
    batch = FlashCPCollator(cp_size, strategy=strategy)(features)

    expected_loss, expected = per_document_gradients(reference, features)
    shard = shard_inputs(batch, cp_mesh())
    logits = model(**{key: value for key, value in shard.items() if "labels" not in key}).logits
    loss = exact_loss_sum(logits, shard["shift_labels"]) / target_count(features)
    loss.backward()
    sum_gradients(model)
    errors = [largest_error(gradients(model), expected), abs(_total(loss) - expected_loss) / expected_loss]

    model.zero_grad()
    expected_loss, expected = per_document_gradients(reference, features, own_loss=True)
    loss = model(**batch).loss / cp_size
    loss.backward()
    sum_gradients(model)
    return errors + [largest_error(gradients(model), expected), abs(_total(loss) - expected_loss) / expected_loss]


def _with_lora(model, targets):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def rank_without_targets():
    features = make_documents([30, 12])
    features[0]["labels"] = [-100] * 30
    return model_errors("llama", [30, 12], "whole_doc", features=features)


def without_exchange(family, lengths):
    """Gradient error when every rank attends to its own tokens only."""
    from hf_flashcp.layout import RankLayout

    original = RankLayout.stages
    RankLayout.stages = lambda self, device: ()
    try:
        return model_errors(family, lengths, "per_doc")[0]
    finally:
        RankLayout.stages = original


def _total(loss):
    total = loss.detach().double()
    if dist.get_world_size() > 1:
        dist.all_reduce(total)
    return float(total)


def fully_sharded_errors(family, lengths):
    """[gradient error, loss error] with FSDP2 over the context-parallel ranks, each layer its own unit."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    features = make_documents(lengths, prompt=0.3)
    model = build_model(family)
    for layer in model.model.layers:
        fully_shard(layer, mesh=cp_mesh())
    fully_shard(model, mesh=cp_mesh())
    attach(model, cp_mesh())
    expected_loss, expected = per_document_gradients(build_model(family, "sdpa"), features, own_loss=True)
    loss = model(**FlashCPCollator(dist.get_world_size())(features)).loss
    loss.backward()
    ours = {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in gradients(model).items()}
    return [largest_error(ours, expected), abs(_total(loss) / dist.get_world_size() - expected_loss) / expected_loss]
