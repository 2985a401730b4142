"""Functions that workers run for the tests of router losses.

Ranks are compared with one process and transformers' function.
"""

import contextlib
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import Trainer

from hf_flashcp import FlashCPCallback, FlashCPCollator, FlashCPPlugin, FlashCPTrainer, attach
from hf_flashcp.doctor.float64 import float64_throughout
from hf_flashcp.doctor.tiny import build, default_config, tiny_copy
from hf_flashcp.errors import UnsupportedModelError
from hf_flashcp.integrations.gradient_check import per_document_gradients
from hf_flashcp.integrations.models import router_loss
from hf_flashcp.planning import PlanSettings
from tests.accelerate_state import fresh_accelerate
from tests.model_cases import cp_mesh, sum_gradients
from tests.models import build_model, exact_loss_sum, gradients, largest_error, make_documents, target_count
from tests.trainer_cases import InOrder, KeepGradient, training_arguments


COEFFICIENT = 0.1
ROUTER = {"output_router_logits": True, "router_aux_loss_coef": COEFFICIENT}


def stock_function(model):
    function = getattr(sys.modules[type(model).__module__], router_loss.FUNCTION)
    return getattr(function, "_flashcp_stock", function)


def reference_loss(model, batches, targets=None):
    """Return the mean loss over the targets of all batches, and the router loss of each batch as one packed row."""
    count = targets or sum(target_count(features) for features in batches)
    total, router_losses = 0.0, []
    for features in batches:
        logits = []
        for feature in features:
            output = model(input_ids=torch.tensor([feature["input_ids"]]), use_cache=False, output_router_logits=True)
            labels = F.pad(torch.tensor([feature["labels"]]), (0, 1), value=-100)[:, 1:]
            total = total + exact_loss_sum(output.logits, labels) / count
            logits.append(output.router_logits)
        layers = tuple(torch.cat(layer) for layer in zip(*logits))
        router_losses.append(stock_function(model)(layers, model.num_experts, model.num_experts_per_tok))
    return total, router_losses


def router_errors(family, lengths, strategy, losses_add_up, shared=True, skip_logits=False):
    """Return the [gradient, loss, aux_loss] errors of a packed batch, with ranks' losses averaged or added up."""
    with float64_throughout(), contextlib.nullcontext() if shared else _own_tokens_alone():
        size, features = dist.get_world_size(), make_documents(lengths, prompt=0.3)
        reference, model = build_model(family, "eager", **ROUTER), build_model(family, **ROUTER)
        main, (aux,) = reference_loss(reference, [features])
        expected = main + COEFFICIENT * aux
        expected.backward()
        attach(model, cp_mesh())
        batch = {**FlashCPCollator(settings=PlanSettings(size, strategy))(features), "skip_logits": skip_logits}
        options = {"num_items_in_batch": target_count(features)} if losses_add_up else {}
        output = model(**batch, **options)
        assert (output.logits is None) == skip_logits
        loss = output.loss if losses_add_up else output.loss / size
        loss.backward()
        sum_gradients(model)
        total = loss.detach().clone()
        if size > 1:
            dist.all_reduce(total)
        return (
            largest_error(gradients(model), gradients(reference)),
            abs(float(total - expected)) / float(expected),
            abs(float(output.aux_loss - aux)) / float(aux),
        )


@contextlib.contextmanager
def _own_tokens_alone():
    """Compute the router loss from a rank's own tokens, without a sum over ranks."""
    original = router_loss.add_over_ranks
    router_loss.add_over_ranks = lambda numbers, group, what: numbers
    try:
        yield
    finally:
        router_loss.add_over_ranks = original


def unknown_term():
    """Return the error for a model whose router loss is not computed over all ranks."""
    model = build_model("mixtral", **ROUTER)
    attach(model, cp_mesh())
    module = sys.modules[type(model).__module__]
    own, stock = getattr(module, router_loss.FUNCTION), stock_function(model)
    setattr(module, router_loss.FUNCTION, stock)
    try:
        model(**FlashCPCollator(dist.get_world_size())(make_documents([9, 8])))
    except UnsupportedModelError as error:
        return str(error)
    finally:
        setattr(module, router_loss.FUNCTION, own)


def trainer_router_errors(lengths, cp_size, per_batch, callback=False, global_router_loss=False, **arguments):
    """Return the [gradient, logged loss] errors of a Trainer step, compared with the stock Trainer on these batches.

    The stock Trainer adds up the router losses of a step's batches, or averages over groups if it averages over
    devices.
    """
    fresh_accelerate()
    steps, groups = arguments.get("gradient_accumulation_steps", 1), dist.get_world_size() // cp_size
    features = make_documents(lengths, prompt=0.3)[: per_batch * groups * steps]
    keep = KeepGradient()
    with float64_throughout():
        options = dict(
            model=build_model("mixtral", **ROUTER),
            args=training_arguments(
                parallelism_config=FlashCPPlugin(cp_size=cp_size, global_router_loss=global_router_loss),
                per_device_train_batch_size=per_batch,
                max_steps=1,
                **arguments,
            ),
            train_dataset=features,
            data_collator=FlashCPCollator(cp_size),
        )
        if callback:
            trainer = _StockInOrder(callbacks=[keep, FlashCPCallback()], **options)
        else:
            trainer = InOrder(callbacks=[keep], **options)
        trainer.train()
        batches = [features[start : start + per_batch] for start in range(0, len(features), per_batch)]
        if global_router_loss:  # one row for all groups
            batches = [sum(batches[step : step + groups], []) for step in range(0, len(batches), groups)]
        reference = build_model("mixtral", "eager", **ROUTER)
        if arguments.get("average_tokens_across_devices", True):
            main, aux = reference_loss(reference, batches)
            expected = main + COEFFICIENT * sum(aux)
        else:  # each group uses the mean over its own targets
            expected = 0.0
            for group in range(groups):
                main, aux = reference_loss(reference, batches[group::groups])
                expected = expected + (main + COEFFICIENT * sum(aux)) / groups
        expected.backward()
    logged = trainer.state.log_history[0]["loss"]
    return largest_error(keep.steps[0], gradients(reference)), abs(logged - float(expected)) / float(expected)


class _StockInOrder(Trainer):
    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def evaluation_error(lengths, cp_size, per_batch):
    """Return the relative error of eval_loss, which weights each batch's router loss by its number of targets."""
    fresh_accelerate()
    with float64_throughout():
        features = make_documents(lengths, prompt=0.3)
        trainer = FlashCPTrainer(
            model=build_model("mixtral", **ROUTER),
            args=training_arguments(
                parallelism_config=FlashCPPlugin(cp_size=cp_size), per_device_eval_batch_size=per_batch
            ),
            eval_dataset=features,
            data_collator=FlashCPCollator(cp_size),
        )
        measured = trainer.evaluate()["eval_loss"]
        batches = [features[start : start + per_batch] for start in range(0, len(features), per_batch)]
        main, aux = reference_loss(build_model("mixtral", "eager", **ROUTER), batches)
        shares = [target_count(batch) / target_count(features) for batch in batches]
        expected = float(main + COEFFICIENT * sum(share * loss for share, loss in zip(shares, aux)))
    return abs(measured - expected) / expected


def trainer_router_errors_with(lengths, cp_size, options):
    return trainer_router_errors(lengths, cp_size, per_batch=3, **options)


def other_formula():
    """Return the error for a model whose own function uses the largest probability instead of the mean."""
    model = build_model("mixtral", **ROUTER)
    module = sys.modules[type(model).__module__]
    own = getattr(module, router_loss.FUNCTION)
    setattr(module, router_loss.FUNCTION, lambda logits, experts, top_k, mask: logits[0].softmax(-1).max())
    try:
        attach(model, cp_mesh())
        model(**FlashCPCollator(dist.get_world_size())(make_documents([9, 8])))
    except UnsupportedModelError as error:
        return str(error)
    finally:
        setattr(module, router_loss.FUNCTION, own)


def z_loss_errors(lengths, losses_add_up):
    """Return the [gradient, loss] errors of Bamba, whose loss has a term coefficient * mean(logsumexp(logits)^2)."""
    with float64_throughout():
        size, features = dist.get_world_size(), make_documents(lengths, prompt=0.3)
        config = tiny_copy(default_config("bamba"))
        config.z_loss_coefficient = COEFFICIENT
        reference, model = build(config, "eager").eval(), build(config, "flashcp").eval()
        expected, tokens = 0.0, sum(lengths)
        for feature in features:
            logits = reference(input_ids=torch.tensor([feature["input_ids"]]), use_cache=False).logits
            labels = F.pad(torch.tensor([feature["labels"]]), (0, 1), value=-100)[:, 1:]
            expected = expected + exact_loss_sum(logits, labels) / target_count(features)
            expected = expected + COEFFICIENT * logits.logsumexp(-1).pow(2).sum() / tokens
        expected.backward()
        attach(model, cp_mesh())
        options = {"num_items_in_batch": target_count(features)} if losses_add_up else {}
        loss = model(**FlashCPCollator(settings=PlanSettings(size, "whole_doc"))(features), **options).loss
        loss = loss if losses_add_up else loss / size
        loss.backward()
        assert model.z_loss_coefficient == COEFFICIENT
        sum_gradients(model)
        total = loss.detach().clone()
        if size > 1:
            dist.all_reduce(total)
        return largest_error(gradients(model), gradients(reference)), abs(float(total - expected)) / float(expected)


def checked_gradient_error(lengths):
    """Return the error of `per_document_gradients`, the reference of the recipes, for two batches."""
    with float64_throughout():
        features = make_documents(lengths, prompt=0.3)
        features[1]["labels"] = [-100] * lengths[1]
        batches = [features[:3], features[3:]]
        reference, model = build_model("mixtral", "eager", **ROUTER), build_model("mixtral", **ROUTER)
        main, aux = reference_loss(reference, batches)
        (main + COEFFICIENT * sum(aux)).backward()
        collate = FlashCPCollator(1)
        return largest_error(
            per_document_gradients(model, [collate(batch) for batch in batches]), gradients(reference)
        )
