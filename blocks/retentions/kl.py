"""Entropy retention: the weights of a slice are a distribution (a softmax of linear logits)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from archspec.component import Positive
from archspec.families import Gate, Retention

if TYPE_CHECKING:
    from torch import Tensor


class Kl(Retention, kind="kl"):
    """Z_t = alpha Z_{t-1} + U_t;  W = total * softmax(Z) over each slice.

    Equals the printed W = softmax(alpha log W_{t-1} - eta dl/dW) wherever alpha is constant within a slice, since
    log W differs from Z by a constant of the slice; the dual is linear, and no logarithm is ever taken.

    Args:
        over: the axis of each weight whose entries sum to ``total``: the inputs of an output, or the reverse.

    Source: Miras (arXiv:2504.13173), equations 21 and 27 (Memora).
    """

    gate: Gate
    over: Literal["input", "output"] = "input"
    total: Positive = 1.0

    has_link: ClassVar[bool] = True

    @property
    def decay_gate(self) -> Gate | None:
        return self.gate

    def link(self, dual: Tensor) -> Tensor:
        return self.total * dual.softmax(-2 if self.over == "input" else -1)
