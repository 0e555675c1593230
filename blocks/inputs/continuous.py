"""Vectors of numbers: samples of a signal, pixels, measurements."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from archspec.component import Count
from archspec.ends import Input
from archspec.errors import ShapeError
from archspec.initial import FAN_IN, Offset, Parameter, Parameters

if TYPE_CHECKING:
    from torch import Tensor


class Continuous(Input, kind="continuous"):
    """Vectors [B, T, dim] of real numbers, mapped linearly: x W [+ b].

    Args:
        dim: channels of an item; they come from the task.
        offset: law of b; absent means there is none.
    """

    dim: Count
    offset: Offset = None

    from_task: ClassVar[tuple[str, ...]] = ("dim",)

    def parameters(self, model_dim: int, vocab_size: int) -> Parameters:
        found = {"weight": Parameter((self.dim, model_dim), FAN_IN, decayed=True)}
        return found if self.offset is None else {**found, "offset": Parameter((model_dim,), self.offset)}

    def embed(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        if x.ndim != 3 or x.shape[-1] != self.dim or not x.is_floating_point():
            raise ShapeError(f"input: found {x.dtype} {list(x.shape)}; required: real numbers [B, T, {self.dim}].")
        embedded = x.to(parameters["weight"].dtype) @ parameters["weight"]
        return embedded + parameters["offset"] if "offset" in parameters else embedded

    def flops_per_item(self, model_dim: int) -> int:
        return 2 * self.dim * model_dim
