"""Collator and shard_inputs: their inputs, the batch of each rank, and refused batches."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DataCollatorWithFlattening

from hf_flashcp import FlashCPCollator, RankPlan, ShardPlan, plan_documents, shard_inputs
from hf_flashcp.errors import BatchError, ConfigurationError, PlanError
from hf_flashcp.layout import RankLayout
from hf_flashcp.planning import PlanSettings
from tests.packs import arbitrary_plans


pytestmark = pytest.mark.smoke


DOCUMENTS = [{"input_ids": [1, 2, 3, 4]}, {"input_ids": [5, 6]}, {"input_ids": [7, 8, 9]}]


def test_the_batch_equals_the_flattening_collators_plus_targets_and_a_plan():
    options = dict(return_flash_attn_kwargs=True, return_seq_idx=True)
    batch = FlashCPCollator(2, **options)(DOCUMENTS)
    for key, expected in DataCollatorWithFlattening(**options)(DOCUMENTS).items():
        assert torch.equal(torch.as_tensor(batch[key]), torch.as_tensor(expected)), key
    assert batch["shift_labels"].tolist() == [[2, 3, 4, -100, 6, -100, 8, 9, -100]]
    assert batch["flashcp_plan"] == plan_documents([4, 2, 3], 2)


def test_labels_are_kept_and_shifted_before_any_cut():
    features = [{"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4]}, {"input_ids": torch.tensor([5, 6])}]
    features[1]["labels"] = torch.tensor([5, 6])
    batch = FlashCPCollator(2)(features)
    assert batch["labels"].tolist() == [[-100, -100, 3, 4, -100, 6]]
    assert batch["shift_labels"].tolist() == [[-100, 3, 4, -100, 6, -100]]


def test_packed_rows_are_documents_again():
    packed = [{"input_ids": [1, 2, 3, 4, 5, 6], "seq_lengths": [4, 2]}, {"input_ids": [7, 8, 9], "seq_lengths": [3]}]
    ours, expected = FlashCPCollator(2)(packed), FlashCPCollator(2)(DOCUMENTS)
    assert ours.pop("flashcp_plan") == expected.pop("flashcp_plan")
    assert all(torch.equal(ours[key], expected[key]) for key in expected)


def test_position_ids_of_a_packed_row_say_where_documents_begin():
    packed = [{"input_ids": np.arange(1, 7), "position_ids": [0, 1, 2, 3, 0, 1]}, {"input_ids": [7, 8, 9]}]
    ours, expected = FlashCPCollator(2)(packed), FlashCPCollator(2)(DOCUMENTS)
    assert ours.pop("flashcp_plan") == expected.pop("flashcp_plan")
    assert all(torch.equal(ours[key], expected[key]) for key in expected)
    later_part = [{"input_ids": [1, 2, 3, 4], "position_ids": [9, 10, 0, 1]}]
    batch = FlashCPCollator(2)(later_part)
    assert batch["flashcp_plan"].lengths == (2, 2) and batch["position_ids"].tolist() == [[9, 10, 0, 1]]


@given(st.data())
def test_positions_are_unchanged_if_lengths_are_given(data):
    """With seq_lengths, cu_seq_lens_q or a plan, positions may start anywhere, skip, repeat or decrease."""
    rows, expected, all_lengths = [], [], []
    for lengths in data.draw(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3), min_size=1, max_size=3)):
        row = {"input_ids": [*range(sum(lengths))], "seq_lengths": lengths}
        if data.draw(st.booleans()):
            numbers = st.lists(st.integers(0, 10**6), min_size=sum(lengths), max_size=sum(lengths))
            row["position_ids"] = data.draw(numbers)
        rows.append(row)
        expected += row.get("position_ids", [t for length in lengths for t in range(length)])
        all_lengths += lengths
    cp_size = data.draw(st.integers(1, min(4, sum(all_lengths))))
    batch = FlashCPCollator(cp_size, return_flash_attn_kwargs=True)(rows)
    without_plan = {key: batch[key] for key in ("input_ids", "position_ids", "cu_seq_lens_q")}
    for each in (batch, without_plan):
        for part in shards(each, cp_size):
            bound = part["flashcp_plan"]
            assert bound.plan.lengths == tuple(all_lengths)
            assert part["position_ids"].tolist() == [[expected[t] for t in bound.layout.token_index.tolist()]]
            assert bound.position_ids.tolist() == expected


def test_masks_leave_targets():
    """The first document has a completion mask, the second assistant masks, the third labels and both masks."""
    features = [
        {"input_ids": [1, 2, 3, 4], "completion_mask": [0, 0, 1, 1], "attention_mask": [1, 1, 1, 1]},
        {"input_ids": [5, 6, 7], "assistant_masks": torch.tensor([0, 1, 0])},
        {
            "input_ids": [1, 2, 3, 4],
            "labels": [1, -100, 3, 4],
            "completion_mask": [1, 1, 0, 1],
            "assistant_masks": [1] * 4,
        },
    ]
    batch = FlashCPCollator(2)(features)
    assert batch["labels"].tolist() == [[-100, -100, 3, 4, -100, 6, -100, -100, -100, -100, 4]]
    packed = {key: features[0][key] + features[0][key] for key in ("input_ids", "completion_mask")}
    batch = FlashCPCollator(2)([{**packed, "seq_lengths": [4, 4]}])
    assert batch["labels"].tolist() == [[-100, -100, 3, 4] * 2]


def test_labels_may_be_missing_in_some_features():
    features = [{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5, 6], "labels": [-100, -100, 6]}]
    for order in (features, features[::-1]):
        labels = [[-100, 2, 3] if "labels" not in feature else [-100, -100, 6] for feature in order]
        assert FlashCPCollator(2)(order)["labels"].tolist() == [labels[0] + labels[1]]


@pytest.mark.parametrize("options", [{}, {"return_seq_idx": True, "return_flash_attn_kwargs": True}])
def test_padding_is_a_document_without_targets(options):
    collator = FlashCPCollator(2, pad_to_multiple_of=8, pad_token_id=99, per_token_keys=["weight"], **options)
    features = [{**document, "weight": [0.5] * len(document["input_ids"])} for document in DOCUMENTS]
    batch = collator(features)
    assert batch["input_ids"].shape == (1, 16) and batch["input_ids"][0, 9:].tolist() == [99] * 7
    assert batch["flashcp_plan"].lengths == (4, 2, 3, 7) and batch["flashcp_plan"].row_lengths == (4, 2, 3)
    assert batch["shift_labels"].tolist() == [[2, 3, 4, -100, 6, -100, 8, 9] + [-100] * 8]
    assert batch["position_ids"][0, 9:].tolist() == [*range(7)]
    assert batch["weight"].tolist() == [[0.5] * 9 + [0.0] * 7]
    if options:
        assert batch["seq_idx"][0, 9:].tolist() == [3] * 7 and batch["cu_seq_lens_q"].tolist() == [0, 4, 6, 9, 16]
    full = FlashCPCollator(2, pad_to_multiple_of=3)(DOCUMENTS)
    assert full["flashcp_plan"].lengths == (4, 2, 3)


def test_per_token_values_are_sharded_too():
    features = [
        {"input_ids": [1, 2, 3, 4, 5, 6], "seq_lengths": [4, 2], "token_type": [10, 20, 30, 40, 50, 60]},
        {"input_ids": [7, 8, 9], "token_type": np.array([70, 80, 90])},
    ]
    batch = FlashCPCollator(2, per_token_keys=("token_type",))(features)
    for part in shards(batch, 2):
        assert torch.equal(part["token_type"], 10 * part["input_ids"])


def test_masks_are_kept_as_columns_on_request():
    features = [
        {"input_ids": [1, 2, 3], "completion_mask": [0, 1, 1]},
        {"input_ids": [4, 5], "completion_mask": [0, 1]},
    ]
    batch = FlashCPCollator(2, per_token_keys=["completion_mask"])(features)
    assert batch["completion_mask"].tolist() == [[0, 1, 1, 0, 1]]
    assert batch["labels"].tolist() == [[-100, 2, 3, -100, 5]]


def test_integral_floats_are_accepted():
    features = [{"input_ids": np.array([1.0, 2.0, 3.0]), "attention_mask": torch.ones(3)}]
    batch = FlashCPCollator(2)(features)
    assert batch["input_ids"].tolist() == [[1, 2, 3]] and batch["input_ids"].dtype == torch.int64


def test_the_collator_is_stateless_and_survives_a_spawned_worker():
    collator = pickle.loads(pickle.dumps(FlashCPCollator(settings=PlanSettings(2, "per_seq"))))
    assert collator(DOCUMENTS)["flashcp_plan"] == plan_documents([4, 2, 3], 2, strategy="per_seq")
    loader = torch.utils.data.DataLoader(
        DOCUMENTS, batch_size=3, collate_fn=collator, num_workers=1, multiprocessing_context="spawn"
    )
    (batch,) = loader
    assert batch["flashcp_plan"].digest == plan_documents([4, 2, 3], 2, strategy="per_seq").digest


@pytest.mark.parametrize(
    "features, error, message",
    [
        ([], BatchError, "the collator got no documents"),
        ([{"input_ids": [1]}, {"input_ids": []}], BatchError, "Feature 1 has no tokens"),
        ([{"text": "a"}], BatchError, "Feature 0 has no tokens"),
        ([{"input_ids": [1, 2, 3], "labels": [1, 2]}], BatchError, "Feature 0 has 3 input_ids but 2 labels"),
        ([{"input_ids": [1, 2, 3], "seq_lengths": [1, 1]}], BatchError, "add up to 2, and 3 tokens"),
        ([{"input_ids": [1, 2, 3], "seq_lengths": [3, 0]}], BatchError, "each at least 1"),
        ([{"input_ids": [1]}], PlanError, "1 tokens for cp_size 2"),
        ([{"input_ids": [1, 2], "attention_mask": [1, 0]}], BatchError, "masks 1 of 2 tokens"),
        ([{"input_ids": [1, 2], "attention_mask": [1, 2]}], BatchError, "give the documents' lengths as seq_lengths"),
        ([{"input_ids": [1, 2], "completion_mask": [1]}], BatchError, "2 input_ids but 1 completion_mask"),
        (
            [{"input_ids": [1, 2.5]}],
            BatchError,
            r"Feature 0 has input_ids = \[1, 2.5\], of type list: give a list or array",
        ),
        ([{"input_ids": [1, None]}], BatchError, "a whole number of at most 64 bits"),
        ([{"input_ids": [1, 2**63]}], BatchError, "a whole number of at most 64 bits"),
        ([{"input_ids": [[1, 2], [3]]}], BatchError, "a whole number of at most 64 bits"),
        ([{"input_ids": 5}], BatchError, "of type int: give a list or array"),
        ([{"input_ids": [1, 2], "labels": ["a", "b"]}], BatchError, "labels = .*a whole number"),
        ([{"input_ids": [1, 2], "attention_mask": ["a", "b"]}], BatchError, "attention_mask = .*a whole number"),
        ([{"input_ids": [1, 2], "seq_lengths": 2}], BatchError, "seq_lengths = 2, of type int"),
        ([{"input_ids": torch.ones(2, device="meta")}], BatchError, "of type Tensor"),
        ([[1, 2]], BatchError, "Feature 0 is of type list, not a mapping of columns"),
        ({"input_ids": [[1, 2]]}, BatchError, "Feature 0 is of type str"),
        ([{2: 3, "a": 4}], BatchError, "its columns are 2, a"),
    ],
)
def test_bad_documents_are_named(features, error, message):
    with pytest.raises(error, match=message):
        FlashCPCollator(2)(features)


@pytest.mark.parametrize("arguments, message", [((0,), "cp_size"), (("2",), "cp_size")])
def test_bad_collator_arguments(arguments, message):
    with pytest.raises(PlanError, match=message):
        FlashCPCollator(*arguments)
    with pytest.raises(PlanError, match="Unknown strategy"):
        PlanSettings(2, "zigzag")
    with pytest.raises(BatchError, match="pad_to_multiple_of"):
        FlashCPCollator(2, pad_to_multiple_of=0)
    with pytest.raises(BatchError, match="pad_to_multiple_of must be a positive integer, at most 16,777,216"):
        FlashCPCollator(2, pad_to_multiple_of=2**31)
    with pytest.raises(BatchError, match="pad_token_id must be a token of the vocabulary, got None"):
        FlashCPCollator(2, pad_token_id=None)
    with pytest.raises(BatchError, match="per_token_keys must be a list of names, got 'weight'"):
        FlashCPCollator(2, per_token_keys="weight")
    with pytest.raises(BatchError, match="per_token_keys has labels: every batch has them"):
        FlashCPCollator(2, per_token_keys=["weight", "labels"])
    with pytest.raises(BatchError, match="Feature 0 has no weight, which per_token_keys asks for"):
        FlashCPCollator(2, per_token_keys=["weight"])(DOCUMENTS)
    with pytest.raises(BatchError, match="has weight = .*: give a list or array with a number of at most 64 bits"):
        FlashCPCollator(2, per_token_keys=["weight"])([{"input_ids": [1, 2], "weight": [2**63, 2**63]}])
    with pytest.raises(BatchError, match="return_tensors"):
        FlashCPCollator(2)(DOCUMENTS, return_tensors="np")


class FakeGroup:
    """The part of a process group that sharding a batch needs."""

    def __init__(self, rank, size):
        self.rank, self.size = lambda: rank, lambda: size


class FakeMesh:
    ndim = 1

    def __init__(self, rank, size):
        self.get_group = lambda: FakeGroup(rank, size)


def shards(batch, cp_size, **kwargs):
    return [shard_inputs(batch, FakeMesh(rank, cp_size), **kwargs) for rank in range(cp_size)]


@given(arbitrary_plans())
def test_shards_are_the_row_rearranged(plan):
    row = torch.arange(plan.num_tokens)[None]
    positions = torch.cat([torch.arange(length) for length in plan.lengths])[None]
    batch = {
        "input_ids": row,
        "position_ids": positions,
        "labels": torch.where(positions == 0, -100, row),
        "inputs_embeds": row[..., None].expand(-1, -1, 3).float(),
        "flashcp_plan": plan,
        "temperature": 0.5,
        "image_sizes": torch.zeros(3, 2),
    }
    parts = shards(batch, plan.cp_size)
    targets = torch.cat([batch["labels"][:, 1:], torch.tensor([[-100]])], dim=1)
    for part, slices in zip(parts, plan.slices):
        index = part["input_ids"][0]
        assert index.tolist() == [sum(plan.lengths[:d]) + t for d, start, stop in slices for t in range(start, stop)]
        assert torch.equal(part["position_ids"], positions[:, index])
        assert torch.equal(part["shift_labels"], targets[:, index])
        assert torch.equal(part["inputs_embeds"], batch["inputs_embeds"][:, index])
        assert part["temperature"] == 0.5 and torch.equal(part["image_sizes"], batch["image_sizes"])
        assert float(part["num_items_in_batch"]) * plan.cp_size == pytest.approx(max(int((targets != -100).sum()), 1))
    assert sorted(torch.cat([part["input_ids"][0] for part in parts]).tolist()) == row[0].tolist()


def test_sharding_twice_changes_nothing():
    (once, _) = shards(FlashCPCollator(2)(DOCUMENTS), 2)
    twice = shard_inputs(once, FakeMesh(0, 2))
    assert twice is not once and twice == once
    assert isinstance(once["flashcp_plan"], RankPlan)


def test_the_given_batch_is_not_modified():
    batch = FlashCPCollator(2)(DOCUMENTS)
    keys, plan = set(batch), batch["flashcp_plan"]
    shards(batch, 2)
    assert set(batch) == keys and batch["flashcp_plan"] is plan and batch["input_ids"].shape == (1, 9)


@pytest.mark.parametrize(
    "extra",
    [
        {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2]])},
        {"cu_seq_lens_q": torch.tensor([0, 4, 6, 9], dtype=torch.int32), "max_length_q": 4},
        {"position_ids": torch.tensor([[5, 6, 7, 8, 3, 4, 0, 1, 2]])},
        {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2]]).expand(3, 1, 9)},
    ],
)
def test_documents_are_found_without_a_plan(extra):
    batch = {"input_ids": torch.arange(9)[None], **extra}
    first, second = shards(batch, 2)
    assert first["flashcp_plan"].plan == plan_documents([4, 2, 3], 2)
    assert "cu_seq_lens_q" not in first and "max_length_q" not in first
    if "position_ids" in extra:
        assert torch.equal(first["position_ids"], extra["position_ids"][..., first["input_ids"][0]])
    (by_row, _) = shards(batch, 2, settings=PlanSettings(2, "per_seq"))
    assert by_row["flashcp_plan"].plan == plan_documents([4, 2, 3], 2, strategy="per_seq")


def test_rows_without_padding_become_documents():
    ids = torch.arange(12).view(3, 4)
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    parts = shards(batch, 2)
    assert parts[0]["flashcp_plan"].plan == plan_documents([4, 4, 4], 2)
    for part in parts:
        tokens = part["input_ids"]
        assert tokens.shape[0] == 1 and "attention_mask" not in part
        assert torch.equal(part["position_ids"], tokens % 4)
        assert torch.equal(part["shift_labels"], torch.where(tokens % 4 == 3, -100, tokens + 1))


def test_one_rank_and_no_mesh():
    (part,) = shards(FlashCPCollator(1)(DOCUMENTS), 1)
    alone = shard_inputs(FlashCPCollator(1)(DOCUMENTS), None)
    assert torch.equal(part["input_ids"], alone["input_ids"]) and alone["input_ids"].tolist() == [[*range(1, 10)]]


IDS = torch.arange(9)[None]
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "batch, error, message",
    [
        ({"labels": IDS}, BatchError, "neither input_ids nor inputs_embeds"),
        ({"input_ids": IDS[:, :0]}, BatchError, "neither empty"),
        ({"input_ids": IDS[:0]}, BatchError, "neither empty"),
        ({"input_ids": IDS[0]}, BatchError, "expected"),
        ({"input_ids": IDS, "labels": IDS[:, 1:]}, BatchError, "labels have shape"),
        ({"input_ids": IDS, "shift_labels": IDS[:, 1:]}, BatchError, "shift_labels have shape"),
        ({"input_ids": IDS, "attention_mask": (IDS > 2).long()}, BatchError, "masks 3 of 9 tokens"),
        ({"input_ids": IDS, "attention_mask": torch.zeros(1, 1, 9, 9)}, BatchError, "custom attention_mask"),
        ({"input_ids": IDS, "attention_mask": {"full_attention": None}}, BatchError, "custom attention_mask"),
        ({"input_ids": IDS, "cu_seq_lens_q": torch.tensor([0, 4, 8])}, BatchError, "runs from 0 to 8"),
        ({"input_ids": IDS, "cu_seq_lens_q": torch.tensor([1, 4, 9])}, BatchError, "runs from 1 to 9"),
        ({"input_ids": IDS, "cu_seq_lens_q": torch.tensor([9])}, BatchError, "runs from 9 to 9"),
        ({"input_ids": IDS, "cu_seq_lens_q": torch.tensor([], dtype=torch.int32)}, BatchError, "is empty"),
        ({"input_ids": IDS, "cu_seq_lens_q": torch.tensor([0, 5, 3, 9])}, PlanError, "Document 1 has -2 tokens"),
        ({"input_ids": IDS, "cu_seq_lens_q": torch.tensor([0, 4, 4, 9])}, PlanError, "Document 1 has 0 tokens"),
        ({"input_ids": IDS, "flashcp_plan": plan_documents([8], 2)}, BatchError, "covers 8 tokens"),
        ({"input_ids": IDS, "flashcp_plan": plan_documents([9], 3)}, ConfigurationError, "cp_size 3"),
        ({"input_ids": IDS[:, :1]}, PlanError, "1 tokens for cp_size 2"),
        (
            {"input_ids": IDS, "labels": IDS, "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])},
            BatchError,
            "labels at token 4, the start of a document",
        ),
    ],
)
def test_bad_batches_are_named_on_every_rank(batch, error, message):
    for rank in range(2):
        with pytest.raises(error, match=message):
            shard_inputs(batch, FakeMesh(rank, 2))


def rows_of_parts(layout):
    return [rows.ranges for rows in layout.outputs(CPU).rows]


def test_layout_of_a_named_plan():
    """The first example in rectangles.py: this rank holds [2,4) and [7,10) of twelve tokens."""
    layout = RankLayout(ShardPlan([12], 2, [[(0, 2, 4), (0, 7, 10)], [(0, 0, 2), (0, 4, 7), (0, 10, 12)]]), 0)
    (stage,) = layout.stages(CPU)
    assert layout.token_index.tolist() == [2, 3, 7, 8, 9]
    assert layout.local == ((0, 5, 0, 5),)
    assert stage.rectangles == ((0, 2, 0, 2), (2, 5, 0, 5))
    assert layout.send_rows(CPU).ranges == ((0, 5),)
    assert (stage.send_splits, stage.recv_splits) == ([0, 5], [0, 5])
    assert stage.key_order is None and rows_of_parts(layout) == [((0, 5),), ((0, 5),)]


def test_layout_joins_slices_that_need_the_same_prefix():
    joined = ShardPlan([6], 2, [[(0, 2, 3), (0, 4, 5)], [(0, 0, 2), (0, 3, 4), (0, 5, 6)]])
    (stage,) = RankLayout(joined, 0).stages(CPU)
    assert stage.rectangles == ((0, 1, 0, 2), (1, 2, 0, 3))
    two_documents = ShardPlan([4, 4], 2, [[(0, 2, 4), (1, 0, 1), (1, 2, 3)], [(0, 0, 2), (1, 1, 2), (1, 3, 4)]])
    layout = RankLayout(two_documents, 0)
    (stage,) = layout.stages(CPU)
    assert stage.rectangles == ((0, 2, 0, 2), (3, 4, 2, 3))
    assert rows_of_parts(layout) == [((0, 4),), ((0, 2), (3, 4))]


def test_layout_reorders_keys_only_if_a_slice_needs_several_ranges():
    """Rank 1 sends tokens 2..5, rank 2 sends tokens 0, 1 and 7. The slice [8,9) needs all of them, [6,7) all but 7."""
    plan = ShardPlan([12], 3, [[(0, 6, 7), (0, 8, 9)], [(0, 2, 6), (0, 9, 12)], [(0, 0, 2), (0, 7, 8)]])
    (stage,) = RankLayout(plan, 0).stages(CPU)
    assert stage.recv_splits == [0, 4, 3]
    assert stage.key_order is None and stage.rectangles == ((0, 1, 0, 6), (1, 2, 0, 7))
    # The same with ranks 1 and 2 swapped: 7 lies between 0, 1 and 2..5, and [6,7) must not see it.
    plan = ShardPlan([12], 3, [[(0, 6, 7), (0, 8, 9)], [(0, 0, 2), (0, 7, 8)], [(0, 2, 6), (0, 9, 12)]])
    (stage,) = RankLayout(plan, 0).stages(CPU)
    assert stage.recv_splits == [0, 3, 4]
    assert stage.key_order.ranges == ((0, 2), (3, 7), (2, 3))
    assert stage.rectangles == ((0, 1, 0, 6), (1, 2, 0, 7))
    staged = RankLayout(plan.with_offset_groups([[1], [2]]), 0).stages(CPU)
    assert [stage.recv_splits for stage in staged] == [[0, 0, 4], [0, 3, 0]]
    assert [stage.key_order for stage in staged] == [None, None]
    assert [stage.rectangles for stage in staged] == [((0, 2, 0, 4),), ((0, 1, 0, 2), (1, 2, 0, 3))]


def test_window_layout_of_a_named_plan():
    """The second example in rectangles.py: this rank holds [6,13) of thirteen tokens, and the sliding window is 4."""
    layout = RankLayout(ShardPlan([13], 2, [[(0, 6, 13)], [(0, 0, 6)]]), 0, 4)
    (stage,) = layout.stages(CPU)
    assert layout.local == ((3, 7, 0, 7),) and rows_of_parts(layout) == [((3, 7),), ((0, 3),)]
    assert stage.recv_splits == [0, 3] and stage.send_splits == [0, 0]
    assert stage.local_rows.ranges == ((0, 3),) and stage.key_order.ranges == ((0, 6),)
    assert stage.causal and stage.rectangles == ((0, 3, 0, 6),)


def test_overlapping_bands_share_received_keys():
    """With slices [4,5) and [7,8) and window 5, keys 3 and 4 of [0,8) lie in both bands, and 3 is sent once."""
    layout = RankLayout(ShardPlan([8], 2, [[(0, 4, 5), (0, 7, 8)], [(0, 0, 4), (0, 5, 7)]]), 0, 5)
    (stage,) = layout.stages(CPU)
    assert stage.recv_splits == [0, 6] and stage.local_rows.ranges == ((0, 2),)
    assert stage.key_order.index.tolist() == [0, 1, 2, 3, 6, 3, 6, 4, 5, 7]
    assert [rows.count for rows in stage.gradients.rows] == [5, 5]
    assert stage.rectangles == ((0, 1, 0, 5), (1, 2, 5, 10)) and layout.local == ()
