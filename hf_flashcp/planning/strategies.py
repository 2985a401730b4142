"""`plan_documents`: from document lengths to a validated `ShardPlan`, by any strategy."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterable

from ..errors import PlanError
from .algorithm1 import flashcp
from .plan import ShardPlan, Slice, check_lengths
from .search import search
from .sharding import per_doc, per_seq, whole_doc


STRATEGIES = ("whole_doc", "per_doc", "per_seq", "flashcp", "search")
"""Names that `plan_documents` takes as `strategy`."""

DEFAULT_STRATEGY = "search"


def plan_documents(
    lengths: Iterable[int],
    cp_size: int,
    *,
    strategy: str = DEFAULT_STRATEGY,
    max_imbalance: float = 1.05,
    max_token_imbalance: float = 1.0,
    rotate_ranks: bool = False,
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
            - `"flashcp"`: Algorithm 1 of the FlashCP paper: the longest documents split over all ranks, as few as
              the caps allow, the rest whole or with their heads moved to equalize tokens.
            - `"search"`: documents split over any number of ranks, unequally, as little as the caps allow: among plans
              within 10% of the least KV found, the one whose busiest rank receives and sends least. Never more KV than
              "flashcp", in total or on the busiest rank.
        max_imbalance (`float`, *optional*, defaults to 1.05): the most attention pairs a rank may hold, as a multiple
            of the mean. Binds "flashcp" and "search", except where even "per_doc" exceeds it; the others report
            theirs.
        max_token_imbalance (`float`, *optional*, defaults to 1.0): the most tokens a rank may hold, as a multiple of
            the mean; 1.0 means equal within one token. Binds "flashcp" and "search".
        rotate_ranks (`bool`, *optional*, defaults to `False`):
            With `"per_doc"`, shift the rank labels by one from document to document. The total traffic stays, the
            largest rank's share of it falls.

    Returns:
        `ShardPlan`: a validated partition.

    Raises:
        PlanError: no documents, an empty document, fewer tokens than ranks, an unknown strategy, a cap below 1.
    """
    begin = time.perf_counter()
    lengths, cp_size = check_lengths(lengths, cp_size)
    for name, cap in (("max_imbalance", max_imbalance), ("max_token_imbalance", max_token_imbalance)):
        if not isinstance(cap, (int, float)) or math.isnan(cap) or cap < 1:
            raise PlanError(f"{name} is {cap!r}: it is max / mean over ranks, a number not below 1.")
    if rotate_ranks and strategy != "per_doc":
        raise PlanError(f"rotate_ranks is an option of the strategy 'per_doc', not of {strategy!r}: leave it out.")
    match strategy:
        case "whole_doc":
            slices = whole_doc(lengths, cp_size)
        case "per_doc":
            slices = per_doc(lengths, cp_size, rotate_ranks)
        case "per_seq":
            slices = per_seq(lengths, cp_size)
        case "flashcp":
            slices = flashcp(lengths, cp_size, max_imbalance, max_token_imbalance)
        case "search":
            slices = _searched(lengths, cp_size, max_imbalance, max_token_imbalance)
        case _:
            raise PlanError(f"Unknown strategy {strategy!r}: choose one of {', '.join(map(repr, STRATEGIES))}.")
    plan = ShardPlan(lengths, cp_size, slices).validate()
    plan.planning_seconds = time.perf_counter() - begin
    return plan


@functools.lru_cache(maxsize=128)
def _searched(
    lengths: tuple[int, ...], cp_size: int, max_imbalance: float, max_token_imbalance: float
) -> tuple[tuple[Slice, ...], ...]:
    """Epochs and evaluation plan the same packs again."""
    slices = search(lengths, cp_size, max_imbalance=max_imbalance, max_token_imbalance=max_token_imbalance)
    return tuple(map(tuple, slices))
