"""The decay that keeps the weights of all tokens so far summing to one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from archspec.families import Gate

if TYPE_CHECKING:
    from torch import Tensor


class RunningSoftmax(Gate, kind="running_softmax"):
    """alpha_t = exp(c_{t-1} - c_t), c_t = log sum_{j <= t} exp(z_j); its token step is exp(z_t - c_t).

    With the token step as write strength (``step_size: dt``) the memory is sum_j softmax_{j <= t}(z_j) k_j v_j^T: an
    average over the tokens, in a state of constant size. The first token has alpha = 1, and nothing to forget.

    Source: LightNet (arXiv:2405.21022), section 3.2, additive linear recurrence.
    """

    keeps: ClassVar[str | None] = "total"
    bounds: ClassVar[tuple[float, float]] = (0.0, 1.0)

    def accumulated(self, z: Tensor, kept: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
        import torch

        seen = z if kept is None else torch.cat([kept.to(z.dtype), z], dim=1)
        totals = seen.logcumsumexp(1)
        after = totals if kept is None else totals[:, 1:]
        before = torch.cat([totals[:, :1], totals[:, :-1]], dim=1) if kept is None else totals[:, :-1]
        return {"before": before, "after": after}, after[:, -1:]

    def value(self, z: Tensor, known: Mapping[str, Tensor]) -> Tensor:
        return self.log_value(z, known).exp()

    def log_value(self, z: Tensor, known: Mapping[str, Tensor]) -> Tensor:
        return known["before"] - known["after"]

    def token_step(self, z: Tensor, known: Mapping[str, Tensor]) -> Tensor:
        """Return the token's own weight among all so far."""
        return (z - known["after"]).exp()
