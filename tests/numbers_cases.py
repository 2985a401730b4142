"""Functions that workers run for the tests of inf, NaN and other numerical edge cases."""

import math

import torch
import torch.distributed as dist

from hf_flashcp import FlashCPPlugin, FlashCPTrainer
from hf_flashcp.attention.kernels import EagerKernel
from hf_flashcp.attention.kernels.blocks import KeyBlock
from tests import attention_cases as cases
from tests.accelerate_state import fresh_accelerate
from tests.device import make_kernel
from tests.models import build_model
from tests.trainer_cases import KeepGradient, losses_by_step, training_arguments


def differences_of_other_documents(todo, sick, kernel, options):
    """Count, for each (plan, input, value), the numbers of out, dq, dk, dv that differ from the original batch.

    One token of a document has `value` in every head of the input; that document is not counted.
    """
    return [_differences(*each, sick, make_kernel(kernel), options) for each in todo]


def _differences(plan, which, value, sick, kernel, options):
    inputs = cases.make_inputs(plan.lengths, 4, 2, 8, 12, torch.float32, 0)
    bad = [tensor.clone() for tensor in inputs]
    start = sum(plan.lengths[:sick])
    bad[which][:, start + plan.lengths[sick] // 2] = value
    (sound, index), (found, _) = (cases.sharded_attention(plan, each, kernel, **options) for each in (inputs, bad))
    elsewhere = (index < start) | (index >= start + plan.lengths[sick])
    return [int((a[:, elsewhere] != b[:, elsewhere]).sum()) for a, b in zip(sound[:4], found[:4])]


def step_without_targets(cp_size, average):
    """Return the logged loss and the largest gradient of a step whose labels are all masked."""
    fresh_accelerate()
    documents = [{"input_ids": [1, 2, 3, 4, 5], "labels": [-100] * 5}] * 8
    keep = KeepGradient()
    trainer = FlashCPTrainer(
        model=build_model("llama"),
        args=training_arguments(
            parallelism_config=FlashCPPlugin(cp_size=cp_size),
            per_device_train_batch_size=2,
            max_steps=1,
            logging_nan_inf_filter=False,
            average_tokens_across_devices=average,
        ),
        train_dataset=documents,
        callbacks=[keep],
    )
    trainer.train()
    if dist.get_world_size() > 1:
        dist.barrier()
    return losses_by_step(trainer)[1], max(float(grad.abs().max()) for grad in keep.steps[0].values())


class PiecesThatSeeNothing(EagerKernel):
    """A kernel that processes keys in pieces of five.

    Causal rows attend to no key of the last piece or, with a window, of the first. Such rows have the logsumexp
    `empty`.
    """

    def __init__(self, empty, last_first):
        self.empty, self.last_first, self.found = empty, last_first, 0

    def _blocks(self, *args, **kwargs):
        for block in super()._blocks(*args, **kwargs):
            ((first, stop, mask, _),) = block.keys
            keys = [
                KeyBlock(start, min(start + 5, stop), None if mask is None else mask[:, start - first :][:, :5])
                for start in range(first, stop, 5)
            ]
            yield block._replace(keys=keys[::-1] if self.last_first else keys)

    def _forward_block(self, *args):
        out, lse = super()._forward_block(*args)
        self.found += int((lse == -math.inf).sum())
        return out, lse.masked_fill(lse == -math.inf, self.empty)


def errors_with_pieces_that_see_nothing(plan, dtype, options):
    """Return, for each sign and order, whether there were empty rows, and the errors of out, dq, dk, dv.

    The last entry has the errors of the kernel in one piece.
    """
    inputs = cases.make_inputs(plan.lengths, 4, 2, 8, 12, getattr(torch, dtype), 0)
    expected = cases.reference_attention(list(plan.lengths), *(tensor.double() for tensor in inputs), **options)
    results = []
    for kernel in (*(PiecesThatSeeNothing(*each) for each in EMPTY), EagerKernel()):
        ours, index = cases.sharded_attention(plan, [each.clone() for each in inputs], kernel, **options)
        errors = cases.relative_errors([(ours, index, expected)])[0]
        results.append((getattr(kernel, "found", 0) > 0, errors))
    return results


EMPTY = [(sign * math.inf, last_first) for sign in (-1, 1) for last_first in (False, True)]
