"""act(x W_up) W_down. Source: Vaswani et al. (arXiv:1706.03762), section 3.3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from archspec.families import Activation, FeedForward
from archspec.initial import FAN_IN, Parameter, Parameters

if TYPE_CHECKING:
    from torch import Tensor


class Mlp(FeedForward, kind="mlp"):
    """act(x W_up) W_down. Source: Vaswani et al. (arXiv:1706.03762), section 3.3."""

    activation: Activation = "gelu"

    def parameters(self, model_dim: int) -> Parameters:
        inner = self.hidden_dim(model_dim)
        return {
            "up": Parameter((model_dim, inner), FAN_IN, decayed=True),
            "down": Parameter((inner, model_dim), FAN_IN, decayed=True),
        }

    def apply(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        from archspec.blocks.activation import activate

        return activate(self.activation, x @ parameters["up"]) @ parameters["down"]
