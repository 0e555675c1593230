"""relu(x W_up)^2 W_down (the channel mix of RWKV, arXiv:2305.13048, without its receptance)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from archspec.families import FeedForward
from archspec.initial import FAN_IN, Parameter, Parameters

if TYPE_CHECKING:
    from torch import Tensor


class Relu2(FeedForward, kind="relu2"):
    """relu(x W_up)^2 W_down (the channel mix of RWKV, arXiv:2305.13048, without its receptance)."""

    def parameters(self, model_dim: int) -> Parameters:
        inner = self.hidden_dim(model_dim)
        return {
            "up": Parameter((model_dim, inner), FAN_IN, decayed=True),
            "down": Parameter((inner, model_dim), FAN_IN, decayed=True),
        }

    def apply(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        return (x @ parameters["up"]).relu().square() @ parameters["down"]
