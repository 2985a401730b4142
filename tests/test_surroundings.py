"""With "auto", plans are made for the hardware and the nodes that are found when a model is attached."""

import dataclasses
import pickle
from types import SimpleNamespace

import pytest
import torch

from hf_flashcp import CostModel, FlashCPCollator, FlashCPPlugin, Topology, attach, plan_documents
from hf_flashcp.errors import ConfigurationError
from hf_flashcp.integrations import surroundings
from hf_flashcp.planning import HardwareProfile, PlanSettings, plan_with
from hf_flashcp.planning.devices import Surroundings, ranks_per_node
from hf_flashcp.predict.model_shape import LLAMA_3_8B
from tests import surroundings_cases
from tests.models import build_model


LENGTHS = [40, 33, 21, 15, 9]
H100, L40S = "NVIDIA H100 80GB HBM3", "NVIDIA L40S"


def profile(name, **changes):
    return dataclasses.replace(HardwareProfile.load(name), **changes)


def logged(found, level="WARNING"):
    return [[text for logged_level, text in lines if logged_level == level] for _, lines in found]


def test_automatic_settings_are_the_plugins_default():
    plugin = FlashCPPlugin(cp_size=4)
    assert plugin.hardware == plugin.topology == "auto"
    settings = plugin.plan_settings
    assert settings == PlanSettings(4) == PlanSettings(4, hardware="auto", topology="auto")
    assert settings.automatic == {"hardware", "topology"} and not PlanSettings(4).automatic
    assert FlashCPCollator()([{"input_ids": [1] * length} for length in LENGTHS])["flashcp_plan"] == plan_documents(
        LENGTHS, 4
    )
    assert pickle.loads(pickle.dumps(settings)).automatic == settings.automatic


@pytest.mark.parametrize(
    "options, automatic",
    [
        ({"strategy": "per_doc"}, {"topology"}),
        ({"minimize_total": True}, set()),
        ({"state_tokens": 2.0}, {"topology"}),
        ({"cost_model": CostModel.from_config(LLAMA_3_8B, "h100")}, {"topology"}),
    ],
)
def test_automatic_settings_give_way_to_other_choices(options, automatic):
    settings = PlanSettings(4, hardware="auto", topology="auto", **options)
    assert settings == PlanSettings(4, **options) and settings.automatic == automatic


def test_a_collators_own_settings_may_leave_automatic_ones_out():
    plugin = FlashCPPlugin(cp_size=4)
    plugin.plan_settings.adopt(Surroundings(H100, 2))
    plugin.plan_settings.for_model(LLAMA_3_8B)
    collator = FlashCPCollator(settings=PlanSettings(4))
    collator.share_settings(plugin.plan_settings)
    assert collator.settings is plugin.plan_settings
    with pytest.raises(ConfigurationError, match="plans with num_stages 2, but FlashCPPlugin with num_stages None"):
        FlashCPCollator(settings=PlanSettings(4, num_stages=2)).share_settings(plugin.plan_settings)


def test_the_hardware_that_was_found_is_planned_for():
    settings = PlanSettings(16, hardware="auto", topology="auto")
    for nodes, topology, found in [
        (16, None, profile("h100", ranks_per_node=16)),
        (4, Topology(4), profile("h100", ranks_per_node=4)),
        (None, None, profile("h100", ranks_per_node=16, intra_node=profile("h100").inter_node)),
    ]:
        settings.adopt(Surroundings(H100, nodes))
        assert settings.for_model(LLAMA_3_8B) is None
        assert (settings.topology, settings.hardware) == (topology, found)
        assert settings.timing().hardware == found
    flat = PlanSettings(16, hardware="auto")
    flat.adopt(Surroundings(H100, 4))
    assert flat.topology is None and flat.hardware == found
    named = PlanSettings(16, hardware="l40s", topology="auto")
    named.adopt(Surroundings(H100, 4))
    named.for_model(LLAMA_3_8B)
    assert named.hardware == profile("l40s") and named.timing().hardware.ranks_per_node == 4
    other = PlanSettings(16, "per_doc", hardware="auto", topology="auto")
    other.adopt(Surroundings(H100, 4))
    assert other.hardware is None and plan_with(other, LENGTHS).ranks_per_node == 4


def test_models_without_sizes_are_planned_for_traffic():
    settings = PlanSettings(4, hardware="auto")
    for config, hardware in [(LLAMA_3_8B, profile("cpu", ranks_per_node=4)), ({"model_type": "odd"}, None)]:
        settings.adopt(Surroundings("cpu", 4))
        problem = settings.for_model(config)
        assert (problem is None) == (settings.timing() is not None) and settings.hardware == hardware
    assert "hidden_size" in problem and plan_with(settings, LENGTHS) == plan_documents(LENGTHS, 4)
    with pytest.raises(ConfigurationError, match="hidden_size"):
        PlanSettings(4, hardware="cpu").for_model({"model_type": "odd"})


@pytest.mark.parametrize(
    "name, expected",
    [
        (H100, "h100"),
        ("NVIDIA H100 PCIe", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA GB200", "b200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-PCIE-40GB", "a100"),
        (L40S, "l40s"),
        ("NVIDIA L40", "generic"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "generic"),
        ("NVIDIA GeForce RTX 5090", "rtx5090"),
        ("AMD Instinct MI300X", "mi300x"),
        ("AMD Instinct MI325X", "mi300x"),
        ("NVIDIA GH200 480GB", "generic"),
        ("xpu", "generic"),
        ("cpu", "cpu"),
    ],
)
def test_profiles_of_devices(name, expected):
    assert Surroundings(name, 8).profile == expected


@pytest.mark.parametrize(
    "ranks, local_world_size, expected",
    [
        ([0, 1, 2, 3], None, 4),
        ([0, 1, 2, 3], 8, 4),
        ([4, 5, 6, 7], 8, 4),
        ([1, 3, 5, 7], 8, 4),
        ([0, 1, 2, 3], 2, 2),
        ([8, 9, 10, 11, 4, 5, 6, 7], 4, 4),
        ([0, 1, 2, 3], 1, 1),
        ([0, 1, 2, 3], 3, None),
        ([4, 5, 6, 7], 6, None),
        ([0, 2, 1, 3], 2, None),
        ([0, 2], 2, None),
        ([1, 2, 3, 4], 2, None),
    ],
)
def test_nodes_of_a_group(ranks, local_world_size, expected):
    assert ranks_per_node(ranks, local_world_size) == expected


def test_the_device_is_that_of_the_mesh(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device}")
    model = build_model("llama")
    names = [surroundings._device_name(model, SimpleNamespace(device_type=kind)) for kind in ("cuda", "cpu", "xpu")]
    assert names == ["GPU None", "cpu", "xpu"]


@pytest.mark.parametrize("value, expected", [(None, None), ("8", 8), ("0", None), ("many", None)])
def test_the_launchers_processes_per_node(monkeypatch, value, expected):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if value is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", value)
    assert surroundings._local_world_size() == expected


def test_attach_finds_one_node(pool):
    found = pool.run(2, surroundings_cases.found_by_attach, ["cpu"] * 2, ["2"] * 2)
    for settings, _ in found:
        assert settings.hardware == profile("cpu", ranks_per_node=2) and settings.topology is None
        assert settings.surroundings == Surroundings("cpu", 2) and settings.timing() is not None
    assert logged(found) == [[], []]
    text = (
        'Plans are made for the least predicted step time with the hardware profile "cpu". The device is cpu, the '
        "group is one node."
    )
    assert logged(found, "INFO") == [[text] * 2, []]


def test_all_ranks_plan_for_what_the_first_found(pool):
    found = pool.run(2, surroundings_cases.found_by_attach, [H100, L40S], ["2", "1"])
    assert [settings.hardware for settings, _ in found] == [profile("h100", ranks_per_node=2)] * 2
    (warning,), others = logged(found)
    assert not others and f'device is "{H100}" on rank 0 and "{L40S}" on rank 1' in warning
    assert "LOCAL_WORLD_SIZE is 2 on rank 0 and 1 on rank 1" in warning


def test_an_unknown_gpu_is_planned_for_with_a_warning(pool):
    found = pool.run(2, surroundings_cases.found_by_attach, ["NVIDIA T4"] * 2, [None] * 2)
    assert [settings.hardware for settings, _ in found] == [profile("generic", ranks_per_node=2)] * 2
    (warning,), others = logged(found)
    assert "no hardware profile for NVIDIA T4" in warning and 'hardware="h100"' in warning and not others


@pytest.mark.parametrize(
    "local_world_size, topology, warning",
    [
        ("2", Topology(2), None),
        (
            "3",
            None,
            "LOCAL_WORLD_SIZE 3 does not divide cp_size 4, so the context-parallel group of ranks 0, 1, 2, 3",
        ),
    ],
)
def test_attach_finds_several_nodes(pool, local_world_size, topology, warning):
    found = pool.run(4, surroundings_cases.found_by_attach, [H100] * 4, [local_world_size] * 4)
    intra_node = profile("h100").intra_node if topology else profile("h100").inter_node
    hardware = profile("h100", ranks_per_node=2 if topology else 4, intra_node=intra_node)
    assert [(each.topology, each.hardware) for each, _ in found] == [(topology, hardware)] * 4
    first, *others = logged(found)
    assert not any(others) and len(first) == (warning is not None)
    assert warning is None or warning in first[0]
    text = "The device is NVIDIA H100 80GB HBM3, the group is "
    assert text + ("2 nodes of 2 ranks." if topology else "ranks without nodes.") in logged(found, "INFO")[0][0]


def test_groups_across_nodes_are_planned_without_them(pool):
    mesh = [[0, 2], [1, 3]]
    found = pool.run(4, surroundings_cases.found_by_attach, [H100] * 4, ["2"] * 4, mesh)
    hardware = profile("h100", ranks_per_node=2, intra_node=profile("h100").inter_node)
    assert [(each.topology, each.hardware) for each, _ in found] == [(None, hardware)] * 4
    warnings = logged(found)
    assert list(map(len, warnings)) == [1, 1, 0, 0]
    for (warning,), ranks in zip(warnings, mesh):
        assert f"group of ranks {ranks[0]}, {ranks[1]} does not fill nodes one after another, as there are" in warning


def test_groups_find_their_own_hardware(pool):
    devices, mesh = [H100, H100, L40S, L40S], [[0, 1], [2, 3]]
    found = pool.run(4, surroundings_cases.found_by_attach, devices, ["4"] * 4, mesh)
    h100, l40s = (profile(name, ranks_per_node=2) for name in ("h100", "l40s"))
    assert [settings.hardware for settings, _ in found] == [h100, h100, l40s, l40s]
    assert logged(found) == [[]] * 4 and list(map(len, logged(found, "INFO"))) == [2, 0, 0, 0]


@pytest.mark.parametrize(
    "chosen",
    [
        {"hardware": None, "topology": None},
        {"strategy": "per_doc", "topology": None},
        {"hardware": "h100", "topology": Topology(2)},
    ],
)
def test_settings_that_are_given_stay(pool, chosen):
    found = pool.run(2, surroundings_cases.found_by_attach, [H100, "NVIDIA T4"], ["2", "1"], None, (), chosen)
    expected = PlanSettings(2, **chosen)
    if expected.hardware is not None:
        expected.for_model(build_model("llama").config, itemsize=build_model("llama").dtype.itemsize)
    assert [settings for settings, _ in found] == [expected] * 2
    assert logged(found) == logged(found, "INFO") == [[], []]


def test_attach_warns_of_a_model_without_sizes(pool):
    sizes = ("hidden_size",)
    found = pool.run(2, surroundings_cases.found_by_attach, ["cpu"] * 2, ["2"] * 2, None, sizes)
    assert [settings.timing() for settings, _ in found] == [None, None]
    first, others = logged(found)
    assert not others and "cannot be predicted, so plans are made for little KV traffic: " in first[0]
    errors = pool.run(2, surroundings_cases.found_by_attach, ["cpu"] * 2, ["2"] * 2, None, sizes, {"hardware": "cpu"})
    assert all("hidden_size" in error for error in errors)


def test_one_process_looks_for_nothing(monkeypatch):
    monkeypatch.setattr(surroundings, "gather_values", None)
    plugin = FlashCPPlugin(cp_size=1)
    attach(build_model("llama"), None)
    assert plugin.plan_settings == PlanSettings(1) and plugin.plan_settings.surroundings is None


def test_loader_workers_plan_for_what_was_found(pool):
    lengths = [6000, 3000, 1500, 700]
    for before, after, model in pool.run(2, surroundings_cases.plans_of_loader_workers, lengths):
        assert before == plan_documents(lengths, 2)
        assert after == plan_documents(lengths, 2, cost_model=model) != before
