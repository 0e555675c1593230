"""Initial laws of learned parameters, and the declarations from which modules and predictions are both made.

A component does not create parameters: it declares them as ``Parameter(shape, law)``. The compiled module draws
them, and ``complexity`` counts them, from the same declaration.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from archspec.component import Number, Off, Positive, StrictModel


class Initial(StrictModel):
    """The law a parameter is drawn from; exactly one field is set.

    A bare number is a constant; the bare names are ``dt`` (b = softplus^-1(tau), tau log-uniform in
    [1e-3, 0.1], at least 1e-4: Mamba's step-size law), ``by_depth`` (xLSTM's forget offsets, a power law over
    depth), ``fan_in`` (normal with variance 1/d_in),
    ``identity`` and ``hippo`` (the positive imaginary parts of the eigenvalues of HiPPO-N, ascending: S5's A). ``ring``
    [a, b] draws -log r, r the distance from 0 of a point spread evenly over the ring a < r < b (LRU's exp(nu)).
    """

    short_forms: ClassVar[tuple[dict[str, Any], ...]] = (
        {"type": "number"},
        {"enum": ["dt", "by_depth", "fan_in", "identity", "hippo"]},
    )

    constant: Number | None = None
    normal: Positive | None = None
    uniform: tuple[Number, Number] | None = None
    log_uniform: tuple[Positive, Positive] | None = None
    linspace: tuple[Number, Number] | None = None
    arange: Number | None = None
    ring: tuple[Annotated[Number, Field(ge=0, lt=1)], Annotated[Number, Field(gt=0, le=1)]] | None = None
    law: Literal["dt", "by_depth", "fan_in", "identity", "hippo"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return {"constant": value}
        if isinstance(value, str):
            return {"law": value}
        return value

    @model_validator(mode="after")
    def _one_law(self) -> Initial:
        named = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(named) != 1:
            raise PydanticCustomError(
                "initial_law",
                "an initial law names exactly one of {known}, found {found}.",
                {"known": ", ".join(type(self).model_fields), "found": ", ".join(named) or "none"},
            )
        for pair in (self.uniform, self.log_uniform, self.ring):
            if pair is not None and not pair[0] < pair[1]:
                raise PydanticCustomError(
                    "initial_range",
                    "the range of an initial law must increase, found [{low}, {high}].",
                    {"low": pair[0], "high": pair[1]},
                )
        return self

    @property
    def is_zero(self) -> bool:
        """Whether every draw is zero."""
        return self.constant == 0 or self.arange == 0 or self.linspace == (0.0, 0.0)

    @property
    def is_positive(self) -> bool:
        """Whether every draw is above zero, so that its logarithm exists."""
        if self.constant is not None:
            return self.constant > 0
        if self.uniform is not None:
            return self.uniform[0] >= 0  # draws lie in (low, high]
        if self.linspace is not None:
            return min(self.linspace) > 0
        if self.arange is not None:
            return self.arange > 0
        return self.log_uniform is not None or self.ring is not None or self.law == "hippo"


def _of_vector(law: Initial | None) -> Initial | None:
    if law is not None and law.law in ("fan_in", "identity", "hippo"):
        raise PydanticCustomError(
            "offset_law",
            "an offset is a vector, and {law} is no law of vectors; use a number, 'dt', 'by_depth' or a range.",
            {"law": law.law},
        )
    return law


Offset = Annotated[Initial | None, AfterValidator(_of_vector), Off]

ZEROS = Initial(constant=0.0)
ONES = Initial(constant=1.0)
FAN_IN = Initial(law="fan_in")


@dataclass(frozen=True)
class Parameter:
    """A learned tensor that a component declares.

    Args:
        shape: its shape; for a weight matrix [..., d_in, d_out].
        law: what it is drawn from at initialisation.
        logarithm: store the logarithm of the drawn value.
        decayed: whether weight decay applies (matrices yes; gates, norms and offsets no).
    """

    shape: tuple[int, ...]
    law: Initial
    logarithm: bool = False
    decayed: bool = False

    @property
    def size(self) -> int:
        """Number of scalars."""
        return math.prod(self.shape)


Parameters = Mapping[str, Parameter]
