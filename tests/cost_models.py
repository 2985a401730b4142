"""Random cost models for several tests, of hardware that does not exist."""

import dataclasses

from hypothesis import strategies as st

from hf_flashcp.planning import CostModel, HardwareProfile
from hf_flashcp.predict.hardware_profile import Kernel, Link, Pass
from hf_flashcp.predict.model_shape import AttentionLayers, RecurrentLayers


H100 = HardwareProfile.load("h100")
RECURRENT = RecurrentLayers(3, 4, 4 * 64 * 64, 4 * 64 * 32, 128, 64, 16, 3, 96, 5000, 900, 10_000)
SPEEDS = [1e9, 1e11, 1e13]
WINDOWS = [None, None, 1, 7, 30]

passes = st.builds(
    Pass, st.sampled_from(SPEEDS), st.sampled_from([0, 3, 40, 300]), st.sampled_from([None, None, 0, 10])
)
kernels = st.builds(
    Kernel,
    tile=st.sampled_from([1, 4, 8, 128]),
    units=st.sampled_from([1, 1, 132]),
    call_seconds=st.sampled_from([0.0, 1e-5]),
    causal_efficiency=st.sampled_from([1.0, 0.9, 0.5]),
    forward=passes,
    backward=passes,
    block_seconds=st.sampled_from([0.0, 5e-9]),
)
links = st.builds(Link, st.sampled_from([1e6, 1e8, 1e11]), st.sampled_from([0.0, 1e-5]))
profiles = st.builds(
    dataclasses.replace,
    st.just(H100),
    linear_flops_per_second=st.sampled_from(SPEEDS),
    memory_bytes_per_second=st.sampled_from([1e8, 1e10, 1e12]),
    kernel=kernels,
    intra_node=links,
    inter_node=links,
    ranks_per_node=st.sampled_from([1, 2, 3, 4, 8]),
)
attention_layers = st.builds(
    AttentionLayers,
    st.sampled_from([1, 3]),
    st.sampled_from([2, 8, 64]),
    st.sampled_from([1, 2]),
    st.sampled_from([16, 64]),
    st.sampled_from([16, 32]),
    st.sampled_from(WINDOWS),
)
cost_models = st.builds(
    CostModel,
    profiles,
    st.sampled_from([0.0, 1e3]),
    st.lists(attention_layers, min_size=1, max_size=2).map(tuple),
    st.sampled_from([2, 4]),
    st.sampled_from([2, 4]),
    st.sampled_from([None, None, None, RECURRENT]),
)
