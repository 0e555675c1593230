"""A gate that is a parameter: the same for every token."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import model_validator
from pydantic_core import PydanticCustomError

from archspec.component import Number
from archspec.families import Activation, Gate, gate_size
from archspec.initial import ONES, Parameter, Parameters
from archspec.shapes import HeadDims

if TYPE_CHECKING:
    from torch import Tensor

_RANGES = {
    "sigmoid": (0.0, 1.0),
    "softplus": (0.0, math.inf),
    "exp": (0.0, math.inf),
    "relu": (0.0, math.inf),
    "relu2": (0.0, math.inf),
    "tanh": (-1.0, 1.0),
}


class Learned(Gate, kind="learned"):
    """floor + act(p), p a parameter per head, key channel, value channel or state.

    Args:
        init: law of p itself, before the activation.
        activation: act.
        floor: added after the activation.
        init_of: ``parameter``; or ``value``, for which ``init`` is the law of exp(p) (activation exp only).
        start: a gate without parameters whose value when the model is made is this gate's (activation none or exp).
    """

    activation: Activation = "none"
    floor: Number = 0.0
    init_of: Literal["parameter", "value"] = "parameter"
    start: Gate | None = None

    has_source: ClassVar[bool] = False
    starting: ClassVar[tuple[str, ...]] = ("start",)

    @model_validator(mode="after")
    def _has_no_source(self) -> Learned:
        written = self.departures(("from_", "shift", "rank", "hidden", "block_size", "offset", "conv", "conv_offset"))
        if written:
            raise PydanticCustomError(
                "learned_source",
                "a learned gate reads no token: remove {names}, or use a gate such as 'sigmoid'.",
                {"names": ", ".join(name.rstrip("_") for name in written)},
            )
        return self

    @model_validator(mode="after")
    def _starts_somewhere(self) -> Learned:
        if self.init_of == "value" and (self.activation != "exp" or not (self.init or ONES).is_positive):
            raise PydanticCustomError(
                "learned_value", "'init_of: value' is for activation exp and a law of numbers above zero."
            )
        if self.start is None:
            return self
        reads = self.start.has_source or not {"query", "key", "value"}.isdisjoint(self.start.all_needs())
        if self.init is not None or self.activation not in ("none", "exp") or reads:
            raise PydanticCustomError(
                "learned_start",
                "'start' takes the place of 'init', for activation none or exp, and reads no token: use a gate that is "
                "derived from others, such as 'normalizing'.",
            )
        return self

    @property
    def value_range(self) -> tuple[float, float]:
        low, high = _RANGES.get(self.activation, (-math.inf, math.inf))
        ends = sorted((self.scale * (self.floor + low), self.scale * (self.floor + high)))
        return ends[0], ends[1]

    def parameters(self, dims: HeadDims) -> Parameters:
        shape = (dims.num_heads, *gate_size(self.per, dims))
        return {"raw": Parameter(shape, self.init or ONES, logarithm=self.init_of == "value")}

    def parameter_of(self, value: Tensor) -> Tensor:
        """Return the p at which the gate, before ``scale``, has a value."""
        return (value - self.floor).log() if self.activation == "exp" else value - self.floor

    def value(self, z: Tensor, known: Mapping[str, Tensor]) -> Tensor:
        from archspec.blocks.activation import activate

        return z + self.floor + activate(self.activation, known["raw"])
