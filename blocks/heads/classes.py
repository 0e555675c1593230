"""Logits over classes: classification of sequences, or of every item."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from archspec.component import Count
from archspec.ends import Head, Pool
from archspec.initial import FAN_IN, Offset, Parameter, Parameters

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
        found = {"head": Parameter((model_dim, self.num_classes), FAN_IN, decayed=True)}
        return found if self.offset is None else {**found, "head_offset": Parameter((self.num_classes,), self.offset)}

    def apply(self, x: Tensor, parameters: Mapping[str, Tensor], embedding: Tensor) -> Tensor:
        found = x @ parameters["head"]
        return found + parameters["head_offset"] if "head_offset" in parameters else found

    def width(self, vocab_size: int) -> int:
        return self.num_classes
