"""Any input gives a valid result or one of our errors.

`python -m tests.fuzz` searches for counterexamples by coverage; here each property gets a few examples.
"""

import contextlib
import dataclasses
import json
import os
import random
import tempfile
import warnings
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_flashcp import FlashCPCollator, FlashCPPlugin, ShardPlan
from hf_flashcp.data.features import TOKEN_COLUMNS
from hf_flashcp.errors import FlashCPError, PlanError, UnmetCapWarning
from hf_flashcp.planning import STRATEGIES, HardwareProfile, PlanSettings, plan_documents
from hf_flashcp.predict.training_setup import TrainingSetup
from hf_flashcp.simulation.sizing import choices
from tests.fuzz.__main__ import TARGETS, target
from tests.fuzz.command_lines import FILES, command_lines, file_contents, no_constant, run
from tests.fuzz.values import (
    CONFIG,
    H100,
    changed,
    collator_options,
    cp_sizes,
    environments,
    features,
    json_values,
    lengths,
    mostly,
    optional,
    plan_dicts,
    planner_options,
    setups,
    sizes,
)
from tests.independent_plan_checker import assert_caps, check_plan


@pytest.mark.parametrize("name", TARGETS)
def test_targets_take_bytes(name):
    taken = [target(name)(random.Random(seed).randbytes(1024)) for seed in range(5)]
    assert any(taken)


LARGEST_CHECKED = 200_000
"""Largest number of tokens for which plans are checked token by token."""


@settings(max_examples=200)
@given(
    mostly(
        plan_dicts(),
        json_values | st.dictionaries(st.sampled_from(["lengths", "cp_size", "slices", "offset_groups"]), json_values),
        one_in=4,
    )
)
def test_plan_json(data):
    """JSON that is read as a plan is a valid one: a partition with correct counts, which is written as it was read."""
    try:
        found = ShardPlan.from_dict(data)
    except PlanError:
        return
    written = json.loads(json.dumps(found.to_dict()))
    again = ShardPlan.from_dict(written)
    assert again == found and again.digest == found.digest and again.to_dict() == written
    is_sound(found, list(data["lengths"]), data["cp_size"])


def is_sound(plan, lengths, cp_size):
    assert plan.validate() is plan and plan.lengths == tuple(lengths) and plan.cp_size == cp_size
    counted = plan.report()
    if plan.num_tokens > LARGEST_CHECKED:
        return None
    counts = check_plan(lengths, int(cp_size), plan.slices)
    for name, key in (("tokens", "tokens"), ("pairs", "pairs"), ("kv_received", "received"), ("kv_sent", "sent")):
        assert counted[name] == counts[key].tolist(), name
    return counts


@settings(max_examples=60)
@given(lengths, cp_sizes, planner_options())
def test_planner(lengths, cp_size, options):
    """Plans partition the documents, and keep to the caps or warn that they do not."""
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            plan = plan_documents(lengths, cp_size, **options)
    except PlanError:
        return
    assert all(warning.category is UnmetCapWarning for warning in said), said
    counts = is_sound(plan, lengths, cp_size)
    if (stages := options.get("num_stages")) is not None:
        assert len(plan.offset_groups or [0]) <= stages
    if counts is not None and options["strategy"] in ("search", "flashcp"):
        assert_caps(counts, options.get("max_token_imbalance", 1.0))
        allowed = options.get("max_imbalance", 1.05) * counts["pairs"].mean()
        assert said or counts["pairs"].max() <= allowed + 1e-6 * counts["pairs"].mean()


PLAN_OPTIONS = {field.name for field in dataclasses.fields(PlanSettings)}


@settings(max_examples=60)
@given(
    mostly(
        st.lists(mostly(features(), one_in=60), min_size=1, max_size=4),
        st.lists(json_values) | st.dictionaries(st.text(), json_values) | st.text(),
        one_in=60,
    ),
    mostly(st.integers(1, 4)),
    collator_options,
)
def test_collator(features, cp_size, options):
    """A batch has the given documents, token by token, and its plan shards them."""
    try:
        settings = PlanSettings(cp_size, **{name: options[name] for name in PLAN_OPTIONS & options.keys()})
        others = {name: value for name, value in options.items() if name not in PLAN_OPTIONS}
        batch = FlashCPCollator(settings=settings, **others)(features)
    except FlashCPError:
        return
    ids, labels, positions, lengths = [], [], [], []
    for feature in features:
        row = {key: list(value) for key, value in feature.items() if key in TOKEN_COLUMNS and value is not None}
        count = len(row["input_ids"])
        kept = np.logical_and(row.get("completion_mask", [1] * count), row.get("assistant_masks", [1] * count))
        starts = (
            {0}
            if "position_ids" not in row
            else {0}
            | {token for token in range(1, count) if row["position_ids"][token] != row["position_ids"][token - 1] + 1}
        )
        if feature.get("seq_lengths") is not None:
            starts = {0, *accumulate(map(int, feature["seq_lengths"]))} - {count}
        documents = [stop - start for start, stop in pairwise([*sorted(starts), count])]
        lengths += documents
        ids += row["input_ids"]
        labels += [
            label if keep and token not in starts else -100
            for token, (label, keep) in enumerate(zip(row.get("labels", row["input_ids"]), kept))
        ]
        positions += row.get("position_ids", [position for document in documents for position in range(document)])
    rows = len(ids)
    if padding := -rows % (options.get("pad_to_multiple_of") or 1):
        ids += [options.get("pad_token_id", 0)] * padding
        labels += [-100] * padding
        positions += range(padding)
        lengths.append(padding)
    assert batch["input_ids"].tolist() == [ids]
    assert batch["labels"].tolist() == [labels] and batch["shift_labels"].tolist() == [[*labels[1:], -100]]
    assert {batch[key].dtype for key in ("input_ids", "labels", "shift_labels")} == {torch.int64}
    if options.get("return_position_ids", True):
        assert batch["position_ids"].tolist() == [positions]
    for key in options.get("per_token_keys", ()):
        values = [value for feature in features for value in feature[key]]
        assert batch[key].tolist() == [[*map(float, values), *[0] * padding]]
    plan = batch["flashcp_plan"]
    assert sum(plan.row_lengths) == rows
    is_sound(plan, lengths, cp_size)


@settings(max_examples=100)
@given(st.data())
def test_config(data):
    """Configs of models, hardware, training and parallelism give finite numbers, or an error that names the wrong
    entry."""
    config = data.draw(mostly(changed(CONFIG), st.dictionaries(st.sampled_from(sorted(CONFIG)), json_values)))
    profile = data.draw(mostly(st.just(H100), json_values | changed(H100), one_in=3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numbers that floats cannot hold
        with contextlib.suppress(FlashCPError):
            hardware, setup = HardwareProfile.from_dict(profile), TrainingSetup(**data.draw(setups))
            for choice in choices(config, hardware, setup, [500, 20]):
                json.dumps(choice.to_dict(), allow_nan=False)
    options = data.draw(
        optional(**dict.fromkeys(("cp_size", "tp_size", "sp_size", "dp_shard_size", "dp_replicate_size"), sizes))
    )
    with environment(data.draw(environments)), contextlib.suppress(FlashCPError):
        plugin = FlashCPPlugin(**options)
        assert plugin.strategy in STRATEGIES and plugin.cp_size >= 1 and not plugin.cp_enabled


@contextlib.contextmanager
def environment(values):
    os.environ.update(values)
    try:
        yield
    finally:
        for name in values:
            os.environ.pop(name)


@settings(max_examples=60)
@given(command_lines(), file_contents())
def test_command_line(line, contents):
    """A command prints its result, or one line about an error and leaves no file behind."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        for name, content in contents.items():
            Path(folder, name).write_bytes(content)
        os.chdir(folder)
        try:
            code, out, err = run(*line)
            new = set(os.listdir()) - {*FILES}
            assert all(Path(name).stat().st_size for name in new)
        finally:
            os.chdir(before)
    assert code in (0, 2)
    if code == 0:
        assert out and (not err or err.startswith("plot written to "))
        if "--json" in line:
            json.loads(out, parse_constant=no_constant)
    elif err.startswith("usage: "):
        assert not out and not new and err.count("error: ") == 1
    else:
        *said, wrong = err.splitlines()
        assert wrong.startswith("error: ")
        # An estimate is printed and drawn before the error that nothing fits.
        assert "does not fit on" in wrong or not (said or out or new)
