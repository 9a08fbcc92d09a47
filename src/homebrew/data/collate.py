"""Makes a batch of samples, which may have different lengths."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from homebrew.constants import IGNORE_INDEX
from homebrew.data.samples import Sample
from homebrew.data.validation import check_ids, check_length


@dataclass(frozen=True)
class Collate:
    """Pads samples on the right, and stacks them to a batch.

    The padding has token id 0 and target `IGNORE_INDEX`. Attention is causal, so padding on the right changes no loss.
    By default a batch is as long as its longest sample.

    Args:
        vocab_size: Size of the model's vocabulary. If None, ids are not checked.
        block_size: Maximum number of tokens in a sample. If None, any number is allowed.
        lengths: Allowed lengths of a batch, in ascending order. A batch has the first length that its longest sample
            fits into. A model is compiled once for each length that occurs, so there should be few.
    """

    vocab_size: int | None
    block_size: int | None
    lengths: tuple[int, ...] = ()

    def __call__(self, samples: Sequence[Sample]) -> Sample:
        """Return `input_ids` and `targets`, each (B, T), int64.

        Raises:
            DataError: A sample is longer than `block_size`, or has an id outside the vocabulary.
        """
        longest = max(len(input_ids) for input_ids, _ in samples)
        check_length(longest, "A sample", self.block_size)
        length = min((allowed for allowed in self.lengths if allowed >= longest), default=longest)
        input_ids = _stack([input_ids for input_ids, _ in samples], length, padding=0)
        targets = _stack([targets for _, targets in samples], length, padding=IGNORE_INDEX)
        check_ids(input_ids, targets, "A batch", self.vocab_size)
        return input_ids, targets


def _stack(rows: Sequence[Tensor], length: int, *, padding: int) -> Tensor:
    """Return the rows as (B, length), padded on the right."""
    return torch.stack(
        [row if len(row) == length else F.pad(row, (0, length - len(row)), value=padding) for row in rows]
    )
