"""Gradient descent with momentum: past surprise fades instead of vanishing (Titans)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from archspec.families import Gate, Step, Update

if TYPE_CHECKING:
    from torch import Tensor


class Momentum(Update, kind="momentum"):
    """S_t = mu_t S_{t-1} - theta_t dl/dW;  W_t = alpha_t W_{t-1} + S_t.

    Source: Titans (arXiv:2501.00663), equations 9 and 10 (there eta is mu, and alpha is what is *forgotten*).
    """

    momentum: Gate

    buffers: ClassVar[tuple[str, ...]] = ("momentum",)

    def increment(self, step: Step, buffers: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        moving = step.gates["momentum"] * buffers["momentum"] - step.stepped
        return moving, {"momentum": moving}
