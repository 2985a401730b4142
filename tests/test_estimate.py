import json
import subprocess
import sys
from importlib.resources import files

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_flashcp.bench.memory import CASES, LLAMA, RANK_CASES, compare, compare_on_ranks
from hf_flashcp.errors import ConfigurationError
from hf_flashcp.planning import CostModel, HardwareProfile, plan_documents
from hf_flashcp.planning.fit import Choice, best, choices, cp_sizes, usable_bytes
from hf_flashcp.planning.memory import PARTS, MemoryEstimate, TrainingSetup, estimate_memory, largest_window
from hf_flashcp.planning.memory_shape import MemoryShape
from hf_flashcp.planning.model_shape import LLAMA_3_8B
from tests.models import FAMILIES
from tests.test_cli import png_size, run


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Operators this small are no faster with more, and much slower on a busy machine, where threads wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def assert_near(found, within=0.10):
    for key in ("peak", "kept"):
        assert abs(found[key]["estimated"] / found[key]["measured"] - 1) < within, (key, found)


@pytest.mark.parametrize("name", CASES)
def test_estimate_against_measured_memory(name):
    config, options = CASES[name]
    assert_near(compare(config, options))


@pytest.mark.parametrize("name", RANK_CASES)
def test_estimate_against_measured_memory_of_ranks(pool, name):
    config, options = RANK_CASES[name]
    for found in pool.run(2, compare_on_ranks, config, options):
        assert_near(found)


@pytest.mark.parametrize("lengths", [(16,), (64,), (256,)])
@pytest.mark.parametrize("name", ["llama, bf16", "llama, fp32, autocast", "big vocabulary, bf16"])
def test_few_tokens_peak_elsewhere(name, lengths):
    config, options = CASES[name]
    assert_near(compare(config, options, lengths))


def test_received_kv_is_held_where_one_document_is_shared(pool):
    config = {**LLAMA, "num_key_value_heads": 8}
    for found in pool.run(2, compare_on_ranks, config, {"dtype": "bfloat16", "mixed_precision": "no"}, (1024,)):
        assert_near(found, within=0.02)


_FOUR_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
OTHER_FAMILIES = {
    "gemma3_text": {},
    "gpt_oss": _FOUR_EXPERTS,
    "mixtral": _FOUR_EXPERTS,
    "olmo2": {},
    "phi3": {"pad_token_id": 0},
    "starcoder2": {},
}


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_estimate_of_other_families(family):
    config = {**LLAMA, **OTHER_FAMILIES[family], "model_type": family, "num_hidden_layers": 4}
    assert_near(compare(config, {"dtype": "bfloat16", "mixed_precision": "no"}))


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_counted(family):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(FAMILIES[family])
    counted = sum(parameter.numel() for parameter in model.parameters())
    # Of models this small biases are several percent.
    assert abs(MemoryShape.from_config(model.config).parameters / counted - 1) < 0.05


def test_parameters_of_a_known_model():
    assert MemoryShape.from_config(LLAMA_3_8B).parameters == 8_030_261_248


SHAPE = MemoryShape.from_config(LLAMA_3_8B)
H100 = HardwareProfile.load("h100")


def test_fsdp2_shards_what_ddp_repeats():
    sharded = estimate_memory(SHAPE, TrainingSetup(gpus=16), 8192)
    # fp32 shards whatever the dtype: 4 bytes of weight, 8 of Adam's moments.
    assert sharded.parts["weights"] == pytest.approx(4 * SHAPE.parameters / 16)
    assert sharded.parts["optimizer"] == pytest.approx(8 * SHAPE.parameters / 16)
    assert sharded.moments["optimizer"]["gradients"] == pytest.approx(4 * SHAPE.parameters / 16)
    repeated = estimate_memory(SHAPE, TrainingSetup(gpus=16, sharding="ddp"), 8192)
    assert repeated.parts["weights"] == pytest.approx(2 * SHAPE.parameters)
    assert repeated.moments["optimizer"]["gathered"] == pytest.approx(2 * SHAPE.parameters)


def test_checkpointing_keeps_less_and_saving_attention_a_bit_more():
    kept = [
        estimate_memory(SHAPE, TrainingSetup(gpus=8, gradient_checkpointing=mode), 32768, received=32768).kept
        for mode in ("none", "attention-saving", "full")
    ]
    assert kept[0] > 2 * kept[1] and kept[1] > 1.3 * kept[2]


def test_received_kv_is_kept_up_to_a_bound():
    setup = TrainingSetup(gpus=8)
    few, many = (estimate_memory(SHAPE, setup, 1000, received=n).parts["received KV"] for n in (4000, 4001))
    assert (few, many) == (32 * 2 * 4000 * 8 * 256, 0)


@pytest.mark.parametrize("mode", ["none", "full", "attention-saving"])
def test_largest_window_is_the_largest(mode):
    setup = TrainingSetup(gpus=8, gradient_checkpointing=mode)
    window = largest_window(SHAPE, setup, 8, 60e9, received_share=1.5, sent_share=1.0)
    sizes = [estimate_memory(SHAPE, setup, n / 8, 1.5 * n / 8, n / 8, n).total for n in (window, window + 1024)]
    assert window > 0 and sizes[0] <= 60e9 < sizes[1]
    assert largest_window(SHAPE, setup, 8, 1e9) == 0


def test_choices_use_the_cost_model_s_times():
    lengths = [30000, 20000, 15536]
    found = choices(LLAMA_3_8B, H100, TrainingSetup(gpus=8), lengths)
    assert [choice.cp_size for choice in found] == [1, 2, 4, 8] == cp_sizes(8, 65536)
    model = CostModel.from_config(LLAMA_3_8B, H100)
    for choice in found:
        seconds = model.step_time(plan_documents(lengths, choice.cp_size, cost_model=model)).seconds
        assert choice.step_seconds == pytest.approx(seconds)
        assert choice.tokens_per_second == pytest.approx(8 / choice.cp_size * 65536 / seconds)
        assert choice.fits == (choice.memory.total <= usable_bytes(H100)) == (choice.largest_window >= 65536)
    slower = choices(LLAMA_3_8B, H100, TrainingSetup(gpus=8, gradient_checkpointing="full"), lengths)
    assert all(1.2 < b.step_seconds / a.step_seconds < 1.5 for a, b in zip(found, slower))


def _choice(cp_size, fits, tokens_per_second):
    memory = MemoryEstimate({"loss": dict.fromkeys(PARTS, 1.0)}, 1.0)
    return Choice(cp_size, memory, 1024, fits, 1.0, tokens_per_second, 0.0, 0.0)


@pytest.mark.parametrize(
    "rows, expected, reason",
    [
        ([(1, False, 9), (2, True, 100), (4, True, 100.5), (8, True, 80)], 2, "the smallest that fits"),
        ([(2, True, 100), (4, True, 150), (8, True, 151)], 4, "50% faster than cp_size 2"),
        ([(1, False, 9), (2, True, 5)], 2, "the only one that fits"),
        ([(1, False, 9)], None, "nothing fits"),
        ([(4, True, 9)], 4, "the one asked for"),
    ],
)
def test_the_choice(rows, expected, reason):
    chosen, why = best([_choice(*row) for row in rows])
    assert (chosen and chosen.cp_size) == expected and reason in why


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**LLAMA_3_8B, "model_type": "llama", "tie_word_embeddings": False}))
    return path


def test_command_prints_a_table(capsys, config):
    line = f"estimate --model {config.parent} --window 262144 --gpus 16 --gradient-checkpointing full"
    code, out, err = run(capsys, line)
    assert (code, err) == (0, "")
    assert out.startswith("8.03 billion parameters, loaded in bfloat16, bf16 mixed precision, fsdp2")
    assert "\ncp_size 8: the smallest that fits" in out
    for part in (*PARTS, "sum", "attention-saving"):
        assert f"\n  {part}" in out or f"\n{part}" in out
    table = out.splitlines()[3:9]
    assert len({len(row) for row in table}) == 1
    assert [row.split()[0] for row in table[1:]] == ["1", "2", "4", "8", "16"]


def test_command_as_json(capsys, config):
    line = f"estimate --model {config} --window 65536 --gpus 8 --gradient-checkpointing full"
    line += " --lengths-from pile --cp-size 8 --json"
    code, out, err = run(capsys, line)
    found = json.loads(out)
    assert (code, err) == (0, "") and found["cp_size"] == 8 and found["window"] == 65536 and found["documents"] > 1
    (choice,) = found["choices"]
    assert choice["memory"]["total"] == pytest.approx(sum(choice["memory"]["parts"].values()), abs=8)
    assert set(found["gradient_checkpointing"]) == {"none", "full", "attention-saving"}


def test_command_draws(capsys, config, tmp_path):
    path = tmp_path / "memory.png"
    line = f"estimate --model {config} --window 65536 --gpus 8 --gradient-checkpointing full --plot {path}"
    assert run(capsys, line)[0] == 0
    width, height = png_size(path)
    assert width > 800 and height > 500


@pytest.mark.parametrize(
    "options, message",
    [
        ("--window 4 --gpus 8 --cp-size 8", "A window of 4 tokens is too short for cp_size 8"),
        ("--window 0 --gpus 8", "--window must be at least 1 token"),
        ("--window 4096 --gpus 8 --cp-size 3", "cp_size 3 does not divide the 8 GPUs: choose one of 1, 2, 4, 8"),
        ("--window 4096 --gpus 0", "gpus must be at least 1"),
        ("--window 4096 --gpus 8 --hardware abacus", "There is no hardware profile 'abacus'"),
        ("--window 1048576 --gpus 8", "does not fit on 8 GPUs: the largest that does has "),
        ("--window 4096 --gpus 8 --sharding ddp --dtype float32", "less than 1,024 tokens, with cp_size"),
    ],
)
def test_errors(capsys, config, options, message):
    code, _, err = run(capsys, f"estimate --model {config} {options}")
    assert code == 2 and err.startswith("error: ") and message in err


def test_a_profile_without_memory(capsys, config, tmp_path):
    profile = json.loads((files("hf_flashcp.planning") / "hardware" / "h100.json").read_text())
    del profile["memory_bytes"]
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(profile))
    code, _, err = run(capsys, f"estimate --model {config} --window 4096 --gpus 8 --hardware {path}")
    assert code == 2 and "has no memory_bytes" in err


def test_a_config_without_sizes(capsys, tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"hidden_size": 64}')
    code, _, err = run(capsys, f"estimate --model {path} --window 4096 --gpus 8")
    assert code == 2 and "num_hidden_layers" in err


def test_unknown_setup():
    with pytest.raises(ConfigurationError, match="sharding is 'zero3': choose one of fsdp2, ddp"):
        TrainingSetup(sharding="zero3")


def test_estimating_imports_no_torch(config):
    line = f"estimate --model {config} --window 65536 --gpus 8 --gradient-checkpointing full".split()
    code = f"import sys; from hf_flashcp.cli import main; main({line!r}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
