"""Long runs and many random cases: `python -m pytest -m load`. A sample of each runs with all other tests.

A failure names its seed and number: `check_random_plan(seed, number)` and `random_training(seed, number)` in
`tests/load_cases.py` repeat the case.
"""

import secrets

import numpy as np
import pytest
from tqdm import tqdm

from hf_flashcp.data.lengths import LENGTH_DISTRIBUTIONS, sample_pack
from hf_flashcp.distributed.workers import WorkerPool
from hf_flashcp.plan.report import plan_costs
from hf_flashcp.planning import STRATEGIES, plan_documents
from tests import load_cases, model_cases
from tests.independent_plan_checker import assert_caps, check_plan
from tests.test_models import FP64, check


CACHES = ("_causal_mask", "_window_edge_mask", "_dealt", "_calls_on", "_searched", "_fastest")
IMPORTS = "import tests.load_cases"  # starting workers takes long on a busy machine
COUNTS = ("process groups", "open files", "threads", "Python threads", "store keys")


def assert_nothing_grows(found):
    """Check that all counts are equal at every measurement, except those of caches that are still filling."""
    for one, other in zip(found, found[1:]):
        assert {name: one[name] for name in COUNTS} == {name: other[name] for name in COUNTS}
        for name, size in other["kept"].items():
            assert size == one["kept"][name] or name.endswith(CACHES) and size <= 128, (name, size)


def growth(found, name):
    """Return the growth per step, from a line through the measurements."""
    return np.polyfit([each["step"] for each in found], [each[name] for each in found], 1)[0]


def test_a_short_training_leaves_nothing_behind(pool):
    for found in pool.run(2, load_cases.soak, 30, 10, 2):
        assert_nothing_grows(found)


@pytest.mark.load
@pytest.mark.parametrize("cp_size", [2, 4])
def test_two_thousand_steps_leave_nothing_behind(cp_size, capsys):
    """From step 1000 on, memory and Python's objects do not grow either: caches are full, and the allocator is warm.

    The token ids of a pack take 2 kB.
    """
    with WorkerPool() as pool:
        pool.run(cp_size, exec, IMPORTS, timeout=600)
        ranks = pool.run(cp_size, load_cases.soak, 2000, 100, timeout=3600)
    late = [[each for each in found if each["step"] >= 1000] for found in ranks]
    kb = [1000 * growth(found, "MB") for found in late]
    objects = [growth(found, "objects") for found in late]
    with capsys.disabled():
        print(f"\n\ncp_size {cp_size}, rank 0\n\n step      MB   objects  {'  '.join(COUNTS)}")
        for each in ranks[0]:
            counts = "  ".join(f"{each[name]:{len(name)}}" for name in COUNTS)
            print(f"{each['step']:5} {each['MB']:7.1f} {each['objects']:9,}  {counts}")
        print(f"\nfrom step 1000 on, on any rank: at most {max(kb):.2f} kB and {max(objects):.3f} objects a step")
    for found in late:
        assert_nothing_grows(found)
    assert max(kb) < 2 and max(objects) < 0.5


@pytest.mark.parametrize("seed", range(2))
def test_a_few_random_plans(seed):
    for number in range(80):
        load_cases.check_random_plan(seed, number)


@pytest.mark.load
def test_twenty_thousand_random_plans(capsys):
    seed = secrets.randbits(32)
    with capsys.disabled():
        for number in tqdm(range(20_000), desc=f"random plans, seed {seed}", unit=" plans"):
            try:
                load_cases.check_random_plan(seed, number)
            except Exception:
                print(f"\ncheck_random_plan({seed}, {number}) failed")
                raise


def check_training(pool, seed, number):
    """Check the largest error, with a loss in fp64."""
    world_size, args = load_cases.random_training(seed, number)
    results = pool.run(world_size, load_cases.training_errors, *args)
    try:
        check(results, FP64)
    except AssertionError:
        print(f"\nrandom_training({seed}, {number}): {world_size} ranks, {args}\n{results}")
        raise
    return max(max(errors[:2]) for by_strategy in results for errors in by_strategy.values())


@pytest.mark.parametrize("number", range(6))
def test_a_few_random_trainings_are_exact(pool, number):
    """Lengths, windows, stages, and whether KV is kept are random; `test_models` tests each family on one pack."""
    check_training(pool, 0, number)


@pytest.mark.load
def test_five_hundred_random_trainings_are_exact(pool, capsys):
    seed = secrets.randbits(32)
    with capsys.disabled():
        progress = tqdm(range(500), desc=f"random trainings, seed {seed}", unit=" trainings")
        errors = [check_training(pool, seed, number) for number in progress]
        print(f"\nlargest relative error of a gradient: {max(errors):.1e}")


@pytest.mark.load
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_sixteen_processes_are_exact(sixteen, strategy):
    """Sixteen processes run on any number of cores."""
    for error in sixteen.run(16, model_cases.family_errors, "gemma3", [70, 3, 40, 1, 25, 33], [strategy]):
        assert error < FP64


@pytest.fixture(scope="module")
def sixteen():
    with WorkerPool() as workers:
        workers.run(16, exec, IMPORTS, timeout=600)
        yield workers


@pytest.mark.load
@pytest.mark.parametrize("name", LENGTH_DISTRIBUTIONS)
def test_a_thousand_ranks(name, capsys):
    """Check partition and caps of 4,194,304 tokens on 1,024 ranks, and the transfers between a few ranks."""
    lengths = sample_pack(name, 2**22, seed=0)
    plan = plan_documents(lengths, 1024)
    counts = check_plan(lengths, 1024, plan.slices)
    assert_caps(counts, 1.0)
    imbalance = counts["pairs"].max() / counts["pairs"].mean()
    assert imbalance <= 1.05
    costs = plan_costs(plan)
    assert costs["kv_received"] == counts["received"].tolist() and costs["kv_sent"] == counts["sent"].tolist()
    travels = load_cases.check_layouts(plan, [0, 1, 2, 511, 512, 1022, 1023])
    with capsys.disabled():
        print(
            f"\n{name}: {len(lengths):,} documents, {sum(map(len, plan.slices)):,} slices, planned in "
            f"{plan.planning_seconds:.2f} s; pairs {imbalance:.4f} of the mean, KV {costs['kv_fraction']:.4f} of an "
            f"all-gather; {travels:,} tokens travel between the seven ranks"
        )
