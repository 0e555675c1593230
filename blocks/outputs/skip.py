"""The direct term of a state space."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from archspec.families import OutputStage
from archspec.initial import Initial, Parameter, Parameters

if TYPE_CHECKING:
    from torch import Tensor


class SkipOutput(OutputStage, kind="skip"):
    """y + D x, x what the mixer was given and D learned, one number a channel.

    Args:
        init: law of D.

    Source: S5 (arXiv:2208.04933), equation 2, and LRU (arXiv:2303.06349), equation 1: their D u_t.
    """

    init: Initial = Initial(normal=1.0)

    def parameters(self, width: int, model_dim: int) -> Parameters:
        return {"weight": Parameter((model_dim,), self.init)}

    def apply(self, y: Tensor, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        return y + parameters["weight"] * x

    def needs_width(self, model_dim: int) -> int:
        return model_dim
