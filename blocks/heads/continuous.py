"""Real numbers: regression."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from archspec.component import Count
from archspec.ends import Head, Pool
from archspec.initial import FAN_IN, Offset, Parameter, Parameters

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
        found = {"head": Parameter((model_dim, self.dim), FAN_IN, decayed=True)}
        return found if self.offset is None else {**found, "head_offset": Parameter((self.dim,), self.offset)}

    def apply(self, x: Tensor, parameters: Mapping[str, Tensor], embedding: Tensor) -> Tensor:
        found = x @ parameters["head"]
        return found + parameters["head_offset"] if "head_offset" in parameters else found

    def width(self, vocab_size: int) -> int:
        return self.dim
