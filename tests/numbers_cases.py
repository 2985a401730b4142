"""What workers run for the tests of numbers that go wrong."""

import torch
import torch.distributed as dist

from hf_flashcp import FlashCPPlugin, FlashCPTrainer
from tests import attention_cases as cases
from tests.accelerate_state import fresh_accelerate
from tests.models import build_model
from tests.trainer_cases import _KeepGradient, losses_by_step, training_arguments


def differences_of_other_documents(todo, sick, kernel, options):
    """For each (plan, which input, value): how many numbers of out, dq, dk, dv differ from those of the sound batch,
    in all documents but the one that has `value` in every head of one token."""
    return [_differences(*each, sick, cases.KERNELS[kernel], options) for each in todo]


def _differences(plan, which, value, sick, kernel, options):
    inputs = cases.make_inputs(plan.lengths, 4, 2, 8, 12, torch.float32, 0)
    bad = [tensor.clone() for tensor in inputs]
    start = sum(plan.lengths[:sick])
    bad[which][:, start + plan.lengths[sick] // 2] = value
    (sound, index), (found, _) = (cases.sharded_attention(plan, each, kernel, **options) for each in (inputs, bad))
    elsewhere = (index < start) | (index >= start + plan.lengths[sick])
    return [int((a[:, elsewhere] != b[:, elsewhere]).sum()) for a, b in zip(sound[:4], found[:4])]


def step_without_targets(cp_size, average):
    """The logged loss of a step whose labels are all masked, and the largest gradient."""
    fresh_accelerate()
    documents = [{"input_ids": [1, 2, 3, 4, 5], "labels": [-100] * 5}] * 8
    keep = _KeepGradient()
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
