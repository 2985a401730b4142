"""`TrainingSetup` and `RankLoad`: how a model is trained and what a rank holds, which determine memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ..errors import ConfigurationError
from ..plan.kernel_calls import GRIDS


SHARDINGS = ("fsdp2", "ddp")
GRADIENT_CHECKPOINTING = ("none", "full", "attention-saving")
DTYPES = {"bfloat16": 2, "float32": 4}
MIXED_PRECISIONS = ("bf16", "no")
DEVICES = ("cuda", "cpu")
KERNELS = tuple(GRIDS)


@dataclass(frozen=True)
class TrainingSetup:
    """How a model is trained, as far as memory depends on it.

    Args:
        gpus (`int`, *optional*, defaults to 1): number of devices.
        sharding (`str`, *optional*, defaults to `"fsdp2"`): one of [`SHARDINGS`]. "fsdp2" shards weights, gradients
            and optimizer state over all devices.
        dtype (`str`, *optional*, defaults to `"bfloat16"`): one of [`DTYPES`], the dtype of the loaded model.
        mixed_precision (`str`, *optional*, defaults to `"bf16"`): one of [`MIXED_PRECISIONS`], as in accelerate. With
            "bf16", FSDP2 holds fp32 shards of any dtype and gathers them in bf16, and DDP runs under autocast.
        gradient_checkpointing (`str`, *optional*, defaults to `"none"`): one of [`GRADIENT_CHECKPOINTING`].
        device (`str`, *optional*, defaults to `"cuda"`): one of [`DEVICES`]. On "cuda" the attention kernel's backward
            needs a workspace ([`backward_buffers`]).
        kernel (`str`, *optional*, defaults to `"torch_flash"`): the attention kernel on "cuda", one of [`KERNELS`].
        skip_logits (`bool`, *optional*, defaults to `True`): whether the loss is computed chunk by chunk, without
            holding the logits of all tokens ([`~loss_memory`]).
        offload (`bool`, *optional*, defaults to `False`): whether what activation checkpointing saves is kept in the
            host's memory.
        every_n_layers (`int`, *optional*, defaults to 1): activation checkpointing of only the first of this number of
            layers; the others keep everything.
        head_groups (`int`, *optional*, defaults to 1): number of groups of KV heads that a layer's attention computes
            one after another; at most as many as there are KV heads.
        mlp_tiles (`int`, *optional*, defaults to 1): number of tiles of tokens that a dense feed-forward block
            computes one after another; it keeps only its input for backward.
        keep_received_kv (`bool`, *optional*): whether a layer keeps received KV until its backward. The default is
            this library's own choice.

    Raises:
        ConfigurationError: a value is not one of those listed, or not a positive whole number.
    """

    gpus: int = 1
    sharding: str = "fsdp2"
    dtype: str = "bfloat16"
    mixed_precision: str = "bf16"
    gradient_checkpointing: str = "none"
    device: str = "cuda"
    kernel: str = "torch_flash"
    skip_logits: bool = True
    offload: bool = False
    every_n_layers: int = 1
    head_groups: int = 1
    mlp_tiles: int = 1
    keep_received_kv: bool | None = None

    def __post_init__(self):
        choices = {
            "sharding": SHARDINGS,
            "dtype": tuple(DTYPES),
            "mixed_precision": MIXED_PRECISIONS,
            "gradient_checkpointing": GRADIENT_CHECKPOINTING,
            "device": DEVICES,
            "kernel": KERNELS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigurationError(f"{name} is {getattr(self, name)!r}: choose one of {', '.join(allowed)}.")
        for name in ("every_n_layers", "head_groups", "mlp_tiles"):
            number = getattr(self, name)
            if type(number) is not int or number < 1:
                raise ConfigurationError(f"{name} must be a whole number of at least 1, got {number!r}.")

    @property
    def weight_bytes(self) -> int:
        """Bytes per parameter in the weights that the optimizer updates. Gradients and each of Adam's two moments have
        as many."""
        return 4 if self.sharding == "fsdp2" and self.mixed_precision == "bf16" else DTYPES[self.dtype]

    @property
    def compute_bytes(self) -> int:
        """Bytes per element of the results of linear layers."""
        return 2 if self.mixed_precision == "bf16" else DTYPES[self.dtype]

    @property
    def stream_bytes(self) -> int:
        """Bytes per element of the residual stream, which stays in fp32 under autocast."""
        return 4 if self.autocasts else self.compute_bytes

    @property
    def autocasts(self) -> bool:
        """Whether autocast casts the weights and inputs of linear layers."""
        return self.weight_bytes != self.compute_bytes and self.sharding == "ddp"


class RankLoad(NamedTuple):
    """The tokens that one rank holds under a plan, and those whose KV it moves in an attention layer's forward."""

    tokens: float  # tokens that the rank holds
    received: float = 0  # tokens whose KV it receives
    sent: float = 0  # tokens whose KV it sends
    stage_keys: float | None = None  # keys of the largest stage; `None` means one stage with all received keys
    sequences: float = 1  # the most sequences in one kernel call
    batch_tokens: int = 0  # tokens of the whole batch, which every rank reads
    stage_masked: bool = False  # whether the largest stage has a causal mask, as in layers with a sliding window
    states_received: float = 0  # slices whose states or gradients it receives in a recurrent layer
    states_held: float = 0  # its own slices of documents that are cut
    continued_tokens: float = 0  # its tokens in slices that do not begin a document

    @property
    def largest_stage(self) -> float:
        """Number of keys in the largest stage."""
        return self.received if self.stage_keys is None else self.stage_keys

    def scaled(self, tokens: float, batch_tokens: int) -> RankLoad:
        """Return the load of a longer or shorter row, in proportion to the rank's tokens.

        The number of states stays the same.
        """
        factor = tokens / self.tokens
        return self._replace(
            tokens=tokens,
            received=factor * self.received,
            sent=factor * self.sent,
            stage_keys=factor * self.largest_stage,
            sequences=factor * self.sequences,
            batch_tokens=batch_tokens,
            continued_tokens=factor * self.continued_tokens,
        )
