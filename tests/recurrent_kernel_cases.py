"""Functions that workers run: models on the kernels of flash-linear-attention, mamba-ssm and causal-conv1d."""

import sys

import torch
from transformers import AutoModelForCausalLM

from hf_flashcp import attach
from hf_flashcp.doctor import gradients
from hf_flashcp.doctor.float64 import float64_throughout
from hf_flashcp.doctor.tiny import build, default_config, tiny_copy
from tests import recurrent_kernels


SIZES = {"kimi_linear": {"linear_num_heads": 2, "linear_head_dim": 8}}
LENGTHS = (70, 9, 33)


def config_of(family):
    config = tiny_copy(default_config(family))
    return type(config)(**{**config.to_dict(), **SIZES.get(family, {})})


def kernel_calls(family, training=True):
    """Return the calls of each stand-in by a model, and the relative errors of its logits and gradients.

    The errors are those of a row of documents on the stand-ins, or of one document where the modeling file has no way
    to keep documents apart, against the same documents one at a time on transformers' own functions.
    """
    torch.manual_seed(0)
    packed = family != "kimi_linear"
    documents = [torch.randint(1, 60, (1, length)) for length in (LENGTHS if packed else LENGTHS[:1])]
    with recurrent_kernels.packages() as calls, float64_throughout():
        found = _logits_and_gradients(family, training, [torch.cat(documents, 1)], _boundaries() if packed else {})
        counts = dict(calls)
    with float64_throughout():
        expected = _logits_and_gradients(family, training, documents, {})
    assert dict(calls) == counts, "transformers' own functions were not restored"
    return counts, [float((x - y).norm() / y.norm()) for x, y in zip(found, expected)]


def _boundaries():
    lengths = torch.tensor(LENGTHS)
    ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    return {
        "position_ids": torch.cat([torch.arange(length) for length in LENGTHS])[None],
        "seq_idx": torch.arange(len(LENGTHS), dtype=torch.int32).repeat_interleave(lengths)[None],
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": max(LENGTHS),
        "max_length_k": max(LENGTHS),
    }


def _logits_and_gradients(family, training, rows, boundaries):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config_of(family), dtype=torch.float64, attn_implementation="sdpa", experts_implementation="eager"
    )
    model.train(training)
    logits = torch.cat([model(row, use_cache=False, **boundaries).logits for row in rows], 1)
    logits.square().sum().backward()
    gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    return logits.detach(), torch.cat(gradients)


def sharded_errors(family, strategy):
    """Return the errors of `check_gradients` on the packages, and the calls per layer."""
    with recurrent_kernels.packages() as calls:
        found = gradients.check_gradients(config_of(family), strategy)
        return found, dict(calls)


def attached_with(family, package, version):
    with recurrent_kernels.packages():
        sys.modules[package].__version__ = version
        attach(build(config_of(family), "flashcp"), None)
