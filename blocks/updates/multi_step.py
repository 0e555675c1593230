"""Several gradient steps a token, each with its own key, value and step size (DeltaProduct)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from archspec.component import Integer
from archspec.families import Step, Update

if TYPE_CHECKING:
    from torch import Tensor


class MultiStep(Update, kind="multi_step"):
    """W <- W - eta_i dl_i/dW for i = 1 .. steps, after one decay; every step has projections of its own.

    Source: DeltaProduct (arXiv:2502.10297), equation 7.
    """

    steps: Annotated[Integer, Field(ge=1, le=16)] = 2

    @property
    def steps_per_token(self) -> int:
        return self.steps

    def increment(self, step: Step, buffers: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return -step.stepped, {}
