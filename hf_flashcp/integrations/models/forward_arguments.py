"""The arguments of model forwards that this library reads, under all names that they have in supported transformers.

`tests/test_canaries.py` inspects the forwards of all causal language models, and fails if an argument is not on any
list. Otherwise, a renamed argument would go unnoticed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from transformers import Cache


# Key-value caches and recurrent states of earlier calls. Since transformers 5.24 all of them are called `cache`.
CACHES = ("cache", "past_key_values", "cache_params")
MEDIA = re.compile(
    "pixel|image|video|audio|patch|input_features|input_values|spatial_shapes|bbox|qformer|perceiver|protein|"
    "aspect_ratio|per_grid|feature_attention_mask|cross_attention_states|mm_encoder_outputs"
)
"""Inputs from images, video and audio. `mm_token_type_ids` and `token_type_ids` also occur with text."""


def has_cache(batch: Mapping[str, Any]) -> bool:
    """Return whether a forward reads or fills a cache."""
    return any(batch.get(name) is not None for name in CACHES) or any(
        isinstance(value, Cache) for value in batch.values()
    )


def can_shard(batch: Mapping[str, Any], on_one_rank: bool) -> bool:
    """Return whether an attached model shards a batch: not with a cache, and not padded batches `on_one_rank`."""
    if batch.get("flashcp_plan") is not None:
        return True
    return not (has_cache(batch) or (on_one_rank and batch.get("attention_mask") is not None))


def media(batch: Mapping[str, Any]) -> list[str]:
    """Return the names of a batch's inputs from images, video and audio."""
    return sorted(key for key, value in batch.items() if value is not None and MEDIA.search(key))
