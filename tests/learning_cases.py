"""Function that workers run for the test of recipes/learning."""

import os
from unittest import mock

import torch.distributed as dist

from recipes.learning.retrieval import parse_arguments, train
from tests.accelerate_state import fresh_accelerate


def log_of_training(*argv):
    """Train with all processes sharing each batch, and return the recipe's log."""
    fresh_accelerate()
    with mock.patch.dict(os.environ, PARALLELISM_CONFIG_CP_SIZE=str(dist.get_world_size())):
        trainer = train(*parse_arguments(["--config", "recipes/learning/retrieval.yaml", *argv]))
    return trainer.state.log_history, trainer.flashcp.plan.plan.cp_size
