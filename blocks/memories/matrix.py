"""A matrix per head: linear associative memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from archspec.component import Flag, Number, Positive
from archspec.families import Linear, Memory, Part, Per, Scale
from archspec.initial import FAN_IN, Parameter, Parameters
from archspec.shapes import HeadDims

if TYPE_CHECKING:
    from torch import Tensor


class Normalizer(Part):
    """Divide the read-out by z_t . q, z_t = sum of the (decayed) written keys.

    o = S^T q / d, d = z . q (``absolute``: its absolute value), at least ``floor``, plus ``eps``.
    Source: Katharopoulos et al. (arXiv:2006.16236), equation 12; floor and absolute: xLSTM (arXiv:2405.04517).
    """

    kind: Literal["sum"] = "sum"
    floor: Positive | None = None
    absolute: Flag = False
    eps: Number = Field(default=1e-6, ge=0)


class Matrix(Memory, kind="matrix"):
    """M(W, x) = W^T x with W in R^{K x V}; read-out o = scale M(W, q).

    Args:
        scale: ``rsqrt`` is K^-1/2 (the convention of linear attention), or a number.
        normalizer: keep the sum of keys as one more value channel and divide by it; only with the dot bias.
        initial: ``zero``, or a learned W_0.
    """

    scale: Scale = None
    normalizer: Normalizer | None = None
    initial_: Literal["zero", "learned"] = Field(default="zero", alias="initial")

    is_linear: ClassVar[bool] = True

    def weights(self, dims: HeadDims) -> Mapping[str, tuple[int, int]]:
        return {"w": (dims.key_dim, dims.value_dim + (self.normalizer is not None))}

    def initial(self, dims: HeadDims) -> Parameters:
        if self.initial_ == "zero":
            return {}
        return {"w": Parameter((dims.num_heads, *self.weights(dims)["w"]), FAN_IN, decayed=True)}

    def network(self, linear: Linear, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        return linear("w", x)

    def target(self, value: Tensor) -> Tensor:
        if self.normalizer is None:
            return value
        import torch

        return torch.cat([value, torch.ones_like(value[..., :1])], dim=-1)

    def finish(self, read: Tensor, dims: HeadDims) -> Tensor:
        scaled = read * (dims.key_dim**-0.5 if self.scale is None else self.scale)
        if self.normalizer is None:
            return scaled
        total = scaled[..., -1:]
        if self.normalizer.absolute:
            total = total.abs()
        if self.normalizer.floor is not None:
            total = total.clamp(min=self.normalizer.floor)
        return scaled[..., :-1] / (total + self.normalizer.eps)

    def axis(self, weight: str, per: Per) -> Literal["none", "input", "output", "both", "illegal"]:
        return {"head": "none", "key": "input", "value": "output", "state": "both"}[per]  # type: ignore[return-value]
