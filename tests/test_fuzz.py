"""Whatever comes in, a sound result or one of our errors comes out. `python -m tests.fuzz` feeds these properties by
coverage; here each gets a few examples."""

import argparse
import contextlib
import copy
import functools
import io
import json
import os
import tempfile
import warnings
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_flashcp import FlashCPCollator, FlashCPPlugin, ShardPlan
from hf_flashcp.cli import estimate, main, plan, report, simulate
from hf_flashcp.data.features import TOKEN_COLUMNS
from hf_flashcp.errors import FlashCPError, PlanError, UnmetCapWarning
from hf_flashcp.planning import HARDWARE, STRATEGIES, CostModel, HardwareProfile, plan_documents
from hf_flashcp.planning.fit import choices
from hf_flashcp.planning.hardware_profile import _loaded
from hf_flashcp.planning.memory import TrainingSetup
from hf_flashcp.planning.model_shape import LLAMA_3_8B
from tests.independent_plan_checker import assert_caps, check_plan
from tests.packs import arbitrary_plans


ROOT = Path(__file__).parent.parent
H100 = json.loads((ROOT / "hf_flashcp" / "planning" / "hardware" / "h100.json").read_text(encoding="utf-8"))
CONFIG = {
    **LLAMA_3_8B,
    "model_type": "qwen3_moe",
    "head_dim": 64,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "sliding_window": 128,
    "use_sliding_window": True,
    "layer_types": ["full_attention", "sliding_attention"],
    "tie_word_embeddings": False,
    "final_logit_softcapping": 30.0,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}
LARGEST_CHECKED = 200_000
"""Tokens up to which plans are checked token by token."""

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.sampled_from([2**31, 10**30]),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=3), values, max_size=3),
    max_leaves=6,
)


@st.composite
def mostly(draw, usual, junk=json_values, *, one_in=16):
    """Of the first strategy, now and then of the second."""
    return draw(junk if draw(st.integers(1, one_in)) == one_in else usual)


near_misses = st.integers(0, 64) | st.sampled_from([None, 0, 1, 0.5, 2.0, 2**24, 1e30, True, False])


@st.composite
def changed(draw, original):
    """JSON in which one or two values have become something else."""
    value = copy.deepcopy(original)
    for _ in range(draw(st.integers(1, 2))):
        place = value
        while True:
            key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
            if not isinstance(place[key], (dict, list)) or not place[key] or not draw(st.integers(0, 3)):
                break
            place = place[key]
        place[key] = draw(mostly(near_misses, one_in=3))
    return value


@st.composite
def spoiled(draw, lists, junk=json_values):
    """Now and then with one of its entries replaced."""
    values = list(draw(lists))
    if values and draw(st.integers(1, 40)) == 40:
        values[draw(st.integers(0, len(values) - 1))] = draw(junk)
    return values


# -- plans from JSON ----------------------------------------------------------------------------------------------


@st.composite
def plan_dicts(draw):
    found = draw(arbitrary_plans()).to_dict()
    offsets = draw(st.permutations(range(1, found["cp_size"])))
    cuts = draw(st.lists(st.integers(0, len(offsets)), max_size=3).map(sorted))
    groups = [offsets[start:stop] for start, stop in pairwise([0, *cuts, len(offsets)]) if start < stop]
    found["offset_groups"] = draw(st.sampled_from([None, groups]))
    return draw(mostly(changed(found), st.just(found), one_in=4))


@settings(max_examples=200)
@given(
    mostly(
        plan_dicts(),
        json_values | st.dictionaries(st.sampled_from(["lengths", "cp_size", "slices", "offset_groups"]), json_values),
        one_in=4,
    )
)
def test_plan_json(data):
    """What is read as a plan is one: it partitions the documents, is counted alike, and is written as it was read."""
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


# -- the planner ---------------------------------------------------------------------------------------------------

lengths = spoiled(
    st.lists(st.integers(1, 60), max_size=12) | st.lists(st.integers(1, 5000), max_size=8),
    st.integers(-1, 2**31) | st.just(2**31 - 1) | st.just(np.int64(7)) | json_values,
)
cp_sizes = mostly(st.integers(1, 9), st.integers(-1, 200) | json_values)
caps = mostly(
    st.sampled_from([1.0, 1.05, 2.0]) | st.floats(1, 4),
    st.floats() | st.just(10**400) | json_values,
)
cost_models = st.builds(
    CostModel.from_config,
    st.sampled_from([LLAMA_3_8B, CONFIG, {**CONFIG, "kv_lora_rank": None, "layer_types": ["linear_attention"]}]),
    st.sampled_from(HARDWARE),
    itemsize=st.sampled_from([2, 4]),
)


def optional(**strategies):
    return st.fixed_dictionaries({}, optional=strategies)


OWN = {"per_doc": ["rotate_ranks"], "search": ["minimize_total", "cost_model"]}
"""Options that only one strategy has."""


@st.composite
def planner_options(draw):
    strategy = draw(mostly(st.sampled_from(STRATEGIES)))
    options = {
        "max_imbalance": caps,
        "max_token_imbalance": caps,
        "num_stages": mostly(st.integers(1, 9)),
        "rotate_ranks": st.booleans(),
        "minimize_total": st.booleans(),
        "cost_model": mostly(cost_models),
    }
    others = {name for owner, names in OWN.items() if owner != strategy for name in names}
    if draw(st.integers(1, 16)) < 16:
        options = {name: values for name, values in options.items() if name not in others}
    return {"strategy": strategy, **draw(optional(**options))}


@settings(max_examples=60)
@given(lengths, cp_sizes, planner_options())
def test_planner(lengths, cp_size, options):
    """Plans partition the documents and keep to the caps, or say that they do not."""
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


# -- the collator ---------------------------------------------------------------------------------------------------


@st.composite
def as_given(draw, columns):
    """A column as datasets give it."""
    values = draw(columns)
    kinds = [list, tuple, np.array, torch.tensor, functools.partial(np.array, dtype=np.int32)]
    try:
        return draw(st.sampled_from(kinds))(values)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # what was spoiled
        return values


junk_columns = json_values | st.sampled_from(
    [
        np.ones((2, 3)),
        np.array(3),
        np.array(["a", "b"]),
        np.array([1.5, np.nan]),
        torch.ones(2, 3),
        torch.tensor(3),
        torch.ones(2, dtype=torch.complex64),
        torch.ones(3, device="meta"),
        [[1, 2], [3]],
        [1, None],
        [2**70],
        b"ab",
        range(4),
        {1, 2},
    ]
)


@st.composite
def features(draw):
    length = draw(st.integers(0, 12))
    of_tokens = st.binary(min_size=length, max_size=length)
    bits = of_tokens.map(lambda values: [value & 1 for value in values])
    ids = spoiled(of_tokens.map(list))
    cuts = [0, *sorted(draw(st.sets(st.integers(1, length - 1), max_size=3) if length > 1 else st.just([]))), length]
    documents = [stop - start for start, stop in pairwise(cuts)]
    usual = {
        "input_ids": ids,
        "labels": ids,
        "completion_mask": bits,
        "assistant_masks": bits,
        "attention_mask": mostly(st.just([1] * length), bits),
        "position_ids": spoiled(st.just([position for document in documents for position in range(document)])),
        "seq_lengths": spoiled(st.just(documents)),
        "weight": spoiled(of_tokens.map(lambda values: [value / 8 for value in values])),
        "text": st.just("a"),
    }
    columns = {key: mostly(as_given(values), junk_columns, one_in=40) for key, values in usual.items()}
    needed = {key: columns.pop(key) for key in ("input_ids", "weight")}
    return draw(st.fixed_dictionaries(needed, optional=columns))


collator_options = optional(
    strategy=st.sampled_from(STRATEGIES),
    max_imbalance=caps,
    max_token_imbalance=caps,
    num_stages=mostly(st.integers(1, 4)),
    pad_to_multiple_of=mostly(st.integers(1, 9)),
    pad_token_id=mostly(st.integers(0, 99)),
    per_token_keys=mostly(
        st.sampled_from([["weight"], [], ["weight", "completion_mask"]]),
        st.sampled_from(["weight", ["labels"]]) | st.lists(json_values),
    ),
    return_position_ids=st.booleans(),
    return_flash_attn_kwargs=st.booleans(),
    return_seq_idx=st.booleans(),
)


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
    """A batch is the documents that came in, token by token, and its plan shares them out."""
    try:
        batch = FlashCPCollator(cp_size, **options)(features)
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


# -- configs, profiles and set-ups ----------------------------------------------------------------------------------

setups = optional(
    gpus=mostly(st.integers(1, 8), st.integers(-1, 200)),
    sharding=st.sampled_from(["fsdp2", "ddp"]),
    gradient_checkpointing=st.sampled_from(["none", "full", "attention-saving"]),
    mixed_precision=st.sampled_from(["bf16", "no"]),
)
sizes = mostly(st.integers(1, 4), json_values)
environments = optional(
    **dict.fromkeys(
        ("PARALLELISM_CONFIG_CP_SIZE", "PARALLELISM_CONFIG_TP_SIZE", "PARALLELISM_CONFIG_DP_SHARD_SIZE"),
        st.sampled_from(["1", "2", "0", "", "x", "²"]),
    ),
    FLASHCP_STRATEGY=st.sampled_from([*STRATEGIES, "zigzag", ""]),
)


@settings(max_examples=100)
@given(st.data())
def test_config(data):
    """A model's config, a hardware profile, a training set-up and a parallelism config give finite numbers, or say
    which entry is wrong."""
    config = data.draw(mostly(changed(CONFIG), st.dictionaries(st.sampled_from(sorted(CONFIG)), json_values)))
    profile = data.draw(mostly(st.just(H100), json_values | changed(H100), one_in=3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numbers beyond what floats hold
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


# -- command lines --------------------------------------------------------------------------------------------------

FILES = {
    "model.json": LLAMA_3_8B,
    "hardware.json": H100,
    "trainer_state.json": {"log_history": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "flashcp_x": 2}]},
    "lengths.jsonl": {"length": 20},
    "lengths.txt": [30, 2],
}
PLACES = st.sampled_from([*FILES, ".", "nowhere", "no/where", "", "\udcff", "a\nb"])
whole = st.sampled_from(["1", "2", "3", "64", "300", "0", "-1", "x", "9" * 30])
ratios = st.sampled_from(["1", "1.05", "2", "1e3", "inf", "0.5", "-1", "nan", "x"])
VALUES = {
    "model": mostly(st.just("model.json"), PLACES, one_in=3),
    "hardware": mostly(st.sampled_from(HARDWARE), st.just("hardware.json") | PLACES, one_in=3),
    "run_dir": mostly(st.sampled_from(["trainer_state.json", "."]), PLACES, one_in=3),
    "lengths_file": mostly(st.sampled_from(["lengths.txt", "lengths.jsonl"]), PLACES, one_in=3),
    "plot": mostly(st.just("new.svg"), PLACES | st.just("new.txt"), one_in=4),
    "html": mostly(st.just("new.html"), PLACES, one_in=4),
    "column": mostly(st.just("length"), st.text(max_size=3)),
    "lengths": mostly(st.sampled_from(["8", "8,5,3", "300,64,1"]), st.sampled_from(["0", "1,,2", "9" * 30, "-3", ""])),
    "packs": mostly(st.sampled_from(["1", "2"]), st.sampled_from(["0", "x"])),
    "gpus": mostly(st.sampled_from(["1", "2", "8"]), whole),
    "cp_size": mostly(st.sampled_from(["2", "4"]), whole),
    "window": mostly(st.sampled_from(["64", "300"]), whole),
}
"""By an argument's name; of others by its type."""
RARELY = {"plot": 1, "html": 1, "json": 12}
COMMANDS = {"plan": plan, "estimate": estimate, "simulate": simulate, "report": report}


def parser_of(command):
    subparsers = argparse.ArgumentParser().add_subparsers()
    command.add_parser(subparsers)
    (parser,) = subparsers.choices.values()
    return parser


PARSERS = {name: parser_of(command) for name, command in COMMANDS.items()}


@st.composite
def command_lines(draw):
    name = draw(st.sampled_from(sorted(PARSERS)))
    parser, line = PARSERS[name], [name]
    exclusive = [action for group in parser._mutually_exclusive_groups for action in group._group_actions]
    chosen = [draw(st.sampled_from(exclusive))] if exclusive else []
    for action in parser._actions[1:]:  # the first is --help
        wanted = action.required or action in chosen or action.dest == "window" and chosen[0].dest != "lengths"
        if draw(st.integers(1, 20)) <= (19 if wanted else 1 if action in exclusive else RARELY.get(action.dest, 5)):
            line += action.option_strings[-1:] + draw(values_of(action))
    return line


def values_of(action):
    if action.nargs == 0:
        return st.just([])
    if action.choices:
        values = mostly(st.sampled_from([*action.choices]), st.text(max_size=2))
    else:
        values = VALUES.get(action.dest) or {int: whole, float: ratios}[action.type]
    return st.lists(values, min_size=1, max_size=2 if action.nargs == "+" else 1)


@st.composite
def file_contents(draw):
    contents = {name: json.dumps(value).encode() for name, value in FILES.items()}
    name = draw(st.sampled_from(sorted(FILES)))
    contents[name] = draw(
        st.just(contents[name])
        | st.binary(max_size=12)
        | st.text(max_size=12).map(lambda text: text.encode("utf-8", "surrogatepass"))
        | (changed(FILES[name]) | json_values).map(lambda value: json.dumps(value).encode())
    )
    return contents


@settings(max_examples=60)
@given(command_lines(), file_contents())
def test_command_line(line, contents):
    """A command prints what was asked for, or one line about what is wrong and leaves nothing behind."""
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
    assert code in (0, 2) and "Traceback" not in err
    if code == 0:
        assert out
        if "--json" in line:
            json.loads(out, parse_constant=no_constant)
    elif err.startswith("usage: "):
        assert not out and not new and err.count("error: ") == 1
    else:
        assert err.startswith("error: ") and err.count("\n") == 1, err
        assert not new and not out or "does not fit on" in err, (
            "an estimate is printed before it says that nothing fits"
        )


def run(*line):
    """Exit code, stdout and stderr of a command line, in this process, with streams as a terminal's."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", errors) for errors in ("strict", "backslashreplace"))
    _loaded.cache_clear()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        warnings.simplefilter("ignore", (UnmetCapWarning, RuntimeWarning))
        try:
            code = main(line)
        except SystemExit as stop:
            code = stop.code
    for stream in (out, err):
        stream.flush()
    return code, out.buffer.getvalue().decode(), err.buffer.getvalue().decode()


def no_constant(name):
    raise AssertionError(f"{name} is not JSON")
