"""TRL's preference and RL trainers, and classifiers, under context parallelism: real trainings against plain ones."""

import ast
import functools
import importlib
import inspect
import pkgutil

import pytest
import torch
import trl
import trl.experimental
from trl.trainer import base_trainer, dpo_trainer, grpo_trainer, kto_trainer

from hf_flashcp.errors import ConfigurationError
from hf_flashcp.integrations.models import router_loss
from hf_flashcp.integrations.trainers import trl_guards
from tests import row_cases
from tests.models import build_model


SEQUENTIAL = {"train_sampling_strategy": "sequential"}
BETA = {"beta": 0.04, "rows": 8}
FP32 = {"dtype": torch.float32}


def difference(ours, reference):
    """Return the largest relative difference (Frobenius norm) of a tensor."""
    assert ours.keys() == reference.keys()
    norms = {name: value.double().norm().clamp_min(1e-30) for name, value in reference.items()}
    return max(float((ours[name] - value).double().norm() / norms[name]) for name, value in reference.items())


def check(found, reference, exact=1e-12, metrics=1e-9):
    for ours in found:
        assert ours["sharded"]
        assert difference(ours["gradients"], reference["gradients"]) < exact
        assert difference(ours["parameters"], reference["parameters"]) < exact
        assert len(ours["logs"]) == len(reference["logs"])
        for log, expected in zip(ours["logs"], reference["logs"]):
            assert log == pytest.approx(expected, rel=metrics, abs=metrics)
        assert ours["evaluation"] == pytest.approx(reference["evaluation"], rel=metrics, abs=metrics)


def compare(pool, ours, reference, kind, plugin, **options):
    """Check `ours` processes of a trainer with the mixin against `reference` processes of the plain trainer."""
    found = pool.run(ours, functools.partial(row_cases.train, kind, plugin, **options))
    (expected, *_) = pool.run(reference, functools.partial(row_cases.train, kind, **options))
    check(found, expected, **({"exact": 1e-5, "metrics": 1e-4} if options.get("dtype") == torch.float32 else {}))


@pytest.mark.parametrize("strategy, cp_size", [("search", 2), ("per_doc", 4)])
@pytest.mark.parametrize(
    "kind, options",
    [("dpo", {}), ("kto", SEQUENTIAL), ("reward", {"center_rewards_coefficient": 0.01}), ("reward", {"pad": "<1>"})],
    ids=str,
)
def test_shared_batches_equal_a_single_process(pool, kind, options, strategy, cp_size):
    compare(pool, cp_size, 1, kind, {"cp_size": cp_size, "strategy": strategy}, eval_rows=5, **options)


@pytest.mark.parametrize("batches", ["own", "turns"])
@pytest.mark.parametrize(
    "kind, options",
    [
        ("grpo", BETA),
        ("grpo", {"rows": 8, "steps_per_generation": 2, "gradient_accumulation_steps": 2, "eval_rows": 4}),
        ("rloo", BETA),
        ("gmpo", {"rows": 8}),
        ("dpo", {}),
        ("kto", SEQUENTIAL),
    ],
    ids=str,
)
def test_own_batches_equal_plain_data_parallelism(pool, kind, options, batches):
    if options.get("eval_rows"):
        options = {**options, "per_device_eval_batch_size": 4}
    compare(pool, 2, 2, kind, {"cp_size": 2, "strategy": "per_doc", "batches": batches}, **options)


@pytest.mark.parametrize(
    "world_size, kind, plugin, options",
    [
        (4, "grpo", {"cp_size": 4}, {"rows": 8}),
        (
            3,
            "grpo",
            {"cp_size": 3, "batches": "turns"},
            {"num_generations": 3, "rows": 8, "top_entropy_quantile": 0.3},
        ),
        (4, "dpo", {"cp_size": 2, "batches": "turns"}, {"gradient_accumulation_steps": 2}),
        (2, "reward", {"cp_size": 2, "batches": "own"}, {}),
    ],
    ids=str,
)
def test_more_processes_with_own_batches(pool, world_size, kind, plugin, options):
    compare(pool, world_size, world_size, kind, plugin, **options)


def test_tokens_that_a_rank_holds_at_once(pool):
    """A rank holds the mean of the rows of all processes, or in turns its share of one process's rows."""
    plain, shared, own, turns = (
        pool.run(2, row_cases.tokens_at_once, each) for each in (None, "shared", "own", "turns")
    )
    assert [len(sizes) for sizes in (*plain, *shared, *own, *turns)] == [1, 1] + [1, 1] + [1, 1] + [2, 2]
    total = sum(sizes[0] for sizes in own)
    assert max(sizes[0] for sizes in own) == -(-total // 2)
    of_turns = [sum(sizes[turn] for sizes in turns) for turn in (0, 1)]
    assert sum(of_turns) == total < sum(sizes[0] for sizes in plain)
    assert [max(sizes[turn] for sizes in turns) for turn in (0, 1)] == [-(-tokens // 2) for tokens in of_turns]
    assert sum(sizes[0] for sizes in shared) == of_turns[0]  # the first process's batch


WRAPPED = {
    "gradient accumulation": ("dpo", {"gradient_accumulation_steps": 2}),
    "activation checkpointing": ("dpo", {"gradient_checkpointing": True, **FP32}),
    "a LoRA adapter, its base as reference": ("dpo", {"lora": True, "eval_rows": 5}),
    "FSDP2, synced reference": ("dpo", {"fsdp": True, "sync_ref_model": True, "ref_model_sync_steps": 1}),
    "softcap, sliding window": ("dpo", {"family": "gemma2"}),
    "router loss": ("dpo", {"family": "qwen3_moe", "router_aux_loss_coef": 0.1}),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrappers_with_shared_batches(pool, name):
    kind, options = WRAPPED[name]
    compare(pool, 2, 1, kind, {"cp_size": 2, "strategy": "per_doc"}, **options)


@pytest.mark.parametrize(
    "plugin, options",
    [
        ({"batches": "own"}, {"fsdp": True, **BETA}),
        ({"batches": "own"}, {"lora": True, **BETA}),
        (
            {"batches": "turns"},
            {"fsdp": True, "gradient_accumulation_steps": 2, "gradient_checkpointing": True, "rows": 8, **FP32},
        ),
    ],
    ids=str,
)
def test_wrappers_with_own_batches(pool, plugin, options):
    compare(pool, 2, 2, "grpo", {"cp_size": 2, "strategy": "per_doc", **plugin}, **options)


@pytest.mark.parametrize("batches", ["own", "turns"])
def test_two_forwards_in_a_step(pool, batches):
    compare(pool, 2, 2, "dpo", {"cp_size": 2, "strategy": "per_doc", "batches": batches}, twice=True)


def test_router_loss_in_turns(pool):
    """Each process's router loss is that of its own rows."""
    options = {"family": "mixtral", "router_aux_loss_coef": 0.1}
    compare(pool, 2, 2, "dpo", {"cp_size": 2, "batches": "turns"}, **options)


@pytest.mark.parametrize(
    "kind, plugin, reference", [("dpo", {}, 1), ("grpo", {}, 2), ("grpo", {"batches": "turns"}, 2)]
)
def test_fp32(pool, kind, plugin, reference):
    compare(pool, 2, reference, kind, {"cp_size": 2, **plugin}, rows=8, **FP32)


@pytest.mark.parametrize(
    "kind, plugin", [("dpo", {"cp_size": 2}), ("kto", {"cp_size": 1}), ("reward", {"cp_size": 2})]
)
def test_evaluation_with_several_readers_equals_a_single_process(pool, kind, plugin):
    """5 rows at batch 3: two readers would see the first row twice."""
    options = {"eval_rows": 5, "learning_rate": 0.0, "max_steps": 1, **(SEQUENTIAL if kind == "kto" else {})}
    found = pool.run(2 * plugin["cp_size"], functools.partial(row_cases.train, kind, plugin, **options))
    (expected,) = pool.run(1, functools.partial(row_cases.train, kind, **options))
    for ours in found:
        for name in expected["evaluation"].keys() - {"epoch", "eval_num_tokens"}:
            assert ours["evaluation"][name] == pytest.approx(expected["evaluation"][name], rel=1e-9), name


def test_evaluation_with_batches_that_readers_split(pool):
    """Readers get 2 rows of each batch of 4."""
    options = {"eval_rows": 7, "learning_rate": 0.0, "max_steps": 1}
    split = {"per_device_eval_batch_size": 4, "accelerator_config": {"split_batches": True}}
    found = pool.run(2, functools.partial(row_cases.train, "dpo", {"cp_size": 1}, **split, **options))
    (expected,) = pool.run(1, functools.partial(row_cases.train, "dpo", per_device_eval_batch_size=2, **options))
    for ours in found:
        assert ours["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-9)


def test_evaluation_of_a_dataset_without_a_length(pool):
    options = {"eval_rows": 5, "streams": True}
    compare(pool, 2, 1, "dpo", {"cp_size": 2}, **options)


DPO_LOSSES = {
    **dict.fromkeys(("sigmoid", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired"), {}),
    **dict.fromkeys(("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"), {}),
    "exo_pair": {"label_smoothing": 0.01},
    "robust": {"label_smoothing": 0.1},
}
GRPO_LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"]
KTO_LOSSES = ["kto", "apo_zero_unpaired"]


def compared_with(module, name):
    """Return the strings that a module's code compares a variable or attribute of this name with."""
    found = set()
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if (
            isinstance(node, ast.Compare)
            and (getattr(node.left, "id", None) or getattr(node.left, "attr", None)) == name
        ):
            found |= {each.value for each in ast.walk(node.comparators[0]) if isinstance(each, ast.Constant)}
    return found


@pytest.mark.parametrize(
    "module, classed", [(dpo_trainer, DPO_LOSSES), (grpo_trainer, GRPO_LOSSES), (kto_trainer, KTO_LOSSES)]
)
def test_all_loss_types_are_tested(module, classed):
    assert compared_with(module, "loss_type") == {*classed}


def test_losses_of_dpo(pool):
    """One trainer per loss, in one step with all of them."""
    for smoothing in (0.1, 0.01):
        names = [name for name, needs in DPO_LOSSES.items() if needs.get("label_smoothing", 0.1) == smoothing]
        compare(pool, 2, 1, "dpo", {"cp_size": 2}, loss_type=names, label_smoothing=smoothing, max_steps=1)
    for options in ({"ld_alpha": 0.5}, {"use_weighting": True}, {"f_divergence_type": "js_divergence"}):
        compare(pool, 2, 1, "dpo", {"cp_size": 2}, max_steps=1, **options)
    compare(pool, 2, 1, "kto", {"cp_size": 2}, max_steps=1, loss_type="apo_zero_unpaired")


@pytest.mark.parametrize("batches", ["own", "turns"])
def test_losses_of_grpo(pool, batches):
    settings = [{"loss_type": name} for name in GRPO_LOSSES if name != "dapo"]
    settings += [{"importance_sampling_level": "sequence", "loss_type": "grpo"}, {"entropy_coef": 0.01}]
    for options in settings:
        compare(pool, 2, 2, "grpo", {"cp_size": 2, "batches": batches}, max_steps=1, rows=8, **options)


@pytest.mark.parametrize("head", row_cases.HEADS)
def test_classification_heads(pool, head):
    options = {"include_for_metrics": ["inputs", "loss"]}
    found = pool.run(2, functools.partial(row_cases.classify, head, {"cp_size": 2}, **options))
    (expected,) = pool.run(1, functools.partial(row_cases.classify, head, **options))
    check(found, expected, metrics=1e-7)  # transformers averages losses in fp32


@pytest.mark.parametrize("averaged", [True, False])
@pytest.mark.parametrize(
    "processes, plugin",
    [(1, {"cp_size": 1}), (2, {"cp_size": 2}), (4, {"cp_size": 2}), (2, {"cp_size": 2, "batches": "own"})],
    ids=str,
)
def test_classification_with_a_loss_function(pool, processes, plugin, averaged):
    readers = processes if plugin.get("batches") else processes // plugin["cp_size"]
    options = {"compute_loss_func": row_cases.loss_of_labels, "rows": 16}
    ours = {**options, "gradient_accumulation_steps": 4 // readers, "average_tokens_across_devices": averaged}
    found = pool.run(processes, functools.partial(row_cases.classify, "score", plugin, **ours))
    options["gradient_accumulation_steps"] = 4
    (expected,) = pool.run(1, functools.partial(row_cases.classify, "score", **options))
    for ours in found:
        assert difference(ours["parameters"], expected["parameters"]) < 1e-12
        assert ours["logs"][0]["loss"] == pytest.approx(expected["logs"][0]["loss"], rel=1e-6)
        assert ours["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-6)


def test_classification_with_several_readers(pool):
    """Stock transformers would multiply such a loss by the number of processes."""
    for plugin in ({"cp_size": 2}, {"cp_size": 4, "batches": "own"}, {"cp_size": 1}):
        processes = 4 if plugin["cp_size"] > 1 else 2
        readers = processes if plugin.get("batches") else processes // plugin["cp_size"]
        options = {"rows": 16, "include_for_metrics": ["inputs", "loss"]}
        ours = {**options, "gradient_accumulation_steps": 4 // readers, "side": "left"}
        found = pool.run(processes, functools.partial(row_cases.classify, "score", plugin, **ours))
        options["gradient_accumulation_steps"] = 4
        (expected,) = pool.run(1, functools.partial(row_cases.classify, "score", {"cp_size": 1}, **options))
        for ours in found:
            assert difference(ours["parameters"], expected["parameters"]) < 1e-12
            assert ours["evaluation"] == pytest.approx(expected["evaluation"], rel=1e-7)


@pytest.mark.parametrize(
    "plugin, processes", [({"cp_size": 2}, 2), ({"cp_size": 2}, 4), ({"cp_size": 2, "batches": "own"}, 2)]
)
def test_precomputed_references_equal_a_single_process(pool, plugin, processes):
    """7 rows at batch 2, which no number of readers divides."""
    options = {"learning_rate": 0.0, "max_steps": 1}
    found = pool.run(processes, functools.partial(row_cases.precompute, plugin, **options))
    (expected,) = pool.run(1, functools.partial(row_cases.precompute, **options))
    for ours in found:
        assert ours["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-7)  # stored in fp32
    if processes == plugin["cp_size"] and "batches" not in plugin:
        assert found[0]["logs"][0]["loss"] == pytest.approx(expected["logs"][0]["loss"], rel=1e-7)


def test_precomputing_for_a_dataset_in_memory_is_refused(pool):
    errors = pool.errors(2, functools.partial(row_cases.train, "dpo", {"cp_size": 2}, precompute_ref_log_probs=True))
    check_errors(errors, ConfigurationError, "this dataset is in memory")


def check_errors(errors, kind, message):
    for error in errors:
        assert type(error) is kind and message in str(error), error


@pytest.mark.parametrize(
    "kind, plugin, message",
    [
        ("grpo", {"batches": "shared"}, "would count as several generations per prompt"),
        ("reward", {"batches": "turns"}, "scores all rows of a batch at once. Use 'own'"),
        ("dpo", {"batches": "pooled"}, "batches is 'pooled'. Use 'shared', 'own' or 'turns'"),
    ],
)
def test_batches_that_do_not_suit_a_trainer_are_refused(pool, kind, plugin, message):
    errors = pool.errors(2, functools.partial(row_cases.train, kind, {"cp_size": 2, **plugin}))
    check_errors(errors, ConfigurationError, message)


def test_a_trainer_without_the_mixin_is_refused(pool):
    errors = pool.errors(2, row_cases.plain_trainer_with_a_plugin)
    check_errors(errors, ConfigurationError, "class MyTrainer(FlashCPTrainerMixin, DPOTrainer)")


def test_generations_that_do_not_divide_the_batch_are_refused_by_trl(pool):
    options = {"num_generations": 3, "rows": 8}
    errors = pool.errors(2, functools.partial(row_cases.train, "grpo", {"cp_size": 2}, **options))
    check_errors(errors, ValueError, "must be divisible by num_generations")


@pytest.mark.parametrize(
    "kind, options",
    [
        ("grpo", {"mask_truncated_completions": True, "rows": 8}),  # no completion ends, so rows are prompts
        ("dpo", {"max_length": 20}),
        ("dpo", {"max_length": 9, "truncation_mode": "keep_end"}),
        ("dpo", {"pad_to_multiple_of": 16}),
    ],
    ids=str,
)
def test_rows_without_completions_and_truncated_rows(pool, kind, options):
    compare(pool, 2, 1 if kind == "dpo" else 2, kind, {"cp_size": 2}, **options)


def trainers_of_trl():
    found = {}
    for package in (trl.trainer, trl.experimental):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("trainer"):
                continue
            try:
                loaded = importlib.import_module(module.name)
            except ImportError:  # needs packages that are not installed
                found[module.name.rpartition(".")[2]] = None
                continue
            found |= {
                f"{cls.__module__}.{name}": cls
                for name, cls in vars(loaded).items()
                if inspect.isclass(cls)
                and issubclass(cls, base_trainer._BaseTrainer)
                and cls.__module__ == loaded.__name__
            }
    return found


def test_every_trainer_of_trl_is_supported_or_refused_by_name():
    for name, cls in trainers_of_trl().items():
        short = name.rpartition(".")[2].removesuffix("Trainer")
        if cls in (None, base_trainer._BaseTrainer):
            continue
        known = name in trl_guards.ROW_TRAINERS or name == trl_guards._SFT
        assert known or short in trl_guards.REFUSED_TRAINERS, f"{name} is new: class it in trl_guards"


def test_the_router_loss_that_the_fused_head_takes_from_mixtral_is_shared(monkeypatch):
    from transformers.models.mixtral import modeling_mixtral

    current = modeling_mixtral.load_balancing_loss_func
    monkeypatch.setattr(modeling_mixtral, router_loss.FUNCTION, getattr(current, "_flashcp_stock", current))
    router_loss.share_router_losses(build_model("qwen3_moe"))
    assert hasattr(modeling_mixtral.load_balancing_loss_func, "_flashcp_stock")
