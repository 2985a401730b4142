"""What is fed to the properties of tests/test_fuzz.py: as it should be, and not."""

import copy
import functools
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from hypothesis import strategies as st

from hf_flashcp.planning import HARDWARE, STRATEGIES, CostModel
from hf_flashcp.predict.model_shape import LLAMA_3_8B
from tests.packs import arbitrary_plans


ROOT = Path(__file__).parents[2]
H100 = json.loads((ROOT / "hf_flashcp" / "predict" / "hardware" / "h100.json").read_text(encoding="utf-8"))
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
large = st.sampled_from([2**31, 2**63, 10**30])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | large,
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


def optional(**strategies):
    return st.fixed_dictionaries({}, optional=strategies)


@st.composite
def plan_dicts(draw):
    found = draw(arbitrary_plans()).to_dict()
    offsets = draw(st.permutations(range(1, found["cp_size"])))
    cuts = draw(st.lists(st.integers(0, len(offsets)), max_size=3).map(sorted))
    groups = [offsets[start:stop] for start, stop in pairwise([0, *cuts, len(offsets)]) if start < stop]
    found["offset_groups"] = draw(st.sampled_from([None, groups]))
    return draw(mostly(changed(found), st.just(found), one_in=2))


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


setups = optional(
    gpus=mostly(st.integers(1, 8), st.integers(-1, 200)),
    sharding=st.sampled_from(["fsdp2", "ddp"]),
    gradient_checkpointing=st.sampled_from(["none", "full", "attention-saving"]),
    mixed_precision=st.sampled_from(["bf16", "no"]),
    device=st.sampled_from(["cuda", "cpu"]),
    skip_logits=st.booleans(),
    offload=st.booleans(),
    every_n_layers=mostly(st.integers(1, 9)),
    head_groups=mostly(st.integers(1, 9)),
    keep_received_kv=st.sampled_from([None, True, False]),
)
sizes = mostly(st.integers(1, 4), json_values)
environments = optional(
    **dict.fromkeys(
        ("PARALLELISM_CONFIG_CP_SIZE", "PARALLELISM_CONFIG_TP_SIZE", "PARALLELISM_CONFIG_DP_SHARD_SIZE"),
        st.sampled_from(["1", "2", "0", "", "x", "²"]),
    ),
    FLASHCP_STRATEGY=st.sampled_from([*STRATEGIES, "zigzag", ""]),
)
