"""Feed-forward blocks that compute a tile of tokens at a time, in forward and in backward.

Forward keeps only the block's input for backward, which computes each tile again. So the inner activations, which take
most of a layer's memory, exist for one tile at a time.
"""

from __future__ import annotations

import inspect
import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from ...errors import ConfigurationError
from ...tables import counted
from .chunked_loss import add_gradients
from .sharded_forward import is_inside


logger = logging.getLogger(__name__)

_LINEAR = (nn.Linear, Conv1D)
_TOKENWISE = (  # packages whose modules treat each token alone
    *(f"torch.nn.modules.{name}" for name in ("activation", "container", "dropout", "linear")),
    "transformers.activations",
    "peft.tuners.",
)


def tile_blocks(model: PreTrainedModel, tiles: int) -> list[TiledBlock]:
    """Make all dense feed-forward blocks of a model's layers compute their tokens in tiles.

    Returns the blocks, whose `remove()` undoes it. Raises a [`ConfigurationError`] if there are none.
    """
    if tiles == 1:
        return []
    tiled, left = [], Counter[str]()
    for layer in model.get_decoder().modules():
        if not isinstance(layer, GradientCheckpointingLayer):
            continue
        for block in _feed_forward_blocks(layer):
            problem = _problem(block)
            if problem is None:
                tiled.append(block)
            else:
                left[f"{_class_name(block)} {problem}"] += 1
    name = type(model).__name__
    if not tiled:
        reason = next(iter(left), "no module of its layers has several weights and is called with hidden states alone")
        raise ConfigurationError(
            f"mlp_tiles is {tiles}, but {name} has no feed-forward block that can compute its tokens in tiles: "
            f"{reason}. Leave mlp_tiles out."
        )
    others = "".join(f" {counted(count, 'block')} cannot: {problem}." for problem, count in left.items())
    logger.info(f"{name} computes {counted(len(tiled), 'feed-forward block')} in {tiles} tiles of tokens.{others}")
    return [TiledBlock(block, tiles) for block in tiled]


class TiledBlock:
    """The forward of a feed-forward block in tiles of tokens. It stays in the place of `module.forward`.

    Args:
        module (`nn.Module`): block whose output for a token depends on that token alone.
        tiles (`int`): number of tiles.
    """

    def __init__(self, module: nn.Module, tiles: int):
        self._module, self._tiles = module, tiles
        self._own = _own_forward(module)
        module.forward = self  # type: ignore[method-assign]

    def remove(self) -> None:
        """Put the module's forward back, unless another one has replaced this one."""
        self._tiles = 1
        if vars(self._module).get("forward") is self:
            del self._module.forward
            if self._own is not None:
                self._module.forward = self._own  # type: ignore[method-assign]

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        (hidden,) = (*args, *kwargs.values())
        recorded = torch.is_grad_enabled()
        one_row = hidden.shape[:-2].numel() == 1 and hidden.shape[-2] >= self._tiles > 1
        if not one_row or not (recorded or is_inside()):
            return self.run(hidden)
        weights = self.weights()
        if not (recorded and (hidden.requires_grad or weights)):
            return self.in_tiles(hidden)
        input = _Input.apply(hidden.new_empty(0).requires_grad_(), hidden.detach())
        return _Tiles.apply(self, input.grad_fn, input, hidden, *weights)

    def run(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the output of the module's own forward."""
        return type(self._module).forward(self._module, hidden) if self._own is None else self._own(hidden)

    def weights(self) -> list[torch.Tensor]:
        """Return all tensors of the module that need a gradient."""
        parameters = list(self._module.parameters())
        if any(isinstance(parameter, DTensor) for parameter in parameters):
            raise ConfigurationError(
                f"mlp_tiles needs whole weights, but FSDP2 shards parts of {_class_name(self._module)} on their own. "
                "Call fully_shard on the whole block, or on its layer."
            )
        return [parameter for parameter in parameters if parameter.requires_grad]

    @torch.no_grad()
    def in_tiles(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the output, computed tile by tile without a graph."""
        output, start = None, 0
        for part in self.split(hidden):
            of_part = self.run(part)
            if output is None:
                output = of_part.new_empty(*hidden.shape[:-1], of_part.shape[-1])
            output[..., start : start + part.shape[-2], :] = of_part
            start += part.shape[-2]
            del of_part  # before the next tile is computed
        torch.clear_autocast_cache()  # its casts of weights have no graph
        return output

    def split(self, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the tiles of a tensor (..., T, H), of which the last one may be shorter."""
        return tokens.chunk(self._tiles, dim=-2)


class _Input(torch.autograd.Function):
    """Saves a block's input before the block runs.

    So activation checkpointing, which stops at the last tensor that backward needs, does not run the block again.
    """

    @staticmethod
    def forward(ctx, anchor, hidden):
        ctx.save_for_backward(hidden)
        return torch.empty_like(anchor)

    @staticmethod
    def backward(ctx, _):
        return None, None


class _Tiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx, block, saved, input, hidden, *weights):
        ctx.block, ctx.saved, ctx.autocast = block, saved, _autocast_state(hidden.device.type)
        ctx.dtypes = [weight.dtype for weight in weights]
        return block.in_tiles(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (hidden,) = ctx.saved.saved_tensors
        block, needs, weights, start = ctx.block, ctx.needs_input_grad[3], ctx.block.weights(), 0
        of_hidden = torch.empty_like(hidden) if needs else None
        sums: list[torch.Tensor | None] = [None] * len(weights)
        torch.clear_autocast_cache()
        with torch.autocast(**ctx.autocast):  # around all tiles, so that weights are cast once
            for part, of_output in zip(block.split(hidden), block.split(grad)):
                with torch.enable_grad():
                    part = part.detach().requires_grad_(needs)
                    output = block.run(part)
                with torch.autocast(**{**ctx.autocast, "enabled": False}):
                    gradients = torch.autograd.grad(output, [part] * needs + weights, of_output, allow_unused=True)
                if of_hidden is not None:
                    of_hidden[..., start : start + part.shape[-2], :], *gradients = gradients
                add_gradients(sums, gradients)
                start += part.shape[-2]
                del output, gradients  # before the next tile is computed
        torch.clear_autocast_cache()
        for index, dtype in enumerate(ctx.dtypes):  # one after another: each sum is freed when it is rounded
            total = sums[index]
            sums[index] = None if total is None else total.to(dtype)
        return None, None, None, of_hidden, *sums


def _autocast_state(device: str) -> dict[str, Any]:
    if not torch.amp.is_autocast_available(device):
        return {"device_type": "cpu", "enabled": False}
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return {"device_type": device, "enabled": enabled, "dtype": dtype}


def _own_forward(module: nn.Module) -> Any:
    """Return the forward that a module has beside that of its class, inside an earlier [`TiledBlock`]."""
    own = vars(module).get("forward")
    return own._own if isinstance(own, TiledBlock) else own


def _feed_forward_blocks(layer: nn.Module) -> Iterator[nn.Module]:
    """Yield what may be feed-forward blocks among the children of a layer: what has matrices, and is called with
    nothing else than hidden states."""
    for child in layer.children():
        matrices = sum(parameter.dim() > 1 for parameter in child.parameters())
        forward = _own_forward(child) or type(child).forward.__get__(child)
        if matrices > 1 and len(inspect.signature(forward).parameters) == 1:
            yield child


def _problem(block: nn.Module) -> str | None:
    """Return why a block cannot compute its tokens in tiles."""
    for name, module in block.named_modules():
        rates = {key: value for key, value in vars(module).items() if "drop" in key}
        if isinstance(module, nn.Dropout):
            rates[name] = module.p
        for key, rate in rates.items():
            if isinstance(rate, float) and rate > 0:
                return f"has dropout ({key} is {rate}), which backward would draw again"
        known = module is block or isinstance(module, _LINEAR) or type(module).__module__.startswith(_TOKENWISE)
        if not known:
            return f"contains {_class_name(module)}"
    return "has weights of its own" if any(True for _ in block.parameters(recurse=False)) else None


def _class_name(module: nn.Module) -> str:
    return type(module).__name__.removeprefix("FSDP")
