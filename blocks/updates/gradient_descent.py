"""One step of gradient descent a token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from archspec.families import Step, Update

if TYPE_CHECKING:
    from torch import Tensor


class GradientDescent(Update, kind="gradient_descent"):
    """W_t = alpha_t W_{t-1} - eta_t dl/dW."""

    def increment(self, step: Step, buffers: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return -step.stepped, {}
