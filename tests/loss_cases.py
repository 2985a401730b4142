"""Functions that workers run for the tests of loss functions, some of which ranks can share and some not."""

import torch
import torch.distributed as dist
import torch.nn.functional as F

from hf_flashcp import FlashCPCollator, attach, shard_inputs
from hf_flashcp.errors import UnsupportedModelError
from hf_flashcp.planning import PlanSettings
from tests.model_cases import cp_mesh, sum_gradients
from tests.models import build_model, gradients, largest_error, make_documents, target_count
from tests.router_cases import ROUTER


def own_shift(logits, labels, vocab_size, num_items_in_batch=None, **kwargs):
    """A loss of whole rows, in the style of loss functions without shift_labels."""
    return F.cross_entropy(logits[0, :-1].double(), labels[0, 1:], reduction="sum") / num_items_in_batch


def mean_of_targets(logits, labels, vocab_size, shift_labels=None, **kwargs):
    return F.cross_entropy(logits[0].double(), shift_labels[0])


def not_divided(logits, labels, vocab_size, shift_labels=None, **kwargs):
    return F.cross_entropy(logits[0].double(), shift_labels[0], reduction="sum")


def squared(logits, labels, vocab_size, shift_labels=None, num_items_in_batch=None, **kwargs):
    return F.cross_entropy(logits[0].double(), shift_labels[0], reduction="sum") ** 2 / num_items_in_batch


def pairs_of_tokens(logits, labels, vocab_size, shift_labels=None, num_items_in_batch=None, **kwargs):
    assert logits.shape[1] % 8 == 0, "rows of eight"


def focal(logits, labels, vocab_size, shift_labels=None, num_items_in_batch=None, **kwargs):
    """Another sum over targets, which ignores labels if it is given shift_labels."""
    targets = F.pad(labels, (0, 1), value=-100)[:, 1:] if shift_labels is None else shift_labels
    losses = F.cross_entropy(logits[0].double(), targets[0], reduction="none", ignore_index=-100)
    return ((1 - (-losses).exp()) ** 2 * losses).sum() / num_items_in_batch


LOSSES = {
    "transformers": None,
    "focal": focal,
    "own_shift": own_shift,
    "mean_of_targets": mean_of_targets,
    "not_divided": not_divided,
    "squared": squared,
    "pairs_of_tokens": pairs_of_tokens,
}


def _model(family, loss, attn_implementation="flashcp"):
    model = build_model(family, attn_implementation, **(ROUTER if family == "qwen3_moe" else {}))
    if LOSSES[loss] is not None:
        model.loss_function = LOSSES[loss]
    return model


def first_step(family, loss, prompt=0.3):
    """Return the error of a step with this loss function on this rank, or `None`.

    The model must keep its loss function.
    """
    model = _model(family, loss)
    attach(model, cp_mesh())
    features = make_documents([40, 3, 17], prompt=prompt)
    batch = FlashCPCollator(settings=PlanSettings(dist.get_world_size(), "whole_doc"))(features)
    try:
        # A forward without labels cannot be checked.
        model(input_ids=batch["input_ids"], flashcp_plan=batch["flashcp_plan"])
        model(**batch)
        found = None
    except UnsupportedModelError as error:
        found = str(error)
    assert vars(model).get("_loss_function") is LOSSES[loss]
    return found


def gradient_error(family, loss):
    """Return the gradient error, compared with single documents and the same loss function."""
    features, size = make_documents([40, 3, 17], prompt=0.3), dist.get_world_size()
    reference, model = _model(family, loss, "sdpa"), _model(family, loss)
    count = target_count(features)
    for feature in features:
        ids, labels = torch.tensor([feature["input_ids"]]), torch.tensor([feature["labels"]])
        reference(input_ids=ids, labels=labels, num_items_in_batch=count, use_cache=False).loss.backward()
    attach(model, cp_mesh())
    model(**FlashCPCollator(size)(features), num_items_in_batch=count).loss.backward()
    sum_gradients(model)
    return largest_error(gradients(model), gradients(reference))


def _message_of_a_step(model, forward):
    """Return the error of a step with this forward, or `None`."""
    model.forward = forward
    attach(model, cp_mesh())
    try:
        model(**FlashCPCollator(dist.get_world_size())(make_documents([40, 3, 17])))
    except UnsupportedModelError as error:
        return str(error)


def losses_inside_the_forward(uses_shift_labels, extra):
    """Return the error of a step whose forward computes the loss itself, as with fused kernels."""
    model = build_model("llama")
    forward = model.forward

    def own_forward(*, labels=None, shift_labels=None, num_items_in_batch=None, **kwargs):
        output = forward(**kwargs)
        targets = shift_labels if uses_shift_labels else F.pad(labels, (0, 1), value=-100)[:, 1:]
        assert targets.device == output.logits.device
        loss = F.cross_entropy(output.logits[0].double(), targets.view(-1), reduction="sum") / num_items_in_batch
        output["loss"] = loss + extra
        return output

    return _message_of_a_step(model, own_forward)


def handed_on_by_nobody():
    """Return the error for a model that calls its loss function without shift_labels."""
    model = build_model("llama")
    forward = model.forward

    def own_forward(*, labels=None, shift_labels=None, num_items_in_batch=None, **kwargs):
        output = forward(**kwargs)
        output["loss"] = model.loss_function(output.logits, labels, 67, num_items_in_batch=num_items_in_batch)
        return output

    return _message_of_a_step(model, own_forward)


def already_sharded():
    """Return the loss of a batch that the caller has sharded, divided by that of the same batch sharded by the
    hooks."""
    model = build_model("qwen3_moe", **ROUTER)
    attach(model, cp_mesh())
    batch = FlashCPCollator(dist.get_world_size())(make_documents([40, 3, 17]))
    return float(model(**shard_inputs(batch, cp_mesh())).loss / model(**batch).loss)


def loss_function_mentioned_alone():
    """Return the errors of two steps with a forward that mentions `loss_function` but computes another loss from
    labels."""
    model = build_model("llama")
    forward = model.forward

    def own_forward(*, labels=None, shift_labels=None, num_items_in_batch=None, **kwargs):
        output = forward(**kwargs)
        assert model.loss_function is not None
        output["loss"] = output.logits.mean() + own_shift(output.logits, labels, 67, num_items_in_batch)
        return output

    model.forward = own_forward
    attach(model, cp_mesh())
    batch, found = FlashCPCollator(dist.get_world_size())(make_documents([40, 3, 17])), []
    for _ in range(2):
        try:
            model(**batch)
            found.append(None)
        except UnsupportedModelError as error:
            found.append(str(error))
    return found
