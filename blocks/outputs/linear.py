"""The output projection."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from archspec.families import OutputStage
from archspec.initial import FAN_IN, Initial, Offset, Parameter, Parameters

if TYPE_CHECKING:
    from torch import Tensor


class LinearOutput(OutputStage, kind="linear"):
    """y W [+ b], to the model's width. Alone it is what a mixer has when no stages are written.

    Args:
        init: law of W; absent means normal with variance 1/d_in.
        offset: law of b; absent means there is none.
    """

    init: Initial | None = None
    offset: Offset = None

    def width(self, width: int, model_dim: int) -> int:
        return model_dim

    def parameters(self, width: int, model_dim: int) -> Parameters:
        found = {"weight": Parameter((width, model_dim), self.init or FAN_IN, decayed=True)}
        return found if self.offset is None else {**found, "offset": Parameter((model_dim,), self.offset)}

    def apply(self, y: Tensor, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        y = y @ parameters["weight"]
        return y + parameters["offset"] if "offset" in parameters else y
