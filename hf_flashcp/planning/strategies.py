"""`plan_documents`: from document lengths to a validated `ShardPlan`, by any strategy."""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Iterable, Sequence

from ..errors import UnmetCapWarning
from ..plan.lengths import check_lengths
from ..plan.shard_plan import ShardPlan
from ..plan.slices import Lengths, Slice, rank_pairs
from ..plan.topology import Topology
from ..predict.cost_model import CostModel
from .algorithm1 import flashcp
from .caps import Caps
from .fastest import fastest, in_stages
from .search.nodes import search_in_nodes
from .search.search import search
from .settings import DEFAULT_STRATEGY, PlanSettings
from .sharding import per_doc, per_seq, whole_doc


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
) -> ShardPlan:
    """Assigns the tokens of packed documents to context-parallel ranks.

    Pure and deterministic: every rank that plans the same lengths gets the same plan.

    Args:
        lengths (`Iterable[int]`): tokens of each document in packed order; any positive integers, no divisibility.
        cp_size (`int`): number of context-parallel ranks; the batch needs at least that many tokens.
        strategy (`str`, *optional*, defaults to `"search"`):
            - `"whole_doc"`: documents stay whole, balanced by attention work, no KV travels. Ranks may hold
              unequal tokens.
            - `"per_doc"`: every document is split over all ranks (zigzag): tokens and work balanced, most KV travels.
            - `"per_seq"`: the packed row is split over all ranks as if it were one document (Llama 3): tokens
              balanced, work only for one long document.
            - `"flashcp"`: Algorithm 1 of the FlashCP paper (arXiv 2606.08476): the longest documents split over all
              ranks, as few as the caps allow, the rest whole or with their heads moved to equalize tokens.
            - `"search"`: documents split over any number of ranks, unequally, as little as the caps allow: among plans
              within 10% of the least KV found, the one whose busiest rank receives and sends least. Never more KV than
              "flashcp", in total or on the busiest rank.
        cost_model (`CostModel`, *optional*): with `"search"`, look for the least predicted step time within the caps
            instead: balance where compute decides, little KV where the link does. Takes several times longer.
        max_imbalance (`float`, *optional*, defaults to 1.05): the most attention pairs a rank may hold, as a multiple
            of the mean. Binds "flashcp" and "search"; the others report theirs. Where no plan within it is found, the
            best balanced one known comes with an [`~hf_flashcp.errors.UnmetCapWarning`].
        max_token_imbalance (`float`, *optional*, defaults to 1.0): the most tokens a rank may hold, as a multiple of
            the mean; 1.0 means equal within one token. Binds "flashcp" and "search".
        minimize_total (`bool`, *optional*, defaults to `False`):
            With `"search"`, the least KV in total instead of little on the busiest rank.
        num_stages (`int`, *optional*): in how many stages a layer's KV travels, each while the one before is
            computed, at most cp_size - 1: what `cost_model` predicts to be best, else one.
        rotate_ranks (`bool`, *optional*, defaults to `False`):
            With `"per_doc"`, shift the rank labels by one from document to document. The total traffic stays, the
            largest rank's share of it falls.
        topology (`Topology`, *optional*): ranks in nodes: KV crosses to each node once and is handed on there.
            `"search"` then looks for the plan whose busiest links take the shortest, where a row between nodes takes
            `inter_node_cost` times longer; never busier than without. Beside a `cost_model` it takes the place of the
            hardware profile's `ranks_per_node`.

    Returns:
        `ShardPlan`: a validated partition.

    Raises:
        PlanError: no documents, an empty document, fewer tokens than ranks, or options that do not fit (see
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
    )
    return plan_with(settings, lengths)


def plan_with(settings: PlanSettings, lengths: Iterable[int]) -> ShardPlan:
    """[`plan_documents`] with options that have been checked; `hardware` needs a model by now."""
    begin = time.perf_counter()
    lengths, cp_size = check_lengths(lengths, settings.cp_size)
    caps = settings.max_imbalance, settings.max_token_imbalance
    cost_model, topology = settings.timing(), settings.topology
    offset_groups, ranks_per_node = None, topology.ranks_per_node if topology else None
    slices: Sequence[Sequence[Slice]]
    match settings.strategy:
        case "whole_doc":
            slices = whole_doc(lengths, cp_size)
        case "per_doc":
            slices = per_doc(lengths, cp_size, settings.rotate_ranks)
        case "per_seq":
            slices = per_seq(lengths, cp_size)
        case "flashcp":
            slices = flashcp(Caps(lengths, cp_size, *caps))
        case "search" if cost_model is not None:
            slices, offset_groups, ranks_per_node = _fastest(lengths, cp_size, *caps, cost_model, settings.num_stages)
        case _:
            slices = _searched(lengths, cp_size, *caps, settings.minimize_total, topology)
    plan = ShardPlan(lengths, cp_size, slices, offset_groups, ranks_per_node).validate()
    if settings.num_stages is not None and cost_model is None:
        plan = in_stages(plan, settings.num_stages)
    if settings.strategy in ("flashcp", "search"):
        _warn_of_unmet_cap(plan, settings.max_imbalance)
    plan.planning_seconds = time.perf_counter() - begin
    return plan


# Epochs and evaluation plan the same packs again. Plans are not kept: they carry what differs between batches.


@functools.lru_cache(maxsize=128)
def _searched(
    lengths: Lengths,
    cp_size: int,
    max_imbalance: float,
    max_token_imbalance: float,
    minimize_total: bool,
    topology: Topology | None,
) -> tuple[tuple[Slice, ...], ...]:
    caps = Caps(lengths, cp_size, max_imbalance, max_token_imbalance)
    slices = search(caps, minimize_total=minimize_total) if topology is None else search_in_nodes(caps, topology)
    return tuple(map(tuple, slices))


@functools.lru_cache(maxsize=128)
def _fastest(
    lengths: Lengths,
    cp_size: int,
    max_imbalance: float,
    max_token_imbalance: float,
    cost_model: CostModel,
    num_stages: int | None,
) -> tuple[tuple[tuple[Slice, ...], ...], tuple[tuple[int, ...], ...] | None, int | None]:
    plan = fastest(Caps(lengths, cp_size, max_imbalance, max_token_imbalance), cost_model, num_stages)
    return plan.slices, plan.offset_groups, plan.ranks_per_node


def _warn_of_unmet_cap(plan: ShardPlan, max_imbalance: float) -> None:
    """Tokens can always be equal within one; pairs cannot, where documents are short or there is little to cut."""
    pairs = rank_pairs(plan.slices)
    imbalance = max(pairs) * plan.cp_size / sum(pairs)
    if imbalance > max_imbalance:
        warnings.warn(
            f"max_imbalance={max_imbalance} is not met: no plan within it was found for {len(plan.lengths)} documents "
            f"of {plan.num_tokens:,} tokens on {plan.cp_size} ranks, so this one has {imbalance:.3f} times the mean "
            "of attention pairs on a rank. Pack more tokens, lower cp_size, raise the cap, or turn this into an "
            'error: warnings.simplefilter("error", hf_flashcp.errors.UnmetCapWarning).',
            UnmetCapWarning,
            stacklevel=4,
        )
