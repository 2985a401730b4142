"""From the loader to the loss, the host does not wait for the device, so that it can be ahead of it."""

import contextlib
import itertools
import json
import pickle
from unittest.mock import Mock, call

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed import fake_pg  # noqa: F401, registers the backend
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening

from hf_flashcp import FlashCPCollator, FlashCPPlugin, attach, shard_inputs
from hf_flashcp.distributed import agreement
from hf_flashcp.doctor.tiny import default_config, tiny_copy
from hf_flashcp.errors import BatchError, PlanError
from hf_flashcp.exchange import transfer
from hf_flashcp.integrations.trainers.planned_batches import PlannedBatches
from hf_flashcp.layout import RankPlan
from hf_flashcp.layout.upload import upload
from hf_flashcp.planning import PlanSettings
from tests import wait_cases
from tests.fake_cuda import FAKE, fake_cuda
from tests.models import FAMILIES, make_documents
from tests.waits import Waits


UPSTREAM = {
    # After the loss: DistributedDataParallel, which handles the gradients of a CPU one by one.
    ("accelerate/accelerator.py", "backward", "_local_scalar_dense"),
    # After backward: whether the loss is NaN or infinite; logging_nan_inf_filter=False turns it off.
    ("transformers/trainer.py", "_run_epoch", "_local_scalar_dense"),
}
SFT = {
    # After the forward: entropy, accuracy and the number of tokens, which SFTTrainer logs.
    ("trainer/sft_trainer.py", "compute_loss", "_local_scalar_dense"),
}
"""Where other libraries wait in every step."""


@pytest.mark.parametrize("cp_size", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {"collator": "FlashCPCollator"},
        {"collator": "cu_seqlens"},
        {"collator": "position_ids"},
        {"collator": "position_ids", "callback": True},
        {"collator": "position_ids", "gradient_accumulation_steps": 2},
    ],
    ids=str,
)
def test_a_trainer_does_not_wait_from_the_loader_to_the_loss(pool, cp_size, options):
    """After the first step, which checks the model."""
    for steps in pool.run(cp_size, wait_cases.waits_of_trainer, options):
        assert len(steps) == 3 and all({*places} <= UPSTREAM for places in steps[1:]), steps[1:]


@pytest.mark.parametrize("cp_size, packing", [(1, "bfd"), (2, "bfd"), (2, "wrapped")])
def test_trl_does_not_wait_from_the_loader_to_the_loss(pool, cp_size, packing):
    for steps in pool.run(cp_size, wait_cases.waits_of_sft, packing):
        assert len(steps) == 3 and all({*places} <= UPSTREAM | SFT for places in steps[1:]), steps[1:]


@pytest.mark.parametrize("cp_size", [1, 2])
def test_a_loop_does_not_wait_from_the_loader_to_the_loss(pool, cp_size):
    for steps in pool.run(cp_size, wait_cases.waits_of_loop, "FlashCPCollator"):
        assert len(steps) > 2 and not any(steps[1:]), steps[1:]


def test_waits_are_seen(pool):
    """In a loop whose collate function makes no plans, boundaries and labels are read from the batch."""
    for steps in pool.run(2, wait_cases.waits_of_loop, "position_ids"):
        operations = {operation for file, _, operation in steps[1] if file.startswith("data/")}
        assert operations == {"tolist", "nonzero", "cpu", "numpy", "index"}


RECURRENT = ("bamba", "lfm2", "qwen3_5_text")


@pytest.fixture
def lonely_mesh(monkeypatch):
    """Return a function that returns a mesh of ranks of which only the first exists."""

    def values(store, keys, timeout):
        return [json.loads(store.get(keys[0]))] * len(keys)

    monkeypatch.setattr(agreement, "watch_liveness", lambda: None)
    monkeypatch.setattr(agreement, "_values", values)

    def mesh(size):
        if size == 1:
            return None
        dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=size)
        return dist.device_mesh.init_device_mesh("cpu", (size,))

    yield mesh
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("cp_size", [1, 4])
@pytest.mark.parametrize("family", ["llama", "mistral, window", "gemma3", *RECURRENT])
def test_a_forward_reads_no_values_and_all_copies_are_asynchronous(family, cp_size, lonely_mesh, monkeypatch):
    """On tensors without data, of which no value can be read."""
    batches = FlashCPCollator(cp_size)(make_documents([40, 3, 17])), flattened(cp_size)
    config = FAMILIES[family] if family in FAMILIES else tiny_copy(default_config(family))
    mesh = lonely_mesh(cp_size)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: False)  # it does not know meta tensors
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    monkeypatch.setattr(transfer, "waiting_for", lambda *args: contextlib.nullcontext())  # it records an event
    with fake_cuda():
        with FAKE:
            model = AutoModelForCausalLM.from_config(config, attn_implementation="flashcp").train()
        handle = attach(model, mesh, plugin=FlashCPPlugin(cp_size=cp_size, kernel="eager"))
        handle._checked = handle._loss_checked = True  # as after the first forward
        kinds = (False,) if torch.version.cuda else (False, True)  # a fake CUDA tensor cannot stand in for logits
        for planned, skip_logits in itertools.product(batches, kinds):
            with Waits() as waits:
                output = model(**on_fake_device(planned), skip_logits=skip_logits)
            assert not waits.places and output.loss.device.type == FAKE.type
            assert (output.logits is None) == skip_logits


@pytest.mark.parametrize(
    "cp_size, extra",
    [(1, {}), (2, {}), (2, {"attention_mask": True}), (1, {"position_ids": None}), (2, {"position_ids": None})],
    ids=str,
)
def test_planned_batches_are_sharded_without_values(cp_size, extra):
    batch = flattened(cp_size, with_mask="attention_mask" in extra)
    if "position_ids" in extra:
        del batch["position_ids"]
    with fake_cuda(), Waits() as waits:
        part = shard_inputs(on_fake_device(batch), FakeMesh(cp_size))
    assert not waits.places
    assert part["input_ids"].device.type == FAKE.type and isinstance(part["flashcp_plan"], RankPlan)


class FakeMesh:
    ndim, mesh_dim_names = 1, None

    def __init__(self, size):
        self._size = size

    def get_group(self):
        return self

    def size(self):
        return self._size

    def rank(self):
        return 0


def on_fake_device(batch):
    return {
        key: torch.empty(value.shape, dtype=value.dtype, device=FAKE) if isinstance(value, torch.Tensor) else value
        for key, value in batch.items()
    }


def flattened(cp_size, with_mask=False):
    """Return a batch of a collator of transformers, with the plan that trainers add."""
    flatten = DataCollatorWithFlattening(return_flash_attn_kwargs=True)

    def collate(features):
        batch = flatten(features)
        return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])} if with_mask else batch

    return PlannedBatches(collate, PlanSettings(cp_size))(make_documents([40, 3, 17], prompt=0.3))


@pytest.mark.parametrize("cp_size", [1, 2])
def test_what_is_added_to_a_planned_batch_is_checked(cp_size):
    batch = flattened(cp_size)
    with pytest.raises(BatchError, match="masks 1 of 60 tokens"):
        shard_inputs({**batch, "attention_mask": torch.arange(60)[None].clamp(max=1)}, FakeMesh(cp_size))
    unlabelled = PlannedBatches(lambda features: features, PlanSettings(cp_size))(
        {"input_ids": IDS, "shift_labels": IDS, "position_ids": IDS % 4}
    )
    del unlabelled["shift_labels"]
    with pytest.raises(BatchError, match="labels at token 4"):
        shard_inputs({**unlabelled, "labels": IDS}, FakeMesh(cp_size))


@pytest.mark.parametrize("cp_size", [1, 2])
def test_planned_batches_are_sharded_as_others(cp_size):
    planned = flattened(cp_size)
    plain = {key: value for key, value in planned.items() if key != "flashcp_plan"}
    ours, theirs = (shard_inputs(batch, FakeMesh(cp_size)) for batch in (planned, plain))
    assert planned["flashcp_plan"].content_digest == theirs["flashcp_plan"].plan.content_digest
    assert ours["flashcp_plan"].plan == theirs["flashcp_plan"].plan and ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert not isinstance(value, torch.Tensor) or torch.equal(value, theirs[key])


IDS = torch.arange(8)[None]


@pytest.mark.parametrize(
    "batch, error, message",
    [
        ({"input_ids": IDS, "labels": IDS, "attention_mask": (IDS > 1).long()}, BatchError, "masks 2 of 8 tokens"),
        ({"input_ids": IDS, "labels": IDS, "position_ids": IDS % 4}, BatchError, "labels at token 4"),
        ({"input_ids": IDS[:, :1], "labels": IDS[:, :1]}, PlanError, "1 tokens for cp_size 2"),
    ],
)
def test_a_batch_that_cannot_be_sharded_raises_its_error_in_the_forward(batch, error, message):
    planned = PlannedBatches(dict, PlanSettings(2))(batch)
    assert "flashcp_plan" not in planned
    with pytest.raises(error, match=message):
        shard_inputs(planned, FakeMesh(2))


@pytest.mark.parametrize(
    "cp_size, batch, has_plan",
    [
        (2, {"input_ids": IDS, "labels": IDS}, True),
        (2, {"input_ids": IDS, "shift_labels": IDS}, True),
        (2, {"input_ids": IDS}, False),  # a forward in evaluation mode does not shard it
        (1, {"input_ids": IDS, "labels": IDS, "attention_mask": torch.ones_like(IDS)}, False),  # nor this
        (2, {"input_ids": IDS, "labels": IDS, "attention_mask": torch.ones_like(IDS)}, True),
    ],
)
def test_which_batches_get_a_plan(cp_size, batch, has_plan):
    collate = pickle.loads(pickle.dumps(PlannedBatches(dict, PlanSettings(cp_size))))
    planned = collate(batch)
    assert ("flashcp_plan" in planned) is has_plan and collate(planned).keys() == planned.keys()


def test_collators_without_batches_are_left_alone():
    assert PlannedBatches(list, PlanSettings(2))([1, 2]) == [1, 2]


def test_index_maps_are_on_their_way_before_ranks_compare_the_batch(pool):
    """From the second forward on, when the windows of the layers are known."""
    for first, *later in pool.run(2, wait_cases.layouts_on_device_while_ranks_wait, "gemma3"):
        assert first == set() and later == [{None, 8}] * 2


def test_a_rank_writes_its_values_before_it_works_meanwhile(pool):
    assert all(pool.run(2, wait_cases.others_go_on_meanwhile))


@pytest.mark.parametrize(
    "options, training, evaluation",
    [
        ({"trainer": "own"}, (True, "PlannedBatches"), (True, "PlannedBatches")),
        ({"trainer": "own", "pin_memory": False}, (False, "PlannedBatches"), (False, "PlannedBatches")),
        ({"trainer": "generating"}, (True, "PlannedBatches"), (True, "RemoveColumnsCollator")),
    ],
    ids=str,
)
def test_loaders_of_trainers(pool, options, training, evaluation):
    assert pool.run(1, wait_cases.loaders, options) == [[training, evaluation]]


def test_uploads_to_cuda_start_from_pinned_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    tensor, device = Mock(), torch.device("cuda")
    upload(tensor, device)
    assert tensor.mock_calls == [call.pin_memory(), call.pin_memory().to(device, non_blocking=True)]
