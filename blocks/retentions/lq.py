"""The q-norm retention of Moneta: the weights are the dual divided by a power of its norm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from archspec.component import Number
from archspec.families import Gate, Retention

if TYPE_CHECKING:
    from torch import Tensor


class Lq(Retention, kind="lq"):
    """Z_t = alpha Z_{t-1} + U_t, and W from Z, one norm a weight matrix:

    - ``printed``: W = Z / ||Z||_q^(q-2), as Miras prints it. At q = 3 its scale is lost and at q = 4 inverted.
    - ``mirror``: W = sign(Z) |Z|^(q-1) / ||Z||_q^(q-2), the gradient of 1/2 ||Z||_q^2: the mirror map itself.

    Both are the identity at q = 2 and have no value at Z = 0.

    Source: Miras (arXiv:2504.13173), equation 24 and section 5 (Moneta, q = 4).
    """

    gate: Gate
    q: Annotated[Number, Field(gt=1)] = 4.0
    map: Literal["printed", "mirror"] = "printed"

    has_link: ClassVar[bool] = True
    needs_start: ClassVar[bool] = True

    @property
    def decay_gate(self) -> Gate | None:
        return self.gate

    def link(self, dual: Tensor) -> Tensor:
        # The largest entry is divided out first, so that no power over- or underflows.
        largest = dual.abs().amax((-2, -1), keepdim=True).clamp(min=1e-30)
        unit = dual / largest
        # The sum is at least 1, unless the weights have faded to zero: the mirror map is zero there.
        total = unit.abs().pow(self.q).sum((-2, -1), keepdim=True).clamp(min=1.0)
        norm = total.pow((self.q - 2) / self.q)
        if self.map == "printed":
            return unit / norm * largest.pow(3 - self.q)
        return unit.sign() * unit.abs().pow(self.q - 1) / norm * largest
