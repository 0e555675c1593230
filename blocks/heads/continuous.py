"""Real numbers: regression."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from archspec.component import Count
from archspec.ends import Head, Pool, projected, weights
from archspec.initial import Offset, Parameters

if TYPE_CHECKING:
    from torch import Tensor


class ContinuousHead(Head, kind="continuous"):
    """Real numbers [B, T, dim]: x W [+ b] of the stream, or of what is pooled up to each item.

    Args:
        dim: numbers an item; they come from the task.
        pool: ``last`` (the item itself), ``mean`` or ``max`` of the items so far.
        offset: law of b; absent means there is none.
    """

    dim: Count
    pool: Pool = "last"
    offset: Offset = None

    from_task: ClassVar[tuple[str, ...]] = ("dim",)

    def parameters(self, model_dim: int, vocab_size: int) -> Parameters:
        return weights(model_dim, self.dim, self.offset)

    def apply(self, x: Tensor, parameters: Mapping[str, Tensor], embedding: Tensor) -> Tensor:
        return projected(x, parameters)

    def width(self, vocab_size: int) -> int:
        return self.dim
