"""The exact proximal step of linear regression (Longhorn)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from archspec.component import Flag
from archspec.families import Step, Update

if TYPE_CHECKING:
    from torch import Tensor


class Implicit(Update, kind="implicit"):
    """W_t = argmin ||W - W_{t-1}||^2 + eta ||W^T k - v||^2, in closed form: the step eta / (1 + eta k . k).

    - exact: W -= e k (W^T k - v)^T with e = eta / (1 + eta k . k), per value channel when eta is.
    - ``diagonal``: W_ij -= e_j (k_i^2 W_ij - k_i v_j), which keeps the state element-wise (what Longhorn ships).

    Source: Longhorn (arXiv:2407.14207), theorem 3.1 and section 3.2.
    """

    diagonal: Flag = False

    def increment(self, step: Step, buffers: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        key = step.key.unsqueeze(-1)  # [B, H, K, 1]
        shrink = 1 / (1 + step.gates["step_size"] * key.square().sum(-2, keepdim=True))
        if not self.diagonal:
            return -step.stepped * shrink, {}
        write = key * step.value.unsqueeze(-2)
        return step.gates["step_size"] * shrink * (write - key.square() * step.point), {}
