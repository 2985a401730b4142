"""Functions that workers run to record PyTorch's settings for deterministic algorithms inside a layer."""

import contextlib

import torch
from torch.utils import deterministic
from torch.utils._python_dispatch import TorchDispatchMode

from hf_flashcp.attention.engine import Engine
from hf_flashcp.attention.kernels import BackwardInputs, TorchFlashKernel
from hf_flashcp.layout import Rectangle
from tests import attention_cases as cases
from tests.fake_cuda import fake_cuda, forward_and_backward
from tests.kernel_cases import SCALE, EmulatedVarlen


class Switches(TorchDispatchMode):
    """Records `(operator, deterministic algorithms, filled memory)`."""

    def __enter__(self):
        super().__enter__()
        self.found = set()
        return self.found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.found.add((name, torch.are_deterministic_algorithms_enabled(), deterministic.fill_uninitialized_memory))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def deterministic_algorithms():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def switches_in_a_layer(plan):
    """Return the settings during the engine's operators while the user has the switch on, and after the layer."""
    bound = cases.bind(plan)
    query, key, value, grad_out = cases.local_rows(
        bound, cases.make_inputs(plan.lengths, 4, 2, 8, 8, torch.float64, 0)
    )
    kernel = EmulatedVarlen(deterministic=True)
    engine = Engine(bound.group, bound.layout, kernel, SCALE, None, True)
    with deterministic_algorithms():
        with Switches() as seen:
            out, lse, received = engine.forward(query, key, value, None)
            inputs = BackwardInputs(grad_out, query, key, value, out, lse)
            engine.backward(inputs, received, keys_need_grad=True)
        return seen, (torch.are_deterministic_algorithms_enabled(), deterministic.fill_uninitialized_memory)


def switches_in_pytorchs_flash():
    """Return the same for PyTorch's own deterministic kernel, while the user's switch is off."""
    with fake_cuda(), Switches() as seen:
        forward_and_backward(
            TorchFlashKernel(deterministic=True), (4, 2, 8, 8), (Rectangle(0, 5, 0, 7),), causal=False
        )
    return seen
