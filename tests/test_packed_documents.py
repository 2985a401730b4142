"""Datasets of packed rows: their contents, the rows they refuse, and training on them."""

import logging

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from hf_flashcp import FlashCPCollator, PackedDocuments, PackedDocumentStream
from hf_flashcp.errors import BatchError, ConfigurationError, PlanError
from tests import packing_cases
from tests.models import with_skipped_positions
from tests.packing_cases import documents, iterable, numbered
from tests.test_resume import resumes


LENGTHS = [7, 30, 2, 12, 19, 1, 25, 3, 3, 16, 9, 40, 8, 22, 5, 11]


def tokens_of(rows):
    return sorted(token for row in rows for token in row["input_ids"])


@pytest.mark.parametrize("as_dataset", [list, datasets.Dataset.from_list], ids=["list", "datasets"])
def test_rows_hold_the_documents_with_their_columns(as_dataset):
    rows = documents(LENGTHS, weights=True, completion_mask=True)
    packed = PackedDocuments(as_dataset(rows), 48, per_token_keys=["weights"], cp_size=2)
    by_first_token = {row["input_ids"][0]: row for row in rows}
    seen = 0
    for row in packed:
        assert set(row) == {"input_ids", "labels", "weights", "seq_lengths"}
        start = 0
        for length in row["seq_lengths"]:
            part = {key: row[key][start : start + length] for key in ("input_ids", "labels", "weights")}
            document = by_first_token[part["input_ids"][0]]
            assert part["input_ids"] == document["input_ids"] and part["weights"] == document["weights"]
            mask = zip(document["input_ids"], document["completion_mask"])
            assert part["labels"] == [token if kept else -100 for token, kept in mask]
            start, seen = start + length, seen + 1
        assert start == len(row["input_ids"]) <= 48
        assert FlashCPCollator(2, per_token_keys=["weights"])([row])["flashcp_plan"].lengths == tuple(
            row["seq_lengths"]
        )
    assert seen == len(LENGTHS)


@pytest.mark.parametrize("make", [PackedDocuments, PackedDocumentStream])
def test_positions_that_skip_stay_with_their_tokens(make):
    """seq_lengths marks such a row as one document; pieces of it keep their positions too."""
    rows = with_skipped_positions(documents(LENGTHS))
    position_of = {token: p for row in rows for token, p in zip(row["input_ids"], row["position_ids"])}
    packs = list(make(rows, 32, overlong="split", cp_size=2))
    assert tokens_of(packs) == tokens_of(rows)
    for pack in packs:
        batch = FlashCPCollator(2)([pack])
        assert batch["position_ids"].tolist() == [[position_of[token] for token in pack["input_ids"]]]
        assert batch["flashcp_plan"].lengths == tuple(pack["seq_lengths"])
    without = [{key: row[key] for key in ("input_ids", "position_ids")} for row in rows]
    with pytest.raises(BatchError, match="if its position_ids skip numbers, give its length as seq_lengths"):
        list(make(without, 32, overlong="split", cp_size=2))


def test_epochs_differ_and_are_reproducible():
    def make(seed=0, epoch=0):
        packed = PackedDocuments(documents(LENGTHS * 4), 48, dp_size=2, seed=seed)
        packed.set_epoch(epoch)
        return list(packed)

    first, second = make(), make(epoch=1)
    assert first != second and tokens_of(first) == tokens_of(second) and len(first) == len(second)
    packed = PackedDocuments(documents(LENGTHS * 4), 48, dp_size=2)
    assert list(packed) == first and len(packed) == len(first)
    packed.set_epoch(1)
    assert list(packed) == second == make(epoch=1) and make(seed=1) != first


def test_persistent_workers_follow_the_epoch():
    packed = PackedDocuments(documents(LENGTHS), 48)
    loader = DataLoader(packed, batch_size=None, num_workers=1, persistent_workers=True)
    for epoch in (0, 1):
        packed.set_epoch(epoch)
        assert [row["input_ids"] for row in loader] == [row["input_ids"] for row in packed]


@settings(max_examples=40)
@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=60),
    st.sampled_from(["truncate", "split", "drop"]),
    st.sampled_from([{}, {"dp_size": 2, "gradient_accumulation_steps": 2}, {"dp_size": 3, "cp_size": 3}]),
    st.sampled_from(["balanced", "best_fit"]),
)
def test_a_stream_loses_nothing(lengths, overlong, sizes, method):
    options = {"overlong": overlong, "method": method, "look_ahead": 2, **sizes}
    rows = documents(lengths)
    stream = PackedDocumentStream(iterable(rows), 40, bad_rows="skip", **options)
    packs = list(stream)
    report = stream.report()
    assert all(sizes.get("cp_size", 1) <= sum(pack["seq_lengths"]) == len(pack["input_ids"]) <= 40 for pack in packs)
    expected = [row["input_ids"][: 40 if overlong == "truncate" else None] for row in rows]
    expected = sorted(token for ids in expected if overlong != "drop" or len(ids) <= 40 for token in ids)
    found = tokens_of(packs)
    assert set(found) <= set(expected) and len(found) == len(set(found))
    # Fewer tokens than cp_size may remain at the end.
    assert len(expected) - len(found) < sizes.get("cp_size", 1)
    assert report["rows_skipped"] == lengths.count(0) and report["documents_in"] == len(lengths) - lengths.count(0)
    assert report["documents_in"] == report["documents_packed"] + report["documents_dropped"]
    assert report["tokens_in"] == sum(report[f"tokens_{name}"] for name in ("packed", "truncated", "dropped"))
    assert report["tokens_packed"] == len(found) and report["tokens_waiting"] == 0
    assert report["packs"] == len(packs)


def test_a_stream_resumes_where_it_stopped():
    def make():
        return PackedDocumentStream(iterable(documents(LENGTHS * 4)), 48, dp_size=2)

    stream = make()
    rows = iter(stream)
    before = [next(rows) for _ in range(5)]
    state = stream.state_dict()
    assert state == {"epoch": 0, "packs": 5}
    resumed = make()
    resumed.load_state_dict(state)
    after = list(resumed)
    assert before + after == list(make()) and after == list(rows)
    assert list(resumed) == before + after  # the next pass is complete


def test_a_stream_holds_a_few_steps():
    """A stream is read only as packs are requested."""
    read = []
    source = numbered(documents([10] * 1000), read)
    stream = iter(PackedDocumentStream(source, 40, dp_size=2, look_ahead=2))
    next(stream)
    assert len(read) < 20
    assert [next(stream)["seq_lengths"] for _ in range(9)] == [[10] * 4] * 9
    assert len(read) < 60


BAD = {
    "no tokens": {"input_ids": []},
    "no column": {"text": "abc"},
    "None": {"input_ids": None},
    "too few labels": {"input_ids": [1, 2, 3], "labels": [1, 2]},
    "packed already": {"input_ids": [1, 2, 3], "seq_lengths": [1, 2]},
    "padded": {"input_ids": [1, 2, 3], "attention_mask": [1, 1, 0]},
    "no row": "corrupt",
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_bad_rows_are_errors_or_are_counted(bad, caplog):
    rows = [*documents([10, 20]), bad, *documents([10])]
    for make in (lambda **options: PackedDocuments(rows, 32, **options), _stream_of(rows)):
        with pytest.raises(BatchError, match="2"):
            list(make())
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            packed = make(bad_rows="skip")
            assert len(tokens_of(packed)) == 40
        assert packed.report()["rows_skipped"] == 1 and "Skipped: " in caplog.text


def _stream_of(rows):
    return lambda **options: PackedDocumentStream(iterable(rows), 32, **options)


def test_bad_rows_of_a_datasets_dataset(caplog):
    rows = [
        {"input_ids": [1, 2, 3], "labels": None},
        {"input_ids": [], "labels": None},
        {"input_ids": [1, 2], "labels": [1]},
        {"input_ids": None, "labels": [1]},
    ]
    dataset = datasets.Dataset.from_list(rows)
    with pytest.raises(BatchError, match="Feature 1 has no tokens"):
        len(PackedDocuments(dataset, 8))
    packed = PackedDocuments(dataset, 8, bad_rows="skip")
    assert [row["input_ids"] for row in packed] == [[1, 2, 3]] and packed.report()["rows_skipped"] == 3
    with pytest.raises(BatchError, match="The dataset has no column input_ids"):
        len(PackedDocuments(datasets.Dataset.from_dict({"text": ["a"]}), 8))
    with pytest.raises(BatchError, match="The dataset has no column weights"):
        len(PackedDocuments(dataset.select([0]), 8, per_token_keys=["weights"]))


def test_an_overlong_row_is_named():
    for packed in (PackedDocuments(documents([5, 50]), 40), PackedDocumentStream(iterable(documents([5, 50])), 40)):
        with pytest.raises(PlanError, match="Document 1 has 50 tokens"):
            list(packed)


def test_a_stream_that_fails_says_where():
    def shards():
        yield from [{"input_ids": [1, 2, 3]}] * 3
        raise OSError("truncated file")

    with pytest.raises(BatchError, match="failed after 3 rows with OSError: truncated file") as raised:
        list(PackedDocumentStream(datasets.IterableDataset.from_generator(shards), window=64))
    assert isinstance(raised.value.__cause__, OSError)


def test_options_that_do_not_fit():
    with pytest.raises(BatchError, match="bad_rows is 'ignore'"):
        PackedDocuments([], 8, bad_rows="ignore")
    with pytest.raises(PlanError, match="too small for cp_size 8"):
        PackedDocuments([], 8, cp_size=8)
    with pytest.raises(ConfigurationError, match="The packs are made for dp_size 2, but the run has 4"):
        PackedDocuments(documents([5]), 8, dp_size=2).for_run(dp_size=4)
    stream = PackedDocumentStream(iterable(documents([5])), 8)
    with pytest.raises(ConfigurationError, match="2 loader workers would each read the whole stream"):
        list(DataLoader(stream, batch_size=None, num_workers=2))


@pytest.mark.parametrize("stream", [False, True], ids=["map", "stream"])
def test_trainer_reads_steps_in_order(pool, stream):
    """dp 2 x cp 2 with two micro-steps: the rows of each group, the logs, and two epochs."""
    results = pool.run(4, packing_cases.trained_rows, LENGTHS * 3, 48, stream)
    sizes = {"cp_size": 2, "dp_size": 2, "gradient_accumulation_steps": 2}
    expected = packing_cases.packed(LENGTHS * 3, 48, stream, **sizes)
    rows = [row["input_ids"] for row in expected]
    assert len(rows) % 4 == 0 or stream
    for rank, result in enumerate(results):
        group = rank // 2
        wanted = rows[group::2]
        assert result["rows"][: len(wanted)] == wanted[: len(result["rows"])]
        assert result["log"]["flashcp_fill_rate"] == pytest.approx(expected.report()["fill_rate"]) or stream
        assert result["log"]["flashcp_micro_step_imbalance"] >= 1
        if not stream:
            expected_next = packing_cases.packed(LENGTHS * 3, 48, stream, **sizes)
            expected_next.set_epoch(1)
            assert result["rows"][len(wanted) :] == [row["input_ids"] for row in expected_next][group::2]
            assert result["steps"] == 2 * len(rows) // 4
        assert result["refused"] == ["per_device_train_batch_size is 2", "The packs are made for dp_size 3"]


@resumes
@pytest.mark.parametrize("stream", [False, True], ids=["map", "stream"])
def test_resuming_sees_the_same_packs(pool, tmp_path, stream):
    for result in pool.run(1, packing_cases.resumed_rows, LENGTHS * 3, 48, stream, str(tmp_path)):
        assert result["resumed"] == result["rows"][4:] and len(result["rows"]) == 12
