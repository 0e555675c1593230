"""Bregman retention on (0, 1): the weights are the sigmoid of linear logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from archspec.families import Gate, Retention

if TYPE_CHECKING:
    from torch import Tensor


class SigmoidRetention(Retention, kind="sigmoid"):
    """Z_t = alpha Z_{t-1} + U_t;  W = sigmoid(Z), which at alpha = 1 is W = sigmoid(logit W_{t-1} - eta dl/dW).

    Source: Miras (arXiv:2504.13173), section 4, Bregman divergence with f' = logit.
    """

    gate: Gate

    has_link: ClassVar[bool] = True

    @property
    def decay_gate(self) -> Gate | None:
        return self.gate

    def link(self, dual: Tensor) -> Tensor:
        return dual.sigmoid()
