"""The recipes as a user runs them: shortened, with `accelerate launch` and their configurations, on two processes.

The quickstart starts interpreters as a user does. Other runs are forked from a process that has imported everything.
"""

import importlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from itertools import islice

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .accelerate_state import fresh_accelerate
from .launch_cases import ROOT, accelerate, accelerate_fsdp, run_forked


pytestmark = pytest.mark.usefixtures("forked")
KEYS = {
    "train_loss",
    "flashcp_first_loss",
    "flashcp_last_loss",
    "flashcp_kv_fraction",
    "flashcp_token_imbalance",
    "flashcp_pair_imbalance",
    "flashcp_gradient_error",
}
OUTCOMES = ("whole", "truncated", "split", "missing", "empty", "too_long", "no_assistant", "assistant_cut_off")


CPU = ["--config_file", "recipes/accelerate/cpu_cp2.yaml"]


def launch(*arguments):
    command = [sys.executable, "-m", "accelerate.commands.launch", *CPU, *map(str, arguments)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONWARNINGS": "default"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-4000:]
    return result


def launch_forked(script, directory, *arguments, num_processes=2):
    """Returns what a recipe prints that writes to this directory."""
    launcher = [*CPU, "--num_processes", str(num_processes), f"recipes/{script}.py"]
    arguments = [*launcher, *map(str, arguments), "--output_dir", str(directory)]
    return run_forked(accelerate, arguments, directory / "log")


def launch_sft(directory, *arguments, num_processes=2):
    return launch_forked("sft", directory, *arguments, num_processes=num_processes)


def metrics_of(directory):
    return json.loads((directory / "all_results.json").read_text())


def require_sums(metrics):
    assert metrics["data_rows"] == sum(metrics[f"data_{outcome}"] for outcome in OUTCOMES)


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """Run the quickstart on every fifth file of its corpus, which is created here as in sft.py."""
    directory = tmp_path_factory.mktemp("quickstart")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "recipes"))
        corpus, text_rows = importlib.import_module("stdlib_corpus"), importlib.import_module("text_rows")
        files = list(corpus.source_files())
        patch.setattr(corpus, "source_files", lambda: files[::5])
        text_rows.use_default_data(text_rows.DataArguments(cache_dir=str(directory / "cache")), needs_tokenizer=True)
    result = launch(
        *("recipes/sft.py", "recipes/quickstart.yaml", "--window", 2048, "--max_steps", 6),
        *("--output_dir", directory / "model", "--cache_dir", directory / "cache"),
    )
    return directory / "model", result


@pytest.fixture(scope="module")
def texts(quickstart):
    """Return a part of the default corpus: a few long documents and some short ones."""
    corpus = quickstart[0].parent / "cache" / "python_stdlib.jsonl"
    lines = [line for line in corpus.read_text().splitlines() if len(line) < 20_000][:40]
    path = corpus.with_name("some.jsonl")
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def recipes(monkeypatch):
    """Return the modules of the recipes by name."""
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    return importlib.import_module


@pytest.fixture(scope="module")
def all_chats(tmp_path_factory):
    """Conversations about the standard library's smaller files."""
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    with pytest.MonkeyPatch.context() as patch, path.open("w") as lines:
        patch.syspath_prepend(str(ROOT / "recipes"))
        stdlib, corpus = importlib.import_module("stdlib_chats"), importlib.import_module("stdlib_corpus")
        for name, source in corpus.source_files():
            if len(source) < 4_000 and (answers := list(stdlib.docstrings(source).items())[:2]):
                lines.write(json.dumps({"messages": stdlib.conversation(name, source, answers)}) + "\n")
    return path


@pytest.fixture
def chats(all_chats, tmp_path):
    return shutil.copy(all_chats, tmp_path / "chats.jsonl")


@pytest.fixture
def pairs(recipes, tmp_path):
    """Return preferences on the first functions of the standard library."""
    stdlib, corpus = recipes("stdlib_pairs"), recipes("stdlib_corpus")
    made = (stdlib.pair(*each) for _, source in corpus.source_files() for each in stdlib.functions(source))
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(each) for each in islice(made, 20)))
    return path


def test_quickstart_trains_and_reports(quickstart):
    directory, result = quickstart
    metrics = metrics_of(directory)
    assert KEYS <= metrics.keys()
    assert metrics["flashcp_last_loss"] < metrics["flashcp_first_loss"] - 0.1
    assert metrics["flashcp_gradient_error"] < 1e-5
    assert 0 < metrics["flashcp_kv_fraction"] < 1
    assert metrics["flashcp_token_imbalance"] < 1.01 and metrics["flashcp_pair_imbalance"] <= 1.05
    assert metrics["data_whole"] > 0 and metrics["data_truncated"] > 0 and metrics["data_tokens_left_out"] > 0
    require_sums(metrics)
    for line in ("loss of the first step", "KV moved, as a share", "gradient error against a single process"):
        assert line in result.stdout
    assert "rows read" in result.stdout and "kept, truncated to the window" in result.stdout


def test_a_log_file_gets_a_table_and_no_bars(quickstart):
    """Once, from the main process, without raw dictionaries."""
    result = quickstart[1]
    lines = [line.split() for line in result.stdout.splitlines()]
    (head,) = [number for number, line in enumerate(lines) if line[:3] == ["step", "loss", "tokens/s"]]
    assert [line[0] for line in lines[head + 1 : head + 3]] == ["1", "6"]
    assert all(len(line) == 5 and line[-1].endswith("%") for line in lines[head + 1 : head + 3])
    assert "{'" not in result.stdout + result.stderr and "it/s" not in result.stderr


def test_the_quickstart_calls_nothing_that_is_deprecated_and_warns_of_nothing_here(quickstart):
    _, result = quickstart
    lines = (result.stdout + result.stderr).splitlines()
    assert not [line for line in lines if "FutureWarning" in line or "DeprecationWarning" in line]
    assert not [line for line in lines if "Warning: " in line and ("/hf_flashcp/" in line or "/recipes/" in line)]


def test_the_result_is_a_plain_transformers_model(quickstart):
    directory, _ = quickstart
    code = f"""
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({str(directory)!r})
tokenizer = AutoTokenizer.from_pretrained({str(directory)!r})
inputs = tokenizer("import os", return_tensors="pt")
assert model(**inputs).logits.isfinite().all()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_groups_get_packs_that_take_equally_long(quickstart, texts, tmp_path):
    directory, _ = quickstart
    launch_sft(
        tmp_path,
        *("recipes/quickstart.yaml", "--model_name_or_path", directory, "--data_files", texts),
        *("--window", 1024, "--max_steps", 2, "--check_gradient", "false"),
        num_processes=4,
    )
    assert "flashcp_micro_step_imbalance" in (tmp_path / "trainer_state.json").read_text()
    metrics = metrics_of(tmp_path)
    require_sums(metrics)
    assert metrics["data_packed_rows"] > 2 and metrics["flashcp_last_loss"] > 0


def test_chats_train_on_the_assistants_tokens(quickstart, chats, tmp_path):
    """Some rows cannot be used; the run has another strategy and accumulation.

    It uses fp64, because the attention of an untrained model is almost uniform, and gradients of its queries and keys
    are small differences of large numbers.
    """
    conversations = [json.loads(line)["messages"] for line in chats.read_text().splitlines()]
    with chats.open("a") as lines:
        lines.write('{"messages": null}\n{"messages": [{"role": "user", "content": "Nobody answers."}]}\n{"messa\n')
    launch_sft(
        tmp_path,
        *("recipes/chat_sft.yaml", "--model_name_or_path", quickstart[0], "--data_files", chats),
        *("--skip_corrupt_lines", "true", "--cache_dir", tmp_path / "cache"),
        *("--window", 1024, "--strategy", "per_seq", "--gradient_accumulation_steps", 2, "--max_steps", 6),
        *("--dtype", "float64", "--warmup_steps", 0, "--learning_rate", 3e-3),
    )
    metrics = metrics_of(tmp_path)
    require_sums(metrics)
    assert metrics["data_corrupt_lines"] == metrics["data_missing"] == metrics["data_no_assistant"] == 1
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    kept = [chat for chat in conversations if len(tokenizer.apply_chat_template(chat)["input_ids"]) <= 1024]
    assert 0 < len(kept) == metrics["data_documents"] == metrics["data_rows"] - metrics["data_too_long"] - 2
    answers = [message["content"] for chat in kept for message in chat if message["role"] == "assistant"]
    assert metrics["data_targets"] == sum(len(tokenizer(answer)["input_ids"]) + 1 for answer in answers)
    assert metrics["flashcp_gradient_error"] < 1e-6
    assert metrics["flashcp_last_loss"] < metrics["flashcp_first_loss"] - 0.1


def test_a_longer_window_reaches_the_model(quickstart, texts, tmp_path):
    launch_sft(
        tmp_path,
        *("recipes/long_window.yaml", "--model_name_or_path", quickstart[0], "--data_files", texts),
        *("--window", 1024, "--max_steps", 2, "--dtype", "float64"),
    )
    metrics = metrics_of(tmp_path)
    require_sums(metrics)
    assert metrics["data_split"] > 0 and metrics["data_tokens_left_out"] == 0
    assert metrics["data_documents"] > metrics["data_rows"]
    assert metrics["flashcp_gradient_error"] < 1e-6
    assert math.isfinite(metrics["flashcp_last_loss"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    before = AutoModelForCausalLM.from_pretrained(quickstart[0])
    assert model.config.rope_parameters == {
        **before.config.rope_parameters,
        **{"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8192},
    }
    assert (before.config.max_position_embeddings, model.config.max_position_embeddings) == (8192, 16384)
    frequencies, scaling = ROPE_INIT_FUNCTIONS["yarn"](model.config)
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies) and scaling > 1
    assert not torch.equal(frequencies, before.model.rotary_emb.inv_freq)


def test_a_million_tokens_in_small(quickstart, texts, tmp_path):
    """All settings of the recipe and of its accelerate file, but the model and the sizes."""
    arguments = [
        *("--config_file", "recipes/accelerate/fsdp2_cp8.yaml", "--num_processes", 2),
        *("--parallelism_config_cp_size", 2, "recipes/sft.py", "recipes/million.yaml"),
        *("--model_name_or_path", quickstart[0], "--data_files", texts, "--window", 1024, "--max_steps", 2),
        *("--warmup_steps", 0, "--save_strategy", "no", "--output_dir", tmp_path),
    ]
    printed = run_forked(accelerate_fsdp, list(map(str, arguments)), tmp_path / "log")
    assert printed.count("a layer is offloaded") == 2 * 2 * 2  # processes, steps, layers
    metrics = metrics_of(tmp_path)
    require_sums(metrics)
    assert metrics["data_split"] > 0 == metrics["data_tokens_left_out"] and 0 < metrics["flashcp_kv_fraction"] < 1
    assert math.isfinite(metrics["flashcp_last_loss"])
    before, after = (load_file(directory / "model.safetensors") for directory in (quickstart[0], tmp_path))
    assert torch.equal(after.pop("lm_head.weight"), after["model.embed_tokens.weight"])  # tied, but saved twice
    assert before.keys() == after.keys()
    for name, parameter in after.items():
        assert parameter.dtype == torch.float32 and 0 < (parameter - before[name]).norm() < before[name].norm() / 10
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.max_position_embeddings == 2**20 and config.rope_parameters["factor"] == 32


def test_an_adapter_is_saved_for_plain_peft(quickstart, texts, tmp_path):
    launch_sft(
        tmp_path,
        *("recipes/lora.yaml", "--model_name_or_path", quickstart[0], "--data_files", texts),
        *("--window", 512, "--max_steps", 2, "--lora_r", 4, "--dtype", "float64"),
    )
    metrics = metrics_of(tmp_path)
    require_sums(metrics)
    assert metrics["flashcp_gradient_error"] < 1e-6
    assert (tmp_path / "adapter_model.safetensors").exists()
    assert not (tmp_path / "model.safetensors").exists()
    assert "flashcp" not in (tmp_path / "adapter_config.json").read_text()
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    assert model.peft_config["default"].r == 4
    tokens = torch.arange(32)[None]
    with torch.no_grad():
        adapted = model(tokens).logits
        with model.disable_adapter():
            assert not torch.equal(adapted, model(tokens).logits)
    assert adapted.isfinite().all()


def test_trl_trains_on_its_own_packing(quickstart, chats, tmp_path):
    printed = launch_forked(
        *("trl_sft", tmp_path, "--config", "recipes/trl_sft.yaml", "--model_name_or_path", quickstart[0]),
        *("--dataset_name", chats, "--max_length", 1024, "--max_steps", 3),
    )
    metrics = metrics_of(tmp_path)
    assert math.isfinite(metrics["train_loss"]) and 0 < metrics["flashcp_kv_fraction"] < 1
    assert re.search(r"step +loss +tokens/s", printed) and "{'" not in printed
    AutoModelForCausalLM.from_pretrained(tmp_path)


def test_trl_trains_on_preferences(quickstart, pairs, tmp_path):
    printed = launch_forked(
        *("dpo", tmp_path, "--config", "recipes/dpo.yaml", "--model_name_or_path", quickstart[0]),
        *("--dataset_name", pairs, "--per_device_train_batch_size", 4, "--max_steps", 3, "--warmup_steps", 0),
    )
    metrics = metrics_of(tmp_path)
    assert metrics["train_loss"] < math.log(2) and metrics["last_rewards/margins"] > 0
    assert 0 <= metrics["flashcp_kv_fraction"] < 1 and 0 <= metrics["eval_rewards/accuracies"] <= 1
    assert re.search(r"step .* accuracy +margin", printed) and "Accuracy on held-out pairs" in printed
    AutoModelForCausalLM.from_pretrained(tmp_path)


def test_trl_trains_on_rewards(quickstart, pairs, tmp_path):
    printed = launch_forked(
        *("grpo", tmp_path, "--config", "recipes/grpo.yaml", "--model_name_or_path", quickstart[0]),
        *("--dataset_name", pairs, "--per_device_train_batch_size", 8, "--max_completion_length", 16),
        *("--max_steps", 2),
    )
    metrics = metrics_of(tmp_path)
    assert math.isfinite(metrics["train_loss"]) and 0 < metrics["first_reward"] < 1
    assert 0 <= metrics["flashcp_kv_fraction"] < 1
    assert re.search(r"step .* reward +length", printed) and re.search(r"reward .* \d\.\d{3}", printed)
    AutoModelForCausalLM.from_pretrained(tmp_path)


def test_the_loop_trains(quickstart, texts, tmp_path):
    printed = launch_forked(
        *("accelerator_loop", tmp_path, "--model_name_or_path", quickstart[0], "--data_files", texts),
        *("--window", 512, "--max_steps", 3, "--eval_steps", 3, "--learning_rate", 1e-3),
    )
    losses = [float(loss) for loss in re.findall(r"step \d: loss (\S+)", printed)]
    assert len(losses) == 3 and all(map(math.isfinite, losses))
    AutoModelForCausalLM.from_pretrained(tmp_path)


def test_the_loop_resumes(quickstart, texts, tmp_path, recipes, monkeypatch, capsys):
    """In this process with cp_size 1, two steps and two more equal four."""
    loop = recipes("accelerator_loop")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def run(directory, *arguments):
        fresh_accelerate()
        fixed = [
            "--model_name_or_path",
            quickstart[0],
            "--data_files",
            texts,
            "--window",
            512,
            "--output_dir",
            directory,
        ]
        monkeypatch.setattr(sys, "argv", ["accelerator_loop.py", *map(str, [*fixed, *arguments])])
        loop.main()
        fresh_accelerate()
        return re.findall(r"(step \d: .*)", capsys.readouterr().out)

    whole = run(tmp_path / "whole", "--max_steps", 4, "--eval_steps", 2)
    halves = run(tmp_path / "halves", "--max_steps", 2)
    halves += run(tmp_path / "halves", "--max_steps", 4, "--resume_from_checkpoint", "true")
    assert whole == halves and len(whole) == 6


def test_templates_that_trl_knows_get_their_marks(quickstart, recipes, tmp_path):
    from trl.chat_template_utils import qwen3_chat_template

    text_rows, path = recipes("text_rows"), tmp_path / "template.jinja"
    for template, marked in ((qwen3_chat_template, True), ("{{ messages[0].content }}", False)):
        path.write_text(template)
        data_args = text_rows.DataArguments(messages_column="messages", chat_template_path=str(path))
        found = text_rows.load_tokenizer(quickstart[0], data_args).chat_template
        assert ("{% generation %}" in found or "{%- generation %}" in found) == marked


def test_the_data_table_names_what_was_not_used(quickstart, recipes, tmp_path, capsys):
    """Chats have tools, which one template ignores and another one uses."""
    text_rows = recipes("text_rows")
    data, template = tmp_path / "chats.jsonl", tmp_path / "template.jinja"
    messages = [{"role": "assistant", "content": "Hello!"}, {"role": "user", "content": "Hi."}] * 2
    row = {"id": 7, "messages": messages, "tools": [{"name": "f"}], "chat_template_kwargs": {"mood": "calm"}}
    data.write_text(json.dumps(row))
    source = (ROOT / "recipes" / "chat_template.jinja").read_text()
    for prefix, unused in (("", ["id", "tools", "chat_template_kwargs.mood"]), ("{{ mood }}{{ tools }}", ["id"])):
        template.write_text(prefix + source)
        data_args = text_rows.DataArguments(
            messages_column="messages", data_files=[str(data)], chat_template_path=str(template)
        )
        tokenizer = text_rows.load_tokenizer(quickstart[0], data_args)
        rows, counts = text_rows.make_packed_rows(tokenizer, data_args)
        assert counts["unused_columns"] == unused
        assert tokenizer.decode(rows[0]["input_ids"]).startswith("calm" if prefix else "<|assistant|>")
        text_rows.print_data_table(counts)
        printed = capsys.readouterr().out
        assert "columns not used" in printed and unused[-1] in printed
        assert "of these, started by the assistant" in printed
        assert json.loads(json.dumps(counts)) == counts


def test_a_window_beyond_the_models_positions(recipes, quickstart):
    sft = recipes("sft")
    arguments = ["--model_name_or_path", str(quickstart[0]), "--window", "16384", "--output_dir", "unused"]
    model_args, data_args, *_ = sft.parse_arguments(arguments)
    with pytest.raises(SystemExit, match="16384 tokens is longer than the model's max_position_embeddings 8192"):
        sft.make_model(model_args, data_args, None)


NOTEBOOK = ROOT / "recipes" / "tour.ipynb"


def test_the_notebook_runs(quickstart, texts, tmp_path, monkeypatch):
    """With a few short steps, on some of the corpus."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("TOUR_OUTPUT", str(tmp_path))
    shorter = ["--window", 512, "--max_steps", 2, "--data_files", texts, "--cache_dir", texts.parent]
    monkeypatch.setenv("TOUR_ARGUMENTS", " ".join(map(str, shorter)))
    notebook = nbformat.read(NOTEBOOK, 4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    assert any("the gradients are the same up to rounding" in str(cell.get("outputs")) for cell in notebook.cells)
    assert (tmp_path / "run" / "report.html").exists()
