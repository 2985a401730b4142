"""Reads which layers of a hybrid model are recurrent or convolutional, and their sizes, from entries of its config.

With [`~model_config.ModelConfig`], this module is the only one that knows the names of entries. Entries that a
config.json may leave out have the defaults of transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


Read = Callable[[str], Any]
"""A function that returns the checked value of an entry, or `None` if the config does not have it."""

ATTENTION = ("full_attention", "sliding_attention", "hybrid")
"""Kinds of layers that have attention. A "hybrid" layer has full attention and a recurrent mixer."""

MIXING = ("linear_attention", "conv", "hybrid")
"""Kinds of layers that have a recurrent or convolutional mixer."""

_OLD_NAMES = {"mamba": "linear_attention", "attention": "full_attention"}
_NEMOTRON_LETTERS = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}


class Mixers(NamedTuple):
    """The sizes of a model's recurrent or convolutional mixers.

    In a gated delta rule the state of a head is (K, V), in Mamba-2 it is (N, P).
    """

    rule: str  # "delta", "mamba2", or "convolution" for a mixer without a state
    heads: int  # number of states, H
    groups: int  # number of key heads in a delta rule, or of groups of B and C in Mamba-2
    key_dim: int  # K or N
    value_dim: int  # V or P
    kernel: int  # W, number of tokens that the short convolution reads
    convolved: int  # elements per token that the short convolution reads
    chunk: int  # number of tokens that the scan computes together
    parameters: int  # number of parameters in the matrices of one mixer, its convolution included


def mixers_of(model_type: str | None, read: Read) -> Mixers | None:
    """Return the sizes of a model's mixers, or `None` if its model type is not that of a known hybrid model."""
    reader = _MIXERS.get(model_type or "")
    return None if reader is None else reader(read)


def layer_kinds(model_type: str | None, read: Read) -> list[str] | None:
    """Return the kind of each layer, or `None` if the config does not say."""
    listed = read("layer_types") or read("layers_block_type")
    if listed:
        return [_OLD_NAMES.get(kind, kind) for kind in listed]
    reader = _KINDS.get(model_type or "")
    return None if reader is None else reader(read)


def _every(count: int, interval: int, others: str = "linear_attention") -> list[str]:
    return [others if (layer + 1) % interval else "full_attention" for layer in range(count)]


def _among(count: int, attention: list[int], others: str = "linear_attention") -> list[str]:
    return ["full_attention" if layer in attention else others for layer in range(count)]


def _kimi_kinds(read: Read) -> list[str]:
    count, listed = read("num_hidden_layers"), (read("linear_attn_config") or {}).get("full_attn_layers")
    if listed is not None:
        return _among(count, [layer - 1 for layer in listed])  # the config counts from 1
    return _among(count, list(range(4, count, 4)))


def _olmo_kinds(read: Read) -> list[str]:
    kinds = _every(read("num_hidden_layers"), 4)
    return kinds if "full_attention" in kinds else [*kinds[:-1], "full_attention"]


def _lfm3_kinds(read: Read) -> list[str]:
    by_place = {0: "sliding_attention", 2: "full_attention"}
    return [by_place.get(layer % 4, "conv") if layer else "conv" for layer in range(read("num_hidden_layers"))]


def _nemotron_kinds(read: Read) -> list[str]:
    return [_NEMOTRON_LETTERS.get(letter, letter) for letter in read("hybrid_override_pattern") or "ME*-"]


def _zamba_kinds(read: Read) -> list[str]:
    shared = read("hybrid_layer_ids") or [6, 12, 18, 24, 30, 36, 42, 47, 51]
    return ["hybrid" if layer in shared else "linear_attention" for layer in range(read("num_hidden_layers"))]


def _qwen_kinds(read: Read) -> list[str]:
    return _every(read("num_hidden_layers"), read("full_attention_interval") or 4)


_QWEN = ("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text")

_KINDS: dict[str, Callable[[Read], list[str]]] = {
    **dict.fromkeys(_QWEN, _qwen_kinds),
    "bailing_hybrid": lambda read: _every(read("num_hidden_layers"), read("layer_group_size") or 6),
    "bamba": lambda read: _among(read("num_hidden_layers"), read("attn_layer_indices") or []),
    "falcon_h1": lambda read: ["hybrid"] * read("num_hidden_layers"),
    "granitemoehybrid": lambda read: ["linear_attention"] * read("num_hidden_layers"),
    "kimi_linear": _kimi_kinds,
    "lfm2": lambda read: _among(
        read("num_hidden_layers"), read("full_attn_idxs") or list(range(read("num_hidden_layers"))), "conv"
    ),
    "lfm3": _lfm3_kinds,
    "nemotron_h": _nemotron_kinds,
    "olmo_hybrid": _olmo_kinds,
    "zamba2": _zamba_kinds,
}


CHUNK = 64
"""Number of tokens that kernels of delta rules compute together. Those of Mamba-2 take a multiple of it."""


def _gated_delta(read: Read) -> Mixers:
    hidden, query_heads = read("hidden_size"), read("num_attention_heads")
    olmo = read("model_type") == "olmo_hybrid"
    key_heads = read("linear_num_key_heads") or (query_heads if olmo else 16)
    heads = read("linear_num_value_heads") or (query_heads if olmo else 32)
    key_dim = read("linear_key_head_dim") or (3 * hidden // (4 * key_heads) if olmo else 128)
    value_dim = read("linear_value_head_dim") or (2 * key_dim if olmo else 128)
    kernel = read("linear_conv_kernel_dim") or 4
    keys, values = key_heads * key_dim, heads * value_dim
    # Queries, keys, values, the gate of the output, two gates per head, and the output projection.
    matrices = hidden * (2 * keys + 2 * values + 2 * heads) + values * hidden
    return _delta(heads, key_heads, key_dim, value_dim, kernel, 2 * keys + values, matrices)


def _kimi_delta(read: Read) -> Mixers:
    listed = read("linear_attn_config") or {}
    hidden, dim = read("hidden_size"), listed.get("head_dim") or read("linear_head_dim") or 128
    heads = listed.get("num_heads") or read("linear_num_heads") or 32
    kernel = listed.get("short_conv_kernel_size") or read("linear_conv_kernel_dim") or 4
    width = heads * dim
    # Queries, keys, values and output, the low-rank gates of state and output, and a gate per head.
    matrices = 4 * hidden * width + 2 * (hidden + width) * dim + hidden * heads
    return _delta(heads, heads, dim, dim, kernel, 3 * width, matrices)


def _bailing_delta(read: Read) -> Mixers:
    hidden = read("hidden_size")
    heads = read("linear_num_heads") or read("num_attention_heads")
    dim = read("linear_head_dim") or read("head_dim") or 128
    kernel = read("linear_conv_kernel_dim") or read("short_conv_kernel_size") or 4
    width = heads * dim
    # Queries, keys, values, output and the two gates have full rank; there is one more gate per head.
    return _delta(heads, heads, dim, dim, kernel, 3 * width, 6 * hidden * width + hidden * heads)


def _delta(
    heads: int, key_heads: int, key_dim: int, value_dim: int, kernel: int, convolved: int, matrices: int
) -> Mixers:
    parameters = matrices + convolved * kernel
    return Mixers("delta", heads, key_heads, key_dim, value_dim, kernel, convolved, CHUNK, parameters)


class _MambaNames(NamedTuple):
    """The names of Mamba-2's entries in one family, and their defaults."""

    heads: tuple[str, int] = ("mamba_n_heads", 128)
    groups: tuple[str, int] = ("mamba_n_groups", 1)
    state: tuple[str, int] = ("mamba_d_state", 256)
    kernel: tuple[str, int] = ("mamba_d_conv", 4)
    chunk: tuple[str, int] = ("mamba_chunk_size", 256)
    inner: tuple[str, int] = ("mamba_d_ssm", 0)  # elements of a token's values; 0 for `mamba_expand` x hidden size
    head_dim: tuple[str, int] = ("", 0)  # elements of a head, if they follow from no other entry

    def sizes(self, read: Read) -> Mixers:
        """Return the sizes of the mixers."""

        def value(entry: tuple[str, int]) -> int:
            return (read(entry[0]) if entry[0] else 0) or entry[1]

        hidden, heads, groups, state = read("hidden_size"), *map(value, (self.heads, self.groups, self.state))
        inner = heads * value(self.head_dim) or value(self.inner) or (read("mamba_expand") or 2) * hidden
        kernel, convolved = value(self.kernel), inner + 2 * groups * state
        parameters = hidden * (inner + convolved + heads) + inner * hidden + convolved * kernel
        return Mixers("mamba2", heads, groups, state, inner // heads, kernel, convolved, value(self.chunk), parameters)


_FALCON = _MambaNames(inner=("mamba_d_ssm", 1024))
_NEMOTRON = _MambaNames(
    heads=("mamba_num_heads", 128),
    groups=("n_groups", 8),
    state=("ssm_state_size", 128),
    kernel=("conv_kernel", 4),
    chunk=("chunk_size", 128),
    head_dim=("mamba_head_dim", 64),
)
_ZAMBA = _MambaNames(
    heads=("n_mamba_heads", 8), groups=("mamba_ngroups", 1), state=("mamba_d_state", 64), chunk=("chunk_size", 256)
)


def _short_convolution(default_kernel: int) -> Callable[[Read], Mixers]:
    def sizes(read: Read) -> Mixers:
        hidden, kernel = read("hidden_size"), read("conv_L_cache") or default_kernel
        return Mixers("convolution", 0, 0, 0, 0, kernel, hidden, 1, hidden * (4 * hidden + kernel))

    return sizes


_MIXERS: dict[str, Callable[[Read], Mixers]] = {
    **dict.fromkeys((*_QWEN, "olmo_hybrid"), _gated_delta),
    "bailing_hybrid": _bailing_delta,
    "bamba": _MambaNames().sizes,
    "falcon_h1": _FALCON.sizes,
    "granitemoehybrid": _MambaNames().sizes,
    "kimi_linear": _kimi_delta,
    "lfm2": _short_convolution(3),
    "lfm2_moe": _short_convolution(3),
    "lfm3": _short_convolution(7),
    "nemotron_h": _NEMOTRON.sizes,
    "zamba2": _ZAMBA.sizes,
}

FAMILIES = frozenset(_MIXERS)
"""The model types whose mixers are known."""
