"""Attention with linear biases."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from archspec.families import Gate, Position

if TYPE_CHECKING:
    from torch import Tensor


class Alibi(Position, kind="alibi"):
    """Scores lose m_h (t - j) with the distance from reader t to token j, m_h = 2^(-8(h+1)/H) for head h = 0 .. H-1.

    That is a constant decay per head of what is stored, exp(-m_h) a token: ``retention: {kind: decay, gate: alibi}``.
    A memory that fades already fades by both.

    Source: Press et al. (arXiv:2108.12409), section 3.
    """

    on_scores: ClassVar[bool] = True

    def apply(self, x: Tensor, positions: Tensor, *, is_query: bool) -> Tensor:
        return x

    def score_decay(self) -> Gate:
        return Gate.parse("alibi")  # type: ignore[return-value]
