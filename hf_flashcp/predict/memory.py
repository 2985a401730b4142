"""How much memory a device needs to train, from a model's sizes: docs/estimate_command.md has every term.

A step has a few moments at which memory can be at its highest. Each is a sum of parts, the peak is the largest sum:

    forward                            backward
    layers ... logits, loss       |    loss, head, last layer ... first layer, embedding    |    optimizer
                          (1)          (2)   (3)   (4)            (5)          (6)               (7)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import ConfigurationError
from ..plan.traffic import MOST_KEPT
from .attention_memory import BackwardPoint, attention_backward
from .memory_shape import MemoryShape


SHARDINGS = ("fsdp2", "ddp")
GRADIENT_CHECKPOINTING = ("none", "full", "attention-saving")
DTYPES = {"bfloat16": 2, "float32": 4}
MIXED_PRECISIONS = ("bf16", "no")
DEVICES = ("cuda", "cpu")
WORKSPACE = "attention workspace"
PARTS = (
    "weights",
    "gradients",
    "optimizer",
    "activations",
    "logits",
    "received KV",
    "gathered",
    "temporary",
    WORKSPACE,
)
"""The parts that add up to the memory of every moment."""


@dataclass(frozen=True)
class TrainingSetup:
    """How a model is trained, as far as memory depends on it.

    Args:
        gpus (`int`): devices in all.
        sharding (`str`): "fsdp2", which shards weights, gradients and optimizer over all devices, or "ddp".
        dtype (`str`): in which the model is loaded.
        mixed_precision (`str`): accelerate's. With "bf16" FSDP2 holds fp32 shards, whatever the dtype was, and gathers
            them in bf16; DDP runs under autocast.
        gradient_checkpointing (`str`): "none", "full", or "attention-saving" (`save_attention_context_fn`).
        device (`str`): "cuda", where FlashAttention-2's backward needs a workspace ([`backward_buffers`]), or "cpu",
            where there is none.
    """

    gpus: int = 1
    sharding: str = "fsdp2"
    dtype: str = "bfloat16"
    mixed_precision: str = "bf16"
    gradient_checkpointing: str = "none"
    device: str = "cuda"

    def __post_init__(self):
        choices = {
            "sharding": SHARDINGS,
            "dtype": tuple(DTYPES),
            "mixed_precision": MIXED_PRECISIONS,
            "gradient_checkpointing": GRADIENT_CHECKPOINTING,
            "device": DEVICES,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigurationError(f"{name} is {getattr(self, name)!r}: choose one of {', '.join(allowed)}.")

    @property
    def weight_bytes(self) -> int:
        """Of a parameter that the optimizer sees; its gradient has as many, Adam's two moments twice as many."""
        return 4 if self.sharding == "fsdp2" and self.mixed_precision == "bf16" else DTYPES[self.dtype]

    @property
    def compute_bytes(self) -> int:
        """Of an element of what linear layers compute."""
        return 2 if self.mixed_precision == "bf16" else DTYPES[self.dtype]

    @property
    def stream_bytes(self) -> int:
        """Of an element of the residual stream: autocast adds bf16 results to the fp32 ones of fp32 weights."""
        return 4 if self.autocasts else self.compute_bytes

    @property
    def autocasts(self) -> bool:
        """Whether autocast casts weights, and what each linear layer reads."""
        return self.weight_bytes != self.compute_bytes and self.sharding == "ddp"


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device, at the moments of a step.

    Args:
        moments (`dict`): by moment the bytes of each of [`PARTS`].
        kept (`float`): bytes that forward keeps for backward: activations, logits, received KV, gathered weights.
    """

    moments: dict[str, dict[str, float]]
    kept: float

    @property
    def peak(self) -> str:
        """The moment with the most bytes."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def parts(self) -> dict[str, float]:
        """Of that moment."""
        return self.moments[self.peak]

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    def to_dict(self) -> dict[str, Any]:
        """JSON-serializable, in whole bytes."""
        moments = {name: {part: round(n) for part, n in parts.items()} for name, parts in self.moments.items()}
        return {"total": round(self.total), "peak": self.peak, "parts": moments[self.peak], "moments": moments}


@dataclass(frozen=True)
class _Layer:
    """Bytes a token of one layer.

    Args:
        kept: what backward needs.
        attention_result: of that, attention's output and logsumexp.
        shared_input: of that, the layer's input.
        backward: what backward has at most beside it, in the feed-forward block, weight gradients apart.
        block: of `kept`, what the feed-forward block and its norm keep, which their backward frees.
    """

    kept: float
    attention_result: float
    shared_input: float
    backward: float
    block: float


def estimate_memory(
    shape: MemoryShape,
    setup: TrainingSetup,
    tokens: float,
    received: float = 0,
    sent: float = 0,
    batch_tokens: int = 0,
    kept: bool | None = None,
    stage_keys: float | None = None,
    sequences: float = 1,
) -> MemoryEstimate:
    """Memory of one device in a step after the first, with the fused AdamW that `TrainingArguments` has as default.

    Args:
        shape (`MemoryShape`): of the model.
        setup (`TrainingSetup`): how it is trained.
        tokens (`float`): of the rank's row.
        received (`float`), sent (`float`): tokens whose KV the rank receives and sends in a layer.
        batch_tokens (`int`): of the whole batch, which every rank reads.
        kept (`bool`, *optional*): whether a layer keeps the KV it received until its backward; by default as this
            library does.
        stage_keys (`float`, *optional*): tokens whose KV the largest stage of a layer attends to; by default there is
            one stage, with all that the rank receives.
        sequences (`float`): sequences in one kernel call, at most.
    """
    layer = _layer(shape, setup)
    w, c, s = setup.weight_bytes, setup.compute_bytes, setup.stream_bytes
    shards = setup.gpus if setup.sharding == "fsdp2" else 1
    checkpointing = setup.gradient_checkpointing != "none"
    saving = setup.gradient_checkpointing == "attention-saving"
    if kept is None:
        kept = setup.gradient_checkpointing == "full" or received <= MOST_KEPT * tokens
    kept_kv = c * received * shape.kv_width if kept else 0

    # Kept by each layer from forward to backward, and what the layer in backward has besides.
    input_bytes = s * shape.hidden
    result = layer.attention_result
    if checkpointing:
        of_each, of_one = input_bytes + saving * result, layer.kept - layer.shared_input - saving * result
    else:
        of_each, of_one = layer.kept, 0
    kv_of_each, kv_of_one = (kept_kv, 0) if saving or not checkpointing else (0, kept_kv)

    head = shape.norm_bytes(shape.hidden, s) + (c if setup.autocasts else s) * shape.hidden
    rope = 2 * s * shape.key_dim
    always = tokens * (head + rope)
    stack = always + shape.layers * tokens * of_each
    logits = tokens * shape.vocabulary
    softcap = c * logits * shape.softcapped
    kept_logits = 4 * logits + softcap

    embedding, of_layer = shape.embedding_parameters, shape.layer_parameters
    state = {"weights": w * shape.parameters / shards, "optimizer": 2 * w * shape.parameters / shards}
    grads_of_head = 0 if setup.sharding == "fsdp2" and shape.tied else embedding + shape.hidden
    in_attention = attention_backward(
        shape,
        setup,
        tokens,
        received,
        sent,
        received if stage_keys is None else stage_keys,
        sequences,
        kept=kept,
        freed=tokens * layer.block,
    )
    in_layer = max((BackwardPoint(tokens * layer.backward), *in_attention), key=lambda point: point.total)
    gathered = _gathered(shape, setup)
    batch = 8 * (3 * batch_tokens + 4 * tokens)

    def moment(gradients, activations, logits=0, kv=0, gathered=0, temporary=0, workspace=0):
        values = {
            **state,
            "gradients": w * gradients / shards,
            "activations": activations,
            "logits": logits,
            "received KV": kv,
            "gathered": gathered,
            "temporary": temporary + batch,
            WORKSPACE: workspace,
        }
        return {part: values[part] for part in PARTS}

    everything = shape.parameters
    all_kv = shape.layers * kv_of_each
    cast_head = c * embedding * (w != c or shards > 1)
    one = tokens * (of_each + of_one)
    moments = {
        "loss": moment(0, stack, (c + 4 + 4 * (c != 4)) * logits + softcap, all_kv, gathered["forward"]),
        "loss backward": moment(0, stack, 12 * logits + softcap, all_kv, gathered["loss backward"]),
        "head backward": moment(
            embedding, stack, c * logits, all_kv, gathered["loss backward"], tokens * s * shape.hidden + cast_head
        ),
        "last layer's backward": moment(
            grads_of_head,
            stack - tokens * head + tokens * of_one - in_layer.freed,
            0,
            all_kv + kv_of_one,
            gathered["backward"],
            in_layer.temporary + w * of_layer / 3 * (shards == 1),
            in_layer.workspace,
        ),
        "first layer's backward": moment(
            everything - embedding * (not shape.tied) - of_layer * 2 / 3,
            one + tokens * rope - in_layer.freed,
            0,
            kv_of_each + kv_of_one,
            gathered["first layer"],
            in_layer.temporary,
            in_layer.workspace,
        ),
        "embedding's backward": moment(
            everything,
            0,
            0,
            0,
            gathered["embedding"],
            tokens * s * shape.hidden + (w if shards == 1 else c) * embedding * shape.tied,
        ),
        "optimizer": moment(everything, 0, gathered=gathered["optimizer"]),
    }
    return MemoryEstimate(moments, stack + kept_logits + all_kv + gathered["kept"])


def _block_bytes(shape: MemoryShape, setup: TrainingSetup) -> float:
    """Kept by the feed-forward block and the norm before it."""
    c, s, readers = setup.compute_bytes, setup.stream_bytes, 2 if shape.gated else 1
    read = c * readers if setup.autocasts else s
    inner = shape.kept_widths * c * shape.intermediate
    # Every expert gathers its tokens, and what it gives is weighted.
    routed = 2 * c * shape.hidden * shape.experts_per_token
    return shape.norm_bytes(shape.hidden, s) + read * shape.hidden + inner + routed


def _layer(shape: MemoryShape, setup: TrainingSetup) -> _Layer:
    c, s = setup.compute_bytes, setup.stream_bytes
    block = _block_bytes(shape, setup)
    read = 3 * c if setup.autocasts else s
    result = c * shape.query_heads * shape.value_dim + 4 * shape.query_heads
    attention = (
        shape.norm_bytes(shape.hidden, s)
        + read * shape.hidden
        + shape.norm_bytes(shape.normed_width + shape.latent_width, c)
        + c * (shape.latent_width + shape.latent_keys)
        + c * (shape.query_heads * shape.key_dim + shape.kv_width)
        + result
    )
    more_norms = (shape.norms - 2) * shape.norm_bytes(shape.hidden, s)
    # The gradients of both factors of the gated product stand beside them.
    backward = (2 if shape.gated else 1) * c * shape.intermediate + 2 * s * shape.hidden
    return _Layer(attention + block + more_norms, result, 4 * shape.hidden if s == 4 else 0, backward, block)


def _gathered(shape: MemoryShape, setup: TrainingSetup) -> dict[str, float]:
    """Copies of weights and gradients beside those of the optimizer, by moment.

    FSDP2 as accelerate wraps it: embedding, every layer, and final norm with head (which stays gathered until its
    backward); a layer is gathered ahead, and in backward a layer's gradients are reduced while the next computes.
    DDP's buckets hold all gradients once more. Autocast keeps what it casts until its layer's backward, or under
    checkpointing until forward ends.
    """
    c, of_layer, head = setup.compute_bytes, setup.compute_bytes * shape.layer_parameters, shape.embedding_parameters
    if setup.sharding == "fsdp2":
        tail = c * head
        return {
            "forward": tail + 2 * of_layer,
            "loss backward": tail + of_layer,
            "backward": 4 * of_layer + (2 * tail if shape.tied else 0),
            "first layer": 4 * of_layer + (2 * tail if shape.tied else 0),
            "embedding": 2 * tail + 2 * of_layer,
            "optimizer": 0,
            "kept": tail,
        }
    buckets = setup.weight_bytes * shape.parameters if setup.gpus > 1 else 0
    casts = c * (shape.layers * shape.layer_parameters + head) if setup.autocasts else 0
    if setup.gradient_checkpointing == "none":
        kept, of_layers = casts, casts - c * head * setup.autocasts
    else:
        kept, of_layers = c * head * setup.autocasts, of_layer * setup.autocasts
    return {
        "forward": buckets + casts,
        "loss backward": buckets + kept,
        "backward": buckets + of_layers,
        "first layer": buckets + of_layer * setup.autocasts,
        "embedding": buckets,
        "optimizer": buckets,
        "kept": kept,
    }


def largest_window(
    shape: MemoryShape,
    setup: TrainingSetup,
    cp_size: int,
    memory_bytes: float,
    *,
    received_share: float = 0,
    sent_share: float = 0,
    stage_share: float | None = None,
    sequence_share: float = 0,
    multiple: int = 1024,
) -> int:
    """The most tokens of a packed row that fit, a multiple of `multiple`; 0 if not even that many do.

    Args:
        cp_size (`int`): ranks that share the row.
        memory_bytes (`float`): what a device has for training.
        received_share (`float`), sent_share (`float`): tokens received and sent for each of the rank's own.
        stage_share (`float`, *optional*), sequence_share (`float`): likewise `stage_keys` and `sequences` of
            [`estimate_memory`].
    """

    def fits(units: int) -> bool:
        tokens = units * multiple / cp_size
        estimate = estimate_memory(
            shape,
            setup,
            tokens,
            received_share * tokens,
            sent_share * tokens,
            units * multiple,
            stage_keys=None if stage_share is None else stage_share * tokens,
            sequences=sequence_share * tokens,
        )
        return estimate.total <= memory_bytes

    low, high = 0, 1
    while fits(high) and high < 2**24:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * multiple
