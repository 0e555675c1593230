"""Elementwise states (rule family scan): diagonal recurrences, real and complex: the public ops.

Covers Mamba (a decay per channel and state), S4D, S5 and LRU (constant complex decays), the diagonal form of
Longhorn, and decays per value channel.
"""

from __future__ import annotations

from jaxtyping import Shaped
from torch import Tensor

from archspec.errors import ShapeError, UnsupportedError
from archspec.kernels.backend import resolve_backend
from archspec.kernels.scan.chunked import diagonal_convolution, diagonal_scan_chunked
from archspec.kernels.scan.reference import diagonal_scan_reference
from archspec.kernels.scan.step import diagonal_scan_step

__all__ = ["diagonal_scan", "diagonal_scan_step"]

_OP = "diagonal_scan"


def diagonal_scan(
    x: Shaped[Tensor, "B T ..."],
    g: Shaped[Tensor, "_ _ ..."],
    phase: Shaped[Tensor, "_ _ ..."] | None = None,
    initial_state: Shaped[Tensor, "B ..."] | None = None,
    backend: str = "auto",
) -> tuple[Shaped[Tensor, "B T ..."], Shaped[Tensor, "B ..."]]:
    """Run a recurrence whose every channel decays, and turns in the complex plane, by itself.

        h_t = exp(g_t + i phase_t) h_{t-1} + x_t

    Sources: S5, arXiv:2208.04933, section 2.2 (the scan); Mamba, arXiv:2312.00752, section 3.3.

    Args:
        x: what is written, [B, T, ...]; complex if and only if there is a phase.
        g: natural log of the decay, at most zero, -inf to forget all; [B or 1, T or 1, ...], its other axes those of
            x or 1. One token stands for all: the factors are constant.
        phase: angle in radians a token turns the state by; like g.
        initial_state: h_0; zeros when None. Differentiable.
        backend: "auto", "chunked" (an associative scan), "fft" (a convolution: constant factors only; its error is
            relative to the largest state) or "reference". "auto" is the scan.

    Returns:
        h [B, T, ...], the state after every token, and the last of them, in x's dtype.

    Raises:
        ShapeError: shapes, dtypes or devices that do not fit.
        UnsupportedError: a backend that cannot serve these tensors.
    """
    _check(x, g, phase, initial_state)
    if backend == "fft":
        if g.shape[1] != 1 or (phase is not None and phase.shape[1] != 1):
            raise UnsupportedError(
                f"{_OP}: backend 'fft' needs factors that are the same for all tokens, [B or 1, 1, ...]; found g "
                f"{list(g.shape)}; use backend='chunked'."
            )
        return diagonal_convolution(x, g, phase, initial_state)
    form = resolve_backend(_OP, backend, g, has_triton=False)
    return (diagonal_scan_reference if form == "reference" else diagonal_scan_chunked)(x, g, phase, initial_state)


def _check(x: Tensor, g: Tensor, phase: Tensor | None, initial_state: Tensor | None) -> None:
    if x.ndim < 2 or not x.numel():
        raise ShapeError(f"{_OP}: x has shape {list(x.shape)}; required is [B, T, ...] with at least one token.")
    if x.is_complex() != (phase is not None):
        raise ShapeError(
            f"{_OP}: x is {x.dtype} and there is {'no' if phase is None else 'a'} phase; a phase needs a complex x, "
            "and a complex x a phase."
        )
    real = x.real.dtype if x.is_complex() else x.dtype
    for name, y in (("g", g), ("phase", phase)):
        if y is None:
            continue
        if y.ndim != x.ndim or any(n not in (1, m) for n, m in zip(y.shape, x.shape, strict=True)):
            raise ShapeError(
                f"{_OP}: {name} has shape {list(y.shape)}; required are the axes of x {list(x.shape)} or 1."
            )
        if y.dtype != real or y.device != x.device:
            raise ShapeError(
                f"{_OP}: {name} has dtype {y.dtype} on {y.device}; required is {real} on {x.device}, as x; convert it."
            )
    if initial_state is not None and (initial_state.shape != x[:, 0].shape or initial_state.dtype != x.dtype):
        raise ShapeError(
            f"{_OP}: initial_state is {initial_state.dtype} {list(initial_state.shape)}; required is {x.dtype} "
            f"{list(x[:, 0].shape)}."
        )
