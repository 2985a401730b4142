"""Functions that workers run for the tests of attached models."""

import os

import torch
import torch.distributed as dist
from transformers import DynamicCache

from hf_flashcp import FlashCPCollator, attach
from hf_flashcp.errors import BatchError
from hf_flashcp.planning import PlanSettings
from tests.model_cases import cp_mesh
from tests.models import build_model, make_documents


SAVED = ["llama", "llama, dynamic", "jamba", "granitemoehybrid"]  # with hooks on RoPE and recurrent layers


def generate_in_training_mode(family):
    """Return the tokens that an attached model generates after a forward in training mode, those of sdpa, and the
    error for labels with a cache."""
    model, reference = build_model(family).train(), build_model(family, "sdpa").eval()
    attach(model, cp_mesh())
    model(**FlashCPCollator(settings=PlanSettings(dist.get_world_size(), "per_doc"))(make_documents([40, 9])))
    ids = torch.randint(1, 67, (2, 9), generator=torch.Generator().manual_seed(dist.get_rank()))
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    tokens, expected = (each.generate(ids, **options).tolist() for each in (model, reference))
    try:
        model(input_ids=ids, labels=ids, past_key_values=DynamicCache())
    except BatchError as error:
        return tokens, expected, str(error)


def saved_model(family):
    return build_model(family).train()


def save_whole_models(directory):
    """Train each model in `SAVED` for a step on these ranks, and save it in a directory."""
    size = dist.get_world_size()
    path = os.path.join(directory, str(dist.get_rank()))
    os.makedirs(path)
    for family in SAVED:
        model = saved_model(family)
        attach(model, cp_mesh(), on_plan=lambda plan: None)
        model(**FlashCPCollator(settings=PlanSettings(size, "whole_doc"))(make_documents([12, 9, 8]))).loss.backward()
        torch.save(model, os.path.join(path, f"{family}.pt"))
    return path
