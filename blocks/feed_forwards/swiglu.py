"""(silu(x W_gate) * (x W_up)) W_down. Source: Shazeer (arXiv:2002.05202)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from archspec.families import FeedForward
from archspec.initial import FAN_IN, Parameter, Parameters

if TYPE_CHECKING:
    from torch import Tensor

    from archspec.blocks.pieces import Pieces


class Swiglu(FeedForward, kind="swiglu"):
    """(silu(x W_gate) * (x W_up)) W_down. Source: Shazeer (arXiv:2002.05202)."""

    def parameters(self, model_dim: int) -> Parameters:
        inner = self.hidden_dim(model_dim)
        return {
            "gate": Parameter((model_dim, inner), FAN_IN, decayed=True),
            "up": Parameter((model_dim, inner), FAN_IN, decayed=True),
            "down": Parameter((inner, model_dim), FAN_IN, decayed=True),
        }

    def apply_fused(self, x: Tensor, parameters: Mapping[str, Tensor], pieces: Pieces) -> Tensor:
        gate, up = pieces.maps(x, ((parameters["gate"], None), (parameters["up"], None)))
        return pieces.gated_map(gate, up, parameters["down"], "silu")

    def apply(self, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        gate = x @ parameters["gate"]
        return (gate * gate.sigmoid() * (x @ parameters["up"])) @ parameters["down"]
