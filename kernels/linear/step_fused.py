"""The decoding step of linear attention as one Triton kernel that updates the state in place."""

# Bodies of jitted functions are Triton's language, not Python: they have no types to check.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from archspec.launches import padded_dim


@triton.jit
def _step_kernel(
    q, k, v, g, state, out, scale, T,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr,
):  # fmt: skip
    """Program (v block, batch and head): GATE 0 none, 1 a decay per token, 2 one per key channel."""
    i_v, i_bh = tl.program_id(1), tl.program_id(0)
    i_b, i_h = tl.cast(i_bh // HV, tl.int64), i_bh % HV
    i_hk = i_h // (HV // H)
    cols_k, cols_v = tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    keep_k, keep_v = cols_k < K, cols_v < V
    at = state + tl.cast(i_bh, tl.int64) * (K * V) + cols_k[:, None] * V + cols_v[None, :]
    keep = keep_k[:, None] & keep_v[None, :]
    S = tl.load(at, mask=keep, other=0.0)
    for t in range(T):
        row = i_b * T + t
        query = tl.load(q + (row * H + i_hk) * K + cols_k, mask=keep_k, other=0.0).to(tl.float32)
        key = tl.load(k + (row * H + i_hk) * K + cols_k, mask=keep_k, other=0.0).to(tl.float32)
        value = tl.load(v + (row * HV + i_h) * V + cols_v, mask=keep_v, other=0.0).to(tl.float32)
        if GATE == 1:
            S *= tl.exp(tl.load(g + row * HV + i_h).to(tl.float32))
        if GATE == 2:
            S *= tl.exp(tl.load(g + (row * HV + i_h) * K + cols_k, mask=keep_k, other=0.0).to(tl.float32))[:, None]
        S += key[:, None] * value[None, :]
        o = tl.sum(S * query[:, None], 0) * scale
        tl.store(out + (row * HV + i_h) * V + cols_v, o.to(out.dtype.element_ty), mask=keep_v)
    tl.store(at, S, mask=keep)


@torch.library.custom_op("archspec::linear_attention_step", mutates_args=("state",))
def _step_op(q: Tensor, k: Tensor, v: Tensor, state: Tensor, g: Tensor | None, scale: float) -> Tensor:
    B, T, H, K = q.shape
    HV, V = v.shape[-2:]
    out = torch.empty_like(v)
    BK = padded_dim(K)
    BV = min(padded_dim(V), max(16, 4096 // BK))  # 32 fp32 registers of state a thread
    gate = 0 if g is None else g.ndim - 2
    _step_kernel[(B * HV, -(-V // BV))](
        q, k, v, g, state, out, scale, T, H=H, HV=HV, K=K, V=V, BK=BK, BV=BV, GATE=gate, num_warps=4
    )
    return out


@_step_op.register_fake
def _step_fake(q: Tensor, k: Tensor, v: Tensor, state: Tensor, g: Tensor | None, scale: float) -> Tensor:
    return torch.empty_like(v)


def step_fused(q: Tensor, k: Tensor, v: Tensor, state: Tensor, g: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Run the step on contiguous copies where needed; ``state`` [B, HV, K, V] is updated in place and returned."""
    kept = state if state.is_contiguous() else state.contiguous()
    gate = None if g is None else g.float().contiguous()
    o = _step_op(q.contiguous(), k.contiguous(), v.contiguous(), kept, gate, scale)
    return o, kept if kept is state else state.copy_(kept)
