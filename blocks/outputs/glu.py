"""The gated linear unit as an output projection."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from archspec.families import OutputStage
from archspec.initial import FAN_IN, Offset, Parameter, Parameters

if TYPE_CHECKING:
    from torch import Tensor


class GluOutput(OutputStage, kind="glu"):
    """(y W [+ b]) sigmoid(y U [+ c]), to the model's width: the layers of S4D, S5 and LRU end so.

    Args:
        offset: law of b and c; absent means there are none.

    Source: Dauphin et al. (arXiv:1612.08083), equation 1; after GELU in S4's layer (arXiv:2111.00396, section 3.4).
    """

    offset: Offset = None

    def width(self, width: int, model_dim: int) -> int:
        return model_dim

    def parameters(self, width: int, model_dim: int) -> Parameters:
        found = {name: Parameter((width, model_dim), FAN_IN, decayed=True) for name in ("weight", "gate_weight")}
        if self.offset is None:
            return found
        return {**found, **{name: Parameter((model_dim,), self.offset) for name in ("offset", "gate_offset")}}

    def apply(self, y: Tensor, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        up, gate = (y @ parameters[name] for name in ("weight", "gate_weight"))
        if "offset" in parameters:
            up, gate = up + parameters["offset"], gate + parameters["gate_offset"]
        return up * gate.sigmoid()
