"""Documents and functions that workers run for the tests of packed datasets."""

import torch
import torch.distributed as dist

from hf_flashcp import FlashCPCollator, FlashCPPlugin, FlashCPTrainer, PackedDocuments, PackedDocumentStream
from hf_flashcp.errors import ConfigurationError
from tests.accelerate_state import fresh_accelerate
from tests.models import SMALL, build_model
from tests.trainer_cases import saving_arguments, training_arguments


def documents(lengths, weights=False, completion_mask=False, vocabulary=None):
    """Return rows whose tokens are numbered consecutively through the dataset."""
    rows, first = [], 0
    for length in lengths:
        ids = list(range(first, first + length))
        row = {"input_ids": [token % vocabulary for token in ids] if vocabulary else ids}
        if weights:
            row["weights"] = [token / 2 for token in ids]
        if completion_mask:
            row["completion_mask"] = [token % 3 for token in ids]
        rows.append(row)
        first += length
    return rows


class iterable(torch.utils.data.IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def numbered(rows, read):
    """Yield the rows, and append each one to `read` when it is read."""
    for row in rows:
        read.append(row)
        yield row


def packed(lengths, window, stream, **options):
    rows = documents(lengths, vocabulary=SMALL["vocab_size"])
    return (
        PackedDocumentStream(iterable(rows), window, **options) if stream else PackedDocuments(rows, window, **options)
    )


class _KeepRows(FlashCPTrainer):
    def training_step(self, model, inputs, *args, **kwargs):
        self.rows.append(inputs["input_ids"][0].tolist())
        return super().training_step(model, inputs, *args, **kwargs)


def _trainer(dataset, cp_size, arguments=training_arguments, **options):
    fresh_accelerate()
    trainer = _KeepRows(
        model=build_model("llama"),
        args=arguments(
            parallelism_config=FlashCPPlugin(cp_size=cp_size), **{"per_device_train_batch_size": 1, **options}
        ),
        train_dataset=dataset,
        data_collator=FlashCPCollator(cp_size),
    )
    trainer.rows = []
    return trainer


def trained_rows(lengths, window, stream):
    """Return the rows that a rank trains on in two epochs (three steps of a stream), the last log, and the errors."""
    length = {"max_steps": 3} if stream else {"num_train_epochs": 2}
    trainer = _trainer(packed(lengths, window, stream), 2, gradient_accumulation_steps=2, **length)
    trainer.train()
    refused = []
    for dataset, batch_size in ((packed(lengths, window, stream), 2), (packed(lengths, window, stream, dp_size=3), 1)):
        try:
            _trainer(dataset, 2, per_device_train_batch_size=batch_size, max_steps=1).get_train_dataloader()
        except ConfigurationError as error:
            refused.append(str(error).split(",")[0])
    log = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    return {"rows": trainer.rows, "log": log, "refused": refused, "steps": trainer.state.global_step}


def resumed_rows(lengths, window, stream, directory):
    """Return the rows of a run of six steps, and of a run that resumes after its second step."""

    def train(resume):
        trainer = _trainer(
            packed(lengths, window, stream),
            dist.get_world_size(),
            saving_arguments,
            output_dir=directory,
            gradient_accumulation_steps=2,
            max_steps=6,
        )
        trainer.train(resume_from_checkpoint=f"{directory}/checkpoint-2" if resume else None)
        return trainer.rows

    return {"rows": train(False), "resumed": train(True)}
