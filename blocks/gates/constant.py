"""A fixed gate: one number, or a schedule over heads and depth."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from archspec.component import Number
from archspec.families import Gate

if TYPE_CHECKING:
    from torch import Tensor


class Constant(Gate, kind="constant"):
    """A number, or one number per head by schedule, h = 0 .. H-1:

    - ``retnet``: 1 - 2^(-5-h) (RetNet, arXiv:2307.08621, equation 8).
    - ``lightning``: exp(-(8h/H)(1 - l/L)), l the layer of L (TransNormerLLM, arXiv:2307.14995).
    - ``alibi``: exp(-2^(-8(h+1)/H)), whose log is ALiBi's slope (arXiv:2108.12409).
    """

    value_: Number | None = Field(default=None, alias="value")
    schedule: Literal["retnet", "lightning", "alibi"] | None = None

    has_source: ClassVar[bool] = False
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        name: {"schedule": name} for name in ("retnet", "lightning", "alibi")
    }

    @model_validator(mode="after")
    def _one_law(self) -> Constant:
        if (self.value_ is None) == (self.schedule is None):
            raise PydanticCustomError("constant_law", "a constant gate has either 'value' or 'schedule'.")
        return self

    @property
    def value_range(self) -> tuple[float, float]:
        values = [self.scale * value for value in self.constants(1, 0, 1)["value"]]
        return (0.0, self.scale) if self.schedule else (values[0], values[0])

    def constants(self, num_heads: int, layer: int, num_layers: int) -> Mapping[str, tuple[float, ...]]:
        heads = range(num_heads)
        if self.schedule == "retnet":
            logs = [math.log1p(-(2.0 ** (-5 - head))) for head in heads]
        elif self.schedule == "lightning":
            logs = [-8.0 * head / num_heads * (1 - layer / num_layers) for head in heads]
        elif self.schedule == "alibi":
            logs = [-(2.0 ** (-8.0 * (head + 1) / num_heads)) for head in heads]
        else:
            return {"value": (self.value_ or 0.0,) * num_heads}
        return {"value": tuple(math.exp(log) for log in logs), "log": tuple(logs)}

    def value(self, z: Tensor, known: Mapping[str, Tensor]) -> Tensor:
        return z + known["value"]

    def log_value(self, z: Tensor, known: Mapping[str, Tensor]) -> Tensor:
        return z + known["log"] if "log" in known else self.value(z, known).log()
