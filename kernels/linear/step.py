"""Decoding: one token, or a short block of tokens, from a given state.

The state may be updated in place, so that a decoding loop can be captured in a CUDA graph: nothing is allocated
but the output and nothing is read on the host.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from archspec.errors import ShapeError
from archspec.kernels.backend import (
    check_floating,
    check_groups,
    check_shape,
    default_scale,
    resolve_backend,
    state_dtype,
)

_OP = "linear_attention_step"


def linear_attention_step(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T HV V"],
    state: Float[Tensor, "B HV K V"],
    g: Float[Tensor, "*gate"] | None = None,
    scale: float | None = None,
    inplace: bool = False,
    backend: str = "auto",
) -> tuple[Float[Tensor, "B T HV V"], Float[Tensor, "B HV K V"]]:
    """Read and write ``state`` for T new tokens (usually one), as `linear_attention` does.

        S_t = Diag(exp g_t) S_{t-1} + k_t v_t^T,        o_t = scale * S_t^T q_t

    Args:
        q, k, v, g, scale: as in `linear_attention`, for the new tokens only.
        state: S before the first of them, fp32 (fp64 with fp64 inputs).
        inplace: write the new state into ``state`` and return it; not differentiable.
        backend: "auto", "triton", "chunked" or "reference"; the last two are the same torch loop here.

    Returns:
        o in v's dtype, and the state after the last token.

    Raises:
        ShapeError: shapes, dtypes or devices that do not fit.
        UnsupportedError: a backend that cannot serve these tensors.
    """
    sizes: dict[str, int] = {}
    check_shape(_OP, "q", q, "B T H K", sizes)
    check_shape(_OP, "k", k, "B T H K", sizes)
    check_shape(_OP, "v", v, "B T HV V", sizes)
    check_shape(_OP, "state", state, "B HV K V", sizes)
    groups = check_groups(_OP, sizes["H"], sizes["HV"])
    check_floating(_OP, v.device, q=q, k=k, v=v, g=g, state=state)
    if state.dtype != state_dtype(v):
        raise ShapeError(f"{_OP}: state is {state.dtype}; {state_dtype(v)} is required for {v.dtype} inputs.")
    if g is not None and g.ndim == 1:
        g = g.expand(sizes["B"], sizes["T"], sizes["HV"])
    if g is not None:
        check_shape(_OP, "g", g, "B T HV" if g.ndim == 3 else "B T HV K", sizes)
    scale = default_scale(scale, sizes["K"])
    tensors = (q, k, v, state) if g is None else (q, k, v, state, g)
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    dims = {"key_dim": sizes["K"], "value_dim": sizes["V"]}
    # The Triton step has no backward; one token's gradient is rarely wanted and torch gives it.
    form = resolve_backend(_OP, "chunked" if backend == "auto" and needs_grad else backend, v, dims)
    if form == "triton":
        from archspec.kernels.linear.step_fused import step_fused

        return step_fused(q, k, v, state if inplace else state.clone(), g, scale)
    return _step(q, k, v, state, g, scale, groups, inplace)


def _step(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, g: Tensor | None, scale: float, groups: int, inplace: bool
) -> tuple[Tensor, Tensor]:
    """The torch form of the step, token by token."""
    query = q.to(state.dtype).repeat_interleave(groups, dim=2)
    key = k.to(state.dtype).repeat_interleave(groups, dim=2)
    value = v.to(state.dtype)
    new = state
    outputs = []
    for t in range(q.shape[1]):
        if g is not None:
            alpha = g[:, t].to(state.dtype).exp()
            new = new * (alpha[..., None, None] if alpha.ndim == 2 else alpha[..., None])
        new = new + key[:, t, :, :, None] * value[:, t, :, None, :]
        outputs.append(scale * (query[:, t, :, None] @ new)[:, :, 0])  # [B, HV, V]
    o = torch.stack(outputs, 1).to(v.dtype)
    return o, state.copy_(new) if inplace else new
