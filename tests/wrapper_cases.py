"""Functions that workers run for the tests of wrappers by accelerate, transformers and PEFT."""

import contextlib
import os
import tempfile
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer
from transformers.loss.loss_utils import ForCausalLMLoss

from hf_flashcp import (
    FlashCPCallback,
    FlashCPCollator,
    FlashCPPlugin,
    FlashCPTrainer,
    FlashCPTrainerMixin,
    attach,
    save_attention_context_fn,
    shard_inputs,
)
from tests.accelerate_state import forbid_tf32, fresh_accelerate
from tests.device import DEVICE, ON_CPU, offload_on_cpu, on_device
from tests.model_cases import cp_mesh, sum_gradients
from tests.models import build_model, from_one_rank, largest_error, make_documents, per_document_gradients
from tests.trainer_cases import (
    USE_DEVICE,
    InOrder,
    KeepGradient,
    losses_by_step,
    saving_arguments,
    training_arguments,
)


# Documents and prompts have unequal lengths, so that data-parallel groups differ in tokens and targets.
LENGTHS = [40, 3, 17, 9, 25, 2, 30, 7, 12, 5, 33, 20]


@contextlib.contextmanager
def fsdp_on_cpu():
    """Let accelerate, which supports FSDP2 only on GPUs, run it on a CPU with gloo."""
    fresh_accelerate()
    environment = {"ACCELERATE_TORCH_DEVICE": "cpu", "ACCELERATE_USE_FSDP": "false"}
    with (
        mock.patch.dict(os.environ, environment),
        mock.patch.object(PartialState, "_prepare_backend", lambda *args: ("gloo", DistributedType.MULTI_GPU)),
        mock.patch.object(torch.Tensor, "pin_memory", lambda self: self),  # CPU offload pins memory, which needs a GPU
    ):
        yield
    fresh_accelerate()


@contextlib.contextmanager
def fsdp_on_gpus():
    fresh_accelerate()
    with mock.patch.dict(os.environ, {"ACCELERATE_USE_FSDP": "false"}):
        yield
    fresh_accelerate()


fsdp_on_device = fsdp_on_cpu if ON_CPU else fsdp_on_gpus


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def plain_name(name):
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def whole_gradients(model):
    return {
        plain_name(name): full(parameter.grad).detach().to(DEVICE, copy=True)
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def fsdp_arguments(**config):
    return {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], **config}}


def with_lora(model, dropout=0.0):
    torch.manual_seed(1)
    options = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    return get_peft_model(model, LoraConfig(r=2, lora_dropout=dropout, **options))


def expected_step(reference, features, per_batch, accumulation, groups, per_group):
    """Return loss and gradients of a step's documents, each run alone: the mean over all targets, or over groups'
    means."""
    batches = [features[start : start + per_batch] for start in range(0, per_batch * accumulation * groups, per_batch)]
    if not per_group:
        return from_one_rank(per_document_gradients, reference, sum(batches, []), own_loss=True)
    losses, means = [], {}
    for group in range(groups):
        loss, grads = from_one_rank(per_document_gradients, reference, sum(batches[group::groups], []), own_loss=True)
        losses.append(loss / groups)
        means = {name: means.get(name, 0) + grad / groups for name, grad in grads.items()}
    return sum(losses), means


def step(options):
    """Return the errors of the first optimizer step of a `FlashCPTrainer`, and its log."""
    with fsdp_on_device() if "fsdp" in options else contextlib.nullcontext():
        return _step(**options)


def offloading_step(options):
    """Return the result of [`step`] and the shapes of the tensors that it copied to the host."""
    # TrainingArguments have no name for accelerate's option. `accelerate launch` passes it on in the environment.
    by_accelerate = str("activation_checkpointing" in options["fsdp"])
    with mock.patch.dict(os.environ, FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD=by_accelerate), offload_on_cpu() as copies:
        return step(options), [tuple(each.shape) for each in copies.made]


def _step(
    *,
    cp_size=2,
    per_batch=3,
    fsdp=None,
    selective=False,
    offload=False,
    dtype=torch.float64,
    overrides=None,
    sizes=None,
    masked=(),
    lora=False,
    strategy="per_doc",
    **arguments,
):
    fresh_accelerate()
    features, keep = make_documents(LENGTHS, prompt=0.3), KeepGradient(whole_gradients)
    for document in masked:
        features[document]["labels"] = [-100] * LENGTHS[document]
    if fsdp is not None:
        arguments |= fsdp_arguments(**fsdp)
    if selective:
        arguments["activation_checkpointing_kwargs"] = {
            **arguments.get("activation_checkpointing_kwargs", {}),
            "use_reentrant": False,
            "context_fn": save_attention_context_fn,
            **({"offload": True, "every_n_layers": 2} if offload else {}),
        }
    wrap = with_lora if lora else (lambda model: model)
    trainer = InOrder(
        model=wrap(build_model("llama", dtype=dtype, **(overrides or {}))),
        args=training_arguments(
            parallelism_config=FlashCPPlugin(cp_size=cp_size, strategy=strategy, **(sizes or {})),
            per_device_train_batch_size=per_batch,
            **{"max_steps": 1, **arguments},
        ),
        train_dataset=features,
        data_collator=FlashCPCollator(),
        callbacks=[keep],
    )
    forbid_tf32()
    trainer.train()
    expected_loss, expected = expected_step(
        wrap(build_model("llama", "sdpa", **(overrides or {}))),
        features,
        per_batch,
        trainer.args.gradient_accumulation_steps,
        dist.get_world_size() // cp_size,
        not trainer.args.average_tokens_across_devices,
    )
    norm = float(torch.stack([grad.norm() for grad in expected.values()]).norm())
    if trainer.args.max_grad_norm:
        expected = {name: grad * min(1, trainer.args.max_grad_norm / (norm + 1e-6)) for name, grad in expected.items()}
    log = trainer.state.log_history[0]
    single = None
    if trainer.args.bf16:
        window = features[: per_batch * dist.get_world_size() // cp_size]
        _, bf16 = from_one_rank(
            per_document_gradients, build_model("llama", "sdpa", torch.bfloat16), window, own_loss=True
        )
        single = largest_error(bf16, expected)
    return {
        "gradient_error": largest_error(keep.steps[0], expected),
        "single_bf16_error": single,
        "loss_error": abs(log["loss"] - expected_loss) / expected_loss,
        "norm_error": abs(log["grad_norm"] - norm) / norm,
        "type": str(trainer.accelerator.distributed_type),
    }


def counts_in_bf16(way, average=True, lora=False):
    """Return the `num_items_in_batch` that a loss function gets for 259 targets under FSDP2, which casts floats to
    bf16."""
    found = set()

    def loss_function(*args, num_items_in_batch=None, **kwargs):
        found.add(float(num_items_in_batch))
        return ForCausalLMLoss(*args, num_items_in_batch=num_items_in_batch, **kwargs)

    with fsdp_on_device():
        features, collate = make_documents([200, 61]), FlashCPCollator(2)
        model = build_model("llama", dtype=torch.float32)
        model.loss_function = loss_function
        model = with_lora(model) if lora else model
        if way == "shard_inputs":
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
            mesh = FlashCPPlugin(cp_size=2).build_device_mesh(DEVICE.type)
            fully_shard(model, mesh=mesh["dp_shard_cp"], mp_policy=policy)
            attach(model, mesh)
            model(**shard_inputs(on_device(collate(features)), mesh))
        else:
            trainer_class = Trainer if way == "callback" else FlashCPTrainer
            trainer = trainer_class(
                model=model,
                args=training_arguments(
                    parallelism_config=FlashCPPlugin(cp_size=2),
                    per_device_train_batch_size=2,
                    per_device_eval_batch_size=2,
                    max_steps=1,
                    bf16=True,
                    average_tokens_across_devices=average,
                    **fsdp_arguments(),
                ),
                train_dataset=features,
                eval_dataset=features,
                data_collator=collate,
                callbacks=[FlashCPCallback()] if way == "callback" else [],
            )
            trainer.train()
            if way == "evaluate":
                found.clear()
                trainer.evaluate()
    return found - {3.0, 6.0}  # the call of the loss function check


def accelerator_loop(accumulation):
    """Return the gradient error with FSDP2 in a user's loop, with cp_size 2 and three documents per micro-step."""
    with fsdp_on_device():
        features, world_size = make_documents(LENGTHS, prompt=0.3), dist.get_world_size()
        accelerator = Accelerator(
            parallelism_config=FlashCPPlugin(cp_size=2),
            gradient_accumulation_steps=accumulation,
            fsdp_plugin=FullyShardedDataParallelPlugin(
                fsdp_version=2,
                auto_wrap_policy="transformer_based_wrap",
                transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
                activation_checkpointing=True,
            ),
        )
        model = build_model("llama")
        loader = torch.utils.data.DataLoader(features, batch_size=3, collate_fn=FlashCPCollator(2))
        model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0), loader)
        attach(model, accelerator)
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                if accelerator.sync_gradients:
                    kept = whole_gradients(model)
                    break
        expected, reference = {}, build_model("llama", "sdpa")
        batches = accumulation * world_size // 2
        for start in range(0, 3 * batches, 3):
            _, part = from_one_rank(per_document_gradients, reference, features[start : start + 3], own_loss=True)
            expected = {name: expected.get(name, 0) + grad / batches for name, grad in part.items()}
        return largest_error(kept, expected)


def train_and_save(directory, state_dict_type, cp_size, resume, save=True):
    """Train four steps under FSDP2, save after the second and the last, and return losses and full parameters."""
    with fsdp_on_device():
        trainer = FlashCPTrainer(
            model=build_model("llama"),
            args=saving_arguments(
                output_dir=directory,
                parallelism_config=FlashCPPlugin(cp_size=cp_size),
                per_device_train_batch_size=2 * cp_size // dist.get_world_size(),
                max_steps=4,
                save_strategy="steps" if save else "no",
                **fsdp_arguments(state_dict_type=state_dict_type),
            ),
            train_dataset=make_documents(LENGTHS),
        )
        trainer.train(resume_from_checkpoint=str(Path(directory) / "checkpoint-2") if resume else None)
        losses = losses_by_step(trainer)
        named = trainer.model.named_parameters()
        parameters = {plain_name(name): full(value.detach()).to("cpu", copy=True) for name, value in named}
        if save:
            trainer.save_model(str(Path(directory) / "final"))
        return losses, parameters


def differences(ours, directory):
    """Return the largest difference to a model loaded by plain transformers, and whether its files mention us."""
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="sdpa")
    largest = max(float((ours[name] - value.detach()).abs().max()) for name, value in model.named_parameters())
    text = "".join(path.read_text().lower() for path in Path(directory).glob("*.json"))
    return largest, [word for word in ("flashcp", "document_cp") if word in text]


def scaled_steps(sharded):
    """Run two steps with fp16 loss scaling; only rank 1 overflows in the first.

    Returns by step the scale, and whether parameters changed.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(DEVICE.type, (dist.get_world_size(),), mesh_dim_names=("cp",))
    model = build_model("llama", dtype=torch.float32)
    wrapped = fully_shard(model) if sharded else torch.nn.parallel.DistributedDataParallel(model)
    attach(wrapped, mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=1024.0)
    batch = on_device(FlashCPCollator(dist.get_world_size())(make_documents(LENGTHS[:3])))
    found = []
    for overflows in (True, False):
        before = [full(parameter.detach()).clone() for parameter in model.parameters()]
        with torch.autocast(DEVICE.type, dtype=torch.float16):
            loss = wrapped(**batch).loss
        if not sharded and overflows and dist.get_rank() == 1:
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        if sharded and overflows and dist.get_rank() == 1:  # only the rank that holds this part sees the overflow
            next(model.parameters()).grad.to_local().view(-1)[0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        after = [full(parameter.detach()) for parameter in model.parameters()]
        moved = any(not torch.equal(one, other) for one, other in zip(before, after))
        finite = all(bool(value.isfinite().all()) for value in after)
        found.append((scaler.get_scale(), moved, finite))
    return found


def loss_that_shifts_labels():
    """A user's loss function that ignores shift_labels."""

    def shift_and_lose(logits, labels, vocab_size, num_items_in_batch, **kwargs):
        return F.cross_entropy(logits[0, :-1].float(), labels[0, 1:], reduction="sum") / num_items_in_batch

    model = build_model("llama")
    model.loss_function = shift_and_lose
    attach(model, cp_mesh())
    model.train()
    model(**on_device(FlashCPCollator(dist.get_world_size())(make_documents(LENGTHS[:3]))))


def liger_errors():
    """Return the gradient and loss errors of Liger's fused linear cross-entropy, on a CPU with Triton's
    interpreter."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    features = make_documents(LENGTHS[:5], prompt=0.3)
    expected_loss, expected = from_one_rank(
        per_document_gradients, build_model("llama", "sdpa"), features, own_loss=True
    )
    model = build_model("llama", dtype=torch.float32)
    options = {"rope": False, "swiglu": False, "rms_norm": False, "fused_linear_cross_entropy": True}
    _apply_liger_kernel_to_instance(model=model, **options)
    attach(model, cp_mesh())
    model.train()
    output = model(**on_device(FlashCPCollator(dist.get_world_size())(features)))
    assert output.logits is None
    loss = output.loss / dist.get_world_size()
    loss.backward()
    sum_gradients(model)
    total = loss.detach().clone()
    if dist.get_world_size() > 1:
        dist.all_reduce(total)
    return largest_error(whole_gradients(model), expected), abs(float(total) - expected_loss) / expected_loss


class _Seq2SeqTrainer(FlashCPTrainerMixin, Seq2SeqTrainer):
    pass


def refused_argument(arguments):
    fresh_accelerate()
    trainer, make = FlashCPTrainer, training_arguments
    if "predict_with_generate" in arguments:
        trainer, make = _Seq2SeqTrainer, Seq2SeqTrainingArguments
        arguments = {**arguments, **USE_DEVICE, "output_dir": tempfile.mkdtemp(), "report_to": []}
    trainer(
        model=build_model("llama"),
        args=make(parallelism_config=FlashCPPlugin(cp_size=2), **arguments),
        train_dataset=make_documents(LENGTHS),
    )


def grouped_by_length():
    """Return the logged losses of three steps with documents grouped by length.

    Raises if ranks read different documents.
    """
    fresh_accelerate()
    trainer = FlashCPTrainer(
        model=build_model("llama"),
        args=training_arguments(
            parallelism_config=FlashCPPlugin(cp_size=2),
            per_device_train_batch_size=3,
            max_steps=3,
            train_sampling_strategy="group_by_length",
        ),
        train_dataset=make_documents(LENGTHS),
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
