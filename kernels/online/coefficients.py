"""How the steps of a chunk add up: the coefficients that decay, momentum and averaging reduce to.

With gradients taken at the chunk's anchor, token j's step on a weight is the rank-one matrix x_j delta_j^T (its layer
input and back-propagated error, step sizes folded in), and the weight at token t is

    W_t = beta_t W_0 + f_t P_0 - sum_{j<=t} c_tj x_j delta_j^T

where beta_t is the product of the decays, P_0 the momentum buffer at the start, and with D_tl the decay from l to t
(``step_first``: from before l) and M_lj the product of the momenta after j up to l:

    c = D M,    f_t = sum_l D_tl M_l0.

(TTT, arXiv:2407.04620, section 2.5, with D and M the identity's sums; momentum as in Titans, arXiv:2501.00663,
section 3.2.) Decays stay logarithms until their difference is taken and momenta are multiplied, never divided, so
zero is exact for both.

Gates may also vary along one axis of the weight; then beta, f and c do, and a read sums over it with them. (Decay
alone, without momentum, has a cheaper form: channel_decay.py.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from archspec.kernels.dplr.decay import clamp_log_decay, sum_dtype

Axis = Literal["none", "input", "output"]
"""Which axis of a weight its gates vary along."""


@dataclass(frozen=True)
class Coefficients:
    """The coefficients of one weight in one stretch of C tokens; ... is [M] or, with an axis, [M, d].

    Args:
        start: beta [..., C]; None for ones.
        buffer: f [..., C], the factor on the second matrix (the momentum buffer); None without one.
        mix: c [..., C, C] or [C, C].
        start_end, buffer_end, mix_end: the same for the weight after the last token: [...], [...], [..., C].
        keep: what is left of the momentum buffer after the last token [...].
        keep_mix: the part of each token's step in the last buffer [..., C].
        axis: the axis that d belongs to.
    """

    start: Tensor | None
    buffer: Tensor | None
    mix: Tensor
    start_end: Tensor | None
    buffer_end: Tensor | None
    mix_end: Tensor
    keep: Tensor | None
    keep_mix: Tensor | None
    axis: Axis

    def read(self, x: Tensor, weight: Tensor, buffer: Tensor | None, inputs: Tensor, errors: Tensor) -> Tensor:
        """Return row i of x times W_i, without materialising any W_i.

        Args:
            x: [M, C, d_in].
            weight, buffer: W_0 and P_0 [M, d_in, d_out].
            inputs, errors: x_j [M, C, d_in] and delta_j [M, C, d_out].
        """
        base = self._scaled_product(x, self.start, weight)
        if buffer is not None and self.buffer is not None:
            base = base + self._scaled_product(x, self.buffer, buffer)
        if self.axis == "none":
            scores = torch.bmm(x, inputs.transpose(1, 2)) * self.mix
            return torch.baddbmm(base, scores, errors, alpha=-1)
        if self.axis == "input":
            weighed = self.mix * inputs.transpose(1, 2)[:, :, None]  # [M, d_in, C, C]
            scores = (weighed * x.transpose(1, 2)[..., None]).sum(1)
            return torch.baddbmm(base, scores, errors, alpha=-1)
        scores = torch.bmm(x, inputs.transpose(1, 2))
        weighed = self.mix * errors.transpose(1, 2)[:, :, None]  # [M, d_out, C, C]
        return base - (weighed * scores[:, None]).sum(-1).transpose(1, 2)

    def end(self, weight: Tensor, buffer: Tensor | None, inputs: Tensor, errors: Tensor) -> Tensor:
        """Return the weight after the last token [M, d_in, d_out]; arguments as for ``read``."""
        base = self._scaled_weight(self.start_end, weight)
        if buffer is not None and self.buffer_end is not None:
            base = base + self._scaled_weight(self.buffer_end, buffer)
        return self._minus_steps(base, self.mix_end, inputs, errors)

    def end_buffer(self, buffer: Tensor, inputs: Tensor, errors: Tensor) -> Tensor:
        """Return the momentum buffer after the last token [M, d_in, d_out]."""
        if self.keep is None or self.keep_mix is None:
            raise RuntimeError("coefficients without momentum have no buffer")
        return self._minus_steps(self._scaled_weight(self.keep, buffer), self.keep_mix, inputs, errors)

    def _scaled_product(self, x: Tensor, factor: Tensor | None, weight: Tensor) -> Tensor:
        """Row i of x times the weight under row i's factor."""
        if factor is None:
            return torch.bmm(x, weight)
        if self.axis == "none":
            return torch.bmm(x, weight) * factor[..., None]
        factor = factor.transpose(1, 2)  # [M, C, d]
        return torch.bmm(x * factor, weight) if self.axis == "input" else torch.bmm(x, weight) * factor

    def _scaled_weight(self, factor: Tensor | None, weight: Tensor) -> Tensor:
        if factor is None:
            return weight
        shape = {"none": (-1, 1, 1), "input": (factor.shape[0], -1, 1), "output": (factor.shape[0], 1, -1)}[self.axis]
        return weight * factor.reshape(shape)

    def _minus_steps(self, base: Tensor, weights: Tensor, inputs: Tensor, errors: Tensor) -> Tensor:
        if self.axis == "output":
            errors = errors * weights.transpose(1, 2)
        else:
            inputs = inputs * (weights[..., None] if self.axis == "none" else weights.transpose(1, 2))
        return torch.baddbmm(base, inputs.transpose(1, 2), errors, alpha=-1)


def summed(
    log_decay: Tensor | None, momentum: Tensor | None, like: Tensor, *, step_first: bool, before: bool, axis: Axis
) -> Coefficients:
    """Return the coefficients of steps that add up.

    Args:
        log_decay, momentum: [..., C], or None.
        like: any tensor of C tokens [..., C]: its length, dtype and device count.
        step_first: whether a step shares its own token's decay.
        before: whether tokens read the weights before their own step.
        axis: which axis of the weight the gates vary along.
    """
    C = like.shape[-1]
    lower = torch.ones(C, C, dtype=torch.bool, device=like.device).tril()
    start = None
    mix = lower.to(like.dtype)
    if log_decay is not None:
        sums = clamp_log_decay(log_decay, like.dtype).to(sum_dtype(like)).cumsum(-1)
        start = sums.to(like.dtype).exp()
        exponents = (sums[..., :, None] - sums[..., None, :]).to(like.dtype)
        mix = exponents.masked_fill(~lower, -torch.inf).exp()  # D
        if step_first:
            mix = mix * log_decay.exp()[..., None, :]
    buffer = keep = keep_mix = None
    if momentum is not None:
        products = _running_products(momentum)  # [..., C, 1 + C]
        keep, keep_mix = products[..., -1, 0], products[..., -1, 1:]
        mixed = mix @ products
        buffer, mix = mixed[..., 0], mixed[..., 1:]
    ends = (None if start is None else start[..., -1], None if buffer is None else buffer[..., -1], mix[..., -1, :])
    if before:
        start = None if start is None else _later(start, 1.0)
        buffer = None if buffer is None else _later(buffer, 0.0)
        mix = _later(mix.transpose(-1, -2), 0.0).transpose(-1, -2)
    return Coefficients(start, buffer, mix, *ends, keep, keep_mix, axis)


def averaged(phase: int, like: Tensor, *, before: bool) -> Coefficients:
    """Return the coefficients of steps that are averaged since the anchor A, ``phase`` tokens before the first one.

    W_i = A + (1/i) (phase (W_0 - A) - sum_j x_j delta_j^T), i counted from the anchor; A takes the buffer's place.
    """
    C = like.shape[-1]
    index = torch.arange(phase + 1, phase + C + 1, dtype=like.dtype, device=like.device)
    start = (phase / index).expand(like.shape)
    buffer = (1 - phase / index).expand(like.shape)
    mix = torch.ones(C, C, dtype=like.dtype, device=like.device).tril() / index[:, None]
    ends = (start[..., -1], buffer[..., -1], mix[-1].expand(like.shape))
    if before:
        start, buffer = _later(start, 1.0), _later(buffer, 0.0)
        mix = _later(mix.T, 0.0).T
    return Coefficients(start, buffer, mix, *ends, None, None, "none")


def shared(shares: Tensor, phase: int, like: Tensor, *, before: bool) -> Coefficients:
    """Return the coefficients of steps whose sum since the anchor A counts by a share c_i, in place of 1/i.

    W_i = A + c_i (P_0 - sum_j x_j delta_j^T), P_0 the sum of the steps before the first of these tokens; A takes the
    weight's place and P_0 the buffer's.
    """
    C = like.shape[-1]
    own = shares[phase : phase + C].to(like.dtype)
    lower = torch.ones(C, C, dtype=like.dtype, device=like.device).tril()
    buffer, mix = own.expand(like.shape), own[:, None] * lower
    ends = (None, buffer[..., -1], mix[-1].expand(like.shape))
    ones = torch.ones_like(like)
    if before:
        earlier = shares[phase - 1].to(like.dtype) if phase else own.new_zeros(())
        buffer = torch.cat([earlier[None], own[:-1]]).expand(like.shape)
        mix = _later(mix.T, 0.0).T
    return Coefficients(None, buffer, mix, *ends, ones[..., -1], ones, "none")


def _later(x: Tensor, first: float) -> Tensor:
    """Shift the last axis by one token, the first of them getting a constant."""
    return torch.cat([torch.full_like(x[..., :1], first), x[..., :-1]], dim=-1)


def _running_products(momentum: Tensor) -> Tensor:
    """Return Pi_{j<m<=l} mu_m for rows l and columns j = 0 (all up to l), 1 ... C; zero where j > l."""
    C = momentum.shape[-1]
    rows = torch.arange(1, C + 1, device=momentum.device)[:, None]
    columns = torch.arange(C + 1, device=momentum.device)
    factors = torch.where(rows > columns, momentum[..., :, None], 1.0)
    return factors.cumprod(-2).masked_fill(rows < columns, 0.0)
