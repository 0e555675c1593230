"""The pieces around a recurrence, each one kernel forward and one backward: the public ops.

Between a mixer's projections and its output stand a causal short convolution with its activation, norms of queries,
keys and read-outs, the read-out's gate, and the log decay of a state-space gate. In eager torch each is a chain of
passes over [B, T, H, d] tensors; here each reads its inputs once and writes its result once, with fp32 sums.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from archspec.errors import ShapeError, UnsupportedError, unknown
from archspec.kernels.backend import check_floating, check_shape, resolve_backend
from archspec.kernels.pointwise.reference import (
    gated_product_reference,
    head_norm_reference,
    log_decay_reference,
    short_convolution_reference,
)

__all__ = ["gated_map", "gated_product", "gated_rms_norm", "l2_norm", "log_decay", "short_convolution"]

MAX_CONV_WIDTH = 8
"""Widest convolution of the Triton kernel: its backward pass keeps W tokens of x and dz and W + 1 sums in registers."""

MAX_NORM_DIM = 8192
"""Longest axis that one program of the Triton norm holds."""

CONV_ACTIVATIONS = ("none", "silu")
GATE_ACTIVATIONS = ("silu", "sigmoid")


def short_convolution(
    x: Float[Tensor, "B T D"],
    weight: Float[Tensor, "D W"],
    offset: Float[Tensor, " D"] | None = None,
    activation: str = "none",
    initial_state: Float[Tensor, "B W-1 D"] | None = None,
    output_final_state: bool = False,
    backend: str = "auto",
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B W-1 D"] | None]:
    """Convolve each channel with its last W tokens, then apply an activation.

        y_t = act(sum_i weight_i x_{t - W + 1 + i} + offset)

    Args:
        x: the channels; y has its dtype, sums are fp32 (fp64 for fp64).
        weight: one filter a channel, the newest token's factor last.
        offset: added before the activation.
        activation: "none" or "silu".
        initial_state: the last W - 1 tokens before the first; zeros when None. Differentiable.
        output_final_state: whether to return the last W - 1 tokens of the stretch.
        backend: "auto", "triton", "chunked" or "reference"; the last two are the same torch form here.

    Returns:
        y, and the state that continues the sequence, or None.

    Raises:
        ShapeError: shapes or devices that do not fit.
        UnsupportedError: an unknown activation or backend, or one that cannot serve these tensors.
    """
    op = "short_convolution"
    sizes: dict[str, int] = {}
    check_shape(op, "x", x, "B T D", sizes)
    check_shape(op, "weight", weight, "D W", sizes)
    sizes["W-1"] = sizes["W"] - 1
    for name, tensor, letters in (("offset", offset, "D"), ("initial_state", initial_state, "B W-1 D")):
        if tensor is not None:
            check_shape(op, name, tensor, letters, sizes)
    check_floating(op, x.device, x=x, weight=weight, offset=offset, initial_state=initial_state)
    if sizes["T"] < 1:
        raise ShapeError(f"{op}: T=0; at least one token is required.")
    _check_name(op, "activation", activation, CONV_ACTIVATIONS)
    form = resolve_backend(op, _within(op, backend, "width", sizes["W"], MAX_CONV_WIDTH), x)
    if form == "triton":
        from archspec.kernels.pointwise.convolution_fused import short_convolution_fused

        y = short_convolution_fused(x, weight, offset, initial_state, activation)
    else:
        y = short_convolution_reference(x, weight, offset, initial_state, activation)
    return y, last_tokens(x, initial_state, sizes["W"] - 1) if output_final_state else None


def last_tokens(x: Tensor, state: Tensor | None, count: int) -> Tensor:
    """Return the last ``count`` tokens of ``state`` (or zeros) followed by x [B, T, D]."""
    if x.shape[1] >= count:
        return x[:, x.shape[1] - count :]
    before = x.new_zeros(x.shape[0], count, x.shape[-1]) if state is None else state.to(x.dtype)
    return torch.cat([before[:, x.shape[1] :], x], dim=1)


def l2_norm(x: Float[Tensor, "*rows D"], eps: float = 1e-6, backend: str = "auto") -> Float[Tensor, "*rows D"]:
    """Return x / sqrt(||x||^2 + eps) over the last axis, in x's dtype with fp32 sums.

    Raises:
        UnsupportedError: an unknown backend, or one that cannot serve these tensors.
    """
    return _norm("l2_norm", x, None, None, "l2", "silu", eps, backend)


def gated_rms_norm(
    x: Float[Tensor, "*rows D"],
    gate: Float[Tensor, "*rows D"] | None = None,
    weight: Float[Tensor, " D"] | Float[Tensor, "H D"] | None = None,
    activation: str = "silu",
    eps: float = 1e-6,
    backend: str = "auto",
) -> Float[Tensor, "*rows D"]:
    """Return weight * x / sqrt(mean(x^2) + eps) * act(gate) over the last axis, in x's dtype with fp32 sums.

    Args:
        x: what the memory returned, [..., D], or [..., H, D] with a weight of every head's own.
        gate: the gate before its activation, of x's shape; None is a plain norm.
        weight: learned scale [D], or [H, D].
        activation: "silu" or "sigmoid".

    Raises:
        ShapeError: shapes or devices that do not fit.
        UnsupportedError: an unknown activation or backend, or one that cannot serve these tensors.
    """
    op = "gated_rms_norm"
    _check_name(op, "activation", activation, GATE_ACTIVATIONS)
    if gate is not None and gate.shape != x.shape:
        raise ShapeError(f"{op}: gate has shape {list(gate.shape)}; required is x's, {list(x.shape)}.")
    if weight is not None and (weight.ndim not in (1, 2) or weight.shape != x.shape[-weight.ndim :]):
        raise ShapeError(f"{op}: weight has shape {list(weight.shape)}; required are the last axes of {list(x.shape)}.")
    check_floating(op, x.device, x=x, gate=gate, weight=weight)
    return _norm(op, x, weight, gate, "rms", activation, eps, backend)


def _norm(
    op: str, x: Tensor, weight: Tensor | None, gate: Tensor | None, kind: str, activation: str, eps: float, backend: str
) -> Tensor:
    check_floating(op, x.device, x=x)
    form = resolve_backend(op, _within(op, backend, "the last axis", x.shape[-1], MAX_NORM_DIM), x)
    if form == "triton" and x.numel():
        if kind == "l2":
            from archspec.kernels.pointwise.l2_fused import l2_norm_fused

            return l2_norm_fused(x, eps)
        from archspec.kernels.pointwise.norm_fused import head_norm_fused

        return head_norm_fused(x, weight, gate, activation, eps)
    return head_norm_reference(x, weight, gate, kind, activation, eps)


def gated_product(
    gate: Float[Tensor, "*rows D"], up: Float[Tensor, "*rows D"], activation: str = "silu", backend: str = "auto"
) -> Float[Tensor, "*rows D"]:
    """Return act(gate) * up in up's dtype, computed in fp32 (fp64 for fp64): the inside of a gated feed-forward.

    Raises:
        ShapeError: shapes or devices that do not fit.
        UnsupportedError: an unknown activation or backend, or one that cannot serve these tensors.
    """
    op = "gated_product"
    _check_product(op, gate, up, activation)
    if resolve_backend(op, backend, up) == "triton" and up.numel():
        from archspec.kernels.pointwise.product_fused import gated_product_fused

        return gated_product_fused(gate, up, activation)
    return gated_product_reference(gate, up, activation)


def gated_map(
    gate: Float[Tensor, "*rows D"],
    up: Float[Tensor, "*rows D"],
    weight: Float[Tensor, "D N"],
    activation: str = "silu",
    backend: str = "auto",
) -> Float[Tensor, "*rows N"]:
    """Return (act(gate) * up) W: the end of a gated feed-forward.

    The Triton form does not keep the product for the backward pass, which makes it again beside its gradients: one
    tensor [*rows, D] less, of the two that it needs.

    Raises:
        ShapeError: shapes or devices that do not fit.
        UnsupportedError: an unknown activation or backend, or one that cannot serve these tensors.
    """
    op = "gated_map"
    _check_product(op, gate, up, activation)
    if weight.ndim != 2 or weight.shape[0] != up.shape[-1]:
        raise ShapeError(f"{op}: weight has shape {list(weight.shape)}; required is [{up.shape[-1]}, N].")
    check_floating(op, up.device, gate=gate, up=up, weight=weight)
    if resolve_backend(op, backend, up) == "triton" and up.numel():
        from archspec.kernels.pointwise.product_fused import gated_map_fused

        return gated_map_fused(gate, up, weight, activation)
    return gated_product_reference(gate, up, activation) @ weight


def log_decay(
    z: Float[Tensor, "B T H K"],
    log_rate: Float[Tensor, "H 1"] | Float[Tensor, "H K"],
    offset: Float[Tensor, "H K"] | None = None,
    backend: str = "auto",
) -> Float[Tensor, "B T H K"]:
    """Return -exp(log_rate) softplus(z + offset), the log decay of a state-space gate, in fp32 (fp64 for fp64).

    Source: arXiv:2405.21060 (Mamba-2), with alpha = exp of this; K = 1 for a decay per head.

    Raises:
        ShapeError: shapes or devices that do not fit.
        UnsupportedError: an unknown backend, or one that cannot serve these tensors.
    """
    op = "log_decay"
    sizes: dict[str, int] = {}
    check_shape(op, "z", z, "B T H K", sizes)
    sizes["1"] = 1
    check_shape(op, "log_rate", log_rate, "H 1" if log_rate.shape[-1] == 1 else "H K", sizes)
    if offset is not None:
        check_shape(op, "offset", offset, "H K", sizes)
    check_floating(op, z.device, z=z, log_rate=log_rate, offset=offset)
    if resolve_backend(op, backend, z) == "triton" and z.numel():
        from archspec.kernels.pointwise.decay_fused import log_decay_fused

        return log_decay_fused(z, log_rate, offset)
    return log_decay_reference(z, log_rate, offset)


def _check_product(op: str, gate: Tensor, up: Tensor, activation: str) -> None:
    _check_name(op, "activation", activation, GATE_ACTIVATIONS)
    if gate.shape != up.shape:
        raise ShapeError(f"{op}: gate has shape {list(gate.shape)}; required is up's, {list(up.shape)}.")
    check_floating(op, up.device, gate=gate, up=up)


def _within(op: str, backend: str, name: str, size: int, limit: int) -> str:
    """Return the backend to ask for, given a size that the Triton kernel limits."""
    if size <= limit or backend not in ("auto", "triton"):
        return backend
    if backend == "triton":
        raise UnsupportedError(f"{op}: {name} is {size}, over the Triton kernel's {limit}; use backend='chunked'.")
    return "chunked"


def _check_name(op: str, what: str, name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        raise UnsupportedError(f"{op}: {unknown(what, name, known)}")
