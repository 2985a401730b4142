"""Parts of the recipes on their own: configurations, arguments, rotary embeddings, the table of training progress, and
the outputs that are committed with the notebook."""

import importlib
import re
from itertools import islice
from types import SimpleNamespace

import nbformat
import pytest
from accelerate.commands.config.config_args import load_config_from_file
from transformers import AutoConfig

from hf_flashcp.integrations.models.checkpointing import CHECKPOINTING_ARGUMENT

from .launch_cases import ROOT


@pytest.fixture
def recipes(monkeypatch):
    """Imports a module of the recipes by name."""
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    return importlib.import_module


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_configs_are_read_and_fit(path):
    config = load_config_from_file(str(path))
    parallelism = config.parallelism_config
    assert parallelism["parallelism_config_cp_backend"] == "flashcp"
    assert config.num_processes % parallelism["parallelism_config_cp_size"] == 0
    assert config.distributed_type in ("FSDP", "MULTI_GPU")
    if config.distributed_type == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2


def test_rows_of_the_progress_table(recipes, capsys):
    table = recipes("progress_table").ProgressTable(every=10)
    state = SimpleNamespace(is_world_process_zero=True, max_steps=25, global_step=0)
    table.on_train_begin(None, state, None)
    for step in range(1, 26):
        state.global_step = step
        table.on_step_end(None, state, None)
        table.on_log(None, state, None, {"loss": float(step), "flashcp_kv_fraction": 0.5})
        if step == 20:
            table.on_log(None, state, None, {"eval_loss": 1.25, "eval_runtime": 3.0})
    table.on_log(None, state, None, {"train_loss": 2.0, "train_runtime": 1.0})
    table.on_train_end(None, state, None)
    head, *rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert head == ["step", "loss", "tokens/s", "imbalance", "KV", "share"]
    assert rows == [
        ["1", "1.000", "50.0%"],
        ["10", "6.000", "50.0%"],
        ["20", "15.500", "50.0%"],
        ["20", "eval_loss", "1.2500"],
        ["25", "23.000", "50.0%"],
    ]
    state.is_world_process_zero = False
    table.on_train_begin(None, state, None)
    table.on_log(None, state, None, {"loss": 1.0})
    assert capsys.readouterr().out == ""


def test_pairs_prefer_the_docstring_to_its_words_in_another_order(recipes):
    stdlib = recipes("stdlib_pairs")
    docstring = '"""Return x,\n    and x  alone.\n    """'
    source = f"@cache\ndef f(x):\n    {docstring}\n    return x  # as it is\n\n\ndef g():\n    {docstring}\n"
    assert list(stdlib.functions(source)) == [("def f(x):\n    return x  # as it is", "Return x,\nand x  alone.")]
    found = [
        each for _, text in islice(recipes("stdlib_corpus").source_files(), 20) for each in stdlib.functions(text)
    ]
    assert len(found) > 20
    for code, docstring in [*found, ("", "again " * 9 + "once")]:
        made = stdlib.pair(code, docstring)
        assert made == stdlib.pair(code, docstring) and code in made["prompt"][0]["content"]
        assert docstring not in made["prompt"][0]["content"]
        true, mixed = (made[name][0]["content"] for name in ("chosen", "rejected"))
        assert true == docstring != mixed and sorted(true.split()) == sorted(mixed.split())
        assert re.findall(r"\s+", true) == re.findall(r"\s+", mixed)


def test_means_of_the_first_and_last_values(recipes, capsys):
    history = [{"loss": 9.0}, *({"reward": float(step)} for step in range(1, 11))]
    trainer = SimpleNamespace(state=SimpleNamespace(log_history=history), is_world_process_zero=lambda: True)
    means = recipes("progress_table").print_first_and_last(trainer, ["reward", "never logged"], count=2)
    assert means == {"first_reward": 1.5, "last_reward": 9.5}
    assert re.search(
        r"first 2 logged .* last 2 logged.*reward +│ +1\.500 │ +9\.500", capsys.readouterr().out, re.DOTALL
    )


@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
def test_checkpointing_by_either_name(recipes, tmp_path, name):
    """In the file and on the command line, which wins, also where one has the old name and the other the new one."""
    parse, path, fixed = recipes("sft").parse_arguments, tmp_path / "config.yaml", ["--output_dir", str(tmp_path)]
    path.write_text(f"{name}: true\n{name}_kwargs: {{every_n_layers: 2}}\nuse_cpu: true\n")
    found = parse([str(path), *fixed])[-1]
    assert getattr(found, CHECKPOINTING_ARGUMENT) is True
    assert getattr(found, f"{CHECKPOINTING_ARGUMENT}_kwargs") == {"every_n_layers": 2}
    for other in ("--activation_checkpointing", "--gradient_checkpointing"):
        assert not getattr(parse([str(path), *fixed, other, "false"])[-1], CHECKPOINTING_ARGUMENT)
        assert not getattr(parse([str(path), *fixed, f"{other}=false"])[-1], CHECKPOINTING_ARGUMENT)


@pytest.mark.parametrize(
    "own, given, expected, positions",
    [
        (
            {"rope_type": "default", "rope_theta": 5e5},
            {"rope_type": "yarn", "factor": 4.0},
            {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0, "original_max_position_embeddings": 1024},
            4096,
        ),
        (
            {"rope_type": "yarn", "rope_theta": 1e6, "factor": 2.0, "original_max_position_embeddings": 512},
            {"factor": 8.0},
            {"rope_type": "yarn", "rope_theta": 1e6, "factor": 8.0, "original_max_position_embeddings": 512},
            4096,
        ),
        (
            {"rope_type": "default", "rope_theta": 5e5},
            {"rope_theta": 5e6},
            {"rope_type": "default", "rope_theta": 5e6},
            1024,
        ),
        (
            {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0},
            {"rope_type": "default"},
            {"rope_type": "default", "rope_theta": 5e5},
            1024,
        ),
    ],
)
def test_rope_parameters_are_merged(recipes, own, given, expected, positions):
    config = AutoConfig.for_model("qwen3", rope_parameters=own, max_position_embeddings=1024)
    recipes("rope").set_window(config, given, None)
    assert config.rope_parameters == expected and config.max_position_embeddings == positions
    recipes("rope").set_window(config, None, 2048)
    assert config.rope_parameters == expected and config.max_position_embeddings == 2048


def test_rope_parameters_by_layer_type(recipes):
    config = AutoConfig.for_model("gemma3_text", max_position_embeddings=1024)
    local = dict(config.rope_parameters["sliding_attention"])
    theta = config.rope_parameters["full_attention"]["rope_theta"]
    with pytest.raises(SystemExit, match="per layer type. Pass a dict for each: .*full_attention"):
        recipes("rope").set_window(config, {"rope_type": "yarn", "factor": 4.0}, None)
    recipes("rope").set_window(config, {"full_attention": {"rope_type": "yarn", "factor": 4.0}}, None)
    assert config.rope_parameters["sliding_attention"] == local
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "rope_theta": theta}
    assert config.rope_parameters["full_attention"] == yarn and config.max_position_embeddings == 4096


@pytest.mark.parametrize(
    "text, message",
    [
        (b"learning_rat: 1.0e-3\n", "unknown arguments learning_rat"),
        (b"1: 2\n", "unknown arguments 1"),
        (b"- window\n", "has no settings"),
        (b"window: [\n", "cannot be read: while parsing"),
        (b"\xff", "cannot be read"),
        (b"rope_parameters: '{'\n", "rope_parameters is not valid JSON"),
    ],
)
def test_what_is_wrong_with_a_yaml_file_is_named(recipes, tmp_path, text, message):
    (tmp_path / "config.yaml").write_bytes(text)
    with pytest.raises(SystemExit, match=message):
        recipes("sft").parse_arguments([str(tmp_path / "config.yaml")])


def test_a_yaml_file_may_be_empty(recipes, tmp_path):
    (tmp_path / "config.yaml").write_text("# nothing yet\n")
    assert recipes("sft").read_settings(tmp_path / "config.yaml") == {}


@pytest.mark.parametrize("name", ["chat_sft", "long_window", "lora"])
def test_the_quickstarts_model_is_asked_for(recipes, name, tmp_path):
    arguments = [str(ROOT / "recipes" / f"{name}.yaml"), "--model_name_or_path", str(tmp_path / "nothing")]
    with pytest.raises(SystemExit, match="run recipes/quickstart.sh first"):
        recipes("sft").parse_arguments(arguments)


NOTEBOOK = ROOT / "recipes" / "tour.ipynb"


def outputs_of(notebook):
    """Returns the texts of the outputs of every code cell but the first, which only imports."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"][1:]
    for cell in cells:
        assert cell.outputs and all(output.output_type != "error" for output in cell.outputs), cell.source
    return [
        output["text"]
        if "text" in output
        else "".join(output.data.get(kind, "") for kind in ("text/plain", "text/html"))
        for cell in cells
        for output in cell.outputs
    ]


def test_the_committed_notebook_shows_outputs():
    notebook = nbformat.read(NOTEBOOK, 4)
    nbformat.validate(notebook)
    printed = "\n".join(outputs_of(notebook))
    assert not re.search(
        r"(?<![\w.])(/(home|root|tmp|usr|opt|var|mnt|work|Users)/|[A-Z]:\\)|Traceback|Warning", printed
    )
    assert (
        len([cell for cell in notebook.cells for output in cell.get("outputs", ()) if "image/png" in str(output)]) == 3
    )
    losses = re.search(r"first step *│ (\S+).*?last ten logged *│ (\S+)", printed, re.DOTALL)
    assert float(losses[2]) < float(losses[1]) - 1
    assert all(cell.metadata == {} for cell in notebook.cells) and NOTEBOOK.stat().st_size < 500_000
