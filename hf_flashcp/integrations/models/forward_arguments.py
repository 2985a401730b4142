"""The arguments of model forwards that we read, by every name that a supported transformers gives them.

`tests/test_canaries.py` goes through the forwards of all causal language models and fails for a name that is on no
list: a renamed argument would otherwise pass for one that we do not know, and silently change what we do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from transformers import Cache


# Key-value caches and recurrent states of earlier calls; transformers 5.24 calls all of them `cache`.
CACHES = ("cache", "past_key_values", "cache_params")
MEDIA = re.compile(
    "pixel|image|video|audio|patch|input_features|input_values|spatial_shapes|bbox|qformer|perceiver|protein|"
    "aspect_ratio|per_grid|feature_attention_mask|cross_attention_states|mm_encoder_outputs"
)
"""What comes from images, video and audio. `mm_token_type_ids` and `token_type_ids` come with text too."""


def has_cache(batch: Mapping[str, Any]) -> bool:
    """Whether a forward continues from a cache, or fills one."""
    return any(batch.get(name) is not None for name in CACHES) or any(
        isinstance(value, Cache) for value in batch.values()
    )


def media(batch: Mapping[str, Any]) -> list[str]:
    return sorted(key for key, value in batch.items() if value is not None and MEDIA.search(key))
