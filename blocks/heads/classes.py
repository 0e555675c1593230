"""Logits over classes: classification of sequences, or of every item."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from archspec.component import Count
from archspec.ends import Head, Pool, projected, weights
from archspec.initial import Offset, Parameters

if TYPE_CHECKING:
    from torch import Tensor


class ClassHead(Head, kind="classes"):
    """Logits [B, T, num_classes]: x W [+ b] of what is pooled up to each item; a sequence's are its last row.

    Args:
        num_classes: they come from the task.
        pool: ``mean`` or ``max`` of the items so far, or ``last`` (the item itself).
        offset: law of b; absent means there is none.
    """

    num_classes: Count
    pool: Pool = "mean"
    offset: Offset = None

    from_task: ClassVar[tuple[str, ...]] = ("num_classes",)

    def parameters(self, model_dim: int, vocab_size: int) -> Parameters:
        return weights(model_dim, self.num_classes, self.offset)

    def apply(self, x: Tensor, parameters: Mapping[str, Tensor], embedding: Tensor) -> Tensor:
        return projected(x, parameters)

    def width(self, vocab_size: int) -> int:
        return self.num_classes
