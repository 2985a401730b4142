"""Functions that workers run for the tests of saving and resuming."""

import json
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from hf_flashcp import FlashCPPlugin, FlashCPTrainer
from hf_flashcp.integrations.gradient_check import gradient_error
from tests.accelerate_state import fresh_accelerate
from tests.models import build_model, make_documents
from tests.trainer_cases import losses_by_step, saving_arguments


LENGTHS = [40, 25, 18, 31, 22, 12, 9, 33, 27, 16, 21, 38]


def train(directory, cp_size, resume=False, steps=6):
    """Train, save every two steps, and return losses by step and the trained parameters.

    Documents are shuffled with the seed. A step has two documents, for any cp_size.
    """
    fresh_accelerate()
    trainer = FlashCPTrainer(
        model=build_model("llama"),
        args=saving_arguments(
            output_dir=directory,
            parallelism_config=FlashCPPlugin(cp_size=cp_size),
            per_device_train_batch_size=2 * cp_size // dist.get_world_size(),
            max_steps=steps,
        ),
        train_dataset=make_documents(LENGTHS),
    )
    trainer.train(resume_from_checkpoint=str(Path(directory) / "checkpoint-2") if resume else None)
    return losses_by_step(trainer), {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def resumed_and_not(directory, cp_size, other_cp_size):
    """Return a run of six steps, and runs that resume at its second step with the same cp_size and with another
    one."""
    losses, parameters = train(directory, cp_size)
    dist.barrier()
    again_losses, again = train(directory, cp_size, resume=True)
    dist.barrier()
    found = {
        "losses": losses,
        "resumed_losses": again_losses,
        "bitwise": all(torch.equal(parameters[name], again[name]) for name in parameters),
    }
    if other_cp_size is not None:
        other_losses, other = train(directory, other_cp_size, resume=True)
        found["other_losses"] = other_losses
        found["other_error"] = gradient_error(other, parameters)
    return found


def traces(directory):
    """Return whether the saved model mentions us, and the difference of its logits under plain transformers."""
    _, parameters = train(directory, dist.get_world_size(), steps=2)
    checkpoint = Path(directory) / "checkpoint-2"
    config = json.loads((checkpoint / "config.json").read_text())
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="sdpa")
    differences = [
        float((dict(loaded.named_parameters())[name] - value).abs().max()) for name, value in parameters.items()
    ]
    text = json.dumps(config).lower()
    return {"mentions": [word for word in ("flashcp", "document_cp") if word in text], "difference": max(differences)}
