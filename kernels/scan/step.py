"""Decoding one token of a diagonal recurrence."""

from __future__ import annotations

from jaxtyping import Shaped
from torch import Tensor

from archspec.kernels.scan.factors import factors


def diagonal_scan_step(
    x: Shaped[Tensor, "B ..."],
    g: Shaped[Tensor, "..."],
    state: Shaped[Tensor, "B ..."],
    phase: Shaped[Tensor, "..."] | None = None,
) -> Shaped[Tensor, "B ..."]:
    """Return h_t = exp(g_t + i phase_t) h_{t-1} + x_t, arguments as for ``diagonal_scan`` without its time axis."""
    return factors(g, phase) * state + x
