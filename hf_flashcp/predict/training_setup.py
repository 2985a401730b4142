"""`TrainingSetup` and `RankLoad`: memory depends on them beside the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ..errors import ConfigurationError


SHARDINGS = ("fsdp2", "ddp")
GRADIENT_CHECKPOINTING = ("none", "full", "attention-saving")
DTYPES = {"bfloat16": 2, "float32": 4}
MIXED_PRECISIONS = ("bf16", "no")
DEVICES = ("cuda", "cpu")


@dataclass(frozen=True)
class TrainingSetup:
    """How a model is trained, as far as memory depends on it. Values other than those listed above raise a
    `ConfigurationError`.

    With `sharding` "fsdp2" weights, gradients and optimizer are sharded over all GPUs; `mixed_precision` is
    accelerate's: with "bf16" FSDP2 holds fp32 shards, whatever the dtype was, and gathers them in bf16; DDP runs under
    autocast. `device` is "cuda", where FlashAttention-2's backward needs a workspace ([`backward_buffers`]), or "cpu".
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
        """Bytes per parameter that the optimizer sees; its gradient has as many, Adam's two moments twice as many."""
        return 4 if self.sharding == "fsdp2" and self.mixed_precision == "bf16" else DTYPES[self.dtype]

    @property
    def compute_bytes(self) -> int:
        """Bytes per element of what linear layers compute."""
        return 2 if self.mixed_precision == "bf16" else DTYPES[self.dtype]

    @property
    def stream_bytes(self) -> int:
        """Bytes per element of the residual stream: autocast adds bf16 results to the fp32 ones of fp32 weights."""
        return 4 if self.autocasts else self.compute_bytes

    @property
    def autocasts(self) -> bool:
        """Whether autocast casts weights, and what each linear layer reads."""
        return self.weight_bytes != self.compute_bytes and self.sharding == "ddp"


class RankLoad(NamedTuple):
    """Tokens that a plan makes one rank hold, and whose KV it moves in an attention layer's forward."""

    tokens: float
    received: float = 0
    sent: float = 0
    stage_keys: float | None = None  # that the largest stage attends to; all received, in one stage, if `None`
    sequences: float = 1  # at most in one kernel call
    batch_tokens: int = 0  # of the whole batch, which every rank reads

    @property
    def largest_stage(self) -> float:
        return self.received if self.stage_keys is None else self.stage_keys

    def scaled(self, tokens: float, batch_tokens: int) -> RankLoad:
        """The load of a row of other documents in the same proportions."""
        factor = tokens / self.tokens
        sizes = (self.received, self.sent, self.largest_stage, self.sequences)
        received, sent, stage_keys, sequences = (factor * size for size in sizes)
        return RankLoad(tokens, received, sent, stage_keys, sequences, batch_tokens)
