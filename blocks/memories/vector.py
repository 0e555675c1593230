"""A vector per head: what is written is added to all of it, and all of it is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from archspec.component import Number
from archspec.families import Linear, Memory, Per
from archspec.initial import FAN_IN, Parameter, Parameters
from archspec.shapes import HeadDims

if TYPE_CHECKING:
    from torch import Tensor


class Vector(Memory, kind="vector"):
    """M(w) = w in R^V whatever the key: the state of a linear recurrence; read-out o = scale w.

    The same as a matrix of one row whose key and query are 1, and run as one. Values, decays and steps per head or
    value channel move it; a gate of the read-out chooses what of it is seen.

    Args:
        scale: factor of the read-out.
        initial: ``zero``, or a learned w_0.

    Source: S5 (arXiv:2208.04933), equation 2, and LRU (arXiv:2303.06349), equation 1, with their complex states as
    pairs of channels.
    """

    scale: Number = 1.0
    initial_: Literal["zero", "learned"] = Field(default="zero", alias="initial")

    is_linear: ClassVar[bool] = True
    keyless: ClassVar[bool] = True

    def weights(self, dims: HeadDims) -> Mapping[str, tuple[int, int]]:
        return {"w": (1, dims.value_dim)}

    def initial(self, dims: HeadDims) -> Parameters:
        if self.initial_ == "zero":
            return {}
        return {"w": Parameter((dims.num_heads, 1, dims.value_dim), FAN_IN, decayed=True)}

    def network(self, linear: Linear, x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        return linear("w", x)

    def finish(self, read: Tensor, dims: HeadDims) -> Tensor:
        return read * self.scale

    def axis(self, weight: str, per: Per) -> Literal["none", "input", "output", "both", "illegal"]:
        return {"head": "none", "value": "output"}.get(per, "illegal")  # type: ignore[return-value]
