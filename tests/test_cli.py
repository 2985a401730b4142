import json
import struct
import subprocess
import sys
import zlib

import pytest
from hypothesis import given

from hf_flashcp.bench.plans.table2 import padded_all_gather_fraction
from hf_flashcp.cli import main
from hf_flashcp.data import sample_pack
from hf_flashcp.plan import Topology
from hf_flashcp.planning import DEFAULT_STRATEGY, STRATEGIES, ShardPlan, plan_documents
from hf_flashcp.predict.model_shape import LLAMA_3_8B
from tests.packs import arbitrary_plans


pytestmark = pytest.mark.smoke


THREE_DOCUMENTS = """\
3 documents, 5,632 tokens, 4 ranks, strategy per_doc

rank  slices  tokens  attention pairs  KV received  KV sent
   0       6   1,408        2,261,696        4,224    2,112
   1       6   1,408        2,261,696        3,520    2,816
   2       6   1,408        2,261,696        2,816    3,520
   3       3   1,408        2,261,696        2,112    4,224
 sum      21   5,632        9,046,784       12,672   12,672

imbalance (max / mean)  tokens 1.000, attention pairs 1.000
KV moved                12,672 tokens of an all-gather's 16,896 (75.0%)
kernel calls            4 of torch_flash per layer on rank 0, which has the most attention pairs
  blocks started        132 per query head
  blocks useful         61 (46.2%)
digest                  557e9260622d12a589bc2ce76401b9d5df0cf39ba4da6d5ce51295dfd5b373eb

rank 0  doc 0 [0, 512)      doc 0 [3584, 4096)  doc 1 [0, 128)      doc 1 [896, 1024)
        doc 2 [0, 64)       doc 2 [448, 512)
rank 1  doc 0 [512, 1024)   doc 0 [3072, 3584)  doc 1 [128, 256)    doc 1 [768, 896)
        doc 2 [64, 128)     doc 2 [384, 448)
rank 2  doc 0 [1024, 1536)  doc 0 [2560, 3072)  doc 1 [256, 384)    doc 1 [640, 768)
        doc 2 [128, 192)    doc 2 [320, 384)
rank 3  doc 0 [1536, 2560)  doc 1 [384, 640)    doc 2 [192, 320)
"""


def run(capsys, line):
    """Run `flashcp {line}` in this process. Return its exit code, stdout and stderr."""
    try:
        code = main(line.split())
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def png_size(path):
    """Return width and height, after checking every chunk of the file and the number of its pixels."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    position, chunks = 8, []
    while position < len(data):
        (length,) = struct.unpack(">I", data[position : position + 4])
        kind, body = data[position + 4 : position + 8], data[position + 8 : position + 8 + length]
        assert struct.unpack(">I", data[position + 8 + length : position + 12 + length])[0] == zlib.crc32(kind + body)
        chunks.append((kind, body))
        position += 12 + length
    assert chunks[-1] == (b"IEND", b"")
    width, height, depth, colours = struct.unpack(">IIBB", chunks[0][1][:10])
    assert (depth, colours) == (8, 6)
    pixels = zlib.decompress(b"".join(body for kind, body in chunks if kind == b"IDAT"))
    assert len(pixels) == height * (4 * width + 1)
    return width, height


@given(arbitrary_plans())
def test_traffic_between_ranks_adds_up_to_the_report(plan):
    traffic, report = plan.kv_traffic().tolist(), plan.report()
    assert [sum(row) for row in traffic] == report["kv_sent"]
    assert [sum(column) for column in zip(*traffic)] == report["kv_received"]
    assert all(traffic[rank][rank] == 0 for rank in range(plan.cp_size))
    assert all(tokens >= 0 for row in traffic for tokens in row)


def test_traffic_of_a_zigzag():
    # Rank 0 holds [0, 4) and [12, 16), rank 1 the tokens between them: it receives 4 tokens and sends 8.
    assert plan_documents([16], 2, strategy="per_doc").kv_traffic().tolist() == [[0, 4], [8, 0]]


def test_table_of_three_documents(capsys):
    assert run(capsys, "plan --lengths 4096,1024,512 --cp-size 4 --strategy per_doc") == (0, THREE_DOCUMENTS, "")


def test_slices_are_listed_only_while_a_person_can_read_them(capsys):
    code, out, _ = run(capsys, "plan --lengths-from pile --window 131072 --cp-size 8 --strategy whole_doc")
    assert code == 0
    assert out.startswith("136 documents, 131,072 tokens, 8 ranks, strategy whole_doc\n")
    assert "doc 13" not in out and out.rstrip().splitlines()[-1].startswith("digest")
    assert "KV moved                0 tokens of an all-gather's 917,504 (0.0%)" in out
    table = out.splitlines()[2:12]
    assert len({len(line) for line in table}) == 1
    assert sum(int(line.split()[2].replace(",", "")) for line in table[1:9]) == 131_072


def test_layers_with_a_window_are_counted_separately(capsys):
    line = ["plan", "--lengths", "16,3", "--cp-size", "2", "--strategy", "per_seq", "--sliding-window", "4"]
    assert main(line) == 0
    assert "with a sliding window of 4" in capsys.readouterr().out
    assert main([*line, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["report"]["varlen_calls"] == [4, 4] and found["sliding_window_report"]["varlen_calls"] == [4, 4]
    # rank 0 holds [0,5) and [14,16) of the first document and all of the second, rank 1 the rest
    assert [found["report"]["kv_received"], found["sliding_window_report"]["kv_received"]] == [[9, 5], [3, 3]]
    assert sum(found["sliding_window_report"]["pairs"]) == 16 * 4 - 6 + 6


def test_singular(capsys):
    assert run(capsys, "plan --lengths 1 --cp-size 1")[1].startswith("1 document, 1 token, 1 rank, strategy ")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_json_is_the_plan(capsys, strategy):
    code, out, err = run(
        capsys,
        f"plan --lengths-from wlb_llm --window 20000 --seed 5 --cp-size 3 --strategy {strategy} --json "
        "--kernel flash_attn_3",
    )
    plan = plan_documents(sample_pack("wlb_llm", 20_000, seed=5), 3, strategy=strategy)
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert found == {
        "strategy": strategy,
        "digest": plan.digest,
        "plan": plan.to_dict(),
        "kernel": "flash_attn_3",
        "slowest_rank": max(range(3), key=plan.report()["pairs"].__getitem__),
        "report": plan.report(kernel="flash_attn_3"),
    }
    assert ShardPlan.from_dict(found["plan"]) == plan


def test_the_default_strategy_and_seed_are_the_library_s(capsys):
    found = json.loads(run(capsys, "plan --lengths-from pile --window 9000 --cp-size 2 --json")[1])
    assert found["strategy"] == DEFAULT_STRATEGY
    assert found["digest"] == plan_documents(sample_pack("pile", 9000), 2).digest


@pytest.mark.parametrize(
    "line, message",
    [
        ("--lengths 4,0,3 --cp-size 2", "error: Document 1 has 0 tokens."),
        ("--lengths 1,1 --cp-size 3", "error: The batch holds 2 tokens for cp_size 3"),
        ("--lengths 8 --cp-size 0", "error: cp_size must be a positive integer"),
        ("--lengths-from pile --cp-size 2", "error: --lengths-from needs --window"),
        ("--lengths 8 --window 8 --cp-size 2", "error: --window goes with --lengths-from"),
        ("--lengths-from pile --window 0 --cp-size 2", "error: window must be at least 1, got 0"),
        ("--lengths 8 --cp-size 2 --sliding-window 0", "error: A sliding window holds at least 1 key"),
        ("--lengths-from pile --window 9 --seed -1 --cp-size 2", "error: seed must be at least 0, got -1"),
    ],
)
def test_planning_errors_exit_with_2_and_a_sentence(capsys, line, message):
    code, out, err = run(capsys, f"plan {line}")
    assert (code, out) == (2, "")
    assert err.startswith(message) and err.count("\n") == 1


@pytest.mark.parametrize(
    "line, message",
    [
        ("", "required: COMMAND"),
        ("plan --cp-size 2", "one of the arguments --lengths --lengths-from is required"),
        ("plan --lengths 8", "required: --cp-size"),
        ("plan --lengths 8 --lengths-from pile --cp-size 2", "not allowed with argument"),
        ("plan --lengths 8,x --cp-size 2", "'8,x' is not a list of whole numbers separated by commas"),
        ("plan --lengths-from books --window 9 --cp-size 2", "invalid choice: 'books'"),
        ("plan --lengths 8 --cp-size 2 --strategy ring", "invalid choice: 'ring'"),
    ],
)
def test_wrong_arguments_exit_with_2(capsys, line, message):
    code, out, err = run(capsys, line)
    assert (code, out) == (2, "")
    assert message in err and "Traceback" not in err


def test_help_names_strategies_and_corpora(capsys):
    code, out, _ = run(capsys, "plan --help")
    assert code == 0
    assert "prolong64k" in out and all(strategy in out for strategy in STRATEGIES)


@pytest.mark.parametrize(
    "line",
    [
        "--lengths 4096,1024,512 --cp-size 4 --strategy per_doc",
        "--lengths-from pile --window 131072 --cp-size 8 --strategy whole_doc",
        "--lengths 8192 --cp-size 2 --strategy per_doc",
        "--lengths-from prolong64k --window 65536 --cp-size 12 --strategy per_doc",
        "--lengths 5 --cp-size 1",
    ],
)
def test_plot(capsys, tmp_path, line):
    path = tmp_path / "plan.png"
    code, out, err = run(capsys, f"plan {line} --json --plot {path}")
    assert (code, err) == (0, f"plot written to {path}\n")
    assert json.loads(out)["plan"]["lengths"]
    width, height = png_size(path)
    assert 1000 <= width <= 3000 and 300 <= height <= 2000
    assert path.stat().st_size > 10_000


def test_labels_of_a_plot(capsys, tmp_path):
    path = tmp_path / "plan.svg"
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):
        assert run(capsys, f"plan --lengths 8192 --cp-size 2 --strategy per_doc --plot {path}")[0] == 0
    text = path.read_text()
    for label in ("per_doc: 1 document, 8,192 tokens, 2 ranks", "[0, 2048)", "[2048, 6144)", "[6144, 8192)", "4,096"):
        assert label in text
    assert "75.0% of an all-gather" in text


def test_a_plot_that_cannot_be_written(capsys, tmp_path):
    for name, message in (("no/such/plan.png", "No such file or directory"), ("plan.docx", "docx")):
        code, out, err = run(capsys, f"plan --lengths 8 --cp-size 2 --json --plot {tmp_path / name}")
        assert (code, out) == (2, "")
        assert err.startswith("error: Cannot write the plot to ") and message in err


def test_a_plot_without_matplotlib_names_the_extra(capsys, tmp_path, monkeypatch):
    for module in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, module, None)
    code, out, err = run(capsys, f"plan --lengths 8 --cp-size 2 --plot {tmp_path / 'plan.png'}")
    assert (code, out) == (2, "")
    assert err == "error: Plots need matplotlib: pip install 'hf_flashcp[plot]'.\n"


def test_module_runs_without_torch(tmp_path):
    code = f"""
import runpy, sys
sys.modules["torch"] = sys.modules["transformers"] = None
sys.argv = ["hf_flashcp", "plan", "--lengths", "4096,1024,512", "--cp-size", "4", "--strategy", "per_doc"]
sys.argv += ["--plot", {str(tmp_path / "plan.png")!r}]
runpy.run_module("hf_flashcp", run_name="__main__")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == THREE_DOCUMENTS
    png_size(tmp_path / "plan.png")


def test_planning_does_not_import_matplotlib_or_torch():
    code = """
import sys
from hf_flashcp.cli import main
assert main(["plan", "--lengths", "8,4", "--cp-size", "2"]) == 0
assert not {"torch", "transformers", "matplotlib"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)


def test_exit_code_of_the_module():
    command = [sys.executable, "-m", "hf_flashcp", "plan", "--lengths", "0", "--cp-size", "1"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stdout == "" and result.stderr.startswith("error: Document 0 has 0 tokens.")


def test_caps_reach_the_planner(capsys):
    tight = run_json(capsys, "--lengths", "8,4,4", "--cp-size", "2", "--strategy", "flashcp")
    loose = run_json(capsys, "--lengths", "8,4,4", "--cp-size", "2", "--strategy", "flashcp", "--max-imbalance", "1.3")
    assert tight["report"]["kv_total"] == 6 and loose["report"]["kv_total"] == 0


def run_json(capsys, *arguments):
    assert main(["plan", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_bench_table2_counts_what_the_plans_say(capsys):
    assert main(["bench", "table2", "--window", "8192", "--packs", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["strategies"]) == set(STRATEGIES)
    per_doc = found["strategies"]["per_doc"]
    assert per_doc["saved_exact"] == pytest.approx(0.25, abs=0.02)
    assert main(["bench", "table2", "--window", "8192", "--packs", "3"]) == 0
    assert "paper: flashcp" in capsys.readouterr().out


def test_eq5_leaves_out_the_last_shard_of_each_document():
    # Rank 0 holds [0,4) and the last shard [12,16), rank 1 holds [4,12): 8 of 8 tokens per rank must be gathered.
    assert padded_all_gather_fraction(plan_documents([16], 2, strategy="per_doc")) == 1.0
    # Whole documents are their own last shards.
    assert padded_all_gather_fraction(plan_documents([8, 8], 2, strategy="whole_doc")) == 0.0
    # One rank shares one token, out of 6 tokens per rank.
    assert padded_all_gather_fraction(plan_documents([5, 4, 3], 2, strategy="flashcp")) == 1 / 6


def test_a_reader_that_stops_early_is_not_an_error():
    command = (
        f"{sys.executable} -m hf_flashcp plan --lengths-from pile --window 400000 --cp-size 64 --json | head -c 10"
    )
    result = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert result.stderr == "" and result.stdout.startswith("{")


def test_bench_agreement_measures(capsys):
    assert main(["bench", "agreement", "--processes", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["milliseconds"]["2"] > 0


def test_bench_layout_has_a_row_per_size_and_strategy(capsys):
    line = "bench layout --tokens 500 --cp-size 2 4 --strategies per_doc --ranks-per-node 2 --rounds 1"
    code, out, _ = run(capsys, line)
    assert code == 0 and "sliding window of 4,096, 2 ranks per node" in out
    found = json.loads(run(capsys, f"{line} --json")[1])["cases"]
    assert [(case["tokens"], case["strategy"]) for case in found] == [(1000, "per_doc"), (2000, "per_doc")]
    assert all(case["full"] > 0 and case["window"] > 0 and case["slices"] > 4 for case in found)


def test_bench_plan_prints_every_strategy(capsys):
    code, out, _ = run(capsys, "bench plan --lengths-from pile --window 9000 --cp-size 2")
    assert code == 0 and all(strategy in out for strategy in STRATEGIES)
    found = json.loads(run(capsys, "bench plan --lengths-from pile --window 9000 --cp-size 2 --json")[1])
    assert found["max_imbalance"] == 1.05
    assert run(capsys, "bench plan --packs 0")[0] == 2


def test_the_slowest_rank_is_the_predicted_one(capsys, tmp_path):
    """With a profile, the counts are those of the rank with the longest predicted step and of the model's heads."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**LLAMA_3_8B, "num_attention_heads": 8, "head_dim": 128}))
    line = f"plan --lengths-from pile --window 65536 --cp-size 4 --hardware h100 --model {path}"
    found = json.loads(run(capsys, f"{line} --json")[1])
    time, rank = found["step_time"], found["slowest_rank"]
    steps = [sum(parts) for parts in zip(*(time[name] for name in ("linear", "attention", "copies", "exposed")))]
    assert steps[rank] == max(steps)
    plan = ShardPlan.from_dict(found["plan"])
    assert found["report"] == plan.report(topology=Topology(8), kernel="torch_flash", query_heads=8)
    out = run(capsys, line)[1]
    counts = found["report"]
    assert f"{counts['varlen_calls'][rank]} of torch_flash per layer on rank {rank}, the slowest\n" in out
    assert f"blocks started        {counts['blocks_started'][rank]:,} per query head\n" in out
