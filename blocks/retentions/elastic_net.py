"""Elastic-net retention: soft forgetting by a factor, hard forgetting by a threshold."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from archspec.component import Positive
from archspec.families import Gate, Retention

if TYPE_CHECKING:
    from torch import Tensor


class ElasticNet(Retention, kind="elastic_net"):
    """Entries of the weights below a threshold are forgotten altogether: S_g(z) = sign(z) max(|z| - g, 0).

    - ``ftrl``: Z_t = alpha Z_{t-1} + U_t, W = S_g(Z): what was forgotten can come back.
    - ``proximal``: W_t = S_g(alpha W_{t-1} + U_t): what was forgotten is gone.

    Source: Miras (arXiv:2504.13173), equations 22 (proximal) and 23 (follow the regularised leader).
    """

    gate: Gate
    threshold: Positive = 0.01
    form: Literal["ftrl", "proximal"] = "ftrl"

    has_link: ClassVar[bool] = True

    @property
    def feeds_back(self) -> bool:  # type: ignore[override]
        return self.form == "proximal"

    @property
    def decay_gate(self) -> Gate | None:
        return self.gate

    def link(self, dual: Tensor) -> Tensor:
        return self._soft(dual) if self.form == "ftrl" else dual

    def project(self, dual: Tensor) -> Tensor:
        return self._soft(dual) if self.form == "proximal" else dual

    def _soft(self, z: Tensor) -> Tensor:
        return z.sign() * (z.abs() - self.threshold).relu()
