"""Functions that workers run for the tests of data loading: which documents does each rank train on, step by step?"""

import random

import numpy as np
import torch
from datasets import Dataset, IterableDataset

from hf_flashcp import FlashCPPlugin, FlashCPTrainer
from tests.accelerate_state import fresh_accelerate
from tests.models import build_model
from tests.trainer_cases import losses_by_step, training_arguments


def numbered_documents(count):
    """Return documents of different lengths, whose first token is their number."""
    return [{"input_ids": [number, *range(1, 3 + number % 5)]} for number in range(count)]


class _Stream(torch.utils.data.IterableDataset):
    def __init__(self, documents):
        self.documents = documents

    def __iter__(self):
        return iter(self.documents)


class _Augmented(torch.utils.data.Dataset):
    """A dataset with random tokens after each document's number, from three generators."""

    def __init__(self, documents):
        self.documents = documents

    def __len__(self):
        return len(self.documents)

    def __getitem__(self, index):
        drawn = [random.randrange(64), int(torch.randint(64, ())), int(np.random.randint(64))]
        return {"input_ids": [*self.documents[index]["input_ids"], *drawn]}


def _dataset(kind, documents):
    if kind == "list":
        return documents
    if kind == "augmented":
        return _Augmented(documents)
    if kind == "uneven stream":  # shards of different lengths, because accelerate gives every other shard to a group
        return IterableDataset.from_generator(_shard, gen_kwargs={"shards": [documents[:3], documents[3:]]})
    if kind == "torch stream":
        return _Stream(documents)
    table = Dataset.from_list(documents)
    return table if kind == "table" else table.to_iterable_dataset(num_shards=4)


def _shard(shards):
    for shard in shards:
        yield from shard


class _Recorder(FlashCPTrainer):
    def training_step(self, model, inputs, *args, **kwargs):
        starts = inputs["position_ids"][0] == 0
        self.seen.append(inputs["input_ids"][0][starts].tolist())
        self.rows.append(inputs["input_ids"][0].tolist())
        return super().training_step(model, inputs, *args, **kwargs)


def _train(kind, count, cp_size, resume=None, **arguments):
    fresh_accelerate()
    trainer = _Recorder(
        model=build_model("llama", num_hidden_layers=1),
        args=training_arguments(
            **{"parallelism_config": FlashCPPlugin(cp_size=cp_size), "per_device_train_batch_size": 2, **arguments}
        ),
        train_dataset=_dataset(kind, numbered_documents(count)),
    )
    trainer.seen, trainer.rows = [], []
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def documents_by_step(*args, **options):
    """Return the numbers of the documents in each step."""
    return _train(*args, **options).seen


def documents_by_step_with(kind, count, cp_size, options):
    return documents_by_step(kind, count, cp_size, **options)


def rows_by_step(kind, count, cp_size, options):
    """Return the tokens of each step."""
    return _train(kind, count, cp_size, **options).rows


def uneven_stream(options):
    """Return the documents that each step read, and the logged losses."""
    trainer = _train("uneven stream", 16, 2, **options)
    return trainer.seen, losses_by_step(trainer)


def resumed_documents(kind, directory):
    """Return the documents of a run over eight steps, and of a run that resumes at the third step."""
    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 3, "output_dir": directory}
    seen = documents_by_step(kind, 16, 2, **options)
    torch.distributed.barrier()
    return seen, documents_by_step(kind, 16, 2, resume=f"{directory}/checkpoint-3", **options)
