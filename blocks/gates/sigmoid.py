"""Sigmoid gates: decays and step sizes in (floor, 1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from archspec.component import Number, Positive
from archspec.families import Gate

if TYPE_CHECKING:
    from torch import Tensor


class Sigmoid(Gate, kind="sigmoid"):
    """floor + (1 - floor) sigmoid(z)^(1 / temperature).

    The temperature is gated linear attention's: it divides the *log* of the gate, so that 16 makes decays slow.
    Preset ``gla``: per key channel, rank 16, temperature 16, with an offset (arXiv:2312.06635, section 4.4).
    """

    temperature: Positive = 1.0
    floor: Annotated[Number, Field(ge=0, lt=1)] = 0.0

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "gla": {"per": "key", "rank": 16, "temperature": 16.0, "offset": 0.0}
    }

    bounds: ClassVar[tuple[float, float]] = (0.0, 1.0)

    def value(self, z: Tensor, known: Mapping[str, Tensor]) -> Tensor:
        plain = self._log(z).exp() if self.temperature != 1 else z.sigmoid()
        return self.floor + (1 - self.floor) * plain if self.floor else plain

    def log_value(self, z: Tensor, known: Mapping[str, Tensor]) -> Tensor:
        return self.value(z, known).log() if self.floor else self._log(z)

    def _log(self, z: Tensor) -> Tensor:
        from torch.nn.functional import logsigmoid

        return logsigmoid(z) / self.temperature
