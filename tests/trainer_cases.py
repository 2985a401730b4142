"""Functions that workers run for the trainer tests: real training loops that record gradients before the optimizer
step."""

import re
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from transformers import TrainerCallback, TrainingArguments

from hf_flashcp import FlashCPCollator, FlashCPPlugin, FlashCPTrainer, attach
from hf_flashcp.integrations.models.checkpointing import CHECKPOINTING_ARGUMENT
from tests.accelerate_state import fresh_accelerate
from tests.device import DEVICE, ON_CPU
from tests.models import build_model, from_one_rank, gradients, largest_error, make_documents, per_document_gradients


class KeepGradient(TrainerCallback):
    """Records the gradients of every optimizer step after clipping, as `read` gets them from the model."""

    def __init__(self, read=gradients):
        self.steps, self.read = [], read

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append(self.read(model))


USE_DEVICE = {"use_cpu": True} if ON_CPU else {"ddp_backend": "gloo"}
"""Options of TrainingArguments for this device, which ranks may share."""


def training_arguments(**kwargs):
    defaults = dict(
        **USE_DEVICE,
        output_dir=tempfile.mkdtemp(),
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        max_grad_norm=0,
        disable_tqdm=True,
        learning_rate=0.0,
        lr_scheduler_type="constant",
        optim="sgd",
        seed=0,
    )
    named = {name.replace("activation_checkpointing", CHECKPOINTING_ARGUMENT): value for name, value in kwargs.items()}
    return TrainingArguments(**{**defaults, **named})


def saving_arguments(**kwargs):
    """Return the arguments of a run that trains and saves every two steps."""
    defaults = dict(
        save_strategy="steps",
        save_steps=2,
        learning_rate=1e-2,
        lr_scheduler_type="cosine",
        optim="adamw_torch",
    )
    return training_arguments(**{**defaults, **kwargs})


def losses_by_step(trainer):
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


class InOrder(FlashCPTrainer):
    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def trainer_step(
    lengths, *, cp_size=None, prompt=0.3, per_batch=3, strategy="per_doc", steps=1, own_collator=True, **arguments
):
    """Return the gradient error of the first optimizer step, its logged and expected loss, and the log."""
    fresh_accelerate()
    cp_size = cp_size or dist.get_world_size()
    features = make_documents(lengths, prompt=prompt)
    keep = KeepGradient()
    trainer = InOrder(
        model=build_model("llama"),
        args=training_arguments(
            parallelism_config=FlashCPPlugin(cp_size=cp_size, strategy=strategy),
            per_device_train_batch_size=per_batch,
            max_steps=steps,
            **arguments,
        ),
        train_dataset=features,
        data_collator=FlashCPCollator() if own_collator else None,
        callbacks=[keep],
    )
    trainer.train()
    batches = arguments.get("gradient_accumulation_steps", 1) * dist.get_world_size() // cp_size
    window = features[: per_batch * batches]
    expected_loss, expected = from_one_rank(
        per_document_gradients, build_model("llama", "sdpa"), window, own_loss=True
    )
    return {
        "gradient_error": largest_error(keep.steps[0], expected),
        "loss": trainer.state.log_history[0]["loss"],
        "expected_loss": expected_loss,
        "log": trainer.state.log_history,
        "tokens_seen": trainer.state.num_input_tokens_seen,
        "flos": trainer.state.total_flos,
    }


def autocast_errors(lengths, cp_size, family="llama"):
    """Return the gradient errors, compared with fp64, of a Trainer step and of a single process, both in bf16
    autocast."""
    fresh_accelerate()
    features, keep = make_documents(lengths), KeepGradient()
    trainer = InOrder(
        model=build_model(family, dtype=torch.float32),
        args=training_arguments(
            parallelism_config=FlashCPPlugin(cp_size=cp_size, strategy="per_doc"),
            per_device_train_batch_size=len(features) * cp_size // dist.get_world_size(),
            max_steps=1,
            bf16=True,
        ),
        train_dataset=features,
        callbacks=[keep],
    )
    trainer.train()
    _, exact = from_one_rank(per_document_gradients, build_model(family, "sdpa"), features)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        _, single = from_one_rank(
            per_document_gradients, build_model(family, "sdpa", torch.float32), features, own_loss=True
        )
    return largest_error(keep.steps[0], exact), largest_error(single, exact)


def accelerator_loop(lengths, accumulation, prompt=0.3):
    """Run a plain Accelerator loop (prepare, attach, forward, backward) with three documents per micro-step."""
    fresh_accelerate()
    cp_size = dist.get_world_size()
    features = make_documents(lengths, prompt=prompt)
    accelerator = Accelerator(
        cpu=ON_CPU, parallelism_config=FlashCPPlugin(cp_size=cp_size), gradient_accumulation_steps=accumulation
    )
    model = build_model("llama")
    reference = build_model("llama", "sdpa")
    loader = torch.utils.data.DataLoader(features, batch_size=3, collate_fn=FlashCPCollator(cp_size))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    attach(model, accelerator)
    losses, kept = [], None
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            losses.append(accelerator.gather(loss.detach()).mean().item())
            accelerator.backward(loss)
            if accelerator.sync_gradients and kept is None:
                kept = gradients(accelerator.unwrap_model(model))
            optimizer.step()
            optimizer.zero_grad()
    expected, expected_losses = {}, []
    for start in range(0, 3 * accumulation, 3):
        loss, part = from_one_rank(per_document_gradients, reference, features[start : start + 3], own_loss=True)
        expected_losses.append(loss)
        for name, grad in part.items():
            expected[name] = expected.get(name, 0) + grad / accumulation
    return {
        "gradient_error": largest_error(kept, expected),
        "losses": losses[:accumulation],
        "expected_losses": expected_losses,
    }


def trainer_step_with(lengths, options):
    return trainer_step(lengths, **options)


def documented_class():
    """Return the `SmoothedTrainer` of docs/turn_it_on.md."""
    page = (Path(__file__).parent.parent / "docs" / "turn_it_on.md").read_text(encoding="utf-8")
    (block,) = [each for each in re.findall("```python\n(.*?)```", page, re.DOTALL) if "class SmoothedTrainer" in each]
    namespace = {}
    exec(block, namespace)
    return namespace["SmoothedTrainer"]


def _smoothed(model, features):
    """Return the mean of the documented loss over all targets, and its gradients, with each document run alone."""
    model.zero_grad()
    count, total = sum(sum(label != -100 for label in feature["labels"][1:]) for feature in features), 0.0
    for feature in features:
        ids = torch.tensor([feature["input_ids"]], device=DEVICE)
        targets = torch.tensor(feature["labels"], device=DEVICE)[1:]
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum", label_smoothing=0.1) / count
        loss.backward()
        total += loss.item()
    return total, gradients(model)


def documented_loss(lengths, cp_size, average):
    fresh_accelerate()
    features, keep = make_documents(lengths, prompt=0.3), KeepGradient()
    groups = dist.get_world_size() // cp_size
    trainer = type("InOrder", (InOrder, documented_class()), {})(
        model=build_model("llama"),
        args=training_arguments(
            parallelism_config=FlashCPPlugin(cp_size=cp_size),
            per_device_train_batch_size=len(features) // 2 // groups,
            gradient_accumulation_steps=2,
            per_device_eval_batch_size=2,
            max_steps=1,
            average_tokens_across_devices=average,
        ),
        train_dataset=features,
        eval_dataset=features,
        data_collator=FlashCPCollator(cp_size),
        callbacks=[keep],
    )
    trainer.train()
    reference = build_model("llama", "sdpa")
    per_batch = len(features) // 2 // groups
    batches = [features[start : start + per_batch] for start in range(0, len(features), per_batch)]
    means = [sum(batches, [])] if average else [sum(batches[group::groups], []) for group in range(groups)]
    parts = [_smoothed(reference, window) for window in means]
    expected = {name: sum(grads[name] for _, grads in parts) / len(parts) for name in parts[0][1]}
    return {
        "gradient_error": largest_error(keep.steps[0], expected),
        "loss": trainer.state.log_history[0]["loss"],
        "expected_loss": sum(loss for loss, _ in parts) / len(parts),
        "eval_loss": trainer.evaluate()["eval_loss"],
        "expected_eval_loss": _smoothed(reference, features)[0],
    }
