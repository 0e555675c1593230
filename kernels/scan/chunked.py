"""The diagonal recurrence as an associative scan, and as a convolution where its factors are constant.

Two steps of h_t = a_t h_{t-1} + x_t are one, (a, x) followed by (b, y) is (b a, b x + y), so h of every second token
is the scan of half as many pairs, and the tokens between follow by one step each (Blelloch 1990, "Prefix sums and
their applications"): linear work and logarithmic depth. Factors are multiplied and never divided, so nothing
overflows and a factor of zero is exact.

With constant factors, h is the causal convolution of x with the powers of a, which an FFT of twice the length
computes (S4D, arXiv:2206.11893, section 3.3).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from archspec.kernels.scan.factors import factors


def diagonal_scan_chunked(
    x: Tensor, g: Tensor, phase: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run the recurrence as a scan; arguments and results as ``diagonal_scan_reference``."""
    factor = factors(g, phase)
    states = linear_scan(factor, x, initial_state)
    return states, states[:, -1]


def linear_scan(factor: Tensor, x: Tensor, initial_state: Tensor | None) -> Tensor:
    """Return h_t = factor_t h_{t-1} + x_t [B, T, ...] for factors of any sign, [B or 1, T or 1, ...]."""
    factor = factor.expand(factor.shape[0], x.shape[1], *factor.shape[2:])
    if initial_state is not None:
        first = x[:, :1] + factor[:, :1] * initial_state[:, None]
        x = torch.cat([first, x[:, 1:]], dim=1)
    states: Tensor = _Scan.apply(factor, x)  # type: ignore[no-untyped-call]
    return states


class _Scan(torch.autograd.Function):
    """h_t = a_t h_{t-1} + x_t from h_0 = 0; its gradient is the same recurrence backwards in time."""

    @staticmethod
    def forward(ctx: Any, factor: Tensor, x: Tensor) -> Tensor:
        states = _scan(factor, x)
        ctx.save_for_backward(factor, states)
        return states

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        factor, states = ctx.saved_tensors
        # Token t passes its gradient on through the factor of token t + 1.
        later = torch.cat([factor[:, 1:], torch.zeros_like(factor[:, :1])], dim=1).conj()
        inner: Tensor = _Scan.apply(later.flip(1), gradients[0].flip(1))  # type: ignore[no-untyped-call]
        inner = inner.flip(1)
        before = torch.cat([torch.zeros_like(states[:, :1]), states[:, :-1]], dim=1)
        return (inner * before.conj()).sum_to_size(factor.shape), inner


def _scan(factor: Tensor, x: Tensor) -> Tensor:
    T = x.shape[1]
    if T == 1:
        return x
    even, odd = slice(0, T - T % 2, 2), slice(1, T, 2)
    pairs = _scan(factor[:, odd] * factor[:, even], factor[:, odd] * x[:, even] + x[:, odd])
    states = torch.empty_like(pairs.new_empty(()).expand(x.shape), memory_format=torch.contiguous_format)
    states[:, odd] = pairs
    states[:, 0] = x[:, 0]
    inner = slice(2, T, 2)
    states[:, inner] = factor[:, inner] * pairs[:, : (T - 1) // 2] + x[:, inner]
    return states


def diagonal_convolution(
    x: Tensor, g: Tensor, phase: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run the recurrence with constant factors by FFT; g and phase have one token, and the rest is as for the scan.

    The error is relative to the largest state, not to each: an FFT mixes them.
    """
    T = x.shape[1]
    powers = torch.arange(T + 1, dtype=g.dtype, device=g.device).view(1, -1, *[1] * (x.ndim - 2))
    g = g.clamp(min=-800.0 if g.dtype == torch.float64 else -110.0)  # 0 times -inf is not a number
    kernel = factors(powers * g, None if phase is None else powers * phase)
    if x.is_complex():
        spectrum = torch.fft.fft(kernel[:, :T], 2 * T, dim=1) * torch.fft.fft(x, 2 * T, dim=1)
        states = torch.fft.ifft(spectrum, dim=1)[:, :T]
    else:
        spectrum = torch.fft.rfft(kernel[:, :T], 2 * T, dim=1) * torch.fft.rfft(x, 2 * T, dim=1)
        states = torch.fft.irfft(spectrum, 2 * T, dim=1)[:, :T]
    if initial_state is not None:
        states = states + kernel[:, 1:] * initial_state[:, None]
    return states, states[:, -1]
