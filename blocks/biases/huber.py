"""Huber error: quadratic near the value, linear far from it (Miras equations 13 to 16)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from archspec.families import Bias, Gate

if TYPE_CHECKING:
    from torch import Tensor


class Huber(Bias, kind="huber"):
    """Three readings of the Huber loss at threshold d, r = M(k) - v:

    - ``coordinate``: delta_i = clip(r_i, -d, d); l sums 1/2 r_i^2 or d (|r_i| - d/2).
    - ``norm``: delta = r min(1, d / ||r||); l is the same law of ||r||.
    - ``mixture``: delta = r where ||r|| <= d, else d sign(r) (Yaad; discontinuous at the threshold). Its l is
      1/2 ||r||^2 inside and d (||r||_1 - d/2) outside, whose gradient this is on either side.

    Source: Miras (arXiv:2504.13173), equations 13 to 16.
    """

    threshold: Gate = Field(default_factory=lambda: Gate.parse(1.0))
    form: Literal["coordinate", "norm", "mixture"] = "coordinate"

    def loss(self, prediction: Tensor, value: Tensor, gates: Mapping[str, Tensor]) -> Tensor:
        r, d = prediction - value, gates["threshold"]
        if self.form == "coordinate":
            size = r.abs()
            return (0.5 * r.square()).where(size <= d, d * (size - 0.5 * d)).sum(-1)
        norm, d = _norm(r).squeeze(-1), d.squeeze(-1)
        inside = 0.5 * r.square().sum(-1)
        outside = d * ((norm if self.form == "norm" else r.abs().sum(-1)) - 0.5 * d)
        return inside.where(norm <= d, outside)

    def gradient(self, prediction: Tensor, value: Tensor, gates: Mapping[str, Tensor]) -> Tensor:
        r, d = prediction - value, gates["threshold"]
        if self.form == "coordinate":
            return r.minimum(d).maximum(-d)
        norm = _norm(r)
        if self.form == "norm":
            return r * (d / norm).clamp(max=1.0)
        return r.where(norm <= d, d * r.sign())


def _norm(r: Tensor) -> Tensor:
    # The slope of a root at 0 is infinite: the floor keeps its gradient finite where r = 0.
    return r.square().sum(-1, keepdim=True).clamp(min=1e-24).sqrt()
