"""The hybrid models that are supported: those with layers that mix tokens by other means than attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from transformers import PreTrainedModel


class Mixer(NamedTuple):
    """A family's module that mixes tokens by other means than attention.

    It passes states from slice to slice through its `functions`, or sees a few tokens back, or needs whole documents.
    """

    name: str  # name of the class
    kind: str
    functions: tuple[str, ...] = ()  # functions of the modeling file; each is called once in a forward without a cache
    sees_back: str | None = None  # name of the attribute that holds the number of tokens

    @property
    def needs_whole_documents(self) -> bool:
        """Whether documents may not be cut."""
        return not self.functions and self.sees_back is None


_CONVOLUTION = ("causal_conv1d_fn",)
_GATED_DELTA = "gated delta rule", (*_CONVOLUTION, "torch_chunk_gated_delta_rule")
_KIMI_DELTA = "Kimi delta attention", (*_CONVOLUTION, "chunk_kimi_delta_attention")
_MAMBA2 = "Mamba-2", (*_CONVOLUTION, "mamba2_chunk_scan")
_SHORT = "short convolutions", _CONVOLUTION

# Mamba-1's scans ignore an initial state, without an error. Lightning attention and RG-LRU are written out in their
# modules' forwards, which take no initial state either.
MIXERS = {
    "bailing_hybrid": Mixer("BailingHybridDeltaAttention", *_KIMI_DELTA),
    "bamba": Mixer("BambaMixer", *_MAMBA2),
    "falcon_h1": Mixer("FalconH1Mixer", *_MAMBA2),
    "granitemoehybrid": Mixer("GraniteMoeHybridMambaLayer", *_MAMBA2),
    "jamba": Mixer("JambaMambaMixer", "Mamba-1"),
    "kimi_linear": Mixer("KimiLinearDeltaAttention", *_KIMI_DELTA),
    "lfm2": Mixer("Lfm2ShortConv", *_SHORT),
    "lfm2_moe": Mixer("Lfm2MoeShortConv", *_SHORT),
    "lfm3": Mixer("Lfm3ShortConv", *_SHORT),
    "minimax": Mixer("MiniMaxLightningAttention", "lightning attention"),
    "nemotron_h": Mixer("NemotronHMamba2Mixer", *_MAMBA2),
    "olmo_hybrid": Mixer("OlmoHybridGatedDeltaNet", *_GATED_DELTA),
    "qwen3_5_moe_text": Mixer("Qwen3_5MoeGatedDeltaNet", *_GATED_DELTA),
    "qwen3_5_text": Mixer("Qwen3_5GatedDeltaNet", *_GATED_DELTA),
    "qwen3_next": Mixer("Qwen3NextGatedDeltaNet", *_GATED_DELTA),
    "recurrent_gemma": Mixer("RecurrentGemmaRecurrentBlock", "RG-LRU"),
    "zamba": Mixer("ZambaMambaMixer", "Mamba-1"),
    "zamba2": Mixer("Zamba2MambaMixer", *_MAMBA2),
    "zaya": Mixer("ZayaCCAProjection", "compressed convolutional attention", sees_back="conv_kernel_size"),
}
"""The mixer of each family, by model type."""


def mixer_of(model: PreTrainedModel) -> Mixer | None:
    """Return the mixer of the model's family, or `None` if no module of the model is one."""
    mixer = MIXERS.get(model.config.get_text_config().model_type)
    return mixer if mixer is not None and any(_modules(model, mixer)) else None


def mixer_modules(model: PreTrainedModel) -> dict[str, torch.nn.Module]:
    """Return the mixers of a model by their names."""
    mixer = mixer_of(model)
    return dict(_modules(model, mixer)) if mixer is not None else {}


def mixer_class(module: torch.nn.Module, mixer: Mixer) -> type | None:
    """Return the mixer's class in its modeling file, or `None` if the module is not this mixer.

    Modules that FSDP2 shards are of a subclass with another name.
    """
    return next((each for each in type(module).__mro__ if each.__name__ == mixer.name), None)


def _modules(model: PreTrainedModel, mixer: Mixer) -> Iterator[tuple[str, torch.nn.Module]]:
    return ((name, module) for name, module in model.named_modules() if mixer_class(module, mixer))
