"""Functions that workers run for the tests of waits: real training loops in a context that counts waits."""

import contextlib
import tempfile
from collections import Counter
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator
from transformers import DataCollatorWithFlattening, Trainer, TrainerCallback

from hf_flashcp import FlashCPCallback, FlashCPCollator, FlashCPPlugin, FlashCPTrainer, attach
from hf_flashcp.distributed import agreement, require_agreement
from hf_flashcp.integrations.models.checkpointing import CHECKPOINTING_ARGUMENT
from tests.accelerate_state import fresh_accelerate
from tests.models import build_model, make_documents, tokenizer
from tests.trainer_cases import InOrder, training_arguments
from tests.waits import Waits


LENGTHS = [40, 3, 17, 9, 25, 2, 30, 7, 12, 5, 33, 20, 8, 11, 45, 16]
WINDOW = 48


class ByStep(TrainerCallback):
    """Keeps what a [`Waits`] has recorded in each step."""

    def __init__(self, waits):
        self.waits, self.steps = waits, []

    def on_step_end(self, *args, **kwargs):
        self.steps.append(Counter(self.waits.places))
        self.waits.clear()


def waits_of_trainer(options):
    """Return the waits of each step of FlashCPTrainer, or of a stock Trainer with the callback."""
    fresh_accelerate()
    arguments = {**options}
    collator, callback = arguments.pop("collator"), arguments.pop("callback", False)
    with Waits() as waits:
        by_step = ByStep(waits)
        trainer = (Trainer if callback else InOrder)(
            model=build_model("llama"),
            args=training_arguments(
                parallelism_config=FlashCPPlugin(cp_size=dist.get_world_size()),
                per_device_train_batch_size=3,
                max_steps=3,
                logging_steps=100,
                **arguments,
            ),
            train_dataset=make_documents(LENGTHS),
            data_collator=_collator(collator),
            callbacks=[by_step, *([FlashCPCallback()] if callback else [])],
        )
        trainer.train()
    return by_step.steps


def waits_of_sft(packing):
    """Return the waits of each step of TRL's SFTTrainer with rows that it packed."""
    from datasets import Dataset
    from trl import SFTConfig

    from tests.trl_cases import _MixedSFTTrainer

    fresh_accelerate()
    with Waits() as waits:
        by_step = ByStep(waits)
        trainer = _MixedSFTTrainer(
            model=build_model("llama"),
            args=SFTConfig(
                output_dir=tempfile.mkdtemp(),
                use_cpu=True,
                report_to=[],
                save_strategy="no",
                max_length=WINDOW,
                per_device_train_batch_size=1,
                max_steps=3,
                parallelism_config=FlashCPPlugin(cp_size=dist.get_world_size()),
                shuffle_dataset=False,
                packing=True,
                packing_strategy=packing,
                logging_steps=100,
                max_grad_norm=0,
                disable_tqdm=True,
                optim="sgd",
                bf16=False,
                **{CHECKPOINTING_ARGUMENT: False},
            ),
            train_dataset=Dataset.from_list([{"input_ids": each["input_ids"]} for each in make_documents(LENGTHS)]),
            processing_class=tokenizer(),
            callbacks=[by_step],
        )
        trainer.train()
    return by_step.steps


def waits_of_loop(collator):
    """Return the waits of each step of a training loop with Accelerator and attach."""
    fresh_accelerate()
    accelerator = Accelerator(cpu=True, parallelism_config=FlashCPPlugin(cp_size=dist.get_world_size()))
    loader = torch.utils.data.DataLoader(make_documents(LENGTHS), batch_size=3, collate_fn=_collator(collator))
    model, loader = accelerator.prepare(build_model("llama").train(), loader)
    attach(model, accelerator)
    steps = []
    with Waits() as waits:
        for batch in loader:
            loss = model(**batch).loss
            steps.append(Counter(waits.places))
            loss.backward()
            waits.clear()
    return steps


def _collator(name):
    match name:
        case "FlashCPCollator":
            return FlashCPCollator()
        case "cu_seqlens":
            return DataCollatorWithFlattening(return_flash_attn_kwargs=True)
        case "position_ids":
            return DataCollatorWithFlattening()
    raise ValueError(name)


def layouts_on_device_while_ranks_wait(family):
    """Return, for each of three forwards, the windows whose index maps were on the device when the rank began to wait
    for the others' batches."""
    model = build_model(family).train()
    handle = attach(model, dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),)))
    read, seen = agreement._values, []

    def values(store, keys, timeout):
        if "/the batch/" in keys[0]:
            layouts = {None: handle.plan.layout, **handle.plan._window_layouts}
            seen.append({window for window, layout in layouts.items() if layout._maps_on})
        return read(store, keys, timeout)

    with contextlib.ExitStack() as stack:
        stack.callback(setattr, agreement, "_values", read)
        agreement._values = values
        for lengths in LENGTHS[:3], LENGTHS[3:6], LENGTHS[6:9]:
            model(**FlashCPCollator(dist.get_world_size())(make_documents(lengths))).loss.backward()
    return seen


def others_go_on_meanwhile():
    """Return whether rank 0 was done while the others were still busy with what they do meanwhile."""
    store, done = dist.distributed_c10d._get_default_store(), []

    def until_first_is_done():
        if dist.get_rank() > 0:
            store.wait(["first is done"], timedelta(seconds=20))
            done.append(True)

    require_agreement("a test", {"same": 1}, dist.group.WORLD, advice="", meanwhile=until_first_is_done)
    if dist.get_rank() == 0:
        store.set("first is done", "")
    return dist.get_rank() == 0 or done == [True]


def loaders(options):
    """Return the data loaders for training and evaluation of a trainer, as (pinned copies are asynchronous, type of
    the collate function)."""
    fresh_accelerate()
    kind = {"own": FlashCPTrainer, "generating": _Generating}[options["trainer"]]
    arguments = training_arguments(parallelism_config=FlashCPPlugin(cp_size=1))
    arguments.dataloader_pin_memory = options.get("pin_memory", True)  # transformers turns it off on CPUs
    trainer = kind(
        model=build_model("llama"),
        args=arguments,
        train_dataset=make_documents(LENGTHS),
        eval_dataset=make_documents(LENGTHS),
        data_collator=_collator("position_ids"),
    )
    loaders = trainer.get_train_dataloader(), trainer.get_eval_dataloader()
    return [(loader._non_blocking, type(loader.collate_fn).__name__) for loader in loaders]


class _Generating(FlashCPTrainer):
    def _own_prediction_step(self):
        return type(self)
