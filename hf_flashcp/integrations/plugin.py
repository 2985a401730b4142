"""`FlashCPPlugin`: an accelerate `ParallelismConfig` for the context parallelism of this library."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch.distributed as dist
from accelerate import ParallelismConfig
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from ..attention.kernels import check_kernel_name
from ..distributed import group_timeout, require_agreement
from ..errors import ConfigurationError, PlanError
from ..plan import Topology
from ..plan.lengths import check_size
from ..planning import HardwareProfile, PlanSettings
from ..planning.settings import remember_owner, size_from_environment, strategy_from_environment
from .models.sharded_forward import sharded_forward_count


if TYPE_CHECKING:
    from transformers import TrainingArguments

BACKEND = "flashcp"
BATCHES = ("shared", "own", "turns")
_SIZES = ("cp_size", "dp_replicate_size", "dp_shard_size", "tp_size", "sp_size")
_PLAN_SETTINGS = ("cp_size", "strategy", "hardware", "topology", "max_imbalance", "max_token_imbalance", "num_stages")
_REFUSED_ARGUMENTS = {
    "auto_find_batch_size": "a rank that runs out of memory would restart alone, while the others wait for its keys "
    "and values. Choose per_device_train_batch_size",
    "neftune_noise_alpha": "its noise is scaled by the number of tokens in a row, of which each rank holds only a "
    "part, so the noise would grow with cp_size. Leave it out",
    "label_smoothing_factor": "it needs the logits of all tokens, but each rank has the logits of its own tokens "
    "only. Leave it out",
    "predict_with_generate": "it generates from a batch's rows, which are packed documents. Leave it out, and call "
    "model.generate yourself",
    "eval_use_gather_object": "each rank has a part of a document's predictions, and Python objects cannot be joined "
    "from parts. Leave it out",
    "train_sampling_strategy": "its sampler gives every process a separate batch, but cp_size processes share one. "
    "Leave it out, because documents are not padded",
}
_EXACT_FOR_ROWS = ("label_smoothing_factor", "eval_use_gather_object")
_REFUSED_VALUES = {"train_sampling_strategy": "batch_rebalance"}  # all values of the other arguments are refused


@dataclass(repr=False)
class FlashCPPlugin(ParallelismConfig):
    """A `ParallelismConfig` that tells accelerate that groups of `cp_size` processes share a batch.

    It also holds all settings of context parallelism, which [`FlashCPCollator`], [`attach`] and the trainers read from
    it. Settings must be the same in every process.

    The property `cp_enabled` is always False, because accelerate's own context parallelism would strip masks, require
    sdpa attention and FSDP2, and make every layer attend across documents. accelerate's data loading, device mesh and
    loss count still use `cp_size` and the mesh dimension "cp".

    Args:
        cp_size (`int`, *optional*): number of processes that share a batch. Defaults to the environment variable
            `PARALLELISM_CONFIG_CP_SIZE`, which `accelerate launch` sets from a config file with
            `parallelism_config_cp_backend: flashcp`, otherwise to 1.
        dp_replicate_size (`int`, *optional*): number of data-parallel groups that replicate the model. If neither
            this nor `dp_shard_size` is given, all groups of `cp_size` processes replicate it under DDP, and shard it
            under FSDP2.
        dp_shard_size (`int`, *optional*): number of data-parallel groups that shard the model under FSDP2, over all
            of their `cp_size` processes.
        strategy (`str`, *optional*): how documents are sharded, see [`plan_documents`]. Defaults to the environment
            variable `FLASHCP_STRATEGY`, otherwise to "search".
        hardware (`str`, `Path` or `HardwareProfile`, *optional*, defaults to `"auto"`): hardware for which "search"
            minimizes the predicted step time: the name of a profile, its JSON file, or a profile. "auto" is the
            profile for the device that the first rank of the group has when the model is attached; with other
            strategies and before that, it is `None`. With `None`, "search" minimizes KV traffic within the caps.
        topology (`Topology`, *optional*, defaults to `"auto"`): division of ranks into nodes. Keys and values then
            cross to each node once, and it replaces the `ranks_per_node` of the hardware profile. "auto" takes the
            nodes from the launcher's `LOCAL_WORLD_SIZE` when the model is attached, if the group fills several nodes,
            and otherwise is `None`: no division.
        max_imbalance (`float`, *optional*, defaults to 1.05): cap on a rank's attention pairs, see [`plan_documents`].
        max_token_imbalance (`float`, *optional*, defaults to 1.0): cap on a rank's tokens, see [`plan_documents`].
        num_stages (`int`, *optional*): number of stages in which a layer's KV travels, see [`plan_documents`].
        keep_received_kv (`bool`, *optional*): whether a layer keeps the KV that it received in forward until its
            backward (`True`, more memory), or fetches it again (`False`, more traffic). By default, layers that run
            again in backward (activation checkpointing without a `context_fn`) keep it, because only one of them holds
            it at a time, and all other layers follow the plan, see [`RankPlan`].
        kernel (`str`, *optional*): attention kernel of all layers, one of `hf_flashcp.attention.kernels.CAPABILITIES`.
            By default each layer uses the fastest kernel that computes it exactly on its device, see docs/gpu.md. If
            the kernel cannot run a layer, the first forward raises an error with the reason.
        head_groups (`int`, *optional*, defaults to 1): number of groups of KV heads that an attention layer computes
            one after another, in forward and in backward. Gradients are the same. Buffers of the attention then exist
            for one group at a time: packed and received KV (where it is not kept), partial outputs, and the kernel's
            workspace. Kernel calls and exchanges are multiplied by the number of groups, with the same bytes in total.
            Groups are as equal as possible. A layer with fewer KV heads than `head_groups` has one group per KV head,
            so with a single KV head (multi-query attention) nothing changes.
        mlp_tiles (`int`, *optional*, defaults to 1): number of tiles of tokens that a dense feed-forward block
            computes one after another, in forward and in backward. Gradients are the same. Forward keeps only the
            block's input, and backward computes each tile again, so the inner activations exist for one tile at a
            time. The gradients of the block's weights are added up in at least fp32. Blocks that contain experts,
            norms or dropout compute all tokens at once; if there are no others, [`attach`] raises an error.
        skip_logits (`bool`, *optional*): whether the loss is computed chunk by chunk in the model's output head, so
            that the logits of all tokens never exist, and outputs have no `logits`. By default, the trainers do so
            where nothing needs logits, and models attached with [`attach`] do it for batches with
            `skip_logits=True`. `True` also covers all other batches with labels, and makes it an error if something
            needs logits. See docs/memory.md.
        batches (`str`, *optional*): what the `cp_size` processes of a group read, for trainers of whole rows (see
            docs/preference.md). "shared": all read the same batch. "own": each reads a batch of its own, and all of
            them are pooled into one plan. "turns": each reads a batch of its own, and each batch in turn is sharded
            over the group, for long rollouts. By default the trainer's own: "own" for GRPO and RLOO, otherwise
            "shared".
        global_router_loss (`bool`, *optional*, defaults to `False`): whether the router loss of a mixture-of-experts
            model is computed over the batches of all data-parallel groups in training, and not over each group's own
            batch.

    Attributes:
        plan_settings (`PlanSettings`): the settings that determine how batches are planned. After [`attach`], its
            `hardware` and `topology` are those that "auto" stands for.

    Raises:
        ConfigurationError: a size does not match the number of processes; tensor parallelism, sequence parallelism,
            DeepSpeed or FSDP1 is used; there is no such kernel; or settings of plans contradict each other (see
            [`PlanSettings`]).
    """

    strategy: str | None = None
    hardware: str | Path | HardwareProfile | None = "auto"
    topology: Topology | Literal["auto"] | None = "auto"
    max_imbalance: float = 1.05
    max_token_imbalance: float = 1.0
    num_stages: int | None = None
    keep_received_kv: bool | None = None
    kernel: str | None = None
    head_groups: int = 1
    mlp_tiles: int = 1
    skip_logits: bool | None = None
    batches: str | None = None
    global_router_loss: bool = False

    def __post_init__(self):
        if self.cp_backend is None:
            self.cp_backend = os.environ.get("PARALLELISM_CONFIG_CP_BACKEND", BACKEND)
        if self.cp_backend not in (BACKEND, "torch"):
            raise ConfigurationError(
                f'cp_backend is "{self.cp_backend}", but FlashCPPlugin is the backend "{BACKEND}". Leave cp_backend '
                "out."
            )
        if self.cp_handler is not None:
            raise ConfigurationError("cp_handler belongs to accelerate's own context parallelism. Leave it out.")
        if self.kernel is not None:
            check_kernel_name(self.kernel)
        if self.skip_logits not in (None, True, False):
            raise ConfigurationError(f"skip_logits is {self.skip_logits!r}. Set it to True or False, or leave it out.")
        if self.batches not in (None, *BATCHES):
            raise ConfigurationError(
                f"batches is {self.batches!r}. Use 'shared', 'own' or 'turns', or leave it out (docs/preference.md)."
            )
        if self.strategy is None:
            self.strategy = strategy_from_environment()
        try:
            for name in _SIZES:
                size = getattr(self, name)
                setattr(self, name, check_size(name, size_from_environment(name) if size is None else size))
            for name in ("head_groups", "mlp_tiles"):
                setattr(self, name, check_size(name, getattr(self, name)))
            self.plan_settings = PlanSettings(**{name: getattr(self, name) for name in _PLAN_SETTINGS})
        except PlanError as error:
            raise ConfigurationError(str(error)) from None
        for name in ("tp_size", "sp_size"):
            if (size := getattr(self, name)) > 1:
                raise ConfigurationError(f"{name} is {size}, but flashcp does not combine with it. Set {name} to 1.")
        cp_size = self.cp_size
        # The base class only knows its own backend and restrictions, so it validates the rest with cp_size 1.
        self.cp_size, self.cp_backend = 1, "torch"
        super().__post_init__()
        self.cp_backend = BACKEND
        self._set_size("cp", cp_size)
        remember_owner(self)

    @property
    def cp_enabled(self) -> bool:
        """Always False, so that accelerate does not apply its own context parallelism."""
        return False

    @property
    def non_dp_dim_names(self):
        return super().non_dp_dim_names + self._cp_dim_names

    @property
    def dp_shard_cp_dim_names(self):
        return super().dp_shard_cp_dim_names + self._cp_dim_names

    @property
    def dp_cp_dim_names(self):
        return super().dp_cp_dim_names + self._cp_dim_names

    @property
    def _cp_dim_names(self) -> list[str]:
        return ["cp"] if self.cp_size > 1 else []

    def build_device_mesh(self, device_type: str):
        if PartialState().num_processes > 1:
            sizes = {name: getattr(self, name) for name in ("cp_size", "dp_replicate_size", "dp_shard_size")}
            advice = "Give every process the same FlashCPPlugin and config file."
            require_agreement("parallelism", sizes, dist.group.WORLD, advice=advice)
        self._fit_processes(PartialState().num_processes)
        groups_before = set(_process_groups())
        mesh = super().build_device_mesh(device_type)
        for group in set(_process_groups()) - groups_before:  # PyTorch gives the groups of a mesh its default timeout
            dist.distributed_c10d._set_pg_timeout(group_timeout(), group)
        return mesh

    def _fit_processes(self, num_processes: int) -> None:
        if num_processes % self.cp_size:
            raise ConfigurationError(
                f"cp_size {self.cp_size} does not divide the {num_processes} processes. Launch a multiple of cp_size "
                "processes (accelerate launch --num_processes N; on CPU see docs/launch.md)."
            )
        left = num_processes // self.cp_size
        if self.data_parallel_size == 1 and left > 1:
            state = AcceleratorState if AcceleratorState._shared_state else PartialState
            sharded = state().distributed_type == DistributedType.FSDP
            self._set_size("dp_shard" if sharded else "dp_replicate", left)
        if self.data_parallel_size != left:
            raise ConfigurationError(
                f"dp_replicate_size {self.dp_replicate_size} x dp_shard_size {self.dp_shard_size} x cp_size "
                f"{self.cp_size} does not equal the number of processes, {num_processes}. Leave the data parallel "
                f"sizes out, or make their product {left}."
            )

    def _validate_accelerator(self, accelerator) -> None:
        # Replaces the base class's checks, which reject DDP beside cp_size > 1 and FSDP2 over "cp" alone.
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise ConfigurationError("flashcp does not run under DeepSpeed. Use FSDP2 (fsdp_version: 2) or DDP.")
        if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
            raise ConfigurationError("flashcp does not run under FSDP1. Set fsdp_version: 2.")
        if accelerator.distributed_type == DistributedType.MULTI_GPU and self.dp_shard_size > 1:
            raise ConfigurationError(
                f"dp_shard_size is {self.dp_shard_size}, but nothing is sharded under DDP. Launch with FSDP2, or use "
                "dp_replicate_size."
            )
        if self.cp_size > 1:
            self._check_attached_at_first_backward(accelerator)

    def _check_attached_at_first_backward(self, accelerator) -> None:
        backward, forwards_before = accelerator.backward, sharded_forward_count()

        @functools.wraps(backward)
        def checked_backward(*args, **kwargs):
            if sharded_forward_count() == forwards_before:
                raise ConfigurationError(
                    f"The Accelerator has FlashCPPlugin(cp_size={self.cp_size}), but no model is attached: every "
                    "process ran the whole batch, so gradients would count cp_size times. Use FlashCPTrainer, add "
                    "FlashCPCallback(), or call hf_flashcp.attach(model, accelerator)."
                )
            accelerator.backward = backward
            return backward(*args, **kwargs)

        accelerator.backward = checked_backward


def _process_groups() -> list[dist.ProcessGroup]:
    return list(dist.distributed_c10d._world.pg_map) if dist.is_initialized() else []


def require_exact_arguments(args: TrainingArguments, reads_rows: bool = False) -> None:
    """Raise a `ConfigurationError` for `TrainingArguments` that fail or are not exact with a cp_size above 1.

    `reads_rows` says that the outputs are those of whole rows.
    """
    for option, reason in _REFUSED_ARGUMENTS.items():
        if reads_rows and option in _EXACT_FOR_ROWS:
            continue
        value = getattr(args, option, None)
        if value and value == _REFUSED_VALUES.get(option, value):
            raise ConfigurationError(f"{option} cannot be used under context parallelism: {reason}.")
