"""`Turns`: forwards in which the ranks of a group take turns, and each rank's rows are sharded over all of them.

Activations then exist for the rows of one rank at a time. The outputs that a rank's loss is computed from come from
forwards without gradients. Once the loss has run backward to them, each turn's forward runs again, with gradients, and
its backward starts from the gradients of these outputs (gradient caching, https://arxiv.org/abs/2101.06983).

    forward    turn 0, turn 1, ...     without gradients
    loss       all ranks, each of its own rows: loss.backward() up to the outputs
    replay     turn 0: forward, backward; turn 1: forward, backward; ...
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import get_device_states, set_device_states

from ...data.batch import token_tensor
from ...distributed import gather_values
from ...errors import BatchError, ConfigurationError
from .padded_rows import PaddedRows
from .pooled_rows import PooledRows
from .whole_rows import WholeRows


_RunSharded = Callable[[torch.nn.Module, dict[str, Any], Callable[..., Any]], Any]
"""Runs a model's forward on a packed batch, with everything that a sharded forward needs. Returns outputs of rows."""


@dataclass
class _Forward:
    """A forward whose backward is still to come."""

    batch: dict[str, Any]  # its arguments on this rank
    rows: tuple[PaddedRows, PooledRows]
    random_states: list[_RandomState]  # before each turn
    leaves: dict[str, torch.Tensor]  # outputs of this rank's rows, whose gradients the loss computes


class Turns:
    """Runs the forwards of a model in turns.

    Args:
        rows (`WholeRows`): reads and packs the rows.
        run_sharded: runs a model's forward on a packed batch.
    """

    def __init__(self, rows: WholeRows, run_sharded: _RunSharded):
        self._rows, self._run_sharded = rows, run_sharded
        self._forwards: list[_Forward] | None = None  # since `recording` began
        self._replayed: tuple[_Forward, int] | None = None  # forward and turn that run again
        self._begun = False

    @property
    def size(self) -> int:
        """Number of turns."""
        return self._rows.group.size()

    def wrap(self, model: torch.nn.Module) -> None:
        """Make the forward of `model` run in turns whenever [`Turns.begin`] has been called before it."""
        bound = model.forward
        function = getattr(bound, "__func__", None)

        @torch.compiler.disable
        @functools.wraps(function or bound)
        def in_turns(called: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            forward = bound if function is None else functools.partial(function, called)
            return self._run(called, forward, **kwargs) if self._begun else forward(*args, **kwargs)

        model.forward = types.MethodType(in_turns, model)  # copies of the model run with their own parameters

    def begin(self) -> None:
        """Make the forward that is about to begin run in turns. It gets its arguments by name."""
        self._begun = True

    def end(self) -> bool:
        """End this forward, and return whether it ran in turns."""
        begun, self._begun = self._begun, False
        return begun

    def replayed_batch(self, batch: dict[str, Any]) -> dict[str, Any] | None:
        """Return the packed batch of the turn that runs again, or `None` outside [`Turns.replay`]."""
        if self._replayed is None:
            return None
        return self._rows.pack(batch, [self._replayed[1]])

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Context manager in which forwards with gradients are kept for [`Turns.replay`]."""
        self._forwards = []
        try:
            yield
        except BaseException:
            self._forwards = None
            raise

    def _run(self, model: torch.nn.Module, forward: Callable[..., Any], **batch: Any) -> Any:
        records = torch.is_grad_enabled()
        if records and self._forwards is None:
            raise ConfigurationError(
                "batches='turns' needs a training step that runs each turn's backward. Train with a trainer that has "
                "FlashCPTrainerMixin, or use batches='own'."
            )
        self._rows.read(batch)
        states, mine = [], None
        for turn in range(self.size):
            if records:
                states.append(_RandomState(token_tensor(batch)))
            with torch.no_grad():
                output = self._run_sharded(model, self._rows.pack(batch, [turn]), forward)
            if turn == self._rows.group.rank():
                mine = output
        if not records:
            return mine
        leaves = {}
        for name, value in mine.items():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                leaves[name] = value.detach().requires_grad_()
                mine[name] = leaves[name].clone()  # callers may change outputs in place
        self._forwards.append(_Forward(batch, self._rows.current, states, leaves))
        return mine

    def replay(self, model: torch.nn.Module, last_turn_synchronizes: bool, no_sync: Callable[[], Any]) -> None:
        """Run forward and backward of every turn of the recorded forwards.

        Args:
            model: the model that was called, with its wrappers.
            last_turn_synchronizes: whether gradients are reduced over processes in the last backward.
            no_sync: returns a context manager for all other forwards and backwards.
        """
        forwards, self._forwards = self._forwards or [], None
        steps = [
            (forward, turn, names)
            for forward in forwards
            if (names := self._names_with_gradient(forward))
            for turn in range(self.size)
        ]
        for left, step in zip(reversed(range(len(steps))), steps):
            synchronizes = last_turn_synchronizes and not left
            with contextlib.nullcontext() if synchronizes else no_sync():
                self._replay_turn(model, *step)

    def _names_with_gradient(self, forward: _Forward) -> list[str]:
        mine = {"outputs": sorted(name for name, leaf in forward.leaves.items() if leaf.grad is not None)}
        advice = "All processes must compute the same loss."
        found = gather_values("outputs with gradients", mine, self._rows.group, advice=advice, error=BatchError)
        return sorted({name for each in found for name in each["outputs"]})

    def _replay_turn(self, model: torch.nn.Module, forward: _Forward, turn: int, names: list[str]) -> None:
        self._rows.current, self._replayed = forward.rows, (forward, turn)
        try:
            with forward.random_states[turn].restored(), torch.enable_grad():
                output = model(**forward.batch)
        finally:
            self._replayed = None
        outputs = [output[name] for name in names]
        gradients = [torch.zeros_like(value) for value in outputs]
        if turn == self._rows.group.rank():
            given = (forward.leaves[name].grad for name in names)
            gradients = [zeros if gradient is None else gradient for gradient, zeros in zip(given, gradients)]
        torch.autograd.backward(outputs, gradients)


class _RandomState:
    """The state of the random number generators, for a forward that runs again with the same dropout."""

    def __init__(self, tokens: torch.Tensor):
        self._device = tokens.device.type
        self._cpu = torch.get_rng_state()
        self._devices, self._states = get_device_states(tokens)

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Context manager that begins with this state, and ends with the state before it."""
        with torch.random.fork_rng(self._devices, device_type=self._device):
            torch.set_rng_state(self._cpu)
            set_device_states(self._devices, self._states, device_type=self._device)
            yield
