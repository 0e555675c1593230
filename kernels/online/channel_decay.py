"""Decay along one axis of a weight, without momentum: reads of a chunk in log2(C) batched products.

The coefficients of coefficients.py would be c_ij[d] = exp(G_i - G_j)[d], a matrix for every channel. Decays factor
across a boundary between tokens, exp(G_i - G_m) exp(G_m - G_j), with both exponents at or below zero when i > m >= j.
Halving the chunk again and again, every pair i > j has one level at which a boundary separates it, and each level is
one batched product (Yang et al. 2023, arXiv:2312.06635, section 4.3, tile the same sum in two levels). Mild decays
need one level only, as archspec.kernels.dplr.decay says.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from archspec.kernels.dplr.decay import (
    Centred,
    Factors,
    Halved,
    channel_products,
    clamp_log_decay,
    decay_factors,
    sum_dtype,
)
from archspec.kernels.online.coefficients import Axis


@dataclass(frozen=True)
class ChannelDecay:
    """One weight's decay in one chunk of C tokens; P is C rounded up to a power of two.

    Args:
        start: from the chunk's start to each read [M, C, d].
        leave: from each token to the chunk's end, its own decay included for ``step_first`` [M, C, d].
        total: over the chunk [M, d].
        own: each token's own decay, which its step shares for ``step_first`` [M, C, d]; else None.
        factors: decay between tokens, as factors of the earlier and of the later one.
        length: P, to which the factors want the tokens padded.
        before: whether tokens read the weights before their own step.
        axis: the axis of the weight that d belongs to.
    """

    start: Tensor
    leave: Tensor
    total: Tensor
    own: Tensor | None
    factors: Factors
    length: int
    before: bool
    axis: Axis

    def read(self, x: Tensor, weight: Tensor, buffer: Tensor | None, inputs: Tensor, errors: Tensor) -> Tensor:
        """Return row i of x times W_i; arguments as for ``Coefficients.read``, the buffer being None."""
        if self.axis == "input":
            scores = self._scores(x, inputs if self.own is None else inputs * self.own)
            return torch.baddbmm(torch.bmm(x * self.start, weight), scores, errors, alpha=-1)
        errors = errors if self.own is None else errors * self.own
        scores = torch.bmm(x, inputs.transpose(1, 2))
        return torch.bmm(x, weight) * self.start - self._mixed(scores, errors)

    def end(self, weight: Tensor, buffer: Tensor | None, inputs: Tensor, errors: Tensor) -> Tensor:
        """Return the weight after the last token; arguments as for ``Coefficients.end``, the buffer being None."""
        if self.axis == "input":
            return torch.baddbmm(
                weight * self.total[:, :, None], (inputs * self.leave).transpose(1, 2), errors, alpha=-1
            )
        return torch.baddbmm(weight * self.total[:, None], inputs.transpose(1, 2), errors * self.leave, alpha=-1)

    def end_buffer(self, buffer: Tensor, inputs: Tensor, errors: Tensor) -> Tensor:
        """Never called: this form is chosen only where there is no momentum."""
        raise RuntimeError("a decay without momentum has no buffer")

    def _scores(self, x: Tensor, inputs: Tensor) -> Tensor:
        """Return the decayed products of reads and layer inputs [M, C, C]."""
        C = x.shape[1]
        more = self.length - C
        x, inputs = (pad(y, (0, 0, 0, more)) if more else y for y in (x, inputs))
        own = torch.zeros_like(x[..., 0]) if self.before else (x * inputs).sum(-1)
        products = channel_products(x[:, None, None], inputs[:, None, None], own[:, None, None, None], self.factors)
        return products[:, 0, 0, 0, :C, :C]

    def _mixed(self, scores: Tensor, errors: Tensor) -> Tensor:
        """Return sum_j scores_ij exp(R_i - G_j) errors_j, the decay on the errors' channels [M, C, d]."""
        M, C, d = errors.shape
        more = self.length - C
        if more:
            scores, errors = pad(scores, (0, more, 0, more)), pad(errors, (0, 0, 0, more))
        mixed = torch.zeros_like(errors)
        if not self.before:
            mixed = scores.diagonal(dim1=1, dim2=2)[..., None] * errors
        if isinstance(self.factors, Centred):
            fallen = errors * self.factors.fall[:, 0]
            return (mixed + torch.bmm(scores.tril(-1), fallen) * self.factors.rise[:, 0])[:, :C]
        for rise, fall in zip(self.factors.rise, self.factors.fall, strict=True):
            blocks, s = fall.shape[2:4]
            fallen = errors.view(M, blocks, 2, s, d).unbind(2)[0] * fall[:, 0]
            pairs = scores.view(M, blocks, 2 * s, blocks, 2 * s).diagonal(dim1=1, dim2=3)  # [M, 2 s, 2 s, blocks]
            met = pairs[:, s:, :s].movedim(-1, 1) @ fallen
            mixed = mixed + pad(met * rise[:, 0], (0, 0, s, 0)).view(mixed.shape)
        return mixed[:, :C]


def channel_decay(log_decay: Tensor, *, step_first: bool, before: bool, axis: Axis) -> list[ChannelDecay]:
    """Return the decay of each of N equal chunks from log decays [M, N, C, d]."""
    C = log_decay.shape[-2]
    P = 1 << (C - 1).bit_length()
    dtype = log_decay.dtype
    clamped = clamp_log_decay(log_decay, dtype)
    precise = pad(clamped, (0, 0, 0, P - C)).to(sum_dtype(log_decay))
    sums = precise.cumsum(-2)
    read_sums = sums - precise if before else sums
    left = (sums[..., -1:, :] - sums).to(dtype)[..., :C, :]
    own = clamped.exp().unbind(1) if step_first else None
    leave = (left if own is None else left + clamped).exp().unbind(1)
    start = read_sums[..., :C, :].to(dtype).exp().unbind(1)
    total = sums[..., -1, :].to(dtype).exp().unbind(1)
    factors = _by_chunk(decay_factors(read_sums, sums, dtype), log_decay.shape[1])
    return [
        ChannelDecay(
            start=start[n],
            leave=leave[n],
            total=total[n],
            own=None if own is None else own[n],
            factors=factors[n],
            length=P,
            before=before,
            axis=axis,
        )
        for n in range(log_decay.shape[1])
    ]


def _by_chunk(factors: Factors, count: int) -> list[Factors]:
    """Split factors [M, N, ...] into those of each of the N chunks [M, 1, ...]."""
    if isinstance(factors, Centred):
        pairs = zip(torch.split(factors.rise, 1, dim=1), torch.split(factors.fall, 1, dim=1), strict=True)
        return [Centred(rise, fall) for rise, fall in pairs]
    rises, falls = ([torch.split(x, 1, dim=1) for x in side] for side in (factors.rise, factors.fall))
    return [Halved(tuple(x[n] for x in rises), tuple(x[n] for x in falls)) for n in range(count)]
