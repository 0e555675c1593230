"""A write strength between one and the step size (RWKV-7)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from archspec.families import Gate

if TYPE_CHECKING:
    from torch import Tensor


class TowardStep(Gate, kind="toward_step"):
    """1 + (eta - 1) * mix, eta the update's step size. Source: RWKV-7 (arXiv:2503.14456), its replacement key."""

    mix: Gate = Field(default_factory=lambda: Gate.parse(1.0))

    has_source: ClassVar[bool] = False

    def needs(self) -> tuple[str, ...]:
        return ("update.step_size",)

    def value(self, z: Tensor, known: Mapping[str, Tensor]) -> Tensor:
        return 1 + (known["update.step_size"] - 1) * known["mix"]
