"""Functions that workers run for the tests of errors; each is expected to raise on every rank."""

import os

import torch
import torch.distributed as dist
from accelerate import Accelerator, ParallelismConfig
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    LlamaConfig,
    MambaConfig,
    OPTConfig,
    PhimoeConfig,
    Qwen2MoeConfig,
    RobertaConfig,
    StableLmConfig,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
)

from hf_flashcp import FlashCPCollator, FlashCPPlugin, FlashCPTrainer, FlashCPTrainerMixin, attach
from hf_flashcp.doctor.tiny import default_config, tiny_copy
from tests.accelerate_state import fresh_accelerate
from tests.model_cases import cp_mesh
from tests.models import SMALL, build_model, make_documents
from tests.trainer_cases import training_arguments


CONFIGS = {
    "bloom": lambda: BloomConfig(vocab_size=67, hidden_size=32, n_layer=2, n_head=4),
    "stablelm": lambda: StableLmConfig(**SMALL),
    "mamba": lambda: MambaConfig(vocab_size=67, hidden_size=32, num_hidden_layers=2),
    "jamba": lambda: tiny_copy(default_config("jamba")),
    "window in the mask alone": lambda: Qwen2MoeConfig(
        **SMALL,
        num_experts=2,
        num_experts_per_tok=1,
        use_sliding_window=True,
        sliding_window=8,
        max_window_layers=1,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
    ),
    "window in the mask alone, no layer types": lambda: PhimoeConfig(
        **SMALL, num_local_experts=2, num_experts_per_tok=1, sliding_window=8
    ),
    "layerdrop": lambda: OPTConfig(
        vocab_size=67, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, layerdrop=0.1
    ),
    "positions from padding": lambda: RobertaConfig(
        vocab_size=67, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, is_decoder=True
    ),
    "dropout": lambda: LlamaConfig(**SMALL, attention_dropout=0.1),
    "bidirectional": lambda: LlamaConfig(**SMALL, is_causal=False),
}


def train_step(name):
    """Build a model, attach to it, and run one forward in training mode."""
    torch.manual_seed(0)
    try:
        model = AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="flashcp")
    except ValueError as error:  # transformers itself refuses the name for this family
        raise RuntimeError(f"transformers refused: {error}") from error
    model.train()
    attach(model, cp_mesh())
    batch = FlashCPCollator(dist.get_world_size())(make_documents([12, 9]))
    model(**batch).loss.backward()


def attach_to(kind):
    if kind == "sdpa":
        attach(build_model("llama", "sdpa"), cp_mesh())
    elif kind == "plain module":
        attach(torch.nn.Linear(2, 2), cp_mesh())
    elif kind == "encoder-decoder":
        config = T5Config(vocab_size=67, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=4)
        attach(T5ForConditionalGeneration._from_config(config, attn_implementation="eager"), cp_mesh())
    elif kind == "stock parallelism config":
        fresh_accelerate()
        attach(build_model("llama"), Accelerator(cpu=True, parallelism_config=ParallelismConfig()))
    elif kind == "mesh without cp":
        from torch.distributed.device_mesh import init_device_mesh

        attach(build_model("llama"), init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "tp")))


def never_calls_us():
    """Train a model whose second layer keeps its own attention."""
    model = build_model("llama")
    attach(model, cp_mesh())
    model.model.layers[1].self_attn.config = type(model.config)(**model.config.to_dict())
    model.model.layers[1].self_attn.config._attn_implementation = "sdpa"
    model(**FlashCPCollator(dist.get_world_size())(make_documents([12, 9])))


def forward_with(changes):
    """Run a sharded forward on a batch with errors; `changes` maps keys to new values, and None removes a key."""
    model = build_model("llama")
    attach(model, cp_mesh())
    batch = {**FlashCPCollator(dist.get_world_size())(make_documents([12, 9])), **changes}
    model(**{key: value for key, value in batch.items() if value is not None})


def recovers_after_an_error():
    """Check that after a forward that raised, the next one is right, and so is one without a plan."""
    model = build_model("llama")
    handle = attach(model, cp_mesh())
    batch = FlashCPCollator(dist.get_world_size())(make_documents([12, 9]))
    expected = model(**batch).loss
    try:
        model(**batch, attention_mask=torch.zeros(1, 21))
    except ValueError:
        pass
    assert torch.equal(model(**batch).loss, expected)
    plain = build_model("llama", "sdpa").eval()
    ids = batch["input_ids"][:, :9]
    assert torch.equal(model.eval()(input_ids=ids).logits, plain(input_ids=ids).logits)
    handle.remove()
    assert model.train()(input_ids=ids).logits.shape == (1, 9, 67)


def make_plugin(arguments, environment=None):
    fresh_accelerate()
    os.environ.update(environment or {})
    try:
        Accelerator(cpu=True, parallelism_config=FlashCPPlugin(**arguments))
    finally:
        for key in environment or {}:
            os.environ.pop(key)


def make_trainer(trainer_arguments, training=None):
    fresh_accelerate()
    training = {"parallelism_config": FlashCPPlugin(cp_size=dist.get_world_size()), **(training or {})}
    FlashCPTrainer(model=build_model("llama"), args=training_arguments(**training), **trainer_arguments)


def a_loss(outputs, labels, num_items_in_batch=None):
    return outputs["logits"].mean()


class _OwnStep(Trainer):
    def prediction_step(self, *args, **kwargs):
        return super().prediction_step(*args, **kwargs)


def make_trainer_with_its_own_step():
    fresh_accelerate()
    type("Mixed", (FlashCPTrainerMixin, _OwnStep), {})(
        model=build_model("llama"),
        args=training_arguments(parallelism_config=FlashCPPlugin(cp_size=dist.get_world_size())),
    )
