"""Vision-language models: exact on text-only batches, everything else refused."""

import pytest

from hf_flashcp.errors import BatchError, UnsupportedModelError
from tests import vision_language_cases as cases


@pytest.mark.parametrize("cp_size", [1, 2, 3])
@pytest.mark.parametrize("name", cases.MODELS)
def test_text_is_exact(pool, name, cp_size):
    for errors in pool.run(cp_size, cases.text_errors, name, [40, 3, 17, 1, 25]):
        assert max(errors) < 1e-12


def test_token_types_without_effect_are_accepted(pool):
    assert pool.run(2, cases.token_types_of_text) == [0.0, 0.0]


@pytest.mark.parametrize(
    "case, error, message",
    [
        (cases.batch_with_images, BatchError, "The batch has image_grid_thw, pixel_values. flashcp shards text"),
        (cases.flashcp_everywhere, UnsupportedModelError, "has flashcp in its Qwen2_5_VLVisionConfig too"),
        (cases.overlaid_mask, UnsupportedModelError, "builds a mask of its own over the causal one"),
        (
            cases.mask_overlaid_on_one_rank,
            UnsupportedModelError,
            "a mask over the causal one is false on rank 0 and true on rank 1",
        ),
    ],
)
def test_inputs_other_than_text_are_refused(pool, case, error, message):
    for raised in pool.errors(2, case):
        assert type(raised) is error and message in str(raised)
