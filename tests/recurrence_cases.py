"""Functions that workers run for the tests of recurrent and convolutional layers on documents that are cut."""

import contextlib
import functools
import inspect
import sys
import tempfile
import types

import numpy as np
import torch
import torch.distributed as dist
from datasets import Dataset
from trl import SFTConfig

from hf_flashcp import FlashCPCollator, FlashCPPlugin, attach, name_missing_ranks, shard_inputs
from hf_flashcp.doctor.float64 import float64_throughout
from hf_flashcp.doctor.gradients import GRADIENT_FLOOR
from hf_flashcp.integrations.gradient_check import gradient_error
from hf_flashcp.integrations.models.checkpointing import CHECKPOINTING_ARGUMENT
from hf_flashcp.integrations.models.hybrids import mixer_modules, mixer_of
from hf_flashcp.integrations.models.recurrent_layers import pass_states
from hf_flashcp.planning import PlanSettings, ShardPlan, plan_documents
from hf_flashcp.recurrence import halo, states
from tests import trl_cases, wrapper_cases
from tests.accelerate_state import fresh_accelerate
from tests.attention_cases import bind
from tests.debug_cases import bad_transfer, debug_mode, flip, replaced
from tests.device import DEVICE, on_device
from tests.model_cases import _with_lora, cp_mesh, sum_gradients, total
from tests.models import (
    build_model,
    exact_loss_sum,
    from_one_rank,
    gradients,
    make_documents,
    per_document_gradients,
    target_count,
    tokenizer,
)
from tests.trainer_cases import USE_DEVICE, InOrder, losses_by_step, training_arguments


def batch_of(plan):
    """Return the batch of documents of the plan's lengths, with any plan."""
    batch = FlashCPCollator(settings=PlanSettings(plan.cp_size, "per_doc"))(make_documents(plan.lengths))
    return on_device({**batch, "flashcp_plan": plan})


def backward(model, plan):
    """Return the mean loss over all targets of an attached model, and its gradients."""
    shard = shard_inputs(batch_of(plan), cp_mesh())
    inputs = {key: value for key, value in shard.items() if "labels" not in key}
    model.zero_grad()
    logits = model(**inputs, use_cache=False).logits
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = exact_loss_sum(wide, shard["shift_labels"]) / target_count(make_documents(plan.lengths))
    loss.backward()
    sum_gradients(model)
    return total(loss), gradients(model)


@functools.cache
def expected(family, lengths):
    """Return the loss and the gradients of each document alone, on one device."""
    return per_document_gradients(build_model(family, "eager").eval(), make_documents(lengths))


def errors(family, plans):
    """Return for each plan the relative error of the loss and the largest one of a gradient, in fp64."""
    found = []
    with float64_throughout():
        model = build_model(family).eval()
        attach(model, cp_mesh())
        for plan in plans:
            alone = from_one_rank(expected, family, plan.lengths)
            loss, grads = backward(model, plan)
            found.append((abs(loss - alone[0]) / alone[0], gradient_error(grads, alone[1], GRADIENT_FLOOR)))
    return found


def random_plans(lengths, cp_size, count, seed):
    """Return plans with documents cut anywhere, some slices of one token, and slices on any ranks."""
    rng = np.random.default_rng(seed)
    plans = []
    while len(plans) < count:
        slices = [[] for _ in range(cp_size)]
        for document, length in enumerate(lengths):
            cuts = set(rng.integers(1, length, rng.integers(0, 6)).tolist()) if length > 1 else set()
            cuts |= {cut + 1 for cut in list(cuts)[:1] if cut + 1 < length}
            edges = [0, *sorted(cuts), length]
            for start, stop in zip(edges, edges[1:]):
                slices[rng.integers(cp_size)].append((document, start, stop))
        if all(slices):
            plans.append(ShardPlan(lengths, cp_size, slices))
    return plans


# Precision and mutations


def rounded_errors(family, lengths):
    """Return the relative errors of the whole gradient of a single process and of all ranks, in fp32 and bf16.

    All of them, and the gradient in fp64 that they are compared with, have weights that bf16 can represent.
    """

    def build(implementation, dtype):
        model = build_model(family, implementation).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.bfloat16())
        return model.to(dtype)

    def alone(dtype):
        model = build("eager", dtype)
        with float64_throughout() if dtype == torch.float64 else contextlib.nullcontext():
            return _flat(per_document_gradients(model, make_documents(lengths), own_loss=True)[1])

    exact, plan = (
        from_one_rank(alone, torch.float64),
        plan_documents(lengths, dist.get_world_size(), strategy="per_doc"),
    )
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = build("flashcp", dtype)
        attach(model, cp_mesh())
        single, ours = from_one_rank(alone, dtype, rank=1), _flat(backward(model, plan)[1])
        found[dtype] = [float((each - exact).norm() / exact.norm()) for each in (single, ours)]
    return found


def _flat(grads):
    return torch.cat([grads[name].double().flatten() for name in sorted(grads)])


def mutated_errors(family, plan):
    """Return the largest gradient error of each wrong exchange, and of the right one."""
    carry, with_halo = states._CarryStates, halo._WithHalo

    def no_state(ctx, *args):
        out, initial = forward(ctx, *args)
        return out, 0 * initial

    def without_decay(direction):
        def make(original):
            def call(ctx, *args):
                with replaced(states, "_times", lambda times: lambda decay, state: times(0 * decay, state)):
                    return original(ctx, *args)

            return staticmethod(call)

        return replaced(carry, direction, make)

    def no_gradient(ctx, *grads):
        grad_out, grad_decay, grad_added, *rest = last(ctx, *grads)
        return grad_out, 0 * grad_decay, 0 * grad_added, *rest

    def no_halo(ctx, rows, layout, group):
        padded = padding(ctx, rows, layout, group)
        alone = torch.zeros_like(padded)
        layout.on(rows.device).kept.put(alone, rows)
        return alone

    forward, last, padding = carry.forward, carry.backward, with_halo.forward
    mutations = {
        "none": contextlib.nullcontext(),
        "no state": replaced(carry, "forward", lambda _: staticmethod(no_state)),
        "A = 0 in forward": without_decay("forward"),
        "A = 0 in backward": without_decay("backward"),
        "no gradient into the state": replaced(carry, "backward", lambda _: staticmethod(no_gradient)),
        "no halo": replaced(with_halo, "forward", lambda _: staticmethod(no_halo)),
    }
    found = {}
    for name, mutation in mutations.items():
        with mutation:
            ((_, found[name]),) = errors(family, [plan])
    return found


# One layer


class OneLayer:
    """The first mixer of a model, and this rank's part of its input."""

    def __init__(self, family, plan, dtype="float64"):
        model = build_model(family, dtype=getattr(torch, dtype)).eval()
        attach(model, cp_mesh())
        self.mixer = next(iter(mixer_modules(model).values()))
        self.plan = bind(plan)
        self._keyword = "seq_idx" if pass_states(model) else "flashcp_plan"
        generator = torch.Generator().manual_seed(dist.get_rank())
        hidden = torch.randn(1, self.plan.layout.num_tokens, model.config.hidden_size, generator=generator)
        self.hidden = hidden.to(DEVICE, model.dtype).requires_grad_()

    def forward(self):
        out = self.mixer(self.hidden, **{self._keyword: self.plan})
        return out if isinstance(out, torch.Tensor) else out[0]


def carried(plan, autocast):
    """Return the states with which this rank's slices begin, and the gradients of their summaries, in fp32."""
    bound = bind(plan)
    count = len(bound.states.first) + len(bound.states.continued)
    generator = torch.Generator().manual_seed(dist.get_rank())
    decay, added = (torch.randn(count, 2, 8, 8, generator=generator).to(DEVICE).requires_grad_() for _ in range(2))
    out = torch.zeros(1, device=DEVICE, requires_grad=True)
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
        out, initial = states.carry_states(out, decay, added, bound, states.exchange_states(decay, added, bound))
        (out.sum() + initial.square().sum()).backward()
    return initial.detach().cpu(), decay.grad.cpu(), added.grad.cpu()


def summaries(family, plan, dtype):
    """Return the (A, B) of this rank's slices in a layer."""
    layer, seen = OneLayer(family, plan, dtype), []

    def noting(original):
        def call(decay, added, plan):
            seen.extend((decay.detach().cpu(), added.detach().cpu()))
            return original(decay, added, plan)

        return call

    with replaced(sys.modules["hf_flashcp.recurrence.scan"], "exchange_states", noting):
        layer.forward()
    return seen


def exchanged(family, plan, dtype):
    """Return the all-to-alls in forward and backward of a layer, as (elements of a row, received bytes), then the
    width of the convolution, its channels, and the elements of A and B."""
    layer, seen, sizes = OneLayer(family, plan, dtype), [], [0]

    def noting(original):
        def call(received, sent, *args, **kwargs):
            seen.append((received.shape[1], received.numel() * received.element_size()))
            return original(received, sent, *args, **kwargs)

        return call

    def measuring(original):
        def call(each, plan):
            sizes[0] = int(np.prod(each.decay_shape) + np.prod(each.state_shape))
            return original(each, plan)

        return call

    with (
        replaced(dist, "all_to_all_single", noting),
        replaced(sys.modules["hf_flashcp.recurrence.delta_rule"], "run_scan", measuring),
        replaced(sys.modules["hf_flashcp.recurrence.mamba2"], "run_scan", measuring),
    ):
        out = layer.forward()
        count = len(seen)
        out.sum().backward()
    convolution = next(module for module in layer.mixer.modules() if isinstance(module, torch.nn.Conv1d))
    channels, width = convolution.weight.shape[0], convolution.weight.shape[2]
    return seen[:count], seen[count:], width, channels, sizes[0]


def mixer_calls(family, plan):
    """Return how often each mixer of a model ran, and how many all-to-alls there were in mixers and in backward."""
    model = build_model(family).eval()
    attach(model, cp_mesh())
    runs, exchanges, inside = dict.fromkeys(mixer_modules(model), 0), {"mixers": 0, "backward": 0}, ["attention"]

    def counting(name, original):
        def call(*args, **kwargs):
            runs[name] += 1
            inside.append("mixers")
            try:
                return original(*args, **kwargs)
            finally:
                inside.pop()

        return call

    def noting(original):
        def call(*args, **kwargs):
            if inside[-1] in exchanges:
                exchanges[inside[-1]] += 1
            return original(*args, **kwargs)

        return call

    for name, module in mixer_modules(model).items():
        module.forward = counting(name, module.forward)
    with replaced(dist, "all_to_all_single", noting):
        loss = model(**batch_of(plan)).loss
        inside.append("backward")
        loss.backward()
    return runs, exchanges


def layer_with_a_flipped_bit(family, plan, number, rank):
    """Run a layer in debug mode in which a bit of all-to-all `number` changes on its way to `rank`."""
    layer = OneLayer(family, plan)
    with debug_mode(), bad_transfer(number, rank, flip, "received"):
        layer.forward().sum().backward()


def layer_in_debug_mode(family, plan):
    layer = OneLayer(family, plan)
    with debug_mode():
        layer.forward().sum().backward()


def loop_that_loses_a_rank(action, victim, point):
    """Train a model, and call `action` on a rank before it sends states in the second step."""
    model = build_model("qwen3_next")
    attach(model, cp_mesh())
    plan = plan_documents([40, 9, 17], dist.get_world_size(), strategy="per_doc")
    posted = []

    def make(original):
        def call(decay, added, exchange, plan, what):
            posted.append(what)
            if posted.count(what) == 2 and what == point and dist.get_rank() == victim:
                action()
            return original(decay, added, exchange, plan, what)

        return call

    with replaced(states, "_post", make), name_missing_ranks("my loop"):
        for _ in range(2):
            model(**batch_of(plan)).loss.backward()


# Trainers


def trained(family, options):
    """Return losses and changes of parameters in three steps of a FlashCPTrainer on six documents per step."""
    return _trained(family, **options)


def _trained(family, cp_size=1, per_batch=6, lora=None, fsdp=False, **arguments):
    with wrapper_cases.fsdp_on_device() if fsdp else contextlib.nullcontext():
        fresh_accelerate()
        model = build_model(family)
        layer = type(model.model.layers[0]).__name__
        if fsdp:
            arguments |= {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": [layer]}}
        trainer = InOrder(
            model=_with_lora(model, lora) if lora else model,
            args=training_arguments(
                parallelism_config=FlashCPPlugin(cp_size=cp_size, strategy="per_doc"),
                per_device_train_batch_size=per_batch,
                max_steps=3,
                learning_rate=0.5,
                **arguments,
            ),
            train_dataset=make_documents(wrapper_cases.LENGTHS * 2, prompt=0.3),
            data_collator=FlashCPCollator(),
        )
        return _losses_and_changes(trainer)


def trained_by_sft(family, cp_size, per_batch):
    """Return losses and changes of parameters in three steps of SFTTrainer on two packed rows per step."""
    fresh_accelerate()
    documents = make_documents(wrapper_cases.LENGTHS * 3)
    trainer = trl_cases._MixedSFTTrainer(
        model=build_model(family),
        args=SFTConfig(
            **{**USE_DEVICE, "output_dir": tempfile.mkdtemp(), "report_to": [], "save_strategy": "no"},
            max_length=60,
            packing=True,
            packing_strategy="bfd",
            shuffle_dataset=False,
            per_device_train_batch_size=per_batch,
            max_steps=3,
            logging_steps=1,
            learning_rate=0.5,
            lr_scheduler_type="constant",
            optim="sgd",
            disable_tqdm=True,
            bf16=False,
            parallelism_config=FlashCPPlugin(cp_size=cp_size, strategy="per_doc"),
            **{CHECKPOINTING_ARGUMENT: False},
        ),
        train_dataset=Dataset.from_list([{"input_ids": each["input_ids"]} for each in documents]),
        processing_class=tokenizer(),
    )
    return _losses_and_changes(trainer)


def _losses_and_changes(trainer):
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    named = trainer.accelerator.unwrap_model(trainer.model).named_parameters()
    after = {wrapper_cases.plain_name(name): wrapper_cases.full(value.detach()) for name, value in named}
    losses = losses_by_step(trainer)
    return [losses[step] for step in (1, 2, 3)], {name: value - before[name] for name, value in after.items()}


# Refusals


def step(family, change=lambda model: None, strategy="per_doc"):
    """Change a model, attach to it and run one step."""
    model = build_model(family).train()
    change(model)
    attach(model, cp_mesh())
    plan = plan_documents([40, 9, 17], dist.get_world_size(), strategy=strategy)
    model(**batch_of(plan)).loss.backward()


def stock_functions(model):
    """Return a modeling file and the functions of its mixers, by name, as they were before any model was attached."""
    module, names = sys.modules[type(model).__module__], mixer_of(model).functions

    def is_stock(function):
        return not hasattr(function, "_flashcp")

    return module, {name: inspect.unwrap(getattr(module, name), stop=is_stock) for name in names}


def with_its_own_kernel(model):
    """Let one mixer call functions of its own, as a mixer with a kernel from the hub does."""
    mixer = list(mixer_modules(model).values())[-1]
    forward, (_, stock) = inspect.unwrap(type(mixer).forward), stock_functions(model)

    def ignoring_the_plan(function):
        return lambda *args, flashcp_plan=None, **kwargs: function(*args, **kwargs)

    own = {name: ignoring_the_plan(function) for name, function in stock.items()}
    copied = types.FunctionType(forward.__code__, {**forward.__globals__, **own}, closure=forward.__closure__)
    copied.__kwdefaults__, copied.__defaults__ = forward.__kwdefaults__, forward.__defaults__
    mixer.forward = types.MethodType(copied, mixer)


def without_the_plan(model):
    """Take the plan away before one mixer runs."""
    mixer = list(mixer_modules(model).values())[-1]

    def take(module, args, kwargs):
        return args, {name: value for name, value in kwargs.items() if name not in ("flashcp_plan", "seq_idx")}

    mixer.register_forward_pre_hook(take, with_kwargs=True)


def with_another_convolution(model):
    model.model.smoothing = torch.nn.Conv1d(4, 4, 3)


def without_a_function(family):
    """Attach to a model whose modeling file has no scan."""
    model = build_model(family)
    module, functions = stock_functions(model)
    name, function = functions.popitem()
    delattr(module, name)
    try:
        attach(model, cp_mesh())
    finally:
        setattr(module, name, function)
