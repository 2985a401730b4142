"""`PaddedRows`: where the tokens of padded rows are, so that rows can become documents and documents rows again."""

from __future__ import annotations

from itertools import accumulate

import torch

from ...data.boundaries import IGNORE_INDEX
from ...layout.upload import upload


class PaddedRows:
    """Rows (B, T) of which each is one document, with padding before or after it.

    Args:
        tokens (`torch.Tensor`): (B, T, ...), a tensor with one value per token or padding.
        mask (`torch.Tensor`, *optional*): (B, T), not 0 where there is a token. Without it, there is no padding.

    The host waits for the mask's device.

    Attributes:
        lengths (`list[int]`): tokens of each row that has any.
        problem (`str`, *optional*): why the rows are not documents.
    """

    def __init__(self, tokens: torch.Tensor, mask: torch.Tensor | None):
        self._shape = tokens.shape[:2]
        present = torch.ones(self._shape, dtype=torch.bool) if mask is None else (mask != 0).cpu()
        before = torch.nn.functional.pad(present, (1, 0))[:, :-1]
        begins = present & ~before
        self.lengths: list[int] = [length for length in present.sum(1).tolist() if length]
        self.problem = _problem(begins)
        self._index = upload(present.flatten().nonzero().flatten(), tokens.device)
        filled = begins.any(1)
        self._row_numbers: list[int] = filled.nonzero().flatten().tolist()  # of the rows in `lengths`
        self._padded_before: list[bool] = (~begins[filled, 0]).tolist()  # likewise

    @property
    def num_tokens(self) -> int:
        """Number of tokens in all rows."""
        return sum(self.lengths)

    def pack(self, values: torch.Tensor) -> torch.Tensor:
        """Return the values (n, ...) of the tokens in rows (B, T, ...)."""
        return values.flatten(0, 1).index_select(0, self._index)

    def unpack(self, values: torch.Tensor) -> torch.Tensor:
        """Return rows (B, T, ...) with the values (n, ...) of tokens, and 0 at padding."""
        rows = values.new_zeros((self._shape.numel(), *values.shape[1:]))
        return rows.index_copy(0, self._index, values).unflatten(0, self._shape)

    def pack_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """Return the labels (n,) of the tokens, without those of first tokens, which nothing predicts.

        Sets `problem` if a row that begins with padding has a target there: a padded forward would predict it from
        padding.
        """
        packed = self.pack(labels)
        starts = [0, *accumulate(self.lengths)][:-1]
        first = upload(torch.tensor(starts, dtype=torch.int64), labels.device)
        targets = (packed[first] != IGNORE_INDEX).tolist() if any(self._padded_before) else []
        empty_prompts = [row for row, *both in zip(self._row_numbers, self._padded_before, targets) if all(both)]
        if empty_prompts:
            self.problem = self.problem or (
                f"row {empty_prompts[0]} begins with padding, and its first token is a target: its prompt is empty, "
                "so nothing comes before that token. Give every row a prompt"
            )
        return packed.index_fill(0, first, IGNORE_INDEX)


def _problem(begins: torch.Tensor) -> str | None:
    broken = (begins.sum(1) > 1).nonzero().flatten().tolist()
    if not broken:
        return None
    return (
        f"row {broken[0]} has padding between its tokens (attention_mask is 0 there), but a row is one document. Put "
        "padding at the ends of rows"
    )
