"""A decay whose logarithm is bounded below, so that a whole chunk stays in range."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from archspec.component import Number, Positive
from archspec.families import Gate
from archspec.initial import Initial, Offset

if TYPE_CHECKING:
    from torch import Tensor


class BoundedDecay(Gate, kind="bounded_decay"):
    """alpha = exp(log_floor sigmoid(rate z)), in [exp(log_floor), 1].

    Preset ``rwkv7``: log_floor -e^(-1/2), per key channel, rank 64 through tanh, with the token shift and an offset
    (arXiv:2503.14456). Kimi's bounded gate has log_floor -5.
    """

    log_floor: Annotated[Number, Field(lt=0)] = -5.0
    rate: Positive = 1.0
    offset: Offset = Initial(constant=0.0)

    bounds: ClassVar[tuple[float, float]] = (0.0, 1.0)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "rwkv7": {
            "log_floor": -0.6065306597126334,
            "per": "key",
            "rank": 64,
            "hidden": "tanh",
            "shift": "lerp",
            "offset": {"linspace": [-6.0, -1.0]},
        }
    }

    def value(self, z: Tensor, known: Mapping[str, Tensor]) -> Tensor:
        return self.log_value(z, known).exp()

    def log_value(self, z: Tensor, known: Mapping[str, Tensor]) -> Tensor:
        return self.log_floor * (self.rate * z).sigmoid()
