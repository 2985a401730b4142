"""Settings have one place, the plugin, from which collator, attached model and trainers read them."""

import dataclasses
import pickle

import pytest
import torch

from hf_flashcp import (
    CostModel,
    FlashCPCollator,
    FlashCPPlugin,
    FlashCPTrainer,
    Topology,
    attach,
    plan_documents,
    shard_inputs,
)
from hf_flashcp.data.lengths import LENGTH_DISTRIBUTIONS, sample_pack
from hf_flashcp.doctor.tiny import default_config
from hf_flashcp.errors import ConfigurationError, PlanError
from hf_flashcp.integrations.plugin import _PLAN_SETTINGS
from hf_flashcp.planning import PlanSettings, plan_with
from hf_flashcp.planning.settings import current_settings
from hf_flashcp.predict.model_shape import LLAMA_3_8B, ModelShape
from tests import settings_cases
from tests.models import build_model, make_documents
from tests.trainer_cases import training_arguments


LENGTHS = [40, 33, 21, 15, 9]


def features():
    return [{"input_ids": [1] * length} for length in LENGTHS]


def test_the_plugin_has_every_setting_of_plans():
    given = {field.name for field in dataclasses.fields(PlanSettings)}
    assert set(_PLAN_SETTINGS) == given - {"cost_model", "minimize_total", "rotate_ranks", "state_tokens"}
    assert given & {field.name for field in dataclasses.fields(FlashCPPlugin)} == set(_PLAN_SETTINGS)


@pytest.mark.parametrize(
    "chosen",
    [
        {"strategy": "per_doc"},
        {"strategy": "flashcp", "max_imbalance": 1.5, "max_token_imbalance": 1.3},
        {"num_stages": 3},
        {"topology": Topology(2)},
    ],
)
def test_a_collator_without_cp_size_uses_the_plugins_settings(chosen):
    FlashCPPlugin(cp_size=4, **chosen)
    expected = plan_documents(LENGTHS, 4, **chosen)
    assert expected != plan_documents(LENGTHS, 4)
    for collator in (FlashCPCollator(), FlashCPCollator(4), pickle.loads(pickle.dumps(FlashCPCollator()))):
        assert collator(features())["flashcp_plan"] == expected


def test_a_collator_takes_the_plugin_made_last():
    FlashCPPlugin(cp_size=4)
    FlashCPPlugin(cp_size=2, strategy="per_doc")
    assert FlashCPCollator().settings == PlanSettings(2, "per_doc")
    assert FlashCPCollator(4).settings == PlanSettings(4)


def test_a_collator_without_cp_size_uses_the_launchers(monkeypatch):
    with pytest.raises(ConfigurationError, match=r"No cp_size is known: make a FlashCPPlugin\(cp_size=...\) before"):
        FlashCPCollator()
    monkeypatch.setenv("PARALLELISM_CONFIG_CP_SIZE", "4")
    with pytest.raises(ConfigurationError, match="No cp_size is known"):
        FlashCPCollator()  # accelerate's own context parallelism
    monkeypatch.setenv("PARALLELISM_CONFIG_CP_BACKEND", "flashcp")
    monkeypatch.setenv("FLASHCP_STRATEGY", "per_seq")
    assert FlashCPCollator().settings == PlanSettings(4, "per_seq") == FlashCPPlugin().plan_settings
    monkeypatch.setenv("PARALLELISM_CONFIG_CP_SIZE", "four")
    monkeypatch.setattr("hf_flashcp.planning.settings._owner", None)
    with pytest.raises(PlanError, match="cp_size must be a positive integer, got 'four'"):
        FlashCPCollator()


@pytest.mark.parametrize(
    "option, message",
    [
        ({"strategy": "zigzag"}, "Unknown strategy 'zigzag': choose one of"),
        ({"max_imbalance": 0.5}, "max_imbalance is 0.5: it is max / mean over ranks"),
        ({"num_stages": 0}, "num_stages must be a positive integer, got 0"),
        ({"topology": Topology(3)}, "cp_size 4 is not a multiple of the topology's ranks_per_node, 3"),
    ],
)
def test_errors_are_the_same_wherever_a_setting_is_given(option, message):
    with pytest.raises(PlanError) as planning:
        plan_documents(LENGTHS, 4, **option)
    with pytest.raises(ConfigurationError) as plugin:
        FlashCPPlugin(cp_size=4, **option)
    assert str(planning.value) == str(plugin.value) and message in str(plugin.value)


def test_settings_that_do_not_fit():
    with pytest.raises(ConfigurationError, match="no hardware profile 'h1000'"):
        FlashCPPlugin(cp_size=4, hardware="h1000")
    with pytest.raises(ConfigurationError, match="hardware is an option of the strategy 'search', not of 'per_doc'"):
        FlashCPPlugin(cp_size=4, strategy="per_doc", hardware="h100")
    with pytest.raises(ConfigurationError, match="max_imbalance, strategy: FlashCPPlugin has this setting"):
        FlashCPCollator(4, strategy="per_doc", max_imbalance=1.2)
    with pytest.raises(ConfigurationError, match="cp_size is 2, but the settings have 4"):
        FlashCPCollator(2, settings=PlanSettings(4))


def test_hardware_uses_the_attached_model():
    plugin = FlashCPPlugin(cp_size=1, hardware="h100")
    collator = FlashCPCollator()
    with pytest.raises(ConfigurationError, match="no model is attached yet"):
        collator(features())
    model = build_model("llama", dtype=torch.float32)
    attach(model, None)
    assert collator.settings.cost_model == CostModel.from_config(model.config, "h100", itemsize=4)
    assert collator.settings is plugin.plan_settings and collator(features())["flashcp_plan"].cp_size == 1


@pytest.mark.parametrize("family", ["granitemoehybrid", "llama", "lfm2", "nemotron_h", "qwen3_next"])
def test_an_attached_model_sets_the_price_of_states(family):
    plugin, collator = FlashCPPlugin(cp_size=1), FlashCPCollator()
    assert collator.settings.state_tokens == 0
    model = build_model(family, dtype=torch.float32)
    attach(model, None)
    expected = ModelShape.from_config(model.config).state_tokens(4)
    assert (expected > 0) == (family in ("nemotron_h", "qwen3_next"))
    assert collator.settings.state_tokens == expected and collator.settings is plugin.plan_settings
    assert pickle.loads(pickle.dumps(collator)).settings.state_tokens == expected
    attach(build_model("llama", dtype=torch.float32), None)
    assert collator.settings.state_tokens == 0
    FlashCPCollator(settings=PlanSettings(1)).share_settings(PlanSettings(1, state_tokens=5.0))


def test_only_search_without_hardware_has_a_price_of_states():
    config = build_model("qwen3_next").config
    given = PlanSettings(4), PlanSettings(4, "per_doc"), PlanSettings(4, hardware="h100")
    for settings in given:
        settings.for_model(config)
    assert [settings.state_tokens > 0 for settings in given] == [True, False, False]
    assert given[2].cost_model.recurrent == ModelShape.from_config(config).recurrent
    odd = PlanSettings(4)
    odd.for_model({"model_type": "a family without the usual names"})
    assert odd == PlanSettings(4)


def test_prices_of_states_reach_plans():
    """The first plan has the least KV, the second one fewer states."""
    lengths, caps = [131072], {"max_token_imbalance": 1.02}
    settings = PlanSettings(8, state_tokens=6144.0, **caps)
    plan = plan_documents(lengths, 8, state_tokens=6144.0, **caps)
    without = plan_documents(lengths, 8, **caps)
    assert plan_with(settings, lengths) == plan != without
    assert sum(plan.report()["states_received"]) < sum(without.report()["states_received"])
    assert plan_documents(lengths, 8, state_tokens=0.0, **caps) == without


@pytest.mark.parametrize("model_type", ["llama", "lfm3"])
def test_models_without_states_are_planned_as_ever(model_type):
    settings = PlanSettings(8)
    settings.for_model(default_config(model_type))
    assert settings == PlanSettings(8)
    for corpus in LENGTH_DISTRIBUTIONS:
        for seed in range(3):
            lengths = sample_pack(corpus, 65536, seed=seed)
            assert plan_with(settings, lengths) == plan_documents(lengths, 8)


@pytest.mark.parametrize(
    "option, message",
    [
        ({"state_tokens": -1.0}, "state_tokens is -1.0: it is the price of a state in tokens of KV"),
        ({"state_tokens": float("inf")}, "state_tokens is inf"),
        ({"state_tokens": "6144"}, "state_tokens is '6144'"),
        ({"state_tokens": 1.0, "strategy": "per_doc"}, "state_tokens is an option of the strategy 'search', not of"),
        ({"state_tokens": 1.0, "cost_model": CostModel.from_config(LLAMA_3_8B, "h100")}, "price states themselves"),
    ],
)
def test_prices_that_are_refused(option, message):
    with pytest.raises(PlanError, match=message):
        plan_documents(LENGTHS, 4, **option)


def test_a_topology_takes_the_place_of_the_profiles_nodes():
    config = build_model("llama").config
    settings = PlanSettings(4, hardware="h100", topology=Topology(2))
    settings.for_model(config)
    assert settings.timing().hardware.ranks_per_node == 2 and settings.hardware.ranks_per_node == 8
    model = CostModel.from_config(config, "h100")
    assert plan_with(settings, LENGTHS) == plan_documents(LENGTHS, 4, cost_model=model, topology=Topology(2))


def test_a_batch_without_a_plan_gets_the_same_plan():
    plugin = FlashCPPlugin(cp_size=1, strategy="per_seq")
    batch = {"input_ids": torch.arange(9)[None], "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2]])}
    assert current_settings(1) is plugin.plan_settings
    assert shard_inputs(batch, None)["flashcp_plan"].plan == plan_documents([4, 2, 3], 1, strategy="per_seq")


def test_batches_of_other_collators_are_planned_for_nodes(pool):
    """Batches as packed by TRL have no plan, and documents are given by position_ids."""
    for plan in pool.run(4, settings_cases.plan_of_a_batch_without_one, LENGTHS):
        assert plan == plan_documents(LENGTHS, 4, topology=Topology(2), num_stages=2, max_imbalance=1.2)


def test_trainers_share_their_settings_with_the_collator(tmp_path):
    early = FlashCPCollator(1)
    options = {"model": build_model("llama"), "train_dataset": make_documents([12, 9])}
    arguments = training_arguments(parallelism_config=FlashCPPlugin(cp_size=1, strategy="per_doc"))
    assert FlashCPTrainer(args=arguments, **options).data_collator.settings.strategy == "per_doc"
    assert FlashCPTrainer(args=arguments, data_collator=early, **options).data_collator.settings.strategy == "per_doc"
    for other, message in [
        (FlashCPCollator(2), "plans with cp_size 2, but FlashCPPlugin with cp_size 1. Create it as"),
        (
            FlashCPCollator(settings=PlanSettings(1, "whole_doc")),
            "plans with strategy 'whole_doc', but FlashCPPlugin with strategy 'per_doc'. Create it as",
        ),
    ]:
        with pytest.raises(ConfigurationError, match=message):
            FlashCPTrainer(args=arguments, data_collator=other, **options)


def test_attach_has_one_source_of_settings(pool):
    mismatch = "FlashCPPlugin has cp_size 4, but the mesh has 2 ranks. Pass the plugin of this mesh."
    assert pool.run(2, settings_cases.plugin_and_mesh_or_accelerator) == [[mismatch, "leave plugin out"]] * 2
