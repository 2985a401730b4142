"""`FlashCPPlugin(kernel=...)`, and how the kernel that ran is made known."""

import json
import logging
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hf_flashcp import FlashCPCollator, FlashCPPlugin, FlashCPTrainer, attach
from hf_flashcp.attention.kernels import CAPABILITIES
from hf_flashcp.cli import main
from hf_flashcp.errors import BatchError, ConfigurationError
from hf_flashcp.integrations.trainers.trainer import STATE_KEY
from tests.model_cases import cp_mesh, sum_gradients
from tests.models import (
    build_model,
    from_one_rank,
    gradients,
    largest_error,
    make_documents,
    per_document_gradients,
)
from tests.trainer_cases import saving_arguments


LENGTHS = [12, 9, 1, 8]


def attached(family, kernel, size=None, **options):
    """Return a model that trains with this kernel on this process's ranks, its handle, and a batch."""
    size = size or dist.get_world_size()
    model = build_model(family, **options).train()
    plugin = FlashCPPlugin(cp_size=size, kernel=kernel)
    handle = attach(model, cp_mesh() if size > 1 else None, plugin=plugin)
    return model, handle, FlashCPCollator()(make_documents(LENGTHS))


@pytest.mark.parametrize("name", ["flash_attention_2", "", "Eager"])
def test_an_unknown_kernel(name):
    with pytest.raises(ConfigurationError, match=f"There is no kernel '{name}'. Choose one of cpu_flash, .*eager"):
        FlashCPPlugin(cp_size=1, kernel=name)


def test_every_kernel_can_be_asked_for():
    for name in CAPABILITIES:
        assert FlashCPPlugin(cp_size=1, kernel=name).kernel == name


def train_with_eager():
    """Return the kernels that ran, and the gradient's error against documents run one by one."""
    model, handle, batch = attached("gemma2", "eager")
    (model(**batch).loss / dist.get_world_size()).backward()  # a batch's loss is the mean over ranks
    sum_gradients(model)
    reference = build_model("gemma2", "eager")
    _, expected = from_one_rank(per_document_gradients, reference, make_documents(LENGTHS), own_loss=True)
    return handle.kernels, largest_error(gradients(model), expected)


def run_forward(family, kernel):
    model, _, batch = attached(family, kernel)
    model(**batch)


@pytest.mark.parametrize("cp_size", [1, 2])
@pytest.mark.parametrize(
    "family, kernel, message",
    [
        ("llama", "flash_attn_2", "flash_attn_2 runs on CUDA only. Leave kernel out to use the fastest kernel"),
        ("gemma2", "cpu_flash", "cpu_flash does not support softcap. Leave kernel out to use the fastest kernel"),
    ],
)
def test_a_kernel_that_cannot_run_a_layer(pool, cp_size, family, kernel, message):
    """Every rank raises the error at its first forward, before anything travels."""
    errors = pool.errors(cp_size, run_forward, family, kernel)
    assert len(errors) == cp_size
    for error in errors:
        assert type(error) is ConfigurationError
        assert str(error).startswith(f'FlashCPPlugin has kernel="{kernel}", but {message}')


def different_kernels():
    run_forward("llama", "eager" if dist.get_rank() == 1 else "cpu_flash")


def test_ranks_with_different_kernels(pool):
    for error in pool.errors(3, different_kernels):
        assert type(error) is BatchError
        assert 'Ranks disagree on the batch: kernel is "cpu_flash" on ranks 0, 2 and "eager" on rank 1' in str(error)
        assert (
            "use the same strategy, kernel, head_groups, mlp_tiles, skip_logits and FLASHCP_DEBUG settings everywhere"
            in str(error)
        )


@pytest.mark.parametrize("cp_size", [1, 2])
def test_the_chosen_kernel_runs_and_is_exact(pool, cp_size):
    for kernels, error in pool.run(cp_size, train_with_eager):
        assert kernels == {"eager": 2} and error < 1e-6


def test_the_kernels_are_logged_once_per_attach(caplog):
    caplog.set_level(logging.INFO, logger="hf_flashcp")
    model, handle, batch = attached("llama", None, size=1)
    assert handle.kernels == {} and not caplog.messages
    with torch.no_grad():
        for _ in range(3):
            model(**batch)
        assert handle.kernels == {"cpu_flash": 2}
        assert caplog.messages == ["Attention of LlamaForCausalLM runs with cpu_flash (2 layers) on cpu."]
        handle = attach(model, None, plugin=FlashCPPlugin(cp_size=1, kernel="eager"))
        model(**batch)
    assert caplog.messages[1:] == ["Attention of LlamaForCausalLM runs with eager (2 layers) on cpu."]


def test_one_layer_is_logged_in_the_singular(caplog):
    caplog.set_level(logging.INFO, logger="hf_flashcp")
    model, _, batch = attached("llama", None, size=1, num_hidden_layers=1)
    model(**batch)
    assert caplog.messages == ["Attention of LlamaForCausalLM runs with cpu_flash (1 layer) on cpu."]


def trained(directory, steps, **options):
    trainer = FlashCPTrainer(
        model=build_model("llama"),
        args=saving_arguments(
            output_dir=str(directory), max_steps=steps, parallelism_config=FlashCPPlugin(cp_size=1), **options
        ),
        train_dataset=make_documents(LENGTHS * 4),
    )
    last = directory / "checkpoint-2"
    trainer.train(resume_from_checkpoint=str(last) if last.exists() else None)
    return trainer


def test_the_report_names_the_kernels_of_a_run(tmp_path, capsys, caplog):
    """The logs hold numbers only, so the kernels are recorded elsewhere in the saved state."""
    trained(tmp_path, 2)
    state = json.loads(Path(tmp_path, "checkpoint-2", "trainer_state.json").read_text())
    assert all(isinstance(value, (int, float)) for entry in state["log_history"] for value in entry.values())
    assert state["stateful_callbacks"][STATE_KEY]["attributes"] == {"kernels": {"cpu_flash": 2}}
    capsys.readouterr()
    assert main(["report", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kernels"] == ["cpu_flash"]
    with caplog.at_level(logging.WARNING):
        resumed = trained(tmp_path, 4, restore_callback_states_from_checkpoint=True)
    assert resumed.state.stateful_callbacks[STATE_KEY]["attributes"] == {"kernels": {"cpu_flash": 2}}
    assert not [message for message in caplog.messages if "callbacks" in message]
