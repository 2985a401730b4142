"""Router losses of mixture-of-experts models, which are not sums over tokens.

The load balancing loss of Switch Transformers (https://huggingface.co/papers/2101.03961, equations 4 to 6) multiplies
two means over the tokens of a batch in all layers:

    loss = E * sum_e f_e P_e    f_e: share of tokens routed to expert e (no gradient)    P_e: mean router probability

The mean of the losses that ranks compute on their own tokens is a different number. Instead, ranks sum their counts
and probabilities before the product, which takes 2 E + 1 numbers per forward. transformers has a copy of the function
in each modeling file, always with the same name. The model adds `coefficient * loss` to its sum over targets.

Other terms, such as z-losses, are plain means over the tokens of the forward. For these, each rank's coefficient is
scaled by its share of the tokens.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist

from ...distributed import add_over_ranks
from ...errors import UnsupportedModelError
from .sharded_forward import ShardedForward, current_sharded_forward


_MIXTRAL = "transformers.models.mixtral.modeling_mixtral"
FUNCTION = "load_balancing_loss_func"  # name in transformers' modeling files, and in files that import it from there
COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")  # attributes of models or configs that multiply this loss
MEAN_COEFFICIENTS = ("z_loss_coefficient",)  # attributes of models that multiply means over the forward's tokens
_TOLERANCE = 1e-4  # relative, because transformers sums in fp32


def share_router_losses(model: torch.nn.Module) -> None:
    """Replace the router loss function in the modules that define the model's class, if not done before.

    TRL's fused output head takes it from Mixtral's module for every model (trl/trainer/utils.py). Outside a sharded
    forward, the replacement computes transformers' own loss.
    """
    modules = {cls.__module__: sys.modules.get(cls.__module__) for cls in type(model).__mro__}
    if "trl.trainer.utils" in sys.modules and hasattr(model.config.get_text_config(), "output_router_logits"):
        modules[_MIXTRAL] = importlib.import_module(_MIXTRAL)
    for module in modules.values():
        stock = getattr(module, FUNCTION, None)
        if stock is not None and not hasattr(stock, "_flashcp_stock"):
            setattr(module, FUNCTION, _shared(stock))


def _shared(stock: Callable) -> Callable:
    @torch.compiler.disable
    @functools.wraps(stock)
    def load_balancing_loss(gate_logits, num_experts=None, top_k=2, attention_mask=None, *args, **kwargs):
        forward = current_sharded_forward()
        if forward is None or not isinstance(gate_logits, tuple):
            return stock(gate_logits, num_experts, top_k, attention_mask, *args, **kwargs)
        if not load_balancing_loss._flashcp_checked:
            _require_same_formula(forward, stock, gate_logits, num_experts, top_k, attention_mask, *args, **kwargs)
            load_balancing_loss._flashcp_checked = True
        loss = router_loss(gate_logits, num_experts, top_k, forward.router_group)
        forward.router_loss = loss
        return loss * forward.router_weight

    load_balancing_loss._flashcp_stock, load_balancing_loss._flashcp_checked = stock, False
    return load_balancing_loss


def router_loss(
    gate_logits: tuple[torch.Tensor, ...], num_experts: int, top_k: int, group: dist.ProcessGroup | None
) -> torch.Tensor:
    """Compute the load balancing loss over the tokens of all ranks of `group`.

    Every rank calls it with the logits (T_r, E) of its own tokens, one tensor per layer. The loss is the same on every
    rank, in fp32, or in fp64 if the logits are fp64. Its gradient is the mean of the ranks' gradients.
    """
    counts, probabilities, rows = router_statistics(gate_logits, num_experts, top_k)
    if group is not None:
        sums = _SumOverRanks.apply(torch.cat((probabilities, counts, rows)), group)
        probabilities, counts, rows = sums.split((num_experts, num_experts, 1))
    return num_experts * (counts.detach() / rows * probabilities / rows).sum()


def router_statistics(
    gate_logits: tuple[torch.Tensor, ...], num_experts: int, top_k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return statistics summed over all layers.

    These are the number of tokens routed to each expert (E,), each expert's probability summed over tokens (E,), and
    the number of tokens (1,).
    """
    dtype = torch.promote_types(torch.float32, gate_logits[0].dtype)
    device = gate_logits[0].device
    counts, probabilities, rows = (torch.zeros(size, dtype=dtype, device=device) for size in (num_experts,) * 2 + (1,))
    for logits in gate_logits:
        weights = logits.to(device).reshape(-1, num_experts).softmax(dim=-1)
        chosen = weights.topk(top_k, dim=-1).indices.flatten()
        counts = counts + _histogram(chosen, num_experts).to(dtype)
        probabilities = probabilities + weights.to(dtype).sum(dim=0)
        rows = rows + len(weights)
    return counts, probabilities, rows


def _histogram(experts: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Count how often each expert occurs, (E,), deterministically and without waiting for the device."""
    dtype = torch.int32 if experts.device.type == "cuda" else torch.float32
    return torch.histc(experts.to(dtype), bins=num_experts, min=0, max=num_experts)


class _SumOverRanks(torch.autograd.Function):
    """An all-reduce whose backward does not communicate.

    Every rank computes the same loss from the sums, so all ranks have the same gradient, and their sum is `size` times
    that gradient.
    """

    @staticmethod
    def forward(ctx, numbers: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.size = group.size()
        return add_over_ranks(numbers.clone(), group, "the router statistics of other ranks")

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return gradient * ctx.size, None


def _require_same_formula(
    forward: ShardedForward, stock: Callable, gate_logits: tuple, num_experts, top_k, *args, **kwargs
):
    with torch.no_grad():
        try:
            expected = stock(gate_logits, num_experts, top_k, *args, **kwargs)
            ours = router_loss(gate_logits, num_experts, top_k, None)
            same = torch.allclose(ours.double(), expected.double(), rtol=_TOLERANCE, atol=0)
        except (TypeError, ValueError, RuntimeError):  # logits of another kind
            same = False
    if not same:
        raise UnsupportedModelError(
            f"{type(forward.model).__name__} computes its router loss differently from Switch Transformers "
            f"({stock.__module__}.{stock.__name__}), so ranks cannot share it. Turn it off by "
            "config.output_router_logits = False, or set its coefficient to 0."
        )


def scale_mean_terms(model: torch.nn.Module, weight: float) -> dict[str, float]:
    """Multiply the coefficients of loss terms that are means over a forward's tokens, and return the old values."""
    stock = {name: getattr(model, name) for name in MEAN_COEFFICIENTS if getattr(model, name, 0)}
    for name, coefficient in stock.items():
        setattr(model, name, coefficient * weight)
    return stock


def router_coefficients(model: torch.nn.Module) -> set[float]:
    """Return the coefficients by which the model may multiply its router loss."""
    places = (model, model.config, model.config.get_text_config())
    found = (getattr(place, name, None) for place in places for name in COEFFICIENTS)
    return {float(coefficient) for coefficient in found if coefficient is not None}
