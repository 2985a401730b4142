"""`MostElements`: finds the largest tensor that a computation makes."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MostElements(TorchDispatchMode):
    """Records the most elements of any floating-point tensor that an operation returns.

    Tensors with rows longer than the vocabulary do not count: DDP and FSDP2 keep parameters and gradients in them.
    """

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.found = vocabulary, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and not leaf.is_meta:
                if leaf.dim() > 1 and leaf.shape[-1] <= self.vocabulary:
                    self.found = max(self.found, leaf.numel())
        return result
