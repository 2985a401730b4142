"""`plan_documents`: makes a validated `ShardPlan` from document lengths, by any strategy."""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Iterable

from ..errors import UnmetCapWarning
from ..plan.lengths import check_lengths
from ..plan.moved import rank_pairs
from ..plan.shard_plan import ShardPlan
from ..plan.slice_table import SliceColumns
from ..plan.slices import Lengths
from ..plan.topology import Topology
from ..predict.cost_model import CostModel
from .algorithm1 import flashcp
from .caps import Caps
from .fastest import fastest
from .search.nodes import search_in_nodes
from .search.search import search
from .settings import DEFAULT_STRATEGY, PlanSettings
from .sharding import per_doc_columns, per_seq, whole_doc
from .stagings import in_stages


def plan_documents(
    lengths: Iterable[int],
    cp_size: int,
    *,
    strategy: str = DEFAULT_STRATEGY,
    cost_model: CostModel | None = None,
    max_imbalance: float = 1.05,
    max_token_imbalance: float = 1.0,
    minimize_total: bool = False,
    num_stages: int | None = None,
    rotate_ranks: bool = False,
    topology: Topology | None = None,
    state_tokens: float = 0.0,
) -> ShardPlan:
    """Make a plan that assigns the tokens of packed documents to context-parallel ranks.

    The function is pure and deterministic: every rank that plans the same lengths gets the same plan.

    Args:
        lengths (`Iterable[int]`): tokens of each document, in packed order. They may be any positive integers.
        cp_size (`int`): number of context-parallel ranks. The batch needs at least this many tokens.
        strategy (`str`, *optional*, defaults to `"search"`):
            - `"whole_doc"`: keeps documents whole and balances attention work. No KV travels. Ranks may hold different
              numbers of tokens.
            - `"per_doc"`: splits every document over all ranks in a zigzag. Tokens and attention work are balanced,
              but the most KV travels.
            - `"per_seq"`: splits the packed row over all ranks as if it were one document, as Llama 3 did. Tokens are
              balanced; attention work is balanced only if the row is one long document.
            - `"flashcp"`: Algorithm 1 of the FlashCP paper (arXiv 2606.08476). Splits the longest documents over all
              ranks, as few as the caps allow. All others stay whole, or have their heads moved to equalize tokens.
            - `"search"`: splits documents over any number of ranks, into unequal parts, as little as the caps allow.
              Of the plans within 10% of the least total KV found, it returns the one whose busiest rank receives or
              sends the least. It never moves more KV than "flashcp", in total or on the busiest rank.
        cost_model (`CostModel`, *optional*): with `"search"`, look for the least predicted step time within the caps
            instead. This favors balance where compute is the bottleneck, and little KV where a link is.
        max_imbalance (`float`, *optional*, defaults to 1.05): the most attention pairs that a rank may hold, as a
            multiple of the mean. Only "flashcp" and "search" obey it. If they find no plan within the cap, the best
            balanced plan known is returned, with an [`~hf_flashcp.errors.UnmetCapWarning`].
        max_token_imbalance (`float`, *optional*, defaults to 1.0): the most tokens that a rank may hold, as a multiple
            of the mean; 1.0 means that ranks' tokens differ by at most one. Only "flashcp" and "search" obey it.
        minimize_total (`bool`, *optional*, defaults to `False`):
            With `"search"`, minimize the KV in total instead of the KV of the busiest rank.
        num_stages (`int`, *optional*): number of stages in which a layer's KV travels, at most cp_size - 1. Each stage
            travels while the one before it is computed. The default is the number that `cost_model` predicts to be
            fastest, or one stage without a cost model.
        rotate_ranks (`bool`, *optional*, defaults to `False`):
            With `"per_doc"`, shift the ranks by one from document to document. The total traffic stays the same, and
            the share of the busiest rank falls.
        topology (`Topology`, *optional*): the ranks' nodes. KV is then sent to each node once and forwarded inside it.
            `"search"` looks for the plan whose busiest links need the least time, where a row between nodes takes
            `inter_node_cost` times as long as a row inside a node. Links are never busier than with the plan that is
            made without a topology. With a `cost_model`, the topology replaces the hardware profile's
            `ranks_per_node`.
        state_tokens (`float`, *optional*, defaults to 0.0): with `"search"`, for models with recurrent layers, the
            price of a state that a rank receives or sends because a document is cut, in tokens whose KV travels. "KV"
            above then includes states. Slices under 64 tokens have the same price, unless they are whole documents.
            [`~hf_flashcp.predict.model_shape.ModelShape.state_tokens`] is the price at which both take as many bytes.
            A `cost_model` knows it.

    Returns:
        `ShardPlan`: a validated plan.

    Raises:
        PlanError: no documents, an empty document, fewer tokens than ranks, or options that do not fit together (see
            [`PlanSettings`]).
    """
    settings = PlanSettings(
        cp_size,
        strategy,
        cost_model=cost_model,
        max_imbalance=max_imbalance,
        max_token_imbalance=max_token_imbalance,
        minimize_total=minimize_total,
        num_stages=num_stages,
        rotate_ranks=rotate_ranks,
        topology=topology,
        state_tokens=state_tokens,
    )
    return plan_with(settings, lengths)


def plan_with(settings: PlanSettings, lengths: Iterable[int]) -> ShardPlan:
    """Make a plan as [`plan_documents`] does, from settings. If they have a `hardware`, they need a model, too."""
    begin = time.perf_counter()
    lengths, cp_size = check_lengths(lengths, settings.cp_size)
    caps = settings.max_imbalance, settings.max_token_imbalance
    cost_model, topology = settings.timing(), settings.topology
    offset_groups, ranks_per_node = None, topology.ranks_per_node if topology else None
    match settings.strategy:
        case "whole_doc":
            columns = SliceColumns.of(whole_doc(lengths, cp_size))
        case "per_doc":
            columns = per_doc_columns(lengths, cp_size, settings.rotate_ranks)
        case "per_seq":
            columns = SliceColumns.of(per_seq(lengths, cp_size))
        case "flashcp":
            columns = SliceColumns.of(flashcp(Caps(lengths, cp_size, *caps)))
        case "search" if cost_model is not None:
            columns, offset_groups, ranks_per_node = _fastest(lengths, cp_size, *caps, cost_model, settings.num_stages)
        case _:
            columns = _searched(lengths, cp_size, *caps, settings.minimize_total, topology, settings.state_tokens)
    plan = ShardPlan.from_columns(lengths, cp_size, columns, offset_groups, ranks_per_node).validate()
    if settings.num_stages is not None and cost_model is None:
        plan = in_stages(plan, settings.num_stages)
    if settings.strategy in ("flashcp", "search"):
        _warn_of_unmet_cap(plan, settings.max_imbalance)
    plan.planning_seconds = time.perf_counter() - begin
    return plan


# Slices are cached because later epochs and evaluations plan the same packs again. Plans are not cached, because they
# carry attributes of their batch.


@functools.lru_cache(maxsize=128)
def _searched(
    lengths: Lengths,
    cp_size: int,
    max_imbalance: float,
    max_token_imbalance: float,
    minimize_total: bool,
    topology: Topology | None,
    state_tokens: float,
) -> SliceColumns:
    caps = Caps(lengths, cp_size, max_imbalance, max_token_imbalance)
    if topology is None:
        slices = search(caps, minimize_total=minimize_total, state_tokens=state_tokens)
    else:
        slices = search_in_nodes(caps, topology, state_tokens)
    return SliceColumns.of(slices)


@functools.lru_cache(maxsize=128)
def _fastest(
    lengths: Lengths,
    cp_size: int,
    max_imbalance: float,
    max_token_imbalance: float,
    cost_model: CostModel,
    num_stages: int | None,
) -> tuple[SliceColumns, tuple[tuple[int, ...], ...] | None, int | None]:
    plan = fastest(Caps(lengths, cp_size, max_imbalance, max_token_imbalance), cost_model, num_stages)
    return plan.columns, plan.offset_groups, plan.ranks_per_node


def _warn_of_unmet_cap(plan: ShardPlan, max_imbalance: float) -> None:
    """Warn if the plan exceeds the cap on attention pairs.

    The cap on tokens can always be met. The cap on pairs cannot be met if documents are short or few can be cut.
    """
    pairs = rank_pairs(plan)
    imbalance = max(pairs) * plan.cp_size / sum(pairs)
    if imbalance > max_imbalance:
        warnings.warn(
            f"max_imbalance={max_imbalance} is not met: no plan within the cap was found for {len(plan.lengths)} "
            f"documents of {plan.num_tokens:,} tokens on {plan.cp_size} ranks. This plan's fullest rank has "
            f"{imbalance:.3f} times the mean attention pairs. Pack more tokens, lower cp_size, or raise the cap; "
            'warnings.simplefilter("error", hf_flashcp.errors.UnmetCapWarning) makes this an error.',
            UnmetCapWarning,
            stacklevel=4,
        )
