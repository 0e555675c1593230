"""Projections that read no token: what the decay leaves."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import model_validator

from archspec.blocks.projections.constant import without_source
from archspec.families import Projection

if TYPE_CHECKING:
    from torch import Tensor


class ComplementProjection(Projection, kind="complement"):
    """k = 1 - alpha, alpha the retention's decay; then activation, norm, position and feature. For keys only.

    What a channel forgets makes room for what is written there: HGRN2 (arXiv:2404.07904), section 3.
    """

    has_weights: ClassVar[bool] = False
    has_source: ClassVar[bool] = False
    derived: ClassVar[str | None] = "retention.gate"

    @model_validator(mode="after")
    def _has_no_source(self) -> ComplementProjection:
        return without_source(self, "complement")

    def derive(self, gate: Tensor) -> Tensor:
        return -gate.expm1()
