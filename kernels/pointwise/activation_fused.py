"""Pointwise activations and their slopes, for the Triton kernels that end or begin with one."""

# Bodies of jitted functions are Triton's language, not Python: they have no types to check.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

ACTIVATION = {"none": 0, "silu": 1, "sigmoid": 2}


@triton.jit
def activate(z, ACT: tl.constexpr):
    if ACT == 1:
        return z * tl.sigmoid(z)
    if ACT == 2:
        return tl.sigmoid(z)
    return z


@triton.jit
def activate_slope(z, ACT: tl.constexpr):
    """d act / dz."""
    s = tl.sigmoid(z)
    if ACT == 1:
        return s * (1.0 + z * (1.0 - s))
    return s * (1.0 - s)
