"""The recipe as a user runs it: `accelerate launch` with the quickstart's configuration, shortened."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file


ROOT = Path(__file__).parent.parent
KEYS = {
    "train_loss",
    "flashcp_first_loss",
    "flashcp_last_loss",
    "flashcp_kv_fraction",
    "flashcp_token_imbalance",
    "flashcp_pair_imbalance",
    "flashcp_gradient_error",
}


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_configs_are_read_and_fit(path):
    config = load_config_from_file(str(path))
    parallelism = config.parallelism_config
    assert parallelism["parallelism_config_cp_backend"] == "flashcp"
    assert config.num_processes % parallelism["parallelism_config_cp_size"] == 0
    assert config.distributed_type in ("FSDP", "MULTI_GPU")
    if config.distributed_type == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2


def launch(*arguments):
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", "recipes/accelerate/cpu_cp2.yaml", "recipes/sft.py", "recipes/quickstart.yaml"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(
        [*command, *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    directory = tmp_path_factory.mktemp("quickstart")
    result = launch("--output_dir", directory / "model", "--cache_dir", directory / "cache", "--max_steps", 6)
    assert result.returncode == 0, result.stderr[-4000:]
    return directory / "model", result


def test_quickstart_trains_and_reports(quickstart):
    directory, result = quickstart
    metrics = json.loads((directory / "all_results.json").read_text())
    assert KEYS <= metrics.keys()
    assert metrics["flashcp_last_loss"] < metrics["flashcp_first_loss"]
    assert metrics["flashcp_gradient_error"] < 1e-5
    assert 0 < metrics["flashcp_kv_fraction"] < 1
    assert metrics["flashcp_token_imbalance"] < 1.01 and metrics["flashcp_pair_imbalance"] <= 1.05
    assert "6/6" in result.stderr  # the progress bar
    for line in ("loss, first step", "KV moved against all-gather", "first gradient against a single process"):
        assert line in result.stdout


def test_the_result_is_a_plain_transformers_model(quickstart):
    directory, _ = quickstart
    code = f"""
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({str(directory)!r})
tokenizer = AutoTokenizer.from_pretrained({str(directory)!r})
inputs = tokenizer("import os", return_tensors="pt")
assert model(**inputs).logits.isfinite().all()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_any_model_and_local_documents(quickstart, tmp_path):
    """A saved model by path, documents from a JSON-lines file, another strategy, accumulation."""
    directory, _ = quickstart
    lines = [json.dumps({"body": f"Document {i}. " + "word " * (40 * (i % 7) + 5)}) for i in range(40)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    result = launch(
        *("--model_name_or_path", directory, "--data_files", tmp_path / "data.jsonl", "--text_column", "body"),
        *("--window", 512, "--strategy", "per_seq", "--gradient_accumulation_steps", 2, "--max_steps", 2),
        *("--output_dir", tmp_path / "out", "--config_overrides", "{}"),
    )
    assert result.returncode == 0, result.stderr[-4000:]
    metrics = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert metrics["flashcp_gradient_error"] < 1e-5


def test_unknown_arguments_in_the_yaml_are_named(tmp_path):
    (tmp_path / "config.yaml").write_text("learning_rat: 1.0e-3\n")
    result = subprocess.run(
        [sys.executable, "recipes/sft.py", tmp_path / "config.yaml"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode != 0 and "unknown arguments learning_rat" in result.stderr
